"""Teaching a product: the endpoints and the server, with trainings of two steps or without end."""

import ast
import asyncio
import base64
import json
import os
import shutil
import signal
import sys
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace

import numpy as np
import psutil
import pytest
from gradio_client import handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from demo_part.generate import render_part
from diffusionad_hf import DiffusionADPipeline
from diffusionad_hf.space import teach
from diffusionad_hf.space.feedback import Mark
from diffusionad_hf.space.intake import LIMITS, Refusal, Upload
from diffusionad_hf.space.models import Models
from diffusionad_hf.space.teach import Lesson, Teacher, is_on
from diffusionad_hf.training.feedback import read_feedback
from tests.loopback_hub import LoopbackHub
from tests.space.conftest import Server, archive, copies, inspect

TINY = "--image-size 64 --train-batch-size 2 --report-to none"


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Twenty photos of normal parts, 96 px."""
    folder = tmp_path_factory.mktemp("photos")
    files = [folder / f"part-{seed:02d}.png" for seed in range(100, 120)]
    for seed, file in enumerate(files, 100):
        Image.fromarray(render_part(np.random.default_rng(seed), size=96)).save(file)
    return files


def teaching(tmp_path_factory, checkpoints, options):
    # On a machine that is busy with other tests, what steps back for them would never end.
    environment = {**os.environ, "DIFFUSIONAD_TEACH_OPTIONS": f"{TINY} {options}", "DIFFUSIONAD_TEACH_NICE": "0"}
    return Server(tmp_path_factory.mktemp("teaching"), str(checkpoints), environment)


@pytest.fixture(scope="module")
def quick(tmp_path_factory, checkpoints):
    """A server whose trainings take two steps."""
    server = teaching(tmp_path_factory, checkpoints, "--max-train-steps 2")
    yield server
    server.stop()


@pytest.fixture(scope="module")
def endless(tmp_path_factory, checkpoints):
    """A server whose trainings end when they are told to."""
    server = teaching(tmp_path_factory, checkpoints, "--max-train-steps 1000000 --validation-steps 4")
    yield server
    server.stop()


def sent(*files):
    return [handle_file(str(file)) for file in files]


def train(client, *files, name="Flange"):
    return client.predict(sent(*files), name, api_name="/train")


def status(client, training, **arguments):
    return client.predict(training, **arguments, api_name="/training_status")


def wait(client, training, condition, seconds=240):
    end = time.monotonic() + seconds
    while not condition(found := status(client, training)):
        assert time.monotonic() < end, found
        assert found["state"] != "failed" or condition(found), found
        time.sleep(0.3)
    return found


def over(found):
    return found["state"] not in ("waiting", "running")


def has_learnt_a_step(found):
    return (found["progress"]["step"] or 0) > 0


def children(server):
    """The processes that teach."""
    found = []
    for process in psutil.Process(server.process.pid).children():
        with suppress(psutil.NoSuchProcess):  # ended meanwhile
            if any("teach_process" in word for word in process.cmdline()):
                found.append(process.pid)
    return found


def lessons(server):
    return [*server.temporary.glob("diffusionad-space-*/results/*/photos")]


def until(condition, complaint, seconds=240):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, complaint
        time.sleep(0.2)


def test_assistants_teach_too(quick, photos):
    """Runs where the optional package `mcp` is installed."""
    pytest.importorskip("mcp", reason='pip install "mcp<2"')
    from mcp import ClientSession
    from mcp.client.streamable_http import streamable_http_client

    files = ["data:image/png;base64," + base64.b64encode(photo.read_bytes()).decode() for photo in photos]

    async def talk():
        async with streamable_http_client(f"{quick.url}gradio_api/mcp/") as (read, write, _):
            async with ClientSession(read, write) as session:
                await session.initialize()

                async def call(tool, **values):
                    answer = await session.call_tool(tool, values)
                    assert not answer.isError, answer
                    return ast.literal_eval(answer.content[0].text)

                found = await call("train", files=files, name="Widget")
                assert (found["photos"], found["held_out"], found["name"]) == (20, 10, "Widget")
                while not over(found):
                    await asyncio.sleep(0.5)
                    found = await call("training_status", id=found["id"])
                return found["state"], (await call("training_result", id=found["id"]))[0]

    state, summary = asyncio.run(talk())
    assert state == "done" and summary["calibration_images"] == 10


def test_from_photos_to_a_product_that_only_its_id_opens(quick, photos, parts, tmp_path):
    client, other = quick.client(), quick.client()
    (tmp_path / "broken.png").write_bytes(b"not a photo")
    twin = shutil.copy(photos[0], tmp_path / "twin.png")
    zipped = archive(tmp_path / "more.zip", [(f.name, f.read_bytes()) for f in photos[10:]])
    begun = train(client, *photos[:10], zipped, tmp_path / "broken.png", twin, name="../Flänge <b>")
    assert begun["photos"] == 20 and begun["held_out"] == 10 and begun["name"] == "Flänge <b>"
    assert begun["false_alarm_rate_at_best"] == pytest.approx(1 / 11)
    assert [reason.split(":")[0] for reason in begun["unusable"]] == ["broken.png", "twin.png"]
    assert "the same as part-100.png" in begun["unusable"][1]
    done = wait(client, begun["id"], over)
    assert (done["state"], done["progress"]["phase"], done["progress"]["step"]) == ("done", "done", 2)
    assert str(quick.temporary) not in json.dumps(done)
    summary, bundle = client.predict(begun["id"], api_name="/training_result")
    assert summary["calibration_images"] == 10 and summary["has_learnt"] in (True, False)
    with zipfile.ZipFile(bundle) as product:
        for name in product.namelist():  # whoever is given it learns neither the id nor a path of the server's
            content = product.read(name)
            assert begun["id"].encode() not in content and str(quick.temporary).encode() not in content, name
        product.extractall(tmp_path)
    pipe = DiffusionADPipeline.from_pretrained(tmp_path / "fl-nge-b")
    assert pipe.threshold == summary["threshold"] and len(pipe.config.calibration_scores) == 10
    assert pipe.trained_on is not None
    record, _ = inspect(client, parts[0], training=begun["id"])
    assert record["category"] == "Flänge <b>"
    assert record["anomaly_score"] == pytest.approx(float(pipe(parts[0]).anomaly_score[0]), abs=1e-5)
    with pytest.raises(AppError, match="There is no category") as refused:
        inspect(other, parts[0], category="Flänge <b>")
    assert begun["id"] not in str(refused.value)
    leftovers = {file.name for file in (lessons(quick)[0].parent / "model").iterdir()}
    assert not {name for name in leftovers if name.startswith(("checkpoint", "best", "logs"))}


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("none", "Choose images or a zip archive first"),
        ("one", "1 usable photo; teaching takes 20 or more"),
        ("nineteen", "19 usable photos; teaching takes 20 or more"),
        ("all the same", "1 usable photo.*the same as"),
        ("too many", "More than 500 files"),
        ("bomb", "0 usable photos.*Larger|larger than 50 MB"),
    ],
)
def test_photos_that_cannot_be_learnt_from_are_one_line_and_leave_nothing(quick, photos, tmp_path, kind, reason):
    client, before = quick.client(), set(lessons(quick))
    files = {"none": [], "one": photos[:1], "nineteen": photos[:19]}.get(kind)
    if files is None:
        target = tmp_path / "in.zip"
        files = [
            {
                "all the same": lambda: copies(target, photos[0], 24),
                "too many": lambda: copies(target, photos[0], 10_000),
                "bomb": lambda: archive(target, [("a.png", b"\0" * 60_000_000)], compression=zipfile.ZIP_DEFLATED),
            }[kind]()
        ]
    with pytest.raises(AppError, match=reason) as caught:
        train(client, *files)
    assert str(quick.temporary) not in str(caught.value) and "\n" not in str(caught.value)
    # Of those of earlier tests, some may go meanwhile.
    assert before.issuperset(lessons(quick)) and not [*quick.temporary.glob("diffusionad-space-*/tmp*")]


def test_two_at_once_wait_for_each_other_stopping_keeps_the_best_and_closing_ends_it(endless, photos):
    first, second = endless.client(), endless.client()
    one, two = train(first, *photos), train(second, *photos)
    assert status(second, two["id"])["before_it"] == 1
    with pytest.raises(AppError, match="One of yours is under way"):
        train(first, *photos)
    wait(first, one["id"], has_learnt_a_step)
    assert status(second, two["id"])["state"] == "waiting" and len(children(endless)) == 1
    with pytest.raises(AppError, match="no product: this training is running"):
        first.predict(one["id"], api_name="/training_result")
    with pytest.raises(AppError, match="stop is true or false"):
        status(first, one["id"], stop="false")
    status(first, one["id"], stop=True)
    stopped = wait(first, one["id"], over)
    assert stopped["state"] == "stopped"
    summary, _ = first.predict(one["id"], api_name="/training_result")
    assert summary["calibration_images"] == 10
    # The next one runs; it ends with its page, and what it wrote is gone.
    wait(second, two["id"], lambda found: found["state"] == "running")
    kept = len(lessons(endless))
    second.close()
    until(lambda: not children(endless), "a training outlives its page")
    until(lambda: len(lessons(endless)) == kept - 1, "a training's photos are left on the disk")
    with pytest.raises(AppError, match="no longer kept"):
        status(first, two["id"])


def test_a_killed_training_is_said_and_one_that_waits_can_be_left(endless, photos):
    client, waiting = endless.client(), endless.client()
    begun, left = train(client, *photos), train(waiting, *photos)
    until(lambda: children(endless), "nothing runs")
    waiting.close()
    until(lambda: len(lessons(endless)) == 1 or "no longer" in _refusal(client, left["id"]), "it still waits")
    os.kill(children(endless)[0], signal.SIGKILL)
    found = wait(client, begun["id"], lambda found: found["state"] == "failed")
    assert "ended from outside" in found["reason"]
    client.close()


def _refusal(client, training):
    try:
        status(client, training)
        return ""
    except AppError as error:
        return str(error)


def test_the_server_s_end_is_its_trainings_end(tmp_path_factory, checkpoints, photos):
    server = teaching(tmp_path_factory, checkpoints, "--max-train-steps 1000000")
    train(server.client(), *photos)
    until(lambda: children(server), "nothing runs")
    [child] = children(server)
    server.stop()
    until(lambda: not psutil.pid_exists(child), "it outlives the server")
    assert not list(server.temporary.glob("diffusionad-space-*"))


def test_another_visitor_cannot_steer_or_read_a_training_by_a_made_up_id(quick):
    client = quick.client()
    for tried in ("", "a" * 32, "../" * 10, "flange"):
        for endpoint in ("/training_status", "/training_result"):
            with pytest.raises(AppError, match="no longer kept"):
                client.predict(tried, api_name=endpoint)


@pytest.fixture
def lesson(checkpoints, results):
    """A teacher, and a lesson whose product is a model that was there."""
    teacher = Teacher(results, Models(str(checkpoints)))
    key, folder = results.new("anna")
    found = Lesson(key, folder, "anna", name="flange", photos=20, state="done")
    shutil.copytree(checkpoints / "flange", found.model)
    yield teacher, found
    teacher.close()


def test_a_product_goes_to_the_hub_with_the_visitor_s_token_and_no_other(lesson, tmp_path, monkeypatch, caplog):
    teacher, found = lesson
    with LoopbackHub(tmp_path / "hub") as hub:
        hub.adopt_client(monkeypatch, tmp_path / "home")  # the server has a login of its own
        for token, reason in (
            ("", "Enter a Hugging Face token"),
            (hub.read_token, "write"),
            (hub.stranger_token, "org"),
        ):
            with pytest.raises(Refusal, match=reason) as refused:
                teacher.publish(found, "org/flange", token)
            assert str(found.folder) not in str(refused.value) and hub.read_token not in str(refused.value)
        with pytest.raises(Refusal, match="ORG/NAME"):
            teacher.publish(found, "flange", hub.token)
        assert teacher.publish(found, "org/flange", f" {hub.token} ") == f"{hub.endpoint}/org/flange"
        assert hub.token not in caplog.text
        for file in teacher.results.folder.rglob("*"):
            assert not file.is_file() or hub.token.encode() not in file.read_bytes()


def test_leaving_while_photos_are_taken_in_leaves_nothing(results, checkpoints, photos):
    teacher = Teacher(results, Models(str(checkpoints)))
    steps = teacher.prepare("anna", "203.0.113.9", [Upload(file.name, file) for file in photos])
    next(steps), next(steps)
    steps.close()
    assert not results.owned("anna") and not [*results.folder.glob("tmp*")]


@pytest.fixture
def teacher(results, checkpoints, tmp_path, monkeypatch):
    """One whose previews take a second and whose trainings never end."""
    program = tmp_path / "program"
    program.write_text('#!/bin/sh\n[ "$5" = preview ] && exec sleep 1\nexec sleep 1000\n')
    program.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(program))
    found = Teacher(results, Models(str(checkpoints)))
    yield found
    found.close()


def prepared(teacher, photos, owner="anna", address="203.0.113.9"):
    *_, found = teacher.prepare(owner, address, [Upload(file.name, file) for file in photos])
    return found


def trainings():
    return [child for child in psutil.Process().children() if child.name() == "sleep"]


def test_a_training_that_began_during_its_preview_ends_with_its_page(teacher, photos):
    lesson = prepared(teacher, photos)
    with ThreadPoolExecutor() as pool:
        look = pool.submit(teacher.preview, lesson)
        until(trainings, "no preview")
        teacher.start(lesson, "Flange", lesson.address)
        look.result()
    [training] = trainings()
    teacher.stop(lesson)
    assert lesson.stopping
    teacher.forget("anna")
    until(lambda: not training.is_running() or training.status() == psutil.STATUS_ZOMBIE, "it outlives its page", 10)


def test_photos_that_are_not_reached_in_time_are_left_out(teacher, photos, results, monkeypatch):
    monkeypatch.setattr(teach, "LIMITS", replace(LIMITS, batch_seconds=-1))
    with pytest.raises(Refusal, match=r"0 usable photos.*part-100.png: not reached in"):
        prepared(teacher, photos)
    assert not results.owned("anna")


def test_teaching_the_same_photos_again_takes_no_more_than_an_address_may_keep(teacher, photos, results):
    lesson = prepared(teacher, photos)
    lesson.state = "done"
    for _ in range(LIMITS.kept_per_address + 3):
        again = teacher.start(lesson, "Flange", lesson.address)
        until(trainings, "it does not run", 10)
        teacher.stop(again)
        until(lambda: not teacher.is_busy("anna"), "it does not end", 10)
    assert again.bytes == lesson.bytes > 0, "the disk they take is counted though the first one goes"
    assert len(results.owned("anna")) <= LIMITS.kept_per_address + 1 and teacher.find(lesson.key) is lesson


def test_taking_in_marked_photos_keeps_nobody_waiting_and_is_limited(teacher, photos, monkeypatch):
    first, other = prepared(teacher, photos), prepared(teacher, photos, "bert", "203.0.113.10")
    taken, go_on = [], threading.Event()
    keep = teach._keep

    def slow(upload, *args):
        taken.append(upload.name)
        assert go_on.wait(60)
        return keep(upload, *args)

    monkeypatch.setattr(teach, "_keep", slow)
    monkeypatch.setattr(teach, "LIMITS", replace(LIMITS, files=3))
    marks = [Mark(file, {"file": file.name, "mark": "fine"}) for file in photos]
    with ThreadPoolExecutor() as pool:
        start = pool.submit(teacher.start, first, "Flange", first.address, marks)
        until(lambda: taken, "it does not begin")
        pool.submit(teacher.position, other).result(10)
        go_on.set()
        start.result()
    assert taken == [file.name for file in photos[:-4:-1]], "the newest"
    marked = read_feedback(str(first.folder / "feedback.json"), str(first.folder / "photos"))
    assert len(marked.fine) == 3 and all(file.is_file() for file in marked.fine)


def test_a_page_that_closes_stops_no_one_else_s_teaching(teacher, photos, monkeypatch):
    first, second = prepared(teacher, photos), prepared(teacher, photos, "bert", "203.0.113.10")
    utime = os.utime

    def gone(path, *args, **kwargs):
        if path == first.folder and first.is_under_way:
            raise FileNotFoundError(path)
        utime(path, *args, **kwargs)

    monkeypatch.setattr(os, "utime", gone)  # as if it was removed just then
    teacher.start(first, "Flange", first.address)
    until(lambda: first.state == "running", "it does not run", 10)
    teacher.stop(first)
    until(lambda: not first.is_under_way, "it does not end", 10)
    teacher.start(second, "Flange", second.address)
    until(lambda: second.state == "running", "nothing is taught any more", 10)


@pytest.mark.parametrize(
    ("told", "space", "expected"),
    [
        (None, None, True),
        (None, "org/space", False),
        ("1", "org/space", True),
        ("0", None, False),
        ("yes", None, None),
    ],
)
def test_teaching_is_off_on_public_spaces_unless_asked_for(monkeypatch, told, space, expected):
    for name, value in (("DIFFUSIONAD_TEACH", told), ("SPACE_ID", space)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    if expected is None:
        with pytest.raises(ValueError, match="DIFFUSIONAD_TEACH=yes: must be 1, or 0"):
            is_on()
    else:
        assert is_on() is expected
