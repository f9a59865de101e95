"""The options of a training: from Python, a preset or the command line."""

import argparse
import json
import math
import os
import re
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args

from ..files import slug
from ..flags import DashedParser, as_flags
from ..presets import PRESETS as ARCHITECTURES

_PRESET_FOLDER = Path(__file__).parent / "presets"
_PRESETS = ", ".join(sorted(path.stem for path in _PRESET_FOLDER.glob("*.json")))
# Folders that are called alike in every dataset.
_NOT_A_NAME = {"good", "ok", "normal", "train"}
# The first option of each group in --help.
_GROUPS = {
    "data_dir": "data",
    "preset": "model",
    "line_probability": "anomalies",
    "max_train_steps": "optimisation",
    "output_dir": "saving and watching",
}


def _option(default: Any, help: str, *, choices: tuple[str, ...] | None = None, within: str = "") -> Any:
    """A field; `within` is an interval, such as `"[0, 1)"`."""
    return field(default=default, metadata={"help": help, "choices": choices, "within": within})


@dataclass(frozen=True, init=False)
class TrainingConfig:
    """
    The options of a training, as keywords; `diffusionad train --help` explains each. `preset` decides what is not
    given.

    The command line, its help, the presets and what is saved with checkpoints all come from these fields.

    Raises:
        ValueError: If there is no such option, or a value is of the wrong type or makes no sense; the message names
            the option in backticks.
    """

    data_dir: str | None = _option(
        None,
        "The same as PHOTOS: a plain folder of normal photos, a dataset in the layout of MVTec AD, VisA or DAGM, or a "
        "Hub dataset id.",
    )
    category: str | None = _option(
        None,
        'Which category of the dataset; may be left out if there is only one. "all" trains one after another, each '
        "into its own folder in the output folder; the same command again continues where it stopped.",
    )
    texture_dir: str | None = _option(
        None, "Folder of texture images (such as DTD) to make anomalies from; by default, textures are generated."
    )
    foreground_dir: str | None = _option(
        None,
        "Folder with a mask of the object for each training image, named like the image (one folder per category if "
        "all are trained); by default, masks are estimated.",
    )
    foreground: str = _option(
        "auto",
        "Where anomalies may lie: on the object, on random parts of a texture, or anywhere; auto decides from the "
        "images.",
        choices=("auto", "object", "texture", "whole"),
    )
    holdout_fraction: float = _option(
        0.15,
        "Share of the normal images held out to choose and calibrate the model; more, up to half, if "
        "`false_alarm_rate` takes more.",
        within="(0, 1)",
    )

    feedback: str | None = _option(
        None,
        "JSON with the photos that people marked as fine, which are learnt from, and as defects, which only measure "
        "the result.",
    )

    preset: str = _option(
        "perceptual",
        f"Defaults for all other options: {_PRESETS}, or a JSON file of your own.",
    )
    architecture: str = _option("small", "Size of the networks.", choices=tuple(ARCHITECTURES))
    image_size: str = _option(
        "256",
        "Size of the images in px, for training and inspection: HEIGHTxWIDTH, multiples of 32; or one number, for as "
        "many px as a square of that side has, in the usual shape of the training photos.",
    )
    value_range: float | None = _option(
        None,
        "The value that is white in images of more than 8 bits, such as 4095 for a camera of 12 bits; by default that "
        "of the file's type.",
        within="(0, inf)",
    )
    prediction_type: str | None = _option(
        None,
        "What the UNet predicts: the noise (the paper), the image, or the velocity. By default paper predicts the "
        "noise, all other sizes the image.",
        choices=("epsilon", "sample", "v_prediction"),
    )
    init_from: str | None = _option(
        None, "Start from the weights of this pipeline folder or Hub id, which must have the same size."
    )
    detach_reconstruction: bool = _option(
        False, "Train the UNet on its own loss only: no gradients of the mask losses through the reconstruction."
    )
    gradient_checkpointing: bool = _option(False, "Use less memory and more time, in both networks.")
    channels_last: bool = _option(False, "Use the channels-last memory format.")
    compile: bool = _option(False, "Compile the networks with torch.compile; the first step takes long.")

    line_probability: float = _option(
        0.0,
        "Share of synthetic anomalies that are thin lines, for scratches and cracks; not in the paper.",
        within="[0, 1]",
    )
    displaced_probability: float = _option(
        0.0,
        "Share of synthetic anomalies moved from elsewhere in the image, for misplaced features; not in the paper.",
        within="[0, 1]",
    )
    erased_probability: float = _option(
        0.0,
        "Share of synthetic anomalies that erase some structure, for missing features; not in the paper.",
        within="[0, 1]",
    )

    max_train_steps: int = _option(10000, "Optimiser steps.", within="[1, inf)")
    train_batch_size: int = _option(16, "Images per process and forward pass.", within="[1, inf)")
    gradient_accumulation_steps: int = _option(1, "Forward passes per optimiser step.", within="[1, inf)")
    unet_learning_rate: float = _option(1e-4, "Adam's rate for the UNet.", within="(0, 1)")
    segmenter_learning_rate: float = _option(1e-4, "Adam's rate for the segmentation network.", within="(0, 1)")
    lr_schedule: str = _option(
        "cosine",
        '"reference": constant for the UNet, a cosine with a period of 20 steps for the segmenter.',
        choices=("constant", "cosine", "linear", "reference"),
    )
    lr_warmup_steps: int = _option(100, "Steps over which both rates rise from zero.", within="[0, inf)")
    max_grad_norm: float = _option(1.0, "Clip gradients to this norm; 0 turns it off.", within="[0, inf)")
    ema_decay: float = _option(
        0.999, "Decay of the averaged weights, which are what is saved; 0 turns it off.", within="[0, 1)"
    )
    mixed_precision: str | None = _option(
        None,
        "Precision of the arithmetic. By default as accelerate is configured or, if it is not, the fastest of those "
        "that this device has, of each of which a step is timed.",
        choices=("no", "bf16", "fp16"),
    )
    seed: int = _option(0, "Fixes data order, anomalies, noise and initial weights.", within="[0, inf)")

    output_dir: str | None = _option(
        None,
        "Folder to write to: the pipeline, checkpoints, the training curve and logs. By default runs/NAME, by the "
        "name of the photos' folder.",
    )
    save_dtype: str = _option("float32", "Type of the saved weights.", choices=("float32", "float16"))
    checkpointing_steps: int = _option(500, "Steps between checkpoints to resume from.", within="[1, inf)")
    checkpoints_total_limit: int = _option(2, "Checkpoints to keep.", within="[1, inf)")
    resume_from_checkpoint: str = _option(
        "latest", 'Where to go on from, if there is something: a checkpoint folder, or "latest" of the output folder.'
    )
    validation_steps: int = _option(
        500, "Steps between validations on held-out normal images with synthetic defects.", within="[1, inf)"
    )
    false_alarm_rate: float = _option(0.05, "The rate that the calibrated threshold promises.", within="(0, 1)")
    push_to_hub: bool = _option(False, "Publish each model as soon as it is trained.")
    hub_model_prefix: str | None = _option(
        None, "With `push_to_hub`: ORG/PREFIX, to publish as ORG/PREFIX-<dataset>-<category>."
    )
    hub_private_repo: bool = _option(False, "Create private repos on the Hub.")
    dataset_name: str | None = _option(
        None, 'Name of the dataset on the Hub, such as "MVTec AD"; by default the name of its folder.'
    )
    report_to: str = _option("tensorboard", 'Trackers for accelerate: "tensorboard", "wandb", "all" or "none".')
    dataloader_num_workers: int = _option(
        0, "Processes that decode images; 0 keeps small datasets in memory.", within="[0, inf)"
    )

    def __init__(self, **options: Any) -> None:
        values = {option.name: option.default for option in fields(self)}
        if unknown := options.keys() - values:
            raise ValueError(f"no option of a training: {', '.join(sorted(unknown))}; see `diffusionad train --help`.")
        values |= load_preset(str(options.get("preset", values["preset"]))) | options
        if isinstance(values["image_size"], int):
            values["image_size"] = str(values["image_size"])
        if values["output_dir"] is None and values["data_dir"] is not None:
            values["output_dir"] = str(Path("runs", _name(values["data_dir"], values["category"])))
        for name, value in values.items():
            object.__setattr__(self, name, str(value) if isinstance(value, Path) else value)
        self._check()

    def _check(self) -> None:
        for option in fields(self):
            _check_value(option, getattr(self, option.name))
        multiple = 32
        if not re.fullmatch(r"\d{1,5}(x\d{1,5})?", self.image_size):
            raise ValueError(f"`image_size` {self.image_size}: must be a number of px, or HEIGHTxWIDTH like 192x512.")
        if any(side < multiple or side % multiple for side in self.sides):
            raise ValueError(
                f"`image_size` {self.image_size}: the networks halve the image five times, so both sides must be "
                f"multiples of {multiple}."
            )
        if self.train_batch_size == 1 and self.resolution == multiple:
            raise ValueError(
                f"`train_batch_size` 1: too small for batch norm at `image_size` {multiple}, where the smallest map "
                "has a single pixel; give 2 or more."
            )
        if self.foreground_dir is not None and self.foreground in ("texture", "whole"):
            raise ValueError(
                f"`foreground_dir` {self.foreground_dir}: contradicts `foreground` {self.foreground}; give only one."
            )
        if self.compile and self.gradient_checkpointing:
            raise ValueError("`compile`: torch.compile cannot compile `gradient_checkpointing`; give only one.")
        if self.category == "all" and self.resume_from_checkpoint != "latest":
            raise ValueError(
                f"`resume_from_checkpoint` {self.resume_from_checkpoint}: with `category` all, every category resumes "
                "from its own latest checkpoint; leave it out."
            )
        if self.push_to_hub and (self.hub_model_prefix or "").count("/") != 1:
            raise ValueError(
                f"`hub_model_prefix` {self.hub_model_prefix}: `push_to_hub` needs ORG/PREFIX, ORG being your name or "
                "an organization of yours."
            )

    @property
    def sides(self) -> tuple[int, ...]:
        """Height and width in px; or one number, if the photos decide their ratio."""
        return tuple(map(int, self.image_size.split("x")))

    @property
    def resolution(self) -> int:
        """Side in px of a square as large as the images."""
        return math.isqrt(self.sides[0] * self.sides[-1])


def parse_arguments(argv: list[str] | None = None, prog: str = "train.py") -> TrainingConfig:
    """Reads the command line; a preset sets the defaults of the other flags."""
    parser = _parser(prog)
    # The preset first, as its values are the defaults that --help shows.
    first = DashedParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default=parser.get_default("preset"))
    try:
        parser.set_defaults(**load_preset(first.parse_known_args(argv)[0].preset))
        # Intermixed: PHOTOS may also come last.
        values = vars(parser.parse_intermixed_args(argv))
        values["image_size"] = values.pop("resolution", values["image_size"])
        photos = values.pop("photos")
        if photos and values["data_dir"]:
            parser.error(f"PHOTOS {photos} and --data-dir {values['data_dir']}: give only one.")
        values["data_dir"] = photos or values["data_dir"]
        if not values["data_dir"]:
            parser.error("give PHOTOS: a folder of normal photos of one product.")
        return TrainingConfig(**values)
    except ValueError as error:
        parser.error(as_flags(str(error)))


def check_paths(config: TrainingConfig) -> None:
    """Raises a `ValueError` if the photos or the output folder cannot be what they should, as far as names tell."""
    photos = Path(config.data_dir).expanduser()
    if photos.is_file() or not (photos.exists() or re.fullmatch(r"[\w.-]+/[\w.-]+", config.data_dir)):
        raise ValueError(f"there is no folder {photos}: give a folder of normal photos, or OWNER/NAME on the Hub.")
    if Path(config.output_dir).is_file():
        raise ValueError(f"`output_dir` {config.output_dir}: is a file; give a folder.")


def _name(photos: str | Path, category: str | None) -> str:
    """What a training is called by default: `cookie` for .../cookie/train/good, `mvtec_ad-bottle` for a category."""
    _, *parts = Path(os.path.abspath(Path(photos).expanduser())).parts
    name = next((part for part in reversed(parts) if part.lower() not in _NOT_A_NAME), "photos")
    return name if category in (None, "all", name) else f"{name}-{slug(category)}"


def load_preset(name: str) -> dict[str, Any]:
    """Reads a preset: the stem of a file of `presets`, or the path of a JSON file."""
    path = Path(name) if name.endswith(".json") else _PRESET_FOLDER / f"{name}.json"
    if not path.is_file():
        raise ValueError(f"`preset` {name}: no such preset; choose one of {_PRESETS}, or give a .json file.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"`preset` {path}: not valid JSON ({error}).") from error
    if not isinstance(values, dict):
        raise ValueError(f"`preset` {path}: must be a JSON object of options and their values.")
    if "resolution" in values:  # of former versions
        values["image_size"] = _square(values.pop("resolution"))
    options = {option.name: option for option in fields(TrainingConfig) if option.name != "preset"}
    for key, value in values.items():
        if key not in options:
            raise ValueError(f'`preset` {path}: unknown key "{key}"; keys are the names of options, see --help.')
        try:
            _check_value(options[key], value)
        except ValueError as error:
            raise ValueError(f"`preset` {path}: {error}") from error
    return values


def _kind(option: Field) -> type:
    return next(iter(get_args(option.type)), option.type)


def _check_value(option: Field, value: Any) -> None:
    if value is None and option.default is None:
        return
    kind, name = _kind(option), option.name
    # An int is a valid float, but a bool is not a valid int.
    if type(value) is not kind and (kind, type(value)) != (float, int):
        raise ValueError(f"`{name}` {json.dumps(value, default=str)}: must be of type {kind.__name__}.")
    choices, within = option.metadata["choices"], option.metadata["within"]
    if choices and value not in choices:
        raise ValueError(f"`{name}` {value}: must be one of {', '.join(choices)}.")
    if within:
        low, high = map(float, within[1:-1].split(","))
        if not (low < value < high or (within[0] == "[" and value == low) or (within[-1] == "]" and value == high)):
            raise ValueError(f"`{name}` {value}: must lie in {within}.")


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = DashedParser(
        prog=prog,
        usage=f"{prog} PHOTOS [--output-dir DIR] [options]",
        description="Trains DiffusionAD on normal images of one product and writes a calibrated pipeline folder. "
        "Looks at the photos first, says its plan, and goes on where it stopped when it is called again.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("photos", metavar="PHOTOS", nargs="?", help="What to learn from, see --data-dir.")
    for option in fields(TrainingConfig):
        if option.name in _GROUPS:
            group = parser.add_argument_group(_GROUPS[option.name])
        kind = _kind(option)
        settings = {"type": kind, "choices": option.metadata["choices"]}
        if kind is bool:
            settings = {"action": argparse.BooleanOptionalAction}
        group.add_argument(
            f"--{option.name.replace('_', '-')}",
            default=option.default,
            help=as_flags(option.metadata["help"]),
            **settings,
        )
        if option.name == "image_size":
            add_former_size(group)
    return parser


def add_former_size(parser: Any) -> None:
    """Adds the flag by which former versions asked for a square."""
    parser.add_argument(
        "--resolution", type=_square, default=argparse.SUPPRESS, metavar="N", help="the same as --image-size NxN"
    )


def _square(side: Any) -> str:
    return f"{side}x{side}"
