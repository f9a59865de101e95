"""The page on ZeroGPU: Hugging Face's package `spaces` with its processes and pickles, and a lender of ours."""

import json
import os
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import psutil
import pytest

from diffusionad_hf import DiffusionADPipeline
from tests.space.conftest import Server, inspect
from tests.space.test_teach import TINY, lessons, over, photos, status, train, until, wait  # noqa: F401

pytest.importorskip("spaces", reason="pip install spaces")
if not hasattr(os, "fork"):
    pytest.skip("ZeroGPU forks", allow_module_level=True)


class Lender(ThreadingHTTPServer):
    """Lends a GPU to whoever asks, unless `is_out`; `lent` are the processes, `released` how often one came back."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Answers)
        self.is_out, self.asked, self.lent, self.released = False, [], [], 0
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def answer(self, path, values):
        if path == "/schedule":
            self.asked.append(values)
            lent = {"idle": False, "nvidiaIndex": 0, "nvidiaUUID": "MIG-lent", "allowToken": str(len(self.asked))}
            return (503, {}) if self.is_out else (200, lent)
        if path == "/allow":
            self.lent.append(int(values["pid"][0]))
        self.released += path == "/release"
        return 200, {}


class _Answers(BaseHTTPRequestHandler):
    def do_POST(self):  # noqa: N802
        url = urlsplit(self.path)
        code, answer = self.server.answer(url.path, parse_qs(url.query))
        body = json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def lender():
    found = Lender()
    yield found
    found.shutdown()
    found.server_close()


@pytest.fixture(scope="module")
def zero(tmp_path_factory, lender, checkpoints):
    """A server on ZeroGPU, whose trainings end when they are told to."""
    environment = {
        **os.environ,
        "SPACES_ZERO_GPU": "true",
        "SPACES_ZERO_DEVICE_API_URL": f"http://127.0.0.1:{lender.server_port}",
        "DIFFUSIONAD_TEACH_OPTIONS": f"{TINY} --max-train-steps 1000000 --validation-steps 4",
        "DIFFUSIONAD_TEACH_NICE": "0",
    }
    folder, app = tmp_path_factory.mktemp("zero"), Path(__file__).with_name("zero_gpu_app.py")
    server = Server(folder, str(checkpoints), environment, app)
    yield server
    server.stop()


@pytest.fixture
def lends(lender):
    lender.is_out, lender.released = False, 0
    lender.asked.clear(), lender.lent.clear()
    return lender


def teaching(server):
    """The server's process that teaches, and the one that started it."""
    for process in psutil.Process(server.process.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if "train" in (words := process.cmdline()) and any("teach_process" in word for word in words):
                return process, process.ppid()
    return None, None


def test_the_start_asks_for_no_gpu(zero, lender):
    assert not lender.asked and "Traceback" not in zero.log


@pytest.mark.parametrize("is_out", [False, True])
def test_inspects_on_the_gpu_that_is_lent_or_else_without(zero, lends, checkpoints, parts, is_out):
    lends.is_out = is_out
    record, _ = inspect(zero.client(), parts[0])
    expected = DiffusionADPipeline.from_pretrained(checkpoints / "flange")(parts[0])
    assert record["anomaly_score"] == pytest.approx(float(expected.anomaly_score[0]), abs=1e-5)
    assert len(lends.asked) == 1 and int(lends.asked[0]["durationSeconds"][0]) <= 60
    assert (len(lends.lent), lends.released) == ((0, 0) if is_out else (1, 1))
    assert zero.process.pid not in lends.lent


def test_teaches_on_the_gpu_that_is_lent(zero, lends, photos):  # noqa: F811
    client = zero.client()
    begun = train(client, *photos)
    found = wait(client, begun["id"], lambda found: (found["progress"]["step"] or 0) > 0)
    process, starter = teaching(zero)
    environment = process.environ()
    assert [starter] == lends.lent and environment["CUDA_VISIBLE_DEVICES"] == "MIG-lent"
    assert "SPACES_ZERO_GPU" not in environment
    status(client, begun["id"], stop=True)
    found = wait(client, begun["id"], over)
    assert found["state"] == "stopped" and client.predict(begun["id"], api_name="/training_result")
    until(lambda: lends.released == 1, "the GPU is not given back")


@pytest.mark.parametrize("killed", ["worker", "training"])
def test_a_training_goes_on_without_a_gpu_that_is_taken_away(zero, lends, photos, killed):  # noqa: F811
    client = zero.client()
    begun = train(client, *photos)
    wait(client, begun["id"], lambda found: (found["progress"]["step"] or 0) > 0)
    first, starter = teaching(zero)
    (psutil.Process(starter) if killed == "worker" else first).kill()
    until(lambda: teaching(zero)[1] == zero.process.pid, "it does not go on")
    until(lambda: not first.is_running() or first.status() == psutil.STATUS_ZOMBIE, "two train at once")
    wait(client, begun["id"], lambda found: (found["progress"]["step"] or 0) > 0)
    kept = len(lessons(zero))
    client.close()
    until(lambda: teaching(zero)[0] is None, "a training outlives its page")
    until(lambda: len(lessons(zero)) == kept - 1, "its photos are left on the disk")


def test_a_page_that_closes_gives_the_gpu_back(zero, lends, photos):  # noqa: F811
    client = zero.client()
    begun = train(client, *photos)
    wait(client, begun["id"], lambda found: (found["progress"]["step"] or 0) > 0)
    kept = len(lessons(zero))
    client.close()
    until(lambda: teaching(zero)[0] is None, "a training outlives its page")
    until(lambda: lends.released == 1, "the GPU is not given back")
    until(lambda: len(lessons(zero)) == kept - 1, "its photos are left on the disk")
