"""Checkpoints: whole or not at all."""

import pytest
import torch
from accelerate import Accelerator

from diffusionad_hf.training.checkpoints import find_checkpoint, save_checkpoint


@pytest.fixture
def accelerator():
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(torch.nn.Linear(300, 300))
    return accelerator


def save(accelerator, folder, step, limit=2):
    return save_checkpoint(accelerator, folder, {"step": step, "arguments": {}}, limit)


def test_only_the_latest_are_kept(accelerator, tmp_path):
    for step in (5, 10, 100, 20):
        save(accelerator, tmp_path, step)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-100", "checkpoint-20"]
    assert find_checkpoint(tmp_path, "latest").name == "checkpoint-100"


def test_what_was_left_half_written_is_no_checkpoint(accelerator, tmp_path):
    save(accelerator, tmp_path, 1)
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / ".checkpoint-3.partial").mkdir()
    assert find_checkpoint(tmp_path, "latest").name == "checkpoint-1"
