"""Between the page and the actions: values of components in, updates of components out."""

import html
import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import gradio as gr

from ..figure import NOT_SHOWN
from ..verdicts_diffusionad import percent
from .actions import Batch, Calibrated, calibrate_on, download, inspect_example, inspect_many, inspect_one
from .endpoints import one_line_errors
from .intake import LIMITS, Refusal, Settings, Upload, number, owner_of, upload_of, uploads_of
from .models import Calibration, Models, Product, about
from .pieces import KINDS, address, batch_table, compare, region_list, score_scale
from .reports import finite
from .results import Results
from .views import OPACITY, STORED, headline, load, normal_picture, p_words, promise_words, view

logger = logging.getLogger("space")
NO_MODEL = "There is no model here. Put one into checkpoints/, or name some in DIFFUSIONAD_MODELS."
MARKS = {"bad": "✕", "good": "✓", "undecided": "?", "error": "!", "note": "i"}
TIFF = (b"II*\0", b"MM\0*")


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
    if result.note:
        body += f"<p><strong>{html.escape(result.note)}</strong></p>"
    if result.is_example:
        body += f'<p class="tag">Example: {html.escape(result.name)}, inspected before you came. Now try your own.</p>'
    return card(KINDS[verdict.word], body)


def progress_card(done: int, total: int, seconds: float = 0) -> str:
    """How far it is; `seconds` have passed."""
    left = round(seconds * (total - done) / done) if done else 0
    words = f", about {left // 60 + 1} min left" if left > 90 else f", about {left} s left" if left else ""
    return (
        f'<div class="card note" role="status"><div class="wide"><p>{done} of {total} images{words}</p>'
        f'<progress max="{total}" value="{done}" aria-label="Progress"></progress></div></div>'
    )


def batch_card(batch: Batch) -> str:
    tiles = "".join(
        f'<label class="tile {kind}"><input type="radio" name="shown" value="{kind}"{" checked" * (kind == "all")}>'
        f"<strong>{count}</strong> {verdict.lower()}</label>"
        for verdict, kind, count in (
            ("All", "all", len(batch.rows)),
            *((v, kind, batch.counts[v]) for v, kind in {**KINDS, "Not inspected": "error"}.items()),
        )
    )
    # What holds for every photo, whatever its score.
    sentence = batch.calibration.verdict(0).sentence
    if (threshold := finite(batch.calibration.threshold)) is not None:
        sentence = f"threshold {threshold:.3f}. {sentence}"
    sentence = f"{batch.category}: {sentence}"  # another product may be chosen by now
    return (
        f'<fieldset class="tiles"><legend>Show</legend>{tiles}</fieldset><p role="status">{html.escape(sentence)}</p>'
    )


def images_words(calibration: Calibration) -> str:
    return f"{len(calibration.scores)} {'images of yours' if calibration.yours else 'normal images'}"


def calibration_card(calibration: Calibration, category: str, extra: str = "") -> str:
    words = "Not calibrated yet."
    if calibration.scores:
        words = f"{images_words(calibration)}. {promise_words(calibration)}"
    title = f"{category}: threshold {calibration.shown_threshold:.3f}"
    return card("note", f"<h2>{html.escape(title)}</h2><p>{html.escape(words)}</p>{extra}")


def controls(calibration: Calibration) -> tuple[dict, dict, dict, None]:
    """Threshold and false-alarm rate of the Inspect tab and threshold of the Batch tab, as they belong to it; and what
    the last one was moved to by hand: nothing any more."""
    # An update of its own for each: gradio takes the value out of it.
    return threshold_update(calibration), gr.update(value=calibration.shown_rate), threshold_update(calibration), None


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
    return text, "", hidden, hidden, "", "", "", ""


def rate_of(value: object) -> float:
    """In percent."""
    return number(value, "The false-alarm rate", 0.1, 50)


class Handlers:
    """What the page's events call. A refusal is a card in the result's place."""

    def __init__(self, results: Results, models: Models, products: Sequence[Product] = ()):
        self.results = results
        self.models = models
        self.products = {product.name: product for product in products}
        self.example_photos: dict[str, str] = {}  # their paths in the photo box: the model they belong to
        self.opening: Path | None = None  # the result that the page comes with
        self._examples: dict[str, Path | None] = {}
        self._inspecting = threading.Lock()

    def calibration(self, category: str, own: dict) -> Calibration:
        """The visitor's calibration of a category, else the model's."""
        return own.get(category) or self.models.get(category).calibration

    def moved(self, folder: Path, threshold: object, rate: object, own: dict) -> Calibration:
        """What a kept result's verdict rests on, with the controls as they are."""
        key = load(folder).key
        calibration = own.get(key) or self.models.known(key).calibration
        return calibration.moved(number(threshold, "The threshold", 0, 1), rate_of(rate))

    def photo(self, request: gr.Request, photo, category, key, *controls):
        """What to show when the photo box has changed; nothing new if it shows what was inspected already."""
        with suppress(Refusal):
            folder = self.results.open(key, owner_of(request))
            result, shown = load(folder), self.results.show(folder, folder / "photo.jpg")
            if photo["path"] == shown if photo else result.is_example and result.key == category:
                return (gr.skip(),) * 9
        return self.inspect(request, photo, category, key, *controls)

    def start(self, request: gr.Request, photo, category, key, *controls):
        """A visitor comes: the example that the page shows becomes theirs, to move its threshold and download it."""
        product = self.products.get(category)
        if photo or product is None or not product.examples:  # a photo that was quicker is being inspected
            return (gr.skip(),) * 9
        if self.opening is None:
            return self.inspect(request, photo, category, key, *controls)
        key, _ = self.results.copy(self.opening, STORED, owner_of(request))
        return gr.skip(), key, *((gr.skip(),) * 7)

    def inspect(self, request: gr.Request, photo, category, key, threshold, opacity, rate, own, *advanced):
        """Photo in, verdict and pictures out, and what the photo box shows; without a photo of theirs, the example."""
        owner, box = owner_of(request), gr.skip()
        try:
            number(threshold, "The threshold", 0, 1), rate_of(rate)
            opacity = number(opacity, "The opacity", 0, 1)
            if not self.models.names:
                return *no_result(message(NO_MODEL)), box
            model = self.models.get(category)
            if not photo or self.example_photos.get(photo["path"], category) != category:
                # What is empty is not emptied again: a photo may have been put there meanwhile.
                box, example = None if photo else box, self.example(category)
                if example is None:
                    return *no_result(EMPTY), box
                key, folder = self.results.copy(example, STORED, owner)
            else:
                upload, settings = self._original(photo, key, owner), Settings.read(*advanced)
                key, folder = inspect_one(self.results, owner, model, upload, settings)
                with upload.path.open("rb") as file:
                    if file.read(4) in TIFF:  # which browsers do not show
                        box = self.results.show(folder, folder / "photo.jpg")
            calibration = self.moved(folder, threshold, rate, own)
        except Refusal as error:
            return *no_result(message(error)), box
        return *self.result(folder, key, calibration, opacity), box

    def result(self, folder: Path, key: str, calibration: Calibration, opacity: float = OPACITY) -> tuple:
        """All that shows a kept result."""
        verdict, *shown = self._shown(folder, calibration, opacity)
        visible = gr.update(visible=True)
        return verdict, key, visible, visible, *shown, self._normal(folder, calibration)

    def _normal(self, folder: Path, calibration: Calibration) -> str:
        picture = normal_picture(folder, calibration)
        if picture is None:
            return message(NOT_SHOWN, "note")
        shown = f'<img src="{address(self.results.show(folder, picture))}" alt="The part without its defects">'
        return f"<figure>{shown}<figcaption>As it should look</figcaption></figure>"

    def example(self, category: str) -> Path | None:
        """The result of a product's first defective example, which is inspected once for all visitors."""
        product = self.products.get(category)
        if product is None or not product.examples:
            return None
        with self._inspecting:
            if category not in self._examples:
                first = min(product.examples, key=lambda example: example.is_good)
                try:
                    found = inspect_example(self.results, self.models.get(category), first.path)
                except Refusal as error:
                    logger.warning("%s", error)
                    found = None
                self._examples[category] = found
            return self._examples[category]

    def _original(self, photo: dict, key: object, owner: str) -> Upload:
        """What was uploaded, where the photo box shows a picture of it that browsers can show."""
        with suppress(Refusal):
            folder = self.results.open(key, owner)
            if photo["path"] == self.results.show(folder, folder / "photo.jpg"):
                return Upload(load(folder).name, folder / "original")
        return upload_of(photo)

    def threshold(self, key, threshold, opacity, rate, own, request: gr.Request):
        """A new verdict and pictures of a kept result; the model does not run."""
        if not key:
            return (gr.skip(),) * 4
        try:
            folder = self.results.open(key, owner_of(request))
            calibration = self.moved(folder, threshold, rate, own)
            opacity = number(opacity, "The opacity", 0, 1)
        except Refusal as error:
            return message(error), gr.skip(), gr.skip(), gr.skip()
        return self._shown(folder, calibration, opacity)

    def _shown(
        self, folder: Path, calibration: Calibration, opacity: float = OPACITY, batch: Path | None = None
    ) -> tuple[str, str, str, str]:
        """In HTML: the verdict, the pictures, the scale of scores and the regions; of a row, if its batch is given."""
        shown, result = view(folder, calibration, opacity), load(folder)
        photo, overlay = (address(self.results.show(batch or folder, file)) for file in (shown.photo, shown.overlay))
        return (
            verdict_card(folder, calibration),
            compare(result, shown, photo, overlay),
            score_scale(result, calibration),
            region_list(result, shown, overlay),
        )

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
            return gr.update(value=0.5, info=""), gr.update(), gr.update(value=0.5, info=""), None

    def missed(self, missed, category, own):
        """The controls once more, if they were set while another tab was shown."""
        return self.category(category, own) if missed else (gr.skip(),) * 4

    def redraw_missed(self, missed, key, threshold, opacity, rate, own, request: gr.Request):
        """The result with them; nothing, which could come after what was moved since, if none was missed."""
        return (False, *self.threshold(key, threshold, opacity, rate, own, request)) if missed else (gr.skip(),) * 5

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
        """Files in; progress, then the table, what its rows open from, and the downloads out."""
        nothing = gr.update(visible=False), "", "", None, None, None
        began = time.monotonic()
        try:
            model, calibration = self.models.get(category), self.calibration(category, own)
            if by_hand is not None:
                calibration = calibration.moved(number(by_hand, "The threshold", 0, 1))
            uploads, owner = uploads_of(files), owner_of(request)
            for step in inspect_many(self.results, owner, model, uploads, calibration):
                if isinstance(step, tuple):
                    yield progress_card(*step, time.monotonic() - began), *nothing
        except Refusal as error:
            yield message(error), *nothing
            return
        folder, show = step.table.parent, self.results.show
        files = show(folder, step.table), show(folder, step.archive)
        table = batch_table(step.rows)
        yield batch_card(step), gr.update(visible=True), table, "", (folder.name, calibration), *files

    def batch_row(self, opened, request: gr.Request, event: gr.EventData):
        """The full result of a row that was pressed."""
        try:
            if not opened or not isinstance(event._data, dict):
                raise Refusal("Inspect some photos first.")
            key, calibration = opened
            folder = self.results.open(key, owner_of(request))
            row = folder / str(int(number(event._data.get("row"), "The row", 0, LIMITS.files)))
            if not row.is_dir():
                raise Refusal("There is no such row.")
        except Refusal as error:
            return message(error)
        verdict, pictures, scale, regions = self._shown(row, calibration, batch=folder)
        return f"<h2>{html.escape(load(row).name)}</h2>{verdict}{pictures}{scale}{regions}"

    def recalibrate(self, files, category, rate, own, request: gr.Request):
        """Normal images in; the new calibration for this visit out."""
        nothing = gr.skip(), gr.update(visible=False)
        try:
            rate = number(rate, "The false-alarm rate", 0.1, 50) / 100
            model = self.models.get(category)
            for step in calibrate_on(self.results, owner_of(request), model, uploads_of(files), rate):
                if isinstance(step, tuple):
                    yield progress_card(*step), *nothing
        except Refusal as error:
            yield message(error), *nothing
            return
        state = calibration_card(step.calibration, model.name, calibrated_words(step))
        own = {**own, category: step.calibration}
        file = self.results.show(step.file.parent, step.file)
        yield state, own, gr.update(value=file, visible=True)

    def calibration_file(self, file, category, own):
        """A calibration file in; the same outputs."""
        if not file:
            return gr.skip(), gr.skip()
        try:
            calibration = Calibration.read(upload_of(file), self.models.get(category))
        except Refusal as error:
            return message(error), gr.skip()
        return calibration_card(calibration, self.models.known(category).name), {**own, category: calibration}

    def forget_calibration(self, category, own):
        """Back to the model's own calibration; the same outputs."""
        own = {name: calibration for name, calibration in own.items() if name != category}
        return self.show_calibration(category, own), own, gr.update(visible=False)

    def show_calibration(self, category, own):
        try:
            return calibration_card(self.calibration(category, own), self.models.known(category).name)
        except Refusal as error:
            return message(error)

    def examples(self, category):
        """Shows the examples of the chosen product alone."""
        shown = [gr.update(visible=name == category and bool(of.examples)) for name, of in self.products.items()]
        return shown[0] if len(shown) == 1 else shown  # as gradio takes it of a function with one output

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
