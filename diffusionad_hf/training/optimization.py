"""Learning rates and averaged weights, step by step."""

import math
from collections.abc import Callable

import torch

from .arguments import TrainingConfig

# Their learning rates do not depend on the total number of steps.
STEADY_SCHEDULES = ("constant", "reference")


def learning_rates(args: TrainingConfig, step: int) -> tuple[float, float]:
    """The learning rates of UNet and segmenter at a step, counted from 0."""
    warmup = min(1.0, (step + 1) / args.lr_warmup_steps) if args.lr_warmup_steps else 1.0
    progress = step / args.max_train_steps
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    # The reference steps a CosineAnnealingLR with T_max = 10 once per batch: the rate oscillates with a period of 20.
    swing = 0.5 * (1 + math.cos(math.pi * step / 10))
    unet, segmenter = {
        "constant": (1.0, 1.0),
        "cosine": (cosine, cosine),
        "linear": (1 - progress, 1 - progress),
        "reference": (1.0, swing),
    }[args.lr_schedule]
    return args.unet_learning_rate * warmup * unet, args.segmenter_learning_rate * warmup * segmenter


def averaging(decay: float) -> Callable:
    """An update rule for `torch.optim.swa_utils.AveragedModel`: an exponential average with a warm-up."""

    @torch.no_grad()
    def update(averages, values, count) -> None:
        if not averages[0].is_floating_point():
            torch._foreach_copy_(averages, values)
            return
        # With the full decay, short trainings would hardly move away from the initial weights.
        now = min(decay, (1 + float(count)) / (10 + float(count)))
        torch._foreach_lerp_(averages, values, 1 - now)

    return update
