"""What the README says to type does what it says beside it."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from diffusionad_hf import DiffusionADPipeline
from tests.dataset_factory import make_mvtec

pq = pytest.importorskip("pyarrow.parquet", reason="results in Parquet need pip install -e .[train]")

ROOT = Path(__file__).resolve().parents[1]
MODEL = "space/checkpoints/demo-part"
README = (ROOT / "README.md").read_text(encoding="utf-8")


def run(start, replaced, *more):
    """Runs the command of the README that begins so, with other names for what a reader has to give; from its folder,
    as a reader does."""
    (line,) = re.findall(rf"^{re.escape(start)}.*(?:\\\n.*)*", README, re.MULTILINE)
    words = shlex.split(line.replace("\\\n", " "))
    assert replaced.keys() <= set(words)
    # Two tests at once would ask for the same port.
    words.insert(words.index("launch") + 1, "--main_process_port=0")
    words[0] = str(Path(sys.executable).with_name("accelerate"))
    command = [str(replaced.get(word, word)) for word in words] + [str(word) for word in more]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )


def test_two_processes_share_an_inspection(tmp_path):
    names = {
        "photos/": f"{MODEL}/examples",
        "org/diffusionad-mvtec-screw": MODEL,
        "result.parquet": tmp_path / "r.parquet",
    }
    done = run("accelerate launch --multi_gpu --num_processes 2", names)
    assert done.returncode == 0, done.stderr
    assert "inspecting (process 1 of 2)" in done.stderr
    assert pq.read_table(tmp_path / "r.parquet")["verdict"].to_pylist().count("anomalous") == 6


def test_a_category_is_trained(tmp_path):
    make_mvtec(tmp_path / "mvtec", "bottle", train=12, size=(64, 64))
    names = {"mvtec_ad": tmp_path / "mvtec", "dtd/images": MODEL, "runs/bottle": tmp_path / "bottle"}
    done = run(".venv/bin/accelerate launch training/train.py", names, "--max-train-steps=2", "--image-size=64")
    assert done.returncode == 0, done.stderr
    assert DiffusionADPipeline.from_pretrained(tmp_path / "bottle").config.calibration_scores


def test_the_python_that_it_shows(monkeypatch):
    monkeypatch.chdir(ROOT)
    (code,) = [code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "out.verdict" in code]
    names = {}
    exec(code, names)
    assert names["out"].verdict[0] == "anomalous" and names["out"].reconstruction[0].shape[-1] == 3
