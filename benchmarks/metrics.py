"""Time and memory of the metrics.

    python -m benchmarks metrics                      # what is promised: 160 maps of 256 px, and 1,000 for the memory
    python -m benchmarks metrics --images 160 --size 1024

Maps are smooth noise with defects raised above it, as a half-trained model returns, in float32; a quarter of the
images are normal, the others have one to four defects of 5 to 40 px a side at 256 px. The memory is the most that is
allocated while 1,000 maps are made and fed one at a time. Times are the best of `--repeats`. scikit-learn's pixel
AUROC, AP and partial AUC, each of which sorts again, are measured for comparison and must give the same values.
"""

import tracemalloc
from collections.abc import Iterator

import numpy as np
from scipy import ndimage

from benchmarks.machine import CPU, describe, make_parser, report, timed
from diffusionad_hf.evaluation.evaluator import AnomalyEvaluator
from diffusionad_hf.evaluation.metrics import aupro

_MEMORY_IMAGES = 1000


def make_predictions(num_images: int, size: int) -> Iterator[tuple[np.ndarray, np.ndarray, float, int, str]]:
    """Yield (anomaly map, mask, score, label, defect type), one image at a time."""
    rng = np.random.default_rng(0)
    for i in range(num_images):
        mask = np.zeros((size, size), dtype=bool)
        label = int(i % 4 > 0)
        for _ in range(rng.integers(1, 5) if label else 0):
            height, width = rng.integers(5, 41, size=2) * size // 256
            top, left = rng.integers(0, size - height), rng.integers(0, size - width)
            mask[top : top + height, left : left + width] = True
        noise = ndimage.gaussian_filter(rng.standard_normal((size, size), dtype=np.float32), 2) * 1.5 - 3
        raised = rng.uniform(0, 4) * ndimage.gaussian_filter(mask.astype(np.float32), 3)
        anomaly_map = 1 / (1 + np.exp(-noise - raised))
        score = float(np.sort(anomaly_map, axis=None)[-50:].mean())
        yield anomaly_map, mask, score, label, f"type {i % 5}" if label else "good"


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


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__, repeats=3)
    parser.add_argument("--images", type=int, default=160)
    parser.add_argument("--size", type=int, default=256, help="side of the maps in px")
    args = parser.parse_args(argv)
    tracemalloc.start()
    compute_all(make_predictions(_MEMORY_IMAGES, args.size))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    predictions = list(make_predictions(args.images, args.size))
    maps, masks = [p[0] for p in predictions], [p[1] for p in predictions]
    functions = {
        "AUPRO at 30 % alone": lambda: aupro(maps, masks),
        "all metrics and defect types": lambda: compute_all(predictions, n_bootstrap=0),
        "all that and bootstrap intervals": lambda: compute_all(predictions),
        "scikit-learn: pixel AUROC, AP, AUPRO": lambda: scikit_learn(maps, masks),
    }
    rows = [
        {"what": name, "seconds": min(timed(function, CPU) for _ in range(args.repeats))}
        for name, function in functions.items()
    ]
    ours, theirs = compute_all(predictions, n_bootstrap=0), scikit_learn(maps, masks)
    result = {
        "machine": describe(CPU),
        "maps": args.images,
        "px": args.size,
        f"GB allocated for {_MEMORY_IMAGES} maps": peak / 1e9,
        "largest difference to scikit-learn": max(abs(ours[name] - value) for name, value in theirs.items()),
        "rows": rows,
    }
    report(result, args.json)


if __name__ == "__main__":
    main()
