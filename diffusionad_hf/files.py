"""Files and folders that are replaced whole: a killed process leaves the old one or the new one, nothing between."""

import importlib
import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any


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


def slug(name: str) -> str:
    """A name in letters that file names and Hub ids may have: `"Metal Nut (v2)"` to `"metal-nut-v2"`."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


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
