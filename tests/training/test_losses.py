"""One training step of the paper's own code, down to the gradients, and the losses on their own."""

import json

import numpy as np
import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DOutput

from diffusionad_hf import NormGuidedScheduler
from diffusionad_hf.convert import convert_segmenter_weights, convert_unet_weights, pipeline_from_checkpoint
from diffusionad_hf.training.losses import (
    DiffusionADObjective,
    binary_focal_loss,
    noise_loss,
    noise_weights,
)
from tests.conftest import make_pipeline
from tests.reference import FIXTURES, write_reference_checkpoint


@pytest.fixture(scope="module")
def golden_step(tmp_path_factory):
    pipe = pipeline_from_checkpoint(
        write_reference_checkpoint(tmp_path_factory.mktemp("golden") / "params.pt", "px64")
    )
    rng = np.random.default_rng(11)
    x = rng.random((4, 3, 64, 64), dtype=np.float32)
    noise = np.stack([rng.standard_normal((4, 3, 64, 64), dtype=np.float32) for _ in range(2)])
    labels = np.array([0, 1, 0, 1])
    masks = (rng.random((4, 1, 64, 64)) < 0.1) * labels[:, None, None, None]
    objective = DiffusionADObjective(pipe.unet.train(), pipe.segmenter.train(), pipe.scheduler)
    result = objective(
        torch.from_numpy(x),
        torch.from_numpy(masks.astype(np.float32)),
        torch.from_numpy(labels),
        torch.from_numpy(noise),
        torch.tensor([0, 120, 299, 40]),
        torch.tensor([300, 999, 512, 700]),
    )
    result["loss"].backward()
    return objective, result, json.loads((FIXTURES / "official_training_step.json").read_text())


def test_losses_agree_with_the_reference(golden_step):
    _, result, golden = golden_step
    for ours, theirs in {"noise": "noise_loss", "focal": "focal", "smooth_l1": "smooth_l1", "loss": "total"}.items():
        assert float(result[ours].detach()) == pytest.approx(golden[theirs], rel=1e-5), ours


def test_reconstruction_and_probabilities_agree_with_the_reference(golden_step):
    _, result, _ = golden_step
    golden = np.load(FIXTURES / "official_training_step_guided.npz")
    # One sample is at timestep 999, where a rounding error of the predicted noise is divided by sqrt(a) = 0.006.
    np.testing.assert_allclose(result["reconstruction"].detach().numpy(), golden["guided"], atol=5e-4)
    np.testing.assert_allclose(result["logits"].detach().sigmoid().numpy(), golden["prob"], atol=1e-4)


def test_gradients_agree_with_the_reference(golden_step):
    objective, _, golden = golden_step

    def norm(parameters):
        return float(torch.stack([p.grad.norm() for p in parameters]).norm())

    assert norm(objective.unet.parameters()) == pytest.approx(golden["unet_grad_norm"], rel=1e-3)
    assert norm(objective.segmenter.parameters()) == pytest.approx(golden["seg_grad_norm"], rel=1e-3)

    def check(network, reference_shapes, convert, expected):
        parameters = dict(network.named_parameters())
        # The conversion of one name tells which of our tensors it became (three of them for attention's qkv).
        ours = [
            norm([parameters[n] for n in convert({name: torch.zeros(reference_shapes[name])})]) for name in expected
        ]
        # Max pools and ReLUs that rounding tips over change single tensors, those with small gradients most: the same
        # step in float64 differs from the golden float32 norms by up to 2e-3 (UNet) and 5e-3 (segmenter), and float32
        # with other instructions by up to 7e-3. All tensors together stay within a tenth of that.
        np.testing.assert_allclose(ours, list(expected.values()), rtol=2e-2, err_msg=str(list(expected)))
        difference = np.linalg.norm(np.subtract(ours, list(expected.values())))
        assert difference < 2e-3 * np.linalg.norm(list(expected.values()))

    shapes = json.loads((FIXTURES / "official_state_dict_shapes.json").read_text())["px64"]
    unet = objective.unet
    check(unet, shapes["unet"], lambda w: convert_unet_weights(w, unet), golden["unet_grad"])
    check(objective.segmenter, shapes["seg"], convert_segmenter_weights, golden["seg_grad"])


def test_a_batch_without_a_normal_sample_has_no_noise_loss():
    prediction = torch.randn(2, 2, 3, 8, 8, requires_grad=True)
    loss = noise_loss(prediction, torch.zeros(2, 2, 3, 8, 8), torch.tensor([1, 1]))
    loss.backward()
    assert loss == 0 and not prediction.grad.any()


def test_noise_loss_ignores_anomalous_samples():
    prediction = torch.zeros(2, 2, 1, 4, 4)
    noise = torch.stack([torch.full((2, 1, 4, 4), 2.0), torch.full((2, 1, 4, 4), 3.0)])
    noise[:, 1] = 100
    assert float(noise_loss(prediction, noise, torch.tensor([0, 1]))) == pytest.approx(4 + 9)


def test_focal_loss_follows_its_definition():
    logits, targets = torch.tensor([-3.0, 0.0, 2.0]), torch.tensor([0.0, 1.0, 0.0])
    p = torch.sigmoid(logits)
    p_t = torch.where(targets == 1, p, 1 - p)
    expected = (-0.5 * (1 - p_t) ** 4 * p_t.log()).mean()
    assert float(binary_focal_loss(logits, targets)) == pytest.approx(float(expected), rel=1e-5)


def test_focal_loss_stays_finite_for_extreme_logits():
    logits = torch.tensor([-200.0, 200.0], requires_grad=True)
    loss = binary_focal_loss(logits, torch.tensor([1.0, 0.0]))
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logits.grad).all()


def test_every_timestep_counts_alike_where_noise_is_predicted_and_little_where_it_is_tiny_otherwise():
    t = torch.tensor([[0, 120], [400, 999]])
    assert torch.equal(noise_weights(NormGuidedScheduler(), t), torch.ones(2, 2))
    scheduler = NormGuidedScheduler(prediction_type="sample")
    weights, ratio = noise_weights(scheduler, t), scheduler.signal_to_noise(t)
    assert (weights[1] == 1).all() and torch.allclose(weights[0] * ratio[0], torch.ones(2))
    # So a wrong image counts as that image, or less: never a hundred times.
    x, wrong, noise = torch.zeros(4, 3, 8, 8), torch.full((4, 3, 8, 8), 0.5), torch.randn(4, 3, 8, 8)
    steps = t.flatten()
    found = scheduler.predict_noise(wrong, scheduler.add_noise(x, noise, steps), steps)
    squares = (found - noise).square().mean(dim=(1, 2, 3)) * weights.flatten()
    assert squares[:2].tolist() == pytest.approx([0.25, 0.25], rel=1e-3) and (squares[2:] < 0.25).all()


def test_weights_multiply_the_errors_of_their_samples():
    noise_pred = torch.ones(2, 2, 1, 4, 4)
    weights = torch.tensor([[0.5, 3.0], [0.25, 5.0]])
    nothing = torch.zeros_like(noise_pred)
    assert float(noise_loss(noise_pred, nothing, torch.tensor([0, 1]), weights)) == pytest.approx(0.75)


def test_the_true_image_is_no_loss_for_a_network_that_predicts_images():
    class Knows(torch.nn.Module):
        is_gradient_checkpointing = False

        def forward(self, noised, timesteps):
            return UNet2DOutput(sample=torch.cat([images, images]))

    images = torch.rand(2, 3, 32, 32)
    objective = DiffusionADObjective(
        Knows(), torch.nn.Conv2d(6, 1, 1), NormGuidedScheduler(prediction_type="sample", guidance_weight=0.0)
    )
    result = objective(
        images,
        torch.zeros(2, 1, 32, 32),
        torch.tensor([0, 0]),
        torch.randn(2, 2, 3, 32, 32),
        torch.tensor([0, 250]),
        torch.tensor([300, 999]),
    )
    assert float(result["noise"]) < 1e-8
    torch.testing.assert_close(result["reconstruction"], images, atol=1e-4, rtol=1e-4)


def test_gradient_checkpointing_changes_no_answer():
    pipe = make_pipeline()
    objective = DiffusionADObjective(pipe.unet, pipe.segmenter, pipe.scheduler).eval()
    # A timestep of its own for every sample and scale.
    inputs = [
        torch.rand(2, 3, 32, 32),
        torch.zeros(2, 1, 32, 32),
        torch.zeros(2),
        torch.randn(2, 2, 3, 32, 32),
        torch.tensor([100, 250]),
        torch.tensor([400, 900]),
    ]
    plain = objective(*inputs)
    pipe.unet.enable_gradient_checkpointing()
    checkpointed = objective(*inputs)
    for name in ("reconstruction", "logits"):
        torch.testing.assert_close(checkpointed[name], plain[name], atol=1e-3, rtol=1e-3)
