"""`python -m diffusionad_hf.cli`: the same as `diffusionad`."""

import sys

from .main import main

sys.exit(main())
