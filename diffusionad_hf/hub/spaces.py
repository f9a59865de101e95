"""Deploys the web demo as a Space on the Hub, with the package's source beside the app."""

import re
import shutil
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from huggingface_hub import HfApi, SpaceCard, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..files import bundled, one_line
from ..loading import TOKEN_HELP, explained
from .checks import check_card, check_repo_id
from .publishing import PUBLISHED

MODELS_VARIABLE = "DIFFUSIONAD_MODELS"
"""The environment variable that tells the app which models to offer."""

_PACKAGE = Path(__file__).resolve().parents[1]
_THUMBNAIL = "thumbnail.png"
_APP = ("*.py", "README.md", _THUMBNAIL)
_PACKAGE_FILES = ("**/*.py", "**/*.pyi", "py.typed", "**/*.md", "**/*.css", "**/*.json", "*.safetensors", "*.txt")
# The demo part's: with other models they would only mislead.
_DEMO = ("examples/*.png", "examples/*.jpg", *(f"checkpoints/*/{pattern}" for pattern in PUBLISHED))
# Folders of a Space that are the deployment's own: what an earlier one left there, and this one lacks, goes.
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
    Creates or updates a Gradio Space that serves the inspection page. The same again makes no commit.

    The package is not on an index, so its source goes along, and its dependencies into the Space's requirements.

    Args:
        repo_id: `"ORG/SPACE"`; created where it does not exist.
        models: Hub ids and organizations to offer; the demo model, which then goes along, when empty.
        private: Create it private.
        app_dir: The app's folder; the one that comes with the package when `None`.
        token: The Hub's; the one you are logged in with when `None`.

    Returns:
        `str`: The URL of the Space.

    Raises:
        OSError: If the app's files are not there, or the Hub cannot be reached or refuses; the message names the way
            out.
        ValueError: If an argument is refused.
    """
    check_repo_id(repo_id)
    for model in models:
        try:
            validate_repo_id(model)
        except HFValidationError as error:
            raise ValueError(f'--models "{model}": {one_line(error)}') from error
    app = Path(app_dir) if app_dir is not None else bundled("space")
    if not (app / "app.py").is_file():
        raise FileNotFoundError(f"{app / 'app.py'}: no such file; leave out app_dir for the app of this package.")
    token = token or get_token()
    if not token:
        raise OSError(f"deploying needs a Hugging Face token: {TOKEN_HELP}.")
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        staging = Path(folder)
        card = _stage(app, staging, models, f"{api.endpoint}/spaces/{repo_id}")
        with explained(repo_id):
            check_card(card)
            api.create_repo(repo_id, repo_type="space", space_sdk="gradio", private=private or None, exist_ok=True)
            if private and not api.space_info(repo_id).private:
                raise ValueError(
                    f"--private: {repo_id} exists and is public; make it private in its settings, or choose another "
                    "name."
                )
            # Before the files, so that the app that they start knows them.
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
    """Copies what the Space is to hold into an empty folder; returns its card."""
    _copy(app, staging, _APP if models else (*_APP, *_DEMO))
    _copy(_PACKAGE, staging / _PACKAGE.name, _PACKAGE_FILES)
    (staging / "requirements.txt").write_text("\n".join(_requirements(app)) + "\n", encoding="utf-8")
    card = SpaceCard.load(staging / "README.md")
    ids = [model for model in models if "/" in model]
    if ids:
        card.data.models = ids
    if (staging / _THUMBNAIL).is_file():
        # A link to the Space shows it, so it takes an address that others can open.
        card.data.thumbnail = f"{url}/resolve/main/{_THUMBNAIL}"
    card.save(staging / "README.md")
    return card


def _copy(source: Path, target: Path, patterns: Sequence[str]) -> None:
    for pattern in patterns:
        for file in source.glob(pattern):
            if "_bundled" in file.relative_to(source).parts:
                continue  # The app's own files, which an installed package holds too.
            copy = target / file.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)


def _requirements(app: Path) -> list[str]:
    """The app's requirements, the package among them replaced by what it needs itself."""
    asked = [line.strip() for line in (app / "requirements.txt").read_text(encoding="utf-8").splitlines()]
    others = [line for line in asked if line and not re.match(r"(#|diffusionad[-_]hf\b)", line)]
    project = _PACKAGE.parent / "pyproject.toml"
    if project.is_file():
        # Not the metadata of an editable installation, which are those of the day it was installed.
        block = re.search(
            r"^dependencies = \[\n(.*?)^\]", project.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
        )
        needed = re.findall(r'"([^"]+)"', block[1] if block else "")
    else:
        needed = [line for line in metadata.requires("diffusionad-hf") or [] if "extra ==" not in line]
    return sorted({*others, *needed})


def _set_models(api: HfApi, repo_id: str, models: Sequence[str]) -> None:
    """Sets the variable that the app reads, where it is not so already: a change restarts the Space."""
    there = api.get_space_variables(repo_id).get(MODELS_VARIABLE)
    if models and (there is None or there.value != ",".join(models)):
        api.add_space_variable(
            repo_id, MODELS_VARIABLE, ",".join(models), description="Hub ids and organizations on offer"
        )
    elif not models and there is not None:
        api.delete_space_variable(repo_id, MODELS_VARIABLE)
