"""Missing features: structure that stands alone, covered with a plain piece of the same image."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .batches import shift

# Half axes of the ellipses that may be erased, along x and y and in units of the image's size.
ERASED_FEATURES = tuple((r, r) for r in (0.03, 0.045, 0.06, 0.075)) + tuple(
    axes for a, b in ((0.09, 0.03), (0.13, 0.045), (0.2, 0.045)) for axes in ((a, b), (b, a))
)


def erase(images: Tensor, allowed: Tensor, u: np.ndarray) -> Tensor:
    """Covers an ellipse in each image with a plain piece of the same image: a feature that is missing.

    With a visible seam, the network would learn to find the seam instead of comparing with the reconstruction. So the
    feature is one that stands alone and is covered whole, the piece is one of the plainest, and its brightness is
    fitted to the rim's, including the gradient.
    """
    height, width = images.shape[-2:]
    grey = images.mean(1, keepdim=True)
    size = math.isqrt(height * width)
    # The search is the most expensive part, so it is done at 64 px or little more.
    coarse = max(size // 64, 1)
    small, product = F.avg_pool2d(grey, coarse), F.avg_pool2d(allowed, coarse).floor()
    found = _lone_feature(small, product, u[:, :1])
    depth, _ = _ellipses(*found, *small.shape[-2:])
    cover = (depth >= -size / coarse / 32).to(grey.dtype)
    down, right = (part * coarse for part in _plain_piece(small, product, cover, u[:, 1:]))
    patch = shift(images, down, right)

    depth, plane = _ellipses(*(part * coarse for part in found), height, width)  # type: ignore[call-arg]
    rim, difference = _rim(depth, size) * allowed, images - patch
    light = _fit_plane(difference, rim, plane[:, 0])
    # Fitted again without outliers, such as a feature's edge that crosses the rim.
    missed = (difference - light).abs().amax(1, keepdim=True)
    light = _fit_plane(difference, rim * torch.exp(-((missed / 0.05) ** 2)), plane[:, 0]).clamp_(-0.15, 0.15)
    soft = (2 + 64 * depth / size).clamp_(0, 1)
    return torch.lerp(images, (patch + light).clamp_(0, 1), soft)


def _plain_piece(grey: Tensor, allowed: Tensor, cover: Tensor, u: np.ndarray) -> tuple[Tensor, Tensor]:
    """How many px down and right to shift each image to bring one of its plainest pieces under a cover, `(N,)`.

    All shifts are tried at once, as a correlation of the plain product with the cover.
    """
    height, width = grey.shape[-2:]
    rough = (grey - F.avg_pool2d(grey, 3, 1, 1, count_include_pad=False)).abs()
    plain = allowed / (1 + (rough / 0.03) ** 4)
    size = (2 * height, 2 * width)  # twice, so that nothing comes in from the other side
    spectrum = torch.fft.rfft2(cover, s=size) * torch.fft.rfft2(plain, s=size).conj()
    share = torch.fft.irfft2(spectrum, s=size).flatten(1) / cover.sum((1, 2, 3)).clamp(min=1)[:, None]
    # Not always the best one, but hardly any that is a percent rougher.
    at = _drawn(((share - share.amax(1, keepdim=True)) / 0.005).exp().double().cumsum(1), u)
    return at // size[1], at % size[1]


def _lone_feature(grey: Tensor, allowed: Tensor, u: np.ndarray) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """An ellipse on the product whose inside stands out from a plain rim: column, row, half axes, `(N, 1, 1, 1)` px.

    All positions and shapes are tried at once, by correlation: how much the rim varies, and how much the inside
    differs from the rim's mean. If nothing stands alone, the ellipse that comes closest is returned.
    """
    height, width = grey.shape[-2:]
    wide, tall = torch.tensor(ERASED_FEATURES, dtype=grey.dtype, device=grey.device).T[:, :, None, None]
    wide, tall = wide * math.isqrt(height * width), tall * math.isqrt(height * width)
    size = (2 * height, 2 * width)  # twice, so that nothing comes in from the other side
    depth, _ = _ellipses(torch.full_like(wide, width), torch.full_like(tall, height), wide, tall, *size)
    areas = torch.stack([(depth > 0).to(grey.dtype), _rim(depth, math.isqrt(height * width))])  # (2, K, 2 H, 2 W)
    kernels = torch.fft.rfft2(torch.fft.ifftshift(areas / areas.sum((2, 3), keepdim=True), dim=(2, 3)))
    moments = torch.stack([allowed, grey, grey**2])[:, :, None]  # (3, N, 1, 1, H, W) with the two areas and K shapes
    means = torch.fft.irfft2(torch.fft.rfft2(moments, s=size) * kernels, s=size)[..., :height, :width]
    (product, first, second), (on_product, mean, square) = means.unbind(2)
    rim = (square - mean**2).clamp_(min=0).sqrt()
    inside = (second - 2 * mean * first + mean**2).clamp_(min=0).sqrt()
    alone = inside / (rim + 0.005) * ((product > 0.99) & (on_product > 0.99))
    # Prefer tight ellipses, within bounds that leave faint features a chance.
    weight = (((alone > 1.5) & (rim < 0.06)) * alone.clamp(max=3)).double().flatten(1)
    nearest = F.one_hot(alone.flatten(1).argmax(1), weight.shape[1])
    ends = torch.where(weight.amax(1, keepdim=True) > 0, weight, nearest).cumsum(1)
    at = _drawn(ends, u)
    shape, row, column = at // (height * width), at // width % height, at % width
    return tuple(part.to(grey.dtype).view(-1, 1, 1, 1) for part in (column, row, wide[shape], tall[shape]))


def _drawn(ends: Tensor, u: np.ndarray) -> Tensor:
    """For each row of cumulated weights, `(N, K)`, the index that a uniform number, `(N, 1)`, falls on: `(N,)`."""
    at = torch.searchsorted(ends, torch.from_numpy(u).to(ends) * ends[:, -1:], right=True)
    return at.clamp_(max=ends.shape[1] - 1)[:, 0]


def _ellipses(
    column: Tensor, row: Tensor, wide: Tensor, tall: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor]:
    """K ellipses an image, their parameters `(N, K, 1, 1)` in px.

    Returns:
        How deep inside an ellipse each pixel lies, in px along its narrow side, negative outside, `(N, K, H, W)`; and
        the functions 1, x, y that span the planes over it, `(N, K, 3, H, W)`.
    """
    x = torch.arange(width, device=wide.device, dtype=wide.dtype)
    y = torch.arange(height, device=wide.device, dtype=wide.dtype)[:, None]
    right, below = torch.broadcast_tensors((x - column) / wide, (y - row) / tall)
    depth = (1 - (right**2 + below**2).sqrt()) * torch.minimum(wide, tall)
    return depth, torch.stack([torch.ones_like(depth), right, below], dim=2)


def _rim(depth: Tensor, size: int) -> Tensor:
    """1 on the pixels around an ellipse, out to a 32th of the image's size."""
    return ((depth < 0) & (depth >= -size / 32)).to(depth.dtype)


def _fit_plane(values: Tensor, weight: Tensor, plane: Tensor) -> Tensor:
    """The planes, `(N, C, H, W)`, that fit values of that shape by least squares under a weight, `(N, 1, H, W)`."""
    basis, weight = plane.flatten(2), weight.flatten(2)  # (N, 3, HW), (N, 1, HW)
    weighted = basis * weight
    ridge = (1e-3 * weight.sum(2, keepdim=True) + 1e-9) * torch.eye(3, device=values.device)
    fitted = torch.linalg.solve(weighted @ basis.mT + ridge, weighted @ values.flatten(2).mT)  # (N, 3, C)
    return (fitted.mT @ basis).unflatten(2, values.shape[-2:])
