"""Trains DiffusionAD on one category, or on all categories of a dataset one after another.

accelerate launch training/train.py --data-dir D --category C --output-dir O
"""

import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import gather_object, parse_flag_from_env, set_seed
from diffusers.utils.logging import disable_progress_bar
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

from ..files import escape_output, one_line, restore_folder
from ..flags import as_flags
from ..pipeline_diffusionad import DiffusionADPipeline
from ..verdicts_diffusionad import images_needed
from .arguments import TrainingConfig, parse_arguments
from .categories import ALL, check_publishing, train_all, train_and_publish
from .checkpoints import check_same_data, describe_data, find_checkpoint, former_plan, load_checkpoint, save_checkpoint
from .dataset import NormalImages, StepSampler, split_holdout
from .look import Photos, look, save_kinds
from .losses import DiffusionADObjective
from .memory import keep_freed_memory
from .optimization import averaging, learning_rates
from .outcome import CURVE_FILE, Curve, Validation, conclude, finish, finish_so_far, observe
from .plan import Counts, probe
from .preview import save_preview
from .processes import EXPECTED, together
from .progress import Progress, ProgressFile
from .steps import build_networks, build_synthesizer, prepare_batch
from .synthesis import AnomalySynthesizer, Textures
from .textures import FolderTextures, ProceduralTextures

logger = logging.getLogger("training")

INTERRUPTED = 130
_LOSSES = ("loss", "noise", "focal", "smooth_l1")
# How long processes wait for the main one while it validates or publishes.
_PATIENCE = timedelta(hours=3)
PREVIEW_FILE = "preview.png"


def train(
    photos: str | os.PathLike | None = None,
    config: TrainingConfig | None = None,
    *,
    callbacks: Sequence[Callable[[Progress], object]] = (),
) -> DiffusionADPipeline:
    """
    Trains on normal photos of one product, as `diffusionad train` does; called again, it goes on where it stopped.

    Args:
        photos: Their folder, or a Hub dataset id; `config.data_dir` if left out.
        config: The options.
        callbacks: Called with the [`Progress`] at every step and change. `progress.stop()` ends the training after the
            step, as Ctrl-C does, with what was learnt so far.

    Returns:
        `DiffusionADPipeline`: Calibrated, on the CPU or GPU that it was trained on; it lies in `config.output_dir`.

    Raises:
        ValueError: If an option or the photos make no sense.
        OSError: If something cannot be read or written.
        MemoryError: If not even one image fits into the memory.
        KeyboardInterrupt: If it was interrupted so early or fast that there is no model.
    """
    config = config or TrainingConfig()
    if photos is not None:
        config = replace(config, data_dir=os.fspath(photos))
    if config.data_dir is None:
        raise ValueError("`data_dir`: give a folder of normal photos.")
    if config.category == ALL:
        raise ValueError(f"`category` {ALL}: train one category at a time, or use the command line.")
    if config.push_to_hub:
        check_publishing(config)
    start_processes()
    code = train_and_publish(config, partial(train_category, callbacks=callbacks))
    if code and not Path(config.output_dir, "model_index.json").is_file():
        raise KeyboardInterrupt
    return DiffusionADPipeline.from_pretrained(config.output_dir, dtype=torch.float32).to(PartialState().device)


def main(argv: list[str] | None = None, prog: str = "train.py") -> int:
    """Runs a training from the command line of `prog`; returns the exit code."""
    escape_output()
    handler = logging.StreamHandler()
    handler.setFormatter(_FlagFormatter("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    # The HTTP library of either version of the Hub client logs every request, Accelerate every file it saves.
    for name in ("httpx", "httpx2", "accelerate"):
        logging.getLogger(name).setLevel(logging.WARNING)
    disable_progress_bar()
    args = parse_arguments(argv, prog)
    try:
        if args.push_to_hub:
            check_publishing(args)
        start_processes()
        return (train_all if args.category == ALL else train_and_publish)(args, train_category)
    except KeyboardInterrupt:
        print(f"{prog}: interrupted; the same command goes on where it was.", file=sys.stderr)
        return INTERRUPTED
    except EXPECTED as error:
        # One line for what the user can fix; anything else is a bug and keeps its traceback.
        if int(os.environ.get("RANK", 0)) == 0:
            print(as_flags(f"{prog}: error: {one_line(error)}"), file=sys.stderr)
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


def train_category(args: TrainingConfig, callbacks: Sequence[Callable[[Progress], object]] = ()) -> int:
    """Trains on one category and writes the calibrated pipeline; returns the exit code."""
    output_dir, progress = Path(args.output_dir), Progress(steps=args.max_train_steps)
    together(lambda: output_dir.mkdir(parents=True, exist_ok=True))
    if PartialState().is_main_process:
        progress.tell([ProgressFile(output_dir), *callbacks])
    try:
        return _train(args, output_dir, progress)
    except KeyboardInterrupt:
        progress.update(phase="stopped")
        raise
    except Exception as error:
        progress.update(phase="failed", error=as_flags(one_line(error)))
        raise


def _train(args: TrainingConfig, output_dir: Path, progress: Progress) -> int:
    say = print if PartialState().is_main_process else (lambda *_, **__: None)
    progress.update()
    found = together(lambda: find_start(args, output_dir))

    # 1. Data: images to train on, held-out ones to choose and calibrate the model with, and synthetic anomalies.
    photos = together(lambda: look(args))
    train_set, held_out, synthesizer, validation = together(lambda: prepare_data(args, photos))
    data = together(lambda: describe_data(held_out, synthesizer.texture_digest, args.foreground_dir is not None))
    if found is not None:
        together(lambda: check_same_data(found, data))
    together(lambda: show_photos(args, photos, output_dir, progress), main_only=True)
    for note in progress.notes:
        say(note, flush=True)

    # 2. The plan, from real steps.
    progress.update(phase="probing")
    former, done = (None, 0) if found is None else former_plan(found)
    plans = gather_object([together(lambda: probe(args, train_set, synthesizer, former))])
    # All processes go by one of them: the one with the least memory.
    plan = min(plans, key=lambda plan: plan.train_batch_size)
    counts = Counts(args, len(validation.images), len(held_out), len(photos.test))
    left = counts.seconds_left(plan, done)
    progress.update(
        plan=plan.lines(args, len(train_set), len(held_out), train_set.size, left), step=done, seconds_left=left
    )
    say("\n".join(progress.plan), flush=True)
    # Another training in this process may have had another precision.
    AcceleratorState._reset_state()
    trackers = None if args.report_to == "none" else args.report_to
    accelerator = Accelerator(
        mixed_precision=plan.mixed_precision,
        gradient_accumulation_steps=plan.gradient_accumulation_steps,
        log_with=trackers,
        project_dir=str(output_dir / "logs"),
    )
    set_seed(args.seed)

    # 3. Networks, optimiser, averaged weights.
    pipe = together(lambda: build_networks(args, train_set.size))
    together(lambda: refuse_held_out(args, pipe, held_out))
    if found is None and pipe.segmenter.config.get("memory_size"):
        progress.update(phase="remembering")
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

    # 4. Resume, or start afresh.
    arguments = vars(args) | {
        "mixed_precision": accelerator.mixed_precision,
        "prediction_type": pipe.scheduler.config.prediction_type,
    }
    launched = {
        "num_processes": accelerator.num_processes,
        "padding_mode": pipe.unet.config.get("padding_mode", "zeros"),
    }
    state: dict[str, Any] = {"step": 0, "best": None, "losses": {}}
    if found is not None:
        state = together(lambda: load_checkpoint(accelerator, found, arguments | launched))
        logger.info(f"Resumed from {found}.")
    state["arguments"] = arguments | launched
    state |= {"plan": asdict(plan), "data": data}
    if trackers is not None:
        accelerator.init_trackers("diffusionad", config={k: v for k, v in arguments.items() if v is not None})

    accumulated = plan.gradient_accumulation_steps
    batches = range(state["step"] * accumulated, args.max_train_steps * accumulated)
    sampler = StepSampler(
        len(train_set), plan.train_batch_size, batches, args.seed, accelerator.process_index, accelerator.num_processes
    )
    loader = DataLoader(
        train_set,
        batch_sampler=sampler,
        num_workers=args.dataloader_num_workers,
        pin_memory=accelerator.device.type == "cuda",
    )
    curve = Curve(output_dir / CURVE_FILE, state["step"])

    # 5. The loop.
    running: dict[str, float] = state["losses"]
    running.pop("distillation", None)  # of an earlier version
    parts: list[torch.Tensor] = []
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    started, silent = time.monotonic(), not accelerator.is_main_process
    progress.update(phase="training", validation=state["best"])
    bar = tqdm(total=args.max_train_steps, initial=done, desc="training", disable=silent)
    with bar, Interrupt() as interrupt:
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
            stop = torch.full_like(parts[0][:1], interrupt.requested or progress.stopping)
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
            now = {} if progress.validation is None else {"validation": f"{progress.validation['score']:.3f}"}
            bar.set_postfix({"loss": f"{running['loss']:.4f}", **now})
            # The probe counts as one step, so that the first ones do not decide alone.
            per_step = (plan.seconds_per_step + time.monotonic() - started) / (1 + state["step"] - done)
            left = counts.seconds_left(replace(plan, seconds_per_step=per_step), state["step"])
            progress.update(step=state["step"], loss=running["loss"], seconds_left=left)
            accelerator.log({f"train/{name}": value for name, value in running.items()}, step=state["step"])

            # What was asked for since the processes agreed: a single one need not wait for another step.
            stop = stop or (accelerator.num_processes == 1 and (interrupt.requested or progress.stopping))
            last = state["step"] == args.max_train_steps
            source = averaged.module if averaged is not None else plain
            validates = last or state["step"] % args.validation_steps == 0
            if validates or state["step"] % max(1, args.max_train_steps // 10) == 0:
                observing = partial(observe, source, validation, output_dir, state, progress, validates)
                if metrics := together(observing, main_only=True):
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

    # 6. The best weights, calibrated on the held-out normal images.
    stopped = state["step"] < args.max_train_steps
    if stopped:
        logger.info(f"Stopped at step {state['step']}; the same command goes on from there.")
        if any(gather_object([interrupt.in_a_hurry])):
            progress.update(phase="stopped")
            return INTERRUPTED
        logger.info("Writing a model of what was learnt so far; press again to do without.")
    progress.update(phase="calibrating", seconds_left=counts.seconds_left(plan, args.max_train_steps))
    ending = partial(finish, args, arguments, train_set, held_out, validation, pipe)

    def end() -> None:
        if stopped:
            pipe = finish_so_far(ending, source, validation, output_dir, state)
        else:
            pipe = ending(output_dir / "best", complete=True)
        conclude(pipe, args, photos, validation, progress, stopped)

    together(end, main_only=True)
    return INTERRUPTED if stopped else 0


def find_start(args: TrainingConfig, output_dir: Path) -> Path | None:
    """The checkpoint to go on from, or `None` if there is none yet."""
    restore_folder(output_dir / "best")
    return find_checkpoint(output_dir, args.resume_from_checkpoint)


def prepare_data(
    args: TrainingConfig, photos: Photos
) -> tuple[NormalImages, NormalImages, AnomalySynthesizer, Validation]:
    """The training set, the held-out set, the synthesizer of anomalies and the validation."""
    normal, needed = photos.normal, images_needed(args.false_alarm_rate)
    masks, size = normal.foregrounds, normal.size
    train_set, held_out = (
        normal.only(rows, Subset(normal.images, rows), None if masks is None else Subset(masks, rows))
        for rows in split_holdout(len(normal), args.holdout_fraction, args.seed, needed)
    )
    if len(train_set) < args.train_batch_size:
        logger.warning(f"`train_batch_size` {args.train_batch_size}: every batch holds some image more than once.")
    textures: Textures = (
        ProceduralTextures(size, seed=args.seed)
        if args.texture_dir is None
        else FolderTextures(args.texture_dir, size)
    )
    validation = Validation(held_out, build_synthesizer(args, textures, photos.kind, anomaly_probability=1.0))
    return train_set, held_out, build_synthesizer(args, textures, photos.kind), validation


def refuse_held_out(args: TrainingConfig, pipe: DiffusionADPipeline, held_out: NormalImages) -> None:
    """Raises `ValueError` if the weights to begin with have seen images that are held out to calibrate on."""
    seen = sum(pipe.trained_on(held_out.pixels(i)) for i in range(len(held_out))) if args.init_from is not None else 0
    if seen:
        raise ValueError(
            f"`init_from` {args.init_from}: was trained on {seen} of the {len(held_out)} images that are held out "
            "here to calibrate on; give the `seed` and `false_alarm_rate` of that training, or other images."
        )


def show_photos(args: TrainingConfig, photos: Photos, output_dir: Path, progress: Progress) -> None:
    """Writes the sheets of what is learnt from, and notes where they lie."""
    notes = list(photos.notes)
    if photos.kinds is not None:
        notes.append(save_kinds(photos, output_dir / "kinds.png"))
    save_preview(photos, args, output_dir / PREVIEW_FILE)
    notes.append(f"Preview: {output_dir / PREVIEW_FILE} shows the foregrounds and synthetic defects.")
    progress.update(notes=notes, preview=PREVIEW_FILE)


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
    """On the first SIGINT or SIGTERM, requests a stop after the current step; the second one acts as usual.

    Signals reach the main thread of a process alone: in another one, nothing is changed.
    """

    _SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.requested = False
        self.in_a_hurry = False  # SIGTERM: what sends it will not wait long

    def __enter__(self) -> "Interrupt":
        here = threading.current_thread() is threading.main_thread()
        self._former = {number: signal.signal(number, self._request) for number in self._SIGNALS if here}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _request(self, number: int, *_: object) -> None:
        self.requested, self.in_a_hurry = True, number == signal.SIGTERM
        for number, handler in self._former.items():
            signal.signal(number, handler)
        print("\nStopping after this step, with a checkpoint; press again to stop at once.", file=sys.stderr)
