"""Images a second of training steps, and on a GPU their peak memory.

    python -m benchmarks training                                        # tiny and small on a CPU
    python -m benchmarks training --device cuda --presets paper small --dtypes float32 bfloat16 --compile

A step is what `training/train.py` does with a batch: anomalies synthesised, noise and timesteps drawn, both networks
forward and backward, one step of Adam (fused on a GPU, or with `--fused`). Images come from memory, so that reading
them is not in it. Settings take turns, `--repeats` times; the median counts. Operations are those of the
convolutions and matrix products of the forward pass times three, what is computed twice for gradient checkpointing
not counted again; the peak is the best square matrix product of the same type in the same run.
"""

import argparse
from collections.abc import Callable, Iterator
from itertools import count, product
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.inference import count_image
from benchmarks.machine import (
    DTYPES,
    add_options,
    describe,
    find_device,
    matmul_peak,
    measure_in_turns,
    peak_memory,
    report,
    spread,
    timed,
)
from diffusionad_hf import PRESETS, build_pipeline
from training.losses import DiffusionADObjective
from training.memory import keep_freed_memory
from training.synthesis import AnomalySynthesizer
from training.textures import ProceduralTextures
from training.train import prepare_batch

__all__ = ["main"]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", choices=list(PRESETS), default=["tiny", "small"])
    parser.add_argument("--resolution", type=int, default=256, help="of the images in px (default: 256)")
    parser.add_argument("--batch_sizes", type=int, nargs="+", metavar="B", help="default: 4; on a GPU 16")
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32"], help="autocast")
    parser.add_argument("--layouts", nargs="+", choices=["contiguous", "channels_last"], default=["channels_last"])
    parser.add_argument("--gradient_checkpointing", action="store_true", help="also measure with it")
    parser.add_argument("--compile", action="store_true", help="also measure with torch.compile")
    parser.add_argument("--fused", action="store_true", help="fused Adam on a CPU too")
    add_options(parser, repeats=5)
    args = parser.parse_args(argv)
    device = find_device(args.device)
    if device.type == "cpu":
        keep_freed_memory()
    peaks = {name: matmul_peak(device, DTYPES[name]) for name in args.dtypes}
    result: dict[str, Any] = {"machine": describe(device), "matmul_peak_flops": peaks, "rows": []}
    for preset in args.presets:
        result["rows"] += list(_measure(preset, device, args, peaks))
    report(result, _table(result), args.json)


def _measure(
    preset: str, device: torch.device, args: argparse.Namespace, peaks: dict[str, float]
) -> Iterator[dict[str, Any]]:
    flops = 3 * count_image(build_pipeline(preset, args.resolution))
    settings = product(
        args.batch_sizes or [4 if device.type == "cpu" else 16],
        args.dtypes,
        args.layouts,
        [False, True] if args.gradient_checkpointing else [False],
        [False, True] if args.compile else [False],
    )
    synthesizer = AnomalySynthesizer(ProceduralTextures(args.resolution, 60), seed=0)
    rows, calls = [], {}
    for batch, dtype, layout, checkpointing, compiled in settings:
        with peak_memory(device) as memory:
            step = _training_step(preset, device, args, synthesizer, batch, dtype, layout, checkpointing, compiled)
            first = timed(step, device)
        calls[str(len(rows))] = step
        rows.append(
            {
                "preset": preset,
                "image_size": args.resolution,
                "batch_size": batch,
                "dtype": dtype,
                "layout": layout,
                "gradient_checkpointing": checkpointing,
                "compiled": compiled,
                "gflop_per_image": flops / 1e9,
                "first_step_seconds": first,
                "peak_memory_bytes": memory["bytes"],
            }
        )
    seconds = measure_in_turns(calls, device, args.repeats)
    for key, row in enumerate(rows):
        row["seconds_per_step"] = spread(seconds[str(key)])
        row["images_per_second"] = row["batch_size"] / row["seconds_per_step"]["median"]
        row["share_of_peak"] = flops * row["images_per_second"] / peaks[row["dtype"]]
        yield row


def _training_step(
    preset: str,
    device: torch.device,
    args: argparse.Namespace,
    synthesizer: AnomalySynthesizer,
    batch: int,
    dtype: str,
    layout: str,
    checkpointing: bool,
    compiled: bool,
) -> Callable[[], None]:
    torch.manual_seed(0)
    pipe = build_pipeline(preset, args.resolution)
    for network in (pipe.unet, pipe.segmenter):
        if checkpointing:
            network.enable_gradient_checkpointing()
        if layout == "channels_last":
            network.to(memory_format=torch.channels_last)
        if compiled:
            network.compile()
    objective = DiffusionADObjective(pipe.unet, pipe.segmenter, pipe.scheduler).train().to(device)
    optimizer = torch.optim.Adam(objective.parameters(), lr=1e-4, fused=args.fused or device.type == "cuda")
    images = F.interpolate(torch.rand(batch, 3, 16, 16), size=args.resolution, mode="bilinear")
    foreground = torch.ones(batch, 1, args.resolution, args.resolution)
    epochs = count()

    def step() -> None:
        samples = {
            "image": images,
            "index": torch.arange(batch),
            "epoch": torch.full((batch,), next(epochs)),
            "foreground": foreground,
        }
        inputs = prepare_batch(samples, synthesizer, pipe.scheduler, device, seed=0)
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = objective(**inputs)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _table(result: dict[str, Any]) -> str:
    lines = [
        f"measured matmul peak, {name}: {peak / 1e9:.1f} GFLOP/s" for name, peak in result["matmul_peak_flops"].items()
    ]
    lines += [
        "",
        f"{'preset':<7} {'px':>4} {'batch':>5} {'type':<9} {'layout':<14} {'checkpointing':<13} {'compiled':<8} "
        f"{'s/step':>8} {'lowest':>8} {'highest':>8} {'images/s':>9} {'of peak':>7} {'memory':>8} {'first':>8}",
    ]
    for row in result["rows"]:
        seconds = row["seconds_per_step"]
        memory = "" if row["peak_memory_bytes"] is None else f"{row['peak_memory_bytes'] / 1e9:.2f} GB"
        lines.append(
            f"{row['preset']:<7} {row['image_size']:>4} {row['batch_size']:>5} {row['dtype']:<9} {row['layout']:<14} "
            f"{'yes' if row['gradient_checkpointing'] else 'no':<13} {'yes' if row['compiled'] else 'no':<8} "
            f"{seconds['median']:>8.3f} {seconds['lowest']:>8.3f} {seconds['highest']:>8.3f} "
            f"{row['images_per_second']:>9.2f} {row['share_of_peak']:>7.0%} {memory:>8} "
            f"{row['first_step_seconds']:>6.1f} s"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
