"""`DiffusionADPipeline`: from images to anomaly maps, scores and calibrated verdicts."""

import importlib
import inspect
import itertools
import json
import math
import os
import shutil
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, DiffusionPipeline, ModelMixin, UNet2DModel
from diffusers.utils import BaseOutput, logging
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from .familiarity_diffusionad import DIGEST_LENGTH, Familiarity, pixel_digest
from .images_diffusionad import ImageInput, InvalidImageError, load_image, resize_image, to_uint8
from .verdicts_diffusionad import Calibration, Verdict, check_calibration, conformal_p_value, conformal_threshold

# This file is saved beside the weights, and plain diffusers runs it from there, together with the siblings that it
# imports relatively. Other modules of this package are imported by name, and only if it is installed: see `_package`.
__all__ = [
    "DiffusionADPipeline",
    "DiffusionADPipelineOutput",
    "InvalidImageError",
    "Verdict",
    "check_calibration",
    "conformal_p_value",
    "conformal_threshold",
    "load_image",
    "resize_image",
]

logger = logging.get_logger(__name__)

# Modules of our component classes, both in the component's folder and in the installed package.
_COMPONENT_MODULES = {
    "NormGuidedUNet2DModel": "modeling_norm_guided_unet",
    "AnomalySegmenter": "modeling_anomaly_segmenter",
    "PerceptualSegmenter": "modeling_perceptual_segmenter",
    "NormGuidedScheduler": "scheduling_norm_guided",
}
# Increased when older versions of this package can no longer read a saved pipeline correctly.
_FORMAT = 1
# Images per pass, and pixels per pass on a CPU: four images of 128 px, one of 256 px.
_MOST_AT_ONCE = 16
_CPU_PIXELS_AT_ONCE = 256**2
# More in a config is a mistake, or meant to exhaust the memory: pixels per pass, and of an image in tiles.
_MOST_PIXELS_A_PASS = 2048**2
_MOST_PIXELS = 2**26
# A photo that is squashed more along one side than along the other is warned of.
_MOST_SQUASHED = 16
# Configuration values that scores depend on.
_SCORED = ("image_size", "tile_size", "value_range", "top_k", "seed")
# Share of a tile that it has in common with the next one, as in diffusers' tiled VAEs.
_OVERLAP = 0.25


@dataclass
class DiffusionADPipelineOutput(BaseOutput):
    """
    The pipeline's results, one entry per image in the order of the input.

    Args:
        anomaly_map (`list`): Per image, the probability of each pixel being anomalous, in [0, 1], at the image's own
            size: arrays of shape `(H, W)` and type float32 (`output_type="np"`), tensors (`"pt"`) or 8-bit greyscale
            images (`"pil"`).
        anomaly_score (`np.ndarray` of shape `(N,)`): Mean of the `top_k` largest values of each map at the model's
            resolution; of an image in tiles, over the whole blended map.
        reconstruction (`list`): Per image, its reconstruction without a defect, at the image's own size: arrays of
            shape `(H, W, 3)` in [0, 1], tensors of shape `(3, H, W)` (`"pt"`) or RGB images (`"pil"`).
        is_anomalous (`np.ndarray` of shape `(N,)`, *optional*): The verdicts as bool; if some are undecided, as
            objects, `True`, `False` or `None`. `None` in place of the array if the model has no threshold.
        p_value (`np.ndarray` of shape `(N,)`, *optional*): Probability of a score at least as high on a normal image;
            `None` if the model is not calibrated, or not with these settings.
        intermediates (`dict[str, torch.Tensor]`, *optional*): Every intermediate tensor, `(N, C, H, W)`; only with
            `return_intermediates=True`.
        verdict (`list[Verdict]`): Per image `"normal"`, `"anomalous"` or `"undecided"`, with its reason.
        strangeness (`np.ndarray` of shape `(N,)`, *optional*): How far each image is from the closest normal one, in
            units of what is still familiar; `None` if the model does not know what normal images look like.
        is_familiar (`np.ndarray` of shape `(N,)`, *optional*): Whether that is at most 1.
    """

    anomaly_map: list
    anomaly_score: np.ndarray
    reconstruction: list
    is_anomalous: np.ndarray | None = None
    p_value: np.ndarray | None = None
    intermediates: dict[str, torch.Tensor] | None = None
    verdict: list[Verdict] | None = None
    strangeness: np.ndarray | None = None
    is_familiar: np.ndarray | None = None


class DiffusionADPipeline(DiffusionPipeline):
    r"""
    Anomaly detection by norm-guided one-step denoising (DiffusionAD, arXiv 2303.08730).

    An image is noised at two scales; the UNet reconstructs it from each in one step, the big scale guiding the small
    one; a segmentation network compares image and reconstruction.

    Args:
        unet ([`UNet2DModel`]): Predicts the noise in a noised image.
        segmenter ([`ModelMixin`]): Turns image and reconstruction, `(N, 6, H, W)`, into logits, `(N, 1, H, W)`.
        scheduler ([`DDPMScheduler`]): A `NormGuidedScheduler`, which owns timesteps and guidance weight.
        image_size (`int` or `(int, int)`, *optional*): Height and width in px to which images are resized and at which
            they are inspected, or one number for a square; by default the UNet's `sample_size`. Multiples of what the
            networks need, 32 for those of this package.
        tile_size (`int` or `(int, int)`, *optional*): Larger images go through the networks in tiles of this height
            and width, which overlap by a quarter or more and are blended, so that the networks' memory does not grow
            with `image_size`. By default images go through in one piece.
        top_k (`int`): How many of the largest map values the score averages.
        seed (`int`): Seed of the noise, which is the same for every image, so that scores are repeatable and do not
            depend on the batch.
        calibration_scores (`list[float]`, *optional*): Scores of held-out normal images; see `diffusionad calibrate`.
        false_alarm_rate (`float`): Share of normal images that the calibrated threshold may call anomalous.
        threshold (`float`, *optional*): Overrides the calibrated threshold.
        familiarity (`dict`, *optional*): What normal images look like (`Familiarity.to_json`); written by calibration.
        calibrated_settings (`dict`, *optional*): [`settings`] that `calibration_scores` were computed with.
        training_digests (`str`, *optional*): [`pixel_digest`] of every training image, one after another, so that
            none of them is calibrated on.
        has_learnt (`bool`, *optional*): Whether the trained model told synthetic defects from normal images.
        value_range (`float`, *optional*): The value that is white in images of more than 8 bits, as for
            [`load_image`], such as 4095 for a camera of 12 bits; the same in training, calibration and inspection.
    """

    model_cpu_offload_seq = "unet->segmenter"

    # Largest batch known to fit in memory; set after an out-of-memory retry.
    _largest_batch: int | None = None

    def __init__(
        self,
        unet: UNet2DModel,
        segmenter: ModelMixin,
        scheduler: DDPMScheduler,
        image_size: int | tuple[int, int] | list[int] | None = None,
        top_k: int = 50,
        seed: int = 0,
        calibration_scores: list[float] | None = None,
        false_alarm_rate: float = 0.05,
        threshold: float | int | None = None,  # diffusers warns of types that are not named here
        tile_size: int | tuple[int, int] | list[int] | None = None,
        familiarity: dict | None = None,
        calibrated_settings: dict | None = None,
        training_digests: str | None = None,
        has_learnt: bool | None = None,
        value_range: float | int | None = None,
    ):
        super().__init__()
        image_size = image_size if image_size is not None else unet.config.sample_size
        image_size, tile_size = _check_sizes(image_size, tile_size, _size_multiple(unet, segmenter))
        if not isinstance(top_k, Integral) or not 1 <= top_k <= 2**31:
            raise ValueError(f"top_k={top_k!r:.80}: must be a whole number from 1 to {2**31}.")
        if not isinstance(seed, Integral) or not -(2**63) <= seed < 2**64:
            raise ValueError(f"seed={seed!r:.80}: must be a whole number of 64 bits.")
        check_calibration(calibration_scores, false_alarm_rate, threshold)
        if familiarity is not None:
            Familiarity.from_json(familiarity)
        if calibrated_settings is not None and not isinstance(calibrated_settings, dict):
            raise ValueError(f"calibrated_settings={calibrated_settings!r:.80}: must be settings and their values.")
        if training_digests is not None and (
            not isinstance(training_digests, str) or len(training_digests) % DIGEST_LENGTH
        ):
            raise ValueError(f"training_digests: must be a text of {DIGEST_LENGTH} letters per image.")
        if has_learnt not in (None, True, False):
            raise ValueError(f"has_learnt={has_learnt!r:.80}: must be true, false or null.")
        if value_range is not None and (not isinstance(value_range, Real) or not 0 < value_range < math.inf):
            raise ValueError(f"value_range={value_range!r:.80}: must be the value that is white, such as 4095.")
        if not hasattr(scheduler, "reconstruct"):
            raise ValueError(f"scheduler={type(scheduler).__name__}: must be a NormGuidedScheduler.")
        self.register_modules(unet=unet.eval(), segmenter=segmenter.eval(), scheduler=scheduler)
        self.register_to_config(
            image_size=image_size,
            top_k=top_k,
            seed=seed,
            calibration_scores=None if calibration_scores is None else [float(s) for s in calibration_scores],
            false_alarm_rate=false_alarm_rate,
            threshold=threshold,
            tile_size=tile_size,
            familiarity=familiarity,
            calibrated_settings=calibrated_settings,
            training_digests=training_digests,
            has_learnt=has_learnt,
            value_range=value_range,
        )

    def __repr__(self) -> str:
        config = {name: value for name, value in self.config.items() if len(str(value)) < 200}
        return f"{type(self).__name__} {json.dumps(config, indent=2, default=str)}"

    # ---- sizes ------------------------------------------------------------------------------------------------------

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in px at which images are inspected."""
        return _sides(self.config.image_size)

    @property
    def tile(self) -> tuple[int, int]:
        """Height and width in px of what goes through the networks at once: [`size`], or a tile of it."""
        height, width = map(min, self.size, _sides(self.config.tile_size or self.config.image_size))
        return height, width

    # ---- verdicts ---------------------------------------------------------------------------------------------------

    @property
    def threshold(self) -> float | None:
        """Scores above it are anomalous. The configured threshold, else the calibrated one, else `None`."""
        return self.calibration.threshold

    @property
    def calibration(self) -> Calibration:
        """What verdicts rest on."""
        config = self.config
        return Calibration(
            tuple(config.calibration_scores or ()),
            config.false_alarm_rate,
            config.threshold,
            config.has_learnt,
            settings_changed=self._settings_changed({}),
        )

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that scores depend on."""
        scheduler = {k: self.scheduler.config[k] for k in ("small_timestep", "big_timestep", "guidance_weight")}
        given = [name for name in _SCORED if self.config[name] or name in ("top_k", "seed")]
        settings = scheduler | {name: self.config[name] for name in given}
        types = sorted({str(network.dtype).removeprefix("torch.") for network in (self.unet, self.segmenter)})
        return settings if types == ["float32"] else settings | {"dtype": types}

    def _settings_changed(self, given: dict[str, Any]) -> bool:
        """Whether the calibration's scores were computed with other [`settings`] than these with `given` values."""
        settings = self.settings
        # What earlier versions did not note was computed in float32.
        noted = self.config.calibrated_settings or {k: v for k, v in settings.items() if k != "dtype"}
        return settings | given != noted

    def trained_on(self, image: torch.Tensor) -> bool:
        """Whether an image, `(3, S, S)` at the model's size, is known to be one of those it was trained on."""
        digests = self.config.training_digests or ""
        return pixel_digest(image) in {digests[i : i + DIGEST_LENGTH] for i in range(0, len(digests), DIGEST_LENGTH)}

    @property
    def default_batch_size(self) -> int:
        """Images per pass by default; on a CPU, as many as fit its cache."""
        if self._execution_device.type != "cpu":
            return _MOST_AT_ONCE
        return min(_MOST_AT_ONCE, max(1, _CPU_PIXELS_AT_ONCE // math.prod(self.tile)))

    # ---- the call ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        image: ImageInput | Iterable[ImageInput],
        *,
        batch_size: int | None = None,
        generator: torch.Generator | None = None,
        noise: torch.Tensor | None = None,
        num_noises: int = 1,
        small_timestep: int | None = None,
        big_timestep: int | None = None,
        guidance_weight: float | None = None,
        output_type: str = "np",
        return_intermediates: bool = False,
        return_dict: bool = True,
    ) -> DiffusionADPipelineOutput | Any:
        """
        Inspects one image or many.

        Args:
            image: A PIL image, a path, a numpy array `(H, W)`, `(H, W, C)` or a batch `(N, H, W, C)`, a tensor `(C, H,
                W)` or a batch `(N, C, H, W)`, or a list or any other iterable of them, such as a column of a dataset,
                sizes mixed. Integers are scaled by their type's range, floats lie in [0, 1].
            batch_size (`int`, *optional*): Images per pass, by default [`default_batch_size`]; does not change the
                result. Halved, with a warning, if that many do not fit into memory.
            generator (`torch.Generator`, *optional*): Draws separate noise for each image, instead of the seed.
            noise (`torch.Tensor` of shape `(2, N, C, H, W)`, *optional*): The noise itself, small scale first; H and W
                are those of a tile, if there are tiles: all get the same.
            num_noises (`int`): Average the maps of this many noise draws: a little more accurate, and that many times
                slower.
            small_timestep, big_timestep (`int`, *optional*), guidance_weight (`float`, *optional*): Replace the
                scheduler's values.
            output_type (`str`): `"np"`, `"pt"` or `"pil"`.
            return_intermediates (`bool`): Also return every intermediate tensor.
            return_dict (`bool`): Return a [`DiffusionADPipelineOutput`], else a tuple of its first fields, up to
                `intermediates`, that are not `None`.

        Returns:
            [`DiffusionADPipelineOutput`] or `tuple`.

        Raises:
            InvalidImageError: If an image cannot be inspected; the message names it.
            FileNotFoundError: If a path does not exist.
            ValueError: If an argument is out of range (the message names it), or a score is no number.
            MemoryError: If not even a single image fits into memory.
        """
        # 0. Defaults and checks.
        images = self._as_list(image)
        given = {"small_timestep": small_timestep, "big_timestep": big_timestep, "guidance_weight": guidance_weight}
        given = {name: value for name, value in given.items() if value is not None}
        settings_changed = self._settings_changed(given) or num_noises != 1
        settings_changed |= generator is not None or noise is not None
        calibration = replace(self.calibration, settings_changed=settings_changed)
        familiarity = None if self.config.familiarity is None else Familiarity.from_json(self.config.familiarity)
        small_timestep = self.scheduler.config.small_timestep if small_timestep is None else small_timestep
        big_timestep = self.scheduler.config.big_timestep if big_timestep is None else big_timestep
        device = self._execution_device
        batch_size = self.default_batch_size if batch_size is None else batch_size
        self.check_inputs(images, batch_size, noise, generator, num_noises, small_timestep, big_timestep, output_type)
        draws = []
        if noise is None and generator is None:
            draws = [draw.to(device) for draw in self._seeded_noise(num_noises)]

        maps, scores, reconstructions, kept, distances = [], [], [], [], []
        starts = range(0, len(images), batch_size)
        for start in self.progress_bar(starts) if len(starts) > 1 else starts:
            # 1. Decode and resize: (B, 3, H, W) in [0, 1], and each image's own size.
            batch = enumerate(images[start : start + batch_size], start)
            decoded = [load_image(item, f"image {i}", self.config.value_range) for i, item in batch]
            sizes = [(item.shape[-2], item.shape[-1]) for item in decoded]
            for i, size in enumerate(sizes, start):
                self._warn_of_shape(i, *size)
            resized = [resize_image(item, self.config.image_size) for item in decoded]
            if familiarity is not None:
                distances += [familiarity.strangeness(item) for item in resized]
            pixels = torch.stack(resized).to(device)

            # 2. Noise both scales, denoise in one step each, guide, segment; averaged over the noise draws.
            probability = reconstruction = torch.zeros((), device=device)
            for draw in range(num_noises):
                if noise is not None:
                    pair = noise[:, start : start + len(pixels)]  # (2, B, 3, h, w), of a tile
                elif generator is not None:
                    pair = torch.stack([self._draw(generator) for _ in sizes], dim=1)
                else:
                    pair = draws[draw].unsqueeze(1).expand(-1, len(pixels), -1, -1, -1)
                step = self._inspect_in_tiles(
                    pixels, pair.to(device), return_intermediates, small_timestep, big_timestep, guidance_weight
                )
                probability = probability + step["probability"] / num_noises
                reconstruction = reconstruction + step["reconstruction"] / num_noises

            # 3. Score at the model's resolution; maps and reconstructions at each image's own size.
            flat = probability.flatten(1)
            top = flat.topk(min(self.config.top_k, flat.shape[1]), dim=1).values
            scores.append(top.mean(dim=1).cpu())
            if not scores[-1].isfinite().all():
                row = int((~scores[-1].isfinite()).nonzero()[0])
                raise ValueError(
                    f"image {start + row}: the networks' score is {scores[-1][row]}, which is no number: their "
                    "weights are damaged, or their number type is too small for them; load the model anew, in float32."
                )
            if output_type != "pt" and all(size == tuple(probability.shape[-2:]) for size in sizes):
                # No resizing left to do on the device: one transfer for all.
                probability, reconstruction = probability.cpu(), reconstruction.cpu()
            for i, size in enumerate(sizes):
                maps.append(self._postprocess(probability[i], size, output_type))
                reconstructions.append(self._postprocess(reconstruction[i].clamp(0, 1), size, output_type))
            if return_intermediates:
                kept.append({name: tensor.cpu() for name, tensor in step.items()})
        self.maybe_free_model_hooks()

        # 4. Verdicts.
        anomaly_score = torch.cat(scores).double().numpy()
        p_value = None
        if calibration.scores and not settings_changed:
            p_value = conformal_p_value(calibration.scores, anomaly_score)
        strangeness = None if familiarity is None else np.array(distances)
        is_familiar = None if strangeness is None else strangeness <= 1
        verdict = [
            calibration.verdict(
                float(score),
                is_familiar=None if is_familiar is None else bool(is_familiar[i]),
            )
            for i, score in enumerate(anomaly_score)
        ]
        # An array of bool if all are decided, else of objects.
        is_anomalous = None if calibration.threshold is None else np.array([v.is_anomalous for v in verdict])
        intermediates = {name: torch.cat([k[name] for k in kept]) for name in kept[0]} if kept else None
        output = DiffusionADPipelineOutput(
            anomaly_map=maps,
            anomaly_score=anomaly_score,
            reconstruction=reconstructions,
            is_anomalous=is_anomalous,
            p_value=p_value,
            intermediates=intermediates,
        )
        if not return_dict:
            return output.to_tuple()
        output.verdict, output.strangeness, output.is_familiar = verdict, strangeness, is_familiar
        return output

    def check_inputs(
        self,
        images: list[ImageInput],
        batch_size: int,
        noise: torch.Tensor | None,
        generator: torch.Generator | None,
        num_noises: int,
        small_timestep: int,
        big_timestep: int,
        output_type: str,
    ) -> None:
        """Checks the arguments of a call."""
        if not images:
            raise ValueError("image: the list is empty; give at least one image.")
        for i, item in enumerate(images):
            if not isinstance(item, ImageInput):
                column = ', as dataset["image"] does' if isinstance(item, Mapping) else ""
                name = f"image {i}" if len(images) > 1 else "image"
                raise InvalidImageError(
                    f"{name}: cannot inspect a {type(item).__name__}; give PIL images, paths, numpy arrays "
                    f"or torch tensors{column}."
                )
            if isinstance(item, (str, os.PathLike)) and not Path(item).expanduser().is_file():
                load_image(item)  # says what is wrong with it, before anything is computed
        for name, value in {"batch_size": batch_size, "num_noises": num_noises}.items():
            if value < 1:
                raise ValueError(f"{name}={value}: must be at least 1.")
        last = self.scheduler.config.num_train_timesteps
        if not 0 <= small_timestep < big_timestep < last:
            raise ValueError(
                f"small_timestep={small_timestep}, big_timestep={big_timestep}: must satisfy 0 <= small < "
                f"big < {last}."
            )
        if output_type not in ("np", "pt", "pil"):
            raise ValueError(f'output_type="{output_type}": must be "np", "pt" or "pil".')
        if noise is not None:
            expected = (2, len(images), self.unet.config.in_channels, *self.tile)
            if tuple(noise.shape) != expected:
                raise ValueError(f"noise: has shape {tuple(noise.shape)}, must be {expected} (scale, image, C, H, W).")
            if generator is not None or num_noises != 1:
                raise ValueError("noise: give it alone, without generator= or num_noises=.")

    def _warn_of_shape(self, index: int, height: int, width: int) -> None:
        model_height, model_width = self.size
        squashed = width * model_height / (height * model_width)
        squashed = max(squashed, 1 / squashed)
        if squashed > _MOST_SQUASHED:
            logger.warning(
                f"image {index}: {width} x {height} px is squashed {squashed:.0f} times to the model's "
                f"{model_width} x {model_height} px, which hides defects; crop it, or give image_size "
                "its shape, and a tile_size."
            )

    def _inspect_in_tiles(
        self, pixels: torch.Tensor, noise: torch.Tensor, keep_all: bool, *arguments: Any
    ) -> dict[str, torch.Tensor]:
        """Runs [`_inspect_in_memory`] on each tile of images `(B, 3, H, W)` with noise `(2, B, 3, h, w)`; blends the
        results, whose weights fall linearly towards a tile's edges."""
        tile = (noise.shape[-2], noise.shape[-1])
        if tuple(pixels.shape[-2:]) == tile:
            return self._inspect_in_memory(pixels, noise, *arguments)
        ramps = [torch.arange(1, side + 1, device=pixels.device) for side in tile]
        down, right = (torch.minimum(r, r.flip(0)).clamp(max=math.ceil(_OVERLAP * len(r))).float() for r in ramps)
        weight = down[:, None] * right
        blended: dict[str, torch.Tensor] = {}
        total = torch.zeros_like(pixels[0, 0])
        tops, lefts = (_starts(side, part) for side, part in zip(pixels.shape[-2:], tile, strict=True))
        for top, left in itertools.product(tops, lefts):
            at = (..., slice(top, top + tile[0]), slice(left, left + tile[1]))
            total[at] += weight
            for name, part in self._inspect_in_memory(pixels[at], noise, *arguments).items():
                if keep_all or name in ("probability", "reconstruction"):
                    if name not in blended:
                        blended[name] = part.new_zeros(*part.shape[:2], *pixels.shape[-2:])
                    blended[name][at] += part * weight
        return {name: tensor.div_(total) for name, tensor in blended.items()}

    def _inspect_in_memory(
        self, pixels: torch.Tensor, noise: torch.Tensor, *arguments: Any
    ) -> dict[str, torch.Tensor]:
        """Runs [`_inspect`], halving the batch until it fits into memory."""
        while True:
            at_once = min(len(pixels), self._largest_batch or len(pixels))
            try:
                parts = [
                    self._inspect(some_pixels, some_noise, *arguments)
                    for some_pixels, some_noise in zip(pixels.split(at_once), noise.split(at_once, dim=1), strict=True)
                ]
                return parts[0] if len(parts) == 1 else {k: torch.cat([part[k] for part in parts]) for k in parts[0]}
            except (RuntimeError, MemoryError) as error:
                if not _is_out_of_memory(error):
                    raise
                if at_once == 1:
                    height, width = pixels.shape[-2:]
                    raise MemoryError(
                        f"not even one image of {width} x {height} px fits into the memory of {pixels.device} beside "
                        f"the model ({' '.join(str(error).split())}): free some memory, or use a smaller model or "
                        "tile_size."
                    ) from error
            # Outside the handler: the exception would keep the failed pass's tensors alive.
            self._largest_batch = at_once // 2
            logger.warning(
                f"{at_once} images at once do not fit into the memory of {pixels.device}: going on with "
                f"{self._largest_batch} at a time."
            )

    def _inspect(
        self,
        pixels: torch.Tensor,
        noise: torch.Tensor,
        small_timestep: int,
        big_timestep: int,
        guidance_weight: float | None,
    ) -> dict[str, torch.Tensor]:
        """One pass over images `(B, 3, h, w)` with noise `(2, B, 3, h, w)`; returns all tensors, in float32."""
        # Channels-last is faster on a CPU; on a GPU, the layout of the UNet's weights decides.
        layout = torch.channels_last if pixels.device.type == "cpu" else torch.contiguous_format

        def predict(noised: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
            output = self.unet(noised.to(self.unet.dtype, memory_format=layout), timesteps).sample
            # Copied because CUDA graphs reuse the memory of an output.
            return output.to(torch.float32, copy=True)

        # In float32, whatever type the networks compute in.
        step = self.scheduler.reconstruct(predict, pixels, noise, small_timestep, big_timestep, guidance_weight)
        pair = torch.cat([pixels, step.reconstruction], dim=1)  # (B, 6, h, w)
        # Channels-last takes at least a fifth less time on a CPU; the convolutions keep the layout.
        layout = torch.preserve_format if pixels.device.type == "mps" else torch.channels_last
        logits = self.segmenter(pair.to(self.segmenter.dtype, memory_format=layout)).float()
        return {**step, "probability": logits.sigmoid()}

    def _draw(self, generator: torch.Generator) -> torch.Tensor:
        """The noise of one image, or of each of its tiles, at both scales, `(2, C, h, w)`."""
        shape = (2, self.unet.config.in_channels, *self.tile)
        return randn_tensor(shape, generator=generator, device=generator.device)

    def _seeded_noise(self, count: int) -> list[torch.Tensor]:
        # Drawn on the CPU, so that scores do not depend on the device.
        generator = torch.Generator("cpu").manual_seed(self.config.seed)
        return [self._draw(generator) for _ in range(count)]

    @staticmethod
    def _as_list(image: Any) -> list:
        """The images of anything iterable; what may be read as a whole, or has a name for each part, is one image."""
        if isinstance(image, (np.ndarray, torch.Tensor)):
            return list(image) if image.ndim == 4 or image.dtype == object else [image]
        if isinstance(image, (ImageInput, bytes, bytearray, memoryview, Mapping)) or hasattr(image, "read"):
            return [image]
        try:
            images = iter(image)
        except TypeError:
            return [image]
        return list(images)

    @staticmethod
    def _postprocess(tensor: torch.Tensor, size: tuple[int, int], output_type: str) -> Any:
        """Converts `(C, H, W)` in [0, 1] to an image of size `(H, W)`; drops the axis of a single channel."""
        if tuple(tensor.shape[-2:]) != size:
            tensor = F.interpolate(tensor[None], size=size, mode="bilinear", align_corners=False)[0]
        if output_type == "pt":
            return tensor.squeeze(0)
        array = tensor.cpu().numpy()
        array = array[0] if len(array) == 1 else array.transpose(1, 2, 0)
        return array if output_type == "np" else Image.fromarray(to_uint8(array))

    # ---- saving and loading -----------------------------------------------------------------------------------------

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """
        Writes `model_index.json`, and the modules of our classes, with which plain diffusers loads the folder without
        this package: `DiffusionPipeline.from_pretrained(..., trust_remote_code=True)`.
        """
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)
        folder = Path(save_directory)
        index_file = folder / self.config_name
        index = json.loads(index_file.read_text(encoding="utf-8"))
        index["_class_name"] = [Path(inspect.getfile(type(self))).stem, type(self).__name__]
        index.pop("_name_or_path", None)
        index.pop("_module", None)
        index["_diffusionad_format"] = _FORMAT
        for module in (type(self).__module__, *(cls.__module__ for cls in (InvalidImageError, Familiarity, Verdict))):
            _copy_module(module, folder)
        for name, component in self.components.items():
            component = getattr(component, "_orig_mod", component)  # of torch.compile
            class_name = type(component).__name__
            if class_name in _COMPONENT_MODULES:
                index[name] = [_COMPONENT_MODULES[class_name], class_name]
                _copy_module(type(component).__module__, folder / name)
            _drop_local_path(folder / name)
        index_file.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike) -> dict:
        config = super()._dict_from_json_file(json_file)
        if config.get("_diffusionad_format", _FORMAT) > _FORMAT:
            raise ValueError(
                "it was written by a newer version of this package: pip install --upgrade diffusionad-hf."
            )
        # From a list, diffusers would run the repo's code, which is for users without this package.
        if _package() and isinstance(config.get("_class_name"), list):
            config["_class_name"] = config["_class_name"][-1]
        return config

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """Reads `model_index.json`; its components become the classes of the installed package."""
        loaded = super().load_config(pretrained_model_name_or_path, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        for name in ("unet", "segmenter"):
            file = Path(pretrained_model_name_or_path) / name / "config.json"
            if file.is_file():
                _check_network(name, json.loads(file.read_text(encoding="utf-8")))
        for name, value in config.items() if _package() else ():
            named = isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value)
            if not named:
                if name in ("unet", "segmenter", "scheduler"):
                    raise ValueError(f"{name}={value!r:.80}: must name a module and a class in it.")
                continue
            if value[1] in _COMPONENT_MODULES:
                value[0] = f"{_package()}.{_COMPONENT_MODULES[value[1]]}"
                # Diffusers finds classes of other packages only in modules that are already imported.
                importlib.import_module(value[0])
            elif value[0] != "diffusers":
                raise ValueError(
                    f"{pretrained_model_name_or_path}: component '{name}' is a {value[0]}.{value[1]}, which is "
                    "not loaded: it is neither from this package nor from diffusers."
                )
        return loaded

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> "DiffusionADPipeline":
        """
        A pipeline that shares the networks and the number type of another one, and begins with its configuration.

        Args:
            pipeline: Another pipeline of this class, or of one derived from it, which the new one is then of as well.
            kwargs: As for [`DiffusionPipeline.from_pipe`]: components and configuration values that differ. With other
                networks or another scheduler, the new pipeline is not calibrated.
        """
        if isinstance(pipeline, cls) and type(pipeline) is not cls:
            return type(pipeline).from_pipe(pipeline, **kwargs)
        # Diffusers takes over no network whose class is derived from that in `__init__`.
        shared = {name: pipeline.components[name] for name in ("unet", "segmenter") if name in pipeline.components}
        other = [name for name in kwargs if kwargs[name] is not pipeline.components.get(name, kwargs[name])]
        dtype = {} if "torch_dtype" in kwargs else {"dtype": pipeline.dtype}
        pipe = super().from_pipe(pipeline, **{**dtype, **shared, **kwargs})
        return _with_others(pipe, kwargs) if other else pipe

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> "DiffusionADPipeline":
        """
        Loads a pipeline from a folder or the Hub: safetensors only, and no code of the repo is run.

        Args:
            pretrained_model_name_or_path: A folder written by `save_pretrained`, or a Hub id such as
                `"org/diffusionad-mvtec-screw"`.
            kwargs: As for [`DiffusionPipeline.from_pretrained`]: `dtype`, `variant`, `revision`, `token`, `cache_dir`,
                `local_files_only`, ...; any configuration value of this class, such as `threshold`; and components in
                place of the saved ones, whose calibration does not hold for them and is left out.

        Raises:
            OSError: If the model is missing or incomplete; the message names it and says what to do.
        """
        kwargs["use_safetensors"] = True
        if not _package():
            pipe = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        else:
            # Imported by name: diffusers would look for relatively imported modules in the repo.
            loading = importlib.import_module(f"{_package()}.loading")
            name = os.fspath(pretrained_model_name_or_path)
            pipe = loading.load_pretrained(super().from_pretrained, name, **kwargs)
        # Of a calibration whose settings were not noted, the saved ones are all that is known.
        others = [*pipe.components, *([] if pipe.config.calibrated_settings else _SCORED)]
        return _with_others(pipe, kwargs) if any(kwargs.get(name) is not None for name in others) else pipe


def _with_others(pipe: DiffusionADPipeline, given: dict[str, Any]) -> DiffusionADPipeline:
    """A pipeline that is not the one that was calibrated any more: forgets what was known of scores."""
    scores = ("calibration_scores", "calibrated_settings", "threshold", "has_learnt")
    pipe.register_to_config(**{name: given.get(name) for name in scores})
    return pipe


def _check_network(name: str, config: Any) -> None:
    """Refuses a network's config that would take for ever to build; its weights are compared with it afterwards."""
    for key, value in config.items() if isinstance(config, dict) else ():
        values = value if isinstance(value, list) else [value]
        largest = 16 if key == "layers_per_block" else 100_000
        if len(values) > 32 or any(isinstance(v, (int, float)) and not abs(v) <= largest for v in values):
            raise ValueError(f"{name}: {key}={value!r:.80}: too large.")


def _sides(size: Any) -> tuple[int, int]:
    """Height and width of a size, which is one number if it is a square."""
    height, width = (size, size) if isinstance(size, Integral) else size
    return int(height), int(width)


def _size_multiple(unet: Any, segmenter: Any) -> int:
    """What the networks divide the sides of an image by."""
    levels = len(getattr(unet.config, "block_out_channels", (1,)))
    patch_size = getattr(unet.config, "patch_size", 1)
    return math.lcm(patch_size * 2 ** (levels - 1), getattr(segmenter, "size_multiple", 1))


def _check_sizes(image_size: Any, tile_size: Any, multiple: int) -> tuple[int | list[int], int | list[int] | None]:
    """Both sizes, as whole numbers and one number for a square; raises a `ValueError` that names the field."""
    checked: list[int | list[int]] = []
    for name, size, most in (("image_size", image_size, _MOST_PIXELS), ("tile_size", tile_size, _MOST_PIXELS_A_PASS)):
        if name == "tile_size" and size is None:
            return checked[0], None
        sides = list(size) if isinstance(size, (list, tuple)) else [size, size]
        whole = len(sides) == 2 and all(isinstance(side, Integral) and not isinstance(side, bool) for side in sides)
        if not whole or min(sides) < 1 or any(side % multiple for side in sides):
            raise ValueError(
                f"{name}={size!r:.80}: must be a whole number of px, or height and width; multiples of {multiple}."
            )
        most = _MOST_PIXELS_A_PASS if tile_size is None else most
        if math.prod(sides) > most:
            raise ValueError(f"{name}={size!r:.80}: too large, more than {most:,} px; give a tile_size, or less.")
        checked.append(int(sides[0]) if sides[0] == sides[1] else [int(side) for side in sides])
    return checked[0], checked[1]


def _starts(side: int, tile: int) -> list[int]:
    """Where tiles begin that cover a side evenly and overlap by a quarter or more."""
    count = math.ceil((side - tile) / (tile * (1 - _OVERLAP))) + 1
    return [round(i * (side - tile) / max(count - 1, 1)) for i in range(count)]


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, which only CUDA reports by a class of its own."""
    # PyTorch on Linux, Windows and Apple GPUs; oneDNN; cuDNN; cuBLAS.
    words = (
        "can't allocate memory",
        "not enough memory",
        "out of memory",
        "could not create a",
        "unable to find an engine",
        "CUDNN_STATUS_ALLOC_FAILED",
        "CUBLAS_STATUS_ALLOC_FAILED",
    )
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(word in str(error) for word in words)


def _package() -> str:
    """The installed package that this module belongs to; empty if this is the copy in a repo."""
    return "" if __name__.startswith("diffusers_modules") else __name__.rpartition(".")[0]


def _copy_module(module: str, folder: Path) -> None:
    source = Path(inspect.getfile(sys.modules[module]))
    target = folder / source.name
    if not (target.exists() and target.samefile(source)):
        shutil.copyfile(source, target)


def _drop_local_path(folder: Path) -> None:
    """Removes the local path that diffusers writes into component configs."""
    for file in folder.glob("*config.json"):
        config = json.loads(file.read_text(encoding="utf-8"))
        if config.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
