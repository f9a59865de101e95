"""How far a training is: told to callbacks, and kept in `progress.json` for other processes to watch."""

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..files import write_json

logger = logging.getLogger("training")

PROGRESS_FILE = "progress.json"


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} minutes" if minutes < 90 else f"{minutes / 60:.1f} hours"


@dataclass
class Progress:
    """
    The state of a training; callbacks get it at every step and at every change.

    Args:
        phase: `"looking"`, `"probing"`, `"remembering"`, `"training"`, `"calibrating"`, `"evaluating"`, and at the end
            `"done"`, `"stopped"` or `"failed"`.
        step: Optimiser steps done.
        steps: Optimiser steps in all.
        loss: Its running mean.
        validation: The last validation: `step`, `score` and other metrics on held-out photos with synthetic defects.
        seconds: Since this process began with the training.
        seconds_left: An estimate until the calibrated model is there; `None` until a step was timed.
        picture: Name of a file in the output folder: a held-out photo with a synthetic defect, its reconstruction, its
            map. Drawn anew at validations and every tenth of the steps.
        picture_step: The step that it shows.
        preview: Name of a file in the output folder: the sheet of what the training learns from.
        notes: What was seen in the photos, a line each.
        plan: The plan's lines.
        error: Why the training failed, in one line.
    """

    phase: str = "looking"
    step: int = 0
    steps: int = 0
    loss: float | None = None
    validation: dict[str, float] | None = None
    seconds: float = 0.0
    seconds_left: float | None = None
    picture: str | None = None
    picture_step: int | None = None
    preview: str | None = None
    notes: list[str] = field(default_factory=list)
    plan: list[str] = field(default_factory=list)
    error: str | None = None

    def __post_init__(self) -> None:
        self._listeners: Sequence[Callable[[Progress], object]] = ()
        self._started = time.monotonic()
        self.stopping = False

    def tell(self, listeners: Sequence[Callable[["Progress"], object]]) -> None:
        """Sets who is told of every change from now on."""
        self._listeners = listeners

    def update(self, **changes: Any) -> None:
        """Changes fields, and tells the listeners."""
        for name, value in changes.items():
            setattr(self, name, value)
        self.seconds = round(time.monotonic() - self._started, 1)
        for listener in self._listeners:
            listener(self)

    def stop(self) -> None:
        """
        Ends the training after this step (with several processes, the next one), as Ctrl-C does: with a checkpoint and
        a model of the best so far.
        """
        self.stopping = True


class ProgressFile:
    """Writes the progress into a folder at once if more than numbers changed, and otherwise once a second."""

    def __init__(self, output_dir: Path):
        self._path = output_dir / PROGRESS_FILE
        self._written, self._news = -math.inf, None

    def __call__(self, progress: Progress) -> None:
        content = asdict(progress)
        numbers = ("step", "loss", "seconds", "seconds_left")
        news = {name: value for name, value in content.items() if name not in numbers}
        if news == self._news and time.monotonic() < self._written + 1:
            return
        self._written, self._news = time.monotonic(), news
        try:
            write_json(self._path, content)
        except OSError as error:  # a full disk: checkpoints decide whether the training goes on
            logger.warning(f"{self._path}: cannot be written ({error.strerror or error}).")
