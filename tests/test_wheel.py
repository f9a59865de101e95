"""What `pip install` gives: everything, in an empty folder and without the clone; and an sdist that tests itself."""

import os
import re
import socket
import subprocess
import sys
import tarfile
import time
import urllib.request
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytest.importorskip("build", reason="needs build and hatchling: pip install -e .[dev]")


def build(kind, folder):
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", folder, ROOT]
    subprocess.run(command, check=True, capture_output=True)
    (archive,) = folder.iterdir()
    return archive


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build("wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The folder that the wheel was installed into, without its dependencies: those of this Python serve."""
    target = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target, wheel]
    subprocess.run(command, check=True, capture_output=True)
    return target


def environment(*paths):
    path = os.pathsep.join(map(str, paths))
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


def run(installed, folder, *arguments, before=()):
    command = [sys.executable, "-m", "diffusionad_hf", *map(str, arguments)]
    variables = environment(*before, installed)
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=120)


def test_the_wheel_holds_everything_and_little(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split("\n")
    expected = {name for name in tracked if name.startswith("diffusionad_hf/") and (ROOT / name).is_file()}
    bundled = {name for name in tracked if name.startswith("space/") and "/mvtec-bottle/" not in name}
    expected |= {f"diffusionad_hf/_bundled/{name}" for name in bundled}
    expected |= {"diffusionad_hf/hub/model_card.md", "diffusionad_hf/py.typed", "diffusionad_hf/space/style.css"}
    expected |= {"diffusionad_hf/training/presets/tiny.json"}
    assert expected <= names
    assert not [name for name in names - expected if not re.search(r"\.dist-info/|\.py$", name)]
    assert wheel.stat().st_size < 15e6


def test_the_demo_inspects_the_bundled_photos(installed, tmp_path):
    done = run(installed, tmp_path, "demo")
    assert done.returncode == 0, done.stderr
    assert "anomalous" in done.stdout and list((tmp_path / "outputs/demo").rglob("*.png"))


@pytest.mark.parametrize("arguments", [(), ("deploy-space",), ("train",)])
def test_help(installed, tmp_path, arguments):
    done = run(installed, tmp_path, *arguments, "--help")
    assert done.returncode == 0 and done.stdout.startswith("usage: "), done.stderr
    assert (installed / "bin/diffusionad").is_file()


DEPLOY = """
import sys
from pathlib import Path
from diffusionad_hf.files import bundled
from diffusionad_hf.hub.spaces import _stage

_stage(bundled("space"), Path("staged"), (), "https://hub/spaces/org/x")
"""


def test_a_space_is_put_together_without_a_clone(installed, tmp_path):
    (tmp_path / "staged").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", DEPLOY], cwd=tmp_path, env=environment(installed), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    staged = tmp_path / "staged"
    assert {path.name for path in staged.iterdir()} >= {"app.py", "README.md", "checkpoints", "diffusionad_hf"}
    assert not (staged / "diffusionad_hf/_bundled").exists()
    asked = {re.match(r"[\w-]+", line)[0] for line in (staged / "requirements.txt").read_text().splitlines()}
    assert {"torch", "diffusers", "jinja2"} <= asked and not {"gradio", "ruff", "diffusionad-hf"} & asked


def test_the_page_answers(installed, tmp_path):
    pytest.importorskip("gradio", reason="the page needs gradio: pip install -e .[space]")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "diffusionad_hf", "serve", "--port", str(port)]
    with (tmp_path / "log").open("w") as log:
        running = subprocess.Popen(command, cwd=tmp_path, env=environment(installed), stdout=log, stderr=log)
    try:
        for _ in range(300):
            try:
                page = urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5).read()
                break
            except OSError:
                assert running.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.2)
        assert b"gradio" in page
    finally:
        running.terminate()
        running.wait(timeout=60)


@pytest.mark.parametrize(
    ("missing", "arguments", "extra"),
    [
        ("gradio", ("serve",), "space"),
        ("datasets", ("inspect", "--dataset", "org/photos", "--model", "org/m", "--parquet", "out"), "train"),
    ],
)
def test_a_missing_extra_is_named_in_one_line(installed, tmp_path, missing, arguments, extra):
    blocker = f"""
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "{missing}":
            raise ModuleNotFoundError("No module named " + name, name=name)

sys.meta_path.insert(0, Blocker())
"""
    (tmp_path / "sitecustomize.py").write_text(blocker)
    done = run(installed, tmp_path, *arguments, before=[tmp_path])
    assert done.returncode and f"[{extra}]" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


def test_the_sdist_tests_itself(tmp_path):
    with tarfile.open(build("sdist", tmp_path / "dist")) as archive:
        archive.extractall(tmp_path, filter="data")
    (root,) = tmp_path.glob("diffusionad_hf-*")
    faces = "Makefile constraints.txt model_card.md benchmarks demo_part training/train.py space/app.py".split()
    assert all((root / name).exists() for name in faces)
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "tests/test_files.py"]
    done = subprocess.run(command, cwd=root, env=environment(root), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
