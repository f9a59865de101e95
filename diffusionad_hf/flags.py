"""Command lines whose flags are written with dashes."""

import argparse
import re
import sys
from typing import Any


class DashedParser(argparse.ArgumentParser):
    """A parser that also takes its flags with underscores, as they were once spelt: `--data_dir` for `--data-dir`."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        args = sys.argv[1:] if args is None else args
        return super().parse_known_args([re.sub(r"^--\w[^=]*", _dashed, arg) for arg in args], namespace)


def _dashed(flag: re.Match) -> str:
    return flag[0].replace("_", "-")


def as_flags(message: str) -> str:
    """A message of the library, which names options as `data_dir`, as the command line says it: --data-dir."""
    return re.sub(r"`(\w+)`", lambda name: f"--{name[1].replace('_', '-')}", message)
