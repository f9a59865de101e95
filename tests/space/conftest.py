"""A small calibrated model that has learned nothing, photos of a part, and a server process with both."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]

pytest.importorskip("gradio", reason="the page needs gradio: pip install -e .[space]")

from gradio_client import Client  # noqa: E402

from demo_part.generate import render_part  # noqa: E402


@pytest.fixture(scope="session")
def parts(tmp_path_factory):
    """Twelve photos of normal parts, 96 px."""
    folder = tmp_path_factory.mktemp("parts")
    files = []
    for seed in range(12):
        files.append(folder / f"part-{seed:02d}.png")
        pixels = render_part(np.random.default_rng(seed), size=96)
        Image.fromarray(pixels).save(files[-1])
    return files


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory, parts):
    """A folder with one model, `flange`, which knows its normal parts."""
    from diffusionad_hf import build_pipeline
    from diffusionad_hf.calibration import calibrate
    from diffusionad_hf.familiarity import FILE_NAME, Familiarity, describe
    from diffusionad_hf.images_diffusionad import load_image

    folder = tmp_path_factory.mktemp("checkpoints") / "flange"
    torch.manual_seed(0)
    pipe = build_pipeline("tiny", 64)
    pipe.set_progress_bar_config(disable=True)
    calibrate(pipe, parts, false_alarm_rate=0.1)
    pipe.save_pretrained(folder)
    familiarity = Familiarity.of([describe(load_image(part)) for part in parts])
    (folder / FILE_NAME).write_text(json.dumps(familiarity.to_json()), encoding="utf-8")
    (folder / "README.md").write_text(
        "---\nlicense: mit\ntags: [diffusionad]\nmodel-index:\n- name: flange\n  results:\n"
        "  - task: {type: image-classification}\n    dataset: {name: flanges, type: flanges}\n    metrics:\n"
        "    - {type: image_auroc, value: 0.875, name: image AUROC}\n---\n"
        "# Flange\n\n## Limits\n\n- One light only.\n- Steel only.\n\n## Licence\n\nMIT\n",
        encoding="utf-8",
    )
    return folder.parent


@pytest.fixture(scope="session")
def fragile(tmp_path_factory, checkpoints):
    """A model that can be loaded, and fails on every image: its segmenter takes other inputs than it is given."""
    from diffusionad_hf import AnomalySegmenter, DiffusionADPipeline

    folder = tmp_path_factory.mktemp("fragile") / "fragile"
    pipe = DiffusionADPipeline.from_pretrained(checkpoints / "flange")
    segmenter = AnomalySegmenter(in_channels=5, base_channels=pipe.segmenter.config.base_channels)
    pipe.register_modules(segmenter=segmenter.eval())
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def model(checkpoints):
    from diffusionad_hf.space.models import Models

    return Models(str(checkpoints)).get("flange")


@pytest.fixture
def results(tmp_path):
    from diffusionad_hf.space.results import Results

    return Results(tmp_path / "server")


class Server:
    """A process of the page; `runs` counts how often it ran a model, `log` is what it printed."""

    def __init__(self, folder: Path, models: str, environment: Mapping[str, str] = os.environ):
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        self._log = folder / "log.txt"
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
        }
        with self._log.open("wb") as log:
            # Elsewhere than in the repository, as on a Space.
            self.process = subprocess.Popen(
                [sys.executable, str(ROOT / "space" / "app.py")],
                env=environment,
                cwd=folder,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        for _ in range(600):
            try:
                urllib.request.urlopen(self.url, timeout=5).close()
                return
            except (urllib.error.URLError, OSError):
                assert self.process.poll() is None, self.log
                time.sleep(0.2)
        raise AssertionError(f"the server did not start:\n{self.log}")

    @property
    def log(self) -> str:
        return self._log.read_text(encoding="utf-8")

    @property
    def runs(self) -> int:
        return self.log.count("INFO space: ran ")

    def client(self) -> Client:
        # Without certificates, which http has none of: reading the machine's store takes 0.15 s, for every request.
        return Client(self.url, verbose=False, ssl_verify=False)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=30)


@pytest.fixture(scope="session")
def server(tmp_path_factory, checkpoints, fragile):
    running = Server(tmp_path_factory.mktemp("server"), f"{checkpoints},{fragile},no-one/no-such-model")
    yield running
    running.stop()
    assert not list(running.temporary.glob("diffusionad-space-*")), "photos of visitors were left on the disk"
