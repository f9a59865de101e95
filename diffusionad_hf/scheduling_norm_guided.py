"""The noise-to-norm mathematics: noising at two scales, one-step prediction, re-noising and norm guidance."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real

import torch
from diffusers import DDPMScheduler, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput

__all__ = ["NormGuidedScheduler", "NormGuidedSchedulerOutput", "SchedulerMixin"]


@dataclass
class NormGuidedSchedulerOutput(BaseOutput):
    """
    Every intermediate result of the norm-guided reconstruction, of shape `(N, C, H, W)`.

    Args:
        noised_small, noised_big (`torch.Tensor`): The images, noised at both scales.
        noise_pred_small, noise_pred_big (`torch.Tensor`): The noise predicted in them.
        pred_original_small, pred_original_big (`torch.Tensor`): One-step predictions of the image from them.
        renoised (`torch.Tensor`): The big scale's prediction, noised again to the small scale.
        reconstruction (`torch.Tensor`): The norm-guided one-step reconstruction, in [-1, 1].
    """

    noised_small: torch.Tensor
    noised_big: torch.Tensor
    noise_pred_small: torch.Tensor
    noise_pred_big: torch.Tensor
    pred_original_small: torch.Tensor
    pred_original_big: torch.Tensor
    renoised: torch.Tensor
    reconstruction: torch.Tensor


class NormGuidedScheduler(DDPMScheduler):
    r"""
    A [`DDPMScheduler`] with the norm-guided one-step denoising of DiffusionAD (arXiv 2303.08730, section III;
    `models/DDPM.py` of the reference). Timesteps are given per sample. Pipeline, training and export all call
    [`reconstruct`].

    Args:
        small_timestep (`int`): Timestep of the small noise scale at inference (keeps detail, may keep the defect).
        big_timestep (`int`): Timestep of the big noise scale at inference (erases both).
        timestep_boundary (`int`): Training draws small timesteps below it, and big ones at or above it.
        prediction_type (`str`): What the network predicts: `"epsilon"`, the noise (the reference); `"sample"`, the
            clean image, which narrow networks learn faster; or `"v_prediction"`.
        guidance_weight (`float`): Weight of the big scale's guidance; 0 turns it off.
        *: Every argument of [`DDPMScheduler`], with the reference's values as defaults.

    Raises:
        ValueError: If the `prediction_type` is unknown.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: list[float] | None = None,
        variance_type: str = "fixed_small",
        clip_sample: bool = True,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        small_timestep: int = 200,
        big_timestep: int = 400,
        timestep_boundary: int = 300,
        guidance_weight: float = 1.0,
    ):
        if prediction_type not in ("epsilon", "sample", "v_prediction"):
            raise ValueError(f'prediction_type="{prediction_type}": must be epsilon, sample or v_prediction.')
        if not isinstance(num_train_timesteps, int) or not 1 <= num_train_timesteps <= 100_000:
            raise ValueError(f"num_train_timesteps={num_train_timesteps!r:.80}: must be from 1 to 100,000.")
        for name in ("small_timestep", "big_timestep", "timestep_boundary", "guidance_weight"):
            if not isinstance(value := self.config[name], Real):
                raise ValueError(f"{name}={value!r:.80}: must be a number.")
        # By now, all arguments are in the config.
        stock = inspect.signature(DDPMScheduler).parameters
        super().__init__(**{name: self.config[name] for name in stock if name in self.config})
        # In float64, as in the reference: 1 - a(0) = 1e-4 would lose three digits in float32.
        alphas_cumprod = torch.cumprod(1 - self.betas.double(), dim=0)
        self._signal_scale = alphas_cumprod.sqrt().float()
        self._noise_scale = (1 - alphas_cumprod).sqrt().float()

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """
        Noises images (paper, eq. 4): `x_t = sqrt(a) x_0 + sqrt(1 - a) eps`.

        Args:
            original_samples, noise (`torch.Tensor` of shape `(N, C, H, W)`): Clean images and the noise.
            timesteps (`torch.Tensor` of shape `(N,)`): Timestep of each image.
        """
        signal_scale, noise_scale = self._scales(timesteps, original_samples)
        return signal_scale * original_samples + noise_scale * noise

    def sample_timesteps(
        self, batch_size: int, *, generator: torch.Generator | None = None, device: torch.device | str = "cpu"
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Draws small and big timesteps for training, `(batch_size,)` each, uniformly on both sides of
        `timestep_boundary`.
        """
        source = generator.device if generator is not None else device
        boundary, last = self.config.timestep_boundary, self.config.num_train_timesteps
        small = torch.randint(0, boundary, (batch_size,), generator=generator, device=source)
        big = torch.randint(boundary, last, (batch_size,), generator=generator, device=source)
        return small.to(device), big.to(device)

    def predict_noise(self, model_output: torch.Tensor, sample: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """
        Converts a network's output to noise, by `prediction_type`: the output is the noise, the clean image, or the
        velocity `sqrt(a) eps - sqrt(1 - a) x_0`.

        Args:
            model_output, sample (`torch.Tensor` of shape `(N, C, H, W)`): The output, and the noised images x_t.
            timesteps (`torch.Tensor` of shape `(N,)`): Timestep of each image.
        """
        if self.config.prediction_type == "epsilon":
            return model_output
        signal_scale, noise_scale = self._scales(timesteps, sample)
        if self.config.prediction_type == "sample":
            return (sample - signal_scale * model_output) / noise_scale
        return signal_scale * model_output + noise_scale * sample

    def signal_to_noise(self, timesteps: torch.Tensor) -> torch.Tensor:
        """`a / (1 - a)` of each timestep, in float32 and of the same shape."""
        signal_scale, noise_scale = self._scales(timesteps, self._signal_scale)
        return (signal_scale / noise_scale).square().view(timesteps.shape).to(timesteps.device)

    def predict_original(
        self, noise_pred: torch.Tensor, sample: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """
        One-step prediction of the clean image (paper, eq. 6): `clamp((x_t - sqrt(1 - a) eps) / sqrt(a), -1, 1)`.

        Args:
            noise_pred, sample (`torch.Tensor` of shape `(N, C, H, W)`): Predicted noise, and the noised images x_t.
            timesteps (`torch.Tensor` of shape `(N,)`): Timestep of each image.
        """
        signal_scale, noise_scale = self._scales(timesteps, sample)
        limit = self.config.clip_sample_range
        return ((sample - noise_scale * noise_pred) / signal_scale).clamp(-limit, limit)

    def reconstruct(
        self,
        predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        images: torch.Tensor,
        noise: torch.Tensor,
        small_timestep: int | torch.Tensor,
        big_timestep: int | torch.Tensor,
        guidance_weight: float | None = None,
    ) -> NormGuidedSchedulerOutput:
        """
        Reconstructs images: adds noise at both scales, runs the network once, applies the guidance.

        Args:
            predict (`Callable`): The network: maps noised images of both scales, `(2N, C, H, W)`, small scale first,
                and their timesteps, `(2N,)`, to its output, `(2N, C, H, W)`.
            images (`torch.Tensor` of shape `(N, C, H, W)`): Clean images.
            noise (`torch.Tensor` of shape `(2, N, C, H, W)`): The noise, small scale first.
            small_timestep, big_timestep (`int` or `torch.Tensor` of shape `(N,)`): The noise scales, shared or per
                image.
            guidance_weight (`float`, *optional*): By default the configured weight.

        Returns:
            [`NormGuidedSchedulerOutput`]: The reconstruction and all intermediate results.
        """
        # A shared timestep keeps the shape (1,), so that its factors become constants of a traced graph.
        t_small, t_big = (torch.as_tensor(t, device=images.device).view(-1) for t in (small_timestep, big_timestep))
        noised_small = self.add_noise(images, noise[0], t_small)
        noised_big = self.add_noise(images, noise[1], t_big)
        timesteps = torch.cat([t.expand(images.shape[0]) for t in (t_small, t_big)])
        output_small, output_big = predict(torch.cat([noised_small, noised_big]), timesteps).chunk(2)
        return self.norm_guided_step(
            self.predict_noise(output_small, noised_small, t_small),
            self.predict_noise(output_big, noised_big, t_big),
            noised_small,
            noised_big,
            t_small,
            t_big,
            guidance_weight,
        )

    def norm_guided_step(
        self,
        noise_pred_small: torch.Tensor,
        noise_pred_big: torch.Tensor,
        sample_small: torch.Tensor,
        sample_big: torch.Tensor,
        timesteps_small: torch.Tensor,
        timesteps_big: torch.Tensor,
        guidance_weight: float | None = None,
    ) -> NormGuidedSchedulerOutput:
        """
        Norm-guided one-step denoising (paper, section III-C; `norm_guided_one_step_denoising` of the reference).

        The big scale's prediction, noised again to the small scale as `x_s^`, guides the small scale's noise:
        `eps' = eps_s - w sqrt(1 - a_s) (x_s^ - x_s)`. Arguments and result are those of [`reconstruct`], per scale.
        """
        weight = self.config.guidance_weight if guidance_weight is None else guidance_weight
        pred_original_big = self.predict_original(noise_pred_big, sample_big, timesteps_big)
        renoised = self.add_noise(pred_original_big, noise_pred_small, timesteps_small)
        _, noise_scale = self._scales(timesteps_small, sample_small)
        guided = noise_pred_small - noise_scale * weight * (renoised - sample_small)
        return NormGuidedSchedulerOutput(
            noised_small=sample_small,
            noised_big=sample_big,
            noise_pred_small=noise_pred_small,
            noise_pred_big=noise_pred_big,
            pred_original_small=self.predict_original(noise_pred_small, sample_small, timesteps_small),
            pred_original_big=pred_original_big,
            renoised=renoised,
            reconstruction=self.predict_original(guided, sample_small, timesteps_small),
        )

    def _scales(self, timesteps: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`sqrt(a(t))` and `sqrt(1 - a(t))` per sample, each of shape `(N, 1, 1, 1)`."""
        self._signal_scale, self._noise_scale = (t.to(like.device) for t in (self._signal_scale, self._noise_scale))
        index = timesteps.to(like.device)
        signal_scale, noise_scale = (t[index].view(-1, 1, 1, 1) for t in (self._signal_scale, self._noise_scale))
        return signal_scale.to(like.dtype), noise_scale.to(like.dtype)
