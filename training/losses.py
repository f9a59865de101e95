"""The losses of DiffusionAD, that of distillation, and one forward pass of training."""

import torch
import torch.nn.functional as F
from diffusers import ModelMixin, UNet2DModel
from torch import nn
from torch.utils.checkpoint import checkpoint

from diffusionad_hf import NormGuidedScheduler

__all__ = ["FOCAL_WEIGHT", "DiffusionADObjective", "binary_focal_loss", "distillation_loss", "noise_loss"]

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


def distillation_loss(
    noise_pred: torch.Tensor,
    logits: torch.Tensor,
    teacher_noise_pred: torch.Tensor,
    teacher_logits: torch.Tensor,
) -> torch.Tensor:
    """
    How far a network's answers are from a teacher's: mean squared error of the predicted noise of both scales, plus
    the mean cross entropy to the teacher's probabilities less its least value, so that 0 is agreement.

    Unlike [`noise_loss`] it takes anomalous samples too, for which only the teacher knows what they would look like
    without their anomaly, and it has no share of the noise itself, which nobody can predict.

    Args:
        noise_pred, teacher_noise_pred: `(2, N, C, H, W)`, small scale first.
        logits, teacher_logits: Of any shape.
    """
    noise = (noise_pred - teacher_noise_pred).square().flatten(1).mean(dim=1).sum()
    probabilities = teacher_logits.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(teacher_logits, probabilities)
    return noise + F.binary_cross_entropy_with_logits(logits, probabilities) - entropy


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
        teacher: dict[str, torch.Tensor] | None = None,
    ) -> dict[str, torch.Tensor]:
        """
        Args:
            images: `(N, 3, H, W)` in [0, 1], with synthetic anomalies.
            masks: `(N, 1, H, W)`, 1 where anomalous.
            labels: `(N,)`, 1 for samples with an anomaly.
            noise: `(2, N, 3, H, W)`, small scale first.
            timesteps_small, timesteps_big: `(N,)`.
            teacher: What another objective returned for the same arguments, to learn from too; see
                [`distillation_loss`].

        Returns:
            `dict[str, torch.Tensor]`: The scalars `loss` (what to minimise), `noise`, `focal`, `smooth_l1`, and with
            a teacher `distillation`; and `noise_pred` `(2, N, 3, H, W)`, small scale first, `logits` `(N, 1, H, W)`
            and `reconstruction` `(N, 3, H, W)`.
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
        noise_pred = torch.stack([noise_pred_small, noise_pred_big])
        if teacher is not None:
            losses["distillation"] = distillation_loss(noise_pred, logits, teacher["noise_pred"], teacher["logits"])
            loss = loss + losses["distillation"]
        return {
            "loss": loss,
            **losses,
            "noise_pred": noise_pred,
            "logits": logits,
            "reconstruction": reconstruction,
        }

    def _predict_noise(self, noised: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return self.unet(noised, timesteps).sample.float()
