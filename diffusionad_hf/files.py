"""Files and folders: found wherever people keep them, and replaced whole, so that a killed process leaves the old one
or the new one, nothing between."""

import hashlib
import importlib
import io
import json
import math
import os
import re
import shutil
import sys
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

# Hidden files, such as macOS's `._x.png` and `.ipynb_checkpoints`, and what systems leave beside images.
_LITTER = re.compile(
    r"\.(?!\.?$)|(__macosx|thumbs\.db|desktop\.ini|@eadir|\$recycle\.bin|system volume information|lost\+found)$",
    re.IGNORECASE,
)
_LONGEST_NAME = 255  # bytes, of all usual file systems


def bundled(path: str) -> Path:
    """
    A file or folder that travels with the package.

    Args:
        path: Where it lies in a clone of the project, such as `"space"`; a wheel keeps it under `_bundled`.
    """
    package = Path(__file__).resolve().parent
    inside = package / "_bundled" / path
    return inside if inside.exists() else package.parent / path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """
    Replaces a file whole, safe with concurrent writers, of which the last one wins.

    Yields:
        `Path`: Where to write: a path in the same folder, which takes the file's place unless the body fails.
    """
    # Nothing of the file's own name, which may be as long as names can be.
    partial = path.with_name(f".{uuid.uuid4().hex}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def replace_file(path: Path, content: str | bytes) -> None:
    """Replaces a file whole, synced to disk; text in UTF-8, line ends unchanged."""
    with replacing(path) as partial, partial.open("wb") as file:
        # A file name that is no text has bytes in it that UTF-8 lacks; so escaped, they are valid JSON.
        file.write(content.encode(errors="backslashreplace") if isinstance(content, str) else content)
        file.flush()
        # Otherwise a crash of the machine may leave the new name without content.
        os.fsync(file.fileno())


def replace_folder(folder: Path, write: Callable[[Path], object]) -> None:
    """
    Writes a folder.

    Args:
        folder: Need not exist yet.
        write: Called with the path of a folder to make and fill.
    """
    partial, former = _beside(folder)
    shutil.rmtree(partial, ignore_errors=True)
    write(partial)
    restore_folder(folder)
    # Python cannot exchange two folders atomically: between these renames, only the former one exists.
    if folder.exists():
        folder.rename(former)
    partial.rename(folder)
    shutil.rmtree(former, ignore_errors=True)


def restore_folder(folder: Path) -> None:
    """Repairs what a killed [`replace_folder`] may have left between its renames; call it before reading."""
    _, former = _beside(folder)
    if not folder.exists() and former.exists():
        former.rename(folder)
    shutil.rmtree(former, ignore_errors=True)


def _beside(folder: Path) -> tuple[Path, Path]:
    return folder.with_name(f".{folder.name}.partial"), folder.with_name(f".{folder.name}.former")


def link_or_copy(file: Path, target: Path) -> None:
    """Gives a file a second name, in place of what had it; a copy of it where the file system has no links."""
    if target.exists() and target.samefile(file):
        return
    with replacing(target) as partial:
        try:
            os.link(file, partial)
        except OSError:
            shutil.copyfile(file, partial)


def write_json(path: Path, content: Any) -> None:
    """Writes strict JSON, as a whole: numbers that are not finite become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps(_finite(content), indent=2, ensure_ascii=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def is_litter(name: str) -> bool:
    """Whether a file or folder, given without its path, is hidden or what systems and editors leave beside images."""
    return _LITTER.match(name) is not None


def files_below(folder: Path) -> list[Path]:
    """
    All files below a folder, sorted, without litter. Links are followed, and every folder is looked into once,
    whatever leads to it; a link that leads nowhere counts as a file, which then cannot be read.

    Raises:
        OSError: If a folder cannot be read.
    """
    found: list[Path] = []
    seen: set[str] = set()
    folders, links = [str(folder)], deque[str]()
    while folders or links:
        # A folder goes by its own name rather than by that of a link to it.
        here = folders.pop() if folders else links.popleft()
        if (real := os.path.realpath(here)) in seen:
            continue
        seen.add(real)
        for name in sorted(name for name in os.listdir(here) if not is_litter(name)):
            path = os.path.join(here, name)
            if os.path.isdir(path):
                (links if os.path.islink(path) else folders).append(path)
            elif os.path.isfile(path) or os.path.islink(path):
                found.append(Path(path))
    return sorted(found)


def escaped(name: str | os.PathLike) -> str:
    """A file name as text: bytes that are none become `\\udcc1` and the like, as in JSON."""
    return os.fspath(name).encode("utf-8", "backslashreplace").decode()


def short_name(name: str, room: int) -> str:
    """A name without folders that a file system takes with `room` more bytes behind it: the middle of a longer one is
    a digest of all of it."""
    encoded = os.fsencode(name)
    if len(encoded) <= _LONGEST_NAME - room:
        return name
    digest = hashlib.sha256(encoded).hexdigest()[:16]
    part = (_LONGEST_NAME - room - len(digest)) // 2 - 1
    start, end = (piece.decode("utf-8", "ignore") for piece in (encoded[:part], encoded[-part:]))
    return f"{start}-{digest}-{end}"


def escape_output() -> None:
    """Lets this program print any file name: what its output's encoding lacks is escaped."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def slug(name: str) -> str:
    """A name in letters that file names and Hub ids may have: `"Metal Nut (v2)"` to `"metal-nut-v2"`."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def shorten(names: Iterable[Any], most: int = 5) -> str:
    """The first of some names, and how many more there are."""
    names = [str(name) for name in names]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def one_line(text: Any) -> str:
    """An error or a text without its line breaks."""
    return " ".join(str(text).split())


def require(module: str, extra: str) -> ModuleType:
    """
    Imports a package that only one of the extras installs.

    Args:
        module: Such as `"pyarrow.parquet"`.
        extra: The extra that brings it, such as `"train"`.

    Raises:
        ImportError: If it is not installed; the message says how to get it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(f'{error.name} is not installed: pip install "diffusionad-hf[{extra}]"') from error
