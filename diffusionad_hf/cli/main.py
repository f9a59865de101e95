"""The command line: `diffusionad COMMAND ...`."""

import argparse
import re
import sys
from collections.abc import Sequence

from ..files import one_line
from ..version import __version__
from .evaluate import add_convert_command, add_evaluate_command
from .export import add_export_command
from .hub import add_deploy_space_command, add_list_command, add_publish_command
from .inspect import add_calibrate_command, add_inspect_command
from .serve import add_demo_command, add_serve_command
from .train import add_train_command

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code: 0 done, 2 something was wrong with the input, 130 interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["train"]:
        # It has a parser of its own.
        args = _parser().parse_args(["train"])
        args.arguments = argv[1:]
    else:
        args = _parser().parse_args([_dashes(argument) for argument in argv])
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print("diffusionad: interrupted.", file=sys.stderr)
        return INTERRUPTED
    except (OSError, ValueError, ImportError, MemoryError) as error:
        # What the user can mend is said in one line; anything else is a bug of ours and keeps its traceback.
        print(f"diffusionad: error: {one_line(error)}", file=sys.stderr)
        return 2


def _dashes(argument: str) -> str:
    """Flags have one style, --data-dir; --data_dir is accepted."""
    return re.sub(r"^--[a-z][a-z0-9_-]*", lambda flag: flag[0].replace("_", "-"), argument)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="diffusionad",
        description="Finds defects on product images with norm-guided one-step denoising diffusion.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add_command in (
        add_demo_command,
        add_inspect_command,
        add_calibrate_command,
        add_evaluate_command,
        add_train_command,
        add_convert_command,
        add_export_command,
        add_serve_command,
        add_publish_command,
        add_list_command,
        add_deploy_space_command,
    ):
        add_command(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
