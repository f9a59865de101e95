"""Masks as people draw, export and compress them."""

import io

import numpy as np
import pytest
from PIL import Image, ImageFilter

from diffusionad_hf.masks import binary_mask, read_mask, undecorated
from tests.test_pipeline_images import png_of_16_bit_colour

HEIGHT, WIDTH = 96, 128
Y, X = np.mgrid[:HEIGHT, :WIDTH]
DISK = (X - 32) ** 2 + (Y - 48) ** 2 < 20**2
OVAL = ((X - 90) / 2) ** 2 + (Y - 60) ** 2 < 12**2
SCRATCH = (abs(Y - 16 - 4 * np.sin(X / 9)) < 1.5) & (X > 8) & (X < 120)
DEFECT = DISK | OVAL | SCRATCH


def drawn(disk, oval, scratch, dtype=np.uint8):
    return Image.fromarray((DISK * disk + OVAL * oval + (SCRATCH & ~DISK & ~OVAL) * scratch).astype(dtype))


def content(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def likeness(found, true=DEFECT):
    return (found & true).sum() / (found | true).sum()


def palette_mask():
    """Class numbers; the background's colour is the brighter one."""
    mask = Image.fromarray(np.array([[0, 1]], np.uint8))
    mask.putpalette([200, 200, 200, 0, 0, 0])
    return mask


def with_alpha(color, alpha):
    return Image.fromarray(np.dstack([color, alpha]).astype(np.uint8))


WHITE = np.full((HEIGHT, WIDTH, 3), 255)


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (Image.fromarray(np.array([[0, 255], [128, 100]], np.uint8)), [[0, 1], [1, 0]]),  # blurred edges: half counts
        (Image.fromarray(np.array([[0, 1], [3, 0]], np.uint8)), [[0, 1], [1, 0]]),  # VisA's class numbers
        (Image.fromarray(np.array([[False, True]])), [[0, 1]]),
        (Image.new("RGBA", (2, 1), (0, 0, 0, 255)), [[0, 0]]),  # opaque black is no defect
        (Image.new("RGB", (2, 1), (255, 0, 0)), [[1, 1]]),  # painted in red
        (np.array([[0.0, 1.0]]), [[0, 1]]),
        (np.zeros((1, 2)), [[0, 0]]),
        (palette_mask(), [[0, 1]]),
    ],
)
def test_binary_mask(mask, expected):
    found = binary_mask(mask)
    assert found.dtype == bool and found.tolist() == np.array(expected, bool).tolist()


@pytest.mark.parametrize(
    "mask",
    [
        drawn(100, 200, 100),
        drawn(85, 170, 255),
        drawn(255, 1, 1),
        drawn(3, 300, 3, np.uint16),
        drawn(3, 300, 40_000, np.uint16),
        drawn(0.5, 1, 0.5, np.float32),
        drawn(70_000, 1, 2, np.int32),
        Image.merge("RGB", [drawn(128, 0, 0), drawn(0, 0, 128), drawn(0, 192, 0)]),
    ],
    ids=lambda mask: f"{mask.mode} to {max(np.asarray(mask).ravel()):g}",
)
def test_every_class_is_a_defect(mask):
    assert np.array_equal(binary_mask(mask), DEFECT)
    assert np.array_equal(read_mask(content(mask, "TIFF"), "a"), DEFECT)


@pytest.mark.parametrize("quality", [30, 75, 90, 100])
def test_the_noise_of_jpeg_is_no_defect_and_classes_in_it_are(quality, caplog):
    plain = content(drawn(255, 255, 255), "JPEG", quality=quality)
    for file in (plain, content(Image.open(io.BytesIO(plain)))):  # saved as PNG afterwards
        assert likeness(read_mask(file, "a.jpg")) > 0.99
    assert not caplog.text
    two = content(drawn(100, 200, 100), "JPEG", quality=quality)
    assert likeness(read_mask(two, "b.jpg")) > 0.97
    assert "b.jpg: holds values from 1 to" in caplog.text  # ambiguous, so it is said
    read_mask(content(drawn(255, 255, 100), "JPEG", quality=min(quality, 90)), "c.jpg")
    assert "c.jpg: holds" in caplog.text  # a scratch that may count or not


@pytest.mark.parametrize("radius", [0.7, 1.5, 3])
def test_blurred_edges_count_from_half_on(radius):
    mask = drawn(255, 255, 0).filter(ImageFilter.GaussianBlur(radius))
    assert likeness(read_mask(content(mask), "a"), DISK | OVAL) > 0.97
    twice = drawn(255, 255, 0).resize((2 * WIDTH, 2 * HEIGHT), Image.Resampling.BILINEAR)
    assert likeness(read_mask(content(twice), "a"), np.kron(DISK | OVAL, np.ones((2, 2), bool))) > 0.99


@pytest.mark.parametrize(
    "mask",
    [
        with_alpha(WHITE, DEFECT * 255),
        with_alpha(WHITE * 0, DEFECT * 255),
        with_alpha(WHITE * DEFECT[..., None], WHITE[..., 0]),
        with_alpha(WHITE * DEFECT[..., None], WHITE[..., 0] * 0),
        with_alpha(np.where(DEFECT[..., None], [200, 0, 0], [255, 255, 255]), DEFECT * 255),
        with_alpha(np.dstack([DISK * 255, OVAL * 255, SCRATCH * 255]), DEFECT * 128),
        Image.merge("LA", [Image.new("L", (WIDTH, HEIGHT), 255), drawn(255, 255, 255)]),
    ],
    ids=["white", "black", "opaque", "transparent everywhere", "red on white", "colours", "LA"],
)
def test_masks_in_alpha(mask):
    assert np.array_equal(binary_mask(mask), DEFECT)
    assert np.array_equal(binary_mask(np.asarray(mask)), DEFECT)
    assert np.array_equal(read_mask(content(mask), "a"), DEFECT)


def test_a_palette_whose_background_is_transparent():
    mask = Image.fromarray(np.where(DEFECT, 0, 7).astype(np.uint8))
    mask.putpalette([250, 0, 0] * 8)
    assert np.array_equal(read_mask(content(mask, transparency=7), "a"), DEFECT)


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda path: path.write_bytes(b"broken"), "cannot identify"),
        (lambda path: Image.fromarray(-np.ones((9, 9), np.float32)).save(path, "TIFF"), "negative"),
        (lambda path: Image.fromarray(np.full((9, 9), np.nan, np.float32)).save(path, "TIFF"), "not finite"),
        (lambda path: png_of_16_bit_colour(np.full((9, 9, 3), 3), path), "16-bit colour"),
    ],
)
def test_what_is_no_mask_is_named(write, words, tmp_path):
    write(tmp_path / "a.png")
    with pytest.raises(ValueError, match=f"a.png.*{words}|{words}.*a.png"):
        read_mask(tmp_path / "a.png", str(tmp_path / "a.png"))


@pytest.mark.parametrize(
    "stem",
    ["x", "x_mask", "x_gt", "x-mask", "mask_x", "x_seg", "x_label", "x.mask", "GT_x", "x_mask_2", "x_ground_truth"],
)
def test_names_of_masks(stem):
    assert undecorated(stem) == "x"
    assert undecorated("segment_masked") == "segment_masked"
