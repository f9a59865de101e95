"""The losses of DiffusionAD and one forward pass of training."""

import torch
import torch.nn.functional as F
from diffusers import ModelMixin, UNet2DModel
from torch import nn
from torch.utils.checkpoint import checkpoint

from diffusionad_hf import NormGuidedScheduler

__all__ = ["FOCAL_WEIGHT", "DiffusionADObjective", "binary_focal_loss", "noise_loss"]

FOCAL_WEIGHT = 5.0


def binary_focal_loss(
    logits: torch.Tensor, targets: torch.Tensor, alpha: float = 0.5, gamma: float = 4.0
) -> torch.Tensor:
    """
    Mean of `alpha (1 - p_t)^gamma CE` (`BinaryFocalLoss` of the reference's train.py; alpha weighs both classes alike
    there).

    Args:
        logits: Of any shape.
        targets: Of the same shape, 0 or 1.
    """
    cross_entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return (alpha * (1 - torch.exp(-cross_entropy)) ** gamma * cross_entropy).mean()


def noise_loss(
    noise_pred_small: torch.Tensor, noise_pred_big: torch.Tensor, noise: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """
    Mean squared error of both scales, over the NORMAL samples only (paper, eq. 9); 0 for a batch without one.

    Args:
        noise_pred_small, noise_pred_big: Predicted noise, `(N, C, H, W)`.
        noise: The noise itself, `(2, N, C, H, W)`, small scale first.
        labels: `(N,)`, 0 for normal samples.
    """
    small, big = (
        (pred - true).square().flatten(1).mean(dim=1)
        for pred, true in zip((noise_pred_small, noise_pred_big), noise, strict=True)
    )
    normal = (labels == 0).to(small.dtype)
    return ((small + big) * normal).sum() / normal.sum().clamp(min=1)


class DiffusionADObjective(nn.Module):
    """
    Both networks and their common loss as one module, which is what distributed wrappers want.

    The gradient of the mask losses flows through the norm-guided reconstruction into the UNet.
    """

    def __init__(self, unet: UNet2DModel, segmenter: ModelMixin, scheduler: NormGuidedScheduler):
        super().__init__()
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
    ) -> dict[str, torch.Tensor]:
        """
        Args:
            images: `(N, 3, H, W)` in [0, 1], with synthetic anomalies.
            masks: `(N, 1, H, W)`, 1 where anomalous.
            labels: `(N,)`, 1 for samples with an anomaly.
            noise: `(2, N, 3, H, W)`, small scale first.
            timesteps_small, timesteps_big: `(N,)`.

        Returns:
            `dict[str, torch.Tensor]`: The scalars `loss` (what to minimise), `noise`, `focal`, `smooth_l1`; and
            `logits` `(N, 1, H, W)` and `reconstruction` `(N, 3, H, W)`.
        """
        noised_small = self.scheduler.add_noise(images, noise[0], timesteps_small)
        noised_big = self.scheduler.add_noise(images, noise[1], timesteps_big)
        if self.unet.is_gradient_checkpointing and torch.is_grad_enabled():
            # On top of the UNet's own checkpoints, which alone leave one scale's in memory while the other's are used.
            noise_pred_small, noise_pred_big = (
                checkpoint(self._predict_noise, noised, timesteps, use_reentrant=False)
                for noised, timesteps in ((noised_small, timesteps_small), (noised_big, timesteps_big))
            )
        else:
            noise_pred_small, noise_pred_big = self._predict_noise(
                torch.cat([noised_small, noised_big]), torch.cat([timesteps_small, timesteps_big])
            ).chunk(2)
        reconstruction = self.scheduler.norm_guided_step(
            noise_pred_small, noise_pred_big, noised_small, noised_big, timesteps_small, timesteps_big
        ).reconstruction
        logits = self.segmenter(torch.cat([images, reconstruction], dim=1)).float()

        losses = {
            "noise": noise_loss(noise_pred_small, noise_pred_big, noise, labels),
            "focal": binary_focal_loss(logits, masks),
            "smooth_l1": F.smooth_l1_loss(logits.sigmoid(), masks),
        }
        loss = losses["noise"] + FOCAL_WEIGHT * losses["focal"] + losses["smooth_l1"]
        return {"loss": loss, **losses, "logits": logits, "reconstruction": reconstruction}

    def _predict_noise(self, noised: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return self.unet(noised, timesteps).sample.float()
