"""Masks of defects as people have them: any value but the background's is a defect."""

import io
import logging
import re
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from scipy import ndimage

from .files import one_line
from .images_diffusionad import loses_bits, open_image

logger = logging.getLogger(__name__)

_WORD = r"(?:masks?|gt|labels?|seg|segmentation|ground[_ -]?truth|annotations?)"
_DECORATION = re.compile(rf"^{_WORD}[_\-. ]+|[_\-. ]+{_WORD}(?:[_\-. ]*\d+)?$", re.IGNORECASE)
# More values than that are no classes but edges or the noise of a JPEG.
_MOST_CLASSES = 16
# Shares of the highest value: of noise, at most, and by which the values of one class differ in a JPEG.
_NOISE, _SPREAD = 1 / 8, 1 / 64
_BLOCK = 8  # of a JPEG, in px


def undecorated(stem: str) -> str:
    """The stem of the image that a mask belongs to: `x` of `x_mask`, `x-gt`, `mask_x`, `x_seg`, `x_mask_2` ..."""
    return _DECORATION.sub("", stem)


def read_mask(file: str | Path | bytes, name: str) -> np.ndarray:
    """
    The defect pixels of a mask's file, as [`binary_mask`] finds them.

    Args:
        file: Its path, or its content.
        name: What errors call it.

    Returns:
        `np.ndarray`: `(H, W)` bool, with the file's rotation tag applied.

    Raises:
        ValueError: If it cannot be read, or is no mask; the message names it.
    """
    try:
        with open_image(io.BytesIO(file) if isinstance(file, bytes) else file, name) as image:
            if loses_bits(image):
                raise ValueError("16-bit colour, of which only 8 bits are read; save it as grey or with 8 bits")
            noisy = image.format in ("JPEG", "MPO")
            return _defects(_values(ImageOps.exif_transpose(image)), noisy, name)
    except Exception as error:  # decoders raise whatever they stumble over
        said = one_line(error)
        raise ValueError(said if name in said else f"{name}: {said}.") from error


def binary_mask(mask: Image.Image | np.ndarray) -> np.ndarray:
    """
    Defect pixels of a mask: a bool `(H, W)`.

    Any value but 0 is a defect: 255, class numbers, grey levels and colours of classes, in any number of bits, and of
    palettes the number. Of a mask whose alpha differs from place to place, only what is visible counts, and if
    all of that has one colour, the alpha is the mask. Edges that were blurred count from half of the lowest class on,
    and noise near 0, as JPEG leaves it, does not.

    Args:
        mask: A PIL image, or an array `(H, W)` or `(H, W, C)`.

    Raises:
        ValueError: If it holds values that are negative or not finite.
    """
    return _defects(_values(mask), getattr(mask, "format", None) in ("JPEG", "MPO"))


def _values(mask: Image.Image | np.ndarray) -> np.ndarray:
    """`(H, W)`, 0 on background."""
    if isinstance(mask, Image.Image):
        if "transparency" in mask.info and mask.mode in ("1", "L", "P", "RGB"):
            shown = mask.convert("RGBA")
            low, high = shown.getchannel("A").getextrema()
            mask = shown if low != high else mask
        elif mask.mode in ("PA", "La", "RGBa"):
            mask = mask.convert("RGBA")
        elif mask.mode in ("CMYK", "YCbCr", "HSV"):
            mask = mask.convert("RGB")
    values = np.asarray(mask)
    if values.ndim == 3 and values.shape[2] in (2, 4):
        color, alpha = values[..., :-1], values[..., -1]
        visible = alpha > 0
        if alpha.min() == alpha.max():
            values = color
        elif (color[visible] == color[visible][0]).all():
            values = alpha
        else:
            values = color * visible[..., None]
    return values.max(axis=2) if values.ndim == 3 else values


def _defects(values: np.ndarray, is_noisy: bool, name: str | None = None) -> np.ndarray:
    if values.dtype == bool:
        return values
    if values.dtype.kind == "f" and not np.isfinite(values).all() or values.min(initial=0) < 0:
        raise ValueError("a mask must not hold values that are negative or not finite; make its background 0")
    marked = values > 0
    classes = np.unique(values[marked])
    if len(classes) < 2:
        return marked
    top = classes[-1]
    highest, lowest = ndimage.maximum_filter(values, 3), ndimage.minimum_filter(values, 3)
    low = marked & (values <= top * _NOISE)
    # JPEG leaves its noise at both ends, also in what was saved as PNG afterwards.
    is_noisy |= len(classes) > _MOST_CLASSES or (top > 127 and (classes > top * (1 - _NOISE)).sum() > 1)
    if not is_noisy:
        # The values of blurred edges are always beside a higher one; in masks of small numbers there are none.
        level = values[marked & (values == highest)].min() if top > 127 else classes[0]
        doubtful = low.any() and not (highest == lowest)[low].any()
    else:
        # Noise is never flat, and classes are.
        if low.any() and (highest == lowest)[low].mean() < 0.3:
            marked &= ~low
        flat = values[marked & (highest - lowest <= top * _SPREAD)]
        level = np.percentile(flat, 1) if len(flat) else top
        doubtful = level < top * (1 - _NOISE)
        # What lies apart from all that counts may be a class of its own, too thin to be flat.
        apart = marked & (ndimage.maximum_filter(values, 2 * _BLOCK + 1) * 2.0 < level)
        doubtful |= apart.sum() > 0.01 * marked.sum()
    if doubtful and name is not None:
        logger.warning(
            f"{name}: holds values from {classes[0]} to {top}, of which those from {max(level / 2, classes[0]):.4g} "
            "on count as defects; if that is wrong, save it with 0 for background and 255 for defects."
        )
    return marked & (values * 2.0 >= level)
