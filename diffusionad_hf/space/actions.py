"""What the page and its API do, without any user interface: inspect one, inspect many, calibrate."""

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..visualization import anomaly_map_16bit
from .familiarity import Familiarity, describe
from .models import Calibration, Model, ModelError, Settings
from .reports import Row, report_page, result_json, sort_rows, write_archive, write_csv
from .results import Results, write_json
from .uploads import MB, Upload, UploadError, collect, read_image
from .views import (
    View,
    companions,
    draw_mask,
    draw_overlay,
    file_stem,
    full_size,
    load,
    make_result,
    map_at,
    regions_of,
    store,
    view,
    view_photo,
)

CHUNK = 8
OPACITY = 0.6
"""Of the strongest heat, unless the visitor moves it."""
FEWEST_CALIBRATION_IMAGES = 10
_NOTHING_THRESHOLD = 1.0
"""The threshold shown where a calibration promises nothing yet: no score lies above it."""


def default_threshold(calibration: Calibration) -> float:
    """The threshold to start from: the calibrated one; 0.5 without a calibration; 1 where it can promise nothing."""
    threshold = calibration.threshold
    if threshold is None:
        return 0.5
    return min(threshold, _NOTHING_THRESHOLD)


# ---- one image ----


@dataclass(frozen=True)
class Inspected:
    """A fresh result: its key and folder."""

    key: str
    folder: Path


def inspect_one(
    results: Results, owner: str, model: Model, path: Path, name: str, calibration: Calibration, settings: Settings
) -> Inspected:
    """Runs the model on one image and keeps the result.

    Raises:
        UploadError: If the image or a setting cannot be used.
        ModelError: If the model fails.
    """
    image = read_image(path, name)
    raw = model.run([image], settings)[0]
    key, folder = results.new(owner)
    store(folder, make_result(name, model.name, image, raw, calibration, settings), image, raw, path)
    return Inspected(key, folder)


def record_of(folder: Path, threshold: float, shown: View) -> dict:
    return result_json(load(folder), threshold, shown.regions)


def download(folder: Path, kind: str, threshold: float, opacity: float) -> Path:
    """Writes one of the downloads of a result: "overlay", "mask", "map", "json" or "report".

    Raises:
        UploadError: If there is no such download.
    """
    if kind in ("overlay", "mask", "map"):
        return full_size(folder, kind, threshold, opacity)
    result, shown = load(folder), view(folder, threshold, opacity)
    if kind == "json":
        path = folder / f"{file_stem(result)}.json"
        write_json(path, record_of(folder, threshold, shown))
        return path
    if kind == "report":
        path = folder / f"{file_stem(result)}-report.html"
        path.write_text(report_page(result, threshold, shown, *companions(folder)), encoding="utf-8")
        return path
    raise UploadError(f"There is no download called {kind!r}.")


# ---- many images ----


@dataclass(frozen=True)
class Batch:
    """A batch at some moment: all rows so far, sorted; the table and the archive once it is finished."""

    done: int
    total: int
    rows: list[Row]
    threshold: float
    table: Path | None = None
    archive: Path | None = None
    records: list[dict] | None = None

    @property
    def counts(self) -> dict[str, int]:
        defective = sum(row.result is not None and row.result.is_defective(self.threshold) for row in self.rows)
        failed = sum(row.result is None for row in self.rows)
        return {"defective": defective, "good": len(self.rows) - defective - failed, "not inspected": failed}


def inspect_many(
    results: Results,
    owner: str,
    model: Model,
    files: Sequence[tuple[Path, str]],
    calibration: Calibration,
    threshold: float,
) -> Iterator[Batch]:
    """Inspects files and archives, a few images at a time; yields after each few, and the finished batch last.

    A file that cannot be inspected is a row that says why; so is one on which the model fails.

    Raises:
        UploadError: If there is nothing in the upload, or too much.
        ModelError: If the model cannot be loaded.
    """
    with tempfile.TemporaryDirectory(dir=results.folder) as unpacked:
        uploads = collect(files, Path(unpacked))
        _, folder = results.new(owner)
        rows: list[Row] = []
        yield Batch(0, len(uploads), [], threshold)
        for start in range(0, len(uploads), CHUNK):
            chunk = uploads[start : start + CHUNK]
            rows += _inspect_chunk(folder, model, chunk, start, calibration, threshold)
            yield Batch(len(rows), len(uploads), sort_rows(rows), threshold)
    rows = sort_rows(rows)
    records = [row.record if row.result else {"name": row.name, "error": row.error} for row in rows]
    table = write_csv(rows, threshold, folder / "report.csv")
    archive = write_archive(rows, table, json.dumps(records, indent=2, ensure_ascii=False), folder / "inspection.zip")
    yield Batch(len(rows), len(rows), rows, threshold, table, archive, records)


def _inspect_chunk(
    folder: Path, model: Model, chunk: list[Upload], start: int, calibration: Calibration, threshold: float
) -> list[Row]:
    images, rows = [], []
    for number, upload in enumerate(chunk, start):
        error = upload.error
        if not error:
            try:
                images.append((number, upload, read_image(upload.path, upload.name)))
                continue
            except UploadError as reason:
                error = str(reason)
        reason = error.removeprefix(f"{upload.name}: ")
        rows.append(Row(upload.name, reason[:1].upper() + reason[1:]))
    for number, upload, image, raw in _run_all(model, images, rows):
        result = make_result(upload.name, model.name, image, raw, calibration, Settings())
        photo = view_photo(image)
        values = map_at(raw.anomaly_map, photo.size)
        seen, regions = regions_of(result, values, threshold)
        pictures = folder / f"{number:04d}"
        pictures.mkdir()
        row = Row(upload.name, "", result, result_json(result, threshold, regions))
        row.overlay, row.mask, row.anomaly_map = pictures / "overlay.jpg", pictures / "mask.png", pictures / "map.png"
        draw_overlay(result, photo, values, threshold, OPACITY, seen).save(row.overlay, quality=88)
        draw_mask(result, values, threshold).save(row.mask)
        anomaly_map_16bit(raw.anomaly_map).save(row.anomaly_map)
        rows.append(row)
    return rows


def _run_all(model: Model, images: list, rows: list[Row]) -> Iterator[tuple]:
    """Runs the model on all at once; where it fails, on each alone, so that one image cannot spoil its neighbours."""
    if not images:
        return
    try:
        raws = model.run([image for _, _, image in images])
    except ModelError:
        for number, upload, image in images:
            try:
                yield number, upload, image, model.run([image])[0]
            except ModelError:
                rows.append(Row(upload.name, "The model failed on this image."))
        return
    for (number, upload, image), raw in zip(images, raws, strict=True):
        yield number, upload, image, raw


# ---- calibration ----


@dataclass(frozen=True)
class Calibrated:
    """A new calibration, what could not be used for it, and how many of its images the former threshold rejects."""

    calibration: Calibration
    file: Path
    unusable: list[str]
    formerly_rejected: int | None


def calibrate_on(
    results: Results, owner: str, model: Model, files: Sequence[tuple[Path, str]], false_alarm_rate: float
) -> Iterator[tuple[int, int] | Calibrated]:
    """Calibrates a model on a visitor's normal images; yields (done, total) and, last, the calibration.

    Raises:
        UploadError: If there are too few usable images, or the rate is out of range.
        ModelError: If the model fails.
    """
    if not 0.001 <= false_alarm_rate <= 0.5:
        raise UploadError("The false-alarm rate must lie between 0.1 % and 50 %.")
    with tempfile.TemporaryDirectory(dir=results.folder) as unpacked:
        uploads = collect(files, Path(unpacked))
        scores, familiar, unusable = [], [], []
        for start in range(0, len(uploads), CHUNK):
            images = []
            for upload in uploads[start : start + CHUNK]:
                try:
                    if upload.error:
                        raise UploadError(upload.error)
                    images.append(read_image(upload.path, upload.name))
                except UploadError as error:
                    unusable.append(str(error))
            if images:
                scores += [raw.score for raw in model.run(images)]
                familiar += [describe(image) for image in images]
            yield min(start + CHUNK, len(uploads)), len(uploads)
    if len(scores) < FEWEST_CALIBRATION_IMAGES:
        reasons = f" Not usable: {'; '.join(unusable[:3])}" if unusable else ""
        raise UploadError(
            f"{len(scores)} usable images; a calibration takes {FEWEST_CALIBRATION_IMAGES} or more.{reasons}"
        )
    calibration = Calibration(tuple(sorted(scores)), false_alarm_rate, None, Familiarity.of(familiar), True)
    former = model.calibration.threshold
    rejected = None if former is None else sum(score > former for score in scores)
    _, folder = results.new(owner)
    file = folder / f"calibration-{Path(model.name).name}.json"
    write_json(file, calibration.to_json(model.name))
    yield Calibrated(calibration, file, unusable, rejected)


def read_calibration(path: Path, category: str) -> Calibration:
    """Reads a calibration file of a visitor.

    Raises:
        UploadError: If it is none, or of another category.
    """
    if path.stat().st_size > 5 * MB:
        raise UploadError("This is not a calibration file.")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UploadError("This is not a calibration file.") from error
    return Calibration.from_json(data, category)
