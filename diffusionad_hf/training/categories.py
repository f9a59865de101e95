"""Trains all categories of a dataset one after another, and publishes each as soon as it is trained."""

import json
import logging
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import get_token

from ..data import list_categories
from ..hub.cards import find_data_source
from ..hub.checks import check_hub_id
from ..hub.publishing import publish_model
from .arguments import TrainingConfig
from .checkpoints import check_same_training
from .outcome import ARGUMENTS_FILE, next_steps
from .processes import EXPECTED, together

logger = logging.getLogger("training")

ALL = "all"


def train_all(args: TrainingConfig, train: Callable[[TrainingConfig], int]) -> int:
    """Trains every category into its own folder: skips finished ones, and goes on if one fails.

    Returns 0; 2 if a category failed; or the exit code of an interrupted training.
    """
    categories = together(lambda: list_categories(args.data_dir))
    folders = {name: Path(args.output_dir) / _slug(name) for name in categories}
    if len(set(folders.values())) < len(folders):
        raise ValueError(f"`category` {ALL}: the names {', '.join(categories)} are not distinct as folder names.")
    failed = {}
    for number, (name, folder) in enumerate(folders.items(), start=1):
        logger.info(f"Category {number} of {len(folders)}: {name}")
        own: dict[str, Any] = {"category": name, "output_dir": str(folder), "resume_from_checkpoint": "latest"}
        if args.foreground_dir is not None:
            own["foreground_dir"] = str(Path(args.foreground_dir) / name)
        try:
            code = train_and_publish(replace(args, **own), train)
        except EXPECTED as error:
            logger.error(f"{name} failed: {error}")
            failed[name] = error
            continue
        if code != 0:
            return code
    if failed:
        reasons = "".join(f"\n  {name}: {error}" for name, error in failed.items())
        logger.error(f"{len(failed)} of {len(folders)} categories failed; the same command tries them again:{reasons}")
        return 2
    logger.info(f"All {len(folders)} categories are in {args.output_dir}.")
    return 0


def train_and_publish(args: TrainingConfig, train: Callable[[TrainingConfig], int]) -> int:
    """Trains one category, unless it is resumed and finished already, and publishes it if asked to."""
    finished = args.resume_from_checkpoint == "latest" and _is_finished(args)
    if finished:
        logger.info(f"{args.output_dir} was finished before.\n{next_steps(args)}")
    code = 0 if finished else train(args)
    if code == 0 and args.push_to_hub:
        together(lambda: _publish(args), main_only=True)
    return code


def check_publishing(args: TrainingConfig) -> None:
    """Checks before a long training whether its result can be published."""
    if not get_token():
        raise OSError("`push_to_hub`: needs a Hugging Face token; log in with `hf auth login`, or set HF_TOKEN.")
    check_hub_id(_repo_id(args), "hub_model_prefix")


def _is_finished(args: TrainingConfig) -> bool:
    """Whether the output folder holds the result of this training; raises `ValueError` if of a different one."""
    file = Path(args.output_dir) / ARGUMENTS_FILE
    if not file.is_file():
        return False
    try:
        recorded = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: damaged ({error}); delete it to finish the training again.") from error
    # Left out if not given: the defaults of these two are only known once a training runs.
    late = ("mixed_precision", "prediction_type")
    now = {name: value for name, value in vars(args).items() if value is not None or name not in late}
    check_same_training(recorded, now, f"`output_dir` {args.output_dir}")
    return recorded["max_train_steps"] == args.max_train_steps


def _publish(args: TrainingConfig) -> None:
    repo_id = _repo_id(args)
    try:
        dataset = _dataset_name(args)
        url = publish_model(
            args.output_dir, repo_id, private=args.hub_private_repo, dataset=dataset, category=args.category
        )
    except (OSError, ValueError) as error:
        raise OSError(
            f"{error} The trained model is safe in {args.output_dir}; publish it with: diffusionad publish "
            f"{args.output_dir} --repo-id {repo_id}"
        ) from error
    logger.info(f"Published {url}")


def _dataset_name(args: TrainingConfig) -> str:
    return args.dataset_name or Path(args.data_dir).resolve().name


def _repo_id(args: TrainingConfig) -> str:
    parts = [args.hub_model_prefix, find_data_source(_dataset_name(args)).slug]
    if args.category not in (None, ALL):
        parts.append(_slug(args.category).lower())
    return "-".join(parts)


def _slug(name: str) -> str:
    """A category's name as the name of a folder or a repo."""
    slug = re.sub(r"[^A-Za-z0-9_]+", "-", name).strip("-")
    if not slug:
        raise ValueError(f'`category` {ALL}: "{name}" cannot be a folder name; train it by itself.')
    return slug
