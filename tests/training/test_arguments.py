"""The command line: presets, and a nonsense value for every option there is."""

import dataclasses
import json
from pathlib import Path

import pytest

from diffusionad_hf.training import arguments as module
from diffusionad_hf.training import loop as train
from diffusionad_hf.training.arguments import TrainingConfig, parse_arguments

from .runs import arguments, run

OPTIONS = {option.name for option in dataclasses.fields(TrainingConfig)}
PRESETS = Path(module.__file__).parent / "presets"
# For every option values that make no sense.
NONSENSE = {
    "data_dir": ["no/such/folder/of/images"],
    "category": ["no-such-category"],
    "texture_dir": ["no/such/textures"],
    "foreground_dir": ["no/such/masks"],
    "foreground": ["nowhere"],
    "value_range": [0, -1, "nan", "inf"],
    "holdout_fraction": [0, 1, "nan"],
    "feedback": ["no/such/marks.json"],
    "preset": ["enormous"],
    "architecture": ["enormous"],
    "image_size": [0, 100, 64.5, "64x", "64x100", "a photo"],
    "prediction_type": ["the-future"],
    "init_from": ["no/such/model"],
    "line_probability": [1.5],
    "displaced_probability": [-0.5],
    "erased_probability": ["nan"],
    "max_train_steps": [0, "many"],
    "train_batch_size": [-1, 1],
    "gradient_accumulation_steps": [0],
    "unet_learning_rate": [0, "inf"],
    "segmenter_learning_rate": [-1],
    "lr_schedule": ["up"],
    "lr_warmup_steps": [-1],
    "max_grad_norm": [-1, "nan", "inf"],
    "ema_decay": [1],
    "mixed_precision": ["fp4"],
    "seed": [-1],
    "output_dir": [__file__],
    "save_dtype": ["int8"],
    "checkpointing_steps": [0],
    "checkpoints_total_limit": [0],
    "resume_from_checkpoint": ["checkpoint-of-nothing"],
    "validation_steps": [0],
    "false_alarm_rate": [2],
    "hub_model_prefix": ["no-organization", "org/no good"],
    "dataset_name": ["???"],
    "report_to": ["a-pigeon"],
    "dataloader_num_workers": [-1],
    **dict.fromkeys(
        (
            "detach_reconstruction",
            "gradient_checkpointing",
            "channels_last",
            "compile",
            "push_to_hub",
            "hub_private_repo",
        ),
        ["perhaps"],
    ),
}
# What it takes for an option to matter.
TOGETHER = {
    "hub_model_prefix": {"push_to_hub": True},
    "dataset_name": {"push_to_hub": True, "hub_model_prefix": "org/x"},
}
CASES = [(option, value, TOGETHER.get(option, {})) for option, values in NONSENSE.items() for value in values]


def parsed(*command):
    return parse_arguments(["--data-dir", "d", "--output-dir", "o", *command])


def test_every_option_is_given_nonsense_and_help(capsys):
    assert NONSENSE.keys() == OPTIONS
    with pytest.raises(SystemExit) as stopped:
        train.main(["--help"])
    said = capsys.readouterr().out
    assert stopped.value.code == 0 and "_" not in "".join(part for part in said.split() if part.startswith("--"))
    assert all(f"--{name.replace('_', '-')}" in said for name in OPTIONS)
    assert said.startswith("usage: train.py ")
    presets = sorted(file.stem for file in PRESETS.glob("*.json"))
    assert f"options: {', '.join(presets)}, or a JSON file" in " ".join(said.split())
    with pytest.raises(SystemExit):
        train.main(["--help"], prog="diffusionad train")
    assert capsys.readouterr().out.startswith("usage: diffusionad train ")


@pytest.mark.parametrize("option, value, others", [*CASES, ("foreground_dir", "masks", {"foreground": "whole"})])
def test_nonsense_is_named_in_one_line(option, value, others, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    command = arguments(data, tmp_path / "out", **{**others, option: value})
    try:
        code = train.main(command)
    except SystemExit as stopped:
        code = stopped.code
    last = capsys.readouterr().err.splitlines()[-1]
    assert code == 2 and "error:" in last and str(value) in last
    assert not list(tmp_path.glob("out/checkpoint-*"))


@pytest.mark.parametrize(
    "content, reason",
    [
        ('{"unet_learning_rat": 1}', "unet_learning_rat"),
        ('{"preset": "tiny"}', "preset"),
        ("{", "JSON"),
        ("[1]", "object"),
        ('{"lr_schedule": "up"}', "up"),
        ('{"max_train_steps": 2.5}', "2.5"),
        ('{"max_train_steps": true}', "true"),
        ('{"max_train_steps": "2"}', '"2"'),
        ('{"gradient_checkpointing": "yes"}', "yes"),
        ('{"category": 1}', "of type str"),
        ('{"seed": null}', "null"),
        ('{"ema_decay": 2}', "--ema-decay 2"),
        ('{"max_grad_norm": NaN}', "--max-grad-norm nan"),
    ],
)
def test_a_preset_that_is_wrong_is_refused(content, reason, tmp_path, capsys):
    preset = tmp_path / "mine.json"
    preset.write_text(content)
    with pytest.raises(SystemExit):
        parsed("--preset", str(preset))
    assert "mine.json" in (last := capsys.readouterr().err.splitlines()[-1]) and reason in last


@pytest.mark.parametrize("preset", [p.stem for p in PRESETS.glob("*.json")])
def test_flags_beat_the_preset_which_beats_the_defaults_in_either_spelling(preset):
    values = json.loads((PRESETS / f"{preset}.json").read_text())
    config = parsed("--preset", preset, "--train_batch_size=3", "--lr-warmup-steps", "7", "--compile")
    expected = {**values, "train_batch_size": 3, "lr_warmup_steps": 7, "compile": True, "holdout_fraction": 0.15}
    assert {name: getattr(config, name) for name in expected} == expected


def test_from_python_an_option_is_called_by_its_name():
    assert TrainingConfig(data_dir="d", output_dir="o", max_grad_norm=1).seed == 0
    with pytest.raises(ValueError, match="^`image_size` 100: .* multiples of 32"):
        TrainingConfig(data_dir="d", output_dir="o", image_size="100")
    with pytest.raises(ValueError, match="`compile`.*`gradient_checkpointing`"):
        TrainingConfig(data_dir="d", output_dir="o", compile=True, gradient_checkpointing=True)


def test_a_single_normal_image_is_too_few(data, tmp_path, capsys):
    (tmp_path / "one/good").mkdir(parents=True)
    image = next((data / "demo-part/train/good").iterdir())
    (tmp_path / "one/good" / image.name).write_bytes(image.read_bytes())
    assert run(tmp_path / "one", tmp_path / "out", texture_dir=data.parent / "textures") == 2
    assert "at least 2" in capsys.readouterr().err
