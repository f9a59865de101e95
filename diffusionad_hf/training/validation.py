"""Validation on held-out normal images with synthetic defects: the only thing that chooses a model."""

import torch

from ..evaluation.metrics import image_metrics, pixel_metrics
from ..pipeline_diffusionad import DiffusionADPipeline
from .dataset import NormalImages
from .synthesis import AnomalySynthesizer

# Far from every epoch of a training, so that no training anomaly is ever validated on.
_VALIDATION_EPOCH = 2**31
_MOST_IMAGES = 64


class Validation:
    """
    A fixed set of held-out normal images, each once as it is and once with a synthetic defect.

    Args:
        held_out: The first 64 are used.
        synthesizer: Made with `anomaly_probability=1`.
    """

    def __init__(self, held_out: NormalImages, synthesizer: AnomalySynthesizer):
        rows = range(min(len(held_out), _MOST_IMAGES))
        images = torch.stack([held_out.read(row) for row in rows])
        masks = held_out.foregrounds
        foregrounds = None if masks is None else torch.stack([masks[row] for row in rows])
        defective = synthesizer(images, rows, _VALIDATION_EPOCH, foregrounds)
        self.images = torch.cat([images, defective.images])
        self.masks = torch.cat([torch.zeros_like(defective.masks), defective.masks])
        self.labels = torch.cat([torch.zeros_like(defective.labels), defective.labels])

    def __call__(self, pipe: DiffusionADPipeline) -> dict[str, float]:
        """
        Measures a pipeline.

        Returns:
            `dict[str, float]`: `image_auroc`, `pixel_auroc`, `pixel_ap`, `aupro_30`, and `score`, the mean of image
            AUROC and pixel AP, by which models are chosen: the one saturates early, the other tells good from better.
        """
        output = pipe(self.images)
        metrics = image_metrics(output.anomaly_score, self.labels.numpy())
        metrics.update(pixel_metrics(output.anomaly_map, list(self.masks[:, 0].numpy())))
        chosen = {
            name: metrics[name] for name in ("image_auroc", "pixel_auroc", "pixel_ap", "aupro_30") if name in metrics
        }
        # Held-out images on which not one defect could be synthesised leave nothing to choose by.
        chosen["score"] = (chosen.get("image_auroc", 0.0) + chosen.get("pixel_ap", 0.0)) / 2
        return chosen
