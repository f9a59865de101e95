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
    """A fixed set of at most 64 held-out images, each as it is and with a synthetic defect."""

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
        """Image AUROC, pixel AUROC, pixel AP, AUPRO, and `score`, by which models are chosen.

        The score is the mean of image AUROC, which saturates early, and pixel AP, which tells good from better.
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
