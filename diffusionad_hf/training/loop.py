"""Trains DiffusionAD on one category, or on all categories of a dataset one after another.

accelerate launch training/train.py --data-dir D --category C --output-dir O
"""

import logging
import math
import os
import signal
import sys
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import parse_flag_from_env, set_seed
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

from ..calibration import promised_rate
from ..files import restore_folder
from ..flags import as_flags
from ..pipeline_diffusionad import DiffusionADPipeline
from ..presets import build_pipeline
from ..scheduling_norm_guided import NormGuidedScheduler
from ..verdicts_diffusionad import images_needed
from .arguments import TrainingConfig, parse_arguments
from .categories import ALL, check_publishing, train_all, train_and_publish
from .checkpoints import (
    find_checkpoint,
    load_checkpoint,
    refuse_former_training,
    save_checkpoint,
)
from .dataset import NormalImages, StepSampler, split_holdout
from .images import load_images
from .losses import DiffusionADObjective
from .memory import keep_freed_memory
from .optimization import averaging, learning_rates
from .outcome import Curve, Validation, finish, validate
from .processes import together
from .synthesis import AnomalySynthesizer, Textures
from .textures import FolderTextures, ProceduralTextures

logger = logging.getLogger("training")

INTERRUPTED = 130
_LOSSES = ("loss", "noise", "focal", "smooth_l1")
# How long processes wait for the main one while it validates or publishes.
_PATIENCE = timedelta(hours=3)


def main(argv: list[str] | None = None, prog: str = "train.py") -> int:
    """Runs a training from the command line of `prog`; returns the exit code."""
    handler = logging.StreamHandler()
    handler.setFormatter(_FlagFormatter("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    # The HTTP library of either version of the Hub client logs every request, Accelerate every file it saves.
    for name in ("httpx", "httpx2", "accelerate"):
        logging.getLogger(name).setLevel(logging.WARNING)
    args = parse_arguments(argv, prog)
    try:
        if args.push_to_hub:
            check_publishing(args)
        start_processes()
        with Interrupt() as interrupt:
            run = train_all if args.category == ALL else train_and_publish
            return run(args, partial(train, interrupt=interrupt))
    except (OSError, ValueError, ImportError) as error:
        # One line for what the user can fix; anything else is a bug and keeps its traceback.
        if int(os.environ.get("RANK", 0)) == 0:
            print(as_flags(f"{prog}: error: {error}"), file=sys.stderr)
        return 2
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


class _FlagFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return as_flags(super().format(record))


def start_processes() -> None:
    """Joins the processes that were launched together; only the main one logs."""
    # Without an accelerator, several processes share the CPU, whatever the launcher said.
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state = PartialState(cpu=cpu, timeout=_PATIENCE)
    if not state.is_main_process:
        logging.disable(logging.ERROR)
    if state.device.type == "cpu":
        keep_freed_memory()


def train(args: TrainingConfig, interrupt: "Interrupt") -> int:
    """Trains on one category and writes the calibrated pipeline; returns the exit code."""
    output_dir = Path(args.output_dir)
    together(lambda: output_dir.mkdir(parents=True, exist_ok=True))
    trackers = None if args.report_to == "none" else args.report_to
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=trackers,
        project_dir=str(output_dir / "logs"),
    )
    found = together(lambda: find_start(args, output_dir))
    set_seed(args.seed)

    # 1. Data: images to train on, held-out ones to choose and calibrate the model with, and synthetic anomalies.
    train_set, held_out, synthesizer, validation = together(lambda: prepare_data(args))

    # 2. Networks, optimiser, averaged weights.
    pipe = together(lambda: build_networks(args, train_set.size))
    if found is None and pipe.segmenter.config.get("memory_size"):
        logger.info("Filling the memory with features of normal images.")
        pipe.segmenter.to(accelerator.device).remember(train_set.pixels(i) for i in range(len(train_set)))
    objective = DiffusionADObjective(pipe.unet, pipe.segmenter, pipe.scheduler, args.detach_reconstruction).train()
    groups = [
        {"params": list(pipe.unet.parameters()), "lr": args.unet_learning_rate},
        {"params": list(pipe.segmenter.parameters()), "lr": args.segmenter_learning_rate},
    ]
    optimizer = torch.optim.Adam(groups, fused=accelerator.device.type == "cuda")
    objective, optimizer = accelerator.prepare(objective, optimizer)
    plain = accelerator.unwrap_model(objective)
    averaged = None
    if args.ema_decay:
        averaged = AveragedModel(plain, multi_avg_fn=averaging(args.ema_decay), use_buffers=True)
        accelerator.register_for_checkpointing(averaged)

    # 3. Resume, or start afresh.
    arguments = vars(args) | {
        "mixed_precision": accelerator.mixed_precision,
        "prediction_type": pipe.scheduler.config.prediction_type,
    }
    launched = {"num_processes": accelerator.num_processes}
    state: dict[str, Any] = {"step": 0, "best": None, "losses": {}}
    if found is not None:
        state = together(lambda: load_checkpoint(accelerator, found, arguments | launched))
        logger.info(f"Resumed from {found}.")
    state["arguments"] = arguments | launched
    if trackers is not None:
        accelerator.init_trackers("diffusionad", config={k: v for k, v in arguments.items() if v is not None})

    accumulated = args.gradient_accumulation_steps
    batches = range(state["step"] * accumulated, args.max_train_steps * accumulated)
    sampler = StepSampler(
        len(train_set), args.train_batch_size, batches, args.seed, accelerator.process_index, accelerator.num_processes
    )
    loader = DataLoader(
        train_set,
        batch_sampler=sampler,
        num_workers=args.dataloader_num_workers,
        pin_memory=accelerator.device.type == "cuda",
    )
    curve = Curve(output_dir / "training_curve.csv", state["step"])

    # 4. The loop.
    running: dict[str, float] = state["losses"]
    running.pop("distillation", None)  # of an earlier version
    parts: list[torch.Tensor] = []
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    done, silent = state["step"], not accelerator.is_main_process
    with tqdm(total=args.max_train_steps, initial=done, desc="training", disable=silent) as bar:
        for batch in loader:
            with accelerator.accumulate(objective):
                for group, rate in zip(optimizer.param_groups, learning_rates(args, state["step"]), strict=True):
                    group["lr"] = rate
                inputs = prepare_batch(batch, synthesizer, pipe.scheduler, accelerator.device, args.seed)
                losses = objective(**inputs)
                accelerator.backward(losses["loss"])
                if args.max_grad_norm and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(objective.parameters(), args.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            seen.append((inputs["images"], batch["index"]))
            parts.append(torch.stack([losses[name].detach() for name in _LOSSES]))
            if not accelerator.sync_gradients:
                continue
            # The only transfer from the device per step; all processes agree on whether to stop.
            stop = torch.full_like(parts[0][:1], interrupt.requested)
            *values, stop = accelerator.reduce(torch.cat([torch.stack(parts).mean(0), stop]), "mean").tolist()
            for name, value in zip(_LOSSES, values, strict=True):
                if not math.isfinite(value):
                    refuse_broken(accelerator, seen, train_set, state["step"])
                    raise ValueError(
                        f"the {name} loss is {value} at step {state['step']}: lower the learning rates, or train with "
                        f"`mixed_precision` no. The checkpoints so far are in {output_dir}."
                    )
                # An exponential average, because single batches are noisy.
                running[name] = value if name not in running else 0.95 * running[name] + 0.05 * value
            parts.clear()
            seen.clear()
            state["step"] += 1
            if averaged is not None:
                averaged.update_parameters(plain)
            bar.update()
            bar.set_postfix({name: f"{value:.4f}" for name, value in running.items()})
            accelerator.log({f"train/{name}": value for name, value in running.items()}, step=state["step"])

            last = state["step"] == args.max_train_steps
            if last or state["step"] % args.validation_steps == 0:
                source = averaged.module if averaged is not None else plain
                metrics = together(partial(validate, source, validation, output_dir, state), main_only=True)
                if metrics is not None:
                    curve.write(state["step"], running, metrics)
                    accelerator.log(
                        {f"validation/{name}": value for name, value in metrics.items()}, step=state["step"]
                    )
                    bar.write(f"step {state['step']}: " + ", ".join(f"{k} {v:.4f}" for k, v in metrics.items()))
            if last or stop or state["step"] % args.checkpointing_steps == 0:
                save_checkpoint(accelerator, output_dir, state, args.checkpoints_total_limit)
            if stop and not last:
                break
    for tracker in accelerator.trackers:
        tracker.finish()
    if state["step"] < args.max_train_steps:
        logger.info(f"Interrupted at step {state['step']}; resume with `resume_from_checkpoint` latest.")
        return INTERRUPTED

    # 5. The best weights, calibrated on the held-out normal images.
    together(lambda: finish(args, arguments, train_set, held_out, validation, accelerator.device), main_only=True)
    return 0


def find_start(args: TrainingConfig, output_dir: Path) -> Path | None:
    """The checkpoint to resume from, or `None`; refuses to start a new training in the folder of another one."""
    if not args.resume_from_checkpoint:
        refuse_former_training(output_dir)
        return None
    restore_folder(output_dir / "best")
    found = find_checkpoint(output_dir, args.resume_from_checkpoint)
    if found is None:
        logger.info(f"No checkpoint in {output_dir} yet: starting afresh.")
    return found


def prepare_data(args: TrainingConfig) -> tuple[NormalImages, NormalImages, AnomalySynthesizer, Validation]:
    """The training set, the held-out set, the synthesizer of anomalies and the validation."""
    normal, kind = load_images(args)
    masks, size, needed = normal.foregrounds, normal.size, images_needed(args.false_alarm_rate)
    train_set, held_out = (
        NormalImages(Subset(normal.images, rows), size, None if masks is None else Subset(masks, rows))
        for rows in split_holdout(len(normal), args.holdout_fraction, args.seed, needed)
    )
    logger.info(
        f"{len(train_set)} normal images to train on, {len(held_out)} held out, treated as images of {kind}s "
        f"at {size[1]} x {size[0]} px."
    )
    # Said now, and not after hours.
    promised_rate(len(held_out), args.false_alarm_rate)
    if len(train_set) < args.train_batch_size:
        logger.warning(f"`train_batch_size` {args.train_batch_size}: every batch holds some image more than once.")
    textures: Textures = (
        ProceduralTextures(size, seed=args.seed)
        if args.texture_dir is None
        else FolderTextures(args.texture_dir, size)
    )
    anomalies: dict[str, Any] = {
        "seed": args.seed,
        "self_augmentation_probability": 0.5 if kind == "object" else 0.0,
        "line_probability": args.line_probability,
        "displaced_probability": args.displaced_probability,
        "erased_probability": args.erased_probability,
    }
    validation = Validation(held_out, AnomalySynthesizer(textures, anomaly_probability=1.0, **anomalies))
    return train_set, held_out, AnomalySynthesizer(textures, **anomalies), validation


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
    for name in ("unet", "segmenter"):
        try:
            getattr(pipe, name).load_state_dict(getattr(source, name).state_dict())
        except RuntimeError as error:
            raise ValueError(
                f"`init_from` {model}: its {name} has another size; give its `architecture` and `image_size`."
            ) from error


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


def refuse_broken(
    accelerator: Accelerator, seen: list[tuple[torch.Tensor, torch.Tensor]], train_set: NormalImages, step: int
) -> None:
    """Raises a `ValueError` that names the sample, if an image of this step is not finite: no learning rate helps."""
    broken = [torch.where(images.isfinite().flatten(1).all(1), -1, index.to(images.device)) for images, index in seen]
    for index in accelerator.gather(torch.cat(broken)).tolist():
        if index >= 0:
            subset: Any = train_set.images
            row = subset.indices[index]
            raise ValueError(
                f"training image {row} ({subset.dataset.names[row]}) is not finite at step {step}, once its anomaly "
                "is made: a bug in the synthesis, please report it with this line and the options of the run."
            )


class Interrupt:
    """On the first SIGINT or SIGTERM, requests a stop after the current step; the second one acts as usual."""

    _SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> "Interrupt":
        self._former = {number: signal.signal(number, self._request) for number in self._SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _request(self, *_: object) -> None:
        self.requested = True
        for number, handler in self._former.items():
            signal.signal(number, handler)
        print("\nStopping after this step, with a checkpoint; press again to stop at once.", file=sys.stderr)
