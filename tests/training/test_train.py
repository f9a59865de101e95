"""Training, from a folder of normal images to a calibrated pipeline folder."""

import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from PIL import Image
from safetensors.torch import load_file

from diffusionad_hf import DiffusionADPipeline
from training import demo_parts, train
from training.arguments import parse_arguments

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    demo_parts.generate(folder / "set", seed=3, train=12, test_good=1, test_defective=6, size=64)
    return folder / "set"


@pytest.fixture(autouse=True)
def fresh_accelerator():
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    signal.signal(signal.SIGINT, signal.default_int_handler)


def arguments(data, output, **options):
    values = {
        "data_dir": data,
        "output_dir": output,
        "preset": "tiny",
        "resolution": 32,
        "max_train_steps": 4,
        "train_batch_size": 2,
        "validation_steps": 2,
        "checkpointing_steps": 2,
        "holdout_fraction": 0.25,
        "lr_warmup_steps": 1,
        "report_to": "none",
        **options,
    }
    return [text for name, value in values.items() if value is not None for text in (f"--{name}", str(value))]


def run(data, output, **options):
    code = train.main(arguments(data, output, **options))
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    return code


def weights(folder):
    return {
        f"{network}.{name}": tensor
        for network in ("unet", "segmenter")
        for name, tensor in load_file(folder / network / "diffusion_pytorch_model.safetensors").items()
    }


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    output = tmp_path_factory.mktemp("trained") / "model"
    assert run(data, output, report_to="tensorboard", checkpoints_total_limit=1) == 0
    return output


# ---- what a training leaves
# ---------------------------------------------------------------------------------------------------------


def test_a_training_ends_with_a_calibrated_pipeline(trained):
    pipe = DiffusionADPipeline.from_pretrained(trained)
    assert len(pipe.config.calibration_scores) == 3 and pipe.config.image_size == 32
    output = pipe(np.zeros((40, 30, 3), np.uint8))
    assert output.p_value is not None and output.anomaly_map[0].shape == (40, 30)


def test_it_is_calibrated_on_images_that_it_was_not_trained_on(trained, data):
    pipe = DiffusionADPipeline.from_pretrained(trained)
    files = sorted((data / "demo-part/train/good").iterdir())
    _, held_out = train.split_holdout(12, 0.25, 0)
    scores = sorted(pipe([files[i] for i in held_out]).anomaly_score)
    np.testing.assert_allclose(pipe.config.calibration_scores, scores, atol=1e-6)


def test_curve_checkpoints_logs_and_arguments_are_kept(trained):
    rows = list(csv.DictReader((trained / "training_curve.csv").open()))
    assert [row["step"] for row in rows] == ["2", "4"]
    assert all(math.isfinite(float(value)) for row in rows for value in row.values())
    assert {"loss", "noise", "focal", "smooth_l1", "validation_image_auroc", "validation_score"} < set(rows[0])
    assert [p.name for p in trained.glob("checkpoint-*")] == ["checkpoint-4"]
    assert list(trained.glob("logs/**/events*"))
    recorded = json.loads((trained / "training_arguments.json").read_text())
    assert recorded["max_train_steps"] == 4 and "data_dir" not in recorded


def test_training_changes_both_networks(data, tmp_path):
    assert run(data, tmp_path / "a", max_train_steps=2, ema_decay=0) == 0
    assert run(data, tmp_path / "b", max_train_steps=4, ema_decay=0) == 0
    before, after = weights(tmp_path / "a/best"), weights(tmp_path / "b/best")
    for network in ("unet", "segmenter"):
        assert any(not torch.equal(before[n], after[n]) for n in before if n.startswith(network))


def test_the_saved_type_is_the_one_asked_for(data, tmp_path):
    assert run(data, tmp_path, max_train_steps=1, save_dtype="float16") == 0
    floats = [t for t in weights(tmp_path).values() if t.is_floating_point()]
    assert {t.dtype for t in floats} == {torch.float16}
    assert DiffusionADPipeline.from_pretrained(tmp_path).unet.dtype == torch.float32


def test_the_same_seed_gives_the_same_weights_and_another_does_not(data, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert run(data, tmp_path / name, max_train_steps=2, seed=seed) == 0
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "c"))


def test_test_images_have_no_say(data, tmp_path):
    assert run(data, tmp_path / "a", max_train_steps=2) == 0
    other = tmp_path / "other"
    shutil.copytree(data, other)
    for file in other.glob("demo-part/test/*/*.png"):
        Image.new("RGB", (64, 64), "green").save(file)
    assert run(other, tmp_path / "b", max_train_steps=2) == 0
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    configs = [DiffusionADPipeline.from_pretrained(tmp_path / n).config.calibration_scores for n in "ab"]
    assert configs[0] == configs[1]


@pytest.mark.parametrize(
    "options",
    [
        {"mixed_precision": "bf16"},
        {"gradient_accumulation_steps": 2},
        {"foreground": "texture"},
        {"foreground": "whole"},
        {"ema_decay": 0},
        {"lr_schedule": "reference"},
        {"dataloader_num_workers": 1},
    ],
    ids=lambda options: next(iter(options)) + "-" + str(next(iter(options.values()))),
)
def test_options_train(data, tmp_path, options):
    assert run(data, tmp_path, max_train_steps=2, **options) == 0
    assert all(torch.isfinite(t).all() for t in weights(tmp_path).values())


def test_gradient_checkpointing_changes_nothing_but_memory(data, tmp_path):
    assert run(data, tmp_path / "a", max_train_steps=2) == 0
    command = [*arguments(data, tmp_path / "b", max_train_steps=2), "--gradient_checkpointing"]
    assert train.main(command) == 0
    first, second = weights(tmp_path / "a"), weights(tmp_path / "b")
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=1e-5, rtol=1e-4)


# ---- interruption
# -------------------------------------------------------------------------------------------------------------------


def test_a_resumed_training_ends_with_the_weights_of_one_never_interrupted(data, tmp_path, trained):
    assert run(data, tmp_path, checkpoints_total_limit=5) == 0
    shutil.rmtree(tmp_path / "checkpoint-4")
    shutil.rmtree(tmp_path / "unet")
    assert run(data, tmp_path, resume_from_checkpoint="latest") == 0
    assert same(weights(tmp_path), weights(trained))
    steps = [row["step"] for row in csv.DictReader((tmp_path / "training_curve.csv").open())]
    assert steps == ["2", "4"]


def test_ctrl_c_leaves_a_whole_checkpoint_to_go_on_from(data, tmp_path, trained):
    command = [sys.executable, str(ROOT / "training/train.py"), *arguments(data, tmp_path, checkpointing_steps=1000)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=os.environ)
    seen = ""
    while "loss=" not in seen and process.poll() is None:  # the first step is done
        seen += process.stderr.read(1)
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=120)[1]
    assert process.returncode == 130, seen + rest
    assert "--resume_from_checkpoint latest" in rest
    checkpoints = [p.name for p in tmp_path.glob("checkpoint-*")]
    assert len(checkpoints) == 1 and not list(tmp_path.glob(".*.partial"))
    assert run(data, tmp_path, resume_from_checkpoint="latest", checkpointing_steps=1000) == 0
    assert same(weights(tmp_path), weights(trained))


def test_latest_without_a_checkpoint_starts_afresh(data, tmp_path, trained):
    assert run(data, tmp_path, resume_from_checkpoint="latest") == 0
    assert same(weights(tmp_path), weights(trained))


def test_resuming_another_configuration_is_refused_with_both_values(data, tmp_path, capsys):
    assert run(data, tmp_path, max_train_steps=2) == 0
    capsys.readouterr()
    assert run(data, tmp_path, max_train_steps=2, train_batch_size=3, resume_from_checkpoint="latest") == 2
    error = capsys.readouterr().err
    assert "--train_batch_size 2" in error and "3" in error


def test_a_named_checkpoint_that_does_not_exist(data, tmp_path, capsys):
    assert run(data, tmp_path, resume_from_checkpoint="checkpoint-7") == 2
    assert "checkpoint-7" in capsys.readouterr().err


# ---- bad input
#
#
#
#
#
#
#
#
#
#
#
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "option, value",
    [
        ("resolution", 100),
        ("resolution", 0),
        ("max_train_steps", 0),
        ("train_batch_size", -1),
        ("train_batch_size", 1),
        ("gradient_accumulation_steps", 0),
        ("unet_learning_rate", 0),
        ("segmenter_learning_rate", -1),
        ("ema_decay", 1),
        ("holdout_fraction", 0),
        ("holdout_fraction", 1),
        ("false_alarm_rate", 2),
        ("max_grad_norm", -1),
        ("lr_warmup_steps", -1),
        ("seed", -1),
        ("checkpointing_steps", 0),
        ("checkpoints_total_limit", 0),
        ("validation_steps", 0),
        ("dataloader_num_workers", -1),
        ("preset", "enormous"),
        ("architecture", "enormous"),
        ("mixed_precision", "fp4"),
        ("max_train_steps", "many"),
    ],
)
def test_every_nonsense_value_is_named(option, value, data, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_arguments(arguments(data, tmp_path, **{option: value}))
    assert stopped.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert option in last and str(value) in last


@pytest.mark.parametrize(
    "content, reason",
    [('{"unet_learning_rat": 1}', "unet_learning_rat"), ("{", "JSON"), ('{"lr_schedule": "up"}', "up")],
)
def test_a_preset_that_is_wrong_is_refused(content, reason, data, tmp_path, capsys):
    preset = tmp_path / "mine.json"
    preset.write_text(content)
    with pytest.raises(SystemExit):
        parse_arguments(arguments(data, tmp_path, preset=preset))
    assert reason in capsys.readouterr().err.splitlines()[-1]


def test_flags_beat_the_preset_and_the_preset_beats_the_defaults(data, tmp_path):
    args = parse_arguments(["--data_dir", "d", "--output_dir", "o", "--preset", "paper", "--train_batch_size", "3"])
    assert (args.architecture, args.lr_schedule, args.segmenter_learning_rate, args.train_batch_size) == (
        "paper",
        "reference",
        1e-5,
        3,
    )


@pytest.mark.parametrize("preset", [p.stem for p in (ROOT / "training/presets").glob("*.json")])
def test_every_preset_reads(preset):
    assert parse_arguments(["--data_dir", "d", "--output_dir", "o", "--preset", preset]).preset == preset


def test_a_data_folder_that_does_not_exist(tmp_path, capsys):
    assert run(tmp_path / "nothing", tmp_path / "out") == 2
    assert "nothing" in capsys.readouterr().err.splitlines()[-1]


def test_a_single_normal_image_is_too_few(data, tmp_path, capsys):
    (tmp_path / "one/good").mkdir(parents=True)
    shutil.copy(next((data / "demo-part/train/good").iterdir()), tmp_path / "one/good")
    assert run(tmp_path / "one", tmp_path / "out") == 2
    assert "at least 2" in capsys.readouterr().err


def test_the_reference_schedule_swings_only_the_segmenter(data, tmp_path):
    args = parse_arguments(["--data_dir", "d", "--output_dir", "o", "--preset", "paper"])
    rates = np.array([list(train._rates(args, step)) for step in range(41)])
    np.testing.assert_allclose(rates[:, 0], 1e-4)
    network = torch.nn.Linear(1, 1)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-5)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10, eta_min=0)
    for step in range(41):
        assert rates[step, 1] == pytest.approx(schedule.get_last_lr()[0], abs=1e-10)
        optimizer.step()
        schedule.step()


def test_the_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main(["--help"])
    assert stopped.value.code == 0 and "--resume_from_checkpoint" in capsys.readouterr().out
