"""Ten operations on the colours of an image, of which three are applied to every source of anomalies."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .batches import column, replace, rotate, select

OPERATIONS_PER_SOURCE = 3


def change_colors(images: Tensor, order: np.ndarray, parameters: np.ndarray) -> Tensor:
    """Three different operations of ten on each image, in random order (reference: `randAugmenter`).

    Args:
        images: `(N, 3, H, W)` float32 in [0, 1]; may be overwritten.
        order: `(N, 10)` uniform numbers; the operations with the three smallest are applied, the smallest first.
        parameters: `(N, 9)` uniform numbers in [0, 1), three for each step.
    """
    selected = np.argsort(order, axis=1)[:, :OPERATIONS_PER_SOURCE]
    for step in range(OPERATIONS_PER_SOURCE):
        for number in np.unique(selected[:, step]):
            rows = selected[:, step] == number
            changed = OPERATIONS[number](select(images, rows), parameters[rows, 3 * step : 3 * step + 3])
            images = replace(images, rows, changed)
    return images


def _gamma(x: Tensor, u: np.ndarray) -> Tensor:
    """Gamma of 0.5 to 2, each channel its own."""
    return x.log2().mul_(torch.from_numpy(0.5 + 1.5 * u).to(x)[:, :, None, None]).exp2_()


def _brightness(x: Tensor, u: np.ndarray) -> Tensor:
    """Luma times 0.8 to 1.2 and plus -30 to 30 of 255, in either order, at constant chroma."""
    scale, shift = 0.8 + 0.4 * u[:, :1], (60 * u[:, 1:2] - 30) / 255
    shift = np.where(u[:, 2:] < 0.5, shift, shift * scale)  # shifting first scales the shift as well
    luma = 0.299 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]
    return (x + (luma * column(scale - 1, x) + column(shift, x))).clamp_(0, 1)


def _sharpness(x: Tensor, u: np.ndarray) -> Tensor:
    """Blend of a smoothed copy (0) and the image (1) by 0.1 to 1.9, like Pillow's: the outermost pixels stay."""
    strip = x[..., :-2, :] + x[..., 1:-1, :] + x[..., 2:, :]
    smooth = (strip[..., :-2] + strip[..., 1:-1] + strip[..., 2:] + 4 * x[..., 1:-1, 1:-1]) / 13
    sharp = x.clone()
    sharp[..., 1:-1, 1:-1] = torch.lerp(smooth, x[..., 1:-1, 1:-1], column(0.1 + 1.8 * u[:, :1], x)).clamp_(0, 1)
    return sharp


def _hue_saturation(x: Tensor, u: np.ndarray) -> Tensor:
    """HSV hue plus -50 to 50 of a circle of 255, saturation plus -50 to 50 of 255."""
    value, darkest = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    chroma = value - darkest
    # Channels above the darkest, in [0, 1]. In sixths of a circle the hue is 1 + green - red where blue is darkest ...
    red, green, blue = ((x - darkest) / chroma.clamp_min(1e-8)).split(1, dim=1)
    no_blue = 1 - blue.sign()
    no_red = (1 - red.sign()) * (1 - no_blue)
    no_green = 1 - no_blue - no_red
    hue = no_blue * (1 + green - red) + no_red * (3 + blue - green) + no_green * (5 + red - blue)
    hue = hue.add_(column((100 * u[:, :1] - 50) * 6 / 255, x)).remainder_(6)
    saturation = (chroma / value.clamp_min(1e-8)).add_(column((100 * u[:, 1:2] - 50) / 255, x)).clamp_(0, 1)
    # ... and back: the share of the chroma that a channel lacks grows with the distance from its own hue: 0, 2 or 4.
    center, sign, start = x.new_tensor([[3, 2, 4], [-1, 1, 1], [2, -1, -1]]).view(3, 1, 3, 1, 1)
    lacking = (hue - center).abs_().mul_(sign).add_(start).clamp_(0, 1)
    return torch.addcmul(value, saturation.mul_(value), lacking, value=-1)


def _solarize(x: Tensor, u: np.ndarray) -> Tensor:
    """In half of the cases, inverts values above 32 to 128 of 255."""
    threshold = column(np.where(u[:, :1] < 0.5, (32 + 96 * u[:, 1:2]) / 255, 2.0), x)
    return torch.addcmul(x, (x - threshold).gt_(0), 1 - 2 * x)


def _posterize(x: Tensor, u: np.ndarray) -> Tensor:
    """Keeps 1 to 8 bits of each 8-bit value and puts it at its bin's centre."""
    size = column(2.0 ** (7 - np.floor(8 * u[:, :1])), x)
    return (x * (255 / size)).floor_().add_(0.5).mul_(size / 255).clamp_(0, 1)


def _invert(x: Tensor, u: np.ndarray) -> Tensor:
    return 1 - x


def _autocontrast(x: Tensor, u: np.ndarray) -> Tensor:
    """Stretches each channel to [0, 1] after cutting 0 to 20 % of the pixels at either end, like Pillow's."""
    below = _histograms(_bins(x)).view(len(x), -1, 256).cumsum(2)  # pixels at most as bright as a level
    total = below[..., -1:]
    cut = total * torch.from_numpy(np.floor(21 * u[:, :1])).to(below)[:, :, None] // 100
    low = (below <= cut).sum(2)[..., None, None] / 255
    high = (below < total - cut).sum(2)[..., None, None] / 255
    flat = high <= low  # stays as it is
    return ((x - low.masked_fill(flat, 0)) / (high - low).masked_fill(flat, 1)).clamp_(0, 1)


def _equalize(x: Tensor, u: np.ndarray) -> Tensor:
    """Equalises each channel's histogram of 256 levels, like Pillow's."""
    bins = _bins(x)
    counts = _histograms(bins)
    below = counts.cumsum(1)
    brightest = (below < below[:, -1:]).sum(1, keepdim=True)
    step = (below[:, -1:] - counts.gather(1, brightest)) // 255
    table = ((below - counts + step // 2) // step.clamp_min(1)).clamp_(max=255)
    table = torch.where(step > 0, table, torch.arange(256, device=x.device)) / 255
    return table.flatten().index_select(0, bins.flatten()).view_as(x)


def _rotate_source(x: Tensor, u: np.ndarray) -> Tensor:
    """Rotation by -45 to 45 degrees about the centre; black where nothing was."""
    # Rounding in the interpolation may exceed 1, which inverted would be negative and have no gamma.
    return rotate(x, 90 * u[:, 0] - 45).clamp_(0, 1)


# Each maps [0, 1] into [0, 1] exactly, as the next one relies on it.
OPERATIONS: tuple[Callable[[Tensor, np.ndarray], Tensor], ...] = (
    _gamma,
    _brightness,
    _sharpness,
    _hue_saturation,
    _solarize,
    _posterize,
    _invert,
    _autocontrast,
    _equalize,
    _rotate_source,
)


def _bins(x: Tensor) -> Tensor:
    """The 8-bit level of each value plus 256 times the number of its channel: `(N * C, H * W)` int32."""
    channels = x.shape[0] * x.shape[1]
    levels = (x * 255).add_(0.5).int().view(channels, -1)
    return levels.add_(256 * torch.arange(channels, dtype=torch.int32, device=x.device)[:, None])


def _histograms(bins: Tensor) -> Tensor:
    """Pixels at each level: `(N * C, 256)` int64."""
    return torch.bincount(bins.flatten(), minlength=256 * len(bins)).view(-1, 256)
