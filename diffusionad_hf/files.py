"""Files and folders that are replaced whole: a process that is killed leaves the former or the new one."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["bundled", "replace_file", "replace_folder", "replacing", "restore_folder"]


def bundled(path: str) -> Path:
    """
    A file or folder that travels with the package.

    Args:
        path: Where it lies in a clone of the project, such as `"space/examples"`; a wheel keeps it under `_bundled`.
    """
    package = Path(__file__).resolve().parent
    inside = package / "_bundled" / path
    return inside if inside.exists() else package.parent / path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields the path to write to; the file takes its own place at the end, and none is left of one that failed."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def replace_file(path: Path, content: str | bytes) -> None:
    """Writes a file; text in UTF-8, its line ends as they are."""
    with replacing(path) as partial, partial.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        # Or a machine that fails may leave a file of the right name and no content.
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
    # No system call of Python's exchanges two folders; between these two lines the former one is the only one.
    if folder.exists():
        folder.rename(former)
    partial.rename(folder)
    shutil.rmtree(former, ignore_errors=True)


def restore_folder(folder: Path) -> None:
    """Puts right what a [`replace_folder`] left that was killed between its renames; call it before reading."""
    _, former = _beside(folder)
    if not folder.exists() and former.exists():
        former.rename(folder)
    shutil.rmtree(former, ignore_errors=True)


def _beside(folder: Path) -> tuple[Path, Path]:
    return folder.with_name(f".{folder.name}.partial"), folder.with_name(f".{folder.name}.former")
