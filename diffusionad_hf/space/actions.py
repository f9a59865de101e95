"""What the page and its API do, without any user interface: inspect one, inspect many, calibrate."""

import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image

from ..calibration import promised_rate
from ..familiarity_diffusionad import Familiarity, pixel_digest
from ..files import short_name, write_json
from ..visualization import anomaly_map_16bit
from .intake import LIMITS, Refusal, Settings, Upload, collect
from .models import Calibration, Model, ModelError, Raw
from .reports import (
    Row,
    finite,
    result_json,
    sort_rows,
    write_archive,
    write_batch_report,
    write_single_report,
    write_table,
)
from .results import Results
from .views import OPACITY, Drawing, Result, full_size, headline, kept, load, store, view

CHUNK = 8
FEWEST_CALIBRATION_IMAGES = 10
TRAINED_ON = "the model was trained on this photo, so its score says nothing of others."
COPY = "a copy of another photo, which counts once."


def inspect_one(results: Results, owner: str, model: Model, upload: Upload, settings: Settings) -> tuple[str, Path]:
    """Runs the model on one image and keeps the result; returns its key and folder."""
    image, note = upload.image(model.value_range)
    raw = model.run([image], settings)[0]
    key, folder = results.new(owner)
    store(folder, Result.of(upload.name, model, image, raw, settings, note), image, raw, upload.path)
    return key, folder


def inspect_example(results: Results, model: Model, photo: Path) -> Path:
    """Runs the model on one of its examples; returns the folder of the result, which stays."""
    upload = Upload(photo.name, photo)
    image, note = upload.image(model.value_range)
    raw = model.run([image])[0]
    folder = Path(tempfile.mkdtemp(dir=results.shelf))
    result = Result.of(upload.name, model, image, raw, Settings(), note)
    store(folder, replace(result, is_example=True), image, raw, photo)
    return folder


def download(folder: Path, kind: str, calibration: Calibration, opacity: float) -> Path:
    """Writes one of the downloads of a result: "overlay", "mask", "map", "json" or "report"."""
    if kind in ("overlay", "mask", "map"):
        return full_size(folder, kind, calibration, opacity)
    result, shown = load(folder), view(folder, calibration, opacity)
    if kind == "json":
        path = folder / f"{result.file_stem}.json"
        write_json(path, result_json(result, calibration, shown.regions))
    else:
        path = folder / f"{result.file_stem}-report.html"
        drawing, photo, reconstruction = kept(folder, calibration)
        write_single_report(
            path, Row.of(drawing, drawing.figure(photo, reconstruction)), headline(result.verdict(calibration))
        )
    return path


@dataclass(frozen=True)
class Batch:
    """A finished batch, its rows sorted."""

    category: str
    rows: list[Row]
    calibration: Calibration
    table: Path
    archive: Path

    @property
    def counts(self) -> Counter[str]:
        """How many files got which verdict."""
        return Counter(row.cells[1] for row in self.rows)


def inspect_many(
    results: Results, owner: str, model: Model, files: Sequence[Upload], calibration: Calibration
) -> Iterator[tuple[int, int] | Batch]:
    """Inspects files and archives, a few images at a time; yields (done, total) after each few and, last, the batch.

    A file that cannot be inspected is a row that says why; so is one on which the model fails, and one that is not
    reached in time.
    """
    rows: list[Row] = []
    end = time.monotonic() + LIMITS.batch_seconds
    with tempfile.TemporaryDirectory(dir=results.folder) as unpacked:
        uploads = collect(files, Path(unpacked))
        _, folder = results.new(owner)
        yield 0, len(uploads)
        for images, refused in _read(uploads, end, model.value_range):
            rows += [Row.refused(*item) for item in refused]
            answers = _run_all(model, [image for _, image, _ in images])
            for (upload, image, note), raw in zip(images, answers, strict=True):
                if raw is None:
                    rows.append(Row.refused(upload.name, "The model failed on this image."))
                    continue
                pictures = folder / str(len(rows))
                pictures.mkdir()
                result = Result.of(upload.name, model, image, raw, Settings(), note)
                rows.append(_drawn(pictures, result, image, raw, calibration))
            yield len(rows), len(uploads)
    rows = sort_rows(rows)
    table, report, archive = (folder / name for name in ("report.csv", "report.html", "inspection.zip"))
    write_table(rows, finite(calibration.threshold), table)
    write_batch_report(rows, model.name, calibration, report)
    write_archive(rows, [table, report], archive)
    yield Batch(model.name, rows, calibration, table, archive)


def _read(
    uploads: Sequence[Upload], end: float, value_range: float | None
) -> Iterator[tuple[list[tuple[Upload, torch.Tensor, str]], list[tuple[str, str]]]]:
    """Decodes a few at a time until `end`: images with notes on them, and names and reasons of what cannot be used."""
    images: list[tuple[Upload, torch.Tensor, str]] = []
    refused: list[tuple[str, str]] = []
    for upload in uploads:
        try:
            if time.monotonic() > end:
                minutes = LIMITS.batch_seconds // 60
                raise Refusal(f"{upload.name}: not reached in {minutes} minutes. Send it in another batch.")
            images.append((upload, *upload.image(value_range)))
        except Refusal as error:
            refused.append((upload.name, str(error).removeprefix(f"{upload.name}: ")))
        if (
            len(images) + len(refused) == CHUNK
            or sum(image.numel() for _, image, _ in images) > 3 * LIMITS.image_pixels
        ):
            yield images, refused
            images, refused = [], []
    if images or refused:
        yield images, refused


def _run_all(model: Model, images: list[torch.Tensor]) -> list[Raw | None]:
    """Runs the model on all at once; if it fails, on each alone, so that one image cannot spoil its neighbours."""
    try:
        return model.run(images) if images else []
    except ModelError:
        return [None] if len(images) == 1 else [_run_all(model, [image])[0] for image in images]


def _drawn(folder: Path, result: Result, image: torch.Tensor, raw: Raw, calibration: Calibration) -> Row:
    photo = store(folder, result, image, raw)
    drawing = Drawing(result, raw.anomaly_map, photo.size, calibration)
    pictures = {"overlay": folder / "overlay.jpg", "mask": folder / "mask.png", "map": folder / "map.png"}
    drawing.overlay(photo, OPACITY).save(pictures["overlay"], quality=88)
    drawing.mask().save(pictures["mask"])
    anomaly_map_16bit(raw.anomaly_map).save(pictures["map"])
    return Row.of(drawing, drawing.figure(photo, Image.fromarray(raw.reconstruction)), pictures)


@dataclass(frozen=True)
class Calibrated:
    """A new calibration, what could not be used for it, and how many of its images the former threshold rejects."""

    calibration: Calibration
    file: Path
    unusable: list[str]
    formerly_rejected: int | None


def calibrate_on(
    results: Results, owner: str, model: Model, files: Sequence[Upload], false_alarm_rate: float
) -> Iterator[tuple[int, int] | Calibrated]:
    """Calibrates a model on a visitor's normal images; yields (done, total) and, last, the calibration."""
    scores, grids, unusable, seen = [], [], [], set()
    with tempfile.TemporaryDirectory(dir=results.folder) as unpacked:
        uploads = collect(files, Path(unpacked))
        for images, refused in _read(uploads, time.monotonic() + LIMITS.batch_seconds, model.value_range):
            new = []
            for upload, image, _ in images:
                digest = pixel_digest(image)
                if model.trained_on(image) or digest in seen:
                    refused.append((upload.name, COPY if digest in seen else TRAINED_ON))
                else:
                    new.append(image)
                seen.add(digest)
            unusable += [f"{name}: {reason}" for name, reason in refused]
            found = model.run(new) if new else []
            scores += [raw.score for raw in found]
            grids += [raw.grid for raw in found]
            yield len(scores) + len(unusable), len(uploads)
    if len(scores) < FEWEST_CALIBRATION_IMAGES:
        reason = f"{len(scores)} usable images; a calibration takes {FEWEST_CALIBRATION_IMAGES} or more."
        raise Refusal(f"{reason} Not usable: {'; '.join(unusable[:3])}" if unusable else reason)
    calibration = Calibration(
        tuple(sorted(scores)),
        promised_rate(len(scores), false_alarm_rate),
        has_learnt=model.calibration.has_learnt,
        familiarity=Familiarity.of(grids),
        yours=True,
    )
    former = model.calibration.threshold
    rejected = None if former is None else sum(score > former for score in scores)
    _, folder = results.new(owner)
    start, end = "calibration-", ".json"
    file = folder / f"{start}{short_name(Path(model.name).name, len(start + end))}{end}"
    write_json(file, calibration.to_json(model))
    yield Calibrated(calibration, file, unusable, rejected)
