"""Where long calls are computed."""

import os
import subprocess
import sys
import time

import psutil
import pytest
import torch

from diffusionad_hf import DiffusionADPipeline
from diffusionad_hf.space import computing
from diffusionad_hf.space.aside import Aside
from diffusionad_hf.space.decoding import SECONDS


@pytest.fixture
def aside(monkeypatch):
    """The process's number; every call is a long one."""
    monkeypatch.setattr(computing, "_LONG", 1)
    monkeypatch.setattr(computing, "_aside", own := Aside())
    before = set(psutil.Process().children(recursive=True))

    def number():
        found = [p for p in set(psutil.Process().children(recursive=True)) - before if p.nice() == 19]
        return found[0].pid if found else None

    yield number
    own.close()


@pytest.fixture
def pipe(checkpoints):
    return DiffusionADPipeline.from_pretrained(checkpoints / "flange")


@pytest.fixture
def images():
    return [torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))]


def test_a_long_call_lets_others_go_first_and_says_the_same(aside, pipe, images):
    expected, token = pipe(images, num_noises=2), SECONDS.set([])
    try:
        found = computing.infer(pipe, images, num_noises=2)
        assert sum(SECONDS.get()) > 0  # its visitor's account
    finally:
        SECONDS.reset(token)
    assert found.anomaly_score == pytest.approx(expected.anomaly_score, abs=1e-5)
    assert found.verdict == expected.verdict and aside()
    assert not any(weight.is_shared() for weight in pipe.unet.parameters())


def test_a_short_call_starts_no_process(aside, pipe, images, monkeypatch):
    monkeypatch.setattr(computing, "_LONG", 3 * 64 * 64)
    computing.infer(pipe, images, num_noises=2)
    assert aside() is None


def test_a_killed_process_is_replaced(aside, pipe, images):
    computing.infer(pipe, images, num_noises=1)
    os.kill(aside(), 9)
    with pytest.raises((OSError, EOFError)):
        computing.infer(pipe, images, num_noises=1)
    assert computing.infer(pipe, images, num_noises=1).anomaly_score.shape == (1,)


def test_who_comes_while_it_is_busy_does_not_wait_for_it(aside, pipe, images):
    computing.infer(pipe, images, num_noises=1)
    with computing._aside._lock:
        token = SECONDS.set([])
        assert computing.infer(pipe, images, num_noises=1).anomaly_score.shape == (1,)
        assert not SECONDS.get()  # it was computed here
        SECONDS.reset(token)


def test_a_failure_is_said_and_ends_nothing(aside, pipe, images, fragile):
    broken = DiffusionADPipeline.from_pretrained(fragile)
    with pytest.raises(RuntimeError, match="channels"):
        computing.infer(broken, images, num_noises=1)
    assert computing.infer(pipe, images, num_noises=1).anomaly_score.shape == (1,)


def test_it_ends_with_the_server(checkpoints, tmp_path):
    """Also if that is killed: the pipe's other end is its own."""
    program = tmp_path / "server.py"
    program.write_text(
        "import os, pickle, psutil\n"
        "from diffusionad_hf.space.aside import Aside\n"
        "if __name__ == '__main__':\n"
        "    try:\n"
        "        Aside()(pickle.dumps((len, ([],), {})))\n"
        "    finally:\n"
        "        print(*(p.pid for p in psutil.Process().children(recursive=True) if p.nice() == 19), flush=True)\n"
        "        os.kill(os.getpid(), 9)\n"
    )
    ended = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=120)
    [number] = map(int, ended.stdout.split())
    end = time.monotonic() + 30
    while psutil.pid_exists(number) and psutil.Process(number).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end, "it outlives its server"
        time.sleep(0.1)
