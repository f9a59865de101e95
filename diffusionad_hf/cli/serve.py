"""`diffusionad demo` and `diffusionad serve`."""

import argparse
import os
from pathlib import Path
from typing import Any

from ..files import bundled, require
from .options import add_command

_DEMO_MODELS = "space/checkpoints"


def add_commands(commands: Any) -> None:
    parser = add_command(
        commands, "demo", "inspect the bundled photos with the embedded models, without a network", _demo
    )
    parser.add_argument(
        "--output-dir",
        metavar="DIR",
        default="outputs/demo",
        help="write a picture of each result here (default: %(default)s)",
    )

    parser = add_command(
        commands,
        "serve",
        "serve the web demo on this machine",
        _serve,
        epilog="example: diffusionad serve --model runs/screw org/diffusionad-mvtec-nut --port 8000",
    )
    parser.add_argument(
        "--model",
        nargs="+",
        action="extend",
        metavar="M",
        help="models to offer: pipeline folders, folders of such folders, Hub ids or organizations (default: the "
        "embedded models, or what DIFFUSIONAD_MODELS names)",
    )
    parser.add_argument("--host", metavar="H", help="address to listen on; 0.0.0.0 for all (default: 127.0.0.1)")
    parser.add_argument("--port", metavar="P", type=int, help="(default: the first free one from 7860 on)")


def _demo(args: argparse.Namespace) -> int:
    os.environ["HF_HUB_OFFLINE"] = "1"
    from .main import main

    for model in sorted(path.parent for path in bundled(_DEMO_MODELS).glob("*/examples")):
        if model.is_relative_to(Path.cwd()):
            model = model.relative_to(Path.cwd())
        output_dir = str(Path(args.output_dir) / model.name)
        # Exit codes 1 and 3 say that some photos show a defect or are undecided, which they may.
        code = main(["inspect", str(model / "examples"), "--model", str(model), "--output-dir", output_dir])
        if code not in (0, 1, 3):
            return code
    return 0


def _serve(args: argparse.Namespace) -> int:
    # Gradio and the app read these when imported.
    settings = {
        "DIFFUSIONAD_MODELS": args.model and ",".join(args.model),
        "GRADIO_SERVER_NAME": args.host,
        "GRADIO_SERVER_PORT": args.port and str(args.port),
    }
    os.environ.update({name: value for name, value in settings.items() if value})
    require("gradio", "space")
    from ..space.app import main

    main()
    return 0
