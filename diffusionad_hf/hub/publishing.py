"""The Hub: publishes trained models, one repo a category, and lists what is there."""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, ModelCard, ModelCardData, ModelInfo, get_token
from huggingface_hub.repocard_data import model_index_to_eval_results
from PIL import Image

from ..files import write_json
from ..images_diffusionad import load_image, to_uint8
from ..loading import TOKEN_HELP, explained
from ..pipeline_diffusionad import DiffusionADPipeline
from ..visualization import overlay, region_threshold, save_image, side_by_side
from .cards import TRAINING_NOTES, build_card, find_data_source, read_evaluation, read_training
from .checks import check_card, check_repo_id

# All that a published repo holds of ours. Anything else in a model folder, such as the trainer's state, is not
# uploaded, and anything else in the repo, such as somebody's notes, is not touched.
PUBLISHED = (
    "README.md",
    "TRAINING.md",
    "evaluation.json",
    "familiarity.json",
    "model_index.json",
    "pipeline_diffusionad.py",
    "images_diffusionad.py",
    "previews/*.png",
    "scheduler/scheduler_config.json",
    "scheduler/*.py",
    "unet/config.json",
    "unet/*.py",
    "unet/*.safetensors",
    "unet/*.safetensors.index*.json",
    "segmenter/config.json",
    "segmenter/*.py",
    "segmenter/*.safetensors",
    "segmenter/*.safetensors.index*.json",
)
# Taken from the model's folder as they are: its maker's notes, and what the web demo knows normal parts by.
_KEPT = (TRAINING_NOTES, "familiarity.json")


# ---- publishing ----


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
    Publishes a model folder with its card: float32 and fp16 weights, configs, modules, results, pictures; no more.

    Publishing the same again makes no commit. Files of an earlier version that this one does not have are deleted.

    Args:
        model_dir: Folder that `save_pretrained` or the trainer wrote.
        repo_id: `"ORG/NAME"`; the repo is created where it does not exist.
        private: Create it private.
        revision: Branch to publish to, created where it does not exist; `"main"` when `None`.
        create_pr: Open a pull request instead; the repo must exist.
        collection: Title of the collection of the same owner to add the repo to; created where it does not exist.
        dataset: What it was trained on, such as `"MVTec AD"`.
        category: Which product of it; as recorded by the trainer when `None`.
        license: The weights' licence, as the Hub writes it; that of a known dataset when `None`.
        evaluation: Result of `diffusionad evaluate`; the folder's `evaluation.json`, if it has one, when `None`.
        examples: Images to show on the card with what the model makes of them; the folder's `previews/*.png` when
            empty.
        token: The Hub's; the one you are logged in with when `None`.

    Returns:
        `str`: The URL of the repo, branch or pull request.

    Raises:
        OSError: If the folder is no model, or the Hub cannot be reached or refuses; the message names the way out.
        ValueError: If an argument, the evaluation or the card is refused.
    """
    model_dir = Path(model_dir)
    check_repo_id(repo_id)
    if create_pr and revision not in (None, "main"):
        raise ValueError("--create-pr: pull requests go to the main branch; leave out --revision.")
    token = token or get_token()
    if not token:
        raise OSError(f"publishing needs a Hugging Face token: {TOKEN_HELP}.")
    if not model_dir.is_dir():
        raise FileNotFoundError(f"{model_dir}: no such folder; give one that the trainer or save_pretrained wrote.")
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        staging = Path(folder)
        card = _stage(model_dir, staging, repo_id, dataset, category, license, evaluation, examples)
        with explained(repo_id):
            check_card(card)
            if not create_pr:
                _make_repo(api, repo_id, private, revision)
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
                group = api.create_collection(
                    collection, namespace=repo_id.split("/")[0], private=private, exists_ok=True
                )
                api.add_collection_item(group.slug, item_id=repo_id, item_type="model", exists_ok=True)
    if create_pr and commit.pr_url:
        return commit.pr_url
    return f"{api.endpoint}/{repo_id}" + (f"/tree/{revision}" if revision not in (None, "main") else "")


def _stage(
    model_dir: Path,
    staging: Path,
    repo_id: str,
    dataset: str | None,
    category: str | None,
    license: str | None,
    evaluation: str | Path | None,
    examples: Sequence[str | Path],
) -> ModelCard:
    """Writes all that is to be published into an empty folder; returns the card."""
    pipe = DiffusionADPipeline.from_pretrained(model_dir, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    if evaluation is not None and not Path(evaluation).is_file():
        raise FileNotFoundError(f"{evaluation}: no such file; `diffusionad evaluate --json FILE` writes one.")
    evaluation_file = Path(evaluation) if evaluation is not None else model_dir / "evaluation.json"
    results = None
    if evaluation_file.is_file():
        results = read_evaluation(evaluation_file, pipe)
        # It names the folder that the model lay in on the evaluator's machine.
        results.setdefault("provenance", {})["model"] = repo_id
        write_json(staging / "evaluation.json", results)
    training = read_training(model_dir / "training_arguments.json")
    previews = _stage_previews(pipe, model_dir, staging, examples)
    for name in _KEPT:
        if (model_dir / name).is_file():
            shutil.copyfile(model_dir / name, staging / name)
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
    return card


def _save_weights(pipe: DiffusionADPipeline, model_dir: Path, staging: Path) -> None:
    """Saves the pipeline with its weights as they are and in half precision."""
    pipe.save_pretrained(staging)
    half = DiffusionADPipeline.from_pretrained(staging, dtype=torch.float16)
    for name in ("unet", "segmenter"):
        # The running variances of a batch norm are the values that may exceed what float16 holds.
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
            normal = Image.fromarray(to_uint8(output.reconstruction[i]))
            heat = overlay(photo, output.anomaly_map[i], threshold=region_threshold(pipe.threshold))
            sheets[f"example_{i + 1}.png"] = side_by_side([photo, normal, heat])
    else:
        # Decoded and written anew, because a picture's metadata may tell where and by whom it was made.
        sheets = {path.name: _picture(path) for path in sorted((model_dir / "previews").glob("*.png"))}
    for name, sheet in sheets.items():
        save_image(sheet, staging / "previews" / name)
    return list(sheets)


def _picture(path: str | Path) -> Image.Image:
    """An image file as 8-bit RGB pixels and nothing else."""
    return Image.fromarray(to_uint8(load_image(path).permute(1, 2, 0).contiguous().numpy()))


def _make_repo(api: HfApi, repo_id: str, private: bool, revision: str | None) -> None:
    """Creates repo and branch where they do not exist."""
    api.create_repo(repo_id, private=private or None, exist_ok=True)
    if private and not api.model_info(repo_id).private:
        raise ValueError(
            f"--private: {repo_id} exists and is public; make it private in its settings, or choose another name."
        )
    if revision not in (None, "main"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)


# ---- listing ----


def list_models(org: str | None = None, *, token: str | None = None) -> list[dict[str, Any]]:
    """
    The published models, from one listing of the Hub.

    Args:
        org: Only those of this organization or user.
        token: To see private ones; the one you are logged in with when `None`.

    Returns:
        `list[dict]`: By id: `id`, `category` and `image_auroc` (`None` where the card does not say), `size` in bytes
        of all that the repo stores, `last_modified` (ISO 8601), `private`.

    Raises:
        OSError: If the Hub cannot be reached or refuses.
    """
    with explained(org or "the list of models"):
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
        # Somebody else's card, with metadata of their own making.
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
