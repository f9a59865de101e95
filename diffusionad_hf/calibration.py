"""Thresholds and p-values from normal images alone."""

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from .familiarity_diffusionad import Familiarity, describe, pixel_digest
from .images_diffusionad import ImageInput, load_image, resize_image
from .pipeline_diffusionad import DiffusionADPipeline
from .verdicts_diffusionad import images_needed, percent

logger = logging.getLogger(__name__)


def promised_rate(count: int, asked: float) -> float:
    """
    The false-alarm rate that `count` normal images can promise: the one asked for or, if they are too few for it, the
    lowest possible, `1 / (count + 1)`, with a warning.

    Raises:
        ValueError: If the rate is out of range or there is no image.
    """
    if not 0 < asked < 1:
        raise ValueError(f"false_alarm_rate={asked}: must lie between 0 and 1, such as 0.05.")
    if not count:
        raise ValueError("no normal image to calibrate on; give 19 or more for a false-alarm rate of 5 %.")
    needed = images_needed(asked)
    if count >= needed:
        return asked
    logger.warning(
        f"{count} normal image(s) cannot promise a false-alarm rate of {percent(asked)}: the threshold is set for "
        f"{percent(1 / (count + 1))}, the lowest they can. Give {needed} or more for {percent(asked)}."
    )
    return 1 / (count + 1)


def check_new(pipe: DiffusionADPipeline, image: torch.Tensor, number: int, seen: dict[str, int]) -> None:
    """Raises `ValueError` if nothing new follows from an image at the model's size, and notes it in `seen`."""
    if pipe.trained_on(image):
        raise ValueError(
            f"image {number}: the model was trained on it, so its score says nothing of other normal images; "
            "calibrate on others."
        )
    # The promise holds for as many images as there are, and a copy is none.
    if (first := seen.setdefault(pixel_digest(image), number)) != number:
        raise ValueError(f"image {number}: a copy of image {first}, which counts once; leave it out.")


def calibrate(
    pipe: DiffusionADPipeline,
    images: Iterable[ImageInput],
    *,
    false_alarm_rate: float | None = None,
    batch_size: int | None = None,
) -> list[float]:
    """
    Sets the pipeline's threshold and p-values from normal images that it was not trained on (split conformal
    prediction), and tells it what normal images look like.

    A false-alarm rate alpha holds on average over calibrations, for images of the same kind; with n images, the rate
    of one calibration varies around it with a standard deviation of about `sqrt(alpha (1 - alpha) / n)`. If the images
    are too few for the rate, the lowest that they can promise takes its place, with a warning.

    Args:
        pipe: Its configuration is changed; `save_pretrained` keeps it.
        images: Normal images; a sequence such as a dataset's column is decoded as it is used.
        false_alarm_rate: What the threshold promises, in (0, 1); what the pipeline is configured for when `None`.
        batch_size: As for the pipeline.

    Returns:
        `list[float]`: Their scores, ascending.

    Raises:
        ValueError: If the rate is out of range, there is no image, one is there twice, or the pipeline was trained on
            one of them.
        InvalidImageError: If an image cannot be read; the message names it.
    """
    images = images if isinstance(images, Sequence) else list(images)
    rate = promised_rate(len(images), pipe.config.false_alarm_rate if false_alarm_rate is None else false_alarm_rate)
    size = pipe.default_batch_size if batch_size is None else batch_size
    scores: list[float] = []
    seen: dict[str, int] = {}
    grids: list[np.ndarray] = []
    # Batch by batch: the full-size maps of thousands of images would not fit into memory.
    with pipe.progress_bar(total=len(images)) as progress:
        for start in range(0, len(images), size):
            batch: list[torch.Tensor] = []
            for i in range(start, min(start + size, len(images))):
                batch.append(
                    resize_image(load_image(images[i], f"image {i}", pipe.config.value_range), pipe.config.image_size)
                )
                check_new(pipe, batch[-1], i, seen)
            scores += pipe(batch, batch_size=size).anomaly_score.tolist()
            grids += map(describe, batch)
            progress.update(len(batch))
    scores.sort()
    familiarity = Familiarity.of(grids)
    pipe.register_to_config(
        calibration_scores=scores,
        false_alarm_rate=rate,
        calibrated_settings=pipe.settings,
        familiarity=pipe.config.familiarity if familiarity is None else familiarity.to_json(),
        # An explicit threshold overrides the calibrated one, so clear it.
        threshold=None,
    )
    return scores


def fingerprint(pipe: DiffusionADPipeline, *more: Any) -> str:
    """Tells models apart: 16 hexadecimal digits of the SHA-256 of all that scores depend on, and of `more`."""
    scheduler = {name: value for name, value in pipe.scheduler.config.items() if not name.startswith("_")}
    digest = hashlib.sha256(json.dumps([pipe.settings, scheduler, *more], sort_keys=True, default=str).encode())
    for network in (pipe.unet, pipe.segmenter):
        for name, tensor in sorted(network.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
