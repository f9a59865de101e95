"""Deploys the web demo as a Space on the Hub, with the package's source beside the app."""

import re
import shutil
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from huggingface_hub import HfApi, SpaceCard

from ..files import bundled
from ..loading import explained
from .checks import check_card, check_hub_id, check_own_file, check_repo_id, create_repo, hub_client
from .publishing import PUBLISHED

MODELS_VARIABLE = "DIFFUSIONAD_MODELS"
"""The environment variable that tells the app which models to offer."""

_PACKAGE = Path(__file__).resolve().parents[1]
_THUMBNAIL = "thumbnail.png"
_APP = ("*.py", "README.md", _THUMBNAIL)
_PACKAGE_FILES = ("**/*.py", "**/*.pyi", "py.typed", "**/*.md", "**/*.css", "**/*.json", "*.safetensors", "*.txt")
# The embedded models; left out if other models are offered.
_DEMO = tuple(f"checkpoints/*/{pattern}" for pattern in PUBLISHED)
# Folders of the Space that belong to the deployment: files there that it no longer has are deleted.
_OWNED = ("diffusionad_hf/*", "checkpoints/*", "examples/*")


def deploy_space(
    repo_id: str,
    *,
    models: Sequence[str] = (),
    private: bool = False,
    app_dir: str | Path | None = None,
    token: str | None = None,
) -> str:
    """
    Creates or updates a Gradio Space that serves the inspection page. Deploying the same again makes no commit.

    The package is not on a package index, so its source is uploaded too, and its dependencies become the Space's.

    Args:
        repo_id: `"ORG/SPACE"`; created if it does not exist.
        models: Hub ids and organizations to offer; by default the demo model, which is then uploaded too.
        private: Create a private Space.
        app_dir: The app's folder; by default that of this package.
        token: By default the token of your login.

    Returns:
        `str`: The URL of the Space.

    Raises:
        OSError: If the app's files are missing, or the Hub cannot be reached or refuses; the message says what to do.
        ValueError: If an argument is refused.
    """
    check_repo_id(repo_id)
    for model in models:
        check_hub_id(model, "models")
    app = Path(app_dir) if app_dir is not None else bundled("space")
    if not (app / "app.py").is_file():
        raise FileNotFoundError(f"{app / 'app.py'}: no such file; leave out `app_dir` for the app of this package.")
    api = hub_client(token)
    with tempfile.TemporaryDirectory() as folder:
        staging = Path(folder)
        card = _stage(app, staging, models, f"{api.endpoint}/spaces/{repo_id}")
        with explained(repo_id):
            check_card(card)
            create_repo(api, repo_id, private, repo_type="space", space_sdk="gradio")
            # Before the upload, which starts the app.
            _set_models(api, repo_id, models)
            api.upload_folder(
                repo_id=repo_id,
                repo_type="space",
                folder_path=staging,
                delete_patterns=list(_OWNED),
                commit_message="Deploy with diffusionad_hf",
            )
    return f"{api.endpoint}/spaces/{repo_id}"


def _stage(app: Path, staging: Path, models: Sequence[str], url: str) -> SpaceCard:
    """Copies the Space's files into an empty folder; returns its card."""
    _copy(app, staging, _APP if models else (*_APP, *_DEMO))
    _copy(_PACKAGE, staging / _PACKAGE.name, _PACKAGE_FILES)
    (staging / "requirements.txt").write_text("\n".join(_requirements(app)) + "\n", encoding="utf-8")
    card = SpaceCard.load(staging / "README.md")
    ids = [model for model in models if "/" in model]
    if ids:
        card.data.models = ids
    if (staging / _THUMBNAIL).is_file():
        # Link previews need an absolute URL.
        card.data.thumbnail = f"{url}/resolve/main/{_THUMBNAIL}"
    card.save(staging / "README.md")
    return card


def _copy(source: Path, target: Path, patterns: Sequence[str]) -> None:
    for pattern in patterns:
        for file in source.glob(pattern):
            if "_bundled" in file.relative_to(source).parts:
                continue  # An installed package contains the app's files too.
            check_own_file(file, source)
            copy = target / file.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)


def _requirements(app: Path) -> list[str]:
    """The app's requirements, with this package replaced by its own dependencies."""
    asked = [line.strip() for line in (app / "requirements.txt").read_text(encoding="utf-8").splitlines()]
    others = [line for line in asked if line and not re.match(r"(#|diffusionad[-_]hf\b)", line)]
    project = _PACKAGE.parent / "pyproject.toml"
    if project.is_file():
        # The metadata of an editable installation may be older than the project file.
        text = project.read_text(encoding="utf-8")
        block = re.search(r"^dependencies = \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL)
        needed = re.findall(r'"([^"]+)"', block[1] if block else "")
    else:
        needed = [line for line in metadata.requires("diffusionad-hf") or [] if "extra ==" not in line]
    return sorted({*others, *needed})


def _set_models(api: HfApi, repo_id: str, models: Sequence[str]) -> None:
    """Sets the app's variable, only if it differs: each change restarts the Space."""
    current = api.get_space_variables(repo_id).get(MODELS_VARIABLE)
    value = ",".join(models)
    if models and (current is None or current.value != value):
        api.add_space_variable(repo_id, MODELS_VARIABLE, value, description="Hub ids and organizations on offer")
    elif not models and current is not None:
        api.delete_space_variable(repo_id, MODELS_VARIABLE)
