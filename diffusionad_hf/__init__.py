"""Anomaly detection on product images with norm-guided one-step denoising diffusion (DiffusionAD)."""

from .modeling_anomaly_segmenter import AnomalySegmenter
from .modeling_norm_guided_unet import NormGuidedUNet2DModel
from .pipeline_diffusionad import DiffusionADPipeline, DiffusionADPipelineOutput, InvalidImageError
from .presets import PRESETS, build_pipeline
from .scheduling_norm_guided import NormGuidedScheduler, NormGuidedSchedulerOutput
from .version import __version__

__all__ = [
    "PRESETS",
    "AnomalySegmenter",
    "DiffusionADPipeline",
    "DiffusionADPipelineOutput",
    "InvalidImageError",
    "NormGuidedScheduler",
    "NormGuidedSchedulerOutput",
    "NormGuidedUNet2DModel",
    "__version__",
    "build_pipeline",
]
