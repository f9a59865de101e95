"""Learning from a trained model, of the same size or another."""

import csv
import json
import shutil

import pytest
import torch

from diffusionad_hf import PRESETS, DiffusionADPipeline, build_pipeline
from diffusionad_hf.training.arguments import parse_arguments
from diffusionad_hf.training.distillation import load_teacher, take_weights_that_fit
from diffusionad_hf.training.loop import build_networks
from diffusionad_hf.training.losses import DiffusionADObjective
from diffusionad_hf.training.outcome import ARGUMENTS_FILE
from tests.dataset_factory import make_mvtec

from .runs import NARROW, arguments, run, same, weights


def rows(folder):
    return list(csv.DictReader((folder / "training_curve.csv").open()))


def test_networks_of_the_teachers_size_start_with_its_weights():
    teacher, alike, lighter = (build_pipeline(name, 64) for name in ("tiny", "tiny", "light"))
    assert take_weights_that_fit(teacher, alike) == ["unet", "segmenter"]
    assert take_weights_that_fit(teacher, lighter) == ["segmenter"]
    assert take_weights_that_fit(teacher, build_pipeline("tiny", 64, "epsilon")) == ["segmenter"]
    for pupil, network in ((alike, "unet"), (alike, "segmenter"), (lighter, "segmenter")):
        for name, tensor in getattr(teacher, network).state_dict().items():
            assert torch.equal(getattr(pupil, network).state_dict()[name], tensor), name


def test_a_network_of_another_size_comes_to_answer_as_its_teacher(monkeypatch):
    torch.manual_seed(0)
    pupil = build_pipeline("tiny", 32, "epsilon")
    monkeypatch.setitem(PRESETS, "tiny", {**NARROW["tiny"], "base_channels": 16})
    teacher = build_pipeline("tiny", 32, "epsilon")
    # Its last convolution starts at zero, so that an untrained teacher would have nothing to say.
    torch.nn.init.normal_(teacher.unet.conv_out.weight, std=0.2)
    take_weights_that_fit(teacher, pupil)
    answer, learn = (DiffusionADObjective(p.unet, p.segmenter, p.scheduler) for p in (teacher, pupil))
    # Anomalous samples only: nobody but the teacher says anything of their noise.
    inputs = {
        "images": torch.rand(2, 3, 32, 32),
        "masks": torch.zeros(2, 1, 32, 32),
        "labels": torch.ones(2),
        "noise": torch.randn(2, 2, 3, 32, 32),
        "timesteps_small": torch.tensor([100, 200]),
        "timesteps_big": torch.tensor([400, 600]),
    }
    with torch.no_grad():
        inputs["teacher"] = answer.eval()(**inputs)
    optimizer = torch.optim.Adam(learn.train().parameters(), lr=2e-2)
    far = []
    for _ in range(15):
        losses = learn(**inputs)
        losses["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        far.append(float(losses["distillation"].detach()))
    assert far[-1] < 0.5 * far[0], far


def test_a_training_tells_how_far_it_is_from_its_teacher(data, tmp_path, capsys):
    options = {"max_train_steps": 1, "architecture": "light"}
    teacher = tmp_path / "teacher"
    assert run(data, teacher, resolution=64, max_train_steps=1) == 0
    assert run(data, tmp_path / "pupil", resolution=64, distill_from=teacher, **options) == 0
    assert "started with its weights: segmenter" in capsys.readouterr().err
    (row,) = rows(tmp_path / "pupil")
    parts = [float(row[name]) for name in ("noise", "focal", "smooth_l1", "distillation")]
    assert float(row["loss"]) == pytest.approx(sum(f * v for f, v in zip((1, 5, 1, 1), parts, strict=True)), abs=1e-5)
    assert "distillation" not in rows(teacher)[0]
    # Where it lay is nobody's business who gets the model.
    assert "distill_from" not in json.loads((tmp_path / "pupil" / ARGUMENTS_FILE).read_text())


def test_a_teacher_answers_as_it_would_in_use(data, trained, tmp_path, monkeypatch):
    forward, modes = DiffusionADObjective.forward, []

    def watched(self, *args, **kwargs):
        if not torch.is_grad_enabled():  # the pupil's has gradients
            modes.append(self.training)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(DiffusionADObjective, "forward", watched)
    assert run(data, tmp_path, max_train_steps=1, distill_from=trained) == 0
    # With the batch statistics that its training kept, not with those of two images.
    assert modes == [False]


def test_a_resumed_distillation_ends_with_the_weights_of_one_never_interrupted(data, trained, tmp_path):
    options = {"distill_from": trained, "checkpoints_total_limit": 5}
    assert run(data, tmp_path, **options) == 0
    whole, curve = weights(tmp_path), rows(tmp_path)
    assert not same(whole, weights(trained)), "the teacher has its say"
    shutil.rmtree(tmp_path / "checkpoint-4")
    (tmp_path / ARGUMENTS_FILE).unlink()
    assert run(data, tmp_path, resume_from_checkpoint="latest", **options) == 0
    assert same(weights(tmp_path), whole)
    assert [row["distillation"] for row in rows(tmp_path)] == [row["distillation"] for row in curve]


def test_init_from_decides_where_both_are_given(data, trained, two_steps, tmp_path, capsys):
    command = arguments(data, tmp_path, distill_from=trained, init_from=two_steps)
    pupil, teacher = build_networks(parse_arguments(command))
    for pipe, folder in ((pupil, two_steps), (teacher, trained)):
        for name, tensor in weights(folder).items():
            network, _, key = name.partition(".")
            assert torch.equal(getattr(pipe, network).state_dict()[key], tensor), name
    assert run(data, tmp_path, max_train_steps=1, distill_from=trained, init_from=two_steps) == 0
    assert "started with its weights" not in capsys.readouterr().err


def test_going_on_without_the_teacher_is_refused(data, trained, tmp_path, capsys):
    assert run(data, tmp_path, max_train_steps=1, distill_from=trained) == 0
    (tmp_path / ARGUMENTS_FILE).unlink()
    assert run(data, tmp_path, max_train_steps=1, resume_from_checkpoint="latest") == 2
    assert f"--distill-from {trained}, this one has None" in capsys.readouterr().err.splitlines()[-1]


def test_every_category_has_the_teacher_of_its_name(data, trained, tmp_path, capsys):
    shutil.copytree(data.parent / "textures", tmp_path / "textures")
    for name in ("bolt", "nut"):
        make_mvtec(tmp_path / "two", name, train=6, good=1, defects={"hole": 1})
    shutil.copytree(trained, tmp_path / "teachers/bolt")
    options = {"category": "all", "distill_from": tmp_path / "teachers", "max_train_steps": 1}
    assert run(tmp_path / "two", tmp_path / "out", **options) == 2
    error = capsys.readouterr().err
    assert "1 of 2 categories failed" in error and "teachers/nut" in error.splitlines()[-1]
    assert "distillation" in rows(tmp_path / "out/bolt")[0]


def test_a_teacher_of_another_resolution_is_refused(data, trained, tmp_path, capsys):
    assert run(data, tmp_path, resolution=64, distill_from=trained) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"--distill-from {trained}: inspects at 32 px" in last and "give --resolution 32" in last


def test_a_teacher_of_another_noise_schedule_is_refused(trained, tmp_path):
    pipe = DiffusionADPipeline.from_pretrained(trained)
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, beta_end=0.03)
    pipe.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="trained with another noise schedule"):
        load_teacher(str(tmp_path), build_pipeline("tiny", 32))
