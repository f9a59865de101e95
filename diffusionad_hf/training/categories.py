"""From one category to all of a dataset: trained one after another, each published as soon as it is done."""

import json
import logging
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..data import list_categories
from ..hub.cards import find_data_source
from ..hub.publishing import publish_model
from .arguments import TrainingConfig
from .checkpoints import check_same_training
from .outcome import ARGUMENTS_FILE
from .processes import together

logger = logging.getLogger("training")

ALL = "all"


def train_all(args: TrainingConfig, train: Callable[[TrainingConfig], int]) -> int:
    """Trains every category in a folder of its own; finished ones are skipped, failed ones do not stop the others.

    Returns 0; 2 if a category failed; or the code of a `train` that was interrupted.
    """
    categories = together(lambda: list_categories(args.data_dir))
    folders = {name: Path(args.output_dir) / _slug(name) for name in categories}
    if len(set(folders.values())) < len(folders):
        raise ValueError(f"`category` {ALL}: the names {', '.join(categories)} are not distinct as names of folders.")
    failed = {}
    for number, (name, folder) in enumerate(folders.items(), start=1):
        logger.info(f"Category {number} of {len(folders)}: {name}")
        own: dict[str, Any] = {"category": name, "output_dir": str(folder), "resume_from_checkpoint": "latest"}
        if args.foreground_dir is not None:
            own["foreground_dir"] = str(Path(args.foreground_dir) / name)
        try:
            code = train_and_publish(replace(args, **own), train)
        except (OSError, ValueError, ImportError) as error:
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
    """Trains one category, unless it is finished and to be resumed, and publishes it if asked to."""
    if args.resume_from_checkpoint == "latest" and _is_finished(args):
        logger.info(f"{args.output_dir} was finished before.")
        code = 0
    else:
        code = train(args)
    if code == 0 and args.push_to_hub:
        together(lambda: _publish(args), main_only=True)
    return code


def check_publishing(args: TrainingConfig) -> None:
    """Finds out before a long training what would keep its result from being published."""
    if not get_token():
        raise OSError("`push_to_hub`: needs a Hugging Face token; log in with `hf auth login`, or set HF_TOKEN.")
    repo_id = _repo_id(args)
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"`hub_model_prefix` {args.hub_model_prefix}: {' '.join(str(error).split())}") from error


def _is_finished(args: TrainingConfig) -> bool:
    """Whether the output folder holds the outcome of this training; raises `ValueError` if of another one."""
    file = Path(args.output_dir) / ARGUMENTS_FILE
    if not file.is_file():
        return False
    try:
        recorded = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: damaged ({error}); delete it, and the training is finished again.") from error
    now = vars(args).copy()
    for name in ("mixed_precision", "prediction_type"):
        if now[name] is None:
            # What accelerate is configured for and what the networks are made for is known only once it runs.
            del now[name]
    check_same_training(recorded, now, f"`output_dir` {args.output_dir}")
    return recorded["max_train_steps"] == args.max_train_steps


def _publish(args: TrainingConfig) -> None:
    repo_id = _repo_id(args)
    try:
        url = publish_model(
            args.output_dir,
            repo_id,
            private=args.hub_private_repo,
            dataset=_dataset_name(args),
            category=args.category,
        )
    except (OSError, ValueError) as error:
        # What went wrong with the Hub says nothing about the training.
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
    """A category's name as one of a folder or a repo, wherever on the Hub it comes from."""
    slug = re.sub(r"[^A-Za-z0-9_]+", "-", name).strip("-")
    if not slug:
        raise ValueError(f'`category` {ALL}: "{name}" is no name for a folder; train it by itself.')
    return slug
