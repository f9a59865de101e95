"""`diffusionad train`."""

import argparse
from typing import Any

from .options import add_command


def add_commands(commands: Any) -> None:
    add_command(commands, "train", "train a model on normal images of one product", _train)


def _train(args: argparse.Namespace) -> int:
    try:
        from ..training.loop import main
    except ModuleNotFoundError as error:
        raise ImportError(f'{error.name} is not installed: pip install "diffusionad-hf[train]"') from error
    return main(args.arguments)
