"""`diffusionad publish`, `diffusionad list` and `diffusionad deploy-space`."""

import argparse
import json
from typing import Any

from .options import add_command, format_table

_COLUMNS = ("category", "image AUROC", "size", "date", "model")


def add_commands(commands: Any) -> None:
    parser = add_command(
        commands,
        "publish",
        "publish a trained model on the Hub",
        _publish,
        description="Publishes a model folder with its card and prints the URL. The same again makes no commit.",
    )
    parser.add_argument("model_dir", metavar="MODEL_DIR", help="folder that the trainer wrote")
    parser.add_argument("--repo-id", required=True, metavar="ORG/NAME", help="created if it does not exist")
    parser.add_argument("--private", action="store_true", help="create it private")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to publish to; created if it does not exist")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead; the repo must exist")
    parser.add_argument("--collection", metavar="TITLE", help="add the repo to this collection of the same owner")
    parser.add_argument("--dataset", metavar="NAME", help='dataset it was trained on, such as "MVTec AD"')
    parser.add_argument("--category", help="category of the dataset; by default as the trainer recorded it")
    parser.add_argument("--license", help="of the weights, such as mit; by default that of a known dataset")
    parser.add_argument("--evaluation", help="result of `evaluate`; by default MODEL_DIR/evaluation.json")
    parser.add_argument("--examples", nargs="+", default=[], metavar="IMAGE", help="images to show with their results")

    parser = add_command(commands, "list", "list the models on the Hub", _list)
    parser.add_argument("--org", help="only models of this organization or user")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")

    parser = add_command(
        commands,
        "deploy-space",
        "serve the web demo on the Hub",
        _deploy_space,
        description="Creates or updates a Gradio Space with the inspection page and prints its URL.",
        epilog="Private models need a token: add it to the Space's settings as the secret HF_TOKEN.",
    )
    parser.add_argument("--repo-id", required=True, metavar="ORG/SPACE", help="created if it does not exist")
    parser.add_argument(
        "--models",
        nargs="+",
        default=[],
        metavar="ID",
        help="Hub ids, or organizations for all of their models; by default the demo model",
    )
    parser.add_argument("--private", action="store_true", help="create it private")
    parser.add_argument("--app-dir", metavar="DIR", help="the app's folder; by default that of this package")


def _options(args: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(args).items() if name != "run"}


def _deploy_space(args: argparse.Namespace) -> int:
    from ..hub.spaces import deploy_space

    print(deploy_space(**_options(args)))
    return 0


def _publish(args: argparse.Namespace) -> int:
    from ..hub.publishing import publish_model

    print(publish_model(**_options(args)))
    return 0


def _list(args: argparse.Namespace) -> int:
    from ..hub.publishing import list_models

    models = list_models(args.org)
    if args.json:
        print(json.dumps(models, indent=2))
    elif not models:
        print(f"No DiffusionAD models{f' of {args.org}' if args.org else ''} on the Hub that you may see.")
    else:
        print(format_table([_COLUMNS, *map(_cells, models)]))
    return 0


def _cells(model: dict[str, Any]) -> list[str]:
    auroc, size = model["image_auroc"], model["size"]
    return [
        str(model["category"] or "-"),
        f"{auroc:.3f}" if isinstance(auroc, float) else "-",
        f"{size / 1e6:.0f} MB" if size else "-",
        (model["last_modified"] or "-")[:10],
        model["id"] + (" (private)" if model["private"] else ""),
    ]
