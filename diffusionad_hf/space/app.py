"""Starts the page, for `python space/app.py`, `diffusionad serve` and a Hugging Face Space."""

import logging
import os
import signal
import sys
import tempfile
from pathlib import Path

from ..files import bundled, require


def main(home: Path | None = None) -> None:
    """Serves the models that the environment variable DIFFUSIONAD_MODELS names, or else those in `checkpoints/`.

    Args:
        home: The folder of `checkpoints/`; that of the package if None.

    Raises:
        ImportError: If gradio is not installed.
    """
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("space").setLevel(logging.INFO)
    # The default is to die at once, and to leave the photos of all visitors on the disk.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    # A folder of our own: everything in it is swept.
    with tempfile.TemporaryDirectory(prefix="diffusionad-space-", ignore_cleanup_errors=True) as folder:
        home, root = home or bundled("space"), Path(folder).resolve()
        # gradio reads both when it is imported, and `page` imports it. It serves all that lies in the first.
        os.environ["GRADIO_TEMP_DIR"] = str(root / "uploads")
        os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
        # uvicorn would believe any caller on this machine; `traffic` looks at what proxies say.
        os.environ.setdefault("FORWARDED_ALLOW_IPS", "")
        require("gradio", "space")
        from .page import serve

        serve(root, os.environ.get("DIFFUSIONAD_MODELS") or str(home / "checkpoints"))
