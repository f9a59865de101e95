"""The named endpoints `/inspect`, `/inspect_batch` and `/calibrate`, for programs and assistants."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import gradio as gr

from .actions import calibrate_on, inspect_many, inspect_one
from .intake import Refusal, Settings, number, owner_of, upload_of, uploads_of
from .models import Calibration, Model, Models
from .reports import result_json
from .results import Results
from .views import load, promise_words, view


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns a refusal into the client's error."""
    try:
        yield
    except Refusal as error:
        raise gr.Error(str(error), print_exception=False) from error


def several_files() -> gr.File:
    """Files with a schema that an assistant can read: gradio's refers to definitions that are not there."""
    files = gr.File(label="files", file_count="multiple")
    schema = dict(files.api_info())
    kinds = schema.pop("$defs")
    file = {**kinds["FileData"], "properties": {**kinds["FileData"]["properties"], "meta": kinds["FileDataMeta"]}}
    files.api_info = lambda: {**schema, "items": file}
    return files


class Endpoints:
    """The functions behind the endpoints; clients see their names and docstrings."""

    def __init__(self, results: Results, models: Models):
        self.results = results
        self.models = models

    def inspect(
        self,
        image,
        category,
        threshold=None,
        calibration_file=None,
        num_noises=1,
        training=None,
        request: gr.Request = None,
    ):
        """Tell whether a part is normal or anomalous, where, and how sure that is, or why it is undecided.

        Args:
            image: The photo.
            category: Which model to use.
            threshold: Scores above it are anomalous, 0 to 1. The calibrated threshold if left out.
            calibration_file: From /calibrate; the model's own calibration if left out.
            num_noises: Average over this many noise draws, 1 to 16: slower, a little more accurate.
            training: The id of a training, whose product is used instead of the category's model.

        Returns:
            The verdict, score, threshold, p-value and regions; and the photo with the anomalies marked.
        """
        with one_line_errors():
            upload, settings = upload_of(image), Settings.read(draws=num_noises)
            model = self.models.get(training or category)
            calibration = self._calibration(model, calibration_file, threshold)
            _, folder = inspect_one(self.results, owner_of(request), model, upload, settings)
            shown = view(folder, calibration)
            return result_json(load(folder), calibration, shown.regions), self.results.show(folder, shown.overlay)

    def inspect_batch(
        self, files, category, threshold=None, calibration_file=None, training=None, request: gr.Request = None
    ):
        """Inspect many photos, or zip archives of them.

        Args:
            files: The photos and archives.
            category: Which model to use.
            threshold: Scores above it are anomalous, 0 to 1. The calibrated threshold if left out.
            calibration_file: From /calibrate; the model's own calibration if left out.
            training: The id of a training, whose product is used instead of the category's model.

        Returns:
            One record a file, highest score first, unusable files last; the table as CSV; everything as zip.
        """
        with one_line_errors():
            model, uploads = self.models.get(training or category), uploads_of(files)
            calibration = self._calibration(model, calibration_file, threshold)
            *_, batch = inspect_many(self.results, owner_of(request), model, uploads, calibration)
            files = (self.results.show(batch.table.parent, file) for file in (batch.table, batch.archive))
            return [row.record for row in batch.rows], *files

    def calibrate(self, files, category, false_alarm_rate, request: gr.Request):
        """Find the threshold for your own camera and light from 10 or more photos of normal parts.

        Args:
            files: Photos of normal parts, or zip archives of them.
            category: Which model to use.
            false_alarm_rate: The share of normal parts that may be called anomalous, such as 0.05.

        Returns:
            The threshold and what it promises; and a calibration file for /inspect and /inspect_batch.
        """
        with one_line_errors():
            rate = number(false_alarm_rate, "false_alarm_rate", 0.001, 0.5)
            model = self.models.get(category)
            *_, done = calibrate_on(self.results, owner_of(request), model, uploads_of(files), rate)
            calibration = done.calibration
            summary = {
                "category": category,
                "threshold": calibration.threshold,
                "false_alarm_rate": calibration.false_alarm_rate,
                "images": len(calibration.scores),
                "promise": promise_words(calibration),
                "unusable": done.unusable,
            }
            return summary, self.results.show(done.file.parent, done.file)

    @staticmethod
    def _calibration(model: Model, file: dict | None, threshold: object) -> Calibration:
        """What the verdict rests on."""
        calibration = Calibration.read(upload_of(file), model) if file else model.calibration
        if threshold is None:
            return calibration
        return replace(calibration, own_threshold=number(threshold, "threshold", 0, 1))
