"""Between the page and the actions: values of components in, updates of components out."""

import html
from collections.abc import Callable
from pathlib import Path

import gradio as gr

from ..figure import NOT_SHOWN
from ..verdicts_diffusionad import ANOMALOUS, NORMAL, UNDECIDED, percent
from ..visualization import region_words
from .actions import Batch, Calibrated, calibrate_on, download, inspect_many, inspect_one
from .endpoints import one_line_errors
from .intake import Refusal, Settings, number, owner_of, upload_of, uploads_of
from .models import Calibration, Models, about
from .reports import Row, finite
from .results import Results
from .views import View, headline, load, normal_picture, p_words, promise_words, view

PICTURES_IN_GALLERY = 60
NO_MODEL = "There is no model here. Put one into checkpoints/, or name some in DIFFUSIONAD_MODELS."
MARKS = {"bad": "✕", "good": "✓", "undecided": "?", "error": "!", "note": "i"}
KINDS = {ANOMALOUS: "bad", NORMAL: "good", UNDECIDED: "undecided"}


def card(kind: str, body: str) -> str:
    """A box with a mark; `body` is HTML."""
    role = "alert" if kind == "error" else "status"
    return (
        f'<div class="card {kind}" role="{role}"><span class="mark" aria-hidden="true">{MARKS[kind]}</span>'
        f"<div>{body}</div></div>"
    )


def message(text: object, kind: str = "error") -> str:
    return card(kind, f"<p>{html.escape(str(text))}</p>")


EMPTY = message("Add a photo or pick an example.", "note")


def verdict_card(folder: Path, calibration: Calibration) -> str:
    result = load(folder)
    verdict, p_value = result.verdict(calibration), result.p_value(calibration)
    score = f"Score {result.score:.3f}"
    if (threshold := finite(calibration.threshold)) is not None:
        score += f", threshold {threshold:.3f}"
    words = [f"{score}.", verdict.sentence] + ([] if p_value is None else [p_words(p_value, len(calibration.scores))])
    body = f"<h2>{html.escape(headline(verdict))}</h2><p>{html.escape(' '.join(words))}</p>"
    return card(KINDS[verdict.word], body)


def progress_card(done: int, total: int) -> str:
    return (
        f'<div class="card note" role="status"><div class="wide"><p>{done} of {total} images</p>'
        f'<progress max="{total}" value="{done}" aria-label="Progress"></progress></div></div>'
    )


def batch_card(batch: Batch) -> str:
    tiles = "".join(
        f'<div class="tile {kind}"><strong>{batch.counts[verdict]}</strong> {verdict.lower()}</div>'
        for verdict, kind in {**KINDS, "Not inspected": "error"}.items()
    )
    # What holds for every photo, whatever its score.
    sentence = batch.calibration.verdict(0).sentence
    if (threshold := finite(batch.calibration.threshold)) is not None:
        sentence = f"Threshold {threshold:.3f}. {sentence}"
    return f'<div class="tiles" role="status">{tiles}<p>{html.escape(sentence)}</p></div>'


def caption(row: Row) -> str:
    verdict = row.record["verdict"]
    return f"{MARKS[KINDS[verdict]]} {verdict} {row.record['anomaly_score']:.3f}  {row.record['name']}"


def images_words(calibration: Calibration) -> str:
    return f"{len(calibration.scores)} {'images of yours' if calibration.yours else 'normal images'}"


def calibration_card(calibration: Calibration, category: str, extra: str = "") -> str:
    words = "Not calibrated yet."
    if calibration.scores:
        words = f"{images_words(calibration)}. {promise_words(calibration)}"
    title = f"{category}: threshold {calibration.shown_threshold:.3f}"
    return card("note", f"<h2>{html.escape(title)}</h2><p>{html.escape(words)}</p>{extra}")


def controls(calibration: Calibration) -> tuple[dict, dict, dict]:
    """Threshold and false-alarm rate of the Inspect tab and threshold of the Batch tab, as they belong to it."""
    threshold = threshold_update(calibration)
    return threshold, gr.update(value=calibration.shown_rate), threshold


def threshold_update(calibration: Calibration) -> dict:
    threshold = calibration.shown_threshold
    if calibration.threshold is None:
        info = "Not calibrated: moved by hand, it decides"
    elif calibration.own_threshold is not None:
        info = f"Set by the model's maker: {threshold:.3f}"
    else:
        info = f"Calibrated on {images_words(calibration)}: {threshold:.3f}"
    return gr.update(value=round(threshold, 4), info=info)


def no_result(text: str) -> tuple:
    hidden = gr.update(visible=False)
    return text, "", hidden, hidden, None, None, gr.update(choices=[], value=None)


def rate_of(value: object) -> float:
    """In percent."""
    return number(value, "The false-alarm rate", 0.1, 50)


class Handlers:
    """What the page's events call. A refusal is a card in the result's place."""

    def __init__(self, results: Results, models: Models):
        self.results = results
        self.models = models

    def calibration(self, category: str, own: dict) -> Calibration:
        """The visitor's calibration of a category, else the model's."""
        return own.get(category) or self.models.get(category).calibration

    def moved(self, folder: Path, threshold: object, rate: object, own: dict) -> Calibration:
        """What a kept result's verdict rests on, with the controls as they are."""
        category = load(folder).category
        calibration = own.get(category) or self.models.models[category].calibration
        return calibration.moved(number(threshold, "The threshold", 0, 1), rate_of(rate))

    def photo(self, request: gr.Request, photo, category, threshold, opacity, rate, own, *advanced):
        """Photo in, verdict and pictures out."""
        if not photo:
            return no_result(EMPTY)
        try:
            number(threshold, "The threshold", 0, 1), rate_of(rate)
            opacity = number(opacity, "The opacity", 0, 1)
            model, upload, settings = self.models.get(category), upload_of(photo), Settings.read(*advanced)
            key, folder = inspect_one(self.results, owner_of(request), model, upload, settings)
            calibration = self.moved(folder, threshold, rate, own)
        except Refusal as error:
            return no_result(message(error))
        verdict, drawn, regions = self._shown(folder, calibration, opacity)
        visible = gr.update(visible=True)
        normal = normal_picture(folder, calibration)
        normal = gr.update(
            value=None if normal is None else self.results.show(folder, normal),
            label=NOT_SHOWN if normal is None else "As it should look",
        )
        return verdict, key, visible, visible, drawn, normal, regions

    def threshold(self, key, threshold, opacity, rate, own, request: gr.Request):
        """A new verdict and picture of a kept result; the model does not run."""
        if not key:
            return gr.skip(), gr.skip(), gr.skip()
        try:
            folder = self.results.open(key, owner_of(request))
            calibration = self.moved(folder, threshold, rate, own)
            opacity = number(opacity, "The opacity", 0, 1)
        except Refusal as error:
            return message(error), gr.skip(), gr.skip()
        return self._shown(folder, calibration, opacity)

    def _shown(self, folder: Path, calibration: Calibration, opacity: float) -> tuple:
        shown, size = view(folder, calibration, opacity), load(folder).size
        choices = [("All", -1), *((region_words(i, region, size), i - 1) for i, region in enumerate(shown.regions, 1))]
        regions = gr.update(choices=choices, value=-1, visible=bool(shown.regions))
        return verdict_card(folder, calibration), self._pictures(folder, shown), regions

    def _pictures(self, folder: Path, shown: View) -> tuple[str, str]:
        return self.results.show(folder, shown.photo), self.results.show(folder, shown.overlay)

    def region(self, key, threshold, opacity, rate, own, region, request: gr.Request):
        """The picture with one region framed (none for -1)."""
        try:
            folder = self.results.open(key, owner_of(request))
            highlight = int(number(-1 if region is None else region, "The region", -1, 100))
            calibration = self.moved(folder, threshold, rate, own)
            shown = view(folder, calibration, number(opacity, "The opacity", 0, 1), highlight)
            return self._pictures(folder, shown)
        except Refusal:
            return gr.skip()

    def download(self, kind: str) -> Callable:
        def prepare(key, threshold, opacity, rate, own, request: gr.Request):
            with one_line_errors():
                folder = self.results.open(key, owner_of(request))
                calibration = self.moved(folder, threshold, rate, own)
                file = download(folder, kind, calibration, number(opacity, "The opacity", 0, 1))
                return self.results.show(folder, file)

        return prepare

    def category(self, category, own):
        """The controls as they belong to a category."""
        try:
            return controls(self.calibration(category, own))
        except Refusal:
            unknown = gr.update(value=0.5, info="")
            return unknown, gr.update(), unknown

    def rate(self, category, rate, own):
        """The threshold of another false-alarm rate."""
        try:
            calibration = self.calibration(category, own).moved(None, rate_of(rate))
        except Refusal:
            return gr.skip()
        if not calibration.scores:
            return gr.update(info="Not calibrated: a rate cannot be promised")
        threshold, share = calibration.shown_threshold, percent(calibration.false_alarm_rate)
        if threshold == 1:
            return gr.update(value=1, info=f"{len(calibration.scores)} normal images are too few for {share}")
        return gr.update(value=round(threshold, 4), info=f"{share} false alarms: {threshold:.3f}")

    def batch_threshold(self, category, own, by_hand):
        """The calibrated threshold, unless it was moved."""
        return gr.skip() if by_hand is not None else self.category(category, own)[2]

    def batch(self, files, category, by_hand, own, request: gr.Request):
        """Files in; progress, then the table, the gallery and the downloads out."""
        nothing = gr.update(visible=False), None, None, None, None
        try:
            model, calibration = self.models.get(category), self.calibration(category, own)
            if by_hand is not None:
                calibration = calibration.moved(number(by_hand, "The threshold", 0, 1))
            uploads, owner = uploads_of(files), owner_of(request)
            for step in inspect_many(self.results, owner, model, uploads, calibration):
                if isinstance(step, tuple):
                    yield progress_card(*step), *nothing
        except Refusal as error:
            yield message(error), *nothing
            return
        shown = [row for row in step.rows if row.pictures][:PICTURES_IN_GALLERY]
        folder, show = step.table.parent, self.results.show
        gallery = [(show(folder, row.pictures["overlay"]), caption(row)) for row in shown]
        pictures = gr.update(value=gallery, visible=bool(shown))
        cells = [row.cells for row in step.rows]
        files = show(folder, step.table), show(folder, step.archive)
        yield batch_card(step), gr.update(visible=True), cells, pictures, *files

    def recalibrate(self, files, category, rate, own, request: gr.Request):
        """Normal images in; the new calibration for this visit out."""
        nothing = gr.skip(), gr.update(visible=False), gr.skip(), gr.skip(), gr.skip()
        try:
            rate = number(rate, "The false-alarm rate", 0.1, 50) / 100
            model = self.models.get(category)
            for step in calibrate_on(self.results, owner_of(request), model, uploads_of(files), rate):
                if isinstance(step, tuple):
                    yield progress_card(*step), *nothing
        except Refusal as error:
            yield message(error), *nothing
            return
        state = calibration_card(step.calibration, category, calibrated_words(step))
        own = {**own, category: step.calibration}
        file = self.results.show(step.file.parent, step.file)
        yield state, own, gr.update(value=file, visible=True), *controls(step.calibration)

    def calibration_file(self, file, category, own):
        """A calibration file in; the same outputs."""
        nothing = [gr.skip()] * 4
        if not file:
            return gr.skip(), *nothing
        try:
            calibration = Calibration.read(upload_of(file), self.models.get(category))
        except Refusal as error:
            return message(error), *nothing
        return calibration_card(calibration, category), {**own, category: calibration}, *controls(calibration)

    def forget_calibration(self, category, own):
        """Back to the model's own calibration."""
        own = {name: calibration for name, calibration in own.items() if name != category}
        return self.show_calibration(category, own), own, gr.update(visible=False), *self.category(category, own)

    def show_calibration(self, category, own):
        try:
            return calibration_card(self.calibration(category, own), category)
        except Refusal as error:
            return message(error)

    def about(self, category):
        return about(self.models, category) if self.models.names else NO_MODEL

    def leave(self, request: gr.Request):
        """Forgets a visitor's results with the page."""
        if request.session_hash:
            self.results.forget(owner_of(request))


def calibrated_words(done: Calibrated) -> str:
    """HTML on how a new calibration compares, and on what it leaves out."""
    words = ""
    if done.formerly_rejected is not None:
        count = len(done.calibration.scores)
        words += f"<p>The model's own threshold calls {done.formerly_rejected} of these {count} images anomalous.</p>"
    if done.unusable:
        listed = "".join(f"<li>{html.escape(reason)}</li>" for reason in done.unusable[:10])
        words += f"<p>{len(done.unusable)} could not be used:</p><ul>{listed}</ul>"
    return words
