"""What is said of a score, and when nothing is."""

import json

import numpy as np
import pytest
import torch

from diffusionad_hf import DiffusionADPipeline
from diffusionad_hf.calibration import calibrate
from diffusionad_hf.verdicts_diffusionad import Calibration, check_calibration
from tests.conftest import make_pipeline

SCORES = tuple(i / 100 for i in range(1, 20))


@pytest.mark.parametrize(
    "calibration, how, word, reason, sentence",
    [
        (Calibration(SCORES), {}, "anomalous", "calibrated", "Calibrated on 19 normal images"),
        (Calibration(), {}, "undecided", "not_calibrated", "not calibrated"),
        (Calibration(SCORES, 0.01), {}, "undecided", "rate_not_promised", "a false-alarm rate of 1 %; that takes 99."),
        (Calibration(SCORES), {"is_familiar": False}, "undecided", "unfamiliar", "Unlike any normal image"),
        (Calibration(SCORES, own_threshold=0.1), {"is_familiar": False}, "undecided", "unfamiliar", "Unlike"),
        (Calibration(SCORES, has_learnt=False, own_threshold=0.1), {}, "undecided", "not_learnt", "has not learnt"),
        (Calibration(SCORES), {"settings_changed": True}, "undecided", "settings_changed", "Other settings"),
        (Calibration(SCORES), {"is_whole": False}, "anomalous", "calibrated", "Calibrated on 19 normal images"),
        (Calibration(SCORES, own_threshold=0.7), {"is_whole": False}, "undecided", "partly_seen", "only a part"),
        (
            Calibration(SCORES, own_threshold=0.7),
            {},
            "normal",
            "own_threshold",
            "At your threshold 0.7; calibrated: 0.19.",
        ),
        (Calibration(own_threshold=0.1), {}, "anomalous", "own_threshold", "At your threshold 0.1; not calibrated."),
        (Calibration(SCORES, 0.01, 0.1), {}, "anomalous", "own_threshold", "19 normal images cannot promise"),
        (Calibration(SCORES, settings_changed=True), {}, "undecided", "settings_changed", "Other settings"),
        # Nothing could ever be anomalous: a model that answers all alike, and one that answers the highest to some.
        (Calibration((0.5,) * 19), {}, "undecided", "no_difference", "Nothing can stand out"),
        (Calibration((0.5,) * 19, own_threshold=0.6), {}, "undecided", "no_difference", "Nothing can stand out"),
        (Calibration((0.2,) * 18 + (1.0,)), {}, "undecided", "no_difference", "the highest of all"),
        (Calibration((0.6,), 0.5), {}, "normal", "calibrated", "Calibrated on 1 normal images"),
    ],
)
def test_a_verdict_needs_support(calibration, how, word, reason, sentence):
    verdict = calibration.verdict(0.5, **how)
    assert (verdict.word, verdict.reason) == (word, reason) and sentence in verdict.sentence
    assert verdict.is_anomalous is {"normal": False, "anomalous": True, "undecided": None}[word]


@pytest.mark.parametrize(
    "values, reason",
    [
        (([0.5], 0), "false_alarm_rate=0"),
        (([0.5], 1), "false_alarm_rate=1"),
        (([0.5], float("nan")), "false_alarm_rate=nan"),
        (([float("nan")], 0.1), "calibration_scores"),
        (([], 0.1), "calibration_scores"),
        (([0.5], 0.1, float("nan")), "threshold=nan: must be a finite number"),
        (([0.5], 0.1, float("inf")), "threshold=inf: must be a finite number"),
    ],
)
def test_numbers_that_mean_nothing_are_named(values, reason):
    with pytest.raises(ValueError, match=reason):
        check_calibration(*values)


def test_a_score_that_is_no_number_is_never_normal():
    for calibration in (Calibration(SCORES), Calibration(own_threshold=0.5)):
        assert calibration.verdict(float("nan")).word == "anomalous"
    pipe, images = make_pipeline(), torch.rand(20, 3, 32, 32)
    calibrate(pipe, images)
    known = pipe.config.calibration_scores
    with torch.no_grad():
        next(pipe.segmenter.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match="image 0: the networks' score is nan.* load the model anew, in float32"):
        pipe(images)
    with pytest.raises(ValueError, match="the networks' score is nan"):
        calibrate(pipe, images)
    assert pipe.config.calibration_scores == known


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_of_another_number_type_support_nothing_until_calibrated_with_it(dtype, tmp_path):
    pipe, images = make_pipeline(), torch.rand(20, 3, 32, 32)
    calibrate(pipe, images)
    pipe.save_pretrained(tmp_path)
    pipe.to(dtype)
    output = pipe(images[0])
    assert output.verdict[0].reason == "settings_changed" and output.p_value is None
    assert pipe.calibration.verdict(0).reason == "settings_changed"
    calibrate(pipe, images)
    assert pipe(images[0]).verdict[0].reason == "calibrated"
    pipe.save_pretrained(tmp_path / "half")
    for folder, kind, reason in (
        ("half", dtype, "calibrated"),
        ("half", torch.float32, "settings_changed"),
        (".", dtype, "settings_changed"),
        (".", torch.float32, "calibrated"),
    ):
        loaded = DiffusionADPipeline.from_pretrained(tmp_path / folder, dtype=kind)
        assert loaded(images[0]).verdict[0].reason == reason, (folder, kind)


def test_a_calibration_does_not_pass_on_to_other_networks(tmp_path):
    pipe, other, images = make_pipeline(), make_pipeline(), torch.rand(20, 3, 32, 32)
    calibrate(pipe, images)
    pipe.register_to_config(has_learnt=True)
    pipe.save_pretrained(tmp_path)
    for given in ({"segmenter": other.segmenter}, {"unet": other.unet}, {"scheduler": other.scheduler}):
        for made in (
            DiffusionADPipeline.from_pipe(pipe, **given),
            DiffusionADPipeline.from_pretrained(tmp_path, **given),
        ):
            assert made(images[0]).verdict[0].reason == "not_calibrated" and made.config.has_learnt is None
            assert made(images[0]).is_familiar.all()  # which is of images, not of networks
    for kept in (DiffusionADPipeline.from_pipe(pipe, unet=pipe.unet), DiffusionADPipeline.from_pipe(pipe, top_k=50)):
        assert kept(images[0]).verdict[0].reason == "calibrated" and kept.config.has_learnt
    own = DiffusionADPipeline.from_pretrained(tmp_path, segmenter=other.segmenter, threshold=0.4)
    assert own.threshold == 0.4 and "not calibrated" in own(images[0]).verdict[0].sentence


def test_the_pipeline_says_what_it_cannot_tell_and_never_false_for_it():
    pipe, noise = make_pipeline(), torch.rand(21, 3, 32, 32)
    images, blank = noise[:20], torch.ones(3, 32, 32)
    assert pipe(blank).is_anomalous is None and pipe(blank).verdict[0].reason == "not_calibrated"
    calibrate(pipe, images)
    output = pipe([images[0], blank])
    assert output.is_familiar.tolist() == [True, False] and output.strangeness[1] > 1
    assert [verdict.reason for verdict in output.verdict] == ["calibrated", "unfamiliar"]
    assert output.is_anomalous.tolist() == [output.verdict[0].is_anomalous, None]
    assert pipe(images).is_anomalous.dtype == bool
    for changed in ({"small_timestep": 100}, {"num_noises": 2}, {"generator": torch.Generator()}):
        output = pipe(images[0], **changed)
        assert output.verdict[0].reason == "settings_changed" and output.p_value is None
    assert pipe(images[0], small_timestep=pipe.scheduler.config.small_timestep).verdict[0].reason == "calibrated"


def test_all_of_it_travels_with_the_model_and_checkpoints_without_it_say_unknown(tmp_path):
    pipe, images = make_pipeline(), torch.rand(20, 3, 32, 32)
    calibrate(pipe, images)
    pipe.register_to_config(has_learnt=False, training_digests="0" * 32)
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionADPipeline.from_pretrained(tmp_path)
    assert loaded(images[0]).verdict == pipe(images[0]).verdict and loaded.config.training_digests == "0" * 32
    assert loaded(images[0]).verdict[0].reason == "not_learnt"
    assert len(repr(loaded)) < 2000
    # Calibrated with the size it was trained at, and then loaded at another.
    other = DiffusionADPipeline.from_pretrained(tmp_path, image_size=64, has_learnt=None)
    assert other(images[0]).verdict[0].reason == "settings_changed"
    file = tmp_path / "model_index.json"
    index = json.loads(file.read_text())
    for name in ("familiarity", "calibrated_settings", "training_digests", "has_learnt"):
        del index[name]
    file.write_text(json.dumps(index))
    output = DiffusionADPipeline.from_pretrained(tmp_path)(images[0])
    assert output.is_familiar is None and output.strangeness is None and output.verdict[0].reason == "calibrated"
    for changed in ({"image_size": 64}, {"value_range": 4095}, {"seed": 1}):
        other = DiffusionADPipeline.from_pretrained(tmp_path, **changed)
        assert other(images[0]).verdict[0].reason == "not_calibrated"  # with these, for all that is known


@pytest.mark.parametrize(
    "field, value",
    [("familiarity", {"limit": 0}), ("training_digests", "abc"), ("has_learnt", "yes"), ("calibrated_settings", 5)],
)
def test_damaged_fields_are_named(field, value, model_dir):
    with pytest.raises(OSError, match=f"{field}|normal images is damaged"):
        DiffusionADPipeline.from_pretrained(model_dir, **{field: value})


def test_too_few_photos_lower_the_promise_in_one_line_and_none_are_refused(caplog):
    pipe = make_pipeline()
    calibrate(pipe, torch.rand(1, 3, 32, 32))
    assert pipe.config.false_alarm_rate == 0.5 and np.isfinite(pipe.threshold)
    (line,) = caplog.messages
    assert "1 normal image(s) cannot promise a false-alarm rate of 5 %: the threshold is set for 50 %" in line
    with pytest.raises(ValueError, match="no normal image to calibrate on"):
        calibrate(pipe, [])


def test_a_copy_promises_nothing_more():
    pipe, images = make_pipeline(), torch.rand(9, 3, 32, 32)
    with pytest.raises(ValueError, match="image 9: a copy of image 2, which counts once; leave it out"):
        calibrate(pipe, [*images, images[2]])
    assert pipe.config.calibration_scores is None
