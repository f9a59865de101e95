"""`diffusionad train`."""

import argparse
from typing import Any

from ..files import require
from .options import add_command


def add_commands(commands: Any) -> None:
    add_command(commands, "train", "train a model on normal images of one product", _train)


def _train(args: argparse.Namespace) -> int:
    return require("diffusionad_hf.training.loop", "train").main(args.arguments, prog="diffusionad train")
