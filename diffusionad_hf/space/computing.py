"""Where pipelines compute: short calls in the server, long ones in a process that lets everything else go first."""

import logging
import math
import pickle
from contextlib import suppress
from multiprocessing import get_all_start_methods
from typing import Any

import torch

from ..export.exported_pipeline import ExportedDiffusionADPipeline
from ..pipeline_diffusionad import DiffusionADPipeline, DiffusionADPipelineOutput
from . import gpu
from .aside import Aside, Busy

logger = logging.getLogger("space")

_LONG = 12 * 256 * 256  # pixels times noise draws: more than a batch takes at a time
_aside = Aside()


def infer(pipe: DiffusionADPipeline, images: list[torch.Tensor], **settings: Any) -> DiffusionADPipelineOutput:
    """What `pipe(images, **settings)` gives, wherever that is computed."""
    if isinstance(pipe, ExportedDiffusionADPipeline):  # its runtime is of this process
        return pipe(images, **settings)
    if gpu.is_lent():
        try:
            return gpu.infer(_packed(pipe, images, settings))
        except Exception as error:  # of gradio's, if there is none, or the visitor had their share
            logger.warning("no GPU: %s", error)
    is_long = math.prod(pipe.size) * len(images) * settings["num_noises"] >= _LONG
    if is_long and pipe.device.type == "cpu" and not gpu.IS_ZERO and "forkserver" in get_all_start_methods():
        with suppress(Busy):
            return _aside(_packed(pipe, images, settings))
    return pipe(images, **settings)


def _packed(pipe: DiffusionADPipeline, images: list[torch.Tensor], settings: dict[str, Any]) -> bytes:
    """As bytes: multiprocessing would move the server's own weights into shared memory, which may be scarce."""
    return pickle.dumps((pipe, (images,), settings), pickle.HIGHEST_PROTOCOL)
