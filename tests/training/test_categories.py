"""All categories of a data set one after another, and each on the Hub as soon as it is trained."""

import json
import shutil

import pytest

from diffusionad_hf import DiffusionADPipeline
from tests.dataset_factory import make_mvtec

from .runs import run, same, weights

PREFIX = "org/diffusionad"


@pytest.fixture
def three(tmp_path, data):
    """Categories `bolt`, `nut` and `washer`, of which `nut` has no normal images; textures beside them."""
    shutil.copytree(data.parent / "textures", tmp_path / "textures")
    for name in ("bolt", "nut", "washer"):
        make_mvtec(tmp_path / "three", name, train=6, good=1, defects={"hole": 1})
    (tmp_path / "three/nut/train/good").rename(tmp_path / "kept")
    (tmp_path / "three/nut/train/good").mkdir()
    return tmp_path / "three"


def run_all(three, output, **options):
    settings = {"category": "all", "max_train_steps": 2, "checkpointing_steps": 1, "validation_steps": 1}
    return run(three, output, **{**settings, **options})


def test_one_that_fails_is_named_finished_ones_are_skipped_and_unfinished_ones_go_on(three, tmp_path, capsys):
    output = tmp_path / "out"
    assert run_all(three, output) == 2
    error = capsys.readouterr().err
    assert "1 of 3 categories failed" in error
    assert error.splitlines()[-1].startswith("  nut: category 'nut' ")
    for name in ("bolt", "washer"):
        assert DiffusionADPipeline.from_pretrained(output / name).config.calibration_scores
        assert json.loads((output / name / "training_arguments.json").read_text())["category"] == name

    # What was interrupted goes on, what is whole is not touched, what was mended is trained.
    expected = weights(output / "washer")
    shutil.rmtree(output / "washer/checkpoint-2")
    (output / "washer/training_arguments.json").unlink()
    shutil.rmtree(three / "nut/train/good")
    (tmp_path / "kept").rename(three / "nut/train/good")
    before = {file: file.stat().st_mtime_ns for file in (output / "bolt").rglob("*")}
    assert run_all(three, output) == 0
    said = capsys.readouterr().err
    assert "Resumed from" in said and "washer/checkpoint-1" in said
    assert {file: file.stat().st_mtime_ns for file in (output / "bolt").rglob("*")} == before
    assert same(weights(output / "washer"), expected) and weights(output / "nut")

    # A category is what it is when trained by itself.
    assert run_all(three, tmp_path / "alone", category="washer") == 0
    assert same(weights(tmp_path / "alone"), expected)

    # Another training does not pass for this one.
    assert run_all(three, output, seed=1) == 2
    assert "3 of 3 categories failed" in (said := capsys.readouterr().err) and "--seed 0, this one has 1" in said


def test_each_is_published_when_trained_and_a_failed_push_loses_nothing(three, tmp_path, hub, monkeypatch, capsys):
    hub.adopt_client(monkeypatch, tmp_path / "home")
    shutil.rmtree(three / "nut")
    output = tmp_path / "out"
    push = {"push_to_hub": True, "hub_model_prefix": PREFIX, "dataset_name": "MVTec AD", "max_train_steps": 1}
    hub.faults.add("models/org/diffusionad-mvtec-ad-bolt/commit", status=403, times=9)
    assert run_all(three, output, **push) == 2
    error = capsys.readouterr().err
    assert "bolt: org/diffusionad-mvtec-ad-bolt: your token may not do that" in error
    assert f"diffusionad publish {output}/bolt --repo-id org/diffusionad-mvtec-ad-bolt" in error
    assert DiffusionADPipeline.from_pretrained(output / "bolt").config.calibration_scores
    assert "unet/config.json" in hub.files("org/diffusionad-mvtec-ad-washer")
    assert "cc-by-nc-sa-4.0" in hub.files("org/diffusionad-mvtec-ad-washer")["README.md"].decode()

    # The same command again trains nothing and makes up for it.
    hub.faults.clear()
    trained = {file: file.stat().st_mtime_ns for file in output.rglob("*")}
    assert run_all(three, output, **push) == 0
    assert {file: file.stat().st_mtime_ns for file in output.rglob("*")} == trained
    assert "unet/config.json" in hub.files("org/diffusionad-mvtec-ad-bolt")


def test_what_keeps_it_from_publishing_is_said_before_the_training(three, tmp_path, hub, monkeypatch, capsys):
    hub.adopt_client(monkeypatch, tmp_path / "home", token=None)
    push = {"push_to_hub": True, "hub_model_prefix": PREFIX}
    assert run_all(three, tmp_path / "out", **push) == 2
    assert "--push-to-hub" in (said := capsys.readouterr().err) and "HF_TOKEN" in said
    hub.adopt_client(monkeypatch, tmp_path / "home")
    assert run_all(three, tmp_path / "out", push_to_hub=True, hub_model_prefix="org/no good") == 2
    assert "org/no good" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_names_of_categories_that_are_no_names_of_folders(tmp_path, data, capsys):
    for name in ("a b", "a-b"):
        make_mvtec(tmp_path / "set", name, train=4, good=1, defects={})
    assert run_all(tmp_path / "set", tmp_path / "out", texture_dir=None) == 2
    assert "a b, a-b are not distinct" in capsys.readouterr().err


def test_all_resumes_each_from_its_own_checkpoint(data, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run_all(data, tmp_path, resume_from_checkpoint="checkpoint-2")
    assert "--resume-from-checkpoint checkpoint-2" in capsys.readouterr().err.splitlines()[-1]
