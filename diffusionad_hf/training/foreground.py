"""Where the product is in its pictures: from the user's masks, or estimated from several normal images.

Anomalies belong on the product, not on the table beside it. The reference needs a mask for every training image, made
by a separate segmentation network; here the background is learnt from the images' borders.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

from ..files import escaped, is_litter
from ..images_diffusionad import IMAGE_SUFFIXES
from ..masks import read_mask, undecorated

KINDS = ("auto", "object", "texture")

MOST_LEARNT_FROM = 64  # images to learn a background from: more change nothing
WORKING_SIDE = 256  # pixels of the longer side at which the background is modelled
FRAME = 0.05  # width of the border assumed to be background, as a share of the shorter side
MIN_THRESHOLD = 3.0**0.75  # an object differs from its background by at least 3 standard deviations of that
MIN_AREA = 0.005  # share of the images that an object must fill
SNAPPING = ((12, 20), (6, 8), (3, 4))  # neighbourhood in working pixels, most iterations


def find_foregrounds(folder: str | Path, names: Sequence[str]) -> list[Path]:
    """The mask's file for each image name: the same stem, also with `_mask` and the like, and any image's suffix."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"foreground folder {folder} does not exist; leave it out to have foregrounds estimated"
        )
    files = [p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not is_litter(p.name)]
    # PNGs come last, so they win over files of the same stem.
    files.sort(key=lambda path: (path.suffix.lower() == ".png", path))
    masks = {escaped(undecorated(path.stem)): path for path in files} | {escaped(path.stem): path for path in files}
    found = []
    for name in names:
        stem = Path(name).stem
        path = masks.get(stem)
        if path is None:
            raise FileNotFoundError(f"no foreground for image {name}: expected {folder / stem}.png")
        found.append(path)
    return found


def load_foreground(path: Path) -> np.ndarray:
    """Reads one of the user's masks, white on the product.

    Returns:
        `(H, W)` bool, as [`read_mask`] finds them.

    Raises:
        ValueError: if the mask cannot be read or is empty.
    """
    try:
        mask = read_mask(path, str(path))
    except ValueError as error:
        raise ValueError(f"foreground {path} cannot be read: {error}") from error
    if not mask.any():
        raise ValueError(f"foreground {path} is empty: the product must be white on black")
    return mask


class ForegroundEstimator:
    """Tells objects from textures and separates objects from their background.

    The background is modelled on the images' borders: a smooth surface of brightness and colour for each image, and
    one spread around it for all. The distances of the pixels from their background, in standard deviations, are split
    by Otsu's threshold. The images show an object if that threshold is far above the spread and what exceeds it keeps
    away from the borders. The outline then snaps to the sharp edges near it, which excludes shadows. Holes in an
    object belong to it.

    Spread and threshold are learnt once, from some images; any other image is then processed by itself.

    Args:
        images: normal images of one product to learn from, each `(H, W, 3)` uint8; `MOST_LEARNT_FROM` are enough.
        kind: "object" or "texture" if known.

    Attributes:
        kind: "object" or "texture".
    """

    def __init__(self, images: Sequence[np.ndarray], kind: str = "auto") -> None:
        self.kind = kind
        if kind == "texture":
            return
        deviations = [_deviation(image) for image in images]
        noise = np.concatenate([deviation[background] for deviation, background in deviations])
        # Adding two grey levels keeps the covariance of flat or grey backgrounds regular.
        covariance = np.cov(noise.T) + np.eye(3) * (2 / 255) ** 2
        self._whiten = np.linalg.cholesky(np.linalg.inv(covariance)) / np.sqrt(3)
        distances = [self._distance(deviation) for deviation, _ in deviations]
        # Below one standard deviation there is nothing to split but noise.
        self._threshold = max(_otsu(np.concatenate([distance.ravel() for distance in distances])), 1.0)
        if kind == "auto":
            apart = self._threshold > MIN_THRESHOLD
            inside = apart and _is_inside([_clean(distance > self._threshold) for distance in distances])
            self.kind = "object" if inside else "texture"

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """The foreground of an image `(H, W, 3)` uint8: `(H, W)` bool, True everywhere on a texture."""
        if self.kind == "texture":
            return np.ones(image.shape[:2], bool)
        distance = self._distance(_deviation(image)[0])
        return _resize(_snap(distance, _clean(distance > self._threshold)), image.shape[:2])

    def _distance(self, deviation: np.ndarray) -> np.ndarray:
        """Each pixel's distance from its background in standard deviations, to the power 0.75."""
        # The power keeps an object's brightest parts from hiding its dull ones; a lower one would include shadows.
        return np.linalg.norm(deviation @ self._whiten, axis=-1).astype(np.float32) ** 0.75


def _deviation(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An image's difference from the smooth surface of its background, and which pixels show that background.

    Returns `(h, w, 3)` float32 and `(h, w)` bool of the image's proportions, the longer side at most `WORKING_SIDE`.
    """
    height, width = image.shape[:2]
    scale = min(1.0, WORKING_SIDE / max(height, width))
    size = max(8, round(width * scale)), max(8, round(height * scale))
    small = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX), dtype=np.float32) / 255
    small = ndimage.gaussian_filter(small, (1, 1, 0)).reshape(-1, 3)
    y, x = (axis.ravel() for axis in np.meshgrid(*(np.linspace(-1, 1, n) for n in size[::-1]), indexing="ij"))
    terms = np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], axis=1)
    frame = _frame(size[::-1]).ravel()
    # Light falls off smoothly: a quadratic surface fitted to the frame, without what sticks out of it.
    background = frame
    for _ in range(4):
        surface = terms @ np.linalg.lstsq(terms[background], small[background], rcond=None)[0]
        size_of_deviation = np.abs(small - surface).max(axis=1)
        limit = max(3 * 1.4826 * np.median(size_of_deviation[background]), 4 / 255)
        background = frame & (size_of_deviation < limit)
    return (small - surface).astype(np.float32).reshape(*size[::-1], 3), background.reshape(size[::-1])


def _frame(shape: tuple[int, int]) -> np.ndarray:
    width = max(2, round(FRAME * min(shape)))
    frame = np.ones(shape, bool)
    frame[width:-width, width:-width] = False
    return frame


def _otsu(values: np.ndarray) -> float:
    """The threshold with the greatest variance between the two classes it makes (Otsu 1979)."""
    counts, edges = np.histogram(values, 512)
    below, total = counts.cumsum()[:-1], counts.sum()
    moment = (counts * (edges[:-1] + edges[1:]) / 2).cumsum()
    variance = (moment[-1] * below - total * moment[:-1]) ** 2 / np.maximum(below * (total - below), 1)
    return float(edges[1 + variance.argmax()])


def _is_inside(masks: list[np.ndarray]) -> bool:
    """Whether the masks mark something that keeps away from the images' borders."""
    overall = np.mean([mask.mean() for mask in masks])
    border = np.mean([mask[_frame(mask.shape)].mean() for mask in masks])
    return bool(overall > MIN_AREA and border < overall / 2)


def _clean(mask: np.ndarray) -> np.ndarray:
    """Closes gaps of a pixel or two, fills holes and drops pieces below a tenth of the largest one's area."""
    mask = ndimage.binary_closing(np.pad(mask, 2), iterations=2)[2:-2, 2:-2]
    mask = ndimage.binary_opening(ndimage.binary_fill_holes(mask))
    areas = np.bincount((labels := ndimage.label(mask)[0]).ravel())
    return mask & (areas >= areas[1:].max(initial=0) / 10)[labels]


def _snap(distance: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Moves a mask's outline to the nearest sharp edges, off the soft ones of shadows.

    Each pixel near the outline joins the side whose mean in its neighbourhood it resembles more (local competition of
    two regions: Chan and Vese 2001, Lankton and Tannenbaum 2008); the neighbourhood shrinks in three stages.
    """
    for sigma, iterations in SNAPPING:
        mean = ndimage.gaussian_filter(distance, sigma, truncate=2.5)
        for _ in range(iterations):
            share = ndimage.gaussian_filter(mask.astype(np.float32), sigma, truncate=2.5)
            part = ndimage.gaussian_filter(distance * mask, sigma, truncate=2.5)
            inside, outside = part / np.maximum(share, 1e-3), (mean - part) / np.maximum(1 - share, 1e-3)
            near = ndimage.binary_dilation(mask, iterations=4)
            near &= ~ndimage.binary_erosion(mask, iterations=4, border_value=1)
            former, mask = mask, np.where(near, 2 * distance > inside + outside, mask)
            mask = ndimage.uniform_filter(mask.astype(np.float32), 3) > 0.5
            if np.array_equal(mask, former):
                break
        mask = ndimage.binary_fill_holes(mask)
    return _clean(mask)


def _resize(mask: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """A mask at an image's own size; if it is empty, all of the image, so that anomalies remain possible."""
    if not mask.any():
        return np.ones(shape, bool)
    grey = Image.fromarray(mask.astype(np.float32))
    return np.asarray(grey.resize(shape[::-1], Image.Resampling.BILINEAR)) > 0.5
