"""A small calibrated model that has learned nothing, photos of a part, and a server process with both."""

import io
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("gradio", reason="the page needs gradio: pip install -e .[space]")

from gradio_client import Client, handle_file  # noqa: E402

from demo_part.generate import render_part  # noqa: E402
from diffusionad_hf import AnomalySegmenter, DiffusionADPipeline, build_pipeline  # noqa: E402
from diffusionad_hf.calibration import calibrate  # noqa: E402
from diffusionad_hf.space.models import Models  # noqa: E402
from diffusionad_hf.space.results import Results  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
CARD = """---
tags: [diffusionad]
category: Flange
data_origin: rendered
data_license: cc-by-sa-4.0
data_attribution: a workshop
model-index:
- name: flange
  results:
  - task: {type: image-classification}
    dataset: {name: flanges, type: flanges}
    metrics: [{type: image_auroc, value: 0.875, name: image AUROC}]
---
# Flange\n\n## Limits\n\n- One light only.\n- Steel only.\n\n## Licence\n\nMIT
"""


def png(side=32):
    buffer = io.BytesIO()
    Image.new("RGB", (side, side)).save(buffer, "PNG")
    return buffer.getvalue()


def archive(path, members, **kwargs):
    """Zips (name, content) pairs."""
    with zipfile.ZipFile(path, "w", **kwargs) as bundle:
        for name, data in members:
            bundle.writestr(name, data)
    return path


def copies(path, photo, count):
    return archive(path, [(f"{i}.png", photo.read_bytes()) for i in range(count)])


@pytest.fixture(scope="session")
def parts(tmp_path_factory):
    """Twelve photos of normal parts, 96 px."""
    folder = tmp_path_factory.mktemp("parts")
    files = [folder / f"part-{seed:02d}.png" for seed in range(12)]
    for seed, file in enumerate(files):
        Image.fromarray(render_part(np.random.default_rng(seed), size=96)).save(file)
    return files


@pytest.fixture
def notes(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    return tmp_path / "notes.txt"


@pytest.fixture
def white(tmp_path):
    Image.new("RGB", (96, 96), "white").save(tmp_path / "white.png")
    return tmp_path / "white.png"


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory, parts):
    """A folder with one model, `flange`, which knows its normal parts."""
    folder = tmp_path_factory.mktemp("checkpoints") / "flange"
    torch.manual_seed(0)
    pipe = build_pipeline("tiny", 64)
    pipe.set_progress_bar_config(disable=True)
    calibrate(pipe, parts, false_alarm_rate=0.1)
    pipe.save_pretrained(folder)
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    return folder.parent


@pytest.fixture(scope="session")
def fragile(tmp_path_factory, checkpoints):
    """A model that can be loaded, and fails on every image: its segmenter takes other inputs than it is given."""
    folder = tmp_path_factory.mktemp("fragile") / "fragile"
    pipe = DiffusionADPipeline.from_pretrained(checkpoints / "flange")
    segmenter = AnomalySegmenter(in_channels=5, base_channels=pipe.segmenter.config.base_channels)
    pipe.register_modules(segmenter=segmenter.eval())
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tried(tmp_path_factory, checkpoints):
    """The same model twice, with photos to try it on: `steel`, and `brass`, without card, with another threshold."""
    folder = tmp_path_factory.mktemp("tried")
    for seed, name in enumerate(("steel", "brass"), 20):
        examples = shutil.copytree(checkpoints / "flange", folder / name) / "examples"
        examples.mkdir()
        for photo, label in enumerate(("good", "good-2", "deep-scratch")):
            part = render_part(np.random.default_rng((seed, photo)), size=96)
            Image.fromarray(part).save(examples / f"{label}.png")
    (folder / "brass" / "README.md").unlink()
    index = folder / "brass" / "model_index.json"
    saved = json.loads(index.read_text())
    index.write_text(json.dumps({**saved, "calibration_scores": [s - 0.1 for s in saved["calibration_scores"]]}))
    (folder / "steel" / "examples" / "no-image.png").write_text("nothing")
    return folder


@pytest.fixture
def model(checkpoints):
    return Models(str(checkpoints)).get("flange")


@pytest.fixture
def results(tmp_path):
    return Results(tmp_path / "server")


class Server:
    """A process of the page; `runs` counts how often it ran a model, `log` is what it printed."""

    def __init__(self, folder, models, environment=os.environ, app=ROOT / "space" / "app.py"):
        self.temporary, self._log = folder / "tmp", folder / "log.txt"
        self.temporary.mkdir()
        self._visitors = itertools.count()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/"
        environment = {
            **environment,
            "DIFFUSIONAD_MODELS": models,
            "GRADIO_SERVER_PORT": str(port),
            "TMPDIR": str(self.temporary),
            "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH")))),
            "OMP_NUM_THREADS": "1",
            "DIFFUSIONAD_PROXIES": "1",
        }
        with self._log.open("wb") as log:
            # Elsewhere than in the repository, as on a Space.
            start = [sys.executable, str(app)]
            self.process = subprocess.Popen(start, env=environment, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
        for _ in range(600):
            try:
                urllib.request.urlopen(self.url, timeout=5).close()
                return
            except OSError:
                assert self.process.poll() is None, self.log
                time.sleep(0.2)
        raise AssertionError(f"the server did not start:\n{self.log}")

    @property
    def log(self):
        return self._log.read_text(encoding="utf-8")

    @property
    def runs(self):
        return self.log.count("INFO space: ran ")

    def client(self):
        # Without certificates, which http has none of: reading the machine's store takes 0.15 s, for every request.
        # From an address of its own, as who asks for much has to wait, and a new client asks for much.
        headers = {"X-Forwarded-For": f"198.18.{next(self._visitors)}.1"}
        return Client(self.url, verbose=False, ssl_verify=False, headers=headers)

    def post(self, path, body):
        """The answer of a plain HTTP call."""
        kind = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}gradio_api/{path}", json.dumps(body).encode(), kind)
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    def queued(self, call):
        """The data with which a call that joins the queue ends."""
        event = self.post("queue/join", call)["event_id"]
        url = f"{self.url}gradio_api/queue/data?session_hash={call['session_hash']}"
        with urllib.request.urlopen(url) as messages:
            for line in messages:
                message = json.loads(line.removeprefix(b"data: ")) if line.startswith(b"data: ") else {}
                if message.get("event_id") == event and message["msg"] == "process_completed":
                    return message["output"].get("data", message["output"])
        raise AssertionError("the call did not end")

    def stop(self):
        self.process.terminate()
        self.process.wait(timeout=30)


def inspect(client, photo, **arguments):
    """The record and the overlay; arguments that are not given are left out."""
    return client.predict(image=handle_file(str(photo)), **arguments, api_name="/inspect")


@pytest.fixture(scope="session")
def server(tmp_path_factory, checkpoints, fragile):
    running = Server(tmp_path_factory.mktemp("server"), f"{checkpoints},{fragile},no-one/no-such-model")
    yield running
    running.stop()
    assert not list(running.temporary.glob("diffusionad-space-*")), "photos of visitors were left on the disk"
