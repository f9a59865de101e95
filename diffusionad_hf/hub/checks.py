"""Checks before anything is published: the repo's name and the card's metadata."""

import json

from huggingface_hub import RepoCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..files import one_line


def check_repo_id(repo_id: str) -> None:
    """
    Checks the name to publish under.

    Raises:
        ValueError: If it is not a valid repo id, or lacks the owner.
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
    Asks the Hub whether it accepts a card's metadata.

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
