"""Exact detection and localisation metrics.

Every metric is read from one curve: the counts of false and true positives at each distinct score of a *defect*.
Between two such scores only background is added and the true-positive rate stands still, so these vertices are the
whole ROC curve and hold every point at which precision is taken or F1 can peak. The background therefore needs one
plain float32 sort and a binary search instead of an argsort of all pixels per metric: exact, several times faster than
scikit-learn, and within 10 bytes a pixel (`python -m benchmarks.metrics`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

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
"""Keys of the results, with the names printed in tables and model cards."""

_CONNECTED_8 = np.ones((3, 3), dtype=bool)


def partial_area(fp: np.ndarray, tp: np.ndarray, max_fpr: float = 1.0) -> np.ndarray:
    """Area under the ROC curve up to `max_fpr`, divided by `max_fpr`; (..., vertices) to (...).

    Vertices are joined by straight lines, also across `max_fpr`, so the area is exact even if no score reaches that
    rate.
    """
    x, y = fp / fp[..., -1:], tp / tp[..., -1:]
    left, right = x[..., :-1], x[..., 1:]
    width, rise = right - left, np.diff(y, axis=-1)
    inside = np.clip(max_fpr - left, 0.0, width)
    slope = np.divide(rise, width, out=np.zeros_like(rise), where=width > 0)
    return np.sum(inside * (y[..., :-1] + slope * inside / 2), axis=-1) / max_fpr


def detection_metrics(fp: np.ndarray, tp: np.ndarray) -> dict[str, np.ndarray]:
    """AUROC, average precision (the step-wise sum of scikit-learn) and the best F1 over all thresholds."""
    flagged, positives = fp + tp, tp[..., -1:]
    precision = np.divide(tp, flagged, out=np.zeros_like(flagged), where=flagged > 0)
    return {
        "auroc": partial_area(fp, tp),
        "ap": np.sum(np.diff(tp, axis=-1) * precision[..., 1:], axis=-1) / positives[..., 0],
        "f1_max": np.max(2 * tp / (flagged + positives), axis=-1),
    }


def roc_vertices(
    negatives: np.ndarray, positives: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The exact curve from ascending `negatives` and ascending `positives` with `weights` (M, P).

    Returns `thresholds` (K,), descending, `fp` (2K + 2,) and `tp` (M, 2K + 2). Each distinct positive score gives the
    counts just above it and at it, so that a tie between both classes is a slanted line.
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


def image_metrics(scores: Sequence[float] | np.ndarray, labels: Sequence[int] | np.ndarray) -> dict[str, float]:
    """`image_auroc`, `image_ap` and `image_f1_max` of N scores, on any scale, and labels (0 normal / 1 anomalous).

    Empty if only one class is present.
    """
    values, anomalous = np.asarray(scores, dtype=np.float64), np.asarray(labels).astype(bool)
    if anomalous.all() or not anomalous.any():
        return {}
    positives = np.sort(values[anomalous])
    _, fp, tp = roc_vertices(np.sort(values[~anomalous]), positives, np.ones((1, len(positives))))
    return {f"image_{name}": float(value) for name, value in detection_metrics(fp, tp[0]).items()}


@dataclass
class ImagePixels:
    """The scores of one image's pixels."""

    background: np.ndarray  # float32, ascending
    defect: np.ndarray  # float32, in the order of `region_size`
    region_size: np.ndarray  # int32, size of the region that each defect pixel belongs to

    @classmethod
    def of(cls, anomaly_map: np.ndarray, mask: np.ndarray | None) -> ImagePixels:
        anomaly_map = np.asarray(anomaly_map, dtype=np.float32)
        mask = np.zeros(anomaly_map.shape, dtype=bool) if mask is None else np.asarray(mask) > 0
        if anomaly_map.ndim != 2 or anomaly_map.shape != mask.shape:
            raise ValueError(
                f"anomaly_map {anomaly_map.shape} and mask {mask.shape} must both be (height, width) and of one size: "
                "resize the map to the mask, never the mask to the map."
            )
        if not np.isfinite(anomaly_map).all():
            raise ValueError("anomaly_map holds NaN or infinite values: check the model's weights and the image.")
        ids = ndimage.label(mask, structure=_CONNECTED_8)[0][mask]
        return cls(
            background=np.sort(anomaly_map[~mask]),
            defect=anomaly_map[mask],
            region_size=np.bincount(ids, minlength=1)[ids].astype(np.int32),
        )


def pixel_curve(images: list[ImagePixels]) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """`thresholds`, `fp`, and `tp` in pixels (row 0) and in regions (row 1); None if there is no defect or background.

    AUPRO averages, over defect regions, the share of the region that is found. That is the true-positive rate with
    every defect pixel weighted by 1 / (size of its region), so it comes from the same sort as the rest.
    """
    defect = np.concatenate([image.defect for image in images]) if images else np.empty(0, np.float32)
    num_background = sum(len(image.background) for image in images)
    if not len(defect) or not num_background:
        return None
    background = np.concatenate([image.background for image in images])
    background.sort(kind="stable")  # merges the images' sorted runs
    order = np.argsort(defect)
    sizes = np.concatenate([image.region_size for image in images])[order]
    return roc_vertices(background, defect[order], np.stack([np.ones(len(sizes)), 1.0 / sizes]))


def read_pixel_metrics(fp: np.ndarray, tp: np.ndarray, found_regions: np.ndarray) -> dict[str, np.ndarray]:
    metrics = {f"pixel_{name}": value for name, value in detection_metrics(fp, tp).items()}
    return metrics | {name: partial_area(fp, found_regions, limit) for name, limit in AUPRO_LIMITS.items()}


def pixel_metrics(anomaly_maps: Iterable[np.ndarray], masks: Iterable[np.ndarray | None]) -> dict[str, float]:
    """Pixel AUROC, AP, F1-max and exact AUPRO over the pixels of all images.

    AUPRO is the area under the per-region overlap up to a false-positive rate, with every distinct score a threshold
    and 8-connected regions. The area is only divided by that rate, so a detector with saturated background scores,
    which reaches few false-positive rates, is judged on the same axis as any other.

    Args:
        anomaly_maps: N maps (H, W), read as float32; sizes may differ between images.
        masks: N masks (H, W), non-zero on defects, or None for an image without one.

    Returns:
        `pixel_auroc`, `pixel_ap`, `pixel_f1_max`, `aupro_30`, `aupro_05`; none without defect or background pixels.

    Raises:
        ValueError: If a map and its mask differ in size, or a map is not finite.
    """
    curve = pixel_curve([ImagePixels.of(*pair) for pair in zip(anomaly_maps, masks, strict=True)])
    if curve is None:
        return {}
    _, fp, (tp, found_regions) = curve
    return {name: float(value) for name, value in read_pixel_metrics(fp, tp, found_regions).items()}


def aupro(anomaly_maps: Iterable[np.ndarray], masks: Iterable[np.ndarray | None]) -> float | None:
    """AUPRO at 30 % alone, as in `pixel_metrics`; None if there is no defect or no background pixel."""
    curve = pixel_curve([ImagePixels.of(*pair) for pair in zip(anomaly_maps, masks, strict=True)])
    return None if curve is None else float(partial_area(curve[1], curve[2][1], AUPRO_LIMITS["aupro_30"]))
