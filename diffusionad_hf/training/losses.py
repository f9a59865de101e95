"""The losses of DiffusionAD and one forward pass of training."""

import torch
import torch.nn.functional as F
from diffusers import ModelMixin, UNet2DModel
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..scheduling_norm_guided import NormGuidedScheduler

FOCAL_WEIGHT = 5.0


def binary_focal_loss(
    logits: torch.Tensor, targets: torch.Tensor, alpha: float = 0.5, gamma: float = 4.0
) -> torch.Tensor:
    """Mean of `alpha (1 - p_t)^gamma CE` (reference: `BinaryFocalLoss`, with the same alpha for both classes)."""
    cross_entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return (alpha * (1 - torch.exp(-cross_entropy)) ** gamma * cross_entropy).mean()


def noise_loss(
    noise_pred: torch.Tensor, noise: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | float = 1.0
) -> torch.Tensor:
    """
    Mean squared error at both scales, over the NORMAL samples only (paper, eq. 9); 0 for a batch without any.

    Args:
        noise_pred, noise: `(2, N, C, H, W)`, small scale first.
        labels: `(N,)`, 0 for normal samples.
        weights: `(2, N)`, see [`noise_weights`].
    """
    errors = weights * (noise_pred - noise).square().flatten(2).mean(dim=2)
    normal = (labels == 0).to(errors.dtype)
    return (errors.sum(dim=0) * normal).sum() / normal.sum().clamp(min=1)


def noise_weights(scheduler: NormGuidedScheduler, timesteps: torch.Tensor) -> torch.Tensor:
    """
    Weights of the squared errors of the noise, in the shape of `timesteps`: 1, as in the paper, unless the network
    predicts the image.

    An error of the image is `sqrt(SNR)` times as large in the noise, a hundred times at the first timestep. Its weight
    is therefore `min(1, 1 / SNR)`, the min-SNR weighting of arXiv 2303.09556 with gamma = 1.
    """
    ratio = scheduler.signal_to_noise(timesteps)
    return (1 / ratio).clamp(max=1) if scheduler.config.prediction_type == "sample" else torch.ones_like(ratio)


class DiffusionADObjective(nn.Module):
    """
    Both networks and their common loss as one module, as distributed wrappers require.

    Gradients of the mask losses flow through the reconstruction into the UNet, as in the paper, unless `detached`.
    """

    def __init__(
        self, unet: UNet2DModel, segmenter: ModelMixin, scheduler: NormGuidedScheduler, detached: bool = False
    ):
        super().__init__()
        self.detached = detached
        self.unet = unet
        self.segmenter = segmenter
        self.scheduler = scheduler

    def forward(
        self,
        images: torch.Tensor,
        masks: torch.Tensor,
        labels: torch.Tensor,
        noise: torch.Tensor,
        timesteps_small: torch.Tensor,
        timesteps_big: torch.Tensor,
        index: torch.Tensor | None = None,
        chance: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """
        Args:
            images: `(N, 3, H, W)` in [0, 1], with synthetic anomalies.
            masks: `(N, 1, H, W)`, 1 where anomalous.
            labels: `(N,)`, 1 for samples with an anomaly.
            noise: `(2, N, 3, H, W)`, small scale first.
            timesteps_small, timesteps_big: `(N,)`.
            index, chance: `(N,)`, for a segmenter with a memory: the images' indices in the dataset, and random
                numbers in [0, 1).

        Returns:
            `dict[str, torch.Tensor]`: The scalars `loss` (to minimise), `noise`, `focal` and `smooth_l1`; `logits`,
            `(N, 1, H, W)`; `reconstruction`, `(N, 3, H, W)`.
        """
        step = self.scheduler.reconstruct(self._predict, images, noise, timesteps_small, timesteps_big)
        noise_pred, reconstruction = torch.stack([step.noise_pred_small, step.noise_pred_big]), step.reconstruction
        pair = torch.cat([images, reconstruction.detach() if self.detached else reconstruction], dim=1)
        remembers = self.training and getattr(self.segmenter, "config", {}).get("memory_size")
        logits = (self.segmenter(pair, index, chance) if remembers else self.segmenter(pair)).float()

        weights = noise_weights(self.scheduler, torch.stack([timesteps_small, timesteps_big]))
        losses = {
            "noise": noise_loss(noise_pred, noise, labels, weights),
            "focal": binary_focal_loss(logits, masks),
            "smooth_l1": F.smooth_l1_loss(logits.sigmoid(), masks),
        }
        loss = losses["noise"] + FOCAL_WEIGHT * losses["focal"] + losses["smooth_l1"]
        return {"loss": loss, **losses, "logits": logits, "reconstruction": reconstruction}

    def _predict(self, noised: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The UNet's output for both scales, `(2N, 3, H, W)`."""
        if not (self.unet.is_gradient_checkpointing and torch.is_grad_enabled()):
            return self._output(noised, timesteps)
        # In addition to the UNet's own checkpoints, to keep only one scale's activations in memory at a time.
        scales = zip(noised.chunk(2), timesteps.chunk(2), strict=True)
        return torch.cat([checkpoint(self._output, *scale, use_reentrant=False) for scale in scales])

    def _output(self, noised: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return self.unet(noised, timesteps).sample.float()
