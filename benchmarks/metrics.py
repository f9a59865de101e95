"""Time and memory of the metrics.

    python -m benchmarks.metrics                      # what is promised: 160 maps of 256 px, and 1,000 for the memory
    python -m benchmarks.metrics --images 160 --size 1024

Maps are smooth noise with defects raised above it, as a half-trained model gives, in float32; a quarter of the images
is normal, the others have one to four defects of 5 to 40 px a side at 256 px. Made one by one, so that the peak of
memory is the metrics' own. Times are the best of `--repeats`; scikit-learn's pixel AUROC, AP and partial AUC, each of
which sorts again, stand beside them for the same answer.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from scipy import ndimage

from diffusionad_hf.evaluation.evaluator import AnomalyEvaluator
from diffusionad_hf.evaluation.metrics import aupro
from diffusionad_hf.flags import DashedParser


def make_predictions(
    num_images: int, size: int, seed: int = 0
) -> Iterator[tuple[np.ndarray, np.ndarray, float, int, str]]:
    """Yield (anomaly map, mask, score, label, defect type), one image at a time."""
    rng = np.random.default_rng(seed)
    for i in range(num_images):
        mask = np.zeros((size, size), dtype=bool)
        label = int(i % 4 > 0)
        for _ in range(rng.integers(1, 5) if label else 0):
            height, width = rng.integers(5, 41, size=2) * size // 256
            top, left = rng.integers(0, size - height), rng.integers(0, size - width)
            mask[top : top + height, left : left + width] = True
        noise = ndimage.gaussian_filter(rng.standard_normal((size, size), dtype=np.float32), 2) * 1.5 - 3
        anomaly_map = 1 / (
            1 + np.exp(-noise - rng.uniform(0, 4) * ndimage.gaussian_filter(mask.astype(np.float32), 3))
        )
        yield (
            anomaly_map,
            mask,
            float(np.sort(anomaly_map, axis=None)[-50:].mean()),
            label,
            f"type {i % 5}" if label else "good",
        )


def best_time(function: Callable[[], object], repeats: int) -> tuple[float, object]:
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        value = function()
        times.append(time.perf_counter() - began)
    return min(times), value


def compute_all(predictions: Iterator, n_bootstrap: int = 1000) -> dict:
    evaluator = AnomalyEvaluator(threshold=0.5, n_bootstrap=n_bootstrap)
    for prediction in predictions:
        evaluator.update(*prediction)
    return evaluator.compute()


def scikit_learn(maps: list[np.ndarray], masks: list[np.ndarray]) -> dict[str, float]:
    from sklearn.metrics import average_precision_score, roc_auc_score

    weights = []
    for mask in masks:
        regions = ndimage.label(mask, structure=np.ones((3, 3)))[0]
        sizes = np.bincount(regions.ravel())
        weights.append(np.where(mask, 1.0 / sizes[regions], 1.0).ravel())
    y, p, w = (np.concatenate([np.ravel(a) for a in arrays]) for arrays in (masks, maps, weights))
    standard = roc_auc_score(y, p, sample_weight=w, max_fpr=0.3)
    return {
        "pixel_auroc": float(roc_auc_score(y, p)),
        "pixel_ap": float(average_precision_score(y, p)),
        "aupro_30": float(((2 * standard - 1) * (0.3 - 0.045) + 0.045) / 0.3),
    }


def peak_gigabytes() -> float:
    """Peak resident memory of this process, in GB (Linux counts KiB, macOS bytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def main() -> None:
    parser = DashedParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=160)
    parser.add_argument("--memory-images", type=int, default=1000)
    parser.add_argument("--size", type=int, default=256, help="side of the maps in px")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    parser.add_argument("--stream-only", action="store_true", help="only feed --images maps one by one, for memory")
    args = parser.parse_args()

    if args.stream_only:
        before = peak_gigabytes()
        result = compute_all(make_predictions(args.images, args.size))
        print(json.dumps({"before": before, "peak": peak_gigabytes(), "aupro_30": result["aupro_30"]}))
        return

    # A process starts with its parent's peak, so memory is measured before anything large is made here.
    command = [sys.executable, "-m", "benchmarks.metrics", "--stream-only"]
    command += ["--images", str(args.memory_images), "--size", str(args.size)]
    memory = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(f"{args.memory_images} maps of {args.size} px, fed one by one")
    print(f"  peak memory {memory['peak']:.2f} GB, of which Python and libraries {memory['before']:.2f} GB")

    predictions = list(make_predictions(args.images, args.size))
    maps, masks = [p[0] for p in predictions], [p[1] for p in predictions]
    print(f"{args.images} maps of {args.size} px")
    rows = {
        "AUPRO at 30 % alone": lambda: aupro(maps, masks),
        "all metrics and defect types": lambda: compute_all(predictions, n_bootstrap=0),
        "all that and bootstrap intervals": lambda: compute_all(predictions),
        "scikit-learn: pixel AUROC, AP, AUPRO": lambda: scikit_learn(maps, masks),
    }
    values, seconds = {}, {}
    for name, function in rows.items():
        seconds[name], values[name] = best_time(function, args.repeats)
        print(f"  {name:40} {seconds[name]:6.2f} s")
    ours, theirs = values["all that and bootstrap intervals"], values["scikit-learn: pixel AUROC, AP, AUPRO"]
    for name, value in theirs.items():
        print(f"  {name}: {ours[name]:.9f}, scikit-learn {value:.9f}, difference {abs(ours[name] - value):.1e}")
    if args.json is not None:
        # Not earlier: torch takes memory.
        import torch

        from benchmarks.machine import describe

        result = {
            "machine": describe(torch.device("cpu")),
            "images": args.images,
            "size": args.size,
            "seconds": seconds,
            "memory": {"images": args.memory_images, **memory},
            "differences": {name: abs(ours[name] - value) for name, value in theirs.items()},
        }
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
