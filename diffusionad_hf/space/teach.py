"""Teaches products from visitors' photos: one training at a time, in a process of its own; the others wait in a queue.

All of a lesson lies in a result's folder: so it goes with its visitor's page, and nothing of it is served but what is
shown. Its key is a secret: whoever has it can use the product.
"""

import hashlib
import json
import logging
import os
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from contextvars import Context
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..files import link_or_copy, one_line, replacing, slug, write_json
from ..hub.publishing import PUBLISHED, publish_model
from ..training.arguments import TrainingConfig
from ..training.dataset import split_holdout
from ..verdicts_diffusionad import images_needed
from . import gpu
from .feedback import Mark
from .intake import LIMITS, Refusal, Upload, collect, shown_name
from .models import Models
from .results import Results
from .teach_process import MADE_UP, TOO_MUCH_MEMORY
from .views import kept_photo

logger = logging.getLogger("space")

PREPARED, WAITING, RUNNING, DONE, STOPPED, FAILED = "prepared", "waiting", "running", "done", "stopped", "failed"
MINUTES = LIMITS.teaching_seconds // 60
LIMITS_WORDS = (
    f"{LIMITS.fewest_photos} to {LIMITS.files} photos of normal parts, up to 50 MB and 50 million pixels each. "
    f"A training takes {MINUTES} minutes at most, and one runs at a time: the others wait in a queue."
)
# What a training leaves that is of use afterwards, beside the model.
_NOTES = ("training_arguments.json", "training_curve.csv", "report.html")
# Of the server, and nobody else's business; with the last, a process would only pretend to have a GPU.
_NOT_PASSED_ON = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "SPACES_ZERO_GPU")


def is_on() -> bool:
    """
    Whether visitors may teach: as the environment variable DIFFUSIONAD_TEACH says, 0 or 1; by default everywhere but
    on a Hugging Face Space, whose processor strangers would share.

    Raises:
        ValueError: If the variable is something else.
    """
    told = os.environ.get("DIFFUSIONAD_TEACH") or ("0" if "SPACE_ID" in os.environ else "1")
    if told not in ("0", "1"):
        raise ValueError(f"DIFFUSIONAD_TEACH={told}: must be 1, or 0 for a page without teaching.")
    missing = [name for name in ("accelerate", "datasets", "matplotlib") if find_spec(name) is None]
    if told == "1" and missing:
        logger.warning('no teaching: %s is not installed: pip install "diffusionad-hf[train]"', missing[0])
    return told == "1" and not missing


@dataclass(eq=False)
class Lesson:
    """
    Photos of a product and what became of them.

    Args:
        key: By which its product is used.
        folder: Where all of it lies.
        owner: Whose it is.
        address: From which it was started.
        name: Of the product.
        photos: How many there are to learn from.
        bytes: That they take.
        unusable: Those left out, and why.
        state: `"prepared"`, `"waiting"`, `"running"`, `"done"`, `"stopped"` (by the visitor, or for the time it took;
            the best so far is kept) or `"failed"`.
        reason: Why it failed, or was stopped; one line.
    """

    key: str
    folder: Path
    owner: str
    address: str = ""
    name: str = ""
    photos: int = 0
    bytes: int = 0
    unusable: list[str] = field(default_factory=list)
    state: str = PREPARED
    reason: str = ""
    began: float = 0.0
    stopping: bool = False
    gone: bool = False
    processes: dict[str, int] = field(default_factory=dict)  # ids of "train" and "preview", while they run
    visitor: Context | None = None  # in whose name a GPU is asked for

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def product(self) -> Path:
        """What is downloaded."""
        return self.folder / f"{slug(self.name) or 'product'}.zip"

    @property
    def is_taught(self) -> bool:
        return self.state in (DONE, STOPPED)

    @property
    def is_under_way(self) -> bool:
        return self.state in (WAITING, RUNNING)

    @property
    def held_out(self) -> int:
        rate, fraction = TrainingConfig.false_alarm_rate, TrainingConfig.holdout_fraction
        return len(split_holdout(self.photos, fraction, 0, images_needed(rate))[1])

    @property
    def promise(self) -> float:
        """The lowest false-alarm rate that so many photos can promise."""
        return 1 / (self.held_out + 1)

    def progress(self) -> dict[str, Any]:
        """What the training says of itself; empty until it does."""
        try:
            return json.loads((self.model / "progress.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}

    def notes(self, progress: dict[str, Any]) -> list[str]:
        """What the training saw and says, but for the picture that the page has anyway."""
        notes = [self.plain(note) for note in progress.get("notes") or []]
        return [note for note in notes if not note.startswith("Preview:")]

    def plain(self, text: object) -> str:
        """A line of the training's without the server's paths."""
        return self.without_paths(one_line(text))[:500]

    def without_paths(self, text: str) -> str:
        """The server's, which tell the key as well."""
        return text.replace(f"{self.folder}/photos/", "").replace(f"{self.folder}/", "")


class Teacher:
    """All lessons, and the one that runs."""

    def __init__(self, results: Results, models: Models):
        self.results = results
        self.models = models
        self._lessons: dict[str, Lesson] = {}
        self._queue: list[Lesson] = []
        self._changed = threading.Condition()
        self._closed = False
        self.options = shlex.split(os.environ.get("DIFFUSIONAD_TEACH_OPTIONS", ""))
        threading.Thread(target=self._work, daemon=True, name="teach").start()

    # ---- what visitors do ----

    def prepare(self, owner: str, address: str, files: Sequence[Upload]) -> Iterator[tuple[int, int] | Lesson]:
        """
        Takes in photos: yields (done, total) and, last, the lesson.

        Each is kept as pixels, at most a million of them, so that no training decodes what a visitor sent.

        Raises:
            Refusal: If too few are of use.
        """
        self._make_room(address)
        key, folder = self.results.new(owner)
        lesson = Lesson(key, folder, owner, address)
        (folder / "photos").mkdir()
        try:
            seen: dict[str, str] = {}
            end = time.monotonic() + LIMITS.batch_seconds
            with tempfile.TemporaryDirectory(dir=self.results.folder) as unpacked:
                uploads = collect(files, Path(unpacked))
                for number, upload in enumerate(uploads):
                    try:
                        if time.monotonic() > end:
                            raise Refusal(f"{upload.name}: not reached in {LIMITS.batch_seconds // 60} minutes.")
                        name = f"{number:04d}-{slug(Path(upload.name).stem)[:40]}.png"
                        lesson.bytes += _keep(upload, folder / "photos" / name, seen)
                        lesson.photos += 1
                    except Refusal as error:
                        lesson.unusable.append(str(error))
                    yield number + 1, len(uploads)
            if lesson.photos < LIMITS.fewest_photos:
                raise Refusal(_too_few(lesson))
            if not folder.is_dir():
                raise Refusal("The page was closed.")
            self._lessons[key] = lesson
        finally:
            if key not in self._lessons:  # refused, or the page was closed
                self.results.remove(folder)
        yield lesson

    def preview(self, lesson: Lesson) -> list[tuple[Path, str]]:
        """Pictures of what will be learnt from, with captions; none if that fails, which stops no lesson."""
        folder = lesson.folder / "preview"
        folder.mkdir(exist_ok=True)
        self._run(lesson, "preview", str(lesson.folder / "photos"), str(folder), seconds=LIMITS.preview_seconds)
        titles = {"foreground": "The part", "defect": "Made-up defect"}
        pictures = [(folder / f"{name}-{i}.png", title) for name, title in titles.items() for i in range(MADE_UP)]
        return [(path, title) for path, title in pictures if path.is_file()]

    def start(self, lesson: Lesson, name: str, address: str, marks: Sequence[Mark] = ()) -> Lesson:
        """
        Puts a lesson into the queue; one that was taught already is taught anew, as another product. Of the marks, the
        newest are taken, as many as the limits allow.

        Raises:
            Refusal: If it is in the queue, or too many are.
        """
        with tempfile.TemporaryDirectory(dir=self.results.folder) as folder:
            self._check_queue(lesson, address)
            marked = _kept_marks(marks, Path(folder))  # which takes long: nobody else waits for it
            return self._enqueue(lesson, name, address, Path(folder), marked)

    def _check_queue(self, lesson: Lesson, address: str) -> None:
        active = [other for other in list(self._lessons.values()) if other.is_under_way]
        if self.is_busy(lesson.owner):
            raise Refusal("One of yours is under way. Stop it first, or wait for it.")
        if sum(other.address == address for other in active) >= LIMITS.lessons_per_address:
            raise Refusal("Others at your address wait already. Try again when they are done.")
        if len(active) >= LIMITS.lessons:
            raise Refusal("Too many wait already. Try again later.")

    def _enqueue(self, lesson: Lesson, name: str, address: str, folder: Path, marked: Sequence[dict]) -> Lesson:
        """Puts it into the queue, with the marked photos of a folder."""
        with self._changed:
            self._check_queue(lesson, address)
            self.find(lesson.key)  # its page may be closed meanwhile
            if lesson.is_taught:
                self._make_room(address, lesson)
                lesson = self._again(lesson)
            taken = {other.name for other in self.taught(lesson.owner)}
            lesson.name = _untaken(shown_name(name)[:60] if name.strip() else "My product", taken)
            _take_marks(lesson, folder, marked)
            lesson.address, lesson.state, lesson.reason, lesson.stopping = address, WAITING, "", False
            lesson.visitor = gpu.visitor() if gpu.IS_ZERO else None
            self._queue.append(lesson)
            self._changed.notify_all()
        return lesson

    def stop(self, lesson: Lesson) -> None:
        """Ends a lesson; what it has learnt so far is kept."""
        with self._changed:
            if lesson.state == WAITING:
                self._queue.remove(lesson)
                lesson.state = PREPARED
            elif lesson.state == RUNNING and not lesson.stopping:
                lesson.stopping = True
                if process := lesson.processes.get("train"):
                    _interrupt(process)

    def find(self, key: object) -> Lesson:
        """The lesson of a key; a Refusal if there is none."""
        lesson = self._lessons.get(key) if isinstance(key, str) else None
        with suppress(FileNotFoundError):  # swept, or its page was closed
            if lesson:
                os.utime(lesson.folder)
                return lesson
        raise Refusal("This training is no longer kept. Start again with the photos.")

    def position(self, lesson: Lesson) -> int:
        """How many are before it."""
        with self._changed:
            return self._queue.index(lesson) + 1 if lesson in self._queue else 0

    def running(self) -> Lesson | None:
        return next((lesson for lesson in list(self._lessons.values()) if lesson.state == RUNNING), None)

    def status(self, lesson: Lesson) -> dict[str, Any]:
        """What a program is told."""
        progress = lesson.progress() if lesson.state != PREPARED else {}
        names = ("phase", "step", "steps", "loss", "seconds", "seconds_left", "validation")
        return {
            "id": lesson.key,
            "name": lesson.name,
            "state": lesson.state,
            "reason": lesson.reason or None,
            "before_it": self.position(lesson),
            "photos": lesson.photos,
            "held_out": lesson.held_out,
            "false_alarm_rate_at_best": lesson.promise,
            "unusable": lesson.unusable,
            "progress": {name: progress.get(name) for name in names},
            "notes": lesson.notes(progress),
        }

    def publish(self, lesson: Lesson, repo_id: str, token: str) -> str:
        """
        Pushes a product to the Hub as a private repo, with the visitor's own token, which is kept nowhere; returns its
        address.

        Raises:
            Refusal: If there is no token, or the Hub refuses.
        """
        token = token.strip()
        if not token:  # the server's own login is not the visitor's to use
            raise Refusal("Enter a Hugging Face token of yours that may write: huggingface.co/settings/tokens.")
        try:
            return publish_model(lesson.model, repo_id.strip(), private=True, category=lesson.name, token=token)
        except (OSError, ValueError) as error:
            raise Refusal(lesson.plain(error).replace(token, "…")) from None  # the chain could hold the token

    def taught(self, owner: str) -> list[Lesson]:
        """A visitor's lessons that have a product."""
        return [lesson for lesson in list(self._lessons.values()) if lesson.owner == owner and lesson.is_taught]

    def is_busy(self, owner: str) -> bool:
        """Whether a lesson of a visitor's waits or runs."""
        return any(lesson.owner == owner and lesson.is_under_way for lesson in list(self._lessons.values()))

    def discard(self, key: str, owner: str) -> None:
        """Removes a visitor's lesson that came to nothing."""
        lesson = self._lessons.get(key)
        if lesson and lesson.owner == owner and not lesson.is_taught and not lesson.is_under_way:
            self._remove(lesson)

    def forget(self, owner: str) -> None:
        """Ends and removes all of a visitor's."""
        for lesson in [lesson for lesson in list(self._lessons.values()) if lesson.owner == owner]:
            self._remove(lesson)

    def close(self) -> None:
        """Ends what runs; nothing starts any more."""
        with self._changed:
            self._closed = True
        for lesson in list(self._lessons.values()):
            self._remove(lesson)

    # ---- what the server does ----

    def _make_room(self, address: str, needed: Lesson | None = None) -> None:
        """Forgets the oldest lessons of an address that are over, but for one that is needed; a Refusal if all
        together take too much disk."""
        of_address = [other for other in list(self._lessons.values()) if other.address == address]
        idle = [other for other in of_address if not other.is_under_way and other is not needed]
        for other in idle[: max(0, len(idle) + 1 - LIMITS.kept_per_address)]:
            self._remove(other)
        if sum(other.bytes for other in list(self._lessons.values())) > LIMITS.taught_bytes:
            raise Refusal("The server's disk is full for the moment. Try again in an hour.")

    def _remove(self, lesson: Lesson) -> None:
        with self._changed:
            lesson.gone = True
            self._lessons.pop(lesson.key, None)
            if lesson in self._queue:
                self._queue.remove(lesson)
            processes = list(lesson.processes.values())
        for process in processes:
            _end(process)
        self.models.forget(lesson.key)
        self.results.remove(lesson.folder)

    def _again(self, lesson: Lesson) -> Lesson:
        """The same photos once more, for another product."""
        key, folder = self.results.new(lesson.owner)
        (folder / "photos").mkdir()
        for photo in (lesson.folder / "photos").iterdir():
            link_or_copy(photo, folder / "photos" / photo.name)
        again = Lesson(key, folder, lesson.owner, lesson.address)
        again.photos, again.bytes, again.unusable = lesson.photos, lesson.bytes, lesson.unusable
        self._lessons[key] = again
        return again

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue, timeout=60)
                for lesson in list(self._lessons.values()):
                    try:
                        lesson.folder.stat()
                        if lesson.is_under_way:
                            os.utime(lesson.folder)  # though nobody looks at it
                    except FileNotFoundError:  # swept, or its page was closed just now
                        self._lessons.pop(lesson.key)
                        self.models.forget(lesson.key)
                if not self._queue:
                    continue
                lesson = self._queue.pop(0)
                lesson.state, lesson.began = RUNNING, time.monotonic()
            try:
                self._teach(lesson)
            except Exception:
                logger.exception("teaching failed")
                lesson.state, lesson.reason = FAILED, "Something went wrong. Start again."

    def _teach(self, lesson: Lesson) -> None:
        marks = lesson.folder / "feedback.json"
        options = [*self.options, *(["--feedback", str(marks)] if marks.is_file() else [])]
        arguments = ("train", str(lesson.folder / "photos"), "--output-dir", str(lesson.model), *options)
        code = self._run_on_lent_gpu(lesson, *arguments)
        if code is None:
            left = LIMITS.teaching_seconds - (time.monotonic() - lesson.began)
            code = self._run(lesson, *arguments, seconds=left)
        took = time.monotonic() - lesson.began
        if lesson.gone:
            self.results.remove(lesson.folder)  # what it wrote while it ended
            return
        progress = lesson.progress()
        logger.info("taught %d photos in %.0f s: exit code %d", lesson.photos, took, code)
        if code in (0, 130) and (lesson.model / "model_index.json").is_file():
            for left in (*lesson.model.glob("checkpoint-*"), lesson.model / "best", lesson.model / "logs"):
                shutil.rmtree(left, ignore_errors=True)
            _pack(lesson)
            self.models.teach(lesson.key, lesson.name, lesson.model)
            if not lesson.stopping and code:
                lesson.reason = f"The {MINUTES} minutes were over: this is the best so far."
            lesson.state = DONE if code == 0 else STOPPED
        elif lesson.stopping:
            lesson.state, lesson.reason = PREPARED, "Stopped before it had learnt anything."
        else:
            lesson.reason = {
                TOO_MUCH_MEMORY: f"It took more than {LIMITS.teaching_bytes >> 30} GB of memory.",
                2: lesson.plain(progress.get("error") or "These photos cannot be learnt from."),
            }.get(code, "The training was ended from outside. Start again: it goes on where it was.")
            lesson.state = FAILED
            logger.warning("teaching failed: %s", _last_line(lesson.folder / "train.log"))

    def _run_on_lent_gpu(self, lesson: Lesson, *arguments: str) -> int | None:
        """As [`_run`], on ZeroGPU's; `None` if there is none, or it did not come to an end on it."""
        if lesson.visitor is None:
            return None
        try:
            # It has the other half of the time to calibrate what it has learnt.
            seconds = LIMITS.teaching_gpu_seconds / 2
            code = lesson.visitor.run(self._run, lesson, *arguments, seconds=seconds, on_gpu=True)
        except Exception as error:  # of gradio's
            logger.warning("no GPU to teach on, or not for long enough: %s", error)
            return None
        finally:
            lesson.visitor = None
        return code if code in (0, 2) or lesson.stopping or lesson.gone else None

    def _run(self, lesson: Lesson, *arguments: str, seconds: float, on_gpu: bool = False) -> int:
        """Runs the process of a lesson to its end; returns the exit code."""
        command = [sys.executable, "-m", f"{__package__}.teach_process", str(seconds), str(LIMITS.teaching_bytes)]
        environment = {name: value for name, value in os.environ.items() if name not in _NOT_PASSED_ON}
        environment |= {
            "PYTHONPATH": os.pathsep.join(
                [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
            ),
            # Half of the processors, which it only gets while nobody inspects.
            "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // 2)),
            "HF_HUB_OFFLINE": "1",
            # Whatever it leaves there goes with the lesson.
            "HF_HOME": str(lesson.folder / "cache"),
            "TMPDIR": str(lesson.folder),
        }
        kind, end = arguments[0], time.monotonic() + seconds + 300  # it ends itself before
        run = gpu.run_on_lent if on_gpu else gpu.run
        running = run([*command, *arguments], environment, lesson.folder, lesson.folder / f"{kind}.log")
        try:
            for process, code in running if not lesson.gone else ():
                if code is not None:
                    return code
                with self._changed:
                    is_new, lesson.processes[kind] = kind not in lesson.processes, process
                    if lesson.gone or self._closed or time.monotonic() > end:
                        _kill(process)
                    elif is_new and kind == "train" and lesson.stopping:  # before it began
                        _interrupt(process)
            return -signal.SIGKILL
        finally:
            running.close()
            if process := lesson.processes.pop(kind, None):  # whoever started it may be gone
                _end(process)


def _interrupt(process: int) -> None:
    with suppress(OSError):  # it has ended
        os.kill(process, signal.SIGINT)


def _kill(process: int) -> None:
    with suppress(OSError):
        os.killpg(process, signal.SIGKILL) if hasattr(os, "killpg") else os.kill(process, signal.SIGTERM)


def _end(process: int) -> None:
    """Kills a process, and waits until whoever started it has seen that."""
    _kill(process)
    with suppress(OSError):
        end = time.monotonic() + 10
        while time.monotonic() < end:
            os.kill(process, 0)
            time.sleep(0.02)


def _keep(upload: Upload, path: Path, seen: dict[str, str]) -> int:
    """Saves a photo's pixels, unless they were `seen`; returns its bytes. A Refusal if it cannot be used."""
    photo = kept_photo(upload.image()[0])
    digest = hashlib.sha256(photo.tobytes() + repr(photo.size).encode()).hexdigest()
    if seen.setdefault(digest, upload.name) != upload.name:
        raise Refusal(f"{upload.name}: the same as {seen[digest]}.")
    photo.save(path, compress_level=1)
    return path.stat().st_size


def _too_few(lesson: Lesson) -> str:
    usable = (
        f"{lesson.photos} usable photo{'s' * (lesson.photos != 1)}; teaching takes {LIMITS.fewest_photos} or more."
    )
    return f"{usable} Not usable: {'; '.join(lesson.unusable[:3])}" if lesson.unusable else usable


def _untaken(name: str, taken: set[str]) -> str:
    names = (name if number == 1 else f"{name} ({number})" for number in range(1, len(taken) + 2))
    return next(found for found in names if found not in taken)


def _kept_marks(marks: Sequence[Mark], folder: Path) -> list[dict]:
    """Keeps the photos that a visitor marked, the newest first, in a folder; returns their records, by its files."""
    told, end = [], time.monotonic() + LIMITS.marks_seconds
    for number, mark in enumerate(reversed(marks[-LIMITS.files :])):
        if time.monotonic() > end:
            break
        with suppress(Refusal):  # swept meanwhile
            name = f"{number:04d}.png"
            _keep(Upload(mark.record["file"], mark.photo), folder / name, {})
            told.append({**mark.record, "file": name})
    return told[::-1]


def _take_marks(lesson: Lesson, folder: Path, marked: Sequence[dict]) -> None:
    """Moves marked photos beside a lesson, in place of those before, as the trainer takes them."""
    target, list_file = lesson.folder / "marked", lesson.folder / "feedback.json"
    shutil.rmtree(target, ignore_errors=True)
    list_file.unlink(missing_ok=True)
    if marked:
        target.mkdir()
        for mark in marked:
            photo = (folder / mark["file"]).replace(target / mark["file"])
            lesson.bytes += photo.stat().st_size
        write_json(list_file, {"marks": [{**mark, "file": f"marked/{mark['file']}"} for mark in marked]})


def _pack(lesson: Lesson) -> None:
    """Zips the model as one folder, which `from_pretrained` loads once unpacked."""
    top = Path(lesson.product.stem)
    with replacing(lesson.product) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as bundle:
        for pattern in PUBLISHED:
            for file in sorted(lesson.model.glob(pattern)):
                bundle.write(file, top / file.relative_to(lesson.model))
        for name in filter(lambda name: (lesson.model / name).is_file(), _NOTES):
            notes = (lesson.model / name).read_text(encoding="utf-8")
            bundle.writestr(str(top / name), lesson.without_paths(notes), zipfile.ZIP_DEFLATED)


def _last_line(log: Path) -> str:
    with suppress(OSError):
        lines = log.read_bytes()[-10_000:].decode(errors="replace").split("\n")
        return next((line.strip()[-300:] for line in reversed(lines) if line.strip()), "")
    return ""
