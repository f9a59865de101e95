"""Between the page and the actions: values of components in, updates of components out."""

import html
import re
import secrets
from collections.abc import Callable
from pathlib import Path

import gradio as gr

from ..pipeline_diffusionad import conformal_threshold
from .actions import (
    Batch,
    Calibrated,
    calibrate_on,
    default_threshold,
    download,
    inspect_many,
    inspect_one,
    read_calibration,
)
from .context import models, results
from .models import Calibration, ModelError, Settings, about
from .reports import verdict_word
from .results import ResultGone
from .uploads import UploadError, shown_name
from .views import companions, load, p_words, percent, promise_words, region_words, view

ERRORS = (UploadError, ModelError, ResultGone)
PICTURES_IN_GALLERY = 60


# ---- from the browser, and back ----


def owner_of(request: gr.Request) -> str:
    # A caller without a session gets a result of its own that no later call can open.
    return request.session_hash or secrets.token_hex(16)


def file_of(value: dict | None) -> tuple[Path, str]:
    """Where gradio stored an upload (it has checked that it is one), and what its sender calls it."""
    if not value or not value.get("path"):
        raise UploadError("Choose an image first.")
    return Path(value["path"]), shown_name(value.get("orig_name") or Path(value["path"]).name) or "image"


def files_of(values: list[dict] | None) -> list[tuple[Path, str]]:
    return [file_of(value) for value in values or []]


def number(value: object, name: str, low: float, high: float) -> float:
    if isinstance(value, (int, float)) and low <= value <= high:
        return float(value)
    raise UploadError(f"{name} must be a number from {low:g} to {high:g}.")


def settings_of(seed: object, draws: object, small: object, big: object, resolution: object) -> Settings:
    def whole(value: object, name: str, low: int, high: int) -> int | None:
        text = "" if value is None else str(value).strip()
        if not text:
            return None
        if not re.fullmatch(r"[0-9]{1,10}(\.0)?", text) or not low <= float(text) <= high:
            raise UploadError(f"{name} must be a whole number from {low} to {high}.")
        return int(float(text))

    return Settings(
        seed=whole(seed, "The seed", 0, 2**31),
        num_noises=whole(draws, "Noise draws", 1, 16) or 1,
        small_timestep=whole(small, "The small timestep", 0, 999),
        big_timestep=whole(big, "The big timestep", 0, 999),
        resolution=whole(resolution, "The resolution", 64, 512),
    )


def calibration_of(category: str, own: dict) -> Calibration:
    """The visitor's calibration of a category, else the model's."""
    return own.get(category) or models.get(category).calibration


def message(text: object, kind: str = "error") -> str:
    mark, role = {"error": ("!", "alert"), "note": ("i", "status")}[kind]
    return (
        f'<div class="card {kind}" role="{role}"><span class="mark" aria-hidden="true">{mark}</span>'
        f"<div><p>{html.escape(str(text))}</p></div></div>"
    )


EMPTY = message("Add a photo or pick an example.", "note")
NO_MODEL = "There is no model here. Put one into checkpoints/, or name some in DIFFUSIONAD_MODELS."


def verdict_card(folder: Path, threshold: float) -> str:
    result = load(folder)
    defective = result.is_defective(threshold)
    lines = [f"Score {result.score:.3f}, threshold {threshold:.3f}."]
    if result.p_value is not None:
        lines.append(p_words(result.p_value, result.calibration_images))
    elif result.settings_changed:
        lines.append("Other settings than it was calibrated with: nothing is known of false alarms.")
    else:
        lines.append("This model is not calibrated: nothing is known of false alarms.")
    warning = ""
    if result.unfamiliar:
        warning = (
            f'<p class="warning"><strong>Unlike any normal {html.escape(result.category)} image.</strong> '
            "Another object, position, distance, light or focus? Do not rely on the verdict.</p>"
        )
    kind, mark = ("bad", "✕") if defective else ("good", "✓")
    return (
        f'<div class="card {kind}" role="status"><span class="mark" aria-hidden="true">{mark}</span>'
        f"<div><h2>{verdict_word(result, threshold)}</h2><p>{html.escape(' '.join(lines))}</p>{warning}</div></div>"
    )


# ---- Inspect ----


def region_choices(folder: Path, regions: list) -> dict:
    size = load(folder).size
    choices = [("All", -1), *((region_words(i, region, size), i - 1) for i, region in enumerate(regions, 1))]
    return gr.update(choices=choices, value=-1, visible=bool(regions))


def hide_result(card: str) -> tuple:
    hidden = gr.update(visible=False)
    return card, "", hidden, hidden, None, None, None, gr.update(choices=[], value=None)


def on_photo(photo, category, threshold, opacity, own, seed, draws, small, big, resolution, request: gr.Request):
    """Photo in, verdict and pictures out. An error is a card in the verdict's place."""
    if not photo:
        return hide_result(EMPTY)
    try:
        threshold, opacity = number(threshold, "The threshold", 0, 1), number(opacity, "The opacity", 0, 1)
        path, name = file_of(photo)
        done = inspect_one(
            results,
            owner_of(request),
            models.get(category),
            path,
            name,
            calibration_of(category, own),
            settings_of(seed, draws, small, big, resolution),
        )
        shown = view(done.folder, threshold, opacity)
        normal, difference = companions(done.folder)
    except ERRORS as error:
        return hide_result(message(error))
    return (
        verdict_card(done.folder, threshold),
        done.key,
        gr.update(visible=True),
        gr.update(visible=True),
        (str(shown.photo), str(shown.overlay)),
        str(normal),
        str(difference),
        region_choices(done.folder, shown.regions),
    )


def on_threshold(key, threshold, opacity, request: gr.Request):
    """A new verdict and picture of a kept result; the model does not run."""
    if not key:
        return gr.skip(), gr.skip(), gr.skip()
    try:
        folder = results.open(key, owner_of(request))
        threshold = number(threshold, "The threshold", 0, 1)
        shown = view(folder, threshold, number(opacity, "The opacity", 0, 1))
    except ERRORS as error:
        return message(error), gr.skip(), gr.skip()
    pictures = (str(shown.photo), str(shown.overlay))
    return verdict_card(folder, threshold), pictures, region_choices(folder, shown.regions)


def on_region(key, threshold, opacity, region, request: gr.Request):
    """The picture with one region framed (none for -1)."""
    try:
        folder = results.open(key, owner_of(request))
        highlight = int(number(-1 if region is None else region, "The region", -1, 100))
        shown = view(folder, number(threshold, "The threshold", 0, 1), number(opacity, "The opacity", 0, 1), highlight)
    except ERRORS:
        return gr.skip()
    return str(shown.photo), str(shown.overlay)


def on_download(kind: str) -> Callable:
    def prepare(key, threshold, opacity, request: gr.Request):
        try:
            folder = results.open(key, owner_of(request))
            threshold, opacity = number(threshold, "The threshold", 0, 1), number(opacity, "The opacity", 0, 1)
            return str(download(folder, kind, threshold, opacity))
        except ERRORS as error:
            raise gr.Error(str(error), print_exception=False) from error

    return prepare


def threshold_update(calibration: Calibration) -> dict:
    threshold = default_threshold(calibration)
    if calibration.threshold is None:
        info = "Not calibrated"
    elif calibration.own_threshold is not None:
        info = f"Set by the model's maker: {threshold:.3f}"
    else:
        source = "images of yours" if calibration.yours else "normal images"
        info = f"Calibrated on {len(calibration.scores)} {source}: {threshold:.3f}"
    return gr.update(value=round(threshold, 4), info=info)


def on_category(category, own):
    """The threshold and the false-alarm rate that go with a category."""
    try:
        calibration = calibration_of(category, own)
    except ERRORS:
        return gr.update(value=0.5, info=""), gr.update()
    return threshold_update(calibration), gr.update(value=round(100 * calibration.false_alarm_rate, 2))


def on_rate(category, rate, own):
    """The threshold of another false-alarm rate."""
    try:
        calibration = calibration_of(category, own)
        rate = number(rate, "The false-alarm rate", 0.1, 50) / 100
    except ERRORS:
        return gr.skip()
    if not calibration.scores:
        return gr.update(info="Not calibrated: a rate cannot be promised")
    threshold = conformal_threshold(calibration.scores, rate)
    if threshold > 1:
        return gr.update(value=1, info=f"{len(calibration.scores)} normal images are too few for {percent(rate)}")
    return gr.update(value=round(threshold, 4), info=f"{percent(rate)} false alarms: {threshold:.3f}")


# ---- Batch ----


def batch_card(batch: Batch) -> str:
    if batch.table is None:
        share = 100 * batch.done / max(batch.total, 1)
        return (
            f'<div class="card note" role="status"><div class="wide"><p>{batch.done} of {batch.total} images</p>'
            f'<progress max="100" value="{share:.0f}" aria-label="Progress"></progress></div></div>'
        )
    tiles = "".join(
        f'<div class="tile {kind}"><strong>{batch.counts[name]}</strong> {name}</div>'
        for name, kind in (("defective", "bad"), ("good", "good"), ("not inspected", "note"))
    )
    return f'<div class="tiles" role="status">{tiles}<p>Threshold {batch.threshold:.3f}</p></div>'


def on_batch(files, category, threshold, own, request: gr.Request):
    """Files in; progress, then the table, the gallery and the downloads out."""
    hidden = gr.update(visible=False)
    try:
        threshold = number(threshold, "The threshold", 0, 1)
        model, calibration = models.get(category), calibration_of(category, own)
        for batch in inspect_many(results, owner_of(request), model, files_of(files), calibration, threshold):
            if batch.table is None:
                yield batch_card(batch), hidden, None, None, None, None
    except ERRORS as error:
        yield message(error), hidden, None, None, None, None
        return
    marks = {True: "✕ Defect", False: "✓ Good"}
    gallery = [
        (str(row.overlay), f"{marks[row.result.is_defective(threshold)]} {row.result.score:.3f}  {row.name}")
        for row in batch.rows
        if row.result
    ]
    yield (
        batch_card(batch),
        gr.update(visible=True),
        [row.cells(threshold) for row in batch.rows],
        gr.update(value=gallery[:PICTURES_IN_GALLERY], visible=bool(gallery)),
        str(batch.table),
        str(batch.archive),
    )


# ---- Calibrate ----


def calibration_card(calibration: Calibration, category: str, extra: str = "") -> str:
    if calibration.scores:
        words = f"{len(calibration.scores)} {'images of yours' if calibration.yours else 'normal images'}. "
        words += promise_words(calibration)
    else:
        words = "Not calibrated yet."
    title = f"{category}: threshold {default_threshold(calibration):.3f}"
    return (
        '<div class="card note" role="status"><span class="mark" aria-hidden="true">i</span>'
        f"<div><h2>{html.escape(title)}</h2><p>{html.escape(words)}</p>{extra}</div></div>"
    )


def on_calibrate(files, category, rate, own, request: gr.Request):
    """Normal images in; the new calibration for this visit out."""
    try:
        rate = number(rate, "The false-alarm rate", 0.1, 50) / 100
        model = models.get(category)
        for step in calibrate_on(results, owner_of(request), model, files_of(files), rate):
            if isinstance(step, tuple):
                batch = Batch(*step, [], 0)
                yield batch_card(batch), gr.skip(), gr.update(visible=False), gr.skip()
    except ERRORS as error:
        yield message(error), gr.skip(), gr.update(visible=False), gr.skip()
        return
    yield calibrated_outputs(step, category, own)


def calibrated_outputs(done: Calibrated, category: str, own: dict) -> tuple:
    extra = ""
    if done.formerly_rejected is not None:
        count = len(done.calibration.scores)
        extra += f"<p>The model's own threshold calls {done.formerly_rejected} of these {count} images defective.</p>"
    if done.unusable:
        listed = "".join(f"<li>{html.escape(reason)}</li>" for reason in done.unusable[:10])
        extra += f"<p>{len(done.unusable)} could not be used:</p><ul>{listed}</ul>"
    return (
        calibration_card(done.calibration, category, extra),
        {**own, category: done.calibration},
        gr.update(value=str(done.file), visible=True),
        threshold_update(done.calibration),
    )


def on_calibration_file(file, category, own):
    """A calibration file in; the same outputs."""
    if not file:
        return gr.skip(), gr.skip(), gr.skip()
    try:
        models.get(category)
        calibration = read_calibration(file_of(file)[0], category)
    except ERRORS as error:
        return message(error), gr.skip(), gr.skip()
    return calibration_card(calibration, category), {**own, category: calibration}, threshold_update(calibration)


def on_forget_calibration(category, own):
    """Back to the model's own calibration."""
    own = {name: calibration for name, calibration in own.items() if name != category}
    try:
        calibration = calibration_of(category, own)
    except ERRORS as error:
        return message(error), own, gr.skip(), gr.update(visible=False)
    return calibration_card(calibration, category), own, threshold_update(calibration), gr.update(visible=False)


def show_calibration(category, own):
    try:
        return calibration_card(calibration_of(category, own), category)
    except ERRORS as error:
        return message(error)


def show_about(category):
    return about(models.models[category]) if category in models.models else NO_MODEL


def on_leave(request: gr.Request):
    """Forgets a visitor's results with the page."""
    if request.session_hash:
        results.forget(request.session_hash)
