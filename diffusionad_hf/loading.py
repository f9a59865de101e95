"""Loads models of either kind, patiently, and explains in one line what the Hub or a folder lacks."""

import errno
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)
from safetensors import SafetensorError

from .files import one_line

if TYPE_CHECKING:
    import torch

    from .pipeline_diffusionad import DiffusionADPipeline

Pipeline = TypeVar("Pipeline")

_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
TOKEN_HELP = f"{_LOG_IN}; a token with the write role is made at https://huggingface.co/settings/tokens"

# Attempts while the Hub is overloaded or connections break; what was downloaded is kept in between.
_ATTEMPTS = 3
# What a load may fail with. `HTTPError` is the base class of the client's HTTP library, whichever that is.
_HUB_ERRORS = (HTTPError, OfflineModeIsEnabled, RevisionResolutionError)
_ERRORS = (
    ValueError,
    RuntimeError,
    OSError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    SafetensorError,
    *_HUB_ERRORS,
)


def load_model(
    model: str | os.PathLike, *, device: "str | torch.device | None" = None, **kwargs: Any
) -> "DiffusionADPipeline":
    """
    Loads any model that can inspect: a pipeline folder, a Hub id, or a folder of `diffusionad export`.

    Args:
        model: The folder or Hub id.
        device: Where to compute. By default on the GPU, if there is one; exported models always on the CPU.
        kwargs: As for the class's `from_pretrained`.

    Raises:
        OSError: If the model is not there or not whole.
        ValueError: If an exported model is asked to run elsewhere.
        ImportError: If the runtime of an exported model is not installed.
    """
    import torch

    from .export.exported_pipeline import ExportedDiffusionADPipeline, looks_exported
    from .pipeline_diffusionad import DiffusionADPipeline

    if looks_exported(Path(model)):
        return ExportedDiffusionADPipeline.from_pretrained(model, **kwargs).to(device or "cpu")
    pipe = DiffusionADPipeline.from_pretrained(model, **kwargs)
    return pipe.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def check_may_be_on_hub(name: str) -> None:
    """Raises `OSError` if a model that is no folder here cannot be on the Hub either."""
    if name.count("/") != 1 or name.startswith((".", "~", "/")):
        raise OSError(f"{name}: no such folder; give an existing one, or a Hub id such as org/name.")


def check_model_folder(folder: str | os.PathLike) -> None:
    """Raises `OSError` if a folder that is there holds no model."""
    if not os.path.isfile(os.path.join(folder, "model_index.json")):
        raise OSError(f"{folder}: no model_index.json in this folder; give a folder written by save_pretrained.")


def load_pretrained(load: Callable[..., Pipeline], name: str, **kwargs: Any) -> Pipeline:
    """
    Loads a pipeline; tries again if the Hub is overloaded, and falls back on the cache if it cannot be reached.

    Args:
        load: Takes `name` and `kwargs`, as [`DiffusionPipeline.from_pretrained`] does.
        name: Folder or Hub id.
        kwargs: For `load`.

    Raises:
        OSError: If the model is not there or not whole; the message names it and says what to do.
    """
    if os.path.isdir(name):
        check_model_folder(name)
    else:
        check_may_be_on_hub(name)
    failure, attempts, revision = None, _ATTEMPTS, kwargs.get("revision")
    while True:
        try:
            if not os.path.isdir(name):
                # Diffusers asks the Hub too, but then goes to the cache whatever the answer, and reports that.
                where: dict[str, Any] = {key: kwargs.get(key) for key in ("token", "cache_dir", "local_files_only")}
                kwargs["revision"] = HfApi().resolve_revision(name, revision=revision, **where)
            pipe = load(name, **kwargs)
        except _ERRORS as error:
            failure, attempts = failure or error, attempts - 1
            if kwargs.get("local_files_only") or not _is_network_failure(failure):
                raise OSError(f"{name}: {_why_not_loaded(name, failure, revision)}") from failure
            if attempts > 0 and _may_pass(failure):
                time.sleep(2 ** (_ATTEMPTS - 1 - attempts))
            else:
                kwargs["local_files_only"] = True
            continue
        if failure is not None and kwargs.get("local_files_only"):
            # Diffusers' logger, as for all that concerns a pipeline.
            from diffusers.utils.logging import get_logger

            get_logger(__name__).warning(f"{name}: the Hub cannot be reached; using the cached copy.")
        _add_former_familiarity(pipe, Path(name))
        return pipe


def _add_former_familiarity(pipe: Any, folder: Path) -> None:
    """Earlier versions kept what normal images look like in a file of its own."""
    from .familiarity_diffusionad import Familiarity

    file = folder / "familiarity.json"
    if pipe.config.get("familiarity") is None and file.is_file():
        try:
            familiarity = json.loads(file.read_text(encoding="utf-8"))
            Familiarity.from_json(familiarity)
            pipe.register_to_config(familiarity=familiarity)
        except (ValueError, RecursionError) as error:
            # Verdicts do without it, and say that it is unknown.
            logging.getLogger(__name__).warning(f"{file}: {one_line(error)}; run `diffusionad calibrate` again.")


@contextmanager
def explained(name: str) -> Iterator[None]:
    """
    Explains errors of the Hub.

    Args:
        name: The repo, or what else is asked for.

    Raises:
        OSError: If the body fails because of the Hub or the network; the message says what to do.
    """
    try:
        yield
    except _HUB_ERRORS as error:
        raise OSError(f"{name}: {_hub_reason(error) or one_line(error)}.") from error


# ---- explanations ---------------------------------------------------------------------------------------------------


def _hub_reason(error: BaseException, page: str = "its page on the Hub", revision: str = "") -> str | None:
    """What the Hub or the network refuses, and what to do; `None` if it is something else."""
    chain = _chain(error)
    status = next((_status(e) for e in chain if _status(e)), None)

    def has(*classes: type) -> bool:
        return any(isinstance(e, classes) for e in chain)

    if has(GatedRepoError):
        return f"access is restricted; ask for it at {page}, then {_LOG_IN}"
    if has(RevisionNotFoundError):
        return f"it has no branch, tag or commit{revision and f' {revision!r}'}; see {page} for those it has"
    if has(RepositoryNotFoundError):
        return f"no such repo on the Hub, or one that your token may not see; check the name, or {_LOG_IN}"
    if has(OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it"
    if status is None:
        said = one_line(next((e for e in reversed(chain) if str(e)), error))
        return f"the Hub cannot be reached ({said}); check the network" if has(HTTPError) else None
    if status == 401:
        return f"the Hub does not know your token; {_LOG_IN}"
    said = next(
        (e.server_message for e in chain if isinstance(e, HfHubHTTPError) and e.server_message), one_line(error)
    )
    if status == 403:
        return f"your token may not do that ({said}); {TOKEN_HELP}"
    if status == 429:
        return "too many requests (429); try again in a few minutes"
    if status >= 500:
        return f"the Hub is out of order ({status}); try again later"
    return f"the Hub refuses ({said})"


def _why_not_loaded(name: str, error: BaseException, revision: str | None) -> str:
    chain = _chain(error)
    # Diffusers' messages run over several lines and seldom name the model.
    said = one_line(error)
    if any(getattr(e, "errno", None) == errno.ENOSPC for e in chain):
        return "the disk is full; free some space, or pass cache_dir= for another disk"
    if any(isinstance(e, RemoteEntryNotFoundError) for e in chain):
        return "the repo has no model_index.json, so there is no pipeline in it"
    reason = _hub_reason(error, f"{constants.ENDPOINT}/{name}", revision or "")
    if reason is not None:
        return f"{reason}; the cache holds no whole copy" if _is_network_failure(error) else reason
    if any(isinstance(e, (RevisionResolutionError, LocalEntryNotFoundError)) for e in chain):
        return "the cache holds no whole copy; load the model once without local_files_only"
    damaged = ("no file named", "does not exist in", "`safetensors` weights", "weights lack")
    if any(isinstance(e, SafetensorError) for e in chain) or any(words in said for words in damaged):
        again = "copy it again" if os.path.isdir(name) else "load it once with force_download=True, or tell its owner"
        return f"the model is incomplete or damaged; {again} ({said})"
    return f"the model could not be loaded: {said}"


def _chain(error: BaseException | None) -> list[BaseException]:
    """An error and those behind it."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain


def _status(error: BaseException) -> int | None:
    """The HTTP status that the Hub answered with, if it answered."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _is_network_failure(error: BaseException) -> bool:
    """Whether the Hub could not be asked, or could not answer: no network, a broken connection, 429, 5xx."""
    found = [e for e in _chain(error) if isinstance(e, (HTTPError, OfflineModeIsEnabled))]
    statuses = [status for e in found if (status := _status(e)) is not None]
    return bool(found) and all(status == 429 or status >= 500 for status in statuses)


def _may_pass(failure: BaseException) -> bool:
    """Whether trying again soon may help; not if there was no connection in the first place."""
    hopeless = ("ConnectError", "ConnectTimeout", "OfflineModeIsEnabled")
    return not any(type(e).__name__ in hopeless for e in _chain(failure))
