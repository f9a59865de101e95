"""The evaluation of a pipeline on a dataset."""

from __future__ import annotations

import heapq
import math
import platform
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage
from tqdm.auto import tqdm

from ..data import NORMAL
from ..files import require, write_json
from ..masks import binary_mask
from ..version import __version__
from .intervals import bootstrap_interval, exact_interval, image_intervals
from .metrics import METRIC_NAMES, ImagePixels, image_metrics, pixel_curve, read_pixel_metrics

# Read of one image for pixel metrics, and in one batch.
_MOST_PIXELS = 4_000_000
_NUM_WORST = 8  # misses and false alarms, each, whose maps are kept for the plots


class AnomalyEvaluator:
    """Collects predictions image by image and computes every metric at the end.

    It keeps 4 bytes per background pixel and 8 per defect pixel, and `compute` briefly needs 2.5 times that: about
    0.7 GB for 1,000 maps of 256 px. Maps are compared as float32.

    The 95 % intervals are `image_intervals`, `exact_interval` for rates, and `bootstrap_interval` for pixel metrics
    (see `intervals`). The bootstrap draws images with and without defect pixels separately, because whoever made the
    test set decided how many there are of each, and reads its metrics at about 1,000 thresholds.

    Args:
        threshold: images with a score above it are flagged; adds false-alarm and miss rates.
        n_bootstrap: resamples behind the intervals of pixel metrics; 0 leaves these out.
    """

    def __init__(self, threshold: float | None = None, *, n_bootstrap: int = 1000):
        self.threshold = threshold
        self.n_bootstrap = n_bootstrap
        self._pixels: list[ImagePixels | None] = []
        self._scores: list[float] = []
        self._labels: list[int] = []
        self._types: list[str] = []

    def update(
        self, anomaly_map: np.ndarray, mask: np.ndarray | None, score: float, label: int, defect_type: str = ""
    ) -> None:
        """Add an image with the label 0 (normal) or 1 (anomalous); masks are non-zero on defects.

        An anomalous image without a mask counts in the image metrics alone. Raises a ValueError if sizes differ,
        values are not finite, or a normal image has defect pixels.
        """
        label = int(label)
        if label not in (0, 1):
            raise ValueError(f"label must be 0 (normal) or 1 (anomalous), got {label}.")
        if not np.isfinite(score):
            raise ValueError(f"score must be a finite number, got {score}.")
        pixels = None
        if mask is not None or label == 0:
            pixels = ImagePixels.of(anomaly_map, mask)
            if label == 0 and len(pixels.defect):
                raise ValueError("a normal image (label 0) has defect pixels in its mask: correct its label or mask.")
        self._pixels.append(pixels)
        self._scores.append(float(score))
        self._labels.append(label)
        self._types.append(defect_type or (NORMAL if label == 0 else "defect"))

    def compute(self) -> dict[str, Any]:
        """All metrics as plain numbers, ready for JSON; those that are undefined are absent.

        These are the keys of `METRIC_NAMES`; `num_images`, `num_normal`, `num_anomalous`, `num_without_mask`; with a
        threshold `threshold`, `false_alarm_rate`, `miss_rate`; `intervals` {metric: [low, high]}; `unknown`
        {undefined metric: reason}; and `defect_types` {type: its metrics against all normal images, with those
        intervals that take no bootstrap}.
        """
        labels, types = np.array(self._labels), np.array(self._types)
        result, curve = self._metrics(np.arange(len(labels)))
        if self.n_bootstrap and curve is not None:
            result["intervals"] |= self._bootstrap(result, curve)
        result["unknown"] = self._unknown(result)
        result["defect_types"] = {}
        for name in sorted(set(types[labels == 1])):
            of_type, _ = self._metrics(np.flatnonzero((labels == 0) | (types == name)))
            for key in ("num_normal", "num_images", "false_alarm_rate", "threshold"):
                of_type.pop(key, None)
            of_type["intervals"].pop("false_alarm_rate", None)
            result["defect_types"][str(name)] = of_type
        return result

    def _metrics(self, index: np.ndarray) -> tuple[dict[str, Any], tuple | None]:
        """Metrics of the images at `index`, and their pixel curve for the bootstrap."""
        scores, labels = np.array(self._scores)[index], np.array(self._labels)[index]
        known = [pixels for i in index if (pixels := self._pixels[i]) is not None]
        num_anomalous = int(labels.sum())
        result: dict[str, Any] = {"num_images": len(index), "num_normal": len(index) - num_anomalous}
        result |= {"num_anomalous": num_anomalous, "num_without_mask": len(index) - len(known)}
        of_images = image_metrics(scores, labels)
        intervals = image_intervals(of_images, scores, labels)
        result |= of_images
        curve = pixel_curve(known)
        if curve is not None:
            result |= {name: float(v) for name, v in read_pixel_metrics(curve[1], *curve[2]).items()}
        if self.threshold is not None:
            if np.isfinite(self.threshold):
                result["threshold"] = float(self.threshold)
            flagged = scores > self.threshold
            for name, wrong in (("false_alarm_rate", flagged[labels == 0]), ("miss_rate", ~flagged[labels == 1])):
                if len(wrong):
                    result[name] = float(wrong.mean())
                    intervals[name] = exact_interval(result[name], len(wrong))
        result["intervals"] = intervals
        return result, curve

    def _unknown(self, result: dict[str, Any]) -> dict[str, str]:
        """Why metrics are not known."""
        missing = [name for name in ("normal", "anomalous") if not result[f"num_{name}"]]
        one_class = f"no {' and no '.join(missing)} images" if missing else ""
        reasons = dict.fromkeys(METRIC_NAMES, one_class or "no mask marks a defect beside background")
        if self.threshold is not None:
            reasons |= {"false_alarm_rate": "no normal images", "miss_rate": "no anomalous images"}
        return {name: reason for name, reason in reasons.items() if name not in result}

    def _bootstrap(self, exact: dict[str, Any], curve: tuple) -> dict[str, list[float]]:
        """Intervals of the pixel metrics; a resample is a row of counts: how often each image was drawn."""
        rng = np.random.default_rng(0)
        known = [pixels for pixels in self._pixels if pixels is not None]
        defective = np.array([len(pixels.defect) > 0 for pixels in known])
        counts = np.zeros((self.n_bootstrap, len(known)))
        for members in filter(len, (np.flatnonzero(~defective), np.flatnonzero(defective))):
            uniform = np.full(len(members), 1 / len(members))
            counts[:, members] = rng.multinomial(len(members), uniform, size=self.n_bootstrap)
        resampled = read_pixel_metrics(*(counts @ table for table in _count_tables(known, *curve)))
        images = int(defective.sum())
        return {name: bootstrap_interval(exact[name], samples, images) for name, samples in resampled.items()}


def _count_tables(images: list[ImagePixels], thresholds: np.ndarray, fp: np.ndarray, tp: np.ndarray) -> np.ndarray:
    """False positives, true positives and found regions of every image at a grid of thresholds: (3, images, grid).

    The grid takes thresholds of the exact curve at 333 equal steps of recall (for AP, F1) and at as many equal and
    geometric steps of the false-positive rate (for the areas under curves).
    """
    fpr, recall = fp[2:-1:2] / fp[-1], tp[0, 2:-1:2] / tp[0, -1]
    equal = np.linspace(0, 1, 333)
    steps = ((recall, equal), (fpr, equal), (fpr, np.geomspace(1 / fp[-1], 1, 333)))
    picks = np.concatenate([np.searchsorted(rates, wanted) for rates, wanted in steps])
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
    return tables


@dataclass
class EvaluationResult:
    """What `evaluate_pipeline` found."""

    # See `AnomalyEvaluator.compute`; plus `resolution` (pixels, the model's own), `seconds_per_image`, `provenance`.
    metrics: dict[str, Any]
    # For each image `index` in the dataset, `file`, `label`, `defect_type`, `anomaly_score`, and of a calibrated model
    # `p_value` and `is_anomalous`.
    predictions: list[dict[str, Any]]
    # Maps, by index, of the 8 anomalous images with the lowest scores and the 8 normal ones with the highest.
    worst: dict[int, np.ndarray] = field(default_factory=dict, repr=False)

    def save_json(self, path: str | Path) -> Path:
        """Write metrics and predictions to `path`; returns it."""
        write_json(Path(path), {**self.metrics, "predictions": self.predictions})
        return Path(path)


def evaluate_pipeline(
    pipe: Any, dataset: Any, *, batch_size: int | None = None, progress: bool = True
) -> EvaluationResult:
    """Run a `DiffusionADPipeline` over a dataset and compute every metric at each image's own size.

    Of an image of more than 4 million pixels, pixel metrics read every second one in both directions, or third, and so
    on, so that 8 photos of 12 million take less than 1.5 GB; a block of pixels is defective if one of them is.

    `seconds_per_image` is the time spent in the pipeline, without reading files and without the first batch, which
    warms up (unless it is the only one).

    Args:
        pipe: the pipeline; its `threshold`, if calibrated, decides the false-alarm and miss rates.
        dataset: a `datasets.Dataset` with the columns of `diffusionad_hf.data`, or a `DatasetDict`: its "test" split.
        batch_size: as for the pipeline.
        progress: show a progress bar.

    Raises:
        ValueError: If the dataset is empty, or an image and its label or mask contradict each other.
    """
    datasets = require("datasets", "train")
    if isinstance(dataset, dict):
        dataset = dataset["test"]
    if not len(dataset):
        raise ValueError("the dataset has no test images to evaluate on.")
    batch_size = pipe.default_batch_size if batch_size is None else batch_size
    files = dataset.cast_column("image", datasets.Image(decode=False))
    evaluator = AnomalyEvaluator(pipe.threshold)
    predictions: list[dict[str, Any]] = []
    worst: dict[int, list[tuple[float, int, np.ndarray]]] = {0: [], 1: []}
    timings: list[tuple[float, int]] = []
    with tqdm(total=len(dataset), desc="Evaluating", unit="image", disable=not progress) as bar:
        for batch in _batches(dataset, batch_size):
            start = len(predictions)
            began = time.perf_counter()
            output = pipe([row["image"] for row in batch], batch_size=batch_size)
            timings.append((time.perf_counter() - began, len(batch)))
            for i, row in enumerate(batch):
                anomaly_map, score = output.anomaly_map[i], float(output.anomaly_score[i])
                mask, defect_type, label = row["mask"], row["defect_type"], row["label"]
                mask = None if mask is None else binary_mask(mask)
                path = Path(files[start + i]["image"]["path"] or f"{start + i}")
                try:
                    if mask is not None and mask.shape != anomaly_map.shape:
                        raise ValueError(f"its mask is {mask.shape}, and not of its size {anomaly_map.shape}.")
                    anomaly_map, mask = _thinned(anomaly_map, mask)
                    evaluator.update(anomaly_map, mask, score, label, defect_type)
                except ValueError as error:
                    raise ValueError(f"{path}: {error}") from None
                prediction = {"index": start + i, "file": "/".join(path.parts[-2:]), "label": label}
                prediction |= {"defect_type": defect_type, "anomaly_score": score}
                if output.p_value is not None:
                    prediction["p_value"] = float(output.p_value[i])
                if output.is_anomalous is not None:
                    prediction["is_anomalous"] = output.verdict[i].is_anomalous
                predictions.append(prediction)
                heapq.heappush(worst[label], (score if label == 0 else -score, start + i, anomaly_map))
                if len(worst[label]) > _NUM_WORST:
                    heapq.heappop(worst[label])
                bar.update()

    seconds, counts = zip(*(timings[1:] or timings), strict=True)
    metrics = evaluator.compute()
    metrics["resolution"] = pipe.config.image_size
    metrics["seconds_per_image"] = sum(seconds) / sum(counts)
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


def _batches(dataset: Any, size: int) -> Iterator[list[dict[str, Any]]]:
    """Rows of a dataset, at most so many at a time, and fewer if their images are large."""
    batch: list[dict[str, Any]] = []
    for row in dataset:
        batch.append(row)
        if len(batch) == size or sum(row["image"].width * row["image"].height for row in batch) >= _MOST_PIXELS:
            yield batch
            batch = []
    if batch:
        yield batch


def _thinned(anomaly_map: np.ndarray, mask: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
    """A map, and a mask of its size, with at most so many pixels as are read of an image."""
    step = math.ceil(math.sqrt(anomaly_map.size / _MOST_PIXELS))
    if step == 1:
        return anomaly_map, mask
    if mask is not None:
        mask = ndimage.maximum_filter(mask, step)[::step, ::step]
    return anomaly_map[::step, ::step].copy(), mask


def describe_hardware(device: Any) -> str:
    """The name of a torch device's hardware, such as "NVIDIA H200" or "AMD EPYC, 2 threads"."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    # The only place where Linux gives the processor's name.
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.is_file() and (found := re.search(r"^model name\s*: (.+)$", cpu_info.read_text(), re.MULTILINE)):
        name = found[1]
    return f"{name}, {torch.get_num_threads()} threads" if device.type == "cpu" else name
