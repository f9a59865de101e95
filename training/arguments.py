"""Command line and presets of the training."""

import argparse
import json
import math
from pathlib import Path
from typing import Any

from diffusionad_hf import PRESETS as ARCHITECTURES
from diffusionad_hf.modeling_anomaly_segmenter import AnomalySegmenter

__all__ = ["load_preset", "option_names", "parse_arguments"]

_PRESET_FOLDER = Path(__file__).parent / "presets"
_LR_SCHEDULES = ("constant", "cosine", "linear", "reference")
_PRECISIONS = ("no", "bf16", "fp16")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """
    Reads the command line; a preset gives the defaults of the flags that are not on it.

    Raises:
        SystemExit: With one line that names the argument, where a value makes no sense.
    """
    parser = _parser()
    # On its own and first, as its values are the defaults that --help shows.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default=parser.get_default("preset"))
    preset = first.parse_known_args(argv)[0].preset
    try:
        parser.set_defaults(**load_preset(preset, parser))
    except ValueError as error:
        parser.error(str(error))
    args = parser.parse_args(argv)
    _check(args, parser)
    return args


def load_preset(name: str, parser: argparse.ArgumentParser | None = None) -> dict[str, Any]:
    """
    Reads a preset.

    Args:
        name: A file of `training/presets` without its suffix, or the path of a JSON file.
        parser: Whose options the keys must be.

    Raises:
        ValueError: If there is no such preset, or a key or value is unknown.
    """
    parser = parser or _parser()
    path = Path(name) if name.endswith(".json") else _PRESET_FOLDER / f"{name}.json"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in _PRESET_FOLDER.glob("*.json")))
        raise ValueError(f"--preset {name}: no such preset; choose one of {known}, or give a .json file.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"--preset {path}: not valid JSON ({error}).") from error
    options = {action.dest: action for action in parser._actions}
    if not isinstance(values, dict):
        raise ValueError(f"--preset {path}: must be a JSON object of options and their values.")
    for key, value in values.items():
        action = options.get(key)
        if action is None or key in ("help", "preset"):
            raise ValueError(f'--preset {path}: unknown key "{key}"; keys are the names of the options, see --help.')
        if action.choices is not None and value not in action.choices:
            raise ValueError(
                f'--preset {path}: {key} is "{value}", must be one of {", ".join(map(str, action.choices))}.'
            )
        kind = bool if action.nargs == 0 else action.type or str
        # A whole number is a number, but true is not 1.
        if value is not None and type(value) is not kind and (kind, type(value)) != (float, int):
            raise ValueError(f"--preset {path}: {key} is {json.dumps(value)}, must be of type {kind.__name__}.")
        if value is None and action.default is not None:
            raise ValueError(f"--preset {path}: {key} is null, must be of type {kind.__name__}.")
    return values


def option_names() -> list[str]:
    """The names of all options."""
    return [action.dest for action in _parser()._actions if action.dest != "help"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Trains DiffusionAD on normal images of one product and writes a calibrated pipeline folder.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument_group("data").add_argument
    add(
        "--data_dir", required=True, help="Data set: MVTec AD, VisA, DAGM or plain folder layout, or a Hub dataset id."
    )
    add(
        "--category",
        default=None,
        help='Which category of the data set; may be left out where there is but one. "all": one after another, each '
        "in its own folder in OUTPUT_DIR; the same command again goes on where it stopped.",
    )
    add(
        "--texture_dir",
        default=None,
        help="Folder of texture images (such as DTD) to make anomalies of; procedural textures without it.",
    )
    add(
        "--foreground_dir",
        default=None,
        help="Folder of masks of the object, one per training image and named like it, in a folder for each category "
        "where all are trained; estimated without it.",
    )
    add(
        "--foreground",
        default="auto",
        choices=("auto", "object", "texture", "whole"),
        help="Where anomalies may lie: on the object, on random parts of a texture, anywhere; or decide from "
        "the images.",
    )
    add(
        "--holdout_fraction",
        type=float,
        default=0.15,
        help="Share of the normal images kept out, to choose and calibrate the model.",
    )

    add = parser.add_argument_group("model").add_argument
    add(
        "--preset",
        default="perceptual",
        help="Defaults for all of this: a name from training/presets or a JSON file of your own.",
    )
    add("--architecture", default="small", choices=tuple(ARCHITECTURES), help="Size of the networks.")
    add(
        "--resolution",
        type=int,
        default=256,
        help="Side length in px at which images are trained and inspected; a multiple of 32.",
    )
    add(
        "--prediction_type",
        default=None,
        choices=("epsilon", "sample", "v_prediction"),
        help="What the UNet is to predict: the noise (the paper), the image itself, or the velocity. Without it, what "
        "the architecture is made for: paper predicts the noise, the others the image.",
    )
    add(
        "--init_from", default=None, help="Start from the weights of this pipeline folder or Hub id, of the same size."
    )
    add(
        "--distill_from",
        default=None,
        help="Learn also from the answers of this pipeline folder or Hub id, trained on the same images, which may be "
        "of another size; networks of the same size start with its weights. With --category all, a folder of the "
        "categories' pipelines.",
    )
    add(
        "--detach_reconstruction",
        action="store_true",
        help="Let the UNet learn from its own loss alone, and not from the masks through the reconstruction as well.",
    )
    add("--gradient_checkpointing", action="store_true", help="Trade time for memory, in both networks.")
    add("--channels_last", action="store_true", help="Lay the networks out as the GPU's convolutions like it.")
    add("--compile", action="store_true", help="Compile the networks with torch.compile; the first step takes long.")

    add = parser.add_argument_group("anomalies").add_argument
    add(
        "--line_probability",
        type=float,
        default=0.0,
        help="Share of the synthetic anomalies that are thin lines, for scratches and cracks; not in the paper.",
    )
    add(
        "--displaced_probability",
        type=float,
        default=0.0,
        help="Share of the synthetic anomalies made of other places of the image, for features out of place; not in "
        "the paper.",
    )
    add(
        "--erased_probability",
        type=float,
        default=0.0,
        help="Share of the synthetic anomalies that erase some structure, for missing features; not in the paper.",
    )

    add = parser.add_argument_group("optimisation").add_argument
    add("--max_train_steps", type=int, default=10000, help="Optimiser steps.")
    add("--train_batch_size", type=int, default=16, help="Images per process and forward pass.")
    add("--gradient_accumulation_steps", type=int, default=1, help="Forward passes per optimiser step.")
    add("--unet_learning_rate", type=float, default=1e-4, help="Adam's rate for the UNet.")
    add("--segmenter_learning_rate", type=float, default=1e-4, help="Adam's rate for the segmentation network.")
    add(
        "--lr_schedule",
        default="cosine",
        choices=_LR_SCHEDULES,
        help='"reference": constant for the UNet, a cosine that swings every 20 steps for the segmenter.',
    )
    add("--lr_warmup_steps", type=int, default=100, help="Steps over which both rates rise from zero.")
    add("--max_grad_norm", type=float, default=1.0, help="Gradients are clipped to this norm; 0 turns it off.")
    add(
        "--ema_decay",
        type=float,
        default=0.999,
        help="Decay of the averaged weights, which are what is saved; 0 turns it off.",
    )
    add(
        "--mixed_precision",
        default=None,
        choices=_PRECISIONS,
        help="As for accelerate, whose configuration decides without it.",
    )
    add("--seed", type=int, default=0, help="Fixes data order, anomalies, noise and initial weights.")

    add = parser.add_argument_group("saving and watching").add_argument
    add("--output_dir", required=True, help="The pipeline folder to write; checkpoints, curve and logs lie in it too.")
    add("--save_dtype", default="float32", choices=("float32", "float16"), help="Type of the saved weights.")
    add("--checkpointing_steps", type=int, default=500, help="A checkpoint to resume from every so many steps.")
    add("--checkpoints_total_limit", type=int, default=2, help="Checkpoints to keep.")
    add("--resume_from_checkpoint", default=None, help='A checkpoint folder, or "latest".')
    add(
        "--validation_steps",
        type=int,
        default=500,
        help="Validate on held-out normal images with synthetic defects every so many steps.",
    )
    add("--false_alarm_rate", type=float, default=0.05, help="What the calibrated threshold promises.")
    add(
        "--push_to_hub", action="store_true", help="Publish each model as soon as it is trained; see hub_model_prefix."
    )
    add(
        "--hub_model_prefix",
        default=None,
        metavar="ORG/PREFIX",
        help="Publish as ORG/PREFIX-<data set>-<category>.",
    )
    add("--hub_private_repo", action="store_true", help="Create the repos on the Hub private.")
    add(
        "--dataset_name",
        default=None,
        help='What the data set is called on the Hub, such as "MVTec AD"; as its folder without it.',
    )
    add("--report_to", default="tensorboard", help='Trackers for accelerate: "tensorboard", "wandb", "all" or "none".')
    add(
        "--dataloader_num_workers",
        type=int,
        default=0,
        help="Processes that decode images; 0 keeps small sets in memory.",
    )
    return parser


def _check(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    multiple = AnomalySegmenter.size_multiple
    if args.resolution < multiple or args.resolution % multiple:
        parser.error(
            f"--resolution {args.resolution}: the networks halve the image five times, so it must be a "
            f"multiple of {multiple}."
        )
    for name in (
        "max_train_steps",
        "train_batch_size",
        "gradient_accumulation_steps",
        "checkpointing_steps",
        "checkpoints_total_limit",
        "validation_steps",
    ):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: must be at least 1.")
    if args.train_batch_size == 1 and args.resolution == multiple:
        parser.error(
            f"--train_batch_size 1: at --resolution {multiple} the smallest map has one pixel, of which batch norm "
            "cannot take statistics; give 2 or more."
        )
    for name in ("lr_warmup_steps", "max_grad_norm", "seed", "dataloader_num_workers"):
        if not 0 <= getattr(args, name) < math.inf:
            parser.error(f"--{name} {getattr(args, name)}: must be a number that is not negative.")
    for name in ("unet_learning_rate", "segmenter_learning_rate"):
        if not 0 < getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: must lie between 0 and 1.")
    if not 0 <= args.ema_decay < 1:
        parser.error(f"--ema_decay {args.ema_decay}: must lie in [0, 1).")
    for name in ("line_probability", "displaced_probability", "erased_probability"):
        if not 0 <= getattr(args, name) <= 1:
            parser.error(f"--{name} {getattr(args, name)}: must lie in [0, 1].")
    for name in ("holdout_fraction", "false_alarm_rate"):
        if not 0 < getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: must lie between 0 and 1.")
    if args.foreground_dir is not None and args.foreground in ("texture", "whole"):
        parser.error(
            f"--foreground_dir {args.foreground_dir}: contradicts --foreground {args.foreground}; give one of them."
        )
    if args.compile and args.gradient_checkpointing:
        parser.error("--compile: torch.compile cannot compile --gradient_checkpointing; give one of them.")
    if args.category == "all" and args.resume_from_checkpoint not in (None, "latest"):
        parser.error(
            f"--resume_from_checkpoint {args.resume_from_checkpoint}: with --category all every category goes on from "
            "its own latest checkpoint; leave it out."
        )
    if args.push_to_hub and (args.hub_model_prefix or "").count("/") != 1:
        parser.error(
            f"--hub_model_prefix {args.hub_model_prefix}: --push_to_hub needs ORG/PREFIX, ORG being your user name or "
            "an organization of yours."
        )
