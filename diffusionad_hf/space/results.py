"""Where results wait for the next move of the threshold: on disk, for the visitor who asked, and not for long.

Each result is a folder under a random 128-bit key that only its visitor's page knows; it also names its owner, so that
a key that leaks opens nothing in another session. Everything in the server's temporary folder, uploads included, goes
`keep_seconds` after its last use; results also when their visitor leaves.
"""

import os
import re
import secrets
import shutil
import threading
import time
from contextlib import suppress
from pathlib import Path

from .intake import Refusal

_KEY = re.compile(r"[0-9a-f]{32}")
_OWNER_FILE = ".owner"


class Results:
    """The results of all visitors.

    Args:
        folder: The server's temporary folder; everything in it is subject to `sweep`.
        keep_seconds: How long a file is kept after it was last used. With the time between two sweeps, an hour.
    """

    def __init__(self, folder: Path, keep_seconds: float = 3300):
        self.folder = folder
        self.keep_seconds = keep_seconds
        self._results = folder / "results"
        self._results.mkdir(parents=True, exist_ok=True)
        self._kept: set[Path] = set()

    def keep_what_is_there(self) -> None:
        """Exempts what lies in the folder now, such as the example images, from `sweep`."""
        self._kept = set(self.folder.iterdir())

    def new(self, owner: str) -> tuple[str, Path]:
        """Makes an empty folder for a visitor and returns its key and the folder."""
        key = secrets.token_hex(16)
        folder = self._results / key
        folder.mkdir(mode=0o700)
        (folder / _OWNER_FILE).write_text(owner, encoding="utf-8")
        return key, folder

    def open(self, key: str, owner: str) -> Path:
        """The folder of a key; one that is malformed, unknown or another visitor's is refused in the same words."""
        if isinstance(key, str) and _KEY.fullmatch(key):
            folder = self._results / key
            with suppress(OSError):
                if secrets.compare_digest((folder / _OWNER_FILE).read_text(encoding="utf-8"), owner):
                    os.utime(folder)
                    return folder
        raise Refusal("This result is no longer kept. Inspect the image again.")

    def forget(self, owner: str) -> None:
        """Removes everything of a visitor."""
        for folder in self._results.iterdir():
            with suppress(OSError):  # swept meanwhile
                if (folder / _OWNER_FILE).read_text(encoding="utf-8") == owner:
                    shutil.rmtree(folder, ignore_errors=True)

    def sweep(self) -> None:
        """Removes what has not been used for `keep_seconds`."""
        limit = time.time() - self.keep_seconds
        for entry in [*self._results.iterdir(), *(set(self.folder.iterdir()) - self._kept - {self._results})]:
            with suppress(OSError):  # removed by somebody else
                if entry.stat().st_mtime > limit:
                    continue
                if entry.is_dir():
                    shutil.rmtree(entry, ignore_errors=True)
                else:
                    entry.unlink()

    def sweep_forever(self, every_seconds: float = 300) -> None:
        """Sweeps in the background for as long as the process runs."""

        def loop() -> None:
            while True:
                time.sleep(every_seconds)
                with suppress(OSError):
                    self.sweep()

        threading.Thread(target=loop, daemon=True, name="sweep").start()
