"""The command line: `diffusionad` and `python -m diffusionad_hf`."""
