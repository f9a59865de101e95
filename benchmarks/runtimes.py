"""Eager torch against exported models: time per image, and what it does to the scores.

    python -m benchmarks runtimes --preset small --resolution 256
    python -m benchmarks runtimes --model M --data-dir D [--category C] --calibration-images NORMAL

The first measures time alone, on random weights: time does not depend on them. The second also measures image AUROC
and how far scores move, on the labelled test set D; NORMAL are other normal images, used to calibrate int8 (noise
without them). The runtimes take turns, so that whatever else the machine does affects all of them; each call inspects
one image. Reported are the median and the lowest wall-clock time, and the lowest processor time of all threads
together, which other programs hardly change.
"""

import copy
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.inference import load_or_build
from benchmarks.machine import CPU, describe, find_slow_types, make_parser, measure_in_turns, report, spread
from diffusionad_hf import PRESETS
from diffusionad_hf.evaluation.metrics import image_metrics
from diffusionad_hf.export.exporting import export_pipeline
from diffusionad_hf.images_diffusionad import load_image
from diffusionad_hf.inspection.inspection import find_images
from diffusionad_hf.loading import load_model

EAGER, EAGER_BF16 = "torch eager fp32", "torch eager bf16"
RUNTIMES = (EAGER_BF16, "onnx fp32", "openvino fp32", "openvino fp16", "openvino int8")


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__, repeats=7)
    parser.add_argument("--model", help="pipeline folder or Hub id; random weights of --preset without")
    parser.add_argument("--preset", default="small", choices=list(PRESETS))
    parser.add_argument("--resolution", type=int, default=256, help="side of the images in px, without --model")
    parser.add_argument("--data-dir", help="dataset with a labelled test split, for the image AUROC")
    parser.add_argument("--category", help="which category of it")
    parser.add_argument("--calibration-images", nargs="+", help="normal images for int8: files, folders or patterns")
    parser.add_argument(
        "--runtimes",
        nargs="+",
        choices=RUNTIMES,
        default=RUNTIMES,
        metavar="R",
        help="compared with eager float32, each name in quotes; default: all of %(choices)s",
    )
    parser.add_argument("--threads", type=int, help="of torch and of the runtimes")
    args = parser.parse_args(argv)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    pipe = load_or_build(args.model, args.preset, args.resolution)
    noise_images = list(np.random.default_rng(0).random((4, *pipe.size, 3), dtype=np.float32))
    normal = [load_image(file) for file in find_images(args.calibration_images or [])[0]]

    too_slow = find_slow_types(CPU, ["bfloat16"]) if EAGER_BF16 in args.runtimes else {}
    with tempfile.TemporaryDirectory() as folder:
        pipes = {EAGER: pipe}
        for name in args.runtimes:
            if name != EAGER_BF16:
                pipes[name] = _exported(pipe, name, Path(folder) / name, normal or noise_images)
            elif not too_slow:
                pipes[name] = copy.deepcopy(pipe).to(dtype=torch.bfloat16)
        rows = _measure(pipes, noise_images[0], args.repeats)
        if args.data_dir is not None:
            _compare_scores(rows, pipes, args.data_dir, args.category)
    rows += [{"runtime": EAGER_BF16, "error": reason} for reason in too_slow.values()]
    result = {
        "machine": describe(CPU),
        "model": args.model or f"{args.preset}, random weights",
        "px": pipe.config.image_size,
        "threads": torch.get_num_threads(),
        "calibrated on": f"{len(normal)} images" if normal else "noise",
        "versions": {name: version(name) for name in ("onnxruntime", "openvino", "nncf")},
        "rows": rows,
    }
    report(result, args.json)


def _exported(pipe: Any, runtime: str, folder: Path, calibration_images: list[np.ndarray]) -> Any:
    kind, precision = runtime.split()
    given = calibration_images if precision == "int8" else ()
    export_pipeline(pipe, folder, format=kind, precision=precision, calibration_images=given)
    exported = load_model(folder)
    exported.set_progress_bar_config(disable=True)
    return exported


def _measure(pipes: dict[str, Any], image: np.ndarray, repeats: int) -> list[dict[str, Any]]:
    processor: dict[str, list[float]] = {name: [] for name in pipes}

    def inspect(name: str) -> None:
        began = time.process_time()
        pipes[name](image)
        processor[name].append(time.process_time() - began)

    calls: dict[str, Callable[[], None]] = {name: partial(inspect, name) for name in pipes}
    rows = []
    for name, seconds in measure_in_turns(calls, CPU, repeats).items():
        wall = spread(seconds)
        row = {"runtime": name, "ms": 1e3 * wall["median"], "lowest_ms": 1e3 * wall["lowest"]}
        row["lowest_processor_ms"] = 1e3 * min(processor[name])
        row["times_faster"] = (rows or [row])[0]["ms"] / row["ms"]
        # Exported models name the type they compute in, which may differ from the one they store.
        rows.append({**row, "computes_in": getattr(pipes[name].unet, "arithmetic", None)})
    return rows


def _compare_scores(rows: list[dict[str, Any]], pipes: dict[str, Any], data_dir: str, category: str | None) -> None:
    from diffusionad_hf.data import load_category

    test = load_category(data_dir, category)["test"]
    images, labels = list(test["image"]), list(test["label"])
    scores = [pipe(images).anomaly_score for pipe in pipes.values()]
    for row, values in zip(rows, scores, strict=True):
        moved = np.abs(values - scores[0])
        row["image_auroc"] = image_metrics(values, labels)["image_auroc"]
        row["mean_score_difference"], row["largest_score_difference"] = float(moved.mean()), float(moved.max())


if __name__ == "__main__":
    main()
