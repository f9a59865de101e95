"""Publishes trained models on the Hub, one repo per category, and lists what is there."""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, ModelCardData, ModelInfo, constants
from huggingface_hub.repocard_data import model_index_to_eval_results
from huggingface_hub.utils import get_session
from PIL import Image

from ..figure import figure_of
from ..files import write_json
from ..images_diffusionad import load_image, to_uint8
from ..loading import check_model_folder, explained
from ..pipeline_diffusionad import DiffusionADPipeline
from ..visualization import save_image
from .cards import TRAINING_NOTES, build_card, find_data_source, read_evaluation, read_training
from .checks import check_card, check_own_file, check_repo_id, create_repo, hub_client

EXAMPLES = "examples"
"""A model's folder of photos to try it on: `good*` show normal parts, all others the defect they are named after."""

# The files of a published repo that are ours. Anything else in a model folder, such as the trainer's checkpoints, is
# not uploaded; anything else in the repo, such as its owner's notes, is not touched.
PUBLISHED = (
    "README.md",
    "TRAINING.md",
    "evaluation.json",
    "model_index.json",
    "pipeline_diffusionad.py",
    "images_diffusionad.py",
    "familiarity_diffusionad.py",
    "verdicts_diffusionad.py",
    "previews/*.png",
    f"{EXAMPLES}/*.png",
    f"{EXAMPLES}/*.jpg",
    f"{EXAMPLES}/README.md",
    "scheduler/scheduler_config.json",
    "scheduler/*.py",
    *(
        f"{network}/{pattern}"
        for network in ("unet", "segmenter")
        for pattern in ("config.json", "*.py", "*.safetensors", "*.safetensors.index*.json")
    ),
)


def publish_model(
    model_dir: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    collection: str | None = None,
    dataset: str | None = None,
    category: str | None = None,
    license: str | None = None,
    evaluation: str | Path | None = None,
    examples: Sequence[str | Path] = (),
    token: str | None = None,
) -> str:
    """
    Publishes a model folder: float32 and fp16 weights, configs, modules, results, pictures and a card.

    Publishing the same model again makes no commit. Files that only an earlier version had are deleted.

    Args:
        model_dir: Folder that `save_pretrained` or the trainer wrote.
        repo_id: `"ORG/NAME"`; created if it does not exist.
        private: Create a private repo.
        revision: Branch to publish to, created if it does not exist; `"main"` by default.
        create_pr: Open a pull request instead; the repo must exist.
        collection: Title of a collection of the same owner to add the repo to, created if it does not exist.
        dataset: What the model was trained on, such as `"MVTec AD"`.
        category: Category of the dataset; by default as the trainer recorded it.
        license: The weights' licence, as the Hub spells it; by default that of a known dataset.
        evaluation: Result of `diffusionad evaluate`; by default the folder's `evaluation.json`, if any.
        examples: Images to show on the card with their results; by default the folder's `previews/*.png`.
        token: By default the token of your login.

    Returns:
        `str`: The URL of the repo, branch or pull request.

    Raises:
        OSError: If the folder is no model, or the Hub cannot be reached or refuses; the message says what to do.
        ValueError: If an argument, the evaluation or the card is refused.
    """
    model_dir = Path(model_dir)
    check_repo_id(repo_id)
    if create_pr and revision not in (None, "main"):
        raise ValueError("`create_pr`: pull requests go to the main branch; leave out `revision`.")
    if not model_dir.is_dir():
        raise FileNotFoundError(f"{model_dir}: no such folder; give one that the trainer or save_pretrained wrote.")
    check_model_folder(model_dir)
    if evaluation is not None and not Path(evaluation).is_file():
        raise FileNotFoundError(f"{evaluation}: no such file; `diffusionad evaluate --json FILE` writes one.")
    if missing := [example for example in examples if not Path(example).is_file()]:
        raise FileNotFoundError(f"{missing[0]}: no such image file.")
    api = hub_client(token)
    for pattern in (*PUBLISHED, "*.json"):
        for file in model_dir.glob(pattern):
            check_own_file(file, model_dir)
    with tempfile.TemporaryDirectory() as folder:
        staging = Path(folder)
        pipe = DiffusionADPipeline.from_pretrained(model_dir, dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)
        results = _stage_evaluation(pipe, evaluation, model_dir, staging, repo_id)
        training = read_training(model_dir / "training_arguments.json")
        previews = _stage_previews(pipe, model_dir, staging, examples)
        _stage_examples(model_dir, staging)
        if (model_dir / TRAINING_NOTES).is_file():
            shutil.copyfile(model_dir / TRAINING_NOTES, staging / TRAINING_NOTES)
        _save_weights(pipe, model_dir, staging)
        card = build_card(
            pipe,
            repo_id,
            evaluation=results,
            training=training,
            data=find_data_source(dataset) if dataset else None,
            category=category or training.get("category"),
            license=license,
            previews=previews,
            folder=staging,
        )
        card.save(staging / "README.md")
        with explained(repo_id):
            check_card(card)
            if not create_pr:
                create_repo(api, repo_id, private)
                if revision not in (None, "main"):
                    api.create_branch(repo_id, branch=revision, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=staging,
                revision=revision,
                create_pr=create_pr,
                allow_patterns=list(PUBLISHED),
                delete_patterns=list(PUBLISHED),
                commit_message="Publish with diffusionad_hf",
            )
            if collection:
                owner = repo_id.split("/")[0]
                group = api.create_collection(collection, namespace=owner, private=private, exists_ok=True)
                api.add_collection_item(group.slug, item_id=repo_id, item_type="model", exists_ok=True)
    if create_pr and commit.pr_url:
        return commit.pr_url
    return f"{api.endpoint}/{repo_id}" + (f"/tree/{revision}" if revision not in (None, "main") else "")


def _stage_evaluation(
    pipe: DiffusionADPipeline, evaluation: str | Path | None, model_dir: Path, staging: Path, repo_id: str
) -> dict[str, Any] | None:
    """Writes the evaluation and returns it; `None` if the model was not evaluated."""
    file = Path(evaluation) if evaluation is not None else model_dir / "evaluation.json"
    if not file.is_file():
        return None
    results = read_evaluation(file, pipe)
    # The file names the model's folder on the machine that evaluated it.
    results.setdefault("provenance", {})["model"] = repo_id
    write_json(staging / "evaluation.json", results)
    return results


def _save_weights(pipe: DiffusionADPipeline, model_dir: Path, staging: Path) -> None:
    """Saves the pipeline with its weights as they are and in half precision."""
    pipe.save_pretrained(staging)
    half = DiffusionADPipeline.from_pretrained(staging, dtype=torch.float16)
    for name in ("unet", "segmenter"):
        # In practice only the running variances of batch norms can exceed the range of float16.
        if not all(torch.isfinite(value).all() for value in getattr(half, name).state_dict().values()):
            raise ValueError(f"{model_dir}: the {name} holds weights beyond float16 (65,504); train it again.")
    half.save_pretrained(staging, variant="fp16")


def _stage_previews(
    pipe: DiffusionADPipeline, model_dir: Path, staging: Path, examples: Sequence[str | Path]
) -> list[str]:
    """Writes the card's pictures; returns their names."""
    if examples:
        photos = [_picture(path) for path in examples]
        output = pipe(photos)
        sheets = {}
        for i, photo in enumerate(photos):
            sheets[f"example_{i + 1}.png"] = figure_of(photo, output, i, pipe.threshold)
    else:
        # Re-encoded without metadata, which may tell who made a picture, and where.
        sheets = {path.name: _picture(path) for path in sorted((model_dir / "previews").glob("*.png"))}
    for name, sheet in sheets.items():
        save_image(sheet, staging / "previews" / name)
    return list(sheets)


def _stage_examples(model_dir: Path, staging: Path) -> None:
    """Copies the photos that the web demo offers with the model, without metadata, and their attribution."""
    folder = model_dir / EXAMPLES
    for path in sorted((*folder.glob("*.png"), *folder.glob("*.jpg"))):
        save_image(_picture(path), staging / EXAMPLES / f"{path.stem}.png")
    if (folder / "README.md").is_file():
        shutil.copyfile(folder / "README.md", staging / EXAMPLES / "README.md")


def _picture(path: str | Path) -> Image.Image:
    """An image file as 8-bit RGB pixels and nothing else."""
    return Image.fromarray(to_uint8(load_image(path).permute(1, 2, 0).contiguous().numpy()))


def list_models(org: str | None = None, *, token: str | None = None) -> list[dict[str, Any]]:
    """
    Lists the published models, sorted by id.

    Args:
        org: List only models of this organization or user.
        token: To see private models; by default the token of your login.

    Returns:
        `list[dict]`: Per model `id`, `category` and `image_auroc` (`None` if the card has none), `size` of the repo in
        bytes, `last_modified` (ISO 8601) and `private`.

    Raises:
        OSError: If the Hub cannot be reached or refuses.
    """
    with explained(org or "the list of models"):
        # Fails at once where the client would try for 20 s.
        get_session().get(f"{constants.ENDPOINT}/api/models", params={"limit": 1}, timeout=10)
        found = list(
            HfApi(token=token).list_models(
                filter="diffusionad",
                author=org,
                expand=["cardData", "lastModified", "model-index", "private", "usedStorage"],
            )
        )
    return sorted((_described(info) for info in found), key=lambda row: row["id"])


def _described(info: ModelInfo) -> dict[str, Any]:
    card = info.card_data or ModelCardData()
    try:
        index: Any = info.model_index
        results = model_index_to_eval_results(index)[1] if index else card.eval_results or []
    except (KeyError, TypeError, IndexError):
        # A card of someone else's, with metadata that is not as we write it.
        results = []
    auroc = next((r.metric_value for r in results if r.metric_type == "image_auroc"), None)
    return {
        "id": info.id,
        "category": card.get("category"),
        "image_auroc": auroc,
        "size": info.used_storage,
        "last_modified": info.last_modified and info.last_modified.isoformat(),
        "private": bool(info.private),
    }
