"""Which sizes of the networks give the best accuracy for their cost: trains them alike, then measures both.

    python -m demo_part.generate --out parts --seed 20
    python -m demo_part.generate --out other_parts --seed 778
    python -m benchmarks pareto --train_dir parts --test_dir other_parts --work_dir sizes --plot sizes.png

Every size is trained with the same options, images, anomalies and number of steps, from the same seed, and evaluated
on all test images; its time is that of one image at a time in the runtimes of `python -m benchmarks runtimes`. A size
that is trained already in --work_dir is not trained again, and one that was interrupted goes on. Time does not depend
on the weights, so --time_at tells it for resolutions that nothing was trained at. On the front is what no other size
beats in both time and accuracy.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import count_flops, describe, report
from benchmarks.runtimes import add_runtimes
from benchmarks.runtimes import run as measure_runtimes
from diffusionad_hf import PRESETS, DiffusionADPipeline

# What was tried: fewer channels; one residual block a level instead of two; patches instead of pixels for the UNet
# (`light` too); a segmenter of half the channels; predicting the noise, as the paper, instead of the image.
_SMALL_NOISE, _TINY_NOISE = ({**PRESETS[name], "prediction_type": "epsilon"} for name in ("small", "tiny"))
SIZES: dict[str, dict[str, Any]] = {
    **{name: PRESETS[name] for name in ("small", "tiny", "light")},
    "small, noise": _SMALL_NOISE,
    "small, noise, patches": {**_SMALL_NOISE, "patch_size": 2},
    "tiny, noise": _TINY_NOISE,
    "light, noise": {**_TINY_NOISE, "patch_size": 2},
    "tiny, noise, one block": {**_TINY_NOISE, "layers_per_block": 1},
    "tiny, noise, one block, slim segmenter": {**_TINY_NOISE, "layers_per_block": 1, "segmenter_base_channels": 8},
}
_TRAINING = ("--preset", "small", "--unet_learning_rate", "5e-4", "--segmenter_learning_rate", "1e-3")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--train_dir", required=True, help="data set whose normal training images are trained on")
    add("--test_dir", help="data set whose test images are evaluated; that of --train_dir without")
    add("--category", help="which category of them; may be left out where there is but one")
    add("--work_dir", required=True, type=Path, help="where the trainings go, and where finished ones are found")
    add("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="default: all of %(choices)s")
    add("--resolution", type=int, default=128, help="side of the images in px; default: %(default)s")
    add("--max_train_steps", type=int, default=300, help="default: %(default)s")
    add("--train_batch_size", type=int, default=8, help="default: %(default)s")
    add("--distill_from", metavar="M", help="pipeline folder or Hub id of a model for all of them to learn from too")
    add("--train_only", action="store_true", help="measure nothing yet: time wants a machine with nothing else to do")
    add("--calibration_images", nargs="+", help="normal images for int8: files, folders or patterns; noise without")
    add_runtimes(parser)
    add("--threads", type=int, help="threads of torch and of the runtimes; torch's own choice without")
    add("--time_at", type=int, nargs="+", default=[], metavar="R", help="also time them at R px, on random weights")
    add("--repeats", type=int, default=7, help="timed calls of each runtime; default: %(default)s")
    add("--json", type=Path, metavar="FILE", help="also write everything here")
    add("--plot", type=Path, metavar="FILE", help="draw time against accuracy, and which sizes are on the front")
    args = parser.parse_args()

    # For this process only: what loses gets no name in the package.
    PRESETS.update(SIZES)
    folders = {name: train(name, args) for name in args.sizes}
    if args.train_only:
        return
    result = {
        "machine": describe(torch.device("cpu")),
        "training": {
            name: getattr(args, name) for name in ("resolution", "max_train_steps", "train_batch_size", "distill_from")
        },
        "sizes": {name: measure(name, folder, args) for name, folder in folders.items()},
    }
    for runtime in next(iter(result["sizes"].values()))["runtimes"]:
        for name in front({name: cost_and_accuracy(size, runtime) for name, size in result["sizes"].items()}):
            result["sizes"][name]["runtimes"][runtime]["on_front"] = True
    report(result, table(result), args.json)
    if args.plot is not None:
        plot(result, args.plot)


def train(name: str, args: argparse.Namespace) -> Path:
    """Trains one size, or finds it trained; returns its pipeline folder."""
    from diffusionad_hf.training.loop import main as run_training
    from diffusionad_hf.training.outcome import ARGUMENTS_FILE

    output_dir = args.work_dir / name.replace(", ", "-").replace(" ", "-")
    # A training writes this last.
    if (output_dir / ARGUMENTS_FILE).is_file():
        return output_dir
    options: dict[str, Any] = {
        "data_dir": args.train_dir,
        "category": args.category,
        "output_dir": output_dir,
        "architecture": name,
        "resolution": args.resolution,
        "max_train_steps": args.max_train_steps,
        "lr_warmup_steps": max(1, args.max_train_steps // 15),
        "train_batch_size": args.train_batch_size,
        "ema_decay": 0.98,
        "distill_from": args.distill_from,
        "validation_steps": max(1, args.max_train_steps // 3),
        "checkpointing_steps": max(1, args.max_train_steps // 6),
        "mixed_precision": "bf16",
        "resume_from_checkpoint": "latest",
        "report_to": "none",
    }
    pairs = [[f"--{option}", str(value)] for option, value in options.items() if value is not None]
    code = run_training([*_TRAINING, *(word for pair in pairs for word in pair)])
    if code:
        raise SystemExit(code)
    return output_dir


def measure(name: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Accuracy and cost of a trained size."""
    from diffusionad_hf.data import load_category
    from diffusionad_hf.evaluation.evaluator import evaluate_pipeline

    test_dir = args.test_dir or args.train_dir
    pipe = DiffusionADPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    metrics = evaluate_pipeline(pipe, load_category(test_dir, args.category), batch_size=4).metrics
    size = pipe.config.image_size
    found = measure_runtimes(
        str(folder),
        data_dir=test_dir,
        category=args.category,
        calibration_images=args.calibration_images,
        runtimes=args.runtimes,
        repeats=args.repeats,
        threads=args.threads,
    )
    return {
        "gflop": count_flops(lambda: pipe(torch.zeros(3, size, size))) / 1e9,
        "million_parameters": sum(p.numel() for m in (pipe.unet, pipe.segmenter) for p in m.parameters()) / 1e6,
        **{name: metrics[name] for name in ("image_auroc", "pixel_auroc", "pixel_ap", "aupro_30")},
        "threads": found["threads"],
        "runtimes": found["runtimes"],
        "ms_at": {
            str(side): {
                runtime: values["ms"]
                for runtime, values in measure_runtimes(
                    preset=name,
                    resolution=side,
                    runtimes=args.runtimes,
                    repeats=args.repeats,
                    threads=args.threads,
                )["runtimes"].items()
            }
            for side in args.time_at
        },
    }


def cost_and_accuracy(size: dict[str, Any], runtime: str) -> tuple[float, float]:
    """Milliseconds an image, and the pixel average precision: image AUROC is 1 too soon to tell sizes apart."""
    return size["runtimes"][runtime]["ms"], size["pixel_ap"]


def front(points: dict[str, tuple[float, float]]) -> list[str]:
    """The names of those that none beats: as cheap or cheaper, as accurate or better, and not equal in both."""

    def beaten(name: str) -> bool:
        cost, accuracy = points[name]
        return any(c <= cost and a >= accuracy and (c, a) != (cost, accuracy) for c, a in points.values())

    return sorted((name for name in points if not beaten(name)), key=lambda name: points[name])


def table(result: dict[str, Any]) -> str:
    sizes = result["sizes"]
    runtimes = list(next(iter(sizes.values()))["runtimes"])
    lines = [f"{'':30} {'GFLOP':>6} {'mill.':>6} {'AUROC':>7} {'px AP':>7} {'AUPRO':>7}"]
    lines[0] += "".join(f" {name:>17}" for name in runtimes)
    for name, size in sizes.items():
        line = f"{name:30} {size['gflop']:6.1f} {size['million_parameters']:6.2f} {size['image_auroc']:7.4f} "
        line += f"{size['pixel_ap']:7.4f} {size['aupro_30']:7.4f}"
        for runtime in runtimes:
            line += f" {size['runtimes'][runtime]['ms']:11.1f} ms"
            line += " *" if size["runtimes"][runtime].get("on_front") else "  "
        lines.append(line)
    lines.append("* on the front of time against pixel AP in that runtime")
    for side in next(iter(sizes.values()))["ms_at"]:
        lines.append(f"\nat {side} px, random weights")
        for name, size in sizes.items():
            times = "".join(f" {size['ms_at'][side][runtime]:14.1f} ms" for runtime in runtimes)
            lines.append(f"{name:30} {'':29}{times}")
    return "\n".join(lines)


def plot(result: dict[str, Any], file: Path) -> None:
    """Draws time against accuracy, torch and the fastest runtime side by side."""
    from matplotlib.figure import Figure

    sizes = result["sizes"]
    runtimes = list(next(iter(sizes.values()))["runtimes"])
    chosen = [runtimes[0], min(runtimes, key=lambda r: sum(size["runtimes"][r]["ms"] for size in sizes.values()))]
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, runtime in zip(figure.subplots(1, 2, sharey=True), chosen, strict=True):
        points = {name: cost_and_accuracy(size, runtime) for name, size in sizes.items()}
        on_front = front(points)
        axes.plot(*zip(*(points[name] for name in on_front), strict=True), "-", color="tab:blue", zorder=1)
        for name, (cost, accuracy) in points.items():
            axes.scatter(cost, accuracy, color="tab:blue" if name in on_front else "tab:gray", zorder=2)
            axes.annotate(name, (cost, accuracy), textcoords="offset points", xytext=(6, -12), fontsize=8)
        axes.set(title=runtime, xlabel="ms an image, one at a time")
        axes.margins(0.25)
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("pixel average precision")
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
