"""`DiffusionADPipeline`: from images to anomaly maps, scores and calibrated verdicts."""

import errno
import importlib
import inspect
import json
import os
import shutil
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, DiffusionPipeline, ModelMixin, UNet2DModel
from diffusers.utils import BaseOutput, logging
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import HfApi, constants
from huggingface_hub import errors as hub_errors
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors import SafetensorError

# This file travels to the Hub beside the weights and is imported there on its own: it imports nothing of this package.
__all__ = [
    "DiffusionADPipeline",
    "DiffusionADPipelineOutput",
    "InvalidImageError",
    "conformal_p_value",
    "conformal_threshold",
    "load_image",
    "resize_image",
]

logger = logging.get_logger(__name__)

ImageInput = Image.Image | str | os.PathLike | np.ndarray | torch.Tensor

# Where each class of ours lies: the file beside the component's weights, and the module of the installed package.
_COMPONENT_MODULES = {
    "NormGuidedUNet2DModel": "modeling_norm_guided_unet",
    "AnomalySegmenter": "modeling_anomaly_segmenter",
    "PerceptualSegmenter": "modeling_perceptual_segmenter",
    "NormGuidedScheduler": "scheduling_norm_guided",
}
_SMALLEST_SIDE = 8
# Counts up whenever a saved pipeline needs a newer version of this package to be read right.
_FORMAT = 1
# Images per pass, and pixels per pass on a CPU: four images of 128 px, one of 256 px.
_MOST_AT_ONCE = 16
_CPU_PIXELS_AT_ONCE = 256**2
# Threads that decode images; more than that waits for the disk.
_READERS = 8
# Filters of warnings belong to the whole process: two threads that change them for a while would mix them up.
_WARNING_FILTERS = threading.Lock()
# How often a load is tried where the Hub is overloaded or a connection breaks; what was downloaded is kept in between.
_ATTEMPTS = 3


class InvalidImageError(ValueError):
    """An image that cannot be inspected; the message names it and says why, in one line."""


@dataclass
class DiffusionADPipelineOutput(BaseOutput):
    """
    What the pipeline found, one entry per image and in the order of the input.

    Args:
        anomaly_map (`list`): Per image, the probability of each pixel being anomalous, in [0, 1], at the image's own
            size: arrays of shape `(H, W)` and type float32 (`output_type="np"`), tensors (`"pt"`) or 8-bit greyscale
            images (`"pil"`).
        anomaly_score (`np.ndarray` of shape `(N,)`): Mean of the `top_k` largest values of each map at the model's
            resolution.
        reconstruction (`list`): Per image, what it would look like without a defect, at the image's own size: arrays
            of shape `(H, W, 3)` in [0, 1], tensors of shape `(3, H, W)` (`"pt"`) or RGB images (`"pil"`).
        is_anomalous (`np.ndarray` of shape `(N,)`, *optional*): Whether the score exceeds the threshold; `None`
            without one.
        p_value (`np.ndarray` of shape `(N,)`, *optional*): Probability of a score at least as high on a normal image;
            `None` where the model is not calibrated.
        intermediates (`dict[str, torch.Tensor]`, *optional*): Everything on the way, at the model's resolution, of
            shape `(N, C, H, W)`; only where asked for.
    """

    anomaly_map: list
    anomaly_score: np.ndarray
    reconstruction: list
    is_anomalous: np.ndarray | None = None
    p_value: np.ndarray | None = None
    intermediates: dict[str, torch.Tensor] | None = None


class DiffusionADPipeline(DiffusionPipeline):
    r"""
    Anomaly detection by norm-guided one-step denoising (DiffusionAD, arXiv 2303.08730).

    An image is noised at two scales; one UNet pass each gives back what it would look like without a defect, the big
    scale guiding the small one; a segmentation network reads the anomaly off image and reconstruction.

    Args:
        unet ([`UNet2DModel`]): Predicts the noise in a noised image.
        segmenter ([`ModelMixin`]): Turns image and reconstruction, `(N, 6, H, W)`, into logits, `(N, 1, H, W)`.
        scheduler ([`DDPMScheduler`]): A `NormGuidedScheduler`, which owns timesteps and guidance weight.
        image_size (`int`, *optional*): Side length in px at which images are inspected; the UNet's `sample_size` when
            `None`.
        top_k (`int`): How many of the largest map values the score averages.
        seed (`int`): Seed of the noise, which is the same for every image: scores are repeatable and independent of
            batching.
        calibration_scores (`list[float]`, *optional*): Scores of held-out normal images; see `diffusionad calibrate`.
        false_alarm_rate (`float`): The share of normal images that the calibrated threshold may call anomalous.
        threshold (`float`, *optional*): A threshold of your own, which then replaces the calibrated one.
    """

    model_cpu_offload_seq = "unet->segmenter"

    # Images that fit into memory at once, where that was found out.
    _largest_batch: int | None = None

    def __init__(
        self,
        unet: UNet2DModel,
        segmenter: ModelMixin,
        scheduler: DDPMScheduler,
        image_size: int | None = None,
        top_k: int = 50,
        seed: int = 0,
        calibration_scores: list[float] | None = None,
        false_alarm_rate: float = 0.05,
        threshold: float | None = None,
    ):
        super().__init__()
        self.register_modules(unet=unet.eval(), segmenter=segmenter.eval(), scheduler=scheduler)
        self.register_to_config(
            image_size=image_size if image_size is not None else int(unet.config.sample_size),
            top_k=top_k,
            seed=seed,
            calibration_scores=None if calibration_scores is None else [float(s) for s in calibration_scores],
            false_alarm_rate=false_alarm_rate,
            threshold=threshold,
        )

    # ---- verdicts ---------------------------------------------------------------------------------------------------

    @property
    def threshold(self) -> float | None:
        """Scores above it are anomalous: one's own if set, else the calibrated one; `None` without either."""
        if self.config.threshold is not None:
            return self.config.threshold
        if self.config.calibration_scores is None:
            return None
        return conformal_threshold(self.config.calibration_scores, self.config.false_alarm_rate)

    @property
    def default_batch_size(self) -> int:
        """Images per pass where the caller does not say; on a CPU, more pixels at once leave its cache."""
        if self._execution_device.type != "cpu":
            return _MOST_AT_ONCE
        return min(_MOST_AT_ONCE, max(1, _CPU_PIXELS_AT_ONCE // self.config.image_size**2))

    # ---- the call ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        image: ImageInput | Sequence[ImageInput],
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
    ) -> DiffusionADPipelineOutput | tuple:
        """
        Inspects one image or many.

        Args:
            image: A PIL image, a path, a numpy array `(H, W)`, `(H, W, C)` or a batch `(N, H, W, C)`, a tensor `(C, H,
                W)` or a batch `(N, C, H, W)`, or a list of them, sizes mixed. Integers are scaled by their type's
                range, floats lie in [0, 1].
            batch_size (`int`, *optional*): Images per pass; [`default_batch_size`] when `None`. Does not change the
                result. Halved, with a warning, where so many do not fit into memory.
            generator (`torch.Generator`, *optional*): Draws the noise, image after image, instead of the configured
                seed.
            noise (`torch.Tensor` of shape `(2, N, C, H, W)`, *optional*): The noise itself, small scale first.
            num_noises (`int`): Average the maps of so many noise draws: a little more accurate, so many times slower.
            small_timestep, big_timestep (`int`, *optional*), guidance_weight (`float`, *optional*): Replace the
                scheduler's values.
            output_type (`str`): `"np"`, `"pt"` or `"pil"`.
            return_intermediates (`bool`): Also return every tensor on the way.
            return_dict (`bool`): Return a [`DiffusionADPipelineOutput`], else a plain tuple.

        Returns:
            [`DiffusionADPipelineOutput`] or `tuple`.

        Raises:
            InvalidImageError: If an image cannot be inspected; the message names it.
            FileNotFoundError: If a path does not exist.
            ValueError: If an argument is out of range; the message names it.
            MemoryError: If not even a single image fits into memory.
        """
        # 0. Resolve the defaults of this checkpoint and check the inputs.
        images = self._as_list(image)
        small_timestep = self.scheduler.config.small_timestep if small_timestep is None else small_timestep
        big_timestep = self.scheduler.config.big_timestep if big_timestep is None else big_timestep
        device = self._execution_device
        batch_size = self.default_batch_size if batch_size is None else batch_size
        self.check_inputs(images, batch_size, noise, generator, num_noises, small_timestep, big_timestep, output_type)
        draws = []
        if noise is None and generator is None:
            draws = [draw.to(device) for draw in self._seeded_noise(num_noises)]

        maps, scores, reconstructions, kept = [], [], [], []
        starts = range(0, len(images), batch_size)
        bar = self.progress_bar(total=len(starts)) if len(starts) > 1 else nullcontext()
        with bar as progress, closing(self._read_ahead(images, batch_size)) as batches:
            # 1. Decode and resize: (B, 3, S, S) in [0, 1], and each image's own size.
            for start, (pixels, sizes) in zip(starts, batches, strict=True):
                pixels = pixels.to(device)

                # 2. Noise both scales, denoise in one step each, guide, segment; averaged over the noise draws.
                probability = reconstruction = 0
                for draw in range(num_noises):
                    if noise is not None:
                        pair = noise[:, start : start + len(pixels)]  # (2, B, 3, S, S)
                    elif generator is not None:
                        pair = torch.stack([self._draw(generator) for _ in sizes], dim=1)
                    else:
                        pair = draws[draw].unsqueeze(1).expand(-1, len(pixels), -1, -1, -1)
                    step = self._inspect_in_memory(
                        pixels, pair.to(device), small_timestep, big_timestep, guidance_weight
                    )
                    probability = probability + step["probability"] / num_noises
                    reconstruction = reconstruction + step["reconstruction"] / num_noises

                # 3. Score at the model's resolution; maps and reconstructions at each image's own size.
                flat = probability.flatten(1)
                top = flat.topk(min(self.config.top_k, flat.shape[1]), dim=1).values
                scores.append(top.mean(dim=1).cpu())
                if output_type != "pt" and all(size == tuple(probability.shape[-2:]) for size in sizes):
                    # Nothing to resize on the device: one transfer for all.
                    probability, reconstruction = probability.cpu(), reconstruction.cpu()
                for i, size in enumerate(sizes):
                    maps.append(self._postprocess(probability[i], size, output_type))
                    reconstructions.append(self._postprocess(reconstruction[i].clamp(0, 1), size, output_type))
                if return_intermediates:
                    kept.append({name: tensor.cpu() for name, tensor in step.items()})
                if progress is not None:
                    progress.update()
        self.maybe_free_model_hooks()

        # 4. Verdicts.
        anomaly_score = torch.cat(scores).double().numpy()
        threshold, calibration = self.threshold, self.config.calibration_scores
        is_anomalous = None if threshold is None else anomaly_score > threshold
        p_value = None if calibration is None else conformal_p_value(calibration, anomaly_score)
        intermediates = {name: torch.cat([k[name] for k in kept]) for name in kept[0]} if kept else None
        output = DiffusionADPipelineOutput(
            anomaly_map=maps,
            anomaly_score=anomaly_score,
            reconstruction=reconstructions,
            is_anomalous=is_anomalous,
            p_value=p_value,
            intermediates=intermediates,
        )
        return output if return_dict else output.to_tuple()

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
    ) -> int:
        """
        Checks the arguments of a call before any work is done.

        Returns:
            `int`: The number of images.
        """
        if not images:
            raise ValueError("image: the list is empty; give at least one image.")
        for item in images:
            if not isinstance(item, ImageInput):
                raise InvalidImageError(
                    f"image: cannot inspect a {type(item).__name__}; give PIL images, paths, numpy arrays "
                    "or torch tensors."
                )
            if isinstance(item, (str, os.PathLike)) and not Path(item).is_file():
                raise FileNotFoundError(f"{item}: no such image file.")
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
            size = self.config.image_size
            expected = (2, len(images), self.unet.config.in_channels, size, size)
            if tuple(noise.shape) != expected:
                raise ValueError(f"noise: has shape {tuple(noise.shape)}, must be {expected} (scale, image, C, H, W).")
            if generator is not None or num_noises != 1:
                raise ValueError("noise: give it alone, without generator= or num_noises=.")
        return len(images)

    def _read_ahead(
        self, images: list[ImageInput], batch_size: int
    ) -> Iterator[tuple[torch.Tensor, list[tuple[int, int]]]]:
        """Batches `(B, 3, S, S)` and their images' own sizes; the next one is decoded while the model computes."""

        def read(index: int) -> torch.Tensor:
            return load_image(images[index], name=f"image {index}")

        # Files only: where torch works on arrays, it starts threads of its own in every thread, and they get in each
        # other's way. That is also why images are resized here.
        files = [isinstance(image, (str, os.PathLike)) for image in images]
        batches = [range(len(images))[start : start + batch_size] for start in range(0, len(images), batch_size)]
        pool = ThreadPoolExecutor(min(_READERS, os.cpu_count() or 1), thread_name_prefix="read-images")
        try:
            reading = {index: pool.submit(read, index) for index in batches[0] if files[index]}
            for batch, following in zip(batches, [*batches[1:], range(0)], strict=True):
                decoded = [reading[index].result() if files[index] else read(index) for index in batch]
                reading = {index: pool.submit(read, index) for index in following if files[index]}
                pixels = torch.stack([resize_image(image, self.config.image_size) for image in decoded])
                yield pixels, [tuple(image.shape[-2:]) for image in decoded]
        finally:
            pool.shutdown(cancel_futures=True)

    def _inspect_in_memory(
        self, pixels: torch.Tensor, noise: torch.Tensor, *arguments: int | float | None
    ) -> dict[str, torch.Tensor]:
        """[`_inspect`] on as many images at once as fit into memory: the number is halved until they do."""
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
                    size = self.config.image_size
                    raise MemoryError(
                        f"not even one image of {size} x {size} px fits into the memory of {pixels.device} beside the "
                        f"model ({' '.join(str(error).split())}): free some, or use a smaller model."
                    ) from error
            # Outside of the handler, where the failed pass has let go of its tensors.
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
        """One pass: images `(B, 3, S, S)` and noise `(2, B, 3, S, S)` to every tensor on the way, in float32."""
        batch = len(pixels)
        t_small = torch.full((batch,), small_timestep, device=pixels.device)
        t_big = torch.full((batch,), big_timestep, device=pixels.device)
        noised_small = self.scheduler.add_noise(pixels, noise[0], t_small)
        noised_big = self.scheduler.add_noise(pixels, noise[1], t_big)
        # Both scales are one batch: (2B, 3, S, S). The mathematics stays in float32, whatever the networks compute in.
        # Channels-last takes less time on a CPU; the convolutions hand it on. On a GPU, the UNet's weights decide.
        layout = torch.channels_last if pixels.device.type == "cpu" else torch.contiguous_format
        noised = torch.cat([noised_small, noised_big]).to(self.unet.dtype, memory_format=layout)
        output = self.unet(noised, torch.cat([t_small, t_big])).sample
        # A copy: CUDA graphs reuse the memory of what one network gives for what the next one does.
        output_small, output_big = output.to(torch.float32, copy=True).chunk(2)
        noise_pred_small = self.scheduler.predict_noise(output_small, noised_small, t_small)
        noise_pred_big = self.scheduler.predict_noise(output_big, noised_big, t_big)
        step = self.scheduler.norm_guided_step(
            noise_pred_small, noise_pred_big, noised_small, noised_big, t_small, t_big, guidance_weight
        )
        pair = torch.cat([pixels, step.reconstruction], dim=1)  # (B, 6, S, S)
        # Channels-last takes a fifth less time and more on a CPU; the convolutions hand the layout on.
        layout = torch.preserve_format if pixels.device.type == "mps" else torch.channels_last
        logits = self.segmenter(pair.to(self.segmenter.dtype, memory_format=layout)).float()
        return {
            "noised_small": noised_small,
            "noised_big": noised_big,
            "noise_pred_small": noise_pred_small,
            "noise_pred_big": noise_pred_big,
            **step,
            "probability": logits.sigmoid(),
        }

    def _draw(self, generator: torch.Generator) -> torch.Tensor:
        """The noise of one image at both scales, `(2, C, S, S)`."""
        size = self.config.image_size
        return randn_tensor(
            (2, self.unet.config.in_channels, size, size), generator=generator, device=generator.device
        )

    def _seeded_noise(self, count: int) -> list[torch.Tensor]:
        # Drawn on the CPU, whatever the device, so that a score does not depend on the machine.
        generator = torch.Generator("cpu").manual_seed(self.config.seed)
        return [self._draw(generator) for _ in range(count)]

    @staticmethod
    def _as_list(image: Any) -> list:
        if isinstance(image, (np.ndarray, torch.Tensor)) and image.ndim == 4:
            return list(image)
        return list(image) if isinstance(image, (list, tuple)) else [image]

    @staticmethod
    def _postprocess(tensor: torch.Tensor, size: tuple[int, int], output_type: str) -> Any:
        """`(C, S, S)` in [0, 1] to an image of its own size `(H, W)`, one channel without a channel axis."""
        if tuple(tensor.shape[-2:]) != size:
            tensor = F.interpolate(tensor[None], size=size, mode="bilinear", align_corners=False)[0]
        if output_type == "pt":
            return tensor.squeeze(0)
        array = tensor.cpu().numpy()
        array = array[0] if len(array) == 1 else array.transpose(1, 2, 0)
        return array if output_type == "np" else Image.fromarray((array * 255).round().astype(np.uint8))

    # ---- saving and loading -----------------------------------------------------------------------------------------

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """
        Writes `model_index.json` and, beside it and in the components' folders, the modules of our classes.

        With them, a plain `DiffusionPipeline.from_pretrained(..., trust_remote_code=True)` loads the folder where this
        package is not installed.
        """
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)
        folder = Path(save_directory)
        index_file = folder / self.config_name
        index = json.loads(index_file.read_text(encoding="utf-8"))
        index["_class_name"] = [Path(inspect.getfile(type(self))).stem, type(self).__name__]
        index.pop("_name_or_path", None)
        index.pop("_module", None)
        index["_diffusionad_format"] = _FORMAT
        _copy_module(type(self), folder)
        for name, component in self.components.items():
            component = getattr(component, "_orig_mod", component)  # of torch.compile
            class_name = type(component).__name__
            if class_name in _COMPONENT_MODULES:
                index[name] = [_COMPONENT_MODULES[class_name], class_name]
                _copy_module(type(component), folder / name)
            _drop_local_path(folder / name)
        index_file.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike) -> dict:
        config = super()._dict_from_json_file(json_file)
        if config.get("_diffusionad_format", _FORMAT) > _FORMAT:
            raise ValueError(
                "it was written by a newer version of this package: pip install --upgrade diffusionad-hf."
            )
        # The list form asks diffusers to run the repo's own code, which is for those who come without this package.
        if _package() and isinstance(config.get("_class_name"), list):
            config["_class_name"] = config["_class_name"][-1]
        return config

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """Reads `model_index.json`, its components pointing at the classes of the installed package."""
        loaded = super().load_config(pretrained_model_name_or_path, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        for name, value in config.items():
            if not (isinstance(value, list) and len(value) == 2 and isinstance(value[1], str)) or not _package():
                continue
            if value[1] in _COMPONENT_MODULES:
                value[0] = f"{_package()}.{_COMPONENT_MODULES[value[1]]}"
                # Diffusers takes classes of other packages from modules that are imported already, and from nowhere
                # else.
                importlib.import_module(value[0])
            elif value[0] != "diffusers":
                raise ValueError(
                    f"{pretrained_model_name_or_path}: component '{name}' is a {value[0]}.{value[1]}, which "
                    "is neither of this "
                    "package nor of diffusers and is not run."
                )
        return loaded

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> "DiffusionADPipeline":
        """
        Loads a pipeline from a folder or from the Hub; safetensors only, and no code of the repo is run.

        Args:
            pretrained_model_name_or_path: A folder written by `save_pretrained`, or a Hub id such as
                `"org/diffusionad-mvtec-screw"`.
            kwargs: As for [`DiffusionPipeline.from_pretrained`]: `dtype`, `variant`, `revision`, `token`, `cache_dir`,
                `local_files_only`, ...; and any configuration value of this class, such as `threshold`.

        Raises:
            OSError: If the model is not there or not whole; the message names it and the way out.
        """
        kwargs["use_safetensors"] = True
        name = os.fspath(pretrained_model_name_or_path)
        if os.path.isdir(name) and not os.path.isfile(os.path.join(name, cls.config_name)):
            raise OSError(f"{name}: no {cls.config_name} in this folder; give a folder written by save_pretrained.")
        if not os.path.isdir(name) and (name.count("/") != 1 or name.startswith((".", "~", "/"))):
            raise OSError(f"{name}: no such folder; give an existing one, or a Hub id such as org/name.")
        failure, attempts = None, _ATTEMPTS
        while True:
            try:
                if not os.path.isdir(name):
                    # Diffusers asks the Hub too, but then looks into the cache whatever the answer, and reports that.
                    where = {key: kwargs.get(key) for key in ("revision", "token", "cache_dir", "local_files_only")}
                    kwargs["revision"] = HfApi().resolve_revision(name, **where)
                pipe = super().from_pretrained(name, **kwargs)
            except (
                *(ValueError, RuntimeError, OSError, KeyError, TypeError, SafetensorError),
                *(hub_errors.HTTPError, hub_errors.OfflineModeIsEnabled, hub_errors.RevisionResolutionError),
            ) as error:
                failure, attempts = failure or error, attempts - 1
                if kwargs.get("local_files_only") or not _is_network_failure(failure):
                    raise _explained(name, failure, kwargs) from failure
                if attempts > 0 and _may_pass(failure):
                    time.sleep(2 ** (_ATTEMPTS - 1 - attempts))
                else:
                    kwargs["local_files_only"] = True
                continue
            if failure is not None and kwargs.get("local_files_only"):
                logger.warning(f"{name}: the Hub cannot be reached; the copy in the cache is used.")
            return pipe


# ---- conformal calibration ------------------------------------------------------------------------------------------


def conformal_p_value(calibration_scores: Sequence[float], score: np.ndarray | float) -> np.ndarray:
    """
    Probability that a normal image scores at least as high: `(1 + #{scores >= s}) / (n + 1)` (split conformal
    prediction).

    Args:
        calibration_scores: Scores of n held-out normal images.
        score: One score or an array of them.

    Returns:
        `np.ndarray`: Of the shape of `score`, in (0, 1].
    """
    ordered = np.sort(np.asarray(calibration_scores, dtype=np.float64))
    at_least = len(ordered) - np.searchsorted(ordered, np.asarray(score, dtype=np.float64), side="left")
    return (1 + at_least) / (len(ordered) + 1)


def conformal_threshold(calibration_scores: Sequence[float], false_alarm_rate: float) -> float:
    """
    The lowest threshold that keeps the stated false-alarm rate: `score > threshold` holds just where the p-value is at
    most the rate.

    Args:
        calibration_scores: Scores of n held-out normal images.
        false_alarm_rate: Share of normal images that may be called anomalous, in (0, 1).

    Returns:
        `float`: The k-th largest score, k = floor(rate (n + 1)); infinity where n is too small to promise that rate.
    """
    ordered = np.sort(np.asarray(calibration_scores, dtype=np.float64))
    # 0.05 * 20 is 1.0000000000000002 in floats, and 0.07 * 100 is 7.000000000000001: a hair of slack keeps both counts
    # right.
    k = int(np.floor(false_alarm_rate * (len(ordered) + 1) + 1e-9))
    return float(ordered[-k]) if k else float("inf")


# ---- images ---------------------------------------------------------------------------------------------------------


def load_image(image: ImageInput, name: str = "image") -> torch.Tensor:
    """
    Reads any kind of image as RGB.

    Rotation tags are applied, transparency is composited on white, greyscale is repeated, 16-bit values keep their
    precision, and of an animation the first frame is taken (and said so).

    Args:
        image: A PIL image, a path, an array `(H, W)` or `(H, W, C)`, or a tensor `(H, W)` or `(C, H, W)`, with 1 to 4
            channels. Integer arrays are scaled by their type's range; float arrays lie in [0, 1].
        name: What to call the image in an error; a path is called by itself.

    Returns:
        `torch.Tensor` of shape `(3, H, W)`: uint8, or float32 in [0, 1] where 8 bits would lose something.

    Raises:
        InvalidImageError: If it cannot be read, has a side under 8 px, or holds values that are not finite or out of
            range.
        FileNotFoundError: If the path does not exist.
    """
    if isinstance(image, (str, os.PathLike)):
        name = os.fspath(image)
        tensor = _from_file(name)
    elif isinstance(image, Image.Image):
        tensor = _from_pil(image, name)
    elif isinstance(image, np.ndarray):
        channels_last = torch.from_numpy(np.ascontiguousarray(_native(image, name)))
        tensor = _from_values(channels_last.permute(2, 0, 1) if image.ndim == 3 else channels_last, name)
    elif isinstance(image, torch.Tensor):
        # Resized where all others are: a GPU resizes no bytes, and floats a little differently.
        tensor = _from_values(image.detach().cpu(), name)
    else:
        raise InvalidImageError(f"{name}: cannot inspect a {type(image).__name__}.")
    height, width = tensor.shape[-2:]
    if min(height, width) < _SMALLEST_SIDE:
        raise InvalidImageError(
            f"{name}: {width} x {height} px is too small; both sides need {_SMALLEST_SIDE} px or more."
        )
    return tensor


def resize_image(image: torch.Tensor, size: int) -> torch.Tensor:
    """
    Brings an image of [`load_image`] to the model's square resolution: bilinear, antialiased, the aspect ratio given
    up as in the reference.

    Args:
        image: `(3, H, W)`, uint8 or float in [0, 1].
        size: Side length in px.

    Returns:
        `torch.Tensor` of shape `(3, size, size)`: float32 in [0, 1].
    """
    if tuple(image.shape[-2:]) != (size, size):
        image = F.interpolate(image[None], size=(size, size), mode="bilinear", antialias=True)[0]
    return image.float() / 255 if image.dtype == torch.uint8 else image.float().clamp(0, 1)


def _from_file(path: str) -> torch.Tensor:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such image file.")
    if os.path.getsize(path) == 0:
        raise InvalidImageError(f"{path}: the file is empty (0 bytes).")
    try:
        with _WARNING_FILTERS, warnings.catch_warnings():
            # Pillow warns from 89 and refuses from 179 million px; only the refusal is of use here.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path)
        with image:
            if getattr(image, "n_frames", 1) > 1:
                logger.warning(f"{path}: has {image.n_frames} frames; the first one is inspected.")
            return _from_pil(image, path)
    except Image.DecompressionBombError as error:
        limit = 2 * Image.MAX_IMAGE_PIXELS
        raise InvalidImageError(f"{path}: declares more than {limit:,} px; shrink or crop it first.") from error
    except UnidentifiedImageError as error:
        raise InvalidImageError(f"{path}: not an image, or of a format that Pillow does not read.") from error
    except InvalidImageError:
        raise
    # Decoders raise whatever they stumble over: SyntaxError for PNG chunks, struct.error for TIFF, ...
    except Exception as error:
        raise InvalidImageError(f"{path}: damaged or truncated ({error}).") from error


def _from_pil(image: Image.Image, name: str) -> torch.Tensor:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        values = np.asarray(image, dtype=np.float32)
        if not np.isfinite(values).all():
            raise InvalidImageError(f"{name}: holds NaN or infinite values.")
        # Such files do not say their range: it is the smallest customary one that holds their values.
        smallest = 65535.0 if image.mode.startswith("I;16") else 1.0
        full = next((r for r in (1.0, 255.0, 65535.0) if r >= smallest and values.max(initial=0) <= r), None)
        if full is None or values.min(initial=0) < 0:
            raise InvalidImageError(
                f"{name}: values from {values.min():g} to {values.max():g} are no image; scale them to [0, 1]."
            )
        return _from_values(torch.from_numpy(values / full), name)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    # A copy: arrays made from images are read-only, which torch warns about.
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def _native(array: np.ndarray, name: str) -> np.ndarray:
    """The array in a type that torch knows: native byte order, no bool, no extended or half precision."""
    if array.dtype.kind == "b":
        return array.astype(np.uint8) * 255
    if array.dtype.kind == "f":
        return array.astype(np.float32)
    if array.dtype.kind not in "iu":
        raise InvalidImageError(f"{name}: an array of {array.dtype} is no image; give numbers.")
    return array.astype(array.dtype.newbyteorder("="))


def _from_values(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """`(H, W)` or `(C, H, W)` of any number type to `(3, H, W)`."""
    if tensor.ndim == 2:
        tensor = tensor[None]
    if tensor.ndim != 3 or tensor.shape[0] not in (1, 2, 3, 4) or 0 in tensor.shape:
        raise InvalidImageError(
            f"{name}: has shape {tuple(tensor.shape)} (channels first); an image has two axes, or three "
            "with 1 to 4 channels."
        )
    if tensor.dtype != torch.uint8:
        if tensor.is_floating_point():
            tensor = tensor.float()
        else:
            tensor = tensor.to(torch.float64).div(torch.iinfo(tensor.dtype).max).float()
        if not bool(torch.isfinite(tensor).all()):
            raise InvalidImageError(f"{name}: holds NaN or infinite values.")
        low, high = float(tensor.min()), float(tensor.max())
        if low < 0 or high > 1:
            raise InvalidImageError(
                f"{name}: values from {low:g} to {high:g}; floats must lie in [0, 1] (divide 8-bit values "
                "by 255), integers must not be negative."
            )
    if tensor.shape[0] in (2, 4):
        full = 255 if tensor.dtype == torch.uint8 else 1
        color, alpha = tensor[:-1].float(), tensor[-1:].float() / full
        tensor = (color * alpha + full * (1 - alpha)).to(tensor.dtype)
    return tensor.expand(3, -1, -1)


# ---- errors of memory -----------------------------------------------------------------------------------------------


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: an error of its own on a GPU, a `RuntimeError` among others elsewhere."""
    # In this order: PyTorch on Linux, on Windows, on Apple's GPU; oneDNN, cuDNN and cuBLAS, which say no more.
    words = ("can't allocate memory", "not enough memory", "out of memory")
    words += (
        "could not create a",
        "unable to find an engine",
        "CUDNN_STATUS_ALLOC_FAILED",
        "CUBLAS_STATUS_ALLOC_FAILED",
    )
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(word in str(error) for word in words)


# ---- errors of loading ----------------------------------------------------------------------------------------------


def _chain(error: BaseException | None) -> list[BaseException]:
    """An error and those behind it."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain


def _status(error: BaseException) -> int | None:
    """What the Hub answered, if it did."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _is_network_failure(error: BaseException) -> bool:
    """Whether the Hub could not be asked, or could not answer: no network, a broken connection, 429, 5xx."""
    # `HTTPError` is the base class of all that the client's HTTP library raises, whichever library that is.
    found = [e for e in _chain(error) if isinstance(e, (hub_errors.HTTPError, hub_errors.OfflineModeIsEnabled))]
    statuses = [_status(e) for e in found if _status(e) is not None]
    return bool(found) and all(status == 429 or status >= 500 for status in statuses)


def _may_pass(failure: BaseException) -> bool:
    """Whether trying again soon may help: not where no connection came about in the first place."""
    hopeless = ("ConnectError", "ConnectTimeout", "OfflineModeIsEnabled")
    return not any(type(e).__name__ in hopeless for e in _chain(failure))


def _explained(name: str, error: BaseException, kwargs: dict[str, Any]) -> OSError:
    """The error to raise for a load that failed: one line that names the model and says what to do."""
    chain = _chain(error)

    def has(*classes: type) -> bool:
        return any(isinstance(e, classes) for e in chain)

    url = f"{constants.ENDPOINT}/{name}"
    log_in = "log in with `hf auth login`, or pass token="
    # Diffusers' messages run over several lines and seldom name the model.
    said = " ".join(str(error).split())
    if any(getattr(e, "errno", None) == errno.ENOSPC for e in chain):
        reason = "the disk is full; free some space, or pass cache_dir= for another disk"
    elif has(hub_errors.GatedRepoError):
        reason = f"access is restricted; ask for it at {url}, then {log_in}"
    elif has(hub_errors.RevisionNotFoundError):
        reason = f"it has no branch, tag or commit '{kwargs.get('revision')}'; see {url}/tree/main for those it has"
    elif has(hub_errors.RepositoryNotFoundError):
        reason = f"no such model on the Hub, or a private one; check the name, or {log_in}"
    elif any(_status(e) == 401 for e in chain):
        reason = f"the Hub does not know your token; {log_in}"
    elif has(hub_errors.RemoteEntryNotFoundError):
        reason = f"the repo has no {DiffusionADPipeline.config_name}, so there is no pipeline in it"
    elif _is_network_failure(error):
        if has(hub_errors.OfflineModeIsEnabled):
            reason = "HF_HUB_OFFLINE is set and the cache holds no whole copy; unset it and load the model once"
        else:
            status = next((_status(e) for e in chain if _status(e)), None)
            said = " ".join(str(chain[-1]).split())
            what = f"answers {status}" if status else f"cannot be reached ({said})"
            reason = f"the Hub {what} and the cache holds no whole copy; check the network, or try again later"
    elif has(hub_errors.RevisionResolutionError, hub_errors.LocalEntryNotFoundError):
        reason = "the cache holds no whole copy; load the model once without local_files_only"
    elif has(SafetensorError) or any(
        words in said for words in ("no file named", "does not exist in", "`safetensors` weights", "weights lack")
    ):
        again = "copy it again" if os.path.isdir(name) else "load it once with force_download=True, or tell its owner"
        reason = f"the model is incomplete or damaged; {again} ({said})"
    else:
        reason = f"the model could not be loaded: {said}"
    return OSError(f"{name}: {reason}")


# ---- files ----------------------------------------------------------------------------------------------------------


def _package() -> str:
    """The installed package this module belongs to; empty where it runs as a repo's own code."""
    return "" if __name__.startswith("diffusers_modules") else __name__.rpartition(".")[0]


def _copy_module(cls: type, folder: Path) -> None:
    source = Path(inspect.getfile(sys.modules[cls.__module__]))
    target = folder / source.name
    if not (target.exists() and target.samefile(source)):
        shutil.copyfile(source, target)


def _drop_local_path(folder: Path) -> None:
    """Drops where a component was loaded from, which diffusers writes into its config: no business of its users."""
    for file in folder.glob("*config.json"):
        config = json.loads(file.read_text(encoding="utf-8"))
        if config.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
