"""What the Hub and its client raise, in one line that says what to do."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub import RepoCard
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

__all__ = ["TOKEN_HELP", "check_card", "check_repo_id", "explained", "one_line"]

TOKEN_HELP = (
    "log in with `hf auth login`, or set HF_TOKEN; a token with the write role is made at "
    "https://huggingface.co/settings/tokens"
)


def check_repo_id(repo_id: str) -> None:
    """
    Checks the name that something is to be published under.

    Raises:
        ValueError: If it is none, or lacks the owner.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f'--repo-id "{repo_id}": {one_line(error)}') from error
    if "/" not in repo_id:
        raise ValueError(
            f'--repo-id "{repo_id}": give ORG/NAME, ORG being your user name or an organization of yours.'
        )


def check_card(card: RepoCard) -> None:
    """
    Asks the Hub whether it takes a card's metadata.

    Raises:
        ValueError: If it does not.
    """
    try:
        card.validate()
    except ValueError as error:
        try:
            reason = "; ".join(entry["message"] for entry in json.loads(str(error))["errors"])
        except (ValueError, KeyError, TypeError):
            reason = str(error)
        raise ValueError(f"the Hub refuses the {card.repo_type} card: {one_line(reason)}") from error


@contextmanager
def explained(repo_id: str) -> Iterator[None]:
    """Turns what the client raises into one line that says what to do."""
    try:
        yield
    except HfHubHTTPError as error:
        status, said = error.response.status_code, error.server_message or one_line(error)
        if isinstance(error, RepositoryNotFoundError):
            reason = f"no such repo, or one that your token may not see; check the name, or {TOKEN_HELP}"
        elif status == 401:
            reason = f"the Hub does not know your token; {TOKEN_HELP}"
        elif status == 403:
            reason = f"your token may not do that ({said}); {TOKEN_HELP}"
        elif status == 429:
            reason = "too many requests; try again in a few minutes"
        elif status >= 500:
            reason = f"the Hub is out of order ({status}); try again later"
        else:
            reason = f"the Hub refuses ({said})"
        raise OSError(f"{repo_id}: {reason}.") from error
    # The base class of all that the client's HTTP library raises, whichever library that is.
    except (HTTPError, OfflineModeIsEnabled) as error:
        raise OSError(
            f"{repo_id}: the Hub cannot be reached ({one_line(error)}); check the network and HF_HUB_OFFLINE."
        ) from error


def one_line(text: Any) -> str:
    return " ".join(str(text).split())
