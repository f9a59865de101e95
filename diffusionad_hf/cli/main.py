"""The command line: `diffusionad COMMAND ...`."""

import argparse
import sys
from collections.abc import Sequence

from ..files import escape_output, one_line
from ..flags import DashedParser, as_flags
from ..version import __version__
from . import evaluate, export, hub, inspect, serve, train

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code: 0 done, 2 something was wrong with the input, 130 interrupted."""
    escape_output()
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["train"]:
        # The trainer parses its own options.
        args = _parser().parse_args(["train"])
        args.arguments = argv[1:]
    else:
        args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print("diffusionad: interrupted.", file=sys.stderr)
        return INTERRUPTED
    except (OSError, ValueError, ImportError, MemoryError) as error:
        # One line for what the user can fix; anything else is a bug and keeps its traceback.
        print(f"diffusionad: error: {as_flags(one_line(error))}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = DashedParser(
        prog="diffusionad",
        description="Finds defects on product images with norm-guided one-step denoising diffusion.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in (serve, inspect, evaluate, train, export, hub):
        module.add_commands(commands)
    return parser
