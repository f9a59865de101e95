"""Images a second of training steps, and on a GPU their peak memory.

    python -m benchmarks training                                        # tiny and small on a CPU
    python -m benchmarks training --device cuda --presets paper small --dtypes float32 bfloat16 --compile

A step is what `training/train.py` does with a batch: anomalies synthesised, noise and timesteps drawn, both networks
forward and backward, one step of Adam (fused on a GPU, or with `--fused`). Images come from memory, so that reading
them is not in it. On a CPU settings take turns, on a GPU one is measured after another, with the memory that the
former held set free, `--repeats` times each; the median counts. What cannot be measured, such as a batch that does not
fit into memory, has its reason instead; compiled networks are not measured with gradient checkpointing, which
torch.compile cannot compile. Compiling takes place in the first step, which is not in the peak memory. Operations are
those of the convolutions and matrix products of the forward pass times three, what is computed twice for gradient
checkpointing not counted again; the peak is the best square matrix product of the same type in the same run.
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
    PeakMemory,
    add_options,
    compile_everything,
    describe,
    find_device,
    find_slow_types,
    matmul_peak,
    measure_in_turns,
    report,
    save,
    set_free,
    spread,
    take_turns,
    timed,
)
from diffusionad_hf import PRESETS, build_pipeline
from diffusionad_hf.flags import DashedParser
from diffusionad_hf.training.loop import prepare_batch
from diffusionad_hf.training.losses import DiffusionADObjective
from diffusionad_hf.training.memory import keep_freed_memory
from diffusionad_hf.training.synthesis import AnomalySynthesizer
from diffusionad_hf.training.textures import ProceduralTextures


def main(argv: list[str] | None = None) -> None:
    parser = DashedParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", choices=list(PRESETS), default=["tiny", "small"])
    parser.add_argument("--resolution", type=int, default=256, help="of the images in px (default: 256)")
    parser.add_argument("--batch-sizes", type=int, nargs="+", metavar="B", help="default: 4; on a GPU 16")
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32"], help="autocast")
    parser.add_argument("--layouts", nargs="+", choices=["contiguous", "channels_last"], default=["channels_last"])
    parser.add_argument("--gradient-checkpointing", action="store_true", help="also measure with it")
    parser.add_argument("--compile", action="store_true", help="also measure with torch.compile")
    parser.add_argument("--fused", action="store_true", help="fused Adam on a CPU too")
    add_options(parser, repeats=5)
    args = parser.parse_args(argv)
    device = find_device(args.device)
    if device.type == "cpu":
        keep_freed_memory()
    compile_everything()
    too_slow = find_slow_types(device, args.dtypes, args.slow_types)
    peaks = {name: matmul_peak(device, DTYPES[name]) for name in args.dtypes if name not in too_slow}
    result: dict[str, Any] = {"machine": describe(device), "matmul_peak_flops": peaks, "rows": []}
    for preset in args.presets:
        for row in _measure(preset, device, args, peaks, too_slow):
            result["rows"].append(row)
            save(result, args.json)
    report(result, _table(result), args.json)


def _measure(
    preset: str, device: torch.device, args: argparse.Namespace, peaks: dict[str, float], too_slow: dict[str, str]
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

    def finish(row: dict[str, Any], seconds: list[float]) -> dict[str, Any]:
        row["seconds_per_step"] = spread(seconds)
        row["images_per_second"] = row["batch_size"] / row["seconds_per_step"]["median"]
        row["share_of_peak"] = flops * row["images_per_second"] / peaks[row["dtype"]]
        return row

    rows, steps = [], {}
    for batch, dtype, layout, checkpointing, compiled in settings:
        if checkpointing and compiled:
            continue
        row = {
            "preset": preset,
            "image_size": args.resolution,
            "batch_size": batch,
            "dtype": dtype,
            "layout": layout,
            "gradient_checkpointing": checkpointing,
            "compiled": compiled,
            "gflop_per_image": flops / 1e9,
        }
        if dtype in too_slow:
            row["error"] = too_slow[dtype]
            yield row
            continue
        step = None
        set_free(device)
        try:
            with PeakMemory(device) as memory:
                step = _training_step(preset, device, args, synthesizer, batch, dtype, layout, checkpointing, compiled)
                row["first_step_seconds"] = timed(step, device)
                # What compiling took is not what training takes; and Adam has its memory from the first step on.
                memory.restart()
                step()
            row["peak_memory_bytes"] = memory.bytes
            if take_turns(device):
                steps[str(len(rows))] = step
                rows.append(row)
            else:
                yield finish(row, measure_in_turns({"": step}, device, args.repeats)[""])
        except RuntimeError as error:
            row["error"] = " ".join(str(error).split())[:200]
            yield row
    seconds = measure_in_turns(steps, device, args.repeats)
    for key, row in enumerate(rows):
        yield finish(row, seconds[str(key)])


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
            network.compile(dynamic=False)
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
        setting = (
            f"{row['preset']:<7} {row['image_size']:>4} {row['batch_size']:>5} {row['dtype']:<9} {row['layout']:<14} "
            f"{'yes' if row['gradient_checkpointing'] else 'no':<13} {'yes' if row['compiled'] else 'no':<8} "
        )
        if "error" in row:
            lines.append(setting + row["error"])
            continue
        seconds = row["seconds_per_step"]
        memory = "" if row["peak_memory_bytes"] is None else f"{row['peak_memory_bytes'] / 1e9:.2f} GB"
        lines.append(
            f"{setting}{seconds['median']:>8.3f} {seconds['lowest']:>8.3f} {seconds['highest']:>8.3f} "
            f"{row['images_per_second']:>9.2f} {row['share_of_peak']:>7.0%} {memory:>8} "
            f"{row['first_step_seconds']:>6.1f} s"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
