"""The Teach tab, and the endpoints `/train`, `/training_status` and `/training_result`."""

import html
import inspect
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from functools import wraps
from pathlib import Path
from typing import Any

import gradio as gr

from ..verdicts_diffusionad import percent
from .endpoints import one_line_errors, several_files
from .feedback import marks_of
from .handlers import card, message, progress_card
from .intake import LIMITS, Refusal, owner_of, uploads_of
from .teach import LIMITS_WORDS, PREPARED, RUNNING, WAITING, Lesson, Teacher
from .traffic import QUICK, address_of
from .views import promise_words

# As in page.py, which imports this module.
_PRIVATE = {"api_visibility": "private", "preprocess": False}
_SHORT = {"concurrency_limit": 2, "concurrency_id": QUICK}
_QUICK = {**_PRIVATE, **_SHORT, "show_progress": "hidden"}
_LOOKING = {"concurrency_limit": 2, "concurrency_id": "look"}
_STARTING = {**_PRIVATE, "concurrency_limit": 2, "concurrency_id": "start"}  # decodes the photos that were marked
_MOST_THUMBNAILS = 24
# The camera goes on after each photo; gradio would ask for another click before it shows its picture again.
_NEXT_SHOT = """() => { setTimeout(() => [...document.querySelectorAll('#teach-camera button:not([aria-label])')]
    .find(button => button.offsetParent)?.click(), 500); }"""
_PHASES = {
    "looking": "Looking at the photos",
    "probing": "Finding out how fast this machine is",
    "remembering": "Remembering what normal looks like",
    "training": "Learning",
    "calibrating": "Calibrating on the photos held out",
    "evaluating": "Evaluating",
}


def minutes(seconds: float) -> str:
    return "less than a minute" if seconds < 50 else f"about {max(1, round(seconds / 60))} min"


def prepared_card(lesson: Lesson, extra: str = "") -> str:
    learnt = lesson.photos - lesson.held_out
    body = (
        f"<h2>{lesson.photos} photos: {percent(round(lesson.promise, 3))} false alarms at best</h2>"
        f"<p>{learnt} to learn from, {lesson.held_out} held out to calibrate with. More photos can promise fewer "
        f"false alarms.</p>{_left_out(lesson)}{extra}"
    )
    return card("note", f"<p>{html.escape(lesson.reason)}</p>{body}" if lesson.reason else body)


def _left_out(lesson: Lesson) -> str:
    if not lesson.unusable:
        return ""
    listed = "".join(f"<li>{html.escape(reason)}</li>" for reason in lesson.unusable[:10])
    return f"<p>{len(lesson.unusable)} left out:</p><ul>{listed}</ul>"


def running_card(lesson: Lesson, progress: dict[str, Any]) -> str:
    """Without a role: a screen reader would read it out every second."""
    phase = _PHASES.get(str(progress.get("phase")), "Starting")
    step, steps, left = (progress.get(name) for name in ("step", "steps", "seconds_left"))
    told = "Stopping: what it has learnt so far is being calibrated" if lesson.stopping else phase
    if phase == "Learning" and steps:
        told += f", step {step} of {steps}"
    if left is not None and not lesson.stopping:
        most = LIMITS.teaching_seconds - (time.monotonic() - lesson.began)
        told += f"; {minutes(min(left, most))} left"
    bar = f' max="{steps}" value="{step}"' if steps else ""
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in lesson.notes(progress)[:8])
    return (
        f'<div class="card note"><div class="wide"><p>{html.escape(told)}.</p><progress{bar} aria-label="Progress">'
        f"</progress>{f'<ul>{notes}</ul>' if notes else ''}</div></div>"
    )


class Lessons:
    """What the tab's events call. A refusal is a card."""

    def __init__(self, teacher: Teacher, offered: Sequence[tuple[str, str]]):
        self.teacher = teacher
        self.results = teacher.results
        self.offered = list(offered)

    def take(self, shot, taken):
        """A photo of the camera's, put beside the others."""
        if not shot:
            return gr.skip(), gr.skip(), gr.skip()
        taken = [*taken, shot][: LIMITS.files]
        more = LIMITS.fewest_photos - len(taken)
        told = f"{len(taken)} taken" + (f", {more} more to go." if more > 0 else ". Enough; more are better.")
        return None, taken, message(told, "note")

    def prepare(self, files, taken, before, request: gr.Request):
        """Photos in; what will be learnt from out."""
        sent, owner = [*(files or []), *taken], owner_of(request)
        if self.teacher.is_busy(owner):
            gr.Warning("Your training goes on. Stop it first, then choose other photos.")
            yield {"key": before}
            return
        self.teacher.discard(before, owner)
        hidden = gr.update(visible=False)
        empty = {"start": gr.update(interactive=False), "done": hidden, "picture": hidden, "key": ""}
        if not sent:
            yield {"state": message(LIMITS_WORDS, "note"), "seen": hidden, **empty}
            return
        try:
            for step in self.teacher.prepare(owner, _address(request), uploads_of(sent)):
                if isinstance(step, tuple):
                    yield {"state": progress_card(*step), **empty}
        except Refusal as error:
            yield {"state": message(error), "seen": hidden, **empty}
            return
        shown = self._thumbnails(step)
        looking = "<p>Looking for the part, and making up three defects …</p>"
        yield {
            "state": prepared_card(step, looking),
            "seen": gr.update(value=shown, visible=True),
            "start": gr.update(interactive=True),
            "key": step.key,
        }
        made = [self._shown(step, *picture) for picture in self.teacher.preview(step)]
        yield {"seen": made + shown} | ({} if self.teacher.is_busy(owner) else {"state": prepared_card(step)})

    def _thumbnails(self, lesson: Lesson) -> list[tuple[str, str]]:
        files = sorted((lesson.folder / "photos").iterdir())[:_MOST_THUMBNAILS]
        return [self._shown(lesson, file, file.stem[5:]) for file in files]

    def _shown(self, lesson: Lesson, file: Path, caption: str) -> tuple[str, str]:
        return self.results.show(lesson.folder, file), caption

    def start(self, key, name, with_marks, request: gr.Request):
        try:
            owner = owner_of(request)
            marks = marks_of(self.results, owner) if with_marks else []
            lesson = self.teacher.start(self._own(key, owner), str(name or ""), _address(request), marks)
        except Refusal as error:
            return {"state": message(error)}
        started = {"start": gr.update(interactive=False), "stop": gr.update(visible=True)}
        return {"key": lesson.key, "timer": gr.Timer(active=True), "done": gr.update(visible=False), **started}

    def stop(self, key, request: gr.Request):
        with suppress(Refusal):
            self.teacher.stop(self._own(key, owner_of(request)))

    def tick(self, key, shown, request: gr.Request):
        """Where it stands: the card, the growing picture and, once there is one, the product."""
        over = {"timer": gr.Timer(active=False), "stop": gr.update(visible=False)}
        try:
            lesson = self._own(key, owner_of(request))
            progress = lesson.progress()
            if lesson.state == WAITING:
                return {"state": message(self._waiting_words(lesson), "note")}
            if lesson.state == RUNNING:
                return {"state": running_card(lesson, progress), **self._picture(lesson, progress, shown)}
            over["start"] = gr.update(interactive=True)
            if not lesson.is_taught:
                return {"state": prepared_card(lesson) if lesson.state == PREPARED else message(lesson.reason), **over}
            state, product = self._taught_card(lesson, progress), self.results.show(lesson.folder, lesson.product)
        except Refusal as error:
            return {"state": message(error), **over}
        category = gr.update(choices=self._choices(lesson.owner), value=key, visible=True)
        done = {
            "download": gr.update(value=product),
            "done": gr.update(visible=True),
            "category": category,
            "taught": key,
        }
        return {"state": state, **over, **done, **self._picture(lesson, progress, shown)}

    def _choices(self, owner: str) -> list[tuple[str, str]]:
        own = self.teacher.taught(owner)
        return [*self.offered, *((f"{lesson.name}\nYours, from {lesson.photos} photos", lesson.key) for lesson in own)]

    def _picture(self, lesson: Lesson, progress: dict[str, Any], shown: str) -> dict[str, Any]:
        """The growing picture, if it has grown: under a new name, so that no browser shows the former one."""
        now = f"{lesson.key}-{progress.get('picture_step')}"
        source = lesson.model / str(progress.get("picture"))
        if now == shown or not source.is_file():
            return {}
        for former in lesson.folder.glob("picture-*.png"):
            former.unlink()
        picture = lesson.folder / f"picture-{progress.get('picture_step')}.png"
        shutil.copyfile(source, picture)
        return {"picture": gr.update(value=self.results.show(lesson.folder, picture), visible=True), "shown": now}

    def _waiting_words(self, lesson: Lesson) -> str:
        before = self.teacher.position(lesson)
        running = self.teacher.running()
        left = running.progress().get("seconds_left") if running else None
        words = f"Waiting: {before} before yours." if before != 1 else "Waiting: one before yours."
        return words + (f" The one that runs takes {minutes(left)} more." if left is not None else "")

    def _taught_card(self, lesson: Lesson, progress: dict[str, Any]) -> str:
        calibration = self.teacher.models.get(lesson.key).calibration
        title = f"{lesson.name} is ready in Inspect and Batch"
        if calibration.has_learnt is False:
            title = f"{lesson.name} has not learnt to tell defects"
        said = [lesson.reason, *lesson.notes(progress)[:8]]
        body = f"<h2>{html.escape(title)}</h2><p>{html.escape(promise_words(calibration))}</p>"
        if calibration.has_learnt is False:
            body += "<p>All its verdicts are undecided. Take more photos, or photos that are more alike.</p>"
        body += "".join(f"<p>{html.escape(line)}</p>" for line in said if line)
        body += "<p>Only you have it, until you close this page. Download it to keep it.</p>"
        return card("undecided" if calibration.has_learnt is False else "good", body)

    def publish(self, key, repo_id, token, request: gr.Request):
        """The product to the Hub; the token is forgotten at once."""
        try:
            address = self.teacher.publish(self._own(key, owner_of(request)), str(repo_id or ""), str(token or ""))
        except Refusal as error:
            return message(error), ""
        link = html.escape(address, quote=True)
        return card("good", f'<p>Pushed, as a private repo: <a href="{link}" target="_blank">{link}</a></p>'), ""

    def leave(self, request: gr.Request):
        if request.session_hash:
            self.teacher.forget(owner_of(request))

    def _own(self, key: object, owner: str) -> Lesson:
        lesson = self.teacher.find(key)
        if lesson.owner != owner:
            raise Refusal("This training is no longer kept. Start again with the photos.")
        return lesson


def _address(request: gr.Request) -> str:
    return address_of(request.request.scope)


def teach_tab(teacher: Teacher, page: gr.Blocks, category: gr.Radio, taught: gr.State) -> None:
    """The tab; `taught` changes when it has put a new product into the choice of categories, and chosen it."""
    on = Lessons(teacher, category.choices)
    key, shown, taken = gr.State(""), gr.State(""), gr.State([])
    timer = gr.Timer(1, active=False)
    with gr.Row(elem_classes="stack"):
        with gr.Column(scale=4, min_width=280):
            wanted = f"{LIMITS.fewest_photos} to {LIMITS.files} photos of normal parts, or zip archives"
            files = gr.File(label=wanted, file_count="multiple", height=180, elem_id="teach-files")
            with gr.Accordion("Or take them with the camera", open=False, elem_id="teach-camera-panel"):
                camera = gr.Image(
                    label="Camera", type="filepath", sources=["webcam"], height=280, buttons=[], elem_id="teach-camera"
                )
                count = gr.HTML(elem_id="teach-count")
                with gr.Row():
                    use = gr.Button("Use these photos", size="sm", elem_id="teach-use")
                    anew = gr.Button("Take them anew", size="sm", elem_id="teach-anew")
            name = gr.Textbox(label="Name of the product", placeholder="My product", max_lines=1, elem_id="teach-name")
            with_marks = gr.Checkbox(label="Learn from my marks in Inspect and Batch too", elem_id="teach-marks")
            with gr.Row():
                start = gr.Button("Start", variant="primary", interactive=False, elem_id="teach-start")
                stop = gr.Button("Stop, and keep the best so far", visible=False, elem_id="teach-stop")
        with gr.Column(scale=6, min_width=300):
            state = gr.HTML(message(LIMITS_WORDS, "note"), elem_id="teach-state")
            picture = gr.Image(
                label="A photo held out, with a made-up defect: photo, as it should look, anomaly map",
                type="filepath",
                interactive=False,
                visible=False,
                buttons=["fullscreen"],
                elem_id="teach-picture",
            )
            with gr.Column(visible=False, elem_id="teach-done") as done:
                download = gr.DownloadButton("↓ Download the product (zip)", size="sm", elem_id="teach-download")
                with gr.Accordion("Push it to the Hugging Face Hub", open=False, elem_id="teach-hub"):
                    repo = gr.Textbox(label="Repo", placeholder="you/my-product", max_lines=1, elem_id="teach-repo")
                    token = gr.Textbox(
                        label="Your access token",
                        info="With the right to write. It is used once and kept nowhere.",
                        type="password",
                        max_lines=1,
                        elem_id="teach-token",
                    )
                    push = gr.Button("Push", size="sm", elem_id="teach-push")
                    pushed = gr.HTML(elem_id="teach-pushed")
    seen = gr.Gallery(
        label="What it will learn from",
        columns=6,
        object_fit="contain",
        buttons=[],
        height="auto",
        visible=False,
        elem_id="teach-seen",
    )
    parts = {
        **{"state": state, "timer": timer, "start": start, "stop": stop, "picture": picture, "shown": shown},
        **{"download": download, "done": done, "category": category, "taught": taught, "key": key, "seen": seen},
    }
    outputs = list(parts.values())
    look = dict(fn=_named(on.prepare, parts), inputs=[files, taken, key], outputs=outputs, **_LOOKING, **_PRIVATE)
    files.change(trigger_mode="always_last", show_progress="hidden", **look)
    camera.change(on.take, [camera, taken], [camera, taken, count], **_QUICK).then(None, js=_NEXT_SHOT)
    use.click(show_progress="hidden", **look)
    anew.click(lambda: ([], ""), None, [taken, count], **_QUICK)
    start.click(_named(on.start, parts), [key, name, with_marks], outputs, show_progress="hidden", **_STARTING)
    stop.click(on.stop, key, None, **_QUICK)
    timer.tick(_named(on.tick, parts), [key, shown], outputs, trigger_mode="once", **_QUICK)
    push.click(
        on.publish, [key, repo, token], [pushed, token], concurrency_limit=1, concurrency_id="publish", **_PRIVATE
    )
    page.unload(on.leave)


def _named(function: Callable, parts: dict[str, Any]) -> Callable:
    """A handler that tells the parts it changes by their names."""

    def one(*args: Any, **kwargs: Any) -> dict:
        return {parts[name]: value for name, value in function(*args, **kwargs).items()}

    def many(*args: Any, **kwargs: Any) -> Iterator[dict]:
        with closing(function(*args, **kwargs)) as steps:
            for step in steps:
                yield {parts[name]: value for name, value in step.items()}

    return wraps(function)(many if inspect.isgeneratorfunction(function) else one)


class TeachEndpoints:
    """The functions behind the endpoints; clients see their names and docstrings."""

    def __init__(self, teacher: Teacher):
        self.teacher = teacher

    def train(self, files, name, request: gr.Request):
        """Teach a product from 20 or more photos of normal parts. It takes some minutes; ask /training_status.

        Args:
            files: Photos of normal parts, or zip archives of them.
            name: What to call the product.

        Returns:
            The training's id, which is a secret: whoever has it can use the product. And as /training_status answers.
        """
        with one_line_errors():
            address = _address(request)
            *_, lesson = self.teacher.prepare(owner_of(request), address, uploads_of(files))
            try:
                self.teacher.start(lesson, str(name or ""), address)
            except Refusal:
                self.teacher.discard(lesson.key, lesson.owner)
                raise
            return self.teacher.status(lesson)

    def training_status(self, id, stop=False):
        """Tell how far a training is.

        Args:
            id: Of the training, from /train.
            stop: True to end it; the best so far is kept.

        Returns:
            The state (waiting, running, done, stopped or failed), how many are before it, steps and seconds left.
        """
        with one_line_errors():
            lesson = self.teacher.find(id)
            if not isinstance(stop, bool):  # the text "false" would stop it, too
                raise Refusal("stop is true or false.")
            if stop:
                self.teacher.stop(lesson)
            return self.teacher.status(lesson)

    def training_result(self, id):
        """Get the product of a finished training. Until an hour after its last use, /inspect takes its id, too.

        Args:
            id: Of the training, from /train.

        Returns:
            What its verdicts rest on; and the product as a zip archive, which DiffusionADPipeline.from_pretrained
            loads once unpacked.
        """
        with one_line_errors():
            lesson = self.teacher.find(id)
            if not lesson.is_taught:
                raise Refusal(f"There is no product: this training is {lesson.state}. {lesson.reason}".strip())
            calibration = self.teacher.models.get(lesson.key).calibration
            summary = {
                **self.teacher.status(lesson),
                "threshold": calibration.threshold,
                "false_alarm_rate": calibration.false_alarm_rate,
                "calibration_images": len(calibration.scores),
                "has_learnt": calibration.has_learnt,
                "promise": promise_words(calibration),
            }
            return summary, self.teacher.results.show(lesson.folder, lesson.product)


def teach_endpoints(teacher: Teacher) -> None:
    """The API, with components that only state its types."""
    endpoints = TeachEndpoints(teacher)
    with gr.Column(visible=False):
        files = several_files()
        name, id = gr.Textbox(label="name", value="My product"), gr.Textbox(label="id")
        stop = gr.Checkbox(label="stop", value=False)
        status, product, caller = gr.JSON(label="status"), gr.File(label="product"), gr.Button()
    for function, inputs, outputs, queue in (
        (endpoints.train, [files, name], status, _LOOKING),
        (endpoints.training_status, [id, stop], status, _SHORT),
        (endpoints.training_result, [id], [status, product], _SHORT),
    ):
        caller.click(function, inputs, outputs, api_name=function.__name__, preprocess=False, **queue)
