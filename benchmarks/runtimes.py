"""Eager torch against exported models: time per image, and what it does to the scores.

    python -m benchmarks.runtimes --preset small --resolution 256
    python -m benchmarks.runtimes --model M --data-dir D [--category C] --calibration-images NORMAL

The first measures time alone, on random weights: time does not depend on them. The second also measures image AUROC
and how far scores move, on the labelled test set D; NORMAL are normal images outside of it, which int8 is calibrated
on. The runtimes take turns, so that whatever else the machine does meets them all; each call inspects one image.
Reported are the median and the lowest of the wall-clock times, and the lowest processor time of all threads together,
which other programs hardly change.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.machine import describe, find_slow_types, measure_in_turns, report
from diffusionad_hf import PRESETS, DiffusionADPipeline, build_pipeline
from diffusionad_hf.evaluation.metrics import image_metrics
from diffusionad_hf.export.exporting import export_pipeline
from diffusionad_hf.flags import DashedParser
from diffusionad_hf.images_diffusionad import load_image
from diffusionad_hf.inspection.inspection import find_images
from diffusionad_hf.loading import load_model

EAGER, EAGER_BF16 = "torch eager fp32", "torch eager bf16"
EXPORTS = {
    f"{kind} {precision}": (kind, precision)
    for kind, precision in (("onnx", "fp32"), ("openvino", "fp32"), ("openvino", "fp16"), ("openvino", "int8"))
}
# Next to eager float32, which all of them are compared with.
RUNTIMES = (EAGER_BF16, *EXPORTS)


def random_pipeline(preset: str, resolution: int) -> DiffusionADPipeline:
    """A pipeline of random weights; fresh networks would multiply zeros."""
    torch.manual_seed(0)
    pipe = build_pipeline(preset, resolution)
    with torch.no_grad():
        for parameter in [*pipe.unet.parameters(), *pipe.segmenter.parameters()]:
            parameter.add_(0.02 * torch.randn_like(parameter))
    return pipe


def labelled_images(data_dir: str, category: str | None, limit: int | None) -> tuple[list[Any], list[int]]:
    """Test images of a dataset and their labels, spread evenly over it where there are more than `limit`."""
    from diffusionad_hf.data import load_category

    test = load_category(data_dir, category)["test"]
    if limit is not None and limit < len(test):
        test = test.select(np.linspace(0, len(test) - 1, limit).round().astype(int).tolist())
    return list(test["image"]), list(test["label"])


def inspecting(pipe: DiffusionADPipeline, image: Any, processor_seconds: list[float]) -> Callable[[], None]:
    """One inspection, which also notes its processor time."""

    def inspect() -> None:
        began = time.process_time()
        pipe(image)
        processor_seconds.append(time.process_time() - began)

    return inspect


def run(
    model: str | None = None,
    *,
    preset: str = "small",
    resolution: int = 256,
    data_dir: str | None = None,
    category: str | None = None,
    calibration_images: list[str] | None = None,
    limit: int | None = None,
    runtimes: Sequence[str] = RUNTIMES,
    repeats: int = 7,
    threads: int | None = None,
    slow_types: bool = False,
) -> dict[str, Any]:
    """Measures the runtimes in turn.

    Args:
        model: a pipeline folder or Hub id; random weights of `preset` at `resolution` px without.
        preset, resolution: size of the networks and side of the images in px, without a model.
        data_dir, category: a labelled test set for the image AUROC.
        calibration_images: files, folders or patterns of normal images for int8; noise without.
        limit: use only so many test images.
        runtimes: those of `RUNTIMES` to compare with eager float32.
        repeats: timed calls of each runtime, after one that is not timed.
        threads: threads of torch and of the runtimes; torch's own choice without.
        slow_types: measure torch in bfloat16 even where the processor lacks it.

    Returns:
        The settings, and by runtime what was measured.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    pipe = load_model(model, device="cpu") if model else random_pipeline(preset, resolution)
    pipe.set_progress_bar_config(disable=True)
    size = pipe.config.image_size
    rng = np.random.default_rng(0)
    noise_images = [rng.random((size, size, 3), dtype=np.float32) for _ in range(4)]
    normal = [load_image(file) for file in find_images(calibration_images or [])[0]] or noise_images

    too_slow = find_slow_types(torch.device("cpu"), ["bfloat16"], slow_types or EAGER_BF16 not in runtimes)
    pipes = {EAGER: pipe}
    with tempfile.TemporaryDirectory() as folder:
        for name in runtimes:
            if name == EAGER_BF16:
                if too_slow:
                    continue
                pipes[name] = copy.deepcopy(pipe).to(dtype=torch.bfloat16)
                continue
            kind, precision = EXPORTS[name]
            given = normal if precision == "int8" else ()
            out = Path(folder) / f"{kind}-{precision}"
            export_pipeline(pipe, out, format=kind, precision=precision, calibration_images=given)
            pipes[name] = load_model(out)
            pipes[name].set_progress_bar_config(disable=True)
        processor: dict[str, list[float]] = {name: [] for name in pipes}
        calls = {name: inspecting(each, noise_images[0], processor[name]) for name, each in pipes.items()}
        wall = measure_in_turns(calls, torch.device("cpu"), repeats)
        found = {
            name: {
                "ms": 1e3 * statistics.median(wall[name]),
                "ms_lowest": 1e3 * min(wall[name]),
                "processor_ms_lowest": 1e3 * min(processor[name]),
            }
            for name in pipes
        }
        if data_dir is not None:
            images, labels = labelled_images(data_dir, category, limit)
            scores = {name: each(images).anomaly_score for name, each in pipes.items()}
            for name, values in scores.items():
                moved = np.abs(values - scores[EAGER])
                found[name] |= {
                    "image_auroc": image_metrics(values, labels)["image_auroc"],
                    "score_difference_mean": float(moved.mean()),
                    "score_difference_largest": float(moved.max()),
                }
        computes_in = {name: each.unet.arithmetic for name, each in pipes.items() if "torch" not in name}
    for values in found.values():
        values["times_faster"] = found[EAGER]["ms"] / values["ms"]
        values["times_faster_processor"] = found[EAGER]["processor_ms_lowest"] / values["processor_ms_lowest"]
    return {
        "model": model or f"{preset}, random weights",
        "image_size": size,
        "threads": torch.get_num_threads(),
        "machine": describe(torch.device("cpu")),
        "calibration_images": len(normal) if calibration_images else "noise",
        "test_images": len(labels) if data_dir is not None else 0,
        "versions": {name: version(name) for name in ("onnxruntime", "openvino", "nncf")},
        "computes_in": computes_in,
        "not_measured": list(too_slow.values()),
        "runtimes": found,
    }


def main() -> None:
    parser = DashedParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="pipeline folder or Hub id; random weights of --preset without")
    parser.add_argument("--preset", default="small", choices=list(PRESETS))
    parser.add_argument("--resolution", type=int, default=256, help="side of the images in px, without --model")
    parser.add_argument("--data-dir", help="dataset with a labelled test split, for the image AUROC")
    parser.add_argument("--category", help="which category of it")
    parser.add_argument("--calibration-images", nargs="+", help="normal images for int8: files, folders or patterns")
    parser.add_argument("--limit", type=int, help="use only so many test images")
    parser.add_argument(
        "--runtimes",
        nargs="+",
        choices=RUNTIMES,
        default=RUNTIMES,
        metavar="R",
        help="compared with eager float32, each name in quotes; default: all of %(choices)s",
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int)
    parser.add_argument(
        "--slow-types", action="store_true", help="torch in bfloat16 even where the processor lacks it"
    )
    parser.add_argument("--json", type=Path, help="also write the result here")
    options = vars(parser.parse_args())
    file = options.pop("json")
    result = run(**options)
    lines = [f"{result['model']}, {result['image_size']} px, {result['threads']} thread(s)"]
    lines.append(f"{'':18} {'ms':>8} {'lowest':>8} {'CPU ms':>8} {'faster':>7} {'AUROC':>7} {'|d|':>8} {'largest':>8}")
    for name, values in result["runtimes"].items():
        row = f"{name:18} {values['ms']:8.1f} {values['ms_lowest']:8.1f} {values['processor_ms_lowest']:8.1f} "
        row += f"{values['times_faster']:6.2f}x"
        if "image_auroc" in values:
            row += f" {values['image_auroc']:7.4f} {values['score_difference_mean']:8.5f} "
            row += f"{values['score_difference_largest']:8.5f}"
        lines.append(row)
    lines += result["not_measured"]
    report(result, "\n".join(lines), file)


if __name__ == "__main__":
    main()
