"""Photos that are not square, and those too large for one pass."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from diffusionad_hf import DiffusionADPipeline, build_pipeline
from tests.conftest import make_pipeline


def sized(**sizes):
    pipe = make_pipeline()
    return DiffusionADPipeline(**pipe.components, **sizes)


@pytest.mark.parametrize("shape", [(96, 128), (72, 128), (40, 320), (320, 40)], ids=["4:3", "16:9", "8:1", "1:8"])
def test_a_photo_keeps_its_shape_and_its_map_its_size(shape, tmp_path, caplog):
    size = [max(32, side // 32 * 32) for side in shape]
    sized(image_size=size).save_pretrained(tmp_path)
    pipe = DiffusionADPipeline.from_pretrained(tmp_path)
    assert pipe.config.image_size == size and pipe.size == pipe.tile == tuple(size)
    assert not caplog.records, "no word of types from diffusers"
    output = pipe(torch.rand(3, *shape), return_intermediates=True)
    assert output.anomaly_map[0].shape == shape and output.reconstruction[0].shape == (*shape, 3)
    largest = np.sort(output.intermediates["probability"].numpy().ravel())[-50:]
    assert output.intermediates["probability"].shape == (1, 1, *size)
    assert output.anomaly_score[0] == pytest.approx(largest.mean(), abs=1e-6)


def test_a_square_in_either_spelling_is_one_number():
    assert sized(image_size=(64, 64)).config.image_size == sized(image_size=64).config.image_size == 64


@pytest.mark.parametrize("tile_size", [64, (32, 64), (64, 512)])
def test_tiles_of_an_image_that_fits_change_nothing(tile_size):
    image = torch.rand(3, 40, 80)
    plain, tiled = (sized(image_size=(32, 64), tile_size=size)(image) for size in (None, tile_size))
    np.testing.assert_array_equal(plain.anomaly_map[0], tiled.anomaly_map[0])
    np.testing.assert_array_equal(plain.reconstruction[0], tiled.reconstruction[0])
    assert plain.anomaly_score == tiled.anomaly_score


def test_the_networks_see_only_tiles_and_all_of_the_image(photo):
    pipe, seen = sized(image_size=(64, 96), tile_size=(32, 64)), []
    pipe.unet.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape[-2:])))
    output = pipe([photo, photo[::-1]], batch_size=2, return_intermediates=True)
    assert set(seen) == {(32, 64)} and len(seen) == 3 * 2
    assert output.intermediates["noised_small"].shape == (2, 3, 64, 96)
    # Batches and company change nothing here either.
    np.testing.assert_allclose(pipe(photo).anomaly_score[0], output.anomaly_score[0], atol=1e-6)
    given = pipe(photo, noise=torch.randn(2, 1, 3, 32, 64))
    assert np.isfinite(given.anomaly_map[0]).all()
    with pytest.raises(ValueError, match=r"noise: .* must be \(2, 1, 3, 32, 64\)"):
        pipe(photo, noise=torch.randn(2, 1, 3, 64, 96))


def detector(pipe, padding):
    """Lets a pipeline find what is brighter than its surroundings; at a tile's edges it is blind."""

    def inspect(pixels, noise, *arguments):
        found = (pixels.mean(1, keepdim=True) - 0.25).clamp(0, 1)
        seen = torch.ones_like(found)
        seen[..., :padding, :] = seen[..., -padding:, :] = seen[..., :padding] = seen[..., -padding:] = 0
        return {"probability": F.avg_pool2d(found, 3, 1, 1) * seen, "reconstruction": pixels}

    pipe._inspect = inspect
    return pipe


def test_a_defect_on_a_seam_is_found_like_elsewhere():
    pipe = detector(sized(image_size=(64, 1024), tile_size=64, top_k=16), padding=2)
    blank = torch.full((3, 64, 1024), 0.25)
    assert pipe(blank).anomaly_score == 0
    scores = []
    for left in range(60, 960, 9):  # on and beside every seam
        image = blank.clone()
        image[:, 28:36, left : left + 8] = 1
        output = pipe(image)
        scores.append(output.anomaly_score[0])
        assert abs(np.argmax(output.anomaly_map[0].max(0)) - left - 4) <= 4
    assert min(scores) > 0.9 * max(scores) > 0.6


def test_tiles_are_blended_without_seams():
    pipe = sized(image_size=(96, 480), tile_size=(64, 96))
    pipe._inspect = lambda pixels, *_: {"probability": pixels[:, :1], "reconstruction": pixels}
    ramp = torch.linspace(0, 1, 480).expand(3, 96, 480)
    output = pipe(ramp)
    np.testing.assert_allclose(output.anomaly_map[0], ramp[0], atol=1e-6)
    np.testing.assert_allclose(output.reconstruction[0], ramp.permute(1, 2, 0), atol=1e-6)


def test_a_line_scan_goes_through_in_one_call():
    pipe = sized(image_size=(64, 2048), tile_size=64)
    pipe._inspect = lambda pixels, *_: {"probability": pixels[:, :1], "reconstruction": pixels}
    scan = np.zeros((512, 8192, 3), np.uint8)
    scan[200:240, 7000:7040] = 255
    output = pipe(scan)
    assert output.anomaly_map[0].shape == (512, 8192) and output.anomaly_score[0] > 0.9


def test_a_photo_smaller_than_what_a_network_looks_at_is_inspected():
    torch.manual_seed(0)
    pipe = build_pipeline("perceptual", 32)
    output = pipe(torch.rand(3, 8, 11))
    assert output.anomaly_map[0].shape == (8, 11) and np.isfinite(output.anomaly_map[0]).all()


def test_a_photo_squashed_beyond_recognition_is_named(pipe, monkeypatch):
    said = []
    monkeypatch.setattr("diffusionad_hf.pipeline_diffusionad.logger.warning", said.append)
    pipe([torch.rand(3, 32, 500), torch.rand(3, 10, 330)])
    assert len(said) == 1 and said[0].startswith("image 1: 330 x 10 px is squashed 33 times to the model's 32 x 32 px")
    assert "tile_size" in said[0] and "\n" not in said[0]


def test_a_size_that_the_strides_do_not_divide_is_named():
    for sizes in ({"image_size": (64, 100)}, {"image_size": 64, "tile_size": 40}):
        *_, name = sizes
        with pytest.raises(ValueError, match=rf"^{name}=.*multiples of 32"):
            sized(**sizes)
    with pytest.raises(ValueError, match="^image_size=4096: too large.*give a tile_size"):
        sized(image_size=4096)
    assert sized(image_size=(512, 16384), tile_size=512).tile == (512, 512)
