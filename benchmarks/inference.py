"""Speed of inspection, against the paper's way of computing the same thing.

    python -m benchmarks inference                                  # small and tiny, 256 px
    python -m benchmarks inference --presets paper --batch-sizes 1 --repeats 3
    python -m benchmarks inference --device cuda --presets paper --dtypes float32 bfloat16 --compile reduce-overhead
    python -m benchmarks inference --model space/checkpoints/demo-part --files 32
    python -m benchmarks inference --presets small --profile        # where the time goes

The baseline is the paper's way, written out: float32, one image at a time, the two noise scales one after the other,
autograd left on, nothing compiled; and the same without autograd. Both use the same weights as the pipeline (random
ones, unless a model is given) and `score difference` compares their scores of an image. A call takes images of the
model's own size from memory and gives maps, reconstructions and scores back there. On a CPU all rows of a table take
turns, on a GPU one is measured after another, with the memory that the former held set free, `--repeats` times each;
the median counts. What cannot be measured, such as a batch that does not fit into memory, has its reason instead.
Compiling takes place in the first call. Operations are those of the convolutions and matrix products; the peak is the
best square matrix product of the same type in the same run. Core clocks vary: give a measurement the machine for
itself.
"""

import argparse
import copy
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.machine import (
    DTYPES,
    PeakMemory,
    add_options,
    compile_everything,
    count_flops,
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
from diffusionad_hf import PRESETS, DiffusionADPipeline, build_pipeline
from diffusionad_hf.flags import DashedParser
from diffusionad_hf.images_diffusionad import load_image

_PHOTO_SIZE = 1024


def papers_way(
    pipe: DiffusionADPipeline, pixels: torch.Tensor, noise: torch.Tensor, autograd: bool
) -> tuple[torch.Tensor, float]:
    """
    One image as the paper's own code computes it: float32, two UNet passes one after the other, autograd left on.

    Args:
        pipe: Whose networks, timesteps and weights to use.
        pixels: `(1, 3, S, S)` in [0, 1].
        noise: `(2, 1, 3, S, S)`, small scale first.
        autograd: Whether to record the gradient's graph, which the paper's code does for nothing.

    Returns:
        `tuple[torch.Tensor, float]`: The anomaly map `(S, S)` and the score.
    """
    config, device = pipe.scheduler.config, pipe.device
    pixels, noise = pixels.to(device), noise.to(device)
    alphas = pipe.scheduler.alphas_cumprod

    def network(sample: torch.Tensor, timestep: int) -> tuple[torch.Tensor, torch.Tensor]:
        steps = torch.tensor([timestep], device=device)
        # The paper's networks predict the noise; of the others it is taken.
        predicted = pipe.scheduler.predict_noise(pipe.unet(sample, steps).sample, sample, steps)
        a = float(alphas[timestep])
        return predicted, ((sample - (1 - a) ** 0.5 * predicted) / a**0.5).clamp(-1, 1)

    a_small, a_big = float(alphas[config.small_timestep]), float(alphas[config.big_timestep])
    with torch.enable_grad() if autograd else torch.no_grad():
        sample_small = a_small**0.5 * pixels + (1 - a_small) ** 0.5 * noise[0]
        sample_big = a_big**0.5 * pixels + (1 - a_big) ** 0.5 * noise[1]
        predicted_small, _ = network(sample_small, config.small_timestep)
        _, original_big = network(sample_big, config.big_timestep)
        renoised = a_small**0.5 * original_big + (1 - a_small) ** 0.5 * predicted_small
        guided = predicted_small - config.guidance_weight * (1 - a_small) ** 0.5 * (renoised - sample_small)
        reconstruction = ((sample_small - (1 - a_small) ** 0.5 * guided) / a_small**0.5).clamp(-1, 1)
        probability = pipe.segmenter(torch.cat([pixels, reconstruction], dim=1)).sigmoid()[0, 0]
        score = probability.flatten().topk(pipe.config.top_k).values.mean()
    return probability.detach().cpu(), score.item()


def main(argv: list[str] | None = None) -> None:
    parser = DashedParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--presets", nargs="+", choices=list(PRESETS), default=["small", "tiny"])
    what.add_argument("--model", metavar="M", help="a pipeline folder or Hub id instead of untrained presets")
    parser.add_argument("--resolution", type=int, default=256, help="of the presets' images in px (default: 256)")
    parser.add_argument("--batch-sizes", type=int, nargs="+", metavar="B", help="default: 1 4; on a GPU 1 16 64")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["float32"])
    parser.add_argument(
        "--compile",
        metavar="MODE",
        choices=["default", "reduce-overhead", "max-autotune"],
        help="also measure both networks compiled so",
    )
    parser.add_argument("--files", type=int, default=0, metavar="N", help="also inspect N PNG files of 1024 px")
    parser.add_argument("--no-baseline", action="store_true", help="leave the paper's way out: it takes long on a CPU")
    parser.add_argument("--keep-freed-memory", action="store_true", help="see training/memory.py; for all rows")
    parser.add_argument("--profile", action="store_true", help="also tell the pipeline's most expensive operations")
    add_options(parser, repeats=5)
    args = parser.parse_args(argv)
    device = find_device(args.device)
    if args.keep_freed_memory:
        from diffusionad_hf.training.memory import keep_freed_memory

        keep_freed_memory()
    sizes = args.batch_sizes or ([1, 4] if device.type == "cpu" else [1, 16, 64])
    compile_everything()
    too_slow = find_slow_types(device, args.dtypes, args.slow_types)
    peaks = {name: matmul_peak(device, DTYPES[name]) for name in args.dtypes if name not in too_slow}
    result: dict[str, Any] = {"machine": describe(device), "matmul_peak_flops": peaks, "rows": [], "profiles": {}}
    for name in [args.model] if args.model else args.presets:
        pipe = _load(args.model, name, args.resolution).to(device)
        result["rows"] += list(_measure(name, pipe, device, sizes, args, peaks, too_slow))
        if args.profile:
            result["profiles"][name] = _profile(pipe, device)
        save(result, args.json)
    report(result, _table(result), args.json)


def _load(model: str | None, preset: str, resolution: int) -> DiffusionADPipeline:
    if model:
        pipe = DiffusionADPipeline.from_pretrained(model, dtype=torch.float32)
    else:
        torch.manual_seed(0)
        pipe = build_pipeline(preset, resolution)
        # Fresh networks give nearly the same whatever the image, and so would tell nothing of wrong computing.
        for module in [*pipe.unet.modules(), *pipe.segmenter.modules()]:
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _photos(count: int, size: int) -> list[np.ndarray]:
    """Smooth random images, `(size, size, 3)` uint8."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 8, 8, generator=generator)
    smooth = F.interpolate(coarse, size=size, mode="bicubic").clamp(0, 1).permute(0, 2, 3, 1)
    return list((smooth * 255).round().to(torch.uint8).numpy())


def count_image(pipe: DiffusionADPipeline) -> int:
    """Operations of one image."""
    size = pipe.config.image_size
    shadow = DiffusionADPipeline(
        copy.deepcopy(pipe.unet).to("meta"), copy.deepcopy(pipe.segmenter).to("meta"), copy.deepcopy(pipe.scheduler)
    )
    pixels, noise = torch.empty(1, 3, size, size, device="meta"), torch.empty(2, 1, 3, size, size, device="meta")
    # The counter knows no fused attention of the CPU, so attention is counted as the products that it is made of.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        return count_flops(lambda: shadow._inspect(pixels, noise, 200, 400, None))


def _measure(
    name: str,
    pipe: DiffusionADPipeline,
    device: torch.device,
    sizes: list[int],
    args: argparse.Namespace,
    peaks: dict[str, float],
    too_slow: dict[str, str],
) -> Iterator[dict[str, Any]]:
    size = pipe.config.image_size
    flops = count_image(pipe)
    photos = _photos(max([*sizes, args.files]), size)
    pixels = torch.from_numpy(photos[0]).permute(2, 0, 1)[None].float() / 255
    noise = pipe._seeded_noise(1)[0][:, None]
    expected = papers_way(pipe, pixels, noise, autograd=False)[1]

    calls: dict[str, Callable[[], Any]] = {}
    seconds: dict[str, list[float]] = {}
    rows: dict[str, dict[str, Any]] = {}

    def add(way: str, dtype: str, batch: int, call: Callable[[], Any], score: Callable | None = None) -> None:
        key = f"{way} {dtype} {batch}"
        rows[key] = {
            "model": name,
            "image_size": size,
            "way": way,
            "dtype": dtype,
            "batch_size": batch,
            "gflop_per_image": flops / 1e9,
        }
        if dtype in too_slow:
            rows[key]["error"] = too_slow[dtype]
            return
        set_free(device)
        try:
            # Before anything else is asked of it: compiling takes place here.
            rows[key]["first_call_seconds"] = timed(call, device)
            with PeakMemory(device) as memory:
                call()
            rows[key]["working_memory_bytes"] = memory.bytes
            rows[key]["score_difference"] = None if score is None else abs(score() - expected)
            if take_turns(device):
                calls[key] = call
            else:
                seconds.update(measure_in_turns({key: call}, device, args.repeats))
        except (RuntimeError, MemoryError) as error:
            rows[key]["error"] = " ".join(str(error).split())[:200]

    if not args.no_baseline:
        for autograd in (True, False):
            way = "paper's way" if autograd else "paper's way, no autograd"
            add(
                way,
                "float32",
                1,
                lambda autograd=autograd: papers_way(pipe, pixels, noise, autograd),
                lambda: expected,
            )
    for dtype in args.dtypes:
        plain = pipe if dtype == "float32" else copy.deepcopy(pipe).to(dtype=DTYPES[dtype])
        ways = {"pipeline": plain}
        if args.compile:
            ways[f"pipeline, compiled ({args.compile})"] = _compiled(plain, args.compile)
        for way, candidate in ways.items():
            for batch in sizes:
                call = partial(_in_one_pass, candidate, photos[:batch])
                add(way, dtype, batch, call, lambda call=call: float(call().anomaly_score[0]))
    with tempfile.TemporaryDirectory() if args.files else nullcontext() as folder:
        if args.files:
            _add_files(add, pipe, Path(folder), args.files, max(sizes))
        seconds |= measure_in_turns(calls, device, args.repeats)
    for key, row in rows.items():
        if "error" in row:
            yield row
            continue
        taken = spread([s / row["batch_size"] for s in seconds[key]])
        row["seconds_per_image"] = taken
        row["images_per_second"] = 1 / taken["median"]
        row["share_of_peak"] = None
        if row["dtype"] in peaks and row["way"] != "files: decoding alone":
            row["share_of_peak"] = flops / taken["median"] / peaks[row["dtype"]]
        yield row


def _in_one_pass(pipe: DiffusionADPipeline, photos: list[np.ndarray]) -> Any:
    """All photos in one pass: a batch that the pipeline has to halve is not the one that is measured."""
    output = pipe(photos, batch_size=len(photos))
    if pipe._largest_batch is not None:
        pipe._largest_batch = None
        raise MemoryError(f"{len(photos)} images at once do not fit into the memory of {pipe.device}")
    return output


def _compiled(pipe: DiffusionADPipeline, mode: str) -> DiffusionADPipeline:
    pipe = copy.deepcopy(pipe)
    for network in (pipe.unet, pipe.segmenter):
        # Every batch size is compiled for itself, as it is where it does not change.
        network.compile(mode=mode, dynamic=False)
    return pipe


def _add_files(add: Callable, pipe: DiffusionADPipeline, folder: Path, count: int, batch: int) -> None:
    """Rows for files: reading them alone, the pipeline on what was read before, and both at once."""
    paths = []
    for i, photo in enumerate(_photos(count, _PHOTO_SIZE)):
        paths.append(folder / f"{i}.png")
        Image.fromarray(photo).save(paths[-1])
    decoded = [load_image(path) for path in paths]
    add("files: decoding alone", "float32", count, lambda: [load_image(path) for path in paths])
    add("files: decoded before", "float32", count, lambda: pipe(decoded, batch_size=batch))
    add("files: pipeline", "float32", count, lambda: pipe(paths, batch_size=batch))


def _profile(pipe: DiffusionADPipeline, device: torch.device) -> list[dict[str, Any]]:
    """The operations that take most of one image's time, with their share of all."""
    photo = _photos(1, pipe.config.image_size)[0]
    pipe(photo)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        pipe(photo)
    clock = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    # On a GPU, kernels have rows of their own, with the same time as the operations that started them.
    operations = [e for e in profiler.key_averages() if e.device_type == torch.autograd.DeviceType.CPU]
    events = sorted(operations, key=lambda event: -getattr(event, clock))
    total = sum(getattr(event, clock) for event in events)
    return [
        {"operation": event.key, "calls": event.count, "share": getattr(event, clock) / total} for event in events[:12]
    ]


def _table(result: dict[str, Any]) -> str:
    lines = [
        f"measured matmul peak, {name}: {peak / 1e9:.1f} GFLOP/s" for name, peak in result["matmul_peak_flops"].items()
    ]
    former = None
    for row in result["rows"]:
        if row["model"] != former:
            former = row["model"]
            lines += ["", f"{former} at {row['image_size']} px, {row['gflop_per_image']:.1f} GFLOP an image"]
            lines.append(
                f"  {'way':<36} {'type':<9} {'batch':>5} {'s/image':>9} {'lowest':>9} {'highest':>9} {'images/s':>9} "
                f"{'of peak':>7} {'memory':>8} {'score diff.':>11} {'first call':>10}"
            )
        if "error" in row:
            lines.append(f"  {row['way']:<36} {row['dtype']:<9} {row['batch_size']:>5} {row['error']}")
            continue
        seconds = row["seconds_per_image"]
        share = "" if row["share_of_peak"] is None else f"{row['share_of_peak']:.0%}"
        memory = "" if row["working_memory_bytes"] is None else f"{row['working_memory_bytes'] / 1e9:.2f} GB"
        difference = "" if row["score_difference"] is None else f"{row['score_difference']:.1e}"
        lines.append(
            f"  {row['way']:<36} {row['dtype']:<9} {row['batch_size']:>5} {seconds['median']:>9.4f} "
            f"{seconds['lowest']:>9.4f} {seconds['highest']:>9.4f} {row['images_per_second']:>9.1f} {share:>7} "
            f"{memory:>8} {difference:>11} {row['first_call_seconds']:>8.1f} s"
        )
    for name, operations in result["profiles"].items():
        lines += ["", f"{name}: where the time of one image goes"]
        lines += [f"  {o['share']:>6.1%}  {o['operation']} ({o['calls']} calls)" for o in operations]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
