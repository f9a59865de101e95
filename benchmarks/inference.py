"""Speed of inspection, against the paper's way of computing the same thing.

    python -m benchmarks inference                                  # small and tiny, 256 px
    python -m benchmarks inference --presets paper --batch-sizes 1 --repeats 3
    python -m benchmarks inference --device cuda --presets paper --dtypes float32 bfloat16 --compile reduce-overhead

The baseline is the paper's way, written out: float32, one image at a time, the two noise scales one after the other,
autograd left on, nothing compiled; and the same without autograd. Both use the same weights as the pipeline (random
ones, unless a model is given) and `score_difference` compares their scores of an image. A call takes images of the
model's own size from memory and returns maps, reconstructions and scores to it; seconds are those of a whole batch.
On a CPU all rows of a table take turns, on a GPU they are measured one after another, `--repeats` times each. What
cannot be measured, such as a batch that does not fit into memory, has its reason instead. Compiling happens in the
first call. Operations are those of the convolutions and matrix products; the peak is the best square matrix product
of the same type in the same run. Core clocks vary: run a measurement alone on the machine.
"""

import copy
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.machine import (
    DTYPES,
    compile_everything,
    count_flops,
    describe,
    make_parser,
    measure_rows,
    report,
    save,
)
from diffusionad_hf import PRESETS, DiffusionADPipeline, build_pipeline


def papers_way(
    pipe: DiffusionADPipeline, pixels: torch.Tensor, noise: torch.Tensor, autograd: bool
) -> tuple[torch.Tensor, float]:
    """
    One image as the paper's own code computes it: float32, two UNet passes one after the other, autograd left on.

    Args:
        pipe: Whose networks and timesteps to use.
        pixels: `(1, 3, S, S)` in [0, 1].
        noise: `(2, 1, 3, S, S)`, small scale first.
        autograd: Whether to record the gradient's graph, as the paper's code does without need.

    Returns:
        The anomaly map `(S, S)` and the score.
    """
    config, device = pipe.scheduler.config, pipe.device
    pixels, noise = pixels.to(device), noise.to(device)

    def predict_noise(sample: torch.Tensor, timestep: int) -> torch.Tensor:
        steps = torch.tensor([timestep], device=device)
        # The paper's networks predict the noise; for those that predict the image it is derived.
        return pipe.scheduler.predict_noise(pipe.unet(sample, steps).sample, sample, steps)

    def denoise(sample: torch.Tensor, predicted: torch.Tensor, a: float) -> torch.Tensor:
        return ((sample - (1 - a) ** 0.5 * predicted) / a**0.5).clamp(-1, 1)

    a_small, a_big = (float(pipe.scheduler.alphas_cumprod[t]) for t in (config.small_timestep, config.big_timestep))
    with torch.enable_grad() if autograd else torch.no_grad():
        sample_small = a_small**0.5 * pixels + (1 - a_small) ** 0.5 * noise[0]
        sample_big = a_big**0.5 * pixels + (1 - a_big) ** 0.5 * noise[1]
        predicted_small = predict_noise(sample_small, config.small_timestep)
        original_big = denoise(sample_big, predict_noise(sample_big, config.big_timestep), a_big)
        renoised = a_small**0.5 * original_big + (1 - a_small) ** 0.5 * predicted_small
        guided = predicted_small - config.guidance_weight * (1 - a_small) ** 0.5 * (renoised - sample_small)
        reconstruction = denoise(sample_small, guided, a_small)
        probability = pipe.segmenter(torch.cat([pixels, reconstruction], dim=1)).sigmoid()[0, 0]
        score = probability.flatten().topk(pipe.config.top_k).values.mean()
    return probability.detach().cpu(), score.item()


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__, repeats=5, device=True)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--presets", nargs="+", choices=list(PRESETS), default=["small", "tiny"])
    what.add_argument("--model", metavar="M", help="a pipeline folder or Hub id instead of untrained presets")
    parser.add_argument("--resolution", type=int, default=256, help="of the presets' images in px (default: 256)")
    parser.add_argument("--batch-sizes", type=int, nargs="+", metavar="B", help="default: 1 4; on a GPU 1 16 64")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["float32"])
    modes = ["default", "reduce-overhead", "max-autotune"]
    parser.add_argument("--compile", metavar="MODE", choices=modes, help="also measure both networks compiled so")
    parser.add_argument("--no-baseline", action="store_true", help="leave the paper's way out: it takes long on a CPU")
    args = parser.parse_args(argv)
    args.batch_sizes = args.batch_sizes or ([1, 4] if args.device.type == "cpu" else [1, 16, 64])
    compile_everything()
    result: dict[str, Any] = {"machine": describe(args.device), "rows": []}
    for name in [args.model] if args.model else args.presets:
        result["rows"] += _measure(name, load_or_build(args.model, name, args.resolution).to(args.device), args)
        save(result, args.json)
    report(result, args.json)


def load_or_build(model: str | None, preset: str, resolution: int) -> DiffusionADPipeline:
    """The model in float32 or, without one, a pipeline of random weights."""
    if model:
        pipe = DiffusionADPipeline.from_pretrained(model, dtype=torch.float32)
    else:
        torch.manual_seed(0)
        pipe = build_pipeline(preset, resolution)
        # Fresh networks return nearly the same for every image, which would hide errors.
        for module in [*pipe.unet.modules(), *pipe.segmenter.modules()]:
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_photos(count: int, size: tuple[int, int]) -> list[np.ndarray]:
    """Smooth random images, `(H, W, 3)` uint8."""
    coarse = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    smooth = F.interpolate(coarse, size=size, mode="bicubic").clamp(0, 1).permute(0, 2, 3, 1)
    return list((smooth * 255).round().to(torch.uint8).numpy())


def count_image(pipe: DiffusionADPipeline) -> int:
    """Operations of one image."""
    size = pipe.tile
    shadow = DiffusionADPipeline(
        copy.deepcopy(pipe.unet).to("meta"), copy.deepcopy(pipe.segmenter).to("meta"), copy.deepcopy(pipe.scheduler)
    )
    pixels, noise = torch.empty(1, 3, *size, device="meta"), torch.empty(2, 1, 3, *size, device="meta")
    # The counter does not know the CPU's fused attention, so count the matrix products it is made of.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        return count_flops(lambda: shadow._inspect(pixels, noise, 200, 400, None))


def _measure(name: str, pipe: DiffusionADPipeline, args: Any) -> list[dict[str, Any]]:
    photos = make_photos(max(args.batch_sizes), pipe.size)
    pixels = torch.from_numpy(photos[0]).permute(2, 0, 1)[None].float() / 255
    noise = pipe._seeded_noise(1)[0][:, None]
    expected = papers_way(pipe, pixels, noise, autograd=False)[1]
    flops = count_image(pipe)
    rows, score_functions = [], {}

    def add(way: str, dtype: str, batch: int, score: Any) -> None:
        model = {"model": name, "px": pipe.config.image_size, "gflop_per_image": flops / 1e9}
        rows.append({**model, "way": way, "dtype": dtype, "batch_size": batch})
        score_functions[way, dtype, batch] = score

    if not args.no_baseline:
        add("paper's way", "float32", 1, lambda: papers_way(pipe, pixels, noise, True)[1])
        add("paper's way, no autograd", "float32", 1, lambda: papers_way(pipe, pixels, noise, False)[1])
    for dtype in args.dtypes:
        plain = pipe if dtype == "float32" else copy.deepcopy(pipe).to(dtype=DTYPES[dtype])
        ways = {"pipeline": plain}
        if args.compile:
            ways[f"pipeline, compiled ({args.compile})"] = _compiled(plain, args.compile)
        for way, candidate in ways.items():
            for batch in args.batch_sizes:
                add(way, dtype, batch, partial(_score_in_one_pass, candidate, photos[:batch]))

    def prepare(row: dict[str, Any]) -> Any:
        score = score_functions[row["way"], row["dtype"], row["batch_size"]]
        return lambda: row.update(score_difference=abs(score() - expected))

    measure_rows(rows, prepare, flops, args.device, args.repeats)
    return rows


def _score_in_one_pass(pipe: DiffusionADPipeline, photos: list[np.ndarray]) -> float:
    """The first photo's score; fails if the pipeline has to halve the batch, which would then not be measured."""
    output = pipe(photos, batch_size=len(photos))
    if pipe._largest_batch is not None:
        pipe._largest_batch = None
        raise MemoryError(f"{len(photos)} images at once do not fit into the memory of {pipe.device}")
    return float(output.anomaly_score[0])


def _compiled(pipe: DiffusionADPipeline, mode: str) -> DiffusionADPipeline:
    pipe = copy.deepcopy(pipe)
    for network in (pipe.unet, pipe.segmenter):
        # Compiled for each batch size by itself, as in use with one that does not change.
        network.compile(mode=mode, dynamic=False)
    return pipe


if __name__ == "__main__":
    main()
