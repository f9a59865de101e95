"""The segmenter that compares in the features of a frozen encoder."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusionad_hf import DiffusionADPipeline, NormGuidedScheduler, NormGuidedUNet2DModel, PerceptualSegmenter
from diffusionad_hf import modeling_perceptual_segmenter as module

SMALL_UNET = {
    "sample_size": 32,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "block_out_channels": (16, 32),
    "down_block_types": ("ResnetDownsampleBlock2D", "ResnetDownsampleBlock2D"),
    "up_block_types": ("ResnetUpsampleBlock2D", "ResnetUpsampleBlock2D"),
}


def pair(size=(64, 64), count=2, seed=0):
    return torch.rand(count, 6, *size, generator=torch.Generator().manual_seed(seed))


def segmenter(**options):
    torch.manual_seed(0)
    return PerceptualSegmenter(width=8, **options).load_encoder().eval()


@pytest.fixture(scope="module")
def plain():
    return segmenter()


@pytest.fixture(scope="module")
def remembering():
    """One that knows three normal images."""
    model = segmenter(memory_size=40)
    model.remember(pair(count=3)[:, :3])
    return model


@pytest.mark.parametrize("kind", ["plain", "remembering"])
@pytest.mark.parametrize("size", [(64, 64), (16, 16), (8, 8), (61, 75), (32, 512), (17, 300)])
def test_logits_of_every_size_even_where_the_strides_do_not_divide_it(kind, size, request):
    logits = request.getfixturevalue(kind)(pair(size))
    assert logits.shape == (2, 1, *size) and torch.isfinite(logits).all()


def test_the_encoder_gives_what_its_source_gave(plain):
    """What the weights' source computed of a smooth image, in float32 and with batch norms."""
    y, x = torch.meshgrid(torch.linspace(0, 1, 64), torch.linspace(0, 1, 64), indexing="ij")
    features = plain.backbone(torch.stack([x, y, x * y])[None])
    assert [tuple(f.shape) for f in features] == [(1, 24, 16, 16), (1, 40, 8, 8), (1, 112, 4, 4)]
    means = [float(f.abs().mean()) for f in features]
    assert means == pytest.approx([8.71, 8.816, 5.8784], rel=0.005)
    some = [f.flatten()[:: f.numel() // 5][:4] for f in features]
    torch.testing.assert_close(some[0], torch.tensor([-2.3169, -21.9769, 13.3517, 11.8453]), atol=0.1, rtol=0.01)
    torch.testing.assert_close(some[2], torch.tensor([1.8525, -5.0219, 6.3003, -3.1904]), atol=0.1, rtol=0.01)


def test_the_encoder_is_frozen_whatever_is_asked_for_and_gradients_pass_through_it():
    model = segmenter().train().requires_grad_(True)
    before = {name: tensor.clone() for name, tensor in model.backbone.state_dict().items()}
    assert not list(model.backbone.parameters())
    sample = pair().requires_grad_()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(sample).square().mean().backward()
    optimizer.step()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.backbone.state_dict().items())
    assert sample.grad[:, 3:].abs().max() > 0


def test_training_and_evaluation_encode_alike(plain):
    images = pair()[:, :3]
    first = plain.backbone(images)
    second = segmenter().train().backbone(images)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_it_sees_the_reconstruction_and_where_it_differs(plain):
    image = pair(count=1)[:, :3]
    same, other = torch.cat([image, image], 1), torch.cat([image, image.flip(-1)], 1)
    assert (plain(same) - plain(other)).abs().max() > 1e-3


def test_an_image_gets_the_same_logits_alone_and_in_a_batch(remembering):
    batch = pair(count=3)
    together = remembering(batch)
    alone = torch.cat([remembering(sample[None]) for sample in batch])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


def test_what_is_remembered_is_near_and_what_is_new_is_far(remembering):
    known = pair(count=3)[:, :3]
    new = torch.zeros_like(known)
    near, far = (remembering._recall(remembering.describe(images), None)[1].mean() for images in (known, new))
    assert far > 2 * near


def test_in_training_an_image_does_not_recognise_itself(remembering):
    described = remembering.describe(pair(count=3)[:, :3])
    itself = remembering._recall(described, None)[1]
    without = remembering._recall(described, torch.arange(3))[1]
    nobody = remembering._recall(described, torch.full((3,), 77))[1]
    assert (without >= itself).all() and without.mean() > itself.mean()
    assert torch.equal(nobody, itself)


def test_once_trained_the_distance_has_a_vote_of_its_own(remembering):
    sample = pair()
    distance = remembering._recall(remembering.describe(sample[:, :3]), None)[1]
    without = segmenter(memory_size=40, distance_vote=0.0)
    without.load_state_dict(remembering.state_dict())
    added = remembering(sample) - without(sample)
    expected = torch.nn.functional.interpolate(2 * (distance - 1), (16, 16), mode="bilinear")
    expected = torch.nn.functional.interpolate(expected, (64, 64), mode="bilinear")
    torch.testing.assert_close(added, expected, atol=1e-3, rtol=1e-3)


def test_in_training_the_decoder_does_without_the_image_itself_where_chance_has_it(remembering):
    seen = []
    hook = remembering.lateral[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    sample = pair()
    for chance in (None, torch.tensor([0.1, 0.9])):
        remembering(sample, None, chance)
    hook.remove()
    image, difference = (torch.stack([s[:, part] for s in seen]) for part in (slice(24), slice(24, None)))
    assert torch.equal(image[1, 0], torch.zeros_like(image[1, 0])) and torch.equal(difference[0], difference[1])
    # As much on average as where all are seen.
    torch.testing.assert_close(image[1, 1] * 0.3, image[0, 1])


def test_a_memory_larger_than_what_there_is_to_remember():
    model = segmenter(memory_size=100)
    model.remember(pair((16, 16), 2)[:, :3])
    assert torch.isfinite(model(pair((16, 16)))).all()
    # One image only: all that is remembered is its own, and nothing is left to compare it with.
    model.remember(pair((16, 16), 1)[:, :3])
    assert torch.isfinite(model(pair((16, 16), 1), torch.zeros(1))).all()


def test_a_pool_smaller_than_what_there_is_holds_something_of_every_image():
    model = segmenter(memory_size=60)
    model.remember(iter(pair(count=5)[:, :3]), pool=80)
    assert set(model.memory_images.tolist()) == set(range(5)) and len(model.memory.unique(dim=0)) == 60
    for row, number in zip(model.memory, model.memory_images.tolist(), strict=True):
        own = model.describe(pair(count=5)[number : number + 1, :3])[0].flatten(1).T
        assert (own - row).abs().amax(1).min() < 1e-4


@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
def test_constant_images_give_finite_logits(remembering, level):
    model = segmenter(memory_size=10)
    model.remember(torch.full((2, 3, 32, 32), level))
    for network in (model, remembering):
        assert torch.isfinite(network(torch.full((1, 6, 32, 32), level))).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(remembering, dtype):
    sample = pair()
    half = segmenter(memory_size=40)
    half.load_state_dict(remembering.state_dict())
    logits = half.to(dtype)(sample.to(dtype))
    assert logits.dtype == dtype and torch.isfinite(logits).all()
    expected = remembering(sample)
    assert (logits.float() - expected).abs().mean() < 0.1 * expected.std() + 0.1


def test_three_channels_are_refused_in_one_line(plain):
    with pytest.raises(ValueError, match=r"shape \(2, 3, 64, 64\), must be \(N, 6, H, W\)") as caught:
        plain(pair()[:, :3])
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="in_channels=3: must be 6"):
        PerceptualSegmenter(in_channels=3)


def test_an_unknown_encoder_is_named(plain, tmp_path):
    plain.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"encoder": "resnet-9000"}))
    with pytest.raises(ValueError, match='encoder="resnet-9000": unknown to this version.*efficientnet-lite0'):
        PerceptualSegmenter.from_pretrained(tmp_path)


def test_a_missing_or_damaged_encoder_file_is_named(tmp_path):
    file = tmp_path / "encoder.safetensors"
    with pytest.raises(FileNotFoundError, match="encoder.safetensors: the encoder's weights are missing; install"):
        PerceptualSegmenter().load_encoder(file)
    original = module.__file__.replace("modeling_perceptual_segmenter.py", "efficientnet_lite0.safetensors")
    whole = load_file(original)
    shutil.copyfile(original, file)
    file.write_bytes(file.read_bytes()[:-1000])
    others = tmp_path / "others.safetensors"
    save_file({name: tensor for name, tensor in whole.items() if not name.startswith("stem")}, others)
    for damaged in (file, others):
        with pytest.raises(OSError, match=f"{damaged.name}: the encoder's weights are damaged") as caught:
            PerceptualSegmenter().load_encoder(damaged)
        assert "\n" not in str(caught.value)


def test_weights_that_lack_a_tensor_are_refused(remembering, tmp_path):
    remembering.save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    tensors = load_file(file)
    tensors.pop("backbone.stem.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lack 1 of the model's tensors, such as backbone.stem.weight"):
        PerceptualSegmenter.from_pretrained(tmp_path)


@pytest.fixture(scope="module")
def folder(remembering, tmp_path_factory):
    torch.manual_seed(1)
    unet = NormGuidedUNet2DModel(**SMALL_UNET)
    pipe = DiffusionADPipeline(unet, remembering, NormGuidedScheduler())
    pipe.register_to_config(calibration_scores=[0.05 * i for i in range(20)])
    path = tmp_path_factory.mktemp("perceptual") / "model"
    pipe.save_pretrained(path)
    return path


def test_it_travels_with_its_pipeline_encoder_memory_and_module(folder, remembering):
    assert (folder / "segmenter/modeling_perceptual_segmenter.py").is_file()
    loaded = DiffusionADPipeline.from_pretrained(folder).segmenter
    assert type(loaded) is PerceptualSegmenter
    torch.testing.assert_close(loaded(pair()), remembering(pair()))


@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_exported_it_answers_alike_whatever_the_number_of_images(folder, tmp_path, format):
    pytest.importorskip({"onnx": "onnxruntime", "openvino": "openvino"}[format])
    from diffusionad_hf.export.exporting import export_pipeline

    pipe = DiffusionADPipeline.from_pretrained(folder)
    images = list(pair((32, 32), 3, seed=5)[:, :3])
    exported = export_pipeline(pipe, tmp_path / "exported", format=format)
    theirs, ours = (p(images, batch_size=3) for p in (exported, pipe))
    np.testing.assert_allclose(theirs.anomaly_score, ours.anomaly_score, atol=1e-4)
    np.testing.assert_allclose(np.stack(theirs.anomaly_map), np.stack(ours.anomaly_map), atol=1e-3)
