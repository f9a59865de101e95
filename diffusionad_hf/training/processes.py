"""Several processes that train together succeed or fail together."""

from collections.abc import Callable
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import gather_object

T = TypeVar("T")


def together(work: Callable[[], T], *, main_only: bool = False) -> T | None:
    """
    Does something in every process, or in the main one alone, and fails in all of them where it fails in one: the
    others would else wait for it, or train on without it.

    Args:
        work: What to do.
        main_only: In the main process alone; the others wait until it is done.

    Returns:
        What `work` returned in this process.

    Raises:
        OSError, ValueError, ImportError: What `work` raised, here or elsewhere.
    """
    state = PartialState()
    result = failure = None
    if state.is_main_process or not main_only:
        try:
            result = work()
        except (OSError, ValueError, ImportError) as error:
            failure = error
    reasons = gather_object([None if failure is None else str(failure)])
    if failure is not None:
        raise failure
    elsewhere = next((reason for reason in reasons if reason is not None), None)
    if elsewhere is not None:
        raise OSError(elsewhere)
    return result
