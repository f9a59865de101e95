"""Every option of the training has the effect that it is there for."""

import csv
import json
import re
import shutil
from contextlib import contextmanager

import datasets
import numpy as np
import pytest
import torch
from accelerate.utils import set_seed
from PIL import Image
from safetensors.torch import load_file

from diffusionad_hf import PRESETS, DiffusionADPipeline, NormGuidedUNet2DModel, build_pipeline
from diffusionad_hf.training import loop as train
from diffusionad_hf.training.arguments import parse_arguments
from diffusionad_hf.training.look import look
from diffusionad_hf.training.optimization import learning_rates

from .runs import arguments, losses, run, same, weights


@contextmanager
def watched(monkeypatch):
    """What reaches the networks and the optimiser of a real training, from the outside."""
    seen = {"rates": [], "types": set(), "images": 0}
    forward, step = NormGuidedUNet2DModel.forward, torch.optim.Adam.step

    def watched_forward(self, sample, *args, **kwargs):
        output = forward(self, sample, *args, **kwargs)
        if self.training:
            seen["types"].add(output.sample.dtype)
            seen["images"] += len(sample) // 2  # both noise scales in one batch
        return output

    def watched_step(self, *args, **kwargs):
        seen["rates"].append([group["lr"] for group in self.param_groups])
        if not any(seen["rates"][-1]):  # the probe's
            seen.update(rates=[], types=set(), images=0)
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(NormGuidedUNet2DModel, "forward", watched_forward)
        patch.setattr(torch.optim.Adam, "step", watched_step)
        yield seen


def prepared(data, **options):
    """Training set, held-out set, synthesiser and validation, as `train.py` makes them."""
    args = parse_arguments(arguments(data, data, **options))
    return train.prepare_data(args, look(args))


def built(**options):
    """The pipeline to train."""
    return train.build_networks(parse_arguments(["--data-dir", "d", "--output-dir", "o", *_flags(options)]))


def _flags(options):
    return [
        part for name, value in options.items() for part in (f"--{name}", *([] if value is True else [str(value)]))
    ]


def masks_of(data, **options):
    """All that may and does become anomalous in an epoch, `(N, 1, 32, 32)` each; the first is None for textures."""
    train_set, _, synthesizer, _ = prepared(data, **options)
    items = [train_set[0, i] for i in range(len(train_set))]
    allowed = torch.stack([item["foreground"] for item in items]) if "foreground" in items[0] else None
    images = torch.stack([item["image"] for item in items])
    return allowed, torch.cat([synthesizer(images, range(len(items)), epoch, allowed).masks for epoch in range(8)])


def test_foreground_says_where_anomalies_may_lie(data):
    part, on_part = masks_of(data)
    assert 0.4 < part.mean() < 0.8, "the part in the middle of the picture"
    assert not part[..., :1, :].any() and not on_part[..., :1, :].any()
    assert torch.equal(masks_of(data, foreground="object")[0], part)
    whole, anywhere = masks_of(data, foreground="whole")
    assert whole.all() and anywhere[..., :1, :].any()
    texture, somewhere = masks_of(data, foreground="texture")
    assert texture is None and somewhere.any()


def test_masks_of_ones_own_are_used_in_the_order_of_the_images(data, tmp_path):
    for i, path in enumerate(sorted((data / "demo-part/train/good").iterdir())):
        mask = np.zeros((64, 64), np.uint8)
        mask[:, : 8 + 4 * i] = 255
        Image.fromarray(mask).save(tmp_path / path.name)
    train_set, *_ = prepared(data, foreground_dir=tmp_path)
    rows, _ = train.split_holdout(12, 0.25, 0)
    widths = [int(train_set[0, i]["foreground"][0, 0].sum()) for i in range(len(train_set))]
    assert widths == [4 + 2 * row for row in rows]
    Image.fromarray(mask[:32]).save(tmp_path / path.name)
    with pytest.raises(ValueError, match=f"{path.name} is 64 x 32 pixels but its image .* is 64 x 64"):
        prepared(data, foreground_dir=tmp_path)


def test_texture_dir_is_what_anomalies_are_made_of(data):
    _, _, from_folder, _ = prepared(data)
    assert len(from_folder._bank) == 3
    _, _, made_up, _ = prepared(data, texture_dir=None)
    assert len(made_up._bank) == 500


@pytest.mark.parametrize("kind", ["line", "displaced", "erased"])
def test_each_kind_of_anomaly_has_its_share(kind, data):
    none = {f"{name}_probability": 0 for name in ("line", "displaced", "erased")}
    _, without = masks_of(data, **none)
    _, with_all = masks_of(data, **{**none, f"{kind}_probability": 1})
    assert not torch.equal(without, with_all)
    _, again = masks_of(data, **none)
    assert torch.equal(without, again)


def test_holdout_fraction_and_resolution(data):
    train_set, held_out, *_ = prepared(data, holdout_fraction=0.5, resolution=64)
    assert (len(train_set), len(held_out)) == (6, 6)
    assert train_set[0, 0]["image"].shape == (3, 64, 64) and train_set[0, 0]["foreground"].shape == (1, 64, 64)


@pytest.mark.parametrize("name", ["small", "tiny"])
def test_architecture(name):
    assert built(architecture=name, resolution=64).unet.config.block_out_channels[0] == PRESETS[name]["base_channels"]


def test_init_from_starts_with_the_weights_of_another_model(data, two_steps, tmp_path, capsys):
    pipe = built(preset="tiny", resolution=32, init_from=two_steps)
    for name, tensor in weights(two_steps).items():
        network, _, key = name.partition(".")
        assert torch.equal(getattr(pipe, network).state_dict()[key], tensor), name
    with pytest.raises(ValueError, match="another size; give its `architecture`"):
        built(preset="fast", resolution=32, init_from=two_steps)


def test_init_from_keeps_the_padding_that_the_weights_know(tmp_path):
    pipe = build_pipeline("tiny", 32)
    pipe.register_modules(unet=type(pipe.unet)(**pipe.unet.config | {"padding_mode": "replicate"}))
    pipe.save_pretrained(tmp_path)
    unet = built(preset="tiny", resolution=32, init_from=tmp_path).unet
    assert unet.config.padding_mode == unet.conv_in.padding_mode == "replicate"


def test_what_the_unet_predicts_is_the_architectures_own_unless_asked_for(two_steps):
    def predicted(**options):
        return built(resolution=64, **options).scheduler.config.prediction_type

    found = [predicted(architecture=name) for name in ("paper", "small", "tiny", "perceptual")]
    assert found == ["epsilon", "sample", "sample", "sample"]
    assert predicted(preset="tiny", prediction_type="epsilon") == "epsilon"
    assert predicted(preset="fast", prediction_type="v_prediction") == "v_prediction"
    # Its weights would mean something else.
    with pytest.raises(ValueError, match="its UNet predicts sample, .* give `prediction_type` sample"):
        built(preset="tiny", resolution=32, init_from=two_steps, prediction_type="epsilon")


@pytest.mark.parametrize("option", ["gradient_checkpointing", "channels_last"])
def test_memory_and_layout_change_nothing_in_the_result(option, data, tmp_path, two_steps):
    pipe = built(preset="tiny", resolution=32, **{option: True})
    for network in (pipe.unet, pipe.segmenter):
        if option == "channels_last":
            assert next(p for p in network.parameters() if p.ndim == 4 and p.shape[2] > 1).stride()[1] == 1
        else:
            assert network.is_gradient_checkpointing
    assert run(data, tmp_path, max_train_steps=2, **{option: True}) == 0
    assert losses(tmp_path) == pytest.approx(losses(two_steps), rel=1e-3)


def test_checkpointing_saves_fewer_activations_and_leaves_the_batch_statistics_alone():
    set_seed(0)
    segmenter = build_pipeline("small", 32).segmenter.train()
    images, outcomes = torch.rand(2, 6, 64, 64), []
    for checkpointing in (False, True):
        network = type(segmenter).from_config(segmenter.config)
        network.load_state_dict(segmenter.state_dict())
        network.train()
        if checkpointing:
            network.enable_gradient_checkpointing()
        saved, keep = [], lambda tensor: tensor
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t.numel()) or t, keep):
            loss = network(images).square().mean()
        loss.backward()
        outcomes.append((sum(saved), dict(network.named_buffers()), [p.grad for p in network.parameters()]))
    (plain, statistics, gradients), (fewer, same_statistics, same_gradients) = outcomes
    assert fewer < 0.3 * plain
    for name, value in statistics.items():
        assert torch.equal(value, same_statistics[name]), name
    for one, other in zip(gradients, same_gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_compile_compiles_both_networks_in_place():
    pipe, plain = built(preset="tiny", resolution=32, compile=True), built(preset="tiny", resolution=32)
    for network in ("unet", "segmenter"):
        assert getattr(pipe, network)._compiled_call_impl is not None
        assert getattr(plain, network)._compiled_call_impl is None
        assert getattr(pipe, network).state_dict().keys() == getattr(plain, network).state_dict().keys()


def test_rates_schedule_warm_up_and_accumulation(data, tmp_path, monkeypatch):
    options = {"unet_learning_rate": 1e-3, "segmenter_learning_rate": 2e-3, "lr_warmup_steps": 2}
    with watched(monkeypatch) as seen:
        shape = {"gradient_accumulation_steps": 3, "train_batch_size": 2}
        assert run(data, tmp_path, max_train_steps=3, lr_schedule="linear", **options, **shape) == 0
    assert seen["images"] == 3 * 3 * 2 and seen["types"] == {torch.float32}
    expected = [[0.5e-3, 1e-3], [1e-3 * 2 / 3, 2e-3 * 2 / 3], [1e-3 / 3, 2e-3 / 3]]
    np.testing.assert_allclose(seen["rates"], expected)


def test_mixed_precision_computes_in_half_and_keeps_weights_whole(data, tmp_path, two_steps, monkeypatch):
    with watched(monkeypatch) as seen:
        assert run(data, tmp_path, max_train_steps=2, mixed_precision="bf16") == 0
    assert seen["types"] == {torch.bfloat16}
    ours, theirs = weights(tmp_path), weights(two_steps)
    assert {t.dtype for t in ours.values() if t.is_floating_point()} == {torch.float32}
    assert not same(ours, theirs)
    assert losses(tmp_path) == pytest.approx(losses(two_steps), rel=0.05)
    assert json.loads((tmp_path / "training_arguments.json").read_text())["mixed_precision"] == "bf16"


def test_ema_decay_averages_what_is_saved(data, tmp_path, two_steps):
    options = {"max_train_steps": 2, "validation_steps": 2}
    assert run(data, tmp_path, ema_decay=0, **options) == 0
    raw, averaged = (load_file(folder / "checkpoint-2/model.safetensors") for folder in (tmp_path, two_steps))
    assert all(torch.equal(raw[name], averaged[name]) for name in raw), "the average has no say in the training"
    assert all(torch.equal(tensor, raw[name]) for name, tensor in weights(tmp_path).items() if name in raw)
    assert not same(weights(two_steps), weights(tmp_path))


def test_max_grad_norm_bounds_the_gradients(data, tmp_path):
    # Adam hardly moves where gradients are far below its epsilon.
    options = {"max_train_steps": 1, "ema_decay": 0}
    assert run(data, tmp_path / "tight", max_grad_norm=1e-12, **options) == 0
    assert run(data, tmp_path / "none", max_grad_norm=0, **options) == 0
    set_seed(0)
    fresh = built(preset="tiny", resolution=32).segmenter.state_dict()["conv_out.weight"]
    tight, none = (weights(tmp_path / name)["segmenter.conv_out.weight"] for name in ("tight", "none"))
    assert (tight - fresh).abs().max() < 1e-5 < (none - fresh).abs().max()


def test_the_reference_schedule_swings_only_the_segmenter():
    args = parse_arguments(["--data-dir", "d", "--output-dir", "o", "--preset", "paper"])
    rates = np.array([learning_rates(args, step) for step in range(41)])
    np.testing.assert_allclose(rates[:, 0], 1e-4)
    network = torch.nn.Linear(1, 1)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-5)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10, eta_min=0)
    for step in range(41):
        assert rates[step, 1] == pytest.approx(schedule.get_last_lr()[0], abs=1e-10)
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize(
    "schedule, expected", [("constant", [1, 1, 1]), ("linear", [1, 0.5, 0.01]), ("cosine", [1, 0.5, 0.000247])]
)
def test_schedules(schedule, expected):
    command = ["--lr-schedule", schedule, "--lr-warmup-steps", "0", "--max-train-steps", "100"]
    args = parse_arguments(["--data-dir", "d", "--output-dir", "o", "--unet-learning-rate", "0.5", *command])
    rates = [learning_rates(args, step)[0] / 0.5 for step in (0, 50, 99)]
    np.testing.assert_allclose(rates, expected, atol=1e-6)


def test_what_is_saved_when_and_in_which_type(data, tmp_path, monkeypatch):
    options = {"max_train_steps": 3, "checkpointing_steps": 1, "checkpoints_total_limit": 2, "validation_steps": 2}
    assert run(data, tmp_path, save_dtype="float16", false_alarm_rate=0.25, report_to="tensorboard", **options) == 0
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    assert [row["step"] for row in csv.DictReader((tmp_path / "training_curve.csv").open())] == ["2", "3"]
    assert {t.dtype for t in weights(tmp_path).values() if t.is_floating_point()} == {torch.float16}
    pipe = DiffusionADPipeline.from_pretrained(tmp_path)
    assert pipe.config.false_alarm_rate == 0.25 and pipe.threshold == max(pipe.config.calibration_scores)
    assert pipe.unet.dtype == torch.float32 and list(tmp_path.glob("logs/**/events*"))


def test_workers_change_nothing_in_the_result(data, tmp_path, two_steps):
    assert run(data, tmp_path, max_train_steps=2, dataloader_num_workers=2, report_to="none") == 0
    assert same(weights(tmp_path), weights(two_steps)) and not (tmp_path / "logs").exists()


@pytest.fixture
def damaged(data, tmp_path):
    """A copy of the data, to damage."""
    shutil.copytree(data.parent / "textures", tmp_path / "textures")
    return shutil.copytree(data, tmp_path / "set")


def spoil(name, data):
    part = data / "demo-part"
    normal, defect = part / "train/good", next(f for f in sorted((part / "test").iterdir()) if f.name != "good")
    image = sorted(defect.iterdir())[0]
    mask = next((part / "ground_truth" / defect.name).glob(f"{image.stem}*"))
    if name == "no normal images":
        shutil.rmtree(normal)
        normal.mkdir()
    elif name == "an image without a mask":
        mask.unlink()
    elif name == "a mask without an image":
        image.unlink()
    elif name == "too many corrupt images":
        for file in sorted(normal.iterdir())[2:4]:
            file.write_bytes(b"nothing")
    elif name == "an empty texture folder":
        shutil.rmtree(data.parent / "textures")
        (data.parent / "textures").mkdir()
    return {"image": image.stem, "mask": mask.name}


@pytest.mark.parametrize(
    "damage, reason",
    [
        ("no normal images", "no normal images to train on"),
        ("an image without a mask", "without a mask: .*{image}"),
        ("a mask without an image", "without an image: .*{mask}"),
        ("too many corrupt images", "2 of 12 images are unusable, more than 5%: .*002"),
        ("an empty texture folder", "--texture-dir .*textures: no readable image in it"),
    ],
)
def test_what_is_wrong_with_the_data_is_said_in_one_line(damage, reason, damaged, tmp_path, capsys):
    names = spoil(damage, damaged)
    assert run(damaged, tmp_path / "out") == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("train.py: error: ")
    assert re.search(reason.format(**names), last), last


def test_a_corrupt_image_among_good_ones_is_named_counted_and_left_out(damaged, capsys):
    good = damaged / "demo-part/train/good"
    first = sorted(good.iterdir())[0]
    for i in range(10):
        shutil.copy(first, good / f"more{i}.png")
    first.write_bytes(first.read_bytes()[:300])
    assert run(damaged, damaged.parent / "out", max_train_steps=1) == 0
    said = capsys.readouterr().out
    assert "Left out, damaged: " in said and first.name in said
    assert "Left out, 9 duplicate(s): good/more1.png = good/more0.png" in said
    assert "Photos:  9 to train on, 3 held out" in said


def test_a_dataset_that_is_not_on_the_hub(hub, tmp_path, monkeypatch, capsys):
    hub.adopt_client(monkeypatch, tmp_path / "home")
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.endpoint)
    assert train.main(["--data-dir", "acme/wigdets", "--output-dir", str(tmp_path / "out")]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "dataset acme/wigdets cannot be read from the Hub" in last and "there is no such folder. Check" in last
    assert any("acme/wigdets" in request.path for request in hub.requests)
