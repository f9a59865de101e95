"""What a step of the training works on: the networks, and a batch with its anomalies, noise and timesteps."""

import numpy as np
import torch

from ..pipeline_diffusionad import DiffusionADPipeline
from ..presets import build_pipeline
from ..scheduling_norm_guided import NormGuidedScheduler
from .arguments import TrainingConfig
from .synthesis import AnomalySynthesizer, Textures


def build_networks(args: TrainingConfig, size: tuple[int, int] | None = None) -> DiffusionADPipeline:
    """The pipeline to train on images of a size (H, W), with random weights or those of `init_from`."""
    pipe = build_pipeline(args.architecture, args.resolution, args.prediction_type, size)
    if args.init_from is not None:
        start_from(args.init_from, pipe)
    for network in (pipe.unet, pipe.segmenter):
        if args.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        if args.channels_last:
            network.to(memory_format=torch.channels_last)
        if args.compile:
            # In place, which keeps the names of the weights.
            network.compile()
    return pipe


def start_from(model: str, pipe: DiffusionADPipeline) -> None:
    """Loads the weights of another pipeline; raises `ValueError` if its networks differ."""
    source = DiffusionADPipeline.from_pretrained(model, dtype=torch.float32)
    theirs, ours = (p.scheduler.config.prediction_type for p in (source, pipe))
    if theirs != ours:
        raise ValueError(
            f"`init_from` {model}: its UNet predicts {theirs}, not {ours}; give `prediction_type` {theirs}."
        )
    pipe.register_to_config(training_digests=source.config.training_digests)
    for name in ("unet", "segmenter"):
        try:
            getattr(pipe, name).load_state_dict(getattr(source, name).state_dict())
        except RuntimeError as error:
            raise ValueError(
                f"`init_from` {model}: its {name} has another size; give its `architecture` and `image_size`."
            ) from error
    # With the padding that its weights were trained with.
    pipe.register_modules(unet=source.unet)


def build_synthesizer(
    args: TrainingConfig, textures: Textures, kind: str, anomaly_probability: float = 0.5
) -> AnomalySynthesizer:
    """The maker of anomalies on photos of an `"object"` or a `"texture"`."""
    return AnomalySynthesizer(
        textures,
        seed=args.seed,
        anomaly_probability=anomaly_probability,
        self_augmentation_probability=0.5 if kind == "object" else 0.0,
        line_probability=args.line_probability,
        displaced_probability=args.displaced_probability,
        erased_probability=args.erased_probability,
    )


def prepare_batch(
    batch: dict[str, torch.Tensor],
    synthesizer: AnomalySynthesizer,
    scheduler: NormGuidedScheduler,
    device: torch.device,
    seed: int,
) -> dict[str, torch.Tensor]:
    """
    Synthesises the anomalies of a batch and draws its noise and timesteps.

    Everything random about a sample depends only on the seed, the epoch and its index: not on the number of processes,
    nor on whether the training was resumed.
    """
    # Asynchronous, as the loader pins its memory.
    batch = {
        name: values.to(device, non_blocking=True) if name in ("image", "foreground") else values
        for name, values in batch.items()
    }
    foreground = batch.get("foreground")
    made = []
    # A batch may contain the end of one epoch and the start of the next.
    for epoch in batch["epoch"].unique(sorted=True).tolist():
        rows = (batch["epoch"] == epoch).nonzero()[:, 0]
        allowed = None if foreground is None else foreground[rows]
        made.append(synthesizer(batch["image"][rows], batch["index"][rows].tolist(), epoch, allowed))
    images = torch.cat([part.images for part in made])
    drawing, timing = torch.Generator(device), torch.Generator()
    noise, timesteps, chance = [], [], []
    for epoch, index in zip(batch["epoch"].tolist(), batch["index"].tolist(), strict=True):
        words = np.random.SeedSequence((seed, epoch, index)).generate_state(3)
        shape = (2, *images.shape[1:])
        noise.append(torch.randn(shape, generator=drawing.manual_seed(int(words[0])), device=device))
        timesteps.append(torch.cat(scheduler.sample_timesteps(1, generator=timing.manual_seed(int(words[1])))))
        chance.append(float(words[2]) / 2**32)
    small, big = torch.stack(timesteps, dim=1).to(device)
    return {
        "images": images,
        "masks": torch.cat([part.masks for part in made]),
        "labels": torch.cat([part.labels for part in made]),
        "noise": torch.stack(noise, dim=1),
        "timesteps_small": small,
        "timesteps_big": big,
        "index": batch["index"].to(device),
        "chance": torch.tensor(chance, device=device),
    }
