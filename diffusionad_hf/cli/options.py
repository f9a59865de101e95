"""Shared by the commands: options, loading of models and images, checks, tables."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

# Torch and diffusers take seconds to import, so commands import whatever needs them only when they run.


def add_command(
    commands: Any, name: str, help: str, run: Callable[[argparse.Namespace], int], **kwargs: Any
) -> argparse.ArgumentParser:
    """Adds a command; `run` returns its exit code, and `kwargs` are for `ArgumentParser`."""
    kwargs = {"description": help, "formatter_class": argparse.RawDescriptionHelpFormatter, **kwargs}
    parser = commands.add_parser(name, help=help, **kwargs)
    parser.set_defaults(run=run)
    return parser


def add_model_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="M", help="a pipeline folder, or a Hub id such as org/name")
    parser.add_argument("--revision", metavar="R", help="branch, tag or commit of a Hub id")


def add_pipeline_options(parser: argparse.ArgumentParser) -> None:
    add_model_option(parser)
    parser.add_argument("--variant", metavar="V", help='weights of another type if the model has them, such as "fp16"')
    parser.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1, mps ... (default: the GPU, if there is one)")
    parser.add_argument(
        "--batch-size",
        type=positive_integer,
        metavar="N",
        help="images per pass (default: 16; on a CPU as many as fill 256 px squared, so 1 of that size)",
    )
    parser.add_argument(
        "--value-range",
        type=positive_integer,
        metavar="N",
        help="the value that is white in images of more than 8 bits, such as 4095 for a camera of 12 bits (default: "
        "as the model was trained, or that of the file's type)",
    )


def positive_integer(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1")
    return int(text)


def rate(text: str) -> float:
    if not 0 < float(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must lie between 0 and 1, such as 0.05")
    return float(text)


def load_pipeline(args: argparse.Namespace, device: str | None = None, **kwargs: Any) -> Any:
    """Loads `--model` onto a device, by default a GPU if there is one; `kwargs` override its configuration."""
    import torch
    from diffusers.utils import logging

    from ..loading import load_model

    logging.disable_progress_bar()
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device}: not available on this machine; leave it out, or give cpu.") from error
    for name in ("revision", "variant", "value_range"):
        if getattr(args, name, None) is not None:
            kwargs[name] = getattr(args, name)
    pipe = load_model(args.model, device=device, **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def check_writable(*folders: Path | None) -> None:
    """Creates folders and checks before the work that they are writable."""
    for folder in filter(None, folders):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f".diffusionad-{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise OSError(f"{folder}: cannot write there ({error.strerror}); choose another folder.") from error


def read_normal_images(inputs: Sequence[str], pipe: Any) -> tuple[list, list[str]]:
    """Reads new images at the model's resolution; also returns why others were left out."""
    from ..familiarity_diffusionad import pixel_digest
    from ..inspection.inspection import find_images, read_small
    from ..inspection.records import Failure

    files, failures = find_images(inputs)
    images: list = []
    for image in tqdm(read_small(files, pipe), total=len(files), desc="reading", unit="image", file=sys.stderr):
        (failures if isinstance(image, Failure) else images).append(image)
    reasons = [failure.error for failure in failures]
    if not images:
        raise ValueError("none of the images could be read: " + " ".join(reasons))
    new = [image for image in images if not pipe.trained_on(image)]
    if not new:
        raise ValueError("the model was trained on all of these images; calibrate it on others.")
    if len(new) < len(images):
        reasons.append(f"{len(images) - len(new)} image(s) that the model was trained on.")
    # The promise holds for as many images as there are, and a copy is none.
    distinct = list({pixel_digest(image): image for image in new}.values())
    if len(distinct) < len(new):
        reasons.append(f"{len(new) - len(distinct)} image(s) that are copies of others.")
    return distinct, reasons


def report_left_out(reasons: Sequence[str]) -> int:
    """Prints why images were left out; returns the exit code."""
    for reason in reasons:
        print(f"  left out: {reason}", file=sys.stderr)
    return 2 if reasons else 0


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Aligns cells in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
