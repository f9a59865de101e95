"""Any image either has the right brightness or is refused by name."""

import io

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diffusionad_hf.images_diffusionad import InvalidImageError, load_image

WHITE = {"uint8": 255, "uint16": 65535, "bool": 1}
TYPES = ("bool", "uint8", "int8", "uint16", "int16", "int32", "uint32", "int64", "uint64")
TYPES += ("float16", "float32", "float64")
MODES = ("1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr", "HSV", "LAB", "I", "F", "I;16", "I;16B", "La", "RGBX")


@settings(max_examples=200, deadline=None)
@given(
    dtype=st.sampled_from(TYPES),
    shape=st.sampled_from([(9, 11), (9, 11, 1), (9, 11, 3), (8, 30), (1, 9), (0, 9), (9,), (9, 11, 5)]),
    low=st.floats(-3, 300),
    span=st.sampled_from([0, 0.5, 1, 1.001, 2, 255, 256, 1023, 4095, 65535, 1e6]),
    value_range=st.sampled_from([None, 1, 255, 1023, 4095, 65535]),
    kind=st.sampled_from(["array", "tensor", "tiff"]),
    seed=st.integers(0, 2**16),
)
def test_any_values_have_the_right_brightness_or_are_refused(dtype, shape, low, span, value_range, kind, seed):
    values = low + span * np.random.default_rng(seed).random(shape)
    is_float = dtype.startswith("float")
    with np.errstate(all="ignore"):
        values = values.astype(dtype) if is_float else np.rint(values).astype(dtype)
    image = values
    if kind == "tensor":
        image = torch.from_numpy(np.moveaxis(values, 2, 0).copy() if values.ndim == 3 else values)
    elif kind == "tiff":
        try:
            file = io.BytesIO()
            Image.fromarray(values).save(file, "TIFF")
        except (TypeError, ValueError, KeyError, SystemError, OSError, ZeroDivisionError):
            return  # what Pillow does not write
        image = file.getvalue()
    white = WHITE.get(dtype, 1 if is_float else 255)
    if value_range is not None and dtype not in ("uint8", "bool") and (kind == "tiff" or not is_float):
        white = value_range
    if kind == "tiff" and dtype in ("int8",):  # of which Pillow makes bytes
        return
    try:
        loaded = load_image(image, "this one", value_range).float()
    except InvalidImageError as error:
        assert str(error).startswith("this one: ") and "\n" not in str(error)
        beyond = white * 0.05 if is_float else 0
        fits = values.size and values.min() >= -beyond and values.max() <= white + beyond
        assert not fits or min(values.shape[:2], default=0) < 8 or values.ndim not in (2, 3) or shape[-1] == 5
        return
    scaled = loaded / 255 if load_image(image, "this one", value_range).dtype == torch.uint8 else loaded
    expected = np.clip(np.asarray(values, np.float64) / white, 0, 1)
    expected = np.moveaxis(np.atleast_3d(expected), 2, 0)
    assert np.abs(scaled.numpy() - expected).max() < 0.5 / 255


@settings(max_examples=100, deadline=None)
@given(mode=st.sampled_from(MODES), size=st.sampled_from([(8, 8), (9, 40), (7, 9)]), white=st.booleans())
def test_any_mode_is_read_or_refused_by_name(mode, size, white):
    image = Image.new(mode, size)
    if white:
        image = Image.fromarray(np.full(size[::-1], 255, np.uint8))
        try:
            image = image.convert("RGB").convert(mode)
        except ValueError:
            return
    try:
        loaded = load_image(image, "this one")
    except InvalidImageError as error:
        assert str(error).startswith("this one: ")
        return
    assert loaded.shape == (3, *size[::-1])
    if white and mode not in ("I;16", "I;16B", "F"):  # to which Pillow converts without scaling
        assert loaded.min() >= 253
