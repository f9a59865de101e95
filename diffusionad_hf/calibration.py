"""Thresholds and p-values from normal images alone."""

import logging
import math
from collections.abc import Sequence

from .images_diffusionad import ImageInput
from .pipeline_diffusionad import DiffusionADPipeline

logger = logging.getLogger(__name__)


def images_needed(false_alarm_rate: float) -> int:
    """The fewest normal images that can promise a false-alarm rate: `1 / rate - 1`."""
    return math.ceil(1 / false_alarm_rate - 1 - 1e-9)


def calibrate(
    pipe: DiffusionADPipeline,
    images: Sequence[ImageInput],
    *,
    false_alarm_rate: float | None = None,
    batch_size: int | None = None,
) -> list[float]:
    """
    Sets the pipeline's threshold and p-values from normal images that it was not trained on (split conformal
    prediction).

    A false-alarm rate alpha holds on average over calibrations, for images of the same kind; with n images, the rate
    of one calibration varies around it with a standard deviation of about `sqrt(alpha (1 - alpha) / n)`.

    Args:
        pipe: Its configuration is changed; `save_pretrained` keeps it.
        images: Normal images.
        false_alarm_rate: What the threshold promises, in (0, 1); what the pipeline is configured for when `None`.
        batch_size: As for the pipeline.

    Returns:
        `list[float]`: Their scores, ascending.

    Raises:
        ValueError: If the rate is out of range or there is no image.
        InvalidImageError: If an image cannot be read; the message names it.
    """
    rate = pipe.config.false_alarm_rate if false_alarm_rate is None else false_alarm_rate
    if not 0 < rate < 1:
        raise ValueError(f"false_alarm_rate={rate}: must lie between 0 and 1, such as 0.05.")
    if len(images) < images_needed(rate):
        logger.warning(
            f"{len(images)} normal images cannot promise a false-alarm rate of {rate:.1%}: no image will be "
            f"called anomalous. Give {images_needed(rate)} or more, or allow a higher rate."
        )
    size = pipe.default_batch_size if batch_size is None else batch_size
    scores: list[float] = []
    # Batch by batch: the full-size maps of thousands of images would not fit into memory.
    with pipe.progress_bar(total=len(images)) as progress:
        for start in range(0, len(images), size):
            found = pipe(images[start : start + size], batch_size=size).anomaly_score.tolist()
            scores += found
            progress.update(len(found))
    scores.sort()
    # An explicit threshold overrides the calibrated one, so clear it.
    pipe.register_to_config(calibration_scores=scores, false_alarm_rate=rate, threshold=None)
    return scores
