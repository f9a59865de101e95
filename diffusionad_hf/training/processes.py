"""Several processes that train together succeed or fail together."""

from collections.abc import Callable
from typing import Literal, TypeVar, overload

from accelerate import PartialState
from accelerate.utils import gather_object

T = TypeVar("T")
# What the user can do something about; anything else is a bug.
EXPECTED = (OSError, ValueError, ImportError, MemoryError)


@overload
def together(work: Callable[[], T]) -> T: ...
@overload
def together(work: Callable[[], T], *, main_only: Literal[True]) -> T | None: ...
def together(work: Callable[[], T], *, main_only: bool = False) -> T | None:
    """Runs `work` on every process, or only on the main one; a failure is raised on all of them."""
    state = PartialState()
    result = failure = None
    if state.is_main_process or not main_only:
        try:
            result = work()
        except EXPECTED as error:
            failure = error
    reasons = gather_object([None if failure is None else str(failure)])
    if failure is not None:
        raise failure
    elsewhere = next((reason for reason in reasons if reason is not None), None)
    if elsewhere is not None:
        raise OSError(elsewhere)
    return result
