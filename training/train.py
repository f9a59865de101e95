"""`accelerate launch training/train.py ...`: the trainer of `diffusionad_hf.training`, from a clone of the project."""

import sys
from pathlib import Path

# Scripts started by path see their own folder, not the one that the package lies in.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from diffusionad_hf.training.loop import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
