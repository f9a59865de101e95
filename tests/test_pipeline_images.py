"""Every kind of image that people have, and every kind of thing that is none."""

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.GifImagePlugin import GifImageFile

from diffusionad_hf import InvalidImageError
from diffusionad_hf.pipeline_diffusionad import load_image, resize_image


def save(image, path, **kwargs):
    image.save(path, **kwargs)
    return path


def test_all_kinds_of_input_are_the_same_image(photo, tmp_path):
    path = save(Image.fromarray(photo), tmp_path / "a.png")
    expected = torch.from_numpy(photo).permute(2, 0, 1)
    for image in (path, str(path), Image.fromarray(photo), photo, expected, photo[:, ::-1][:, ::-1]):
        assert torch.equal(load_image(image), expected)
    floats = load_image(photo.astype(np.float64) / 255)
    torch.testing.assert_close(floats, expected / 255)


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
    for image, scale in ((rgba, 1), (rgba.astype(np.float32) / 255, 255)):
        assert (load_image(image).float() * scale - from_file).abs().max() <= 1


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


@pytest.mark.parametrize("full", [1.0, 255.0, 65535.0])
def test_float_tiff_is_scaled_by_the_smallest_range_that_holds_it(tmp_path, full):
    values = np.linspace(0, full, 100, dtype=np.float32).reshape(10, 10)
    path = save(Image.fromarray(values), tmp_path / "a.tiff")
    torch.testing.assert_close(load_image(path), torch.from_numpy(values / full).expand(3, -1, -1))


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

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b""))
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
    scale = np.iinfo(dtype).max if kind in "iu" else 1
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
