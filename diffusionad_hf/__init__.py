"""Anomaly detection on product images with norm-guided one-step denoising diffusion (DiffusionAD)."""

import lazy_loader

# `__init__.pyi` lists the public names and their modules, which are imported when first used: torch and diffusers take
# seconds.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
