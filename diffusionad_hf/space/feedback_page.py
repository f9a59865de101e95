"""The controls by which people mark verdicts, in Inspect and in Batch."""

from collections.abc import Callable
from contextlib import suppress

import gradio as gr

from .endpoints import one_line_errors
from .feedback import DEFECT, FINE, export, mark, marks_of, words
from .handlers import Handlers, message
from .intake import LIMITS, Refusal, number, owner_of
from .reports import result_json
from .traffic import QUICK
from .views import load

_QUICK = {"concurrency_limit": 2, "concurrency_id": QUICK, "show_progress": "hidden"}
_QUICK |= {"api_visibility": "private", "preprocess": False}
_SAVE = "(file) => Object.assign(document.createElement('a'), {href: file.url, download: file.orig_name}).click()"
_SAID = {FINE: "Marked as fine.", DEFECT: "Marked as a defect."}


class Marks:
    """What the controls call."""

    def __init__(self, on: Handlers):
        self.on = on
        self.results = on.results

    def of_result(self, kind: str) -> Callable:
        def say(key, threshold, rate, own, request: gr.Request):
            owner = owner_of(request)
            try:
                folder = self.results.open(key, owner)
                mark(folder, kind, result_json(load(folder), self.on.moved(folder, threshold, rate, own), []))
            except Refusal as error:
                return message(error)
            return self._said(kind, owner)

        return say

    def of_row(self, kind: str) -> Callable:
        def say(opened, row, request: gr.Request):
            owner = owner_of(request)
            if not opened or row is None:
                return message("Press a row of the table first.")
            key, calibration = opened
            try:
                folder = self.results.open(key, owner) / str(row)
                mark(folder, kind, result_json(load(folder), calibration, []))
            except Refusal as error:
                return message(error)
            return self._said(kind, owner, f"{load(folder).name}: ")

        return say

    def _said(self, kind: str, owner: str, name: str = "") -> str:
        return message(f"{name}{_SAID[kind]} In all: {words(marks_of(self.results, owner))}", "note")

    def choose(self, opened, request: gr.Request, event: gr.EventData):
        """The number of the row that was pressed, if there is such a one."""
        with suppress(Refusal):
            told = event._data if isinstance(event._data, dict) else {}
            row = int(number(told.get("row"), "The row", 0, LIMITS.files))
            if opened and (self.results.open(opened[0], owner_of(request)) / str(row)).is_dir():
                return row, ""
        return None, ""

    def export(self, request: gr.Request):
        with one_line_errors():
            return self.results.show(*export(self.results, owner_of(request)))


def _controls(marks: Marks, of: Callable[[str], Callable], inputs: list, prefix: str) -> gr.HTML:
    with gr.Row(elem_classes="marks"):
        fine = gr.Button("Wrong? This is fine", size="sm", min_width=110, elem_id=f"{prefix}-fine")
        defect = gr.Button("Wrong? This is a defect", size="sm", min_width=110, elem_id=f"{prefix}-defect")
        save = gr.Button("↓ My marks (JSON)", size="sm", min_width=110, elem_id=f"{prefix}-export")
    said, file = gr.HTML(elem_id=f"{prefix}-said"), gr.File(visible=False)
    fine.click(of(FINE), inputs, said, **_QUICK)
    defect.click(of(DEFECT), inputs, said, **_QUICK)
    save.click(marks.export, None, file, **_QUICK).success(None, file, None, js=_SAVE)
    return said


def mark_result(on: Handlers, key: gr.Textbox, inputs: list) -> None:
    """For the result of a key; `inputs` are threshold, rate and the visitor's calibrations."""
    marks = Marks(on)
    said = _controls(marks, marks.of_result, [key, *inputs], "mark")
    key.change(lambda: "", None, said, **_QUICK)


def mark_rows(on: Handlers, table: gr.HTML, opened: gr.State) -> None:
    """For the row of a batch's table that was pressed; `opened` is the batch's key and calibration."""
    marks, row = Marks(on), gr.State(None)
    said = _controls(marks, marks.of_row, [opened, row], "batch-mark")
    table.select(marks.choose, opened, [row, said], **_QUICK)
