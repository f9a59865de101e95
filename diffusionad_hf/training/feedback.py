"""Verdicts that people marked as wrong or right, and what a training makes of them."""

import json
from dataclasses import dataclass
from pathlib import Path

_MARKS = {"fine": "fine", "defect": "defects"}


@dataclass(frozen=True)
class Feedback:
    """
    Marked photos.

    Args:
        fine: Confirmed as normal: trained on and calibrated with, like all normal photos.
        defects: Marked as defective: only measured.
    """

    fine: tuple[Path, ...] = ()
    defects: tuple[Path, ...] = ()


def read_feedback(file: str, photos: str) -> Feedback:
    """
    Reads marks, `{"marks": [{"file": "IMG_1.png", "mark": "fine"}, ...]}`; a mark is "fine" or "defect", and of
    several of one photo the last one counts.

    Args:
        file: JSON, as the web demo exports it.
        photos: Folder to look for photos in that are neither at their path nor beside the JSON.

    Raises:
        ValueError: If the file is no such JSON, or names a photo that is not there.
    """
    try:
        marks = json.loads(Path(file).read_text(encoding="utf-8"))["marks"]
        given = {str(mark["file"]): _MARKS[mark["mark"]] for mark in marks}
    except OSError as error:
        raise ValueError(f"`feedback` {file}: cannot be read ({error.strerror}).") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f'`feedback` {file}: is not of the form {{"marks": [{{"file": "IMG_1.png", "mark": "fine" or "defect"}}]}}'
            f" ({type(error).__name__}: {error})."
        ) from error
    found: dict[str, list[Path]] = {name: [] for name in _MARKS.values()}
    for name, kind in given.items():
        found[kind].append(_find(name, Path(file).parent, Path(photos).expanduser()).resolve())
    return Feedback(*(tuple(found[name]) for name in _MARKS.values()))


def _find(name: str, *folders: Path) -> Path:
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    below = [path for folder in folders[-1:] for path in sorted(folder.rglob(Path(name).name))]
    if len(below) != 1:
        problem = "several photos have that name" if below else "is not there"
        raise ValueError(
            f"`feedback`: the photo {name} {problem}; looked at that path, in {' and in '.join(map(str, folders))}."
        )
    return below[0]
