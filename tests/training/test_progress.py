"""What other processes see of a training."""

import json

import pytest

from diffusionad_hf.training.progress import PROGRESS_FILE, Progress, ProgressFile


@pytest.fixture
def watched(tmp_path):
    progress = Progress()
    progress.tell([ProgressFile(tmp_path)])
    return progress, lambda: json.loads((tmp_path / PROGRESS_FILE).read_text())


def test_a_new_phase_is_written_at_once_and_steps_once_a_second(watched, monkeypatch):
    now = 100.0
    monkeypatch.setattr("diffusionad_hf.training.progress.time.monotonic", lambda: now)
    progress, read = watched
    progress.update(phase="training", steps=9)
    for step in (1, 2):
        progress.update(step=step, loss=0.5)
    assert (read()["phase"], read()["step"]) == ("training", 0)
    now += 1
    progress.update(step=3)
    assert read()["step"] == 3
    progress.update(step=4, validation={"score": 0.9})
    assert read()["step"] == 4 and read()["validation"] == {"score": 0.9}


def test_numbers_that_are_not_finite_are_null(watched):
    progress, read = watched
    progress.update(loss=float("nan"), seconds_left=float("inf"))
    assert read()["loss"] is None and read()["seconds_left"] is None


def test_a_folder_that_cannot_be_written_is_said_and_ends_nothing(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    progress = Progress()
    progress.tell([ProgressFile(tmp_path / "file")])
    progress.update(phase="training")
    assert "progress.json: cannot be written" in caplog.text
