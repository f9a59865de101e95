"""The command line: presets, and a nonsense value for every option there is."""

import json
from pathlib import Path

import pytest

from training import train
from training.arguments import option_names, parse_arguments

from .runs import arguments, run

ROOT = Path(__file__).parents[2]
PUSH = {"push_to_hub": True, "hub_model_prefix": "org/x"}
# For every option a value that makes no sense, and what it takes for the option to matter.
NONSENSE = [
    ("data_dir", "no/such/folder/of/images", {}),
    ("category", "no-such-category", {}),
    ("texture_dir", "no/such/textures", {}),
    ("foreground_dir", "no/such/masks", {}),
    ("foreground_dir", "masks", {"foreground": "whole"}),
    ("foreground", "nowhere", {}),
    ("holdout_fraction", 0, {}),
    ("holdout_fraction", 1, {}),
    ("holdout_fraction", "nan", {}),
    ("preset", "enormous", {}),
    ("architecture", "enormous", {}),
    ("resolution", 0, {}),
    ("resolution", 100, {}),
    ("resolution", 64.5, {}),
    ("prediction_type", "the-future", {}),
    ("init_from", "no/such/model", {}),
    ("distill_from", "no/such/model", {}),
    ("detach_reconstruction", "perhaps", {}),
    ("gradient_checkpointing", "perhaps", {}),
    ("channels_last", "perhaps", {}),
    ("compile", "perhaps", {}),
    ("line_probability", 1.5, {}),
    ("displaced_probability", -0.5, {}),
    ("erased_probability", "nan", {}),
    ("max_train_steps", 0, {}),
    ("max_train_steps", "many", {}),
    ("train_batch_size", -1, {}),
    ("train_batch_size", 1, {}),
    ("gradient_accumulation_steps", 0, {}),
    ("unet_learning_rate", 0, {}),
    ("unet_learning_rate", "inf", {}),
    ("segmenter_learning_rate", -1, {}),
    ("lr_schedule", "up", {}),
    ("lr_warmup_steps", -1, {}),
    ("max_grad_norm", -1, {}),
    ("max_grad_norm", "nan", {}),
    ("ema_decay", 1, {}),
    ("mixed_precision", "fp4", {}),
    ("seed", -1, {}),
    ("output_dir", __file__, {}),
    ("save_dtype", "int8", {}),
    ("checkpointing_steps", 0, {}),
    ("checkpoints_total_limit", 0, {}),
    ("resume_from_checkpoint", "checkpoint-of-nothing", {}),
    ("validation_steps", 0, {}),
    ("false_alarm_rate", 2, {}),
    ("push_to_hub", "perhaps", {}),
    ("hub_model_prefix", "no-organization", {"push_to_hub": True}),
    ("hub_model_prefix", "org/no good", {"push_to_hub": True}),
    ("hub_private_repo", "perhaps", PUSH),
    ("dataset_name", "???", PUSH),
    ("report_to", "a-pigeon", {}),
    ("dataloader_num_workers", -1, {}),
]


def test_every_option_is_given_nonsense():
    assert {option for option, _, _ in NONSENSE} == set(option_names())


@pytest.mark.parametrize("option, value, others", NONSENSE, ids=lambda value: str(value) if value != {} else "")
def test_nonsense_is_named_in_one_line(option, value, others, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    options = {**others, option: value}
    if value == "perhaps":  # a flag takes no value
        command = [*arguments(data, tmp_path / "out", **others), f"--{option}", value]
    else:
        command = arguments(data, tmp_path / "out", **options)
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
        ("{", "JSON"),
        ("[1]", "object"),
        ('{"lr_schedule": "up"}', "up"),
        ('{"max_train_steps": 2.5}', "2.5"),
        ('{"max_train_steps": true}', "true"),
        ('{"gradient_checkpointing": "yes"}', "yes"),
        ('{"category": 1}', "of type str"),
        ('{"seed": null}', "null"),
        ('{"ema_decay": 2}', "ema_decay 2"),
        ('{"max_grad_norm": NaN}', "max_grad_norm nan"),
    ],
)
def test_a_preset_that_is_wrong_is_refused(content, reason, data, tmp_path, capsys):
    preset = tmp_path / "mine.json"
    preset.write_text(content)
    with pytest.raises(SystemExit):
        parse_arguments(["--data_dir", "d", "--output_dir", "o", "--preset", str(preset)])
    assert reason in capsys.readouterr().err.splitlines()[-1]


def test_flags_beat_the_preset_and_the_preset_beats_the_defaults():
    args = parse_arguments(["--data_dir", "d", "--output_dir", "o", "--preset", "paper", "--train_batch_size", "3"])
    assert (args.architecture, args.lr_schedule, args.segmenter_learning_rate, args.train_batch_size) == (
        "paper",
        "reference",
        1e-5,
        3,
    )


@pytest.mark.parametrize("preset", [p.stem for p in (ROOT / "training/presets").glob("*.json")])
def test_every_preset_reads_and_is_what_its_file_says(preset):
    args = parse_arguments(["--data_dir", "d", "--output_dir", "o", "--preset", preset])
    values = json.loads((ROOT / f"training/presets/{preset}.json").read_text())
    assert {name: getattr(args, name) for name in values} == values


def test_the_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main(["--help"])
    said = capsys.readouterr().out
    assert stopped.value.code == 0 and all(f"--{name}" in said for name in option_names())


def test_options_that_exclude_each_other(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--data_dir", "d", "--output_dir", "o", "--compile", "--gradient_checkpointing"])
    assert "--compile" in (last := capsys.readouterr().err.splitlines()[-1]) and "--gradient_checkpointing" in last


def test_a_single_normal_image_is_too_few(data, tmp_path, capsys):
    (tmp_path / "one/good").mkdir(parents=True)
    image = next((data / "demo-part/train/good").iterdir())
    (tmp_path / "one/good" / image.name).write_bytes(image.read_bytes())
    assert run(tmp_path / "one", tmp_path / "out", texture_dir=data.parent / "textures") == 2
    assert "at least 2" in capsys.readouterr().err
