"""Training on photos that are not square: their shape, the anomalies on them, and the names of former versions."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from diffusionad_hf import DiffusionADPipeline
from diffusionad_hf.training.arguments import TrainingConfig, load_preset, parse_arguments
from diffusionad_hf.training.checkpoints import check_same_training
from diffusionad_hf.training.images import fit_size
from diffusionad_hf.training.synthesis import AnomalySynthesizer
from diffusionad_hf.training.textures import FolderTextures, ProceduralTextures
from tests.dataset_factory import make_mvtec

from .runs import run


def fitted(shapes, image_size="256", architecture="perceptual"):
    """Height and width of a training on photos of these widths and heights."""
    config = TrainingConfig(data_dir="d", output_dir="o", architecture=architecture, image_size=image_size)
    return fit_size(config, [Image.new("L", shape) for shape in shapes])


@pytest.mark.parametrize(
    "shape, expected",
    [
        ((900, 900), (256, 256)),
        ((640, 480), (224, 288)),
        ((1080, 1920), (352, 192)),
        ((1920, 1080), (192, 352)),
        ((1600, 200), (96, 768)),
        ((1600, 100), (64, 1024)),
    ],
    ids=["1:1", "4:3", "9:16", "16:9", "8:1", "16:1"],
)
def test_one_number_is_an_area_in_the_shape_of_the_photos(shape, expected):
    assert fitted([shape]) == expected
    # The usual shape decides, not a stray one.
    assert fitted([shape, shape, (50, 50)]) == expected


def test_each_size_suits_the_networks():
    assert fitted([(640, 480)], "512") == (448, 576), "at 512 px the UNet divides by 64"
    assert fitted([(640, 480)], "128", "tiny") == (96, 128)
    assert fitted([(640, 480)], "192x512") == (192, 512)


def test_a_photo_turned_by_its_tag_counts_as_it_is_shown(tmp_path):
    tags = Image.Exif()
    tags[0x0112] = 6
    Image.new("L", (640, 480)).save(tmp_path / "a.jpg", exif=tags)
    config = TrainingConfig(data_dir="d", output_dir="o", architecture="perceptual")
    assert fit_size(config, [str(tmp_path / "a.jpg")]) == (288, 224)


def test_photos_beyond_sixteen_to_one_are_named():
    with pytest.raises(ValueError, match="^`image_size` 256: the photos are 32 times as long as wide.*HEIGHTxWIDTH"):
        fitted([(3200, 100)])
    assert fitted([(3200, 100)], "64x2048") == (64, 2048)


def test_a_training_on_long_photos_ends_with_a_model_of_their_shape(tmp_path, capsys):
    data = make_mvtec(tmp_path / "data", train=10, size=(192, 48))
    options = {"image_size": "64", "texture_dir": None, "max_train_steps": 2}
    assert run(data, tmp_path / "out", **options) == 0, capsys.readouterr().err
    pipe = DiffusionADPipeline.from_pretrained(tmp_path / "out")
    assert pipe.config.image_size == [32, 128] and len(pipe.config.calibration_scores) == 3
    assert pipe(data / "widget/test/good/000.png").anomaly_map[0].shape == (48, 192)
    assert json.loads((tmp_path / "out/training_arguments.json").read_text())["image_size"] == "64"


@pytest.mark.parametrize("kind", ["line", "displaced", "erased", None])
@pytest.mark.parametrize("shape", [(96, 768), (768, 96)], ids=["8:1", "1:8"])
def test_anomalies_lie_all_over_a_long_image_and_are_not_stretched(kind, shape):
    options = {f"{kind}_probability": 1.0} if kind else {}
    synthesizer = AnomalySynthesizer(ProceduralTextures(shape, 12), anomaly_probability=1.0, **options)
    generator = torch.Generator().manual_seed(0)
    images = torch.nn.functional.interpolate(
        torch.rand(24, 3, shape[0] // 16, shape[1] // 16, generator=generator), size=shape, mode="bilinear"
    )
    batch = synthesizer(images, range(24), 0, torch.ones(24, 1, *shape))
    assert batch.images.isfinite().all() and batch.labels.float().mean() > 0.8
    assert torch.equal(batch.images * (1 - batch.masks), images * (1 - batch.masks))
    along = batch.masks.mean((0, 1, 2 if shape[0] < shape[1] else 3))
    thirds = along.view(3, -1).mean(1)
    assert thirds.min() > 0.15 * thirds.max() > 0
    if kind is None:
        down, right = (batch.masks.diff(dim=axis).abs().sum() for axis in (2, 3))
        assert 0.4 < down / right < 2.5, "blobs have as many edges in either direction"


def test_textures_fill_a_long_image_without_being_stretched(tmp_path):
    bank = ProceduralTextures((32, 128), 6).bank
    assert bank.shape == (6, 3, 32, 128) and torch.equal(bank[..., :64], bank[..., 64:].flip(3))
    square = np.zeros((40, 160, 3), dtype=np.uint8)
    square[10:30, 70:90] = 255
    Image.fromarray(square).save(tmp_path / "a.png")
    seen = FolderTextures(tmp_path, (20, 80)).bank[0, 0] > 128
    assert seen.any(0).sum() == seen.any(1).sum() == 10


def test_the_former_name_of_the_size_is_still_a_square(tmp_path):
    preset = tmp_path / "mine.json"
    preset.write_text('{"resolution": 64}')
    flags = parse_arguments(["--data-dir", "d", "--output-dir", "o", "--resolution", "64"])
    assert load_preset(str(preset)) == {"image_size": "64x64"} and flags.image_size == "64x64"
    check_same_training({"resolution": 64}, {"image_size": "64x64"}, "here")
    # It would go on with photos of another shape than it began with.
    with pytest.raises(ValueError, match="`image_size` 64x64, this one has 64"):
        check_same_training({"resolution": 64}, {"image_size": "64"}, "here")


def test_weights_that_saw_zeros_beyond_the_border_are_not_gone_on_with():
    with pytest.raises(ValueError, match="had `padding_mode` zeros, this one has replicate; .* start afresh"):
        check_same_training({"seed": 0}, {"seed": 0, "padding_mode": "replicate"}, "here")
    check_same_training({"seed": 0}, {"seed": 0, "padding_mode": "zeros"}, "here")


def test_the_paper_squashes():
    assert TrainingConfig(data_dir="d", output_dir="o", **load_preset("paper")).sides == (256, 256)
