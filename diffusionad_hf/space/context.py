"""What one server process shares: its temporary folder, the results in it, and the models."""

import atexit
import logging
import os
import shutil
import tempfile
from pathlib import Path

# Read when gradio is imported, so this module comes before it. The folder is our own: everything in it is swept.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ["GRADIO_TEMP_DIR"] = tempfile.mkdtemp(prefix="diffusionad-space-")
atexit.register(shutil.rmtree, os.environ["GRADIO_TEMP_DIR"], ignore_errors=True)

from ..files import bundled  # noqa: E402
from .models import Models  # noqa: E402
from .results import Results  # noqa: E402

logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
logger = logging.getLogger("space")
logger.setLevel(logging.INFO)

results = Results(Path(os.environ["GRADIO_TEMP_DIR"]))
models = Models(os.environ.get("DIFFUSIONAD_MODELS") or str(bundled("space/checkpoints")))
