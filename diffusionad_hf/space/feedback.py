"""What people say of verdicts, this is fine or this is a defect: kept with the results, and exported as JSON."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..files import write_json
from .intake import Refusal
from .results import Results

FINE, DEFECT = "fine", "defect"
_MARK = "mark.json"


@dataclass(frozen=True)
class Mark:
    """A marked photo: where it is kept, and what is exported of it."""

    photo: Path
    record: dict


def mark(folder: Path, kind: str, record: dict) -> None:
    """Marks the photo of a folder, of which there is a record, as `"fine"` or `"defect"`; the last mark counts."""
    moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    told = {name: record[name] for name in ("verdict", "anomaly_score", "threshold", "category")}
    write_json(folder / _MARK, {"file": record["name"], "mark": kind, **told, "time": moment})


def marks_of(results: Results, owner: str) -> list[Mark]:
    """A visitor's marks, the oldest result first."""
    found = []
    for folder in results.owned(owner):
        for file in sorted([*folder.glob(_MARK), *folder.glob(f"*/{_MARK}")]):
            photo = next(
                (path for name in ("original", "photo.jpg") if (path := file.with_name(name)).is_file()), None
            )
            if photo:
                found.append(Mark(photo, json.loads(file.read_text(encoding="utf-8"))))
    return found


def export(results: Results, owner: str) -> tuple[Path, Path]:
    """
    Writes a visitor's marks as the file that `diffusionad train --feedback` takes; returns its folder and path.

    Raises:
        Refusal: If there is none.
    """
    marks = marks_of(results, owner)
    if not marks:
        raise Refusal("There are no marks yet: say of a verdict that it is wrong.")
    _, folder = results.new(owner)
    file = folder / "feedback.json"
    write_json(file, {"marks": [mark.record for mark in marks]})
    return folder, file


def words(marks: Sequence[Mark]) -> str:
    fine = sum(mark.record["mark"] == FINE for mark in marks)
    return f"{fine} marked as fine, {len(marks) - fine} as defects."
