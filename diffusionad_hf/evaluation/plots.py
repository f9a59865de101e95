"""Plots of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..data import NORMAL
from ..files import require
from ..images_diffusionad import load_image
from ..masks import binary_mask
from ..visualization import WRITER
from .evaluator import EvaluationResult
from .intervals import show_parts
from .metrics import roc_vertices


def save_plots(result: EvaluationResult, dataset: Any, folder: str | Path) -> list[Path]:
    """Draw `roc_curve.png` (given both classes), `score_histogram.png` and `worst_cases.png`; returns their paths.

    The dataset is the one that the result was computed on; the folder is created if missing. Raises an ImportError if
    matplotlib is not installed.
    """
    require("matplotlib", "train")
    if isinstance(dataset, dict):
        dataset = dataset["test"]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    figures = {
        "score_histogram.png": plot_histogram(_scores_by_type(result), result.metrics.get("threshold")),
        "worst_cases.png": plot_worst(result, dataset),
    }
    if "image_auroc" in result.metrics:
        figures["roc_curve.png"] = _plot_roc(result)
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=110, metadata={"Software": WRITER})
    return [folder / name for name in sorted(figures)]


def new_figure(width: float, height: float) -> Any:
    """A matplotlib figure of that many inches."""
    # Not pyplot, which keeps every figure in a global list.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _plot_roc(result: EvaluationResult) -> Any:
    scores = np.array([p["anomaly_score"] for p in result.predictions])
    labels = np.array([p["label"] for p in result.predictions])
    positives = np.sort(scores[labels == 1])
    _, fp, tp = roc_vertices(np.sort(scores[labels == 0]), positives, np.ones((1, len(positives))))
    figure = new_figure(5, 5)
    axes = figure.add_subplot(
        xlabel="false-alarm rate", ylabel="detection rate", title="ROC curve of images", aspect="equal"
    )
    metrics = result.metrics
    auroc = "AUROC {} (95 %: {} to {})".format(*show_parts(metrics, "image_auroc"))
    axes.plot(fp / fp[-1], tp[0] / tp[0, -1], label=auroc, clip_on=False, zorder=3)
    axes.plot([0, 1], [0, 1], color="0.7", linestyle=":", label="chance")
    if "threshold" in metrics:
        at = metrics["false_alarm_rate"], 1 - metrics["miss_rate"]
        label = f"at the threshold {metrics['threshold']:.3g}"
        axes.plot(*at, "o", color="black", clip_on=False, zorder=4, label=label)
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    return figure


def _scores_by_type(result: EvaluationResult) -> dict[str, list[float]]:
    by_type: dict[str, list[float]] = {}
    for prediction in result.predictions:
        by_type.setdefault(prediction["defect_type"], []).append(prediction["anomaly_score"])
    return by_type


def plot_histogram(by_type: Mapping[str, Sequence[float]], threshold: float | None) -> Any:
    """A row for the scores of each type of image, the normal ones first, as a matplotlib figure."""
    names = sorted(by_type, key=lambda name: (name != NORMAL, name))
    bins = np.histogram_bin_edges(np.concatenate(list(by_type.values())), bins=40)
    figure = new_figure(7, 1.0 + 1.1 * len(names))
    rows = figure.subplots(len(names), sharex=True, squeeze=False)[:, 0]
    for axes, name in zip(rows, names, strict=True):
        axes.hist(by_type[name], bins=bins, color="tab:blue" if name == NORMAL else "tab:red")
        axes.set_title(f"{name} ({len(by_type[name])})", loc="left", fontsize=9)
        axes.yaxis.get_major_locator().set_params(integer=True)
        if threshold is not None:
            axes.axvline(threshold, color="black", linestyle="--", linewidth=1)
    rows[-1].set_xlabel("anomaly score" + (" (dashed: threshold)" if threshold is not None else ""))
    figure.supylabel("images", fontsize=9)
    return figure


def _shrunk(picture: np.ndarray) -> np.ndarray:
    """Every n-th pixel of a picture, as many as are shown."""
    step = max(1, max(picture.shape[:2]) // 512)
    return picture[::step, ::step].copy()


def plot_worst(result: EvaluationResult, dataset: Any) -> Any:
    """Lowest-scoring anomalous images, then highest-scoring normal ones, each above its anomaly map."""
    kept = [p for p in result.predictions if p["index"] in result.worst]
    kept.sort(key=lambda p: p["anomaly_score"])
    titled = {
        "Anomalous images with the lowest scores (true defect outlined)": [p for p in kept if p["label"] == 1],
        "Normal images with the highest scores": [p for p in kept if p["label"] == 0][::-1],
    }
    titled = {title: cases for title, cases in titled.items() if cases}
    columns = max(map(len, titled.values()))
    figure = new_figure(1.9 * max(columns, 4), 4.5 * len(titled))
    panels = figure.subfigures(len(titled), squeeze=False)[:, 0]
    for panel, (title, cases) in zip(panels, titled.items(), strict=True):
        panel.suptitle(title, fontsize=11)
        grid = panel.subplots(2, columns, squeeze=False)
        for axes in grid.flat:
            axes.set_axis_off()
        for (top, bottom), case in zip(grid.T, cases, strict=False):
            row = dataset[case["index"]]
            top.imshow(_shrunk(load_image(row["image"]).permute(1, 2, 0).numpy()))
            if row["mask"] is not None and (mask := _shrunk(binary_mask(row["mask"]))).any():
                top.contour(mask, levels=[0.5], colors="lime", linewidths=1)
            top.set_title(f"{case['file']}\nscore {case['anomaly_score']:.3f}", fontsize=8)
            shown = bottom.imshow(_shrunk(result.worst[case["index"]]), cmap="inferno", vmin=0, vmax=1)
        panel.colorbar(shown, ax=grid[1].tolist(), shrink=0.8)
    return figure
