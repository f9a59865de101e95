"""The web demo: `python space/app.py`, or a Space on the Hugging Face Hub."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
# A clone has the package beside this folder, a deployed Space inside it.
sys.path[:0] = [str(folder) for folder in (HERE, HERE.parent) if (folder / "diffusionad_hf").is_dir()]

from diffusionad_hf.space.app import main  # noqa: E402

if __name__ == "__main__":
    main(HERE)
