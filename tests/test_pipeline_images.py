"""Every kind of image that people have, and every kind of thing that is none."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.GifImagePlugin import GifImageFile

from diffusionad_hf import InvalidImageError, images_diffusionad
from diffusionad_hf.images_diffusionad import IMAGE_SUFFIXES
from diffusionad_hf.pipeline_diffusionad import load_image, resize_image


def save(image, path, **kwargs):
    image.save(path, **kwargs)
    return path


def brightness(image, **kwargs):
    """The first channel as it is loaded, an array `(H, W)` in [0, 1]."""
    loaded = load_image(image, **kwargs)
    return (loaded[0] / 255 if loaded.dtype == torch.uint8 else loaded[0]).numpy()


def png(header, pixels):
    """A PNG that Pillow does not write, of a header (width, height, bits, colour type, 0, 0, 0) and rows of bytes."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    chunks = chunk(b"IHDR", struct.pack(">IIBBBBB", *header)) + chunk(b"IDAT", zlib.compress(pixels))
    return b"\x89PNG\r\n\x1a\n" + chunks + chunk(b"IEND", b"")


def png_of_16_bit_colour(values, path):
    height, width, _ = values.shape
    path.write_bytes(
        png((width, height, 16, 2, 0, 0, 0), b"".join(b"\0" + row.tobytes() for row in values.astype(">u2")))
    )
    return path


def test_all_kinds_of_input_are_the_same_image(photo, tmp_path):
    path = save(Image.fromarray(photo), tmp_path / "a.png")
    expected = torch.from_numpy(photo).permute(2, 0, 1)
    for image in (path, str(path), Image.fromarray(photo), photo, expected, photo[:, ::-1][:, ::-1]):
        assert torch.equal(load_image(image), expected)
    content = path.read_bytes()
    with path.open("rb") as file:
        for image in (content, bytearray(content), io.BytesIO(content), file, file):
            assert torch.equal(load_image(image), expected)


def test_the_home_folder_is_found(photo, tmp_path, monkeypatch):
    save(Image.fromarray(photo), tmp_path / "a.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert load_image("~/a.png").shape == load_image(Path("~/a.png")).shape == (3, *photo.shape[:2])


@pytest.mark.parametrize(
    "image, words",
    [
        (Path("https://example.org/a.png"), "https:/example.org/a.png: an address"),
        ("https://example.org/a.png", r"https://example.org/a.png: an address; give .*fsspec.open"),
        ("data:image/png;base64,iVBORw0KGgo=", "an address; give .* bytes"),
        ("~/nothing.png", "~/nothing.png: no such image file"),
        (".", "a folder, not an image file"),
        (b"", "empty"),
        (b"not an image", "image.*: not an image"),
        (io.StringIO("text"), "binary mode"),
        (b"P6 10 10 255 truncated", "image.*: damaged"),
    ],
)
def test_what_is_given_as_an_image_and_is_none_is_told_how(image, words, pipe):
    for call in (load_image, pipe):
        with pytest.raises((InvalidImageError, FileNotFoundError), match=words) as caught:
            call(image)
        assert "\n" not in str(caught.value)


def test_a_pil_image_whose_file_is_cut_is_named(photo):
    content = io.BytesIO()
    Image.fromarray(photo).save(content, "PNG")
    image = Image.open(io.BytesIO(content.getvalue()[:200]))
    with pytest.raises(InvalidImageError, match="image 3: damaged"):
        load_image(image, "image 3")


def test_suffixes_and_formats_are_one_list(photo, tmp_path):
    for suffix in sorted(IMAGE_SUFFIXES):
        path = tmp_path / f"a{suffix}"
        if suffix not in (".pbm", ".pfm"):
            Image.fromarray(photo).save(path)
        else:
            Image.fromarray(photo[..., 0]).convert("1" if suffix == ".pbm" else "F").point(lambda v: v / 255).save(
                path
            )
        assert load_image(path).shape == (3, *photo.shape[:2]), suffix
    path.rename(tmp_path / "a.data")  # by what it holds, not by its name
    assert load_image(tmp_path / "a.data").shape == (3, *photo.shape[:2])


def test_greyscale_is_repeated(photo, tmp_path):
    grey = photo[..., 0]
    path = save(Image.fromarray(grey), tmp_path / "a.png")
    for image in (path, grey, grey[..., None], torch.from_numpy(grey)[None]):
        assert torch.equal(load_image(image), torch.from_numpy(grey).expand(3, -1, -1))


@pytest.mark.parametrize("mode", ["LA", "RGBA", "PA"])
def test_transparency_is_composited_on_white(mode, tmp_path):
    image = Image.new("RGBA", (12, 10), (200, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 6, 10))
    loaded = load_image(image.convert(mode) if mode != "PA" else image.convert("RGBA"))
    assert (loaded[:, :, :6] == 255).all() and (loaded[0, :, 6:] < 255).all()


def test_transparency_of_arrays_is_composited_alike(tmp_path):
    rgba = np.random.default_rng(0).integers(0, 256, (9, 11, 4), dtype=np.uint8)
    from_file = load_image(save(Image.fromarray(rgba), tmp_path / "a.png"))
    for image in (rgba, rgba.astype(np.float32) / 255):
        assert (load_image(image).int() - from_file.int()).abs().max() <= 1


def test_palette_with_transparency(tmp_path):
    image = Image.new("P", (10, 10), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(0, (0, 0, 5, 10))
    path = save(image, tmp_path / "a.png", transparency=0)
    loaded = load_image(path)
    assert loaded[:, 0, 0].tolist() == [255, 255, 255] and loaded[:, 0, 9].tolist() == [0, 0, 255]


def test_cmyk(tmp_path):
    path = save(Image.new("CMYK", (10, 10), (0, 255, 255, 0)), tmp_path / "a.jpg", quality=100)
    assert (load_image(path)[:, 5, 5].int() - torch.tensor([255, 0, 0])).abs().max() <= 3


def test_sixteen_bits_are_scaled_and_keep_their_precision(tmp_path):
    values = np.linspace(0, 65535, 12 * 10).astype(np.uint16).reshape(12, 10)
    path = save(Image.fromarray(values), tmp_path / "a.png")
    expected = torch.from_numpy(values.astype(np.float32) / 65535).expand(3, -1, -1)
    torch.testing.assert_close(load_image(path), expected)
    torch.testing.assert_close(load_image(values), expected)


def test_a_dark_sixteen_bit_image_stays_dark(tmp_path):
    path = save(Image.fromarray(np.full((10, 10), 200, np.uint16)), tmp_path / "a.png")
    assert float(load_image(path).max()) == pytest.approx(200 / 65535)


@pytest.mark.parametrize("kind", ["array", "tensor", "tiff", "png", "pgm", "jp2", "white is zero"])
def test_the_same_pixels_with_8_and_with_16_bits_are_the_same_image(kind, photo, tmp_path, pipe):
    eight = photo[..., 0]
    sixteen = eight.astype(np.uint16) * 257
    image = sixteen
    if kind == "tensor":
        image = torch.from_numpy(sixteen)
    elif kind == "white is zero":
        tags = {262: 0}
        image = save(Image.fromarray(65535 - sixteen), tmp_path / "a.tiff", tiffinfo=tags)
    elif kind != "array":
        image = save(Image.fromarray(sixteen), tmp_path / f"a.{kind}")
    assert torch.equal(load_image(image), load_image(eight))
    assert pipe(image).anomaly_score == pipe(eight).anomaly_score


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, int, np.int16, np.uint32, np.uint64])
def test_the_same_pixels_in_another_type_are_the_same_image(dtype, photo):
    for image in (photo, photo // 40):  # the second one dark, in the types that could mistake it for another range
        values = image / 255 if np.dtype(dtype).kind == "f" else image
        assert torch.equal(load_image(values.astype(dtype)), load_image(image))


@pytest.mark.parametrize("bits", [10, 12])
def test_fewer_bits_in_a_16_bit_file_are_said_and_can_be_given(bits, photo, tmp_path, pipe, caplog, monkeypatch):
    import diffusers

    diffusers.utils.logging.enable_propagation()
    monkeypatch.setattr(images_diffusionad, "_warned", set())
    most = 2**bits - 1
    values = (photo[..., 0] / 255 * most).round().astype(np.uint16)
    values[0, 0] = most
    path = save(Image.fromarray(values), tmp_path / "a.png")
    assert float(load_image(path).max()) == pytest.approx(most / 65535)
    assert f"a.png: reaches only {most} of 65535" in caplog.text and f"value_range={most}" in caplog.text
    caplog.clear()
    floats = save(Image.fromarray(values.astype(np.float32)), tmp_path / "a.tiff")
    for image in (path, values, Image.open(path), values.astype(int), floats, torch.from_numpy(values)):
        assert abs(brightness(image, value_range=most) - values / most).max() < 0.2 / 255
    pipe.register_to_config(value_range=most)  # pixels that are read already are not scaled again
    for image in (values, load_image(values, value_range=most), values / most):
        assert pipe(path).anomaly_score == pytest.approx(pipe(image).anomaly_score, abs=1e-5)
    assert torch.equal(load_image(photo, value_range=most), load_image(photo))  # 8 bits say their range themselves
    assert not caplog.text


def test_dark_16_bit_colour_is_said_too(tmp_path, caplog, monkeypatch):
    import diffusers

    diffusers.utils.logging.enable_propagation()
    monkeypatch.setattr(images_diffusionad, "_warned", set())
    path = png_of_16_bit_colour(np.full((10, 10, 3), 4000), tmp_path / "a.png")
    assert load_image(path).max() == 15
    assert "a.png: reaches only 3840 of 65535" in caplog.text
    with pytest.raises(InvalidImageError, match="a.png: 16-bit colour .*8 bits"):
        load_image(path, value_range=4095)
    assert load_image(png_of_16_bit_colour(np.full((10, 10, 3), 0xC8C8), tmp_path / "b.png")).max() == 200


def test_files_that_state_their_range_are_believed(tmp_path):
    path = tmp_path / "a.pgm"
    path.write_bytes(b"P5 10 10 1023\n" + np.full((10, 10), 1023, ">u2").tobytes())
    for value_range in (None, 4095):
        assert load_image(path, value_range=value_range).min() == 255


@pytest.mark.parametrize("over", [1.0005, 1.04, 1.0])
def test_brightness_does_not_hang_on_one_pixel(over, tmp_path):
    values = np.full((10, 10), 0.5, np.float32)
    values[0, 0], values[0, 1] = over, 1 - over
    for image in (values, save(Image.fromarray(values), tmp_path / "a.tiff"), torch.from_numpy(values)):
        loaded = brightness(image)
        assert float(loaded[0, 0]) == 1 and float(loaded[5, 5]) == 0.5


@pytest.mark.parametrize("full", [1.1, 255.0, 65535.0])
def test_a_float_tiff_beyond_its_range_is_refused_until_its_white_is_said(tmp_path, full):
    values = np.linspace(0, full, 100, dtype=np.float32).reshape(10, 10)
    path = save(Image.fromarray(values), tmp_path / "a.tiff")
    with pytest.raises(InvalidImageError, match=r"a.tiff: values from 0 to .* \[0, 1\].*value_range"):
        load_image(path)
    assert abs(brightness(path, value_range=full) - values / full).max() < 0.2 / 255


@pytest.mark.parametrize("values", [np.nan, np.inf, -1.0, 1e6])
def test_float_tiff_that_is_no_image_is_refused(tmp_path, values):
    path = save(Image.fromarray(np.full((10, 10), values, np.float32)), tmp_path / "a.tiff")
    with pytest.raises(InvalidImageError, match="a.tiff"):
        load_image(path)


def test_rotation_is_applied(photo, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to show
    path = save(Image.fromarray(photo), tmp_path / "a.png", exif=exif)
    expected = np.rot90(photo, -1)
    assert torch.equal(load_image(path), torch.from_numpy(expected.copy()).permute(2, 0, 1))


def test_an_animation_gives_its_first_frame_and_says_so_without_counting_the_others(tmp_path, caplog, monkeypatch):
    import diffusers

    monkeypatch.setattr(GifImageFile, "n_frames", property(lambda _: pytest.fail("counting takes minutes")))

    diffusers.utils.logging.enable_propagation()
    frames = [Image.new("RGB", (10, 10), color) for color in ("red", "blue")]
    path = save(frames[0], tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert load_image(path)[:, 0, 0].tolist() == [255, 0, 0]
    assert "several frames" in caplog.text and "first" in caplog.text


@pytest.mark.parametrize("size", [(8, 4000), (4000, 8), (8, 8)])
def test_odd_sizes_are_inspected_at_their_own_size(pipe, size):
    output = pipe(np.zeros((*size, 3), np.uint8))
    assert output.anomaly_map[0].shape == size and output.reconstruction[0].shape == (*size, 3)


def test_an_image_of_one_pixel_is_refused(tmp_path):
    with pytest.raises(InvalidImageError, match=r"1 x 1 px.*8 px"):
        load_image(save(Image.new("RGB", (1, 1)), tmp_path / "a.png"))


def bomb(path):
    """A PNG of a few bytes that declares 50,000 x 50,000 px."""
    path.write_bytes(png((50_000, 50_000, 8, 2, 0, 0, 0), bytes(1000)))
    return path


def unusable(kind, photo, tmp_path):
    path = tmp_path / f"bad.{'jpg' if kind == 'truncated jpeg' else 'png'}"
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("not an image")
    elif kind == "bomb":
        bomb(path)
    elif kind.startswith("truncated"):
        big = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
        save(Image.fromarray(big), path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif kind == "damaged header":
        save(Image.fromarray(photo), path)
        path.write_bytes(path.read_bytes()[:20] + bytes(20))
    return path


UNUSABLE = ("empty", "text", "bomb", "truncated png", "truncated jpeg", "damaged header")


@pytest.mark.parametrize("kind", UNUSABLE)
def test_unusable_files_are_named_in_one_line(kind, photo, tmp_path):
    path = unusable(kind, photo, tmp_path)
    with pytest.raises(InvalidImageError) as error:
        load_image(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file_is_named(pipe, tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.png: no such image file"):
        pipe(tmp_path / "nothing.png")


@pytest.mark.parametrize(
    "array, reason",
    [
        (np.full((10, 10, 3), np.nan, np.float32), "NaN"),
        (np.full((10, 10, 3), np.inf, np.float32), "infinite"),
        (np.full((10, 10, 3), 1.5, np.float32), r"\[0, 1\]"),
        (np.full((10, 10, 3), -0.1, np.float32), r"\[0, 1\]"),
        (np.full((10, 10, 3), 128.0, np.float64), "255"),
        (np.full((10, 10), -3, np.int16), "negative"),
        (np.full((10, 10), 40_000), "255 for white.*value_range"),
        (np.full((10, 10), 2**63, np.uint64), "255 for white"),
        (torch.zeros((10, 10), dtype=torch.complex64), "no image"),
        (np.zeros(10, np.uint8), "two axes"),
        (np.zeros((10, 10, 7), np.uint8), "1 to 4 channels"),
        (np.zeros((2, 2, 10, 10, 3), np.uint8), "two axes"),
        (np.zeros((0, 10, 3), np.uint8), "two axes"),
        (np.array([["a"]]), "no image"),
        (np.zeros((10, 10), complex), "no image"),
        (torch.zeros(10, 10, 3), "channels first"),
    ],
)
def test_arrays_that_are_no_image_say_why(array, reason):
    with pytest.raises(InvalidImageError, match=reason):
        load_image(array, name="image 3")


def test_which_image_of_a_list_is_wrong_is_said(pipe, photo):
    for bad, words in ((np.full((10, 10, 3), np.nan), "image 1: holds NaN"), ({"image": 1}, "dict")):
        with pytest.raises(InvalidImageError, match=words):
            pipe([photo, bad])


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ">f4", np.uint16, ">u2", np.int32, bool])
def test_number_types(dtype, photo):
    values = photo[..., 0] > 100
    kind = np.dtype(dtype).kind
    scale = {"u": 65535, "i": 255}.get(kind, 1)
    loaded = load_image((values * scale).astype(dtype)).float()
    torch.testing.assert_close(loaded / loaded.max(), torch.from_numpy(values).float().expand(3, -1, -1))


def test_resizing_of_bytes_and_floats_agrees(photo):
    eight_bit = load_image(photo)
    a, b = resize_image(eight_bit, 32), resize_image(eight_bit.float() / 255, 32)
    assert a.dtype == b.dtype == torch.float32 and (a - b).abs().max() < 1.01 / 255


def test_resizing_averages_instead_of_dropping_pixels():
    stripes = torch.zeros(3, 64, 64, dtype=torch.uint8)
    stripes[:, :, ::2] = 255
    assert (resize_image(stripes, 16) - 0.5).abs().max() < 0.05


@pytest.mark.parametrize("value_range", [0, -1, float("nan"), float("inf"), "4095"])
def test_a_value_range_is_a_positive_number(value_range):
    with pytest.raises(ValueError, match="`value_range` must be a positive number, such as 4095, got"):
        load_image(np.zeros((9, 9), np.uint16), value_range=value_range)
