"""Training the segmenter that compares in the features of a frozen encoder."""

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from diffusionad_hf import DiffusionADPipeline, PerceptualSegmenter
from diffusionad_hf import modeling_perceptual_segmenter as module
from diffusionad_hf.training.dataset import NormalImages
from diffusionad_hf.training.losses import DiffusionADObjective

from .runs import run, same, weights

OPTIONS = {"preset": "perceptual", "architecture": "perceptual"}


@pytest.fixture(scope="module")
def perceptual(data, tmp_path_factory):
    output = tmp_path_factory.mktemp("perceptual") / "run"
    assert run(data, output, **OPTIONS) == 0
    return output


def test_a_training_ends_with_a_calibrated_pipeline_that_remembers_normal_images(perceptual):
    pipe = DiffusionADPipeline.from_pretrained(perceptual)
    assert type(pipe.segmenter) is PerceptualSegmenter and len(pipe.config.calibration_scores) == 3
    memory = pipe.segmenter.memory
    assert len(memory) == pipe.segmenter.config.memory_size and memory.abs().amax(1).min() > 0
    assert set(pipe.segmenter.memory_images.tolist()) <= set(range(9))
    output = pipe(np.zeros((40, 30, 3), np.uint8))
    assert np.isfinite(output.anomaly_map[0]).all() and output.anomaly_map[0].shape == (40, 30)


def test_nothing_trains_the_encoder(perceptual):
    source = load_file(module.__file__.replace("modeling_perceptual_segmenter.py", "efficientnet_lite0.safetensors"))
    trained = weights(perceptual)
    assert all(torch.equal(trained[f"segmenter.backbone.{name}"], t.float()) for name, t in source.items())


def test_a_resumed_training_remembers_the_same_and_ends_alike(perceptual, data, tmp_path):
    for kept in ("checkpoint-2", "best"):
        shutil.copytree(perceptual / kept, tmp_path / kept)
    assert run(data, tmp_path, resume_from_checkpoint="latest", **OPTIONS) == 0
    assert same(weights(perceptual), weights(tmp_path))


def test_in_training_no_image_recognises_itself(data, tmp_path, monkeypatch):
    asked, read = [], {}
    forward, pixels = PerceptualSegmenter.forward, NormalImages.pixels

    def listens(self, sample, images=None, chance=None):
        if self.training:
            asked.append((sample[:, :3].detach().clone(), images))
        return forward(self, sample, images, chance)

    def keeps(self, index):
        read[index] = pixels(self, index)
        return read[index]

    monkeypatch.setattr(PerceptualSegmenter, "forward", listens)
    monkeypatch.setattr(NormalImages, "pixels", keeps)
    assert run(data, tmp_path, max_train_steps=2, **OPTIONS) == 0
    for sample, numbers in asked:
        for image, number in zip(sample, numbers.tolist(), strict=True):
            # Half of the images are as they were; of the others most pixels are.
            assert (image == read[number]).float().mean() > 0.5


@pytest.mark.parametrize("detached", [False, True])
def test_the_masks_teach_the_unet_only_where_asked(perceptual, detached):
    pipe = DiffusionADPipeline.from_pretrained(perceptual)
    objective = DiffusionADObjective(pipe.unet, pipe.segmenter, pipe.scheduler, detached)
    images = torch.rand(2, 3, 32, 32)
    steps = torch.tensor([100, 200]), torch.tensor([400, 500])
    losses = objective(images, torch.ones(2, 1, 32, 32), torch.ones(2), torch.randn(2, 2, 3, 32, 32), *steps)
    losses["focal"].backward()
    gradients = [p.grad for p in pipe.unet.parameters() if p.grad is not None]
    assert any(g.abs().max() > 0 for g in gradients) != detached
