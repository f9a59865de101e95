"""What a training came to, as one HTML page."""

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..data import NORMAL as NORMAL_TYPE
from ..evaluation.plots import new_figure, plot_histogram
from ..figure import figure_of
from ..images_diffusionad import to_uint8
from ..pipeline_diffusionad import DiffusionADPipeline
from ..report import Entry, embedded, write_report
from ..verdicts_diffusionad import ANOMALOUS, NORMAL
from ..visualization import find_regions, location_words, region_threshold
from .progress import duration

_WORST, _TYPICAL = 4, 2  # pictures of normal images, and as many of defective ones


def write_training_report(
    path: Path,
    pipe: DiffusionADPipeline,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    plan: Sequence[str] = (),
    notes: Sequence[str] = (),
    curve: Path | None = None,
    preview: Path | None = None,
    worst: Any = None,
) -> None:
    """
    Writes the report of a training: plan, curve, what was learnt from, scores, and held-out images with what the model
    makes of them, the worst first.

    Args:
        path: The HTML file.
        pipe: The trained and calibrated pipeline.
        images: Held-out images in [0, 1], as they are and then with synthetic defects, `(2 N, 3, H, W)`.
        labels: 1 for those with a defect, `(2 N,)`; in the second half, too, there may be some without.
        plan: Lines such as `"Device:  CPU"`.
        notes: What else is to be said, a sentence each.
        curve: The training's CSV file.
        preview: The picture of what was learnt from.
        worst: A matplotlib figure of the test images that the model judged worst.

    Raises:
        ImportError: If matplotlib is not installed.
        OSError: If the file cannot be written.
    """
    count = len(images) // 2
    number = [row % count + 1 for row in range(2 * count) if row < count or labels[row]]
    images, labels = (torch.cat([some[:count], some[count:][labels[count:] > 0]]) for some in (images, labels))
    output = pipe(images)
    scores, defective = output.anomaly_score, labels.numpy().astype(bool)
    threshold = pipe.threshold if pipe.threshold is not None and math.isfinite(pipe.threshold) else None
    facts = dict(line.split(":", 1) for line in plan)
    facts |= {"Notes": " ".join(notes)} if notes else {}
    sections = []
    if curve is not None and curve.is_file():
        with curve.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        if rows:
            words = f"{rows[-1]['step']} steps in {duration(float(rows[-1]['seconds']))}."
            sections.append(("Curve", words, _picture(_plot_curve(rows))))
    by_type = {
        NORMAL_TYPE: pipe.calibration.scores,
        "with a synthetic defect": scores[defective],
    }
    histogram = plot_histogram({name: list(some) for name, some in by_type.items() if len(some)}, threshold)
    sections.append(("Scores", "Of images that the model was not trained on.", _picture(histogram)))
    if worst is not None:
        sections.append(("Worst test images", "", _picture(worst)))
    if preview is not None and preview.is_file():
        with Image.open(preview) as sheet:
            sections.append(("What was learnt from", "", embedded(sheet)))
    drawn = {*_shown(np.flatnonzero(~defective), -scores), *_shown(np.flatnonzero(defective), scores)}
    entries = []
    for row, (word, score) in enumerate(zip((v.word for v in output.verdict), scores, strict=True)):
        wrong = {(True, NORMAL): "missed", (False, ANOMALOUS): "false alarm"}.get((bool(defective[row]), word), "")
        regions = [] if word == NORMAL else find_regions(output.anomaly_map[row], region_threshold(threshold))
        photo = Image.fromarray(to_uint8(images[row]).permute(1, 2, 0).contiguous().numpy())
        entries.append(
            Entry(
                f"held-out image {number[row]}{', with a synthetic defect' if defective[row] else ''}",
                word,
                float(score),
                None if output.p_value is None else float(output.p_value[row]),
                [location_words(region, photo.size) for region in regions],
                note=wrong,
                picture=embedded(figure_of(photo, output, row, pipe.threshold)) if row in drawn else "",
            )
        )
    lead = pipe.calibration.verdict(0).sentence
    lead += " Pictures show the worst and some typical held-out images." if drawn else ""
    write_report(path, "Training", entries, lead=lead, facts=facts, sections=sections)


def _shown(rows: np.ndarray, order: np.ndarray) -> list[int]:
    """Of some rows the first by an order, and some in its middle."""
    ordered = rows[np.argsort(order[rows], kind="stable")]
    middle = max(len(ordered) // 2, _WORST)
    return [*ordered[:_WORST].tolist(), *ordered[middle : middle + _TYPICAL].tolist()]


def _plot_curve(rows: Sequence[dict[str, str]]) -> Any:
    figure = new_figure(10, 3.2)
    left, right = figure.subplots(1, 2)
    for axes, name, title in ((left, "loss", "loss"), (right, "validation_score", "validation score")):
        points = [(int(row["step"]), float(row[name])) for row in rows if row.get(name)]
        axes.plot(*zip(*points, strict=True) if points else ((), ()), marker="." if len(points) < 50 else "")
        axes.set(xlabel="step", title=title)
        axes.grid(alpha=0.3)
    if min((float(row["loss"]) for row in rows if row.get("loss")), default=0) > 0:
        left.set_yscale("log")
    right.set_ylim(0, 1.02)
    return figure


def _picture(figure: Any) -> str:
    content = io.BytesIO()
    figure.savefig(content, dpi=110, format="png")
    return embedded(Image.open(content))
