"""`diffusionad train`."""

import argparse
from typing import Any

from ..files import require
from ..training.arguments import check_paths, parse_arguments
from .options import add_command


def add_commands(commands: Any) -> None:
    add_command(commands, "train", "train a model on normal images of one product", _train)


def _train(args: argparse.Namespace) -> int:
    prog = "diffusionad train"
    # Says what is wrong with them, and helps, before torch is there.
    check_paths(parse_arguments(args.arguments, prog))
    return require("diffusionad_hf.training.loop", "train").main(args.arguments, prog=prog)
