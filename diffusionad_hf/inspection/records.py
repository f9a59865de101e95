"""What an inspection says of an image, as CSV or JSON for spreadsheets and other software."""

import csv
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..files import replacing, write_json

_COLUMNS = (
    *("file", "score", "threshold", "verdict", "reason", "p_value", "is_familiar", "strangeness"),
    *("seconds", "regions", "largest_box", "where", "error"),
)
# What makes a spreadsheet run a cell as a formula: at its beginning, or after a separator at which a spreadsheet
# with other settings splits it in two.
_FORMULA = re.compile(r"(^|[,;\t\r\n|])([\s'\"]*)(?=[=+\-@\t\r])")


@dataclass(frozen=True)
class Inspection:
    """
    What was found on one image.

    Args:
        file: The image.
        score: Its anomaly score.
        threshold: Scores above it are anomalous; `None` without one, or if so few calibration images promise none.
        verdict: `"normal"`, `"anomalous"` or `"undecided"`.
        reason: Code of [`Verdict`].
        sentence: The reason in plain words.
        p_value: Probability of such a score on a normal image; `None` if the model is not calibrated.
        is_familiar: Whether the image looks like the normal ones; `None` if the model cannot tell.
        strangeness: Its distance from the closest normal image; up to 1 it is familiar.
        seconds: Time of the pipeline for this image, its share of the batch's.
        where: The regions in words, strongest first.
        regions: Boxes `(x0, y0, x1, y1)` in px of the image, half open, with area and peak.
        pictures: Files that were written, by kind: figure; overlay, mask and reconstruction.
    """

    file: str
    score: float
    threshold: float | None
    verdict: str
    reason: str
    sentence: str
    p_value: float | None
    is_familiar: bool | None
    strangeness: float | None
    seconds: float
    where: list[str]
    regions: list[dict[str, Any]]
    pictures: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Failure:
    """A file that could not be inspected, and why, in one line."""

    file: str
    error: str


def write_results(path: Path, model: str, results: Sequence[Inspection | Failure]) -> None:
    """Writes all results as one JSON file."""
    content = {
        "model": model,
        "images": [asdict(result) for result in results if isinstance(result, Inspection)],
        "failures": [asdict(result) for result in results if isinstance(result, Failure)],
    }
    write_json(path, content)


def write_table(path: Path, results: Iterable[Inspection | Failure]) -> None:
    """Writes a row per image as CSV; files that could not be read have their reason in the last column."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_csv(path, _COLUMNS, map(_cells, results))


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]], *, encoding: str = "utf-8") -> None:
    """
    Writes a table that is safe to open in a spreadsheet: every field is quoted, and text that would run as a formula
    (file names come from anywhere) has an apostrophe before it. `"utf-8-sig"` makes Excel recognise UTF-8.
    """
    # Names of files need not be text.
    with (
        replacing(path) as partial,
        partial.open("w", newline="", encoding=encoding, errors="backslashreplace") as file,
    ):
        writer = csv.writer(file, quoting=csv.QUOTE_ALL)
        writer.writerow(columns)
        for row in rows:
            writer.writerow([_FORMULA.sub(r"\1'\2", cell) if isinstance(cell, str) else cell for cell in row])


def _cells(result: Inspection | Failure) -> list[Any]:
    if isinstance(result, Failure):
        cells: dict[str, Any] = {"file": result.file, "error": result.error}
    else:
        largest = max(result.regions, key=lambda region: region["area_px"], default=None)
        cells = {
            **vars(result),
            "regions": len(result.regions),
            "largest_box": "" if largest is None else " ".join(map(str, largest["box"])),
            "where": "; ".join(result.where),
        }
    return [cells.get(name) for name in _COLUMNS]
