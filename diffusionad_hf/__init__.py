"""Anomaly detection on product images with norm-guided one-step denoising diffusion (DiffusionAD)."""

from .version import __version__

__all__ = ["__version__"]
