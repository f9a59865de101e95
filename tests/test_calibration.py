"""Thresholds from normal images alone."""

import weakref

import numpy as np
import pytest
import torch

from diffusionad_hf.calibration import calibrate, images_needed
from diffusionad_hf.pipeline_diffusionad import DiffusionADPipeline, conformal_threshold
from tests.conftest import make_pipeline


@pytest.mark.parametrize("rate, needed", [(0.05, 19), (0.1, 9), (0.01, 99), (0.3, 3), (0.5, 1), (1 / 49, 48)])
def test_images_needed_is_the_least_number_with_a_finite_threshold(rate, needed):
    assert images_needed(rate) == needed
    assert np.isfinite(conformal_threshold(range(needed), rate))
    assert conformal_threshold(range(needed - 1), rate) == float("inf")


def test_calibration_keeps_raw_scores_and_replaces_a_threshold_of_ones_own():
    pipe = make_pipeline()
    images = torch.rand(10, 3, 32, 32)
    raw = pipe(images).anomaly_score
    pipe.register_to_config(threshold=0.9)
    scores = calibrate(pipe, images, false_alarm_rate=0.2)
    np.testing.assert_allclose(scores, sorted(raw), atol=1e-6)
    assert pipe.threshold == scores[-2]
    np.testing.assert_allclose(pipe(images).anomaly_score, raw, atol=1e-6)


def test_exactly_the_promised_share_of_the_calibration_images_lies_above():
    pipe = make_pipeline()
    images = torch.rand(39, 3, 32, 32)
    calibrate(pipe, images, false_alarm_rate=0.1)
    # k = floor(0.1 * 40) = 4: the threshold is the 4th largest score, which itself is not above it.
    assert pipe(images).is_anomalous.sum() == 3


def test_exactly_as_many_images_as_are_needed_give_no_warning(caplog):
    pipe = make_pipeline()
    calibrate(pipe, torch.rand(3, 3, 32, 32), false_alarm_rate=0.25)
    assert np.isfinite(pipe.threshold) and not caplog.messages


def test_maps_of_earlier_batches_are_let_go(monkeypatch):
    pipe, outputs = make_pipeline(), []
    call = DiffusionADPipeline.__call__

    def watched(self, images, **kwargs):
        assert len(images) <= 2 and sum(output() is not None for output in outputs) <= 1
        output = call(self, images, **kwargs)
        outputs.append(weakref.ref(output))
        return output

    monkeypatch.setattr(DiffusionADPipeline, "__call__", watched)
    assert len(calibrate(pipe, torch.rand(9, 3, 32, 32), false_alarm_rate=0.1, batch_size=2)) == 9
    assert len(outputs) == 5


@pytest.mark.parametrize("rate", [0, 1, -0.1, 5, float("nan")])
def test_a_rate_out_of_range_is_named(rate):
    with pytest.raises(ValueError, match=f"false_alarm_rate={rate}"):
        calibrate(make_pipeline(), torch.rand(3, 3, 32, 32), false_alarm_rate=rate)
