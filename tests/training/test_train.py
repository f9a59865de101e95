"""Training, from a folder of normal images to a calibrated pipeline folder."""

import csv
import json
import math
import os
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.utils import set_seed
from PIL import Image
from safetensors.torch import load_file

from diffusionad_hf import DiffusionADPipeline
from diffusionad_hf.calibration import calibrate
from diffusionad_hf.cli.main import main
from diffusionad_hf.images_diffusionad import load_image, resize_image
from diffusionad_hf.training import preview
from diffusionad_hf.training.arguments import parse_arguments
from diffusionad_hf.training.dataset import split_holdout
from diffusionad_hf.training.loop import build_networks
from diffusionad_hf.training.outcome import Validation, save_examples
from diffusionad_hf.training.synthesis import AnomalySynthesizer

from .runs import arguments, run, same, weights


def test_a_training_ends_with_a_calibrated_pipeline(trained):
    pipe = DiffusionADPipeline.from_pretrained(trained)
    assert len(pipe.config.calibration_scores) == 3 and pipe.config.image_size == 32
    output = pipe(np.zeros((40, 30, 3), np.uint8))
    assert output.p_value is not None and output.anomaly_map[0].shape == (40, 30)
    # It knows its photos by itself: a black one is none of them, a held-out one is.
    held_out = DiffusionADPipeline.from_pretrained(trained)(sorted((trained / "examples").glob("good*"))[0])
    assert not output.is_familiar[0] and held_out.is_familiar[0]


def test_photos_too_few_for_the_rate_are_said_before_the_first_step_and_never_give_an_infinite_threshold(
    data, tmp_path, capsys
):
    assert run(data, tmp_path / "model", max_train_steps=1, false_alarm_rate=0.05) == 0
    said = capsys.readouterr()
    assert "Photos:  6 to train on, 6 held out, which promise a false-alarm rate of 14.3 % at best" in said.out
    assert "(5 % takes 38 photos)" in said.out and "the threshold is set for 14.3 %" in said.err
    assert "too few to show that it has learnt" in said.out and "give 14 photos or more" in said.out
    pipe = DiffusionADPipeline.from_pretrained(tmp_path / "model")
    assert math.isfinite(pipe.threshold) and pipe.config.false_alarm_rate == 1 / 7


def test_a_model_that_learnt_nothing_is_saved_and_gives_no_verdicts(data, trained, capsys):
    pipe = DiffusionADPipeline.from_pretrained(trained)
    assert pipe.config.has_learnt is False
    photos = data / "demo-part/test"
    assert main(["inspect", str(photos), "--model", str(trained)]) == 3
    assert "7 undecided: This model has not learnt to tell defects." in capsys.readouterr().out
    # Nor does a threshold of one's own make it see defects.
    assert main(["inspect", str(photos), "--model", str(trained), "--threshold", "0.99"]) == 3


def test_photos_it_was_trained_on_are_refused_for_calibration(data, trained, tmp_path, capsys):
    files = sorted((data / "demo-part/train/good").iterdir())
    seen = split_holdout(12, 0.25, 0)[0]
    for i in seen[:2]:
        shutil.copy(files[i], tmp_path / f"renamed-{i}.png")
    calibrating = ["calibrate", str(tmp_path), "--model", str(trained), "--output-dir", str(tmp_path / "model")]
    assert main(calibrating) == 2
    assert "the model was trained on all of these images" in capsys.readouterr().err
    with pytest.raises(ValueError, match="image 1: the model was trained on it"):
        calibrate(DiffusionADPipeline.from_pretrained(trained), [np.zeros((64, 64, 3), np.uint8), files[seen[0]]])


def test_the_best_weights_so_far_give_no_verdicts_whatever_they_are_calibrated_on(data, trained, tmp_path, capsys):
    """They know neither what they were trained on nor whether they have learnt; the model in the folder above does."""
    photos = str(data / "demo-part/train/good")
    options = ["--model", str(trained / "best"), "--output-dir", str(tmp_path / "model")]
    assert main(["calibrate", photos, *options]) == 0
    assert main(["inspect", photos, "--model", str(tmp_path / "model")]) == 3
    assert "12 undecided: This model has not learnt to tell defects." in capsys.readouterr().out


@pytest.mark.parametrize(
    "normal, defective, passed",
    [
        (range(7), range(7, 14), True),  # 1 in 128 by chance
        (range(6), range(6, 12), False),  # 1 in 64
        (range(0, 24, 2), range(5, 29, 2), True),  # every one rises, and the AUROC is 0.73
        (range(0, 64, 2), range(1, 65, 2), False),  # every one rises, by too little to be of use
        (range(20), [*range(10, 20), *range(10)], False),
        ([1] * 20, [1] * 20, False),
        (range(64), [], False),
    ],
)
def test_a_model_has_learnt_if_chance_can_be_ruled_out(normal, defective, passed):
    validation = Validation.__new__(Validation)
    validation.images, validation.count = None, len(normal)
    validation.labels = torch.tensor([0] * len(normal) + [1] * len(defective) + [0] * (len(normal) - len(defective)))
    scores = np.array([*normal, *defective, *normal[len(defective) :]], float)
    assert validation.is_passed_by(lambda images: SimpleNamespace(anomaly_score=scores)) == passed


def test_an_image_that_is_not_finite_is_named(data, tmp_path, capsys, monkeypatch):
    make, seen = AnomalySynthesizer.__call__, []

    def breaks_one(self, images, indices, epoch, foreground=None):
        made = make(self, images, indices, epoch, foreground)
        if self.anomaly_probability < 1 and epoch < 2**31:  # neither validates nor probes
            seen.extend(indices)
            if len(seen) > 4:
                made.images[-1, 0, 3, 4] = torch.nan
        return made

    monkeypatch.setattr(AnomalySynthesizer, "__call__", breaks_one)
    assert run(data, tmp_path, max_train_steps=4, gradient_accumulation_steps=2, ema_decay=0) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "is not finite at step 1" in error and "learning rates" not in error
    named = [name for name in sorted(p.name for p in data.rglob("train/good/*")) if name in error]
    assert len(named) == 1, error


def test_it_is_calibrated_on_images_that_it_was_not_trained_on(trained, data):
    pipe = DiffusionADPipeline.from_pretrained(trained)
    files = sorted((data / "demo-part/train/good").iterdir())
    _, held_out = split_holdout(12, 0.25, 0)
    scores = sorted(pipe([files[i] for i in held_out]).anomaly_score)
    np.testing.assert_allclose(pipe.config.calibration_scores, scores, atol=1e-5)


def test_photos_to_try_it_on_are_kept_that_it_was_not_trained_on(trained):
    names = sorted(file.name for file in (trained / "examples").iterdir())
    assert names == ["good-2.png", "good.png", "synthetic-defect-2.png", "synthetic-defect.png"]
    pipe, half = DiffusionADPipeline.from_pretrained(trained), len(names) // 2
    photos = [load_image(trained / "examples" / name) for name in names]
    assert not any(pipe.trained_on(resize_image(photo, pipe.config.image_size)) for photo in photos)
    assert not any(torch.equal(good, bad) for good, bad in zip(photos[:half], photos[half:], strict=True))


def test_of_one_held_out_photo_with_many_defects_the_one_without_is_the_good_one(tmp_path):
    images = torch.arange(4).view(4, 1, 1, 1).expand(4, 3, 8, 8) / 4
    save_examples(SimpleNamespace(images=images, labels=torch.tensor([0, 1, 1, 1]), count=1), tmp_path)
    found = {file.stem: load_image(file).max().item() for file in (tmp_path / "examples").iterdir()}
    assert found == {"good": 0, "synthetic-defect": 64, "synthetic-defect-2": 128}


def test_curve_checkpoints_logs_and_arguments_are_kept(trained):
    rows = list(csv.DictReader((trained / "training_curve.csv").open()))
    assert [row["step"] for row in rows] == ["2", "4"]
    assert all(math.isfinite(float(value)) for row in rows for value in row.values())
    assert {"loss", "noise", "focal", "smooth_l1", "validation_image_auroc", "validation_score"} < set(rows[0])
    assert [p.name for p in trained.glob("checkpoint-*")] == ["checkpoint-4"]
    assert list(trained.glob("logs/**/events*"))
    recorded = json.loads((trained / "training_arguments.json").read_text())
    assert recorded["max_train_steps"] == 4 and "data_dir" not in recorded


def test_training_changes_both_networks(data, two_steps):
    set_seed(0)
    args = parse_arguments(arguments(data, two_steps, max_train_steps=2))
    fresh, after = build_networks(args), weights(two_steps)
    # The UNet's last convolutions start at zero, behind which nothing learns in the first steps.
    for network, share in (("unet", 0.2), ("segmenter", 0.9)):
        before = dict(getattr(fresh, network).named_parameters())
        changed = [not torch.equal(value, after[f"{network}.{name}"]) for name, value in before.items()]
        assert sum(changed) > share * len(changed)


def test_the_same_seed_gives_the_same_weights_and_another_does_not(data, tmp_path, two_steps):
    for name, seed in (("a", 0), ("b", 1)):
        assert run(data, tmp_path / name, max_train_steps=2, seed=seed) == 0
    assert same(weights(tmp_path / "a"), weights(two_steps))
    assert not same(weights(tmp_path / "b"), weights(two_steps))


def test_test_images_have_no_say(data, tmp_path, two_steps):
    other = tmp_path / "other"
    shutil.copytree(data, other)
    for file in other.glob("demo-part/test/*/*.png"):
        Image.new("RGB", (64, 64), "green").save(file)
    assert run(other, tmp_path / "b", max_train_steps=2, texture_dir=data.parent / "textures") == 0
    assert same(weights(tmp_path / "b"), weights(two_steps))
    configs = [DiffusionADPipeline.from_pretrained(n).config.calibration_scores for n in (tmp_path / "b", two_steps)]
    assert configs[0] == configs[1]


def test_fewer_images_than_the_batch_train_with_a_warning(data, tmp_path, capsys):
    assert run(data, tmp_path, max_train_steps=1, train_batch_size=16) == 0
    assert "--train-batch-size 16: every batch holds some image more than once" in capsys.readouterr().err


def test_another_training_in_the_same_folder_is_refused_and_harms_nothing(data, trained, capsys):
    before = {file: file.stat().st_mtime_ns for file in trained.rglob("*")}
    assert run(data, trained, seed=1) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "--seed 0, this one has 1" in error and "another --output-dir" in error
    assert {file: file.stat().st_mtime_ns for file in trained.rglob("*")} == before


def test_what_is_finished_is_not_trained_again_and_the_next_command_is_said(data, trained, capsys):
    before = {file: file.stat().st_mtime_ns for file in trained.rglob("*")}
    assert run(data, trained) == 0
    assert {file: file.stat().st_mtime_ns for file in trained.rglob("*")} == before
    assert f"diffusionad serve --model {trained}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option, then, now",
    [("train_batch_size", 2, 3), ("seed", 0, 1), ("mixed_precision", "no", "bf16"), ("max_train_steps", 2, 3)],
)
def test_resuming_another_configuration_is_refused_with_both_values(option, then, now, data, two_steps, capsys):
    options = {"max_train_steps": 2, "resume_from_checkpoint": "checkpoint-2", option: now}
    assert run(data, two_steps, **options) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"--{option.replace('_', '-')} {then}" in error and f"has {now}" in error


def test_resuming_with_another_padding_is_refused(data, two_steps, tmp_path, capsys):
    """No option says which it is: it comes with the networks' size, and versions may differ in it."""
    folder = tmp_path / "model"
    shutil.copytree(two_steps, folder)
    [state_file] = folder.glob("checkpoint-2/training_state.json")
    state = json.loads(state_file.read_text())
    assert state["arguments"]["padding_mode"] == "zeros"
    state["arguments"]["padding_mode"] = "replicate"
    state_file.write_text(json.dumps(state))
    assert run(data, folder, max_train_steps=2, resume_from_checkpoint="checkpoint-2") == 2
    assert "padding" in (said := capsys.readouterr().err) and "replicate, this one has zeros" in said


@pytest.mark.parametrize("schedule", ["constant", "reference"])
def test_a_finished_training_goes_on_for_longer_where_the_rates_do_not_depend_on_that(schedule, data, tmp_path):
    options = {"lr_schedule": schedule, "validation_steps": 1}
    assert run(data, tmp_path / "whole", max_train_steps=2, **options) == 0
    assert run(data, tmp_path / "parts", max_train_steps=1, **options) == 0
    assert run(data, tmp_path / "parts", max_train_steps=2, resume_from_checkpoint="latest", **options) == 0
    assert same(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


@pytest.mark.parametrize(
    "change, reason",
    [
        # As it was written before there was a choice, when networks learnt the noise.
        ({"prediction_type": None}, "--prediction-type epsilon, this one has sample"),
        ({"num_processes": 2}, "--num-processes 2, this one has 1"),
        ({"distill_from": "an option of earlier versions"}, None),
    ],
)
def test_what_a_checkpoint_recorded_decides_whether_it_can_be_resumed(
    change, reason, data, tmp_path, two_steps, capsys
):
    shutil.copytree(two_steps / "checkpoint-2", tmp_path / "checkpoint-2")
    shutil.copytree(two_steps / "best", tmp_path / "best")
    file = tmp_path / "checkpoint-2/training_state.json"
    state = json.loads(file.read_text())
    arguments = {**state["arguments"], **change}
    state["arguments"] = {name: value for name, value in arguments.items() if name not in change or value}
    file.write_text(json.dumps(state))
    assert run(data, tmp_path, max_train_steps=2, resume_from_checkpoint="latest") == (2 if reason else 0)
    if reason:
        assert reason in capsys.readouterr().err.splitlines()[-1]
    else:
        assert same(weights(tmp_path), weights(two_steps))


def _moved(folder):
    folder.rename(folder.with_name("elsewhere"))


def _other(folder):
    Image.new("RGB", (64, 64), "red").save(folder / "train/good/003.png")


def _one_more(folder):
    shutil.copy(folder / "test/good/000.png", folder / "train/good/0.png")


def _one_less(folder):
    (folder / "train/good/011.png").unlink()


def _renamed(folder):
    (folder / "train/good/000.png").rename(folder / "train/good/zzz.png")


def _more_textures(folder):
    Image.new("RGB", (64, 64), "red").save(folder.with_name("textures") / "red.png")


@pytest.mark.parametrize(
    "change, options, reason",
    [
        (_moved, {}, None),
        (_other, {}, "had other images: 1 new (good/003.png) and 1 missing (good/003.png); give the same"),
        (_one_more, {}, "had other images: 1 new (good/0.png); give the same"),
        (_one_less, {}, "had other images: 1 missing (good/011.png); give the same"),
        (_renamed, {}, "the images have other names"),
        (_more_textures, {}, "had other textures"),
        (
            None,
            {"false_alarm_rate": 0.15},
            "that training held out 3 images, this one would hold out 6; give its --false-",
        ),
        (None, {"false_alarm_rate": 0.3}, None),
    ],
)
def test_a_training_goes_on_with_its_own_images_only(change, options, reason, data, tmp_path, two_steps, capsys):
    """Otherwise images that it was trained on would come to be those that it is calibrated on."""
    for name in ("checkpoint-2", "best"):
        shutil.copytree(two_steps / name, tmp_path / "model" / name)
    shutil.copytree(data / "demo-part", tmp_path / "demo-part")
    shutil.copytree(data.parent / "textures", tmp_path / "textures")
    if change is not None:
        change(tmp_path / "demo-part")
    folder = tmp_path / ("elsewhere" if change is _moved else "demo-part")
    options = {"max_train_steps": 2, "resume_from_checkpoint": "latest", **options}
    assert run(folder, tmp_path / "model", **options) == (2 if reason else 0)
    if reason:
        assert reason in capsys.readouterr().err.splitlines()[-1]
    else:
        assert same(weights(tmp_path / "model"), weights(two_steps))


def test_a_checkpoint_of_an_earlier_version_goes_on_and_says_what_it_cannot_know(data, tmp_path, two_steps, capsys):
    for name in ("checkpoint-2", "best"):
        shutil.copytree(two_steps / name, tmp_path / name)
    file = tmp_path / "checkpoint-2/training_state.json"
    state = json.loads(file.read_text())
    file.write_text(json.dumps({name: value for name, value in state.items() if name != "data"}))
    assert run(data, tmp_path, max_train_steps=2, resume_from_checkpoint="latest") == 0
    assert "did not note its images; go on with the same ones only" in capsys.readouterr().err


def test_what_the_weights_to_begin_with_have_seen_is_not_calibrated_on(data, tmp_path, two_steps, capsys):
    assert run(data, tmp_path / "other", init_from=two_steps, seed=1, max_train_steps=1) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"--init-from .*: was trained on [123] of the 3 images that are held out here", error)
    assert run(data, tmp_path / "same", init_from=two_steps, max_train_steps=1) == 0
    before, after = (
        DiffusionADPipeline.from_pretrained(folder).config.training_digests
        for folder in (two_steps, tmp_path / "same")
    )
    assert after.startswith(before) and len(after) > len(before)


def test_a_loss_that_is_not_finite_ends_the_training_and_keeps_the_checkpoint(data, tmp_path, capsys):
    rates = {"unet_learning_rate": 0.999, "segmenter_learning_rate": 0.999, "max_grad_norm": 0, "ema_decay": 0}
    assert run(data, tmp_path, max_train_steps=200, checkpointing_steps=1, validation_steps=1000, **rates) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "loss is nan" in error and "lower the learning rates" in error
    (checkpoint, *_) = sorted(tmp_path.glob("checkpoint-*/model.safetensors"))
    assert all(torch.isfinite(tensor).all() for tensor in load_file(checkpoint).values())


def test_images_foregrounds_and_categories_whose_names_are_no_text(data, tmp_path, capsys):
    """And what lies beside them that is none of them."""
    odd = tmp_path / os.fsdecode(b"\xe9")
    try:
        shutil.copytree(data / "demo-part/train", odd / "train")
        photos = sorted((odd / "train/good").iterdir())
        for i, photo in enumerate(photos):
            photo.rename(photo.with_name(os.fsdecode(b"\xc1%d.png" % i)))
    except OSError:
        pytest.skip("this file system takes no such names")
    (tmp_path / "masks").mkdir()
    for i in range(len(photos)):
        Image.new("L", (64, 64), 255).save(os.fsencode(tmp_path / "masks") + b"/\xc1%d.png" % i)
    (tmp_path / "masks/._0.png").write_bytes(b"litter")
    (tmp_path / "textures").mkdir()
    (tmp_path / "textures/more").symlink_to(data.parent / "textures")
    options = {"foreground_dir": tmp_path / "masks", "max_train_steps": 2, "texture_dir": tmp_path / "textures"}
    assert run(odd, tmp_path / "model", category=odd.name, **options) == 0
    assert DiffusionADPipeline.from_pretrained(tmp_path / "model").threshold is not None
    sheet = ["--data-dir", str(odd), "--output", str(tmp_path / "sheet.png"), "--rows", "1"]
    assert preview.main(sheet) == 0 and "\\udce9" in capsys.readouterr().out
