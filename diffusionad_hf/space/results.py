"""Keeps results on disk for the visitor who asked, and not for long.

Only `uploads` is served: what visitors sent, and links to the pictures that the page shows, each in a folder with a
random name. So an address shows one picture, and leads neither to another one nor to the result. A result opens with
its random key, for its owner only. Everything goes `keep_seconds` after its last use; results also when their visitor
leaves. What lies in `shelf`, such as results of examples, stays: nobody opens it, but copies of it.
"""

import json
import logging
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from ..files import link_or_copy
from .intake import Refusal

logger = logging.getLogger("space")
_KEY = re.compile(r"[0-9a-f]{32}")
_OWNER_FILE = ".owner"
_SHOWN_FILE = ".shown"  # {file name: folder below `uploads`} of the pictures that are served


class Results:
    """The results of all visitors.

    Args:
        folder: Where to keep everything; it is subject to `sweep`. Only `folder / "uploads"` may be served.
        keep_seconds: How long a file is kept after it was last used. With the time between two sweeps, an hour.
    """

    def __init__(self, folder: Path, keep_seconds: float = 3300):
        self.folder = folder
        self.keep_seconds = keep_seconds
        self.uploads = folder / "uploads"
        self.shelf = folder / "shelf"
        self._results = folder / "results"
        for path in (self.uploads, self.shelf, self._results):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._kept: set[Path] = set()
        self._showing = threading.Lock()

    def keep_what_is_there(self) -> None:
        """Exempts what is served now, such as the example images, from `sweep`."""
        self._kept = set(self.uploads.iterdir())

    def new(self, owner: str) -> tuple[str, Path]:
        """Makes an empty folder for a visitor and returns its key and the folder."""
        key = secrets.token_hex(16)
        folder = self._results / key
        folder.mkdir(mode=0o700)
        (folder / _OWNER_FILE).write_text(owner, encoding="utf-8")
        return key, folder

    def copy(self, folder: Path, names: Sequence[str], owner: str) -> tuple[str, Path]:
        """Makes files of the shelf, which stay as they are, a visitor's own result; returns its key and folder."""
        key, own = self.new(owner)
        for name in names:
            link_or_copy(folder / name, own / name)
        return key, own

    def serve(self, content: bytes) -> str:
        """Serves a picture of the page's own, a JPEG, and returns its path."""
        folder = self.uploads / secrets.token_hex(32)
        folder.mkdir(mode=0o700)
        (folder / "picture.jpg").write_bytes(content)
        return str(folder / "picture.jpg")

    def open(self, key: str, owner: str) -> Path:
        """The folder of a key; one that is malformed, unknown or another visitor's is refused in the same words."""
        if isinstance(key, str) and _KEY.fullmatch(key):
            folder = self._results / key
            with suppress(OSError):
                if secrets.compare_digest((folder / _OWNER_FILE).read_text(encoding="utf-8"), owner):
                    os.utime(folder)
                    for served in self._shown(folder).values():
                        os.utime(served)
                    return folder
        raise Refusal("This result is no longer kept. Inspect the image again.")

    def show(self, folder: Path, file: Path) -> str:
        """The path by which a file of a result is served, always the same; it goes with the file or the result."""
        with self._showing:
            shown = self._shown(folder)
            for name in [name for name in shown if not (folder / name).exists()]:
                shutil.rmtree(shown.pop(name), ignore_errors=True)
            name = str(file.relative_to(folder))
            served = shown.setdefault(name, self.uploads / secrets.token_hex(32))
            served.mkdir(mode=0o700, exist_ok=True)
            link_or_copy(file, served / file.name)
            (folder / _SHOWN_FILE).write_text(json.dumps({name: str(path) for name, path in shown.items()}))
        return str(served / file.name)

    @staticmethod
    def _shown(folder: Path) -> dict[str, Path]:
        try:
            shown = json.loads((folder / _SHOWN_FILE).read_text())
        except FileNotFoundError:
            return {}
        return {name: Path(path) for name, path in shown.items()}

    def remove(self, folder: Path) -> None:
        """Removes a result and what is served of it; never called for uploads, which may hold files of any name."""
        for served in self._shown(folder).values():
            shutil.rmtree(served, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)

    def owned(self, owner: str) -> list[Path]:
        """The folders of a visitor, the newest last."""
        found = []
        for folder in self._results.iterdir():
            with suppress(OSError):  # swept meanwhile
                if secrets.compare_digest((folder / _OWNER_FILE).read_text(encoding="utf-8"), owner):
                    found.append((folder.stat().st_ctime_ns, folder))
        return [folder for _, folder in sorted(found)]

    def forget(self, owner: str) -> None:
        """Removes everything of a visitor."""
        for folder in self.owned(owner):
            self.remove(folder)

    def sweep(self) -> None:
        """Removes what has not been used for `keep_seconds`."""
        limit = time.time() - self.keep_seconds
        others = (
            {*self.folder.iterdir(), *self.uploads.iterdir()} - self._kept - {self.uploads, self.shelf, self._results}
        )
        for entry in [*self._results.iterdir(), *others]:
            try:
                if entry.lstat().st_mtime > limit:
                    continue
                if entry.parent == self._results:
                    self.remove(entry)
                elif entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry, ignore_errors=True)
                else:
                    entry.unlink()
            except FileNotFoundError:  # removed by somebody else
                continue
            except Exception:  # the others must go all the same
                logger.exception("could not remove %s", entry.name)

    def sweep_forever(self, every_seconds: float = 300) -> None:
        """Sweeps in the background for as long as the process runs."""

        def loop() -> None:
            while True:
                time.sleep(every_seconds)
                try:
                    self.sweep()
                except Exception:
                    logger.exception("could not look for old files")

        threading.Thread(target=loop, daemon=True, name="sweep").start()
