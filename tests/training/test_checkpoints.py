"""Checkpoints: whole or not at all."""

import resource

import pytest
import torch
from accelerate import Accelerator

from diffusionad_hf.training.checkpoints import find_checkpoint, load_checkpoint, save_checkpoint

ARGUMENTS = {"resolution": 32, "output_dir": "a"}


@pytest.fixture
def accelerator():
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(torch.nn.Linear(300, 300))
    return accelerator


def save(accelerator, folder, step, limit=2):
    return save_checkpoint(accelerator, folder, {"step": step, "arguments": ARGUMENTS}, limit)


@pytest.fixture
def full_disk():
    """Files of this process cannot grow beyond 100 kB, which fails as a full disk does: in the middle of a write."""
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, former[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, former)


def test_only_the_latest_are_kept(accelerator, tmp_path):
    for step in (5, 10, 100, 20):
        save(accelerator, tmp_path, step)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-100", "checkpoint-20"]
    assert find_checkpoint(tmp_path, "latest").name == "checkpoint-100"


def test_a_full_disk_leaves_the_former_checkpoint_whole(accelerator, tmp_path, request):
    former = save(accelerator, tmp_path, 1)
    before = {p.name: p.read_bytes() for p in former.iterdir()}
    request.getfixturevalue("full_disk")
    with pytest.raises(OSError, match="checkpoint-2.*checkpoint-1 is whole"):
        save(accelerator, tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]
    assert {p.name: p.read_bytes() for p in former.iterdir()} == before


def test_what_was_left_half_written_is_no_checkpoint(accelerator, tmp_path):
    save(accelerator, tmp_path, 1)
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / ".checkpoint-3.partial").mkdir()
    assert find_checkpoint(tmp_path, "latest").name == "checkpoint-1"


def test_loading_gives_the_state_back(accelerator, tmp_path):
    folder = save(accelerator, tmp_path, 7)
    (model,) = accelerator._models
    before = model.weight.clone()
    with torch.no_grad():
        model.weight.zero_()
    assert load_checkpoint(accelerator, folder, {"resolution": 32, "output_dir": "elsewhere"})["step"] == 7
    assert torch.equal(model.weight, before)


def test_another_configuration_is_refused(accelerator, tmp_path):
    folder = save(accelerator, tmp_path, 7)
    with pytest.raises(ValueError, match="`resolution` 32, this one has 64"):
        load_checkpoint(accelerator, folder, {"resolution": 64})
