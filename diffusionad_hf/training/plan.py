"""What a training will do and how long it will take, from real steps on this device."""

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import PartialState
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import default_collate

from ..pipeline_diffusionad import _is_out_of_memory as is_out_of_memory
from ..verdicts_diffusionad import images_needed, percent
from .arguments import TrainingConfig
from .dataset import NormalImages
from .losses import DiffusionADObjective
from .outcome import FEWEST_HELD_OUT
from .progress import duration
from .steps import build_networks, prepare_batch
from .synthesis import AnomalySynthesizer

# A type whose matrix product takes this many times as long as that of float32 is not built into the device.
_SLOW = 3.0
# What bf16 must gain in a whole step, as it is less exact.
_WORTH_IT = 0.9
# Beyond every epoch of a training.
_EPOCH = 2**31
# Seconds: a first step that took longer is not repeated.
_LONG = 10.0
_NAMES = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class Plan:
    """
    How the steps are computed.

    Args:
        mixed_precision: `"no"`, `"bf16"` or `"fp16"`.
        train_batch_size: Images per process and forward pass that fit into the memory.
        gradient_accumulation_steps: Forward passes of that size per optimiser step.
        seconds_per_step: Measured.
        seconds_per_image: Measured, for inference.
        remarks: What is to be said of precision and memory.
    """

    mixed_precision: str
    train_batch_size: int
    gradient_accumulation_steps: int
    seconds_per_step: float = 0.0
    seconds_per_image: float = 0.0
    remarks: tuple[str, ...] = ()

    def lines(
        self, args: TrainingConfig, train: int, held_out: int, size: tuple[int, int], seconds: float
    ) -> list[str]:
        """The plan in five lines; `seconds` is how long all of it will take."""
        device, count = PartialState().device, PartialState().num_processes
        names = {
            "cpu": lambda: f"CPU, {torch.get_num_threads()} thread(s)",
            "cuda": lambda: torch.cuda.get_device_name(device),
        }
        name = names.get(device.type, lambda: str(device))()
        precision = ", ".join([_NAMES[self.mixed_precision], *self.remarks])
        images = args.train_batch_size * args.gradient_accumulation_steps * count
        rate = max(args.false_alarm_rate, 1 / (held_out + 1))
        promise = f"which promise a false-alarm rate of {percent(rate)} at best"
        if held_out < images_needed(args.false_alarm_rate):
            promise += f" ({percent(args.false_alarm_rate)} takes {2 * images_needed(args.false_alarm_rate)} photos)"
        if held_out < FEWEST_HELD_OUT:
            promise += (
                f"; too few to show that it has learnt: all verdicts will be undecided, give {2 * FEWEST_HELD_OUT} "
                "photos or more"
            )
        return [
            f"Device:  {name}" + (f", {count} processes" if count > 1 else ""),
            f"Preset:  {args.preset}, {size[1]} x {size[0]} px, {precision}",
            f"Steps:   {args.max_train_steps} of {images} photos, {self.seconds_per_step:.2g} s each",
            f"Photos:  {train} to train on, {held_out} held out, {promise}",
            f"Time:    about {duration(seconds)}",
        ]


@dataclass(frozen=True)
class Counts:
    """How much there is to do: images of a validation, images to calibrate on, test images."""

    args: TrainingConfig
    validated: int
    held_out: int
    tested: int

    def seconds_left(self, plan: Plan, step: int) -> float:
        """Seconds from a step on until the model is calibrated and evaluated."""
        steps, every = self.args.max_train_steps, self.args.validation_steps
        validations = -(-steps // every) - step // every if step < steps else 0
        # The last one is repeated with the weights as they were saved.
        images = (validations + 1) * self.validated + self.held_out + self.tested
        return (steps - step) * plan.seconds_per_step + images * plan.seconds_per_image


def probe(args: TrainingConfig, train_set: NormalImages, synthesizer: AnomalySynthesizer, former: Plan | None) -> Plan:
    """
    Finds the fastest precision and the largest batch that fit, by a real step of each, and how long they take.

    Call it before the seed is set.

    Args:
        former: What the training that is gone on with had found: kept, and only timed.

    Raises:
        MemoryError: If not even one image fits.
    """
    device = PartialState().device
    asked = args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION")
    start = Plan(asked or "no", args.train_batch_size, args.gradient_accumulation_steps)
    if former is not None:
        start = replace(former, mixed_precision=args.mixed_precision or former.mixed_precision)
    remarks = []
    ratio = _times_slower(device, torch.bfloat16)
    if ratio > _SLOW:
        slow = f"bfloat16 is {ratio:.0f} times slower here"
        remarks.append(f"{slow}: leave --mixed-precision out" if start.mixed_precision == "bf16" else slow)
    plan = _fit(args, train_set, synthesizer, device, start, may_shrink=former is None)
    if former is None and asked is None and ratio <= _SLOW:
        half = _fit(args, train_set, synthesizer, device, replace(plan, mixed_precision="bf16"), may_shrink=False)
        if half.seconds_per_step < _WORTH_IT * plan.seconds_per_step:
            remarks.append(f"{plan.seconds_per_step / half.seconds_per_step:.1f} times as fast as float32")
            plan = half
    if plan.train_batch_size < args.train_batch_size:
        remarks.append(f"{plan.train_batch_size} photos at a time, as no more fit into the memory")
    return replace(plan, remarks=tuple(remarks))


def _times_slower(device: torch.device, dtype: torch.dtype) -> float:
    """How many times as long a matrix product takes as in float32; infinite if the device cannot do it at all."""

    def seconds(kind: torch.dtype) -> float:
        a = torch.ones(256, 256, device=device, dtype=kind)
        return min(_timed(lambda: a @ a, device) for _ in range(5))

    try:
        return seconds(dtype) / seconds(torch.float32)
    except RuntimeError:
        return math.inf


def _timed(work: Callable[[], object], device: torch.device) -> float:
    wait = (lambda: torch.accelerator.synchronize(device)) if device.type != "cpu" else (lambda: None)
    wait()
    started = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - started


def _fit(
    args: TrainingConfig,
    train_set: NormalImages,
    synthesizer: AnomalySynthesizer,
    device: torch.device,
    plan: Plan,
    may_shrink: bool,
) -> Plan:
    """The plan with its times; with a smaller batch and as many more passes if its own does not fit."""
    least = 2 if args.resolution == 32 else 1
    for batch in range(plan.train_batch_size, 0, -1):
        passes, rest = divmod(plan.train_batch_size, batch)
        if rest or (batch < least and batch < plan.train_batch_size):
            continue
        try:
            step, image = _measure(args, train_set, synthesizer, device, plan.mixed_precision, batch)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if may_shrink:
                continue
            break
        passes *= plan.gradient_accumulation_steps
        return replace(
            plan,
            train_batch_size=batch,
            gradient_accumulation_steps=passes,
            seconds_per_step=step * passes,
            seconds_per_image=image,
        )
    height, width = train_set.size
    raise MemoryError(
        f"a step on images of {width} x {height} px does not fit into the memory of {device}: give "
        "`gradient_checkpointing`, a smaller `image_size` or another `preset`."
    )


def _measure(
    args: TrainingConfig,
    train_set: NormalImages,
    synthesizer: AnomalySynthesizer,
    device: torch.device,
    precision: str,
    batch_size: int,
) -> tuple[float, float]:
    """Seconds of a step on one batch, and of inspecting one image, once warm."""
    # Compiling would take longer than all that is measured.
    pipe = build_networks(replace(args, compile=False, init_from=None), train_set.size).to(device)
    pipe.set_progress_bar_config(disable=True)
    objective = DiffusionADObjective(pipe.unet, pipe.segmenter, pipe.scheduler, args.detach_reconstruction).train()
    optimizer = torch.optim.Adam(objective.parameters(), lr=0.0)
    averaged = AveragedModel(objective) if args.ema_decay else None  # takes its part of the memory
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16

    def step() -> None:
        batch: dict[str, Any] = default_collate([train_set[_EPOCH, i % len(train_set)] for i in range(batch_size)])
        inputs = prepare_batch(batch, synthesizer, pipe.scheduler, device, args.seed)
        with torch.autocast(device.type, dtype, enabled=precision != "no"):
            losses = objective(**inputs)
        losses["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    seconds = _timed(step, device)
    if seconds < _LONG:  # the first one also allocates and compiles
        seconds = _timed(step, device)
    image = train_set.pixels(0)[None]
    objective.eval()
    pipe(image)
    del averaged
    return seconds, _timed(lambda: pipe(image), device)
