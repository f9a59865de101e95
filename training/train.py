"""Trains DiffusionAD on one category.

accelerate launch training/train.py --data_dir D --category C --output_dir O
"""

import copy
import csv
import json
import logging
import math
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

# Scripts started by path see their own folder, not the one that the packages lie in.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from diffusionad_hf import DiffusionADPipeline, build_pipeline  # noqa: E402
from diffusionad_hf.calibration import calibrate  # noqa: E402
from diffusionad_hf.data import check_images, load_category  # noqa: E402
from training.arguments import parse_arguments  # noqa: E402
from training.checkpoints import find_checkpoint, load_checkpoint, save_checkpoint  # noqa: E402
from training.dataset import NormalImages, StepSampler, split_holdout  # noqa: E402
from training.foreground import estimate_foregrounds, load_foregrounds  # noqa: E402
from training.losses import DiffusionADObjective  # noqa: E402
from training.memory import keep_freed_memory  # noqa: E402
from training.synthesis import AnomalySynthesizer  # noqa: E402
from training.textures import FolderTextures, ProceduralTextures  # noqa: E402
from training.validation import Validation  # noqa: E402

logger = logging.getLogger("training")

INTERRUPTED = 130
_FOREGROUND_IMAGES = 64


def main(argv: list[str] | None = None) -> int:
    """Runs a training; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    args = parse_arguments(argv)
    output_dir = Path(args.output_dir)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        return train(args, output_dir)
    except (OSError, ValueError, ImportError) as error:
        # Whatever the user can mend is said in one line; anything else is a defect of ours and keeps its traceback.
        print(f"train.py: error: {error}", file=sys.stderr)
        return 2


def train(args, output_dir: Path) -> int:
    """The training itself, from the data to the calibrated pipeline folder."""
    trackers = None if args.report_to == "none" else args.report_to
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=trackers,
        project_dir=str(output_dir / "logs"),
    )
    if not accelerator.is_main_process:
        logging.disable(logging.WARNING)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    set_seed(args.seed)

    # 1. Data: normal images to train on, held-out ones to choose and calibrate with, and where anomalies may lie.
    images, kind, foregrounds = load_images(args)
    train_rows, held_out_rows = split_holdout(len(images), args.holdout_fraction, args.seed)
    train_set = NormalImages([images[i] for i in train_rows], args.resolution, _rows(foregrounds, train_rows))
    held_out = NormalImages([images[i] for i in held_out_rows], args.resolution)
    textures = load_textures(args)
    anomalies = {
        "seed": args.seed,
        "self_augmentation_probability": 0.5 if kind == "object" else 0.0,
        "line_probability": args.line_probability,
        "displaced_probability": args.displaced_probability,
        "erased_probability": args.erased_probability,
    }
    synthesizer = AnomalySynthesizer(textures, **anomalies)
    validation = Validation(
        torch.stack([held_out.pixels(i) for i in range(len(held_out))]),
        _rows(foregrounds, held_out_rows),
        AnomalySynthesizer(textures, anomaly_probability=1.0, **anomalies),
    )
    logger.info(f"{len(train_set)} normal images to train on, {len(held_out)} held out, taken for images of {kind}s.")

    # 2. Networks, optimiser, averaged weights.
    pipe = build_pipeline(args.architecture, args.resolution)
    if args.init_from is not None:
        start_from(args.init_from, pipe)
    if args.gradient_checkpointing:
        pipe.unet.enable_gradient_checkpointing()
    objective = DiffusionADObjective(pipe.unet, pipe.segmenter, pipe.scheduler).train()
    groups = [
        {"params": list(pipe.unet.parameters()), "lr": args.unet_learning_rate},
        {"params": list(pipe.segmenter.parameters()), "lr": args.segmenter_learning_rate},
    ]
    optimizer = torch.optim.Adam(groups, fused=accelerator.device.type == "cuda")
    objective, optimizer = accelerator.prepare(objective, optimizer)
    plain = accelerator.unwrap_model(objective)
    averaged = None
    if args.ema_decay:
        averaged = AveragedModel(plain, multi_avg_fn=_ema(args.ema_decay), use_buffers=True)
        accelerator.register_for_checkpointing(averaged)

    # 3. Resume, or start afresh.
    arguments = vars(args)
    state = {"step": 0, "best": None, "arguments": arguments}
    found = find_checkpoint(output_dir, args.resume_from_checkpoint) if args.resume_from_checkpoint else None
    if found is not None:
        state = load_checkpoint(accelerator, found, arguments) | {"arguments": arguments}
        logger.info(f"Resumed from {found}.")
    elif args.resume_from_checkpoint:
        logger.info(f"No checkpoint in {output_dir} yet: starting afresh.")
    if trackers is not None:
        accelerator.init_trackers("diffusionad", config={k: v for k, v in arguments.items() if v is not None})

    batches = range(
        state["step"] * args.gradient_accumulation_steps, args.max_train_steps * args.gradient_accumulation_steps
    )
    sampler = StepSampler(
        len(train_set), args.train_batch_size, batches, args.seed, accelerator.process_index, accelerator.num_processes
    )
    loader = DataLoader(train_set, batch_sampler=sampler, num_workers=args.dataloader_num_workers)
    curve = Curve(output_dir / "training_curve.csv", state["step"]) if accelerator.is_main_process else None

    # 4. The loop.
    interrupt = Interrupt()
    bar = tqdm(
        total=args.max_train_steps, initial=state["step"], desc="training", disable=not accelerator.is_main_process
    )
    running: dict[str, float] = {}
    for batch_number, batch in zip(batches, loader, strict=True):
        with accelerator.accumulate(objective):
            for group, base in zip(optimizer.param_groups, _rates(args, state["step"]), strict=True):
                group["lr"] = base
            losses = objective(
                **prepare_batch(batch, batch_number, synthesizer, pipe.scheduler, accelerator, args.seed)
            )
            accelerator.backward(losses["loss"])
            if args.max_grad_norm and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(objective.parameters(), args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        for name in ("loss", "noise", "focal", "smooth_l1"):
            value = float(losses[name].detach())
            if not math.isfinite(value):
                raise ValueError(
                    f"the {name} loss is {value} at step {state['step']}: lower the learning rates, or train with "
                    f"--mixed_precision no. {output_dir} keeps the checkpoints from before."
                )
            # An exponential average, as single batches tell little.
            running[name] = value if name not in running else 0.95 * running[name] + 0.05 * value
        if not accelerator.sync_gradients:
            continue
        state["step"] += 1
        if averaged is not None:
            averaged.update_parameters(plain)
        bar.update()
        bar.set_postfix({name: f"{value:.4f}" for name, value in running.items()})
        accelerator.log({f"train/{name}": value for name, value in running.items()}, step=state["step"])

        last = state["step"] == args.max_train_steps
        if last or state["step"] % args.validation_steps == 0:
            if accelerator.is_main_process:
                source = averaged.module if averaged is not None else plain
                metrics = validate(source, pipe.scheduler, validation, output_dir, state)
                curve.write(state["step"], running, metrics)
                accelerator.log({f"validation/{name}": value for name, value in metrics.items()}, step=state["step"])
                bar.write(f"step {state['step']}: " + ", ".join(f"{k} {v:.4f}" for k, v in metrics.items()))
            accelerator.wait_for_everyone()
        if last or interrupt.requested or state["step"] % args.checkpointing_steps == 0:
            save_checkpoint(accelerator, output_dir, state, args.checkpoints_total_limit)
        if interrupt.requested and not last:
            bar.close()
            accelerator.end_training()
            logger.info(f"Interrupted at step {state['step']}; go on with --resume_from_checkpoint latest.")
            return INTERRUPTED
    bar.close()

    # 5. The chosen weights, calibrated on the held-out normal images.
    if accelerator.is_main_process:
        finish(args, output_dir, [images[i] for i in held_out_rows], accelerator.device)
    accelerator.end_training()
    return 0


def start_from(model: str, pipe: DiffusionADPipeline) -> None:
    """Takes the weights of another pipeline; raises `ValueError` where its networks are of another size."""
    source = DiffusionADPipeline.from_pretrained(model, dtype=torch.float32)
    for name in ("unet", "segmenter"):
        try:
            getattr(pipe, name).load_state_dict(getattr(source, name).state_dict())
        except RuntimeError as error:
            raise ValueError(
                f"--init_from {model}: its {name} is of another size; give the --architecture and --resolution "
                "that it was trained with."
            ) from error


def load_images(args) -> tuple[list[str], str, torch.Tensor | None]:
    """
    The category's normal images (paths, or images where a data set holds no files), whether they show objects or a
    texture, and
    where anomalies may lie: `(N, 1, S, S)`, or `None` for random parts of a texture.
    """
    data = load_category(args.data_dir, args.category)["train"]
    usable, _ = check_images(data)
    files = usable.cast_column("image", type(usable.features["image"])(decode=False))["image"]
    images = [f["path"] if f["bytes"] is None else usable[i]["image"] for i, f in enumerate(files)]
    if args.foreground == "whole":
        return images, "object", torch.ones(len(images), 1, args.resolution, args.resolution)
    if args.foreground_dir is not None:
        masks = load_foregrounds(args.foreground_dir, [str(f["path"]) for f in files])
        kind = "object"
    else:
        reader = NormalImages(images, args.resolution)
        pixels = [
            (reader.pixels(i).permute(1, 2, 0).numpy() * 255).round().astype(np.uint8) for i in range(len(images))
        ]
        kind, masks = estimate_foregrounds(pixels, args.foreground)
    if kind == "texture":
        return images, kind, None
    tensors = [torch.from_numpy(np.asarray(mask)).float()[None, None] for mask in masks]
    size = (args.resolution, args.resolution)
    return images, kind, torch.cat([F.interpolate(t, size=size, mode="nearest") for t in tensors])


def load_textures(args) -> FolderTextures | ProceduralTextures:
    """What anomalies are made of."""
    if args.texture_dir is not None:
        return FolderTextures(args.texture_dir, args.resolution)
    return ProceduralTextures(args.resolution, seed=args.seed)


def prepare_batch(batch, batch_number: int, synthesizer, scheduler, accelerator, seed: int) -> dict[str, torch.Tensor]:
    """
    Synthesises the anomalies of a batch and draws its noise and timesteps.

    Everything random is a function of the seed, the batch and the process, so a resumed training needs no state of any
    generator.
    """
    device = accelerator.device
    foreground = batch.get("foreground")
    images, masks, labels = [], [], []
    # A batch may straddle two epochs.
    for epoch in batch["epoch"].unique(sorted=True).tolist():
        rows = (batch["epoch"] == epoch).nonzero()[:, 0]
        made = synthesizer(
            batch["image"][rows].to(device),
            batch["index"][rows].tolist(),
            epoch,
            None if foreground is None else foreground[rows].to(device),
        )
        images.append(made.images)
        masks.append(made.masks)
        labels.append(made.labels)
    images = torch.cat(images)
    words = np.random.SeedSequence((seed, batch_number, accelerator.process_index)).generate_state(2)
    generator = torch.Generator(device).manual_seed(int(words[0]))
    # Dropout draws from the global generator.
    torch.manual_seed(int(words[1]))
    small, big = scheduler.sample_timesteps(len(images), generator=generator, device=device)
    return {
        "images": images,
        "masks": torch.cat(masks),
        "labels": torch.cat(labels),
        "noise": torch.randn((2, *images.shape), generator=generator, device=device),
        "timesteps_small": small,
        "timesteps_big": big,
    }


def validate(source: DiffusionADObjective, scheduler, validation: Validation, output_dir: Path, state: dict) -> dict:
    """Measures the weights and, where they are the best so far, keeps them as the pipeline folder `best`."""
    pipe = DiffusionADPipeline(copy.deepcopy(source.unet), copy.deepcopy(source.segmenter), scheduler)
    pipe.set_progress_bar_config(disable=True)
    metrics = validation(pipe)
    if state["best"] is None or metrics["score"] > state["best"]["score"]:
        state["best"] = {"step": state["step"], **metrics}
        replace_folder(pipe, output_dir / "best")
    return metrics


def replace_folder(pipe: DiffusionADPipeline, folder: Path) -> None:
    """Saves a pipeline so that at no time a half-written folder stands in the place of a whole one."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipe.save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def finish(args, output_dir: Path, held_out: list, device: torch.device) -> None:
    """Writes the best weights as a calibrated pipeline into the output folder."""
    dtype = getattr(torch, args.save_dtype)
    DiffusionADPipeline.from_pretrained(output_dir / "best", dtype=dtype).save_pretrained(output_dir)
    # Calibrated as it will be used: with the weights as they were saved, computing in float32.
    pipe = DiffusionADPipeline.from_pretrained(output_dir, dtype=torch.float32).to(device)
    calibrate(pipe, held_out, false_alarm_rate=args.false_alarm_rate)
    pipe.save_config(output_dir)
    # Where things lay on this machine is nobody's business who gets the model.
    paths = ("data_dir", "texture_dir", "foreground_dir", "output_dir", "init_from", "resume_from_checkpoint")
    recorded = {name: value for name, value in vars(args).items() if name not in paths}
    (output_dir / "training_arguments.json").write_text(json.dumps(recorded, indent=2) + "\n", encoding="utf-8")
    logger.info(
        f"Wrote {output_dir}: threshold {pipe.threshold:.4f} at a false-alarm rate of {args.false_alarm_rate:.1%}, "
        f"calibrated on {len(held_out)} held-out normal images."
    )


class Curve:
    """The losses and validation metrics as a CSV file; a resumed training forgets the rows after its step."""

    def __init__(self, path: Path, step: int):
        self.path = path
        self.started = time.monotonic()
        rows = []
        if step and path.is_file():
            with path.open(newline="", encoding="utf-8") as file:
                rows = [row for row in csv.DictReader(file) if int(row["step"]) <= step]
        self.before = float(rows[-1]["seconds"]) if rows else 0.0
        self.rows = rows

    def write(self, step: int, losses: dict[str, float], metrics: dict[str, float]) -> None:
        """Adds a row."""
        row = {"step": step, "seconds": round(self.before + time.monotonic() - self.started, 1)}
        row |= {name: f"{value:.6f}" for name, value in losses.items()}
        row |= {f"validation_{name}": f"{value:.6f}" for name, value in metrics.items()}
        self.rows.append(row)
        with self.path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(row))
            writer.writeheader()
            writer.writerows(self.rows)


class Interrupt:
    """Turns the first Ctrl-C into a request to stop after the step in hand; the second one kills as usual."""

    def __init__(self) -> None:
        self.requested = False
        signal.signal(signal.SIGINT, self._request)

    def _request(self, *_: object) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print("\nStopping after this step, with a checkpoint; once more to stop at once.", file=sys.stderr)


def _rates(args, step: int) -> Iterator[float]:
    """The learning rates of UNet and segmenter at a step."""
    warmup = min(1.0, (step + 1) / args.lr_warmup_steps) if args.lr_warmup_steps else 1.0
    progress = step / args.max_train_steps
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    # The reference steps a cosine of T_max = 10 once a batch and never restarts it, so that the rate swings with a
    # period of 20.
    swing = 0.5 * (1 + math.cos(math.pi * step / 10))
    unet, segmenter = {
        "constant": (1.0, 1.0),
        "cosine": (cosine, cosine),
        "linear": (1 - progress, 1 - progress),
        "reference": (1.0, swing),
    }[args.lr_schedule]
    yield args.unet_learning_rate * warmup * unet
    yield args.segmenter_learning_rate * warmup * segmenter


def _ema(decay: float):
    @torch.no_grad()
    def update(averages, values, count) -> None:
        if not averages[0].is_floating_point():
            torch._foreach_copy_(averages, values)
            return
        # Short trainings would never leave their initial weights at the full decay.
        now = min(decay, (1 + float(count)) / (10 + float(count)))
        torch._foreach_lerp_(averages, values, 1 - now)

    return update


def _rows(tensor: torch.Tensor | None, rows: list[int]) -> torch.Tensor | None:
    return None if tensor is None else tensor[rows]


if __name__ == "__main__":
    sys.exit(main())
