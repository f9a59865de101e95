"""`python -m diffusionad_hf`: the same as `diffusionad`."""

import sys

from .cli.main import main

sys.exit(main())
