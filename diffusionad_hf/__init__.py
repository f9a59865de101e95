"""Anomaly detection on product images with norm-guided one-step denoising diffusion (DiffusionAD)."""

import importlib
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .exported_pipeline import ExportedDiffusionADPipeline, load_model
    from .modeling_anomaly_segmenter import AnomalySegmenter
    from .modeling_norm_guided_unet import NormGuidedUNet2DModel
    from .modeling_perceptual_segmenter import PerceptualSegmenter
    from .pipeline_diffusionad import DiffusionADPipeline, DiffusionADPipelineOutput, InvalidImageError
    from .presets import PRESETS, build_pipeline
    from .scheduling_norm_guided import NormGuidedScheduler, NormGuidedSchedulerOutput

# Torch and diffusers take seconds to import; `diffusionad --help` and the like need neither.
_MODULES = {
    "AnomalySegmenter": "modeling_anomaly_segmenter",
    "DiffusionADPipeline": "pipeline_diffusionad",
    "DiffusionADPipelineOutput": "pipeline_diffusionad",
    "ExportedDiffusionADPipeline": "exported_pipeline",
    "InvalidImageError": "pipeline_diffusionad",
    "NormGuidedScheduler": "scheduling_norm_guided",
    "NormGuidedSchedulerOutput": "scheduling_norm_guided",
    "NormGuidedUNet2DModel": "modeling_norm_guided_unet",
    "PRESETS": "presets",
    "PerceptualSegmenter": "modeling_perceptual_segmenter",
    "build_pipeline": "presets",
    "load_model": "exported_pipeline",
}

__all__ = [  # noqa: F822 (`__getattr__` defines them)
    "AnomalySegmenter",
    "DiffusionADPipeline",
    "DiffusionADPipelineOutput",
    "ExportedDiffusionADPipeline",
    "InvalidImageError",
    "NormGuidedScheduler",
    "NormGuidedSchedulerOutput",
    "NormGuidedUNet2DModel",
    "PRESETS",
    "PerceptualSegmenter",
    "__version__",
    "build_pipeline",
    "load_model",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
