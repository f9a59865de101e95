"""What publishing a model and deploying a Space have in common: valid names, a token, a private repo, a valid card."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, RepoCard, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..files import one_line
from ..loading import TOKEN_HELP


def check_hub_id(name: str, argument: str) -> None:
    """Raises `ValueError` if the value of `argument` is not a valid repo id, with or without owner."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f'`{argument}` "{name}": {one_line(error)}') from error


def check_repo_id(repo_id: str) -> None:
    """Raises `ValueError` if nothing can be published under this name."""
    check_hub_id(repo_id, "repo_id")
    if "/" not in repo_id:
        raise ValueError(f'`repo_id` "{repo_id}": give ORG/NAME, ORG being your name or an organization of yours.')


def hub_client(token: str | None) -> HfApi:
    """A client that may write; raises `OSError` if there is no token, given or saved by a login."""
    token = token or get_token()
    if not token:
        raise OSError(f"this needs a Hugging Face token: {TOKEN_HELP}.")
    return HfApi(token=token)


def create_repo(api: HfApi, repo_id: str, private: bool, **kwargs: Any) -> None:
    """Creates a repo if it does not exist; raises `ValueError` if it exists and is public but should be private."""
    api.create_repo(repo_id, private=private or None, exist_ok=True, **kwargs)
    if private and not api.repo_info(repo_id, repo_type=kwargs.get("repo_type")).private:
        raise ValueError(
            f"`private`: {repo_id} exists and is public; make it private in its settings, or choose another name."
        )


def check_card(card: RepoCard) -> None:
    """Asks the Hub to validate a card's metadata; raises `ValueError` with its reasons if it refuses."""
    try:
        card.validate()
    except ValueError as error:
        try:
            reason = "; ".join(entry["message"] for entry in json.loads(str(error))["errors"])
        except (ValueError, KeyError, TypeError):
            reason = str(error)
        raise ValueError(f"the Hub refuses the {card.repo_type} card: {one_line(reason)}") from error


def check_own_file(file: Path, folder: Path) -> None:
    """
    Checks a file that is to be published: a link in the folder could lead to any file of the machine.

    Raises:
        ValueError: If it is a link, other than to a module of this package, lies behind one, or is no regular file.
    """
    if file.suffix == ".py" and file.resolve().parent == Path(__file__).resolve().parents[1]:
        return
    if file.resolve() != folder.resolve() / file.relative_to(folder) or not file.is_file():
        raise ValueError(f"{file}: a link, or no regular file; only files of the folder itself are published.")
