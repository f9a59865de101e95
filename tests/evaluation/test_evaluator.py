"""Many predictions into one result; a pipeline on a dataset."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from diffusionad_hf.data import binary_mask, load_category
from diffusionad_hf.evaluation import evaluator
from diffusionad_hf.evaluation.evaluator import (
    AnomalyEvaluator,
    EvaluationResult,
    describe_hardware,
    evaluate_pipeline,
)
from diffusionad_hf.evaluation.intervals import bootstrap_interval
from diffusionad_hf.evaluation.metrics import METRIC_NAMES, image_metrics, pixel_metrics
from diffusionad_hf.evaluation.plots import save_plots
from tests.conftest import make_pipeline
from tests.dataset_factory import make_mvtec
from tests.evaluation.test_metrics import make_maps


def evaluate(maps, masks, scores, labels, types=None, threshold=None, **options):
    collected = AnomalyEvaluator(threshold, **options)
    for entry in zip(maps, masks, scores, labels, types or [""] * len(labels), strict=True):
        collected.update(*entry)
    return collected.compute()


def predictions(seed=0, num_images=24, **kwargs):
    maps, masks = make_maps(seed, num_images=num_images, num_defective=num_images * 2 // 3, **kwargs)
    labels = masks.any(axis=(1, 2)).astype(int)
    rng = np.random.default_rng(seed)
    scores = np.round(rng.normal(0.3, 0.1, num_images) + 0.15 * labels, 2)
    types = [("hole", "scratch")[i % 2] if label else "good" for i, label in enumerate(labels)]
    return maps, masks, scores, labels, types


def test_result_has_every_metric_and_is_json():
    result = evaluate(*predictions(), threshold=0.4)
    assert set(METRIC_NAMES) <= set(result)
    assert set(result["intervals"]) == {*METRIC_NAMES, "false_alarm_rate", "miss_rate"}
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert (result["num_images"], result["num_normal"], result["num_anomalous"]) == (24, 8, 16)


def test_each_defect_type_is_judged_against_all_normal_images():
    maps, masks, scores, labels, types = predictions()
    result = evaluate(maps, masks, scores, labels, types, threshold=0.4, n_bootstrap=0)
    assert set(result["defect_types"]) == {"hole", "scratch"}
    keep = [i for i, name in enumerate(types) if name != "scratch"]
    expected = {
        **image_metrics(scores[keep], labels[keep]),
        **pixel_metrics(maps[keep], masks[keep]),
        "num_anomalous": types.count("hole"),
        "num_without_mask": 0,
        "miss_rate": np.mean([scores[i] <= 0.4 for i in keep if labels[i]]),
    }
    hole = result["defect_types"]["hole"]
    assert set(hole.pop("intervals")) == {"image_auroc", "image_ap", "image_f1_max", "miss_rate"}
    assert hole == pytest.approx(expected)


def test_rates_at_the_threshold():
    maps = np.zeros((5, 4, 4), dtype=np.float32)
    scores, labels = [0.1, 0.5, 0.5001, 0.5, 0.9], [0, 0, 0, 1, 1]
    result = evaluate(maps, [None] * 5, scores, labels, threshold=0.5)
    # A score equal to the threshold is not above it: the pipeline's own rule.
    assert result["false_alarm_rate"] == pytest.approx(1 / 3)
    assert result["miss_rate"] == 0.5
    assert result["threshold"] == 0.5
    assert "false_alarm_rate" not in evaluate(maps, [None] * 5, scores, labels)


def test_no_false_alarm_among_few_images_leaves_room_for_doubt():
    maps = np.zeros((41, 2, 2), dtype=np.float32)
    result = evaluate(maps, [None] * 41, np.zeros(41), np.zeros(41, int), threshold=0.5)
    low, high = result["intervals"]["false_alarm_rate"]
    assert (result["false_alarm_rate"], low) == (0.0, 0.0)
    assert high == pytest.approx(1 - 0.025 ** (1 / 41))  # Clopper-Pearson


def test_an_infinite_threshold_flags_nothing_and_stays_out_of_the_json():
    # A model calibrated on too few images cannot promise its false-alarm rate and has the threshold infinity.
    result = evaluate(*predictions(), threshold=float("inf"))
    assert (result["false_alarm_rate"], result["miss_rate"]) == (0.0, 1.0)
    assert "threshold" not in result
    json.dumps(result, allow_nan=False)


def test_an_anomalous_image_without_mask_counts_in_image_metrics_alone():
    maps, masks, scores, labels, types = predictions()
    masks = list(masks)
    masks[0] = None
    assert labels[0] == 1
    result = evaluate(maps, masks, scores, labels, types)
    assert result["num_without_mask"] == 1
    assert result["image_auroc"] == image_metrics(scores, labels)["image_auroc"]
    assert result["pixel_ap"] == pixel_metrics(maps[1:], masks[1:])["pixel_ap"]


@pytest.mark.parametrize("label", [0, 1])
def test_a_single_class_gives_what_is_defined(label):
    maps, masks = make_maps(8, num_defective=6 * label)
    result = evaluate(maps, masks, np.linspace(0, 1, 6), [label] * 6, threshold=0.5)
    assert "image_auroc" not in result and "image_auroc" not in result["intervals"]
    assert ("pixel_auroc" in result) == bool(label)
    assert ("miss_rate" in result) == bool(label) and ("false_alarm_rate" in result) != bool(label)
    json.dumps(result, allow_nan=False)


def test_intervals_are_repeatable_and_hold_the_value():
    first, second = (evaluate(*predictions(1), threshold=0.4) for _ in range(2))
    assert first == second
    for name, (low, high) in first["intervals"].items():
        assert 0 <= low <= first[name] <= high <= 1
        assert low < high
    without = evaluate(*predictions(1), n_bootstrap=0)["intervals"]
    assert without == {name: first["intervals"][name] for name in ("image_auroc", "image_ap", "image_f1_max")}


def test_intervals_of_pixel_metrics_follow_the_spread_between_images():
    maps, masks, scores, labels, types = predictions(2)
    ours = evaluate(maps, masks, scores, labels, types)["intervals"]
    rng = np.random.default_rng(99)
    normal, anomalous = np.flatnonzero(labels == 0), np.flatnonzero(labels == 1)
    samples = []
    for _ in range(200):
        drawn = np.concatenate([rng.choice(group, len(group)) for group in (normal, anomalous)])
        samples.append(pixel_metrics(maps[drawn], masks[drawn]))
    exact = pixel_metrics(maps, masks)
    for name, value in exact.items():
        expected = bootstrap_interval(value, np.array([sample[name] for sample in samples]), len(anomalous))
        assert ours[name] == pytest.approx(expected, abs=0.15 * (expected[1] - expected[0])), name


def test_equal_images_still_leave_doubt_about_the_next_one():
    maps, masks = make_maps(3, num_images=2, num_defective=1)
    maps, masks = np.repeat(maps, 3, axis=0), np.repeat(masks, 3, axis=0)
    result = evaluate(maps, masks, [0.5] * 6, [1, 1, 1, 0, 0, 0], threshold=0.5)
    assert result["image_auroc"] == 0.5
    for name, (low, high) in result["intervals"].items():
        assert 0 <= low <= result[name] <= high <= 1 and high - low > 0.3, name


def test_perfect_predictions_are_not_certain():
    _, masks = make_maps(4, num_images=20, num_defective=10)
    labels = masks.any(axis=(1, 2)).astype(int)
    result = evaluate(masks.astype(np.float32), masks, labels.astype(float), labels, threshold=0.5)
    assert {result[name] for name in METRIC_NAMES} == {1.0}
    for name in METRIC_NAMES:
        low, high = result["intervals"][name]
        assert 0.5 < low < 0.97 and high == 1.0, name


def test_no_image_at_all():
    result = AnomalyEvaluator(0.5).compute()
    assert result["num_images"] == 0 and result["intervals"] == {}
    assert set(result["unknown"]) == {*METRIC_NAMES, "false_alarm_rate", "miss_rate"}
    assert result["unknown"]["image_auroc"] == "no normal and no anomalous images"


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"anomaly_map": np.zeros((4, 5))}, r"\(4, 5\)"),
        ({"anomaly_map": np.full((4, 4), np.nan)}, "NaN"),
        ({"anomaly_map": np.zeros((1, 4, 4))}, "height, width"),
        ({"label": 0}, "defect pixels"),
        ({"label": 2}, "label"),
        ({"score": float("nan")}, "score"),
    ],
)
def test_bad_predictions_are_refused(change, word):
    good = {"anomaly_map": np.zeros((4, 4)), "mask": np.eye(4), "score": 0.5, "label": 1}
    AnomalyEvaluator().update(**good)
    with pytest.raises(ValueError, match=word):
        AnomalyEvaluator().update(**(good | change))


@pytest.fixture(scope="module")
def pipe():
    """Untrained, which is no obstacle to checking the accounting."""
    pipe = make_pipeline()
    pipe.register_to_config(calibration_scores=[0.2, 0.4, 0.6, 0.8] * 10)
    return pipe


@pytest.fixture(scope="module")
def widget(tmp_path_factory):
    return load_category(make_mvtec(tmp_path_factory.mktemp("mvtec")))


def test_evaluate_pipeline_equals_evaluating_its_outputs(pipe, widget):
    result = evaluate_pipeline(pipe, widget, batch_size=3, progress=False)
    test = widget["test"]
    output = pipe(test["image"][:], batch_size=8)
    masks = [None if mask is None else binary_mask(mask) for mask in test["mask"]]
    expected = evaluate(
        output.anomaly_map, masks, output.anomaly_score, test["label"], test["defect_type"], pipe.threshold
    )
    for name, value in expected.items():
        if name not in ("intervals", "defect_types"):
            assert result.metrics[name] == pytest.approx(value, abs=1e-3), name
    assert [p["defect_type"] for p in result.predictions] == list(test["defect_type"])
    assert [p["anomaly_score"] for p in result.predictions] == pytest.approx(list(output.anomaly_score), abs=1e-5)
    assert [p["is_anomalous"] for p in result.predictions] == list(output.is_anomalous)
    assert [p["p_value"] for p in result.predictions] == pytest.approx(list(output.p_value), abs=0.03)
    assert result.predictions[-1]["file"] == "scratch/001.png"
    assert result.metrics["resolution"] == 32
    assert result.metrics["seconds_per_image"] > 0


def test_results_can_be_saved_and_drawn(pipe, widget, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluator, "_NUM_WORST", 2)
    result = evaluate_pipeline(pipe, widget, progress=False)
    saved = json.loads(result.save_json(tmp_path / "deep" / "metrics.json").read_text())
    assert saved["image_auroc"] == result.metrics["image_auroc"]
    assert len(saved["predictions"]) == 8
    # Scores of these images lie so close together that two may be equal, where the later image counts as worse.
    misses = sorted((-p["anomaly_score"], p["index"]) for p in result.predictions if p["label"] == 1)
    alarms = sorted((p["anomaly_score"], p["index"]) for p in result.predictions if p["label"] == 0)
    assert set(result.worst) == {index for _, index in misses[-2:] + alarms[-2:]}
    files = save_plots(result, widget, tmp_path / "plots")
    assert [f.name for f in files] == ["roc_curve.png", "score_histogram.png", "worst_cases.png"]
    for file in files:
        assert np.asarray(Image.open(file).convert("L")).std() > 5  # something is drawn


def test_only_normal_images_can_be_evaluated_and_drawn(pipe, widget, tmp_path):
    result = evaluate_pipeline(pipe, widget["train"], progress=False)
    assert "image_auroc" not in result.metrics and "false_alarm_rate" in result.metrics
    assert {f.stem for f in save_plots(result, widget["train"], tmp_path)} == {"score_histogram", "worst_cases"}


def test_bad_arguments_of_evaluate_pipeline(pipe, widget):
    with pytest.raises(ValueError, match="no test images"):
        evaluate_pipeline(pipe, widget["test"].select([]))
    mislabelled = widget["test"].remove_columns("label").add_column("label", [0] * 8)
    with pytest.raises(ValueError, match="hole.000.png: .*defect pixels"):
        evaluate_pipeline(pipe, mislabelled, progress=False)


def test_a_missing_extra_says_what_to_install(pipe, widget, tmp_path, monkeypatch):
    for module, call in (
        ("datasets", lambda: evaluate_pipeline(pipe, widget)),
        ("matplotlib", lambda: save_plots(EvaluationResult({}, []), widget, tmp_path)),
    ):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ImportError, match=rf"{module} .*diffusionad-hf\[train\]"):
            call()


def test_the_hardware_is_named_as_people_know_it():
    name = describe_hardware(torch.device("cpu"))
    assert name.endswith(f"{torch.get_num_threads()} threads") and not name.startswith(",")
