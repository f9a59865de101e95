"""How often the 95 % intervals of an evaluation hold the true value: simulated test sets of known quality.

    python -m benchmarks intervals                    # 1,000 test sets a row of scores, 200 a row of maps
    python -m benchmarks intervals --repeats 100      # a tenth: does it run?

Scores are normal with equal spread ("even"), or a share of the defects looks like normal parts and the others are far
from them ("missed"). Maps are noise of 16 x 16 px, around a level of its own in each image, with one or two rectangles
raised by an amount that differs from image to image ("even"; "strong": all far above the noise; "missed": not at all
in 15 % of the images). A test set has N normal and N anomalous images. The truth is that of millions of images
(scores) or 6,000 (maps). Each cell: share of the test sets whose interval holds the truth, and the mean width in
brackets. It is an error if an interval does not hold its own estimate.
"""

from collections.abc import Iterator

import numpy as np
from scipy.stats import norm

from benchmarks.machine import CPU, describe, make_parser, report
from benchmarks.recorded import BENCHMARKS, read_rows
from diffusionad_hf.evaluation.evaluator import AnomalyEvaluator
from diffusionad_hf.evaluation.intervals import exact_interval, image_intervals
from diffusionad_hf.evaluation.metrics import image_metrics, pixel_metrics

_SIZES, _THRESHOLD = (10, 30, 100), 1.645
_SCORES = [("even", 0.8), ("even", 0.95), ("even", 1.0), ("missed", 0.8), ("missed", 0.95)]
_MAPS = ("even", "missed", "strong")
_TRUE_SCORES, _TRUE_MAPS = 1_000_000, 3000  # of each class
_BOOTSTRAP = 200  # resamples; more of them change the variance little


def draw_scores(rng: np.random.Generator, num: int, world: str, auroc: float) -> tuple[np.ndarray, np.ndarray]:
    """Scores of `num` normal and `num` anomalous images."""
    normal = rng.normal(size=num)
    if auroc == 1:
        return normal.clip(-9, 9), rng.normal(20, 1, num)
    if world == "even":
        return normal, rng.normal(norm.ppf(auroc) * 2**0.5, 1, num)
    return normal, rng.normal(np.where(rng.random(num) < 2 * (1 - auroc), 0, 9), 1)


def draw_maps(rng: np.random.Generator, num: int, world: str) -> tuple[list[np.ndarray], list[np.ndarray | None]]:
    """Maps and masks of `num` anomalous and then `num` normal images."""
    masks: list[np.ndarray | None] = [np.zeros((16, 16), bool) for _ in range(num)]
    maps = []
    for mask in masks + [None] * num:
        anomaly_map = rng.normal(rng.normal(0, 0.5), 1, (16, 16))
        if mask is not None:
            for height, width in rng.integers(2, 6, size=(rng.integers(1, 3), 2)):
                top, left = rng.integers(0, 16 - height), rng.integers(0, 16 - width)
                mask[top : top + height, left : left + width] = True
            raised = 4 + rng.gamma(4, 0.5) if world == "strong" else rng.gamma(9, 0.4)
            anomaly_map += mask * raised * (world != "missed" or rng.random() > 0.15)
        maps.append(anomaly_map)
    return maps, masks + [None] * num


def evaluate_scores(rng: np.random.Generator, num: int, world: str, auroc: float) -> dict:
    normal, anomalous = draw_scores(rng, num, world, auroc)
    scores, labels = np.concatenate([normal, anomalous]), np.repeat([0, 1], num)
    metrics = image_metrics(scores, labels)
    rates = find_rates(normal, anomalous)
    intervals = {name: exact_interval(rate, num) for name, rate in rates.items()}
    return {**metrics, **rates, "intervals": image_intervals(metrics, scores, labels) | intervals}


def find_rates(normal: np.ndarray, anomalous: np.ndarray) -> dict[str, float]:
    return {
        "false_alarm_rate": float((normal > _THRESHOLD).mean()),
        "miss_rate": float((anomalous <= _THRESHOLD).mean()),
    }


def evaluate_maps(rng: np.random.Generator, num: int, world: str) -> dict:
    evaluator = AnomalyEvaluator(n_bootstrap=_BOOTSTRAP)
    for anomaly_map, mask in zip(*draw_maps(rng, num, world), strict=True):
        evaluator.update(anomaly_map, mask, 0.0, int(mask is not None))
    return {key: value for key, value in evaluator.compute().items() if not key.startswith("image")}


def true_scores(rng: np.random.Generator, world: str, auroc: float) -> dict[str, float]:
    normal, anomalous = draw_scores(rng, _TRUE_SCORES, world, auroc)
    labels = np.repeat([0, 1], len(normal))
    return image_metrics(np.concatenate([normal, anomalous]), labels) | find_rates(normal, anomalous)


def cover(truth: dict[str, float], results: Iterator[dict]) -> dict[str, str]:
    """Of each metric the share of the results whose interval holds the truth, and its mean width."""
    held: dict[str, list[bool]] = {name: [] for name in truth}
    widths: dict[str, list[float]] = {name: [] for name in truth}
    for result in results:
        for name, true in truth.items():
            low, high = result["intervals"][name]
            if not low <= result[name] <= high:
                raise SystemExit(f"{name}: {result[name]} lies outside of [{low}, {high}].")
            held[name].append(low <= true <= high)
            widths[name].append(high - low)
    return {name: f"{np.mean(held[name]):.1%} ({np.mean(widths[name]):.3f})" for name in truth}


def main(argv: list[str] | None = None) -> None:
    args = make_parser(__doc__, repeats=1000).parse_args(argv)
    rows = []
    for world, auroc in _SCORES:
        truth = true_scores(np.random.default_rng(1), world, auroc)
        for num in _SIZES:
            rng = np.random.default_rng(2)
            results = (evaluate_scores(rng, num, world, auroc) for _ in range(args.repeats))
            rows.append({"of": "scores", "world": world, "AUROC": auroc, "N": num, **cover(truth, results)})
    for world in _MAPS:
        truth = pixel_metrics(*draw_maps(np.random.default_rng(1), _TRUE_MAPS, world))
        for num in _SIZES:
            rng = np.random.default_rng(2)
            results = (evaluate_maps(rng, num, world) for _ in range(-(-args.repeats // 5)))
            rows.append({"of": "maps", "world": world, "N": num, **cover(truth, results)})
    recorded = read_rows(BENCHMARKS, "Intervals")
    report({"machine": describe(CPU), "rows": rows}, args.json, recorded=recorded, keys=["of", "world", "auroc", "n"])


if __name__ == "__main__":
    main()
