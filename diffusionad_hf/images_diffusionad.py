"""Images of any kind as tensors: decoding, brightness, size."""

import logging
import os
import threading
import warnings
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError

# Travels to the Hub beside the pipeline's file, which imports it: this file imports nothing of this package. Repos of
# different versions share one copy in a process, so names are added here and never taken away.
__all__ = ["FORMATS", "IMAGE_SUFFIXES", "ImageInput", "InvalidImageError", "load_image", "resize_image", "to_uint8"]

logger = logging.getLogger(__name__)

Array = TypeVar("Array", np.ndarray, torch.Tensor)
ImageInput = Image.Image | str | os.PathLike | np.ndarray | torch.Tensor

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif"})
"""Files that count as images wherever a folder is searched."""

FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF")
"""Formats that are read, whatever a file is called; Pillow's other decoders stay out of reach."""

_SMALLEST_SIDE = 8
# Warning filters are process-wide, so changing them needs a lock.
_WARNING_FILTERS = threading.Lock()


class InvalidImageError(ValueError):
    """An image that cannot be inspected; the message names it and says why, in one line."""


def load_image(image: ImageInput, name: str = "image") -> torch.Tensor:
    """
    Reads any kind of image as RGB.

    Rotation tags are applied, transparency is composited on white, greyscale is repeated, 16-bit values keep their
    precision, and the first frame of an animation is taken, with a warning.

    Args:
        image: A PIL image, a path, an array `(H, W)` or `(H, W, C)`, or a tensor `(H, W)` or `(C, H, W)`, with 1 to 4
            channels. Integer arrays are scaled by their type's range; float arrays lie in [0, 1].
        name: What errors call the image, unless it is a path.

    Returns:
        `torch.Tensor` of shape `(3, H, W)`: uint8, or float32 in [0, 1] if 8 bits would lose something.

    Raises:
        InvalidImageError: If it cannot be read, has a side under 8 px, or holds values that are not finite or out of
            range.
        FileNotFoundError: If the path does not exist.
    """
    if isinstance(image, (str, os.PathLike)):
        name = os.fspath(image)
        tensor = _from_file(name)
    elif isinstance(image, Image.Image):
        tensor = _from_pil(image, name)
    elif isinstance(image, np.ndarray):
        channels_last = torch.from_numpy(np.ascontiguousarray(_native(image, name)))
        tensor = _from_values(channels_last.permute(2, 0, 1) if image.ndim == 3 else channels_last, name)
    elif isinstance(image, torch.Tensor):
        # Resized where all others are: a GPU resizes no bytes, and floats a little differently.
        tensor = _from_values(image.detach().cpu(), name)
    else:
        raise InvalidImageError(f"{name}: cannot inspect a {type(image).__name__}.")
    height, width = tensor.shape[-2:]
    if min(height, width) < _SMALLEST_SIDE:
        raise InvalidImageError(f"{name}: {width} x {height} px is too small; sides need {_SMALLEST_SIDE} px or more.")
    return tensor


def resize_image(image: torch.Tensor, size: int | Sequence[int]) -> torch.Tensor:
    """Resizes an image of [`load_image`] to `(3, H, W)`, float32 in [0, 1]: bilinear, antialiased, without regard to
    the aspect ratio. `size` is (H, W), or one number for a square, as in the reference."""
    height, width = (size, size) if isinstance(size, int) else size
    if tuple(image.shape[-2:]) != (height, width):
        image = F.interpolate(image[None], size=(height, width), mode="bilinear", antialias=True)[0]
    return image.float() / 255 if image.dtype == torch.uint8 else image.float().clamp(0, 1)


def to_uint8(image: Array) -> Array:
    """An array or tensor of values in [0, 1] as uint8, rounded; what is uint8 already stays as it is."""
    if image.dtype in (np.uint8, torch.uint8):
        return image
    scaled = (image.clip(0, 1) * 255).round()
    return scaled.to(torch.uint8) if isinstance(image, torch.Tensor) else scaled.astype(np.uint8)


def _from_file(path: str) -> torch.Tensor:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such image file.")
    if os.path.getsize(path) == 0:
        raise InvalidImageError(f"{path}: the file is empty (0 bytes).")
    try:
        with _WARNING_FILTERS, warnings.catch_warnings():
            # Pillow warns from 89 million px and refuses from 179 million; only the refusal is wanted here.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path, formats=FORMATS)
        with image:
            tensor = _from_pil(image, path)
            if has_more_frames(image):
                logger.warning(f"{path}: has several frames; the first one is inspected.")
            return tensor
    except Image.DecompressionBombError as error:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise InvalidImageError(f"{path}: declares more than {limit:,} px; shrink or crop it first.") from error
    except UnidentifiedImageError as error:
        raise InvalidImageError(f"{path}: not an image, or not one of {', '.join(FORMATS)}.") from error
    except InvalidImageError:
        raise
    # Decoders raise all kinds of errors: SyntaxError for PNG chunks, struct.error for TIFF, ...
    except Exception as error:
        raise InvalidImageError(f"{path}: damaged or truncated ({error}).") from error


def has_more_frames(image: Image.Image) -> bool:
    """Looks at the second frame only: to count them all may take minutes."""
    try:
        image.seek(1)
    except Exception:  # EOFError if there is none; decoders raise whatever they stumble over
        return False
    return True


def _from_pil(image: Image.Image, name: str) -> torch.Tensor:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        values = np.asarray(image, dtype=np.float32)
        if not np.isfinite(values).all():
            raise InvalidImageError(f"{name}: holds NaN or infinite values.")
        # Such files do not say their range, so the smallest usual one that holds their values is taken.
        ranges = (65535.0,) if image.mode.startswith("I;16") else (1.0, 255.0, 65535.0)
        full = next((r for r in ranges if values.max(initial=0) <= r), None)
        if full is None or values.min(initial=0) < 0:
            raise InvalidImageError(
                f"{name}: values from {values.min():g} to {values.max():g} are no image; scale them to [0, 1]."
            )
        return _from_values(torch.from_numpy(values / full), name)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    # A copy: arrays made from images are read-only, which torch warns about.
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def _native(array: np.ndarray, name: str) -> np.ndarray:
    """The array in a type that torch knows: native byte order, no bool, no extended or half precision."""
    if array.dtype.kind == "b":
        return array.astype(np.uint8) * 255
    if array.dtype.kind == "f":
        return array.astype(np.float32)
    if array.dtype.kind not in "iu":
        raise InvalidImageError(f"{name}: an array of {array.dtype} is no image; give numbers.")
    return array.astype(array.dtype.newbyteorder("="))


def _from_values(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """`(H, W)` or `(C, H, W)` of any number type to `(3, H, W)`."""
    if tensor.ndim == 2:
        tensor = tensor[None]
    if tensor.ndim != 3 or tensor.shape[0] not in (1, 2, 3, 4) or 0 in tensor.shape:
        raise InvalidImageError(
            f"{name}: has shape {tuple(tensor.shape)} (channels first); an image has two axes, or three "
            "with 1 to 4 channels."
        )
    if tensor.dtype != torch.uint8:
        if tensor.is_floating_point():
            tensor = tensor.float()
        else:
            tensor = tensor.to(torch.float64).div(torch.iinfo(tensor.dtype).max).float()
        if not bool(torch.isfinite(tensor).all()):
            raise InvalidImageError(f"{name}: holds NaN or infinite values.")
        low, high = float(tensor.min()), float(tensor.max())
        if low < 0 or high > 1:
            raise InvalidImageError(
                f"{name}: values from {low:g} to {high:g}; floats must lie in [0, 1] (divide 8-bit values "
                "by 255), integers must not be negative."
            )
    if tensor.shape[0] in (2, 4):
        full = 255 if tensor.dtype == torch.uint8 else 1
        color, alpha = tensor[:-1].float(), tensor[-1:].float() / full
        tensor = (color * alpha + full * (1 - alpha)).to(tensor.dtype)
    return tensor.expand(3, -1, -1)
