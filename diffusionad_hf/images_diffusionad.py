"""Images of any kind as tensors: decoding, brightness, size."""

import io
import logging
import os
import re
import threading
import warnings
from collections.abc import Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError

# Travels to the Hub beside the pipeline's file, which imports it: this file imports nothing of this package. Repos of
# different versions share one copy in a process, so names are added here and never taken away.
__all__ = [
    "FORMATS",
    "IMAGE_SUFFIXES",
    "ImageInput",
    "InvalidImageError",
    "load_image",
    "loses_bits",
    "open_image",
    "resize_image",
    "to_uint8",
]

logger = logging.getLogger(__name__)

Array = TypeVar("Array", np.ndarray, torch.Tensor)


@runtime_checkable
class _File(Protocol):
    def read(self) -> Any: ...


ImageInput = Image.Image | str | os.PathLike | bytes | _File | np.ndarray | torch.Tensor

FORMATS = ("PNG", "JPEG", "BMP", "DIB", "TIFF", "WEBP", "GIF", "PPM", "JPEG2000", "AVIF")
"""Formats that are read, whatever a file is called; Pillow's other decoders stay out of reach."""

# Has no mark of its own: half of all files would pass for one.
_BY_NAME = "TGA"

IMAGE_SUFFIXES = frozenset(
    suffix for suffix, kind in Image.registered_extensions().items() if kind in (*FORMATS, "MPO", _BY_NAME)
)
"""Files that count as images wherever a folder is searched: those of the formats that Pillow can read here."""

_SMALLEST_SIDE = 8
# Floats may exceed [0, 1] by this much, as resampling leaves them, and are clipped.
_OVERSHOOT = 0.05
# Values this close to whole grey levels, in grey levels, are 8-bit values.
_SAME_LEVEL = 0.1
# Warning filters are process-wide, so changing them needs a lock.
_WARNING_FILTERS = threading.Lock()
_warned: set[int] = set()


class InvalidImageError(ValueError):
    """An image that cannot be inspected; the message names it and says why, in one line."""


def load_image(image: ImageInput, name: str = "image", value_range: float | None = None) -> torch.Tensor:
    """
    Reads any kind of image as RGB.

    Rotation tags are applied, transparency is composited on white, greyscale is repeated, 16-bit grey keeps its
    precision (16-bit colour is read with 8), and the first frame of an animation is taken, with a warning.

    What is white depends on the type alone, never on the values: 255 for 8 bits and for integers wider than 16 bits,
    65535 for unsigned 16 bits, 1 for floats. The same pixels in another type are the same image.

    Args:
        image: A PIL image, a path (`~` is the home folder), a file's content as bytes or a file object, an array
            `(H, W)` or `(H, W, C)`, or a tensor `(H, W)` or `(C, H, W)`, with 1 to 4 channels.
        name: What errors call the image, unless it is a path or a file with a name.
        value_range: The value that is white in integers of more than 8 bits and in files of floats, such as 4095 for
            12-bit values in a 16-bit file. Files that say it themselves (PGM, JPEG 2000) are read by what they say,
            and arrays of floats lie in [0, 1].

    Returns:
        `torch.Tensor` of shape `(3, H, W)`: uint8, or float32 in [0, 1] if 8 bits would lose something.

    Raises:
        InvalidImageError: If it cannot be read, has a side under 8 px, or holds values that are not finite or out of
            range; floats may exceed theirs by 5 %, and are clipped.
        FileNotFoundError: If the path does not exist.
        ValueError: If `value_range` is no positive number.
    """
    if value_range is not None and not (
        isinstance(value_range, (int, float, np.number)) and 0 < value_range < float("inf")
    ):
        raise ValueError(f"`value_range` must be a positive number, such as 4095, got {value_range!r}.")
    if isinstance(image, (str, os.PathLike)):
        name = os.fsdecode(image)
        tensor = _from_file(_existing(name), name, value_range)
    elif isinstance(image, Image.Image):
        tensor = _decoded(image, name, value_range)
    elif isinstance(image, np.ndarray):
        channels_last = torch.from_numpy(np.ascontiguousarray(_native(image, name)))
        channels_first = channels_last.permute(2, 0, 1) if image.ndim == 3 else channels_last
        tensor = _from_values(channels_first, name, None if image.dtype.kind == "f" else value_range)
    elif isinstance(image, torch.Tensor):
        # Resized where all others are: a GPU resizes no bytes, and floats a little differently.
        tensor = _from_values(image.detach().cpu(), name, None if image.is_floating_point() else value_range)
    elif isinstance(image, (bytes, bytearray, memoryview)):
        tensor = _from_file(io.BytesIO(image), name, value_range)
    elif isinstance(image, _File):
        given = getattr(image, "name", None)
        name = given if isinstance(given, str) else name
        tensor = _from_file(io.BytesIO(_content(image, name)), name, value_range)
    else:
        raise InvalidImageError(f"{name}: cannot inspect a {type(image).__name__}.")
    height, width = tensor.shape[-2:]
    if min(height, width) < _SMALLEST_SIDE:
        raise InvalidImageError(f"{name}: {width} x {height} px is too small; sides need {_SMALLEST_SIDE} px or more.")
    return tensor


def open_image(file: str | os.PathLike | io.BytesIO, name: str) -> Image.Image:
    """Opens a file of one of [`FORMATS`], or of TGA if its `name` says so, undecoded; raises what Pillow does."""
    is_tga = Image.registered_extensions().get(os.path.splitext(name)[1].lower()) == _BY_NAME
    return Image.open(file, formats=[_BY_NAME] if is_tga else FORMATS)


def loses_bits(image: Image.Image) -> bool:
    """Whether an image that was opened and not decoded yet is of 16-bit colour, which Pillow reads with 8 bits."""
    return image.mode[0] not in "IF" and any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))


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


def _existing(name: str) -> str:
    """The path of a file; raises `FileNotFoundError` if there is none."""
    path = name if os.path.isfile(name) else os.path.expanduser(name)
    if os.path.isfile(path):
        return path
    if re.match(r"data:|[A-Za-z][A-Za-z0-9+.-]+:/", name):
        raise FileNotFoundError(
            f"{name:.80}: an address; give what it leads to, as bytes or as a file: fsspec.open(address).open()."
        )
    raise FileNotFoundError(f"{name}: {'a folder, not an' if os.path.isdir(path) else 'no such'} image file.")


def _content(file: Any, name: str) -> bytes:
    """All of a file object, from its start if it can go there."""
    try:
        if getattr(file, "seekable", lambda: False)():
            file.seek(0)
        content = file.read()
    except (OSError, ValueError) as error:  # the latter if it is closed
        raise InvalidImageError(f"{name}: cannot be read ({error}).") from error
    if not isinstance(content, (bytes, bytearray)):
        raise InvalidImageError(f'{name}: a file of text; open it in binary mode, with "rb".')
    return bytes(content)


def _from_file(file: str | io.BytesIO, name: str, value_range: float | None) -> torch.Tensor:
    if (os.path.getsize(file) if isinstance(file, str) else file.getbuffer().nbytes) == 0:
        raise InvalidImageError(f"{name}: the file is empty (0 bytes).")
    try:
        with _WARNING_FILTERS, warnings.catch_warnings():
            # Pillow warns from 89 million px and refuses from 179 million; only the refusal is wanted here.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = open_image(file, name)
        with image:
            tensor = _decoded(image, name, value_range)
            if has_more_frames(image):
                logger.warning(f"{name}: has several frames; the first one is inspected.")
            return tensor
    except Image.DecompressionBombError as error:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise InvalidImageError(f"{name}: declares more than {limit:,} px; shrink or crop it first.") from error
    except UnidentifiedImageError as error:
        formats = ", ".join((*FORMATS, _BY_NAME))
        raise InvalidImageError(f"{name}: not an image, or not one of {formats}; convert it.") from error
    except InvalidImageError:
        raise
    # Decoders raise all kinds of errors: SyntaxError for PNG chunks, struct.error for TIFF, ...
    except Exception as error:
        raise InvalidImageError(f"{name}: damaged or truncated ({error}).") from error


def has_more_frames(image: Image.Image) -> bool:
    """Looks at the second frame only: to count them all may take minutes."""
    try:
        image.seek(1)
    except Exception:  # EOFError if there is none; decoders raise whatever they stumble over
        return False
    return True


def _decoded(image: Image.Image, name: str, value_range: float | None) -> torch.Tensor:
    try:
        return _from_pil(image, name, value_range)
    except (InvalidImageError, Image.DecompressionBombError, MemoryError):
        raise
    except Exception as error:  # of a file that was opened and not decoded yet, or of a mode that is no picture
        raise InvalidImageError(f"{name}: damaged or truncated ({error}).") from error


def _from_pil(image: Image.Image, name: str, value_range: float | None) -> torch.Tensor:
    # What only the file says, and what the copies that follow no longer know.
    kind = image.format
    is_negative = kind == "TIFF" and getattr(image, "tag_v2", {}).get(262) == 0
    reduced = loses_bits(image)
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        values = np.asarray(image)
        if kind in ("PPM", "JPEG2000") and image.mode != "F":
            value_range = 65535  # to which Pillow scaled the range that such files state
        if is_negative and values.dtype == np.uint16:
            values = np.uint16(value_range or 65535) - values
        return _from_values(torch.from_numpy(_native(values, name)), name, value_range)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    # A copy: arrays made from images are read-only, which torch warns about.
    tensor = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    if reduced:
        if value_range is not None:
            raise InvalidImageError(
                f"{name}: 16-bit colour is read with 8 bits, of which a range up to {value_range:g} leaves too few; "
                "save it with 8 bits, or as grey."
            )
        _warn_if_dark(int(tensor.max()) << 8, name)
    return tensor


def bits_of(most: int) -> int:
    """How many bits the 16-bit values up to this one may have been recorded with: 8, 10, 12, 14, or 16."""
    return next((bits for bits in (8, 10, 12, 14) if 0 < most < 2**bits), 16)


def _warn_if_dark(most: int, name: str) -> None:
    """Says, once for each number of bits, that 16-bit values may be those of a camera that has fewer."""
    bits = bits_of(most)
    if bits < 16 and bits not in _warned:
        _warned.add(bits)
        logger.warning(
            f"{name}: reaches only {most} of 65535, so it is read as dark. If its values are of {bits} bits, say so: "
            f"value_range={2**bits - 1}. Others like it are not named."
        )


def _native(array: np.ndarray, name: str) -> np.ndarray:
    """The array in a type that torch knows: native byte order, no bool, no extended or half precision."""
    if array.dtype.kind == "b":
        return array.astype(np.uint8) * 255
    if array.dtype.kind == "f":
        return array.astype(np.float32)
    if array.dtype.kind not in "iu":
        raise InvalidImageError(f"{name}: an array of {array.dtype} is no image; give numbers.")
    return array.astype(array.dtype.newbyteorder("="))


def _from_values(tensor: torch.Tensor, name: str, value_range: float | None) -> torch.Tensor:
    """`(H, W)` or `(C, H, W)` of any number type to `(3, H, W)`."""
    if tensor.ndim == 2:
        tensor = tensor[None]
    if tensor.ndim != 3 or tensor.shape[0] not in (1, 2, 3, 4) or 0 in tensor.shape:
        raise InvalidImageError(
            f"{name}: has shape {tuple(tensor.shape)} (channels first); an image has two axes, or three "
            "with 1 to 4 channels."
        )
    if tensor.is_complex():
        raise InvalidImageError(f"{name}: complex numbers are no image.")
    if tensor.dtype == torch.bool:
        tensor = tensor.to(torch.uint8) * 255
    if tensor.dtype != torch.uint8:
        tensor = _scaled(tensor, name, value_range)
    if tensor.shape[0] in (2, 4):
        full = 255 if tensor.dtype == torch.uint8 else 1
        color, alpha = tensor[:-1].float(), tensor[-1:].float() / full
        blended = color * alpha + full * (1 - alpha)
        tensor = blended.round().to(torch.uint8) if tensor.dtype == torch.uint8 else blended
    return tensor.expand(3, -1, -1)


def _scaled(tensor: torch.Tensor, name: str, value_range: float | None) -> torch.Tensor:
    """Values, of which `value_range` or that of their type is white, as float32 in [0, 1], or uint8 if 8 bits do."""
    is_float, wide = tensor.is_floating_point(), tensor.dtype == torch.uint16
    white = value_range or (1 if is_float else 65535 if wide else 255)
    # Integers beyond float32's precision are out of range anyway.
    values = tensor.float()
    low, high = float(values.min()), float(values.max())
    if not low - low == high - high == 0:  # NaN and infinity are no numbers less themselves
        raise InvalidImageError(f"{name}: holds NaN or infinite values.")
    beyond = _OVERSHOOT * white if is_float else 0
    if low < -beyond or high > white + beyond:
        rule = "floats must lie in [0, 1]" if is_float else "integers must not be negative, and be 255 for white"
        rule = rule if value_range is None else f"they must lie in [0, {value_range:g}]"
        raise InvalidImageError(
            f"{name}: values from {low:g} to {high:g}; {rule}. If another value is white, divide floats by it, or say "
            "it for integers and files: value_range=255 for 8-bit values, 4095 for 12-bit values."
        )
    if wide and value_range is None:
        _warn_if_dark(int(high), name)
    values = values.div(white).clamp_(0, 1)
    levels = values.mul(255).round_()
    if float(values.mul(255).sub_(levels).abs_().max()) < _SAME_LEVEL:
        return levels.to(torch.uint8)
    return values
