"""Exact detection and localisation metrics, and the evaluation of a pipeline on a dataset.

Every metric is read from one curve: the counts of false and true positives at each distinct score of a *defect*.
Between two such scores only background is added, so the true-positive rate stands still, and these vertices are the
whole ROC curve (and hold every point at which precision is taken or F1 can peak). Background scores thus need one
plain float32 sort and a binary search, without an argsort of all pixels for each metric: exact, several times faster
than scikit-learn and within 10 bytes a pixel (`python -m benchmarks.metrics`). The tests compare every value with
scikit-learn's.
"""

from __future__ import annotations

import heapq
import json
import platform
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage
from scipy.stats import binomtest
from tqdm.auto import tqdm

from ..data import NORMAL, binary_mask, require
from ..pipeline_diffusionad import load_image
from ..version import __version__

AUPRO_LIMITS = {"aupro_30": 0.3, "aupro_05": 0.05}
"""False-positive rates up to which AUPRO is integrated; 0.3 is the benchmark's own (Bergmann et al., IJCV 2021)."""

METRIC_NAMES = {
    "image_auroc": "image AUROC",
    "image_ap": "image AP",
    "image_f1_max": "image F1-max",
    "pixel_auroc": "pixel AUROC",
    "pixel_ap": "pixel AP",
    "pixel_f1_max": "pixel F1-max",
    "aupro_30": "AUPRO at 30 %",
    "aupro_05": "AUPRO at 5 %",
}
"""Keys of the results, with the names that tables and model cards print."""

_CONNECTED_8 = np.ones((3, 3), dtype=bool)
_CLASS_NAMES = {0: "normal", 1: "anomalous"}


# -- The curve, and what is read from it ----------------------------------------------------------------------------


def _partial_area(fp: np.ndarray, tp: np.ndarray, max_fpr: float = 1.0) -> np.ndarray:
    """Area under the ROC curve up to `max_fpr`, divided by `max_fpr`; vertices along the last axis, batches before it.

    Vertices are joined by straight lines, also across `max_fpr`, so the area is exact whatever rates the scores can
    reach.
    """
    x, y = fp / fp[..., -1:], tp / tp[..., -1:]
    left, right = x[..., :-1], x[..., 1:]
    width, rise = right - left, np.diff(y, axis=-1)
    inside = np.clip(max_fpr - left, 0.0, width)
    slope = np.divide(rise, width, out=np.zeros_like(rise), where=width > 0)
    return np.sum(inside * (y[..., :-1] + slope * inside / 2), axis=-1) / max_fpr


def _detection_metrics(fp: np.ndarray, tp: np.ndarray) -> dict[str, np.ndarray]:
    """AUROC, average precision (the step-wise sum of scikit-learn) and the best F1 over all thresholds."""
    flagged, positives = fp + tp, tp[..., -1:]
    precision = np.divide(tp, flagged, out=np.zeros_like(flagged), where=flagged > 0)
    return {
        "auroc": _partial_area(fp, tp),
        "ap": np.sum(np.diff(tp, axis=-1) * precision[..., 1:], axis=-1) / positives[..., 0],
        "f1_max": np.max(2 * tp / (flagged + positives), axis=-1),
    }


def _vertices(
    negatives: np.ndarray, positives: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The exact curve from ascending `negatives` and ascending `positives` with `weights` (M, P).

    Returns `thresholds` (K,), descending, `fp` (2K + 2,) and `tp` (M, 2K + 2): each distinct positive score
    contributes the counts just above it and at it, so a tie between both classes becomes the slanted line that a tie
    is worth.
    """
    starts = np.flatnonzero(np.r_[True, positives[1:] != positives[:-1]])
    thresholds = positives[starts][::-1]
    at = np.cumsum(np.add.reduceat(weights, starts, axis=1)[:, ::-1], axis=1)
    fp = np.empty(2 * len(thresholds) + 2)
    fp[1:-1:2] = len(negatives) - np.searchsorted(negatives, thresholds, side="right")
    fp[2:-1:2] = len(negatives) - np.searchsorted(negatives, thresholds, side="left")
    fp[0], fp[-1] = 0, len(negatives)
    tp = np.zeros((len(weights), len(fp)))
    tp[:, 2:-1:2] = at
    tp[:, 3::2] = at
    return thresholds, fp, tp


def image_metrics(scores: Sequence[float], labels: Sequence[int]) -> dict[str, float]:
    """Image AUROC, AP and F1-max.

    Args:
        scores: anomaly scores, (N,), any scale.
        labels: 0 normal / 1 anomalous, (N,).

    Returns:
        `image_auroc`, `image_ap`, `image_f1_max`; empty if only one class is present.
    """
    scores, labels = np.asarray(scores, dtype=np.float64), np.asarray(labels).astype(bool)
    if labels.all() or not labels.any():
        return {}
    positives = np.sort(scores[labels])
    _, fp, tp = _vertices(np.sort(scores[~labels]), positives, np.ones((1, len(positives))))
    return {f"image_{name}": float(value) for name, value in _detection_metrics(fp, tp[0]).items()}


# -- Pixels ---------------------------------------------------------------------------------------------------------


@dataclass
class _Pixels:
    """What one image contributes to the pixel metrics."""

    background: np.ndarray  # float32, ascending
    defect: np.ndarray  # float32, in step with `region_size`
    region_size: np.ndarray  # int32, pixels of the region that each defect pixel belongs to

    @classmethod
    def of(cls, anomaly_map: np.ndarray, mask: np.ndarray) -> _Pixels:
        ids = ndimage.label(mask, structure=_CONNECTED_8)[0][mask]
        return cls(
            background=np.sort(anomaly_map[~mask]),
            defect=anomaly_map[mask],
            region_size=np.bincount(ids, minlength=1)[ids].astype(np.int32),
        )


def _pixel_curve(images: list[_Pixels]) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """`thresholds`, `fp`, and `tp` in pixels (row 0) and in regions (row 1); None where a curve is undefined.

    AUPRO averages, over defect regions, the share of the region that is found. That is the true-positive rate with
    every defect pixel weighted by 1 / (size of its region), so it comes from the same sort as the rest.
    """
    defect = np.concatenate([image.defect for image in images]) if images else np.empty(0, np.float32)
    num_background = sum(len(image.background) for image in images)
    if not len(defect) or not num_background:
        return None
    background = np.concatenate([image.background for image in images])
    background.sort(kind="stable")  # a merge sort, which makes use of every image's part being sorted already
    order = np.argsort(defect)
    sizes = np.concatenate([image.region_size for image in images])[order]
    return _vertices(background, defect[order], np.stack([np.ones(len(sizes)), 1.0 / sizes]))


def _read_pixel_metrics(fp: np.ndarray, tp: np.ndarray, found_regions: np.ndarray) -> dict[str, np.ndarray]:
    metrics = {f"pixel_{name}": value for name, value in _detection_metrics(fp, tp).items()}
    return metrics | {name: _partial_area(fp, found_regions, limit) for name, limit in AUPRO_LIMITS.items()}


def _as_map_and_mask(anomaly_map: Any, mask: Any) -> tuple[np.ndarray, np.ndarray]:
    anomaly_map = np.asarray(anomaly_map, dtype=np.float32)
    mask = np.zeros(anomaly_map.shape, dtype=bool) if mask is None else np.asarray(mask) > 0
    if anomaly_map.ndim != 2 or anomaly_map.shape != mask.shape:
        raise ValueError(
            f"anomaly_map {anomaly_map.shape} and mask {mask.shape} must both be (height, width) and of one size: "
            "resize the map to the mask, never the mask to the map."
        )
    if not np.isfinite(anomaly_map).all():
        raise ValueError("anomaly_map holds NaN or infinite values: check the model's weights and the input image.")
    return anomaly_map, mask


def pixel_metrics(anomaly_maps: Iterable[np.ndarray], masks: Iterable[np.ndarray | None]) -> dict[str, float]:
    """Pixel AUROC, AP, F1-max and exact AUPRO over the pixels of all images.

    Args:
        anomaly_maps: N maps (H, W), read as float32; sizes may differ between images.
        masks: N masks (H, W), non-zero on defects, or None for an image without one.

    Returns:
        `pixel_auroc`, `pixel_ap`, `pixel_f1_max`, `aupro_30`, `aupro_05`; empty if there is no defect or no
        background pixel.

    Raises:
        ValueError: a map and its mask differ in size, or a map is not finite.
    """
    curve = _pixel_curve([_Pixels.of(*_as_map_and_mask(*pair)) for pair in zip(anomaly_maps, masks, strict=True)])
    if curve is None:
        return {}
    _, fp, (tp, found_regions) = curve
    return {name: float(value) for name, value in _read_pixel_metrics(fp, tp, found_regions).items()}


def aupro(
    anomaly_maps: Iterable[np.ndarray], masks: Iterable[np.ndarray | None], max_fpr: float = 0.3
) -> float | None:
    """Area under the per-region overlap up to a false-positive rate, in [0, 1], with every distinct score a threshold.

    Regions are 8-connected. The area is divided by `max_fpr` and nothing else is rescaled, so a detector whose
    background scores are saturated (and can reach few false-positive rates) is judged on the same axis as any other.

    Args:
        anomaly_maps: N maps (H, W), sizes may differ between images.
        masks: N masks (H, W), non-zero on defects, or None.
        max_fpr: where to stop, in (0, 1].

    Returns:
        The area, or None if there is no defect or no background pixel.

    Raises:
        ValueError: `max_fpr` is outside (0, 1], or maps and masks do not match.
    """
    if not 0 < max_fpr <= 1:
        raise ValueError(f"max_fpr must be in (0, 1], got {max_fpr}.")
    curve = _pixel_curve([_Pixels.of(*_as_map_and_mask(*pair)) for pair in zip(anomaly_maps, masks, strict=True)])
    return None if curve is None else float(_partial_area(curve[1], curve[2][1], max_fpr))


# -- Many images ----------------------------------------------------------------------------------------------------


class AnomalyEvaluator:
    """Takes predictions image by image and computes every metric at the end.

    Memory: 4 bytes a background pixel and 8 a defect pixel are kept, and `compute` briefly needs 2.5 times that: about
    0.7 GB for 1,000 maps of 256 px. Maps are compared as float32.

    Args:
        threshold: an image is flagged when its score is above it; adds false-alarm and miss rates.
        n_bootstrap: resamples behind the 95 % intervals; 0 leaves the intervals out.
        seed: of the resampling.

    The intervals resample images, normal and anomalous ones apart, because how many there are of each was a decision
    of whoever made the test set. Image-level resamples are exact; pixel-level ones count at about 1,000 thresholds
    and are centred on the exact value. Rates get the exact binomial (Clopper-Pearson) interval, which, unlike the
    bootstrap's, does not collapse when no image was missed.
    """

    def __init__(self, threshold: float | None = None, *, n_bootstrap: int = 1000, seed: int = 0):
        self.threshold = threshold
        self.n_bootstrap = n_bootstrap
        self.seed = seed
        self._pixels: list[_Pixels | None] = []
        self._scores: list[float] = []
        self._labels: list[int] = []
        self._types: list[str] = []

    def update(
        self,
        anomaly_map: np.ndarray,
        mask: np.ndarray | None,
        score: float,
        label: int,
        defect_type: str | None = None,
    ) -> None:
        """Add one image.

        Args:
            anomaly_map: (H, W).
            mask: (H, W), non-zero on defects. None means no defect for a normal image, and "unknown" for an anomalous
                one, which then counts in the image metrics alone.
            score: the image's anomaly score.
            label: 0 normal / 1 anomalous.
            defect_type: name of the kind of defect; None is "good" or "defect", by the label.

        Raises:
            ValueError: sizes differ, values are not finite, or a normal image has defect pixels.
        """
        label = int(label)
        if label not in _CLASS_NAMES:
            raise ValueError(f"label must be 0 (normal) or 1 (anomalous), got {label}.")
        if not np.isfinite(score):
            raise ValueError(f"score must be a finite number, got {score}.")
        pixels = None
        if mask is not None or label == 0:
            anomaly_map, mask = _as_map_and_mask(anomaly_map, mask)
            if label == 0 and mask.any():
                raise ValueError(
                    "a normal image (label 0) has defect pixels in its mask: correct its label or its mask."
                )
            pixels = _Pixels.of(anomaly_map, mask)
        self._pixels.append(pixels)
        self._scores.append(float(score))
        self._labels.append(label)
        self._types.append(defect_type or (NORMAL if label == 0 else "defect"))

    def compute(self) -> dict[str, Any]:
        """All metrics as plain numbers, ready for JSON; what is undefined (one class only, no mask) is absent.

        Returns:
            The keys of `METRIC_NAMES`; `num_images`, `num_normal`, `num_anomalous`, `num_without_mask`; with a
            threshold `threshold`, `false_alarm_rate`, `miss_rate`; `intervals` {metric: [low, high]}; and
            `defect_types` {type: its metrics against all normal images}.

        Raises:
            ValueError: no image was added.
        """
        if not self._scores:
            raise ValueError("there is nothing to evaluate: no image was given.")
        labels = np.array(self._labels)
        everything = np.arange(len(labels))
        result, curve = self._metrics(everything)
        if self.n_bootstrap:
            result["intervals"] |= self._bootstrap(result, curve)
        normal = np.flatnonzero(labels == 0)
        types = np.array(self._types)
        result["defect_types"] = {}
        for name in sorted(set(types[labels == 1])):
            of_type, _ = self._metrics(np.union1d(normal, np.flatnonzero((types == name) & (labels == 1))))
            for key in ("num_normal", "num_images", "false_alarm_rate", "threshold", "intervals"):
                of_type.pop(key, None)
            result["defect_types"][str(name)] = of_type
        return result

    def _metrics(self, index: np.ndarray) -> tuple[dict[str, Any], tuple | None]:
        """Metrics of the images at `index`, and their pixel curve for the bootstrap."""
        scores, labels = np.array(self._scores)[index], np.array(self._labels)[index]
        known = [self._pixels[i] for i in index if self._pixels[i] is not None]
        result: dict[str, Any] = {
            "num_images": len(index),
            "num_normal": int(np.sum(labels == 0)),
            "num_anomalous": int(np.sum(labels == 1)),
            "num_without_mask": len(index) - len(known),
            **image_metrics(scores, labels),
        }
        curve = _pixel_curve(known)
        if curve is not None:
            result |= {name: float(v) for name, v in _read_pixel_metrics(curve[1], *curve[2]).items()}
        intervals = {}
        if self.threshold is not None:
            if np.isfinite(self.threshold):
                result["threshold"] = float(self.threshold)
            flagged = scores > self.threshold
            for name, wrong in (("false_alarm_rate", flagged[labels == 0]), ("miss_rate", ~flagged[labels == 1])):
                if len(wrong):
                    result[name] = float(wrong.mean())
                    interval = binomtest(int(wrong.sum()), len(wrong)).proportion_ci(0.95, method="exact")
                    intervals[name] = [float(interval.low), float(interval.high)]
        result["intervals"] = intervals
        return result, curve

    def _bootstrap(self, exact: dict[str, Any], curve: tuple | None) -> dict[str, list[float]]:
        """95 % percentile intervals; a resample is a row of counts, how often each image was drawn."""
        rng = np.random.default_rng(self.seed)
        labels, scores = np.array(self._labels), np.array(self._scores)
        counts = np.zeros((self.n_bootstrap, len(labels)))
        for label in _CLASS_NAMES:
            members = np.flatnonzero(labels == label)
            if len(members):
                uniform = np.full(len(members), 1 / len(members))
                counts[:, members] = rng.multinomial(len(members), uniform, size=self.n_bootstrap)
        intervals = {}
        if "image_auroc" in exact:
            order = np.argsort(-scores)
            ends = np.flatnonzero(np.r_[np.diff(scores[order]) != 0, True])
            fp, tp = (
                np.pad(np.cumsum(counts[:, order] * (labels[order] == label), axis=1)[:, ends], ((0, 0), (1, 0)))
                for label in (0, 1)
            )
            for name, samples in _detection_metrics(fp, tp).items():
                intervals[f"image_{name}"] = _interval(samples)
        if curve is not None:
            known = np.array([pixels is not None for pixels in self._pixels])
            tables = _count_tables([pixels for pixels in self._pixels if pixels is not None], *curve)
            drawn = counts[:, known]
            # A resample may hold no defect pixel, where a metric is undefined.
            drawn = drawn[drawn @ tables[1][:, -1] > 0]
            resampled = _read_pixel_metrics(*(drawn @ table for table in tables))
            centre = _read_pixel_metrics(*(table.sum(axis=0) for table in tables))
            for name, samples in resampled.items():
                intervals[name] = _interval(samples + (exact[name] - centre[name]))
        return intervals


def _interval(samples: np.ndarray) -> list[float]:
    low, high = np.clip(np.percentile(samples, [2.5, 97.5]), 0.0, 1.0)
    return [float(low), float(high)]


def _count_tables(
    images: list[_Pixels], thresholds: np.ndarray, fp: np.ndarray, tp: np.ndarray, num_thresholds: int = 1000
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """False positives, true positives and found regions of every image at a grid of thresholds, each (images, grid).

    The grid takes its thresholds at equal steps of recall (for AP, F1) and at equal and at geometric steps of the
    false-positive rate (for the areas under curves), where the exact curve has them.
    """
    fpr, recall = fp[2:-1:2] / fp[-1], tp[0, 2:-1:2] / tp[0, -1]
    third = num_thresholds // 3
    picks = np.concatenate(
        [
            np.searchsorted(recall, np.linspace(0, 1, third)),
            np.searchsorted(fpr, np.linspace(0, 1, third)),
            np.searchsorted(fpr, np.geomspace(1 / fp[-1], 1, third)),
        ]
    )
    grid = thresholds[np.unique(np.minimum(picks, len(thresholds) - 1))]
    tables = np.zeros((3, len(images), len(grid) + 2))
    for i, image in enumerate(images):
        tables[0, i, 1:-1] = len(image.background) - np.searchsorted(image.background, grid)
        tables[0, i, -1] = len(image.background)
        order = np.argsort(image.defect)
        below = np.searchsorted(image.defect[order], grid)
        for row, weight in ((1, np.ones(len(order))), (2, 1.0 / image.region_size[order])):
            cumulative = np.r_[0.0, np.cumsum(weight)]
            tables[row, i, 1:-1] = cumulative[-1] - cumulative[below]
            tables[row, i, -1] = cumulative[-1]
    return tuple(tables)


def evaluate_predictions(
    anomaly_maps: Iterable[np.ndarray],
    masks: Iterable[np.ndarray | None],
    scores: Iterable[float],
    labels: Iterable[int],
    defect_types: Iterable[str] | None = None,
    threshold: float | None = None,
    *,
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """`AnomalyEvaluator` in one call; arguments as in its `update`, one entry per image.

    Raises:
        ValueError: the arguments differ in length, or an entry is refused.
    """
    evaluator = AnomalyEvaluator(threshold, n_bootstrap=n_bootstrap, seed=seed)
    labels = list(labels)
    defect_types = [None] * len(labels) if defect_types is None else defect_types
    for entry in zip(anomaly_maps, masks, scores, labels, defect_types, strict=True):
        evaluator.update(*entry)
    return evaluator.compute()


# -- A pipeline on a dataset ----------------------------------------------------------------------------------------


@dataclass
class EvaluationResult:
    """What `evaluate_pipeline` found.

    Attributes:
        metrics: see `AnomalyEvaluator.compute`; plus `resolution` (pixels, the model's own), `seconds_per_image` and
            `provenance`.
        predictions: one dict an image: `index` in the dataset, `file`, `label`, `defect_type`, `anomaly_score`, and
            where the model is calibrated `p_value` and `is_anomalous`.
        worst: the anomaly maps of the most embarrassing images, {index: (H, W) float32}: the anomalous ones with the
            lowest scores and the normal ones with the highest.
    """

    metrics: dict[str, Any]
    predictions: list[dict[str, Any]]
    worst: dict[int, np.ndarray] = field(default_factory=dict, repr=False)

    def save_json(self, path: str | Path) -> Path:
        """Write metrics and predictions to `path`; returns it."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            json.dumps({**self.metrics, "predictions": self.predictions}, indent=2, allow_nan=False) + "\n"
        )
        return path


def evaluate_pipeline(
    pipe: Any,
    dataset: Any,
    *,
    batch_size: int | None = None,
    limit: int | None = None,
    progress: bool = True,
    n_bootstrap: int = 1000,
    num_worst: int = 8,
) -> EvaluationResult:
    """Run a `DiffusionADPipeline` over a dataset and compute every metric at each image's own size.

    One batch of images is decoded at a time. `seconds_per_image` counts the pipeline's work (preparation and resizing
    of the maps included, reading files not) and leaves out the first batch, which pays for warming up, unless it is
    the only one.

    Args:
        pipe: the pipeline; its `threshold`, if calibrated, decides the false-alarm and miss rates.
        dataset: a `datasets.Dataset` with the columns of `diffusionad_hf.data`, or a `DatasetDict`, whose "test" is
            taken.
        batch_size: images a call; the pipeline's default without.
        limit: evaluate only this many images, spread evenly over the dataset so that every defect type stays present.
        progress: show a progress bar.
        n_bootstrap: resamples behind the intervals.
        num_worst: how many misses, and how many false alarms, to keep the maps of.

    Raises:
        ValueError: the dataset is empty, or `batch_size` or `limit` is not positive.
    """
    datasets = require("datasets")
    if isinstance(dataset, dict):
        dataset = dataset["test"]
    batch_size = pipe.default_batch_size if batch_size is None else batch_size
    if batch_size < 1 or (limit is not None and limit < 1):
        raise ValueError(f"batch_size and limit must be at least 1, got {batch_size} and {limit}.")
    if not len(dataset):
        raise ValueError("the dataset has no test images to evaluate on.")
    index = np.arange(len(dataset))
    if limit is not None and limit < len(index):
        index = np.unique(np.linspace(0, len(index) - 1, limit).round().astype(int))

    files = dataset.cast_column("image", datasets.Image(decode=False))
    evaluator = AnomalyEvaluator(pipe.threshold, n_bootstrap=n_bootstrap)
    predictions: list[dict[str, Any]] = []
    worst: dict[int, list[tuple[float, int, np.ndarray]]] = {0: [], 1: []}
    timings: list[tuple[float, int]] = []
    with tqdm(total=len(index), desc="Evaluating", unit="image", disable=not progress) as bar:
        for start in range(0, len(index), batch_size):
            rows = index[start : start + batch_size]
            batch = dataset[rows]
            began = time.perf_counter()
            output = pipe(batch["image"], batch_size=batch_size)
            timings.append((time.perf_counter() - began, len(rows)))
            for i, row in enumerate(rows.tolist()):
                anomaly_map, score = output.anomaly_map[i], float(output.anomaly_score[i])
                label, defect_type = int(batch["label"][i]), batch["defect_type"][i]
                mask = None if batch["mask"][i] is None else binary_mask(batch["mask"][i])
                path = Path(files[row]["image"]["path"] or f"{row}")
                try:
                    evaluator.update(anomaly_map, mask, score, label, defect_type)
                except ValueError as error:
                    raise ValueError(f"{path}: {error}") from None
                prediction = {
                    "index": row,
                    "file": "/".join(path.parts[-2:]),
                    "label": label,
                    "defect_type": defect_type,
                }
                prediction["anomaly_score"] = score
                if output.p_value is not None:
                    prediction["p_value"] = float(output.p_value[i])
                if output.is_anomalous is not None:
                    prediction["is_anomalous"] = bool(output.is_anomalous[i])
                predictions.append(prediction)
                heapq.heappush(worst[label], (score if label == 0 else -score, row, anomaly_map))
                if len(worst[label]) > num_worst:
                    heapq.heappop(worst[label])
            bar.update(len(rows))

    timed = timings[1:] or timings
    metrics = evaluator.compute()
    metrics["resolution"] = pipe.config.image_size
    metrics["seconds_per_image"] = sum(seconds for seconds, _ in timed) / sum(count for _, count in timed)
    metrics["provenance"] = {
        "model": str(pipe.name_or_path),
        "diffusionad_hf": __version__,
        "torch": version("torch"),
        "device": str(pipe.device),
        "hardware": describe_hardware(pipe.device),
        "dtype": getattr(pipe.unet, "arithmetic", str(pipe.dtype).removeprefix("torch.")),
        "batch_size": batch_size,
    }
    return EvaluationResult(metrics, predictions, {row: m for kept in worst.values() for _, row, m in kept})


def describe_hardware(device: Any) -> str:
    """The name of a torch device's hardware, such as "NVIDIA H200" or "AMD EPYC, 2 threads"."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    try:
        # Linux gives the processor's name here alone.
        cpu_info = Path("/proc/cpuinfo").read_text()
        name = re.search(r"^model name\s*: (.+)$", cpu_info, re.MULTILINE).group(1)
    except (OSError, AttributeError):
        pass
    return f"{name}, {torch.get_num_threads()} threads" if device.type == "cpu" else name


# -- Pictures -------------------------------------------------------------------------------------------------------


def save_plots(result: EvaluationResult, dataset: Any, folder: str | Path) -> list[Path]:
    """Draw `roc_curve.png`, `score_histogram.png` and `worst_cases.png` into `folder`.

    Args:
        result: of `evaluate_pipeline`.
        dataset: the one that it was computed on, for the pictures of the worst cases.
        folder: created if it is not there.

    Returns:
        Paths of the files written. Without both classes there is no ROC curve.

    Raises:
        ImportError: matplotlib is not installed.
    """
    require("matplotlib")
    if isinstance(dataset, dict):
        dataset = dataset["test"]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    figures = {"score_histogram.png": _plot_histogram(result)}
    if result.worst:
        figures["worst_cases.png"] = _plot_worst(result, dataset)
    if "image_auroc" in result.metrics:
        figures["roc_curve.png"] = _plot_roc(result)
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=110)
    return [folder / name for name in sorted(figures)]


def _new_figure(width: float, height: float) -> Any:
    # Figures made without pyplot belong to nobody's global state, so this works in servers and in notebooks alike.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _plot_roc(result: EvaluationResult) -> Any:
    scores = np.array([p["anomaly_score"] for p in result.predictions])
    labels = np.array([p["label"] for p in result.predictions])
    positives = np.sort(scores[labels == 1])
    _, fp, tp = _vertices(np.sort(scores[labels == 0]), positives, np.ones((1, len(positives))))
    figure = _new_figure(5, 5)
    axes = figure.add_subplot(
        xlabel="false-alarm rate", ylabel="detection rate", title="ROC curve of images", aspect="equal"
    )
    metrics = result.metrics
    interval = metrics["intervals"].get("image_auroc")
    spread = f" (95 %: {interval[0]:.3f} to {interval[1]:.3f})" if interval else ""
    axes.plot(
        fp / fp[-1], tp[0] / tp[0, -1], label=f"AUROC {metrics['image_auroc']:.3f}{spread}", clip_on=False, zorder=3
    )
    axes.plot([0, 1], [0, 1], color="0.7", linestyle=":", label="chance")
    if "threshold" in metrics:
        axes.plot(
            metrics["false_alarm_rate"],
            1 - metrics["miss_rate"],
            "o",
            color="black",
            clip_on=False,
            zorder=4,
            label=f"at the threshold {metrics['threshold']:.3g}",
        )
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    return figure


def _plot_histogram(result: EvaluationResult) -> Any:
    by_type: dict[str, list[float]] = {}
    for prediction in result.predictions:
        by_type.setdefault(prediction["defect_type"], []).append(prediction["anomaly_score"])
    names = sorted(by_type, key=lambda name: (name != NORMAL, name))
    bins = np.histogram_bin_edges(np.concatenate(list(by_type.values())), bins=40)
    figure = _new_figure(7, 1.0 + 1.1 * len(names))
    rows = figure.subplots(len(names), sharex=True, squeeze=False)[:, 0]
    for axes, name in zip(rows, names, strict=True):
        axes.hist(by_type[name], bins=bins, color="tab:blue" if name == NORMAL else "tab:red")
        axes.set_title(f"{name} ({len(by_type[name])})", loc="left", fontsize=9)
        axes.yaxis.get_major_locator().set_params(integer=True)
        if "threshold" in result.metrics:
            axes.axvline(result.metrics["threshold"], color="black", linestyle="--", linewidth=1)
    rows[-1].set_xlabel("anomaly score" + (" (dashed: threshold)" if "threshold" in result.metrics else ""))
    figure.supylabel("images", fontsize=9)
    return figure


def _plot_worst(result: EvaluationResult, dataset: Any) -> Any:
    """Lowest-scoring anomalous images, then highest-scoring normal ones, each above its anomaly map."""
    kept = [p for p in result.predictions if p["index"] in result.worst]
    misses = sorted((p for p in kept if p["label"] == 1), key=lambda p: p["anomaly_score"])
    alarms = sorted((p for p in kept if p["label"] == 0), key=lambda p: -p["anomaly_score"])
    cases_by_title = {
        "Anomalous images with the lowest scores (true defect outlined)": misses,
        "Normal images with the highest scores": alarms,
    }
    cases_by_title = {title: cases for title, cases in cases_by_title.items() if cases}
    columns = max(len(cases) for cases in cases_by_title.values())
    figure = _new_figure(1.9 * max(columns, 4), 4.5 * len(cases_by_title))
    panels = figure.subfigures(len(cases_by_title), squeeze=False)[:, 0]
    for panel, (title, cases) in zip(panels, cases_by_title.items(), strict=True):
        panel.suptitle(title, fontsize=11)
        grid = panel.subplots(2, columns, squeeze=False)
        for axes in grid.flat:
            axes.set_axis_off()
        for (top, bottom), case in zip(grid.T, cases, strict=False):
            row = dataset[case["index"]]
            top.imshow(load_image(row["image"]).permute(1, 2, 0).numpy())
            mask = None if row["mask"] is None else binary_mask(row["mask"])
            if mask is not None and mask.any():
                top.contour(mask, levels=[0.5], colors="lime", linewidths=1)
            top.set_title(f"{case['file']}\nscore {case['anomaly_score']:.3f}", fontsize=8)
            shown = bottom.imshow(result.worst[case["index"]], cmap="inferno", vmin=0, vmax=1)
        panel.colorbar(shown, ax=grid[1].tolist(), shrink=0.8)
    return figure
