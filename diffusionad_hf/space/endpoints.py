"""The named endpoints `/inspect`, `/inspect_batch` and `/calibrate`, for programs and assistants."""

from collections.abc import Iterator
from contextlib import contextmanager

import gradio as gr

from .actions import OPACITY, calibrate_on, default_threshold, inspect_many, inspect_one, read_calibration, record_of
from .context import models, results
from .handlers import ERRORS, file_of, files_of, number, owner_of, settings_of
from .models import Calibration
from .views import promise_words, view


@contextmanager
def polite() -> Iterator[None]:
    """Turns what can go wrong into the client's error, in one line."""
    try:
        yield
    except ERRORS as error:
        raise gr.Error(str(error), print_exception=False) from error


def api_threshold(threshold: object, calibration: Calibration) -> float:
    return default_threshold(calibration) if threshold is None else number(threshold, "threshold", 0, 1)


def api_calibration(category: str, file: dict | None) -> Calibration:
    model = models.get(category)
    return read_calibration(file_of(file)[0], category) if file else model.calibration


def inspect(image, category, threshold=None, calibration_file=None, num_noises=1, request: gr.Request = None):
    """Tell whether the part on a photo is defective, where, and how sure that is.

    Args:
        image: The photo.
        category: Which model to use.
        threshold: Scores above it are defective, 0 to 1. The calibrated threshold if left out.
        calibration_file: From /calibrate; the model's own calibration if left out.
        num_noises: Average over this many noise draws, 1 to 16: slower, a little more accurate.

    Returns:
        The verdict, score, threshold, p-value and regions; and the photo with the anomalies marked.
    """

    with polite():
        path, name = file_of(image)
        calibration = api_calibration(category, calibration_file)
        limit = api_threshold(threshold, calibration)
        settings = settings_of(None, num_noises, None, None, None)
        done = inspect_one(results, owner_of(request), models.get(category), path, name, calibration, settings)
        shown = view(done.folder, limit, OPACITY)
        return record_of(done.folder, limit, shown), str(shown.overlay)


def inspect_batch(files, category, threshold=None, calibration_file=None, request: gr.Request = None):
    """Inspect many photos, or zip archives of them.

    Args:
        files: The photos and archives.
        category: Which model to use.
        threshold: Scores above it are defective, 0 to 1. The calibrated threshold if left out.
        calibration_file: From /calibrate; the model's own calibration if left out.

    Returns:
        One record a file, highest score first, unusable files last; the table as CSV; everything as zip.
    """

    with polite():
        calibration = api_calibration(category, calibration_file)
        limit = api_threshold(threshold, calibration)
        model = models.get(category)
        *_, batch = inspect_many(results, owner_of(request), model, files_of(files), calibration, limit)
        return batch.records, str(batch.table), str(batch.archive)


def calibrate(files, category, false_alarm_rate, request: gr.Request):
    """Find the threshold for your own camera and light from 10 or more photos of normal parts.

    Args:
        files: Photos of normal parts, or zip archives of them.
        category: Which model to use.
        false_alarm_rate: The share of normal parts that may be called defective, such as 0.05.

    Returns:
        The threshold and what it promises; and a calibration file for /inspect and /inspect_batch.
    """

    with polite():
        rate = number(false_alarm_rate, "false_alarm_rate", 0.001, 0.5)
        *_, done = calibrate_on(results, owner_of(request), models.get(category), files_of(files), rate)
        calibration = done.calibration
        threshold = calibration.threshold
        summary = {
            "category": category,
            "threshold": threshold if threshold <= 1 else None,
            "false_alarm_rate": rate,
            "images": len(calibration.scores),
            "promise": promise_words(calibration),
            "unusable": done.unusable,
        }
        return summary, str(done.file)
