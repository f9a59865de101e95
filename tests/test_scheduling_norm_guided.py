"""The noise-to-norm mathematics, against the formulas of the paper."""

import math

import pytest
import torch

from diffusionad_hf import NormGuidedScheduler

SHAPE = (3, 2, 4, 5)


@pytest.fixture
def scheduler():
    return NormGuidedScheduler()


def a(t):
    product = 1.0
    for i in range(t + 1):
        product *= 1 - (1e-4 + (0.02 - 1e-4) * i / 999)
    return product


@pytest.mark.parametrize("t", [0, 200, 400, 999])
def test_noising_follows_the_formula_at_every_level(scheduler, t):
    x, noise = torch.rand(SHAPE), torch.randn(SHAPE)
    got = scheduler.add_noise(x, noise, torch.full((3,), t))
    torch.testing.assert_close(got, math.sqrt(a(t)) * x + math.sqrt(1 - a(t)) * noise, rtol=2e-5, atol=1e-6)


def test_the_smallest_noise_keeps_its_precision(scheduler):
    got = scheduler.add_noise(torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1), torch.tensor([0]))
    assert float(got) == pytest.approx(0.01, rel=1e-6)


def test_timesteps_are_per_sample(scheduler):
    x, noise = torch.rand(SHAPE), torch.randn(SHAPE)
    together = scheduler.add_noise(x, noise, torch.tensor([0, 500, 999]))
    for i, t in enumerate([0, 500, 999]):
        torch.testing.assert_close(
            together[i : i + 1], scheduler.add_noise(x[i : i + 1], noise[i : i + 1], torch.tensor([t]))
        )


def test_one_step_with_the_true_noise_gives_the_image_back(scheduler):
    x, noise, t = torch.rand(SHAPE), torch.randn(SHAPE), torch.tensor([0, 200, 700])
    torch.testing.assert_close(
        scheduler.predict_original(noise, scheduler.add_noise(x, noise, t), t), x, atol=1e-4, rtol=1e-4
    )


def what_a_network_would_predict(kind, x, noise, t):
    alphas = torch.tensor([a(int(i)) for i in t], dtype=torch.float64).view(-1, 1, 1, 1)
    velocity = alphas.sqrt().float() * noise - (1 - alphas).sqrt().float() * x
    return {"epsilon": noise, "sample": x, "v_prediction": velocity}[kind]


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_whatever_the_network_predicts_stands_for_the_noise(kind):
    scheduler = NormGuidedScheduler(prediction_type=kind)
    x, noise, t = torch.rand(SHAPE), torch.randn(SHAPE), torch.tensor([0, 200, 999])
    output = what_a_network_would_predict(kind, x, noise, t)
    found = scheduler.predict_noise(output, scheduler.add_noise(x, noise, t), t)
    torch.testing.assert_close(found, noise, atol=1e-4, rtol=1e-4)


def test_a_prediction_that_nobody_knows_is_named():
    with pytest.raises(ValueError, match='prediction_type="image": must be epsilon, sample or v_prediction'):
        NormGuidedScheduler(prediction_type="image")


def test_signal_to_noise_follows_its_definition(scheduler):
    t = torch.tensor([[0, 200], [400, 999]])
    expected = [[a(int(i)) / (1 - a(int(i))) for i in row] for row in t]
    torch.testing.assert_close(scheduler.signal_to_noise(t), torch.tensor(expected), rtol=1e-4, atol=0)


def test_predictions_are_clamped(scheduler):
    prediction = scheduler.predict_original(torch.randn(SHAPE) * 50, torch.zeros(SHAPE), torch.full((3,), 900))
    assert prediction.min() == -1 and prediction.max() == 1


def test_guidance_follows_the_formula(scheduler):
    g = torch.Generator().manual_seed(3)
    x_s, x_b, e_s, e_b = (torch.randn(SHAPE, generator=g) * 0.3 for _ in range(4))
    t_s, t_b = torch.tensor([10, 200, 299]), torch.tensor([300, 400, 900])
    step = scheduler.norm_guided_step(e_s, e_b, x_s, x_b, t_s, t_b, guidance_weight=0.7)
    for i in range(3):
        a_s, a_b = a(int(t_s[i])), a(int(t_b[i]))
        x0_b = ((x_b[i] - math.sqrt(1 - a_b) * e_b[i]) / math.sqrt(a_b)).clamp(-1, 1)
        renoised = math.sqrt(a_s) * x0_b + math.sqrt(1 - a_s) * e_s[i]
        guided = e_s[i] - 0.7 * math.sqrt(1 - a_s) * (renoised - x_s[i])
        x0_g = ((x_s[i] - math.sqrt(1 - a_s) * guided) / math.sqrt(a_s)).clamp(-1, 1)
        torch.testing.assert_close(step.pred_original_big[i], x0_b, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(step.renoised[i], renoised, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(step.reconstruction[i], x0_g, atol=1e-4, rtol=1e-4)


def test_without_weight_there_is_no_guidance(scheduler):
    tensors = [torch.randn(SHAPE) * 0.3 for _ in range(4)]
    t_s, t_b = torch.full((3,), 200), torch.full((3,), 400)
    step = scheduler.norm_guided_step(*tensors, t_s, t_b, guidance_weight=0.0)
    torch.testing.assert_close(step.reconstruction, step.pred_original_small)
    assert not torch.allclose(scheduler.norm_guided_step(*tensors, t_s, t_b).reconstruction, step.reconstruction)


def test_training_timesteps_lie_on_their_sides_of_the_boundary(scheduler):
    small, big = scheduler.sample_timesteps(20000, generator=torch.Generator().manual_seed(0))
    assert (small.min(), small.max(), big.min(), big.max()) == (0, 299, 300, 999)
    assert small.float().mean() == pytest.approx(149.5, abs=3) and big.float().mean() == pytest.approx(649.5, abs=6)


def test_configuration_survives_saving(scheduler, tmp_path):
    NormGuidedScheduler(small_timestep=50, guidance_weight=0.25).save_pretrained(tmp_path)
    loaded = NormGuidedScheduler.from_pretrained(tmp_path)
    assert (loaded.config.small_timestep, loaded.config.big_timestep, loaded.config.guidance_weight) == (50, 400, 0.25)


def test_half_precision_images_use_scales_that_are_not_rounded_first(scheduler):
    x = torch.zeros(1, 1, 1, 1, dtype=torch.bfloat16)
    got = scheduler.add_noise(x, torch.ones_like(x), torch.tensor([0]))
    assert float(got) == pytest.approx(0.01, rel=4e-3)
