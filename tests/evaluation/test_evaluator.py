"""Metrics against their definitions written out slowly, against scikit-learn, and on the cases that break metrics."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from diffusionad_hf import build_pipeline
from diffusionad_hf.data import binary_mask, load_category
from diffusionad_hf.evaluation.evaluator import (
    METRIC_NAMES,
    AnomalyEvaluator,
    aupro,
    describe_hardware,
    evaluate_pipeline,
    evaluate_predictions,
    image_metrics,
    pixel_metrics,
    save_plots,
)
from tests.dataset_factory import make_folder, make_mvtec


def make_maps(seed=0, num_images=6, size=(11, 13), levels=None, num_defective=4):
    """Noisy maps, higher on defects; `levels` rounds them to so many values, which makes ties. Masks of blobs."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((num_images, *size), dtype=bool)
    for mask in masks[:num_defective]:
        for _ in range(3):
            top, left = rng.integers(0, size[0] - 2), rng.integers(0, size[1] - 2)
            mask[top : top + rng.integers(1, 5), left : left + rng.integers(1, 5)] = True
    maps = np.clip(rng.normal(0.3, 0.2, masks.shape) + 0.25 * masks, 0, 1).astype(np.float32)
    if levels is not None:
        maps = np.round(maps * levels).astype(np.float32) / levels
    return maps, masks


def find_regions(mask):
    """8-connected regions by flood fill, as lists of (row, column)."""
    todo, regions = set(zip(*np.nonzero(mask), strict=True)), []
    while todo:
        stack, region = [todo.pop()], []
        while stack:
            y, x = stack.pop()
            region.append((y, x))
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & todo
            todo -= near
            stack += near
        regions.append(region)
    return regions


def slow_aupro(maps, masks, max_fpr):
    """The definition: at every distinct score the mean found share of the regions, against the false-positive rate."""
    regions = [(i, tuple(np.array(r).T)) for i, mask in enumerate(masks) for r in find_regions(mask)]
    values = np.unique(np.concatenate([m.ravel() for m in maps]))[::-1]
    num_background = sum(np.sum(~mask) for mask in masks)
    rates, overlaps = [0.0], [0.0]
    for value in values:
        found = [m >= value for m in maps]
        rates.append(sum(np.sum(f & ~mask) for f, mask in zip(found, masks, strict=True)) / num_background)
        overlaps.append(np.mean([found[i][where].mean() for i, where in regions]))
    area = 0.0
    for x0, x1, y0, y1 in zip(rates, rates[1:], overlaps, overlaps[1:], strict=False):
        end = min(x1, max_fpr)
        if end > x0:
            area += (end - x0) * (y0 + (y0 + (y1 - y0) * (end - x0) / (x1 - x0))) / 2
    return area / max_fpr


def sklearn_f1_max(labels, scores):
    precision, recall, _ = precision_recall_curve(labels, scores)
    return np.max(2 * precision * recall / np.maximum(precision + recall, 1e-12))


# -- Pure metrics ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [None, 12, 2], ids=["no ties", "ties", "three values"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_metrics_equal_their_definitions(seed, levels):
    maps, masks = make_maps(seed, levels=levels)
    result = pixel_metrics(maps, masks)
    positives, negatives = maps[masks].astype(float), maps[~masks].astype(float)
    wins = (positives[:, None] > negatives) + 0.5 * (positives[:, None] == negatives)
    assert result["pixel_auroc"] == pytest.approx(wins.mean(), abs=1e-12)

    best_f1, average_precision, former_recall = 0.0, 0.0, 0.0
    for value in np.unique(maps)[::-1]:
        found = maps >= value
        precision, recall = masks[found].mean(), found[masks].mean()
        average_precision += (recall - former_recall) * precision
        former_recall = recall
        best_f1 = max(best_f1, 2 * np.sum(found & masks) / (np.sum(found) + np.sum(masks)))
    assert result["pixel_ap"] == pytest.approx(average_precision, abs=1e-12)
    assert result["pixel_f1_max"] == pytest.approx(best_f1, abs=1e-12)

    assert result["aupro_30"] == pytest.approx(slow_aupro(maps, masks, 0.3), abs=1e-12)
    assert result["aupro_05"] == pytest.approx(slow_aupro(maps, masks, 0.05), abs=1e-12)
    assert aupro(maps, masks, 1.0) == pytest.approx(slow_aupro(maps, masks, 1.0), abs=1e-12)


@pytest.mark.parametrize("levels", [None, 20])
def test_metrics_equal_scikit_learn(levels):
    maps, masks = make_maps(5, num_images=10, size=(64, 64), levels=levels)
    y, p = masks.ravel(), maps.ravel()
    weights = np.ones(maps.shape)
    for i, mask in enumerate(masks):
        for region in find_regions(mask):
            weights[i][tuple(np.array(region).T)] = 1 / len(region)
    partial = {}
    for limit in (0.3, 0.05):  # undo the standardisation that scikit-learn applies to partial areas
        low, standard = limit**2 / 2, roc_auc_score(y, p, sample_weight=weights.ravel(), max_fpr=limit)
        partial[limit] = ((2 * standard - 1) * (limit - low) + low) / limit
    assert pixel_metrics(maps, masks) == pytest.approx(
        {
            "pixel_auroc": roc_auc_score(y, p),
            "pixel_ap": average_precision_score(y, p),
            "pixel_f1_max": sklearn_f1_max(y, p),
            "aupro_30": partial[0.3],
            "aupro_05": partial[0.05],
        },
        abs=1e-9,
    )
    scores, labels = maps.max(axis=(1, 2)), masks.any(axis=(1, 2))
    assert image_metrics(scores, labels) == pytest.approx(
        {
            "image_auroc": roc_auc_score(labels, scores),
            "image_ap": average_precision_score(labels, scores),
            "image_f1_max": sklearn_f1_max(labels, scores),
        },
        abs=1e-12,
    )


def test_aupro_is_exact_where_the_background_is_saturated():
    # A confident model: 98 % of the background is exactly 0, so no threshold reaches a rate between 2 % and 100 %.
    maps, masks = np.zeros((1, 40, 50), dtype=np.float32), np.zeros((1, 40, 50), dtype=bool)
    masks[0, :2, :10] = True  # one region, 20 of 2000 pixels
    maps[0, 0, :10] = 0.9  # half of it found
    background = np.argwhere(~masks[0])
    for y, x in background[-len(background) * 2 // 100 :]:
        maps[0, y, x] = 0.5
    # By hand: half is found at rate 0; from 2 % on, the last threshold adds the rest on a straight line up to (1, 1).
    reached = np.sum(maps[0] == 0.5) / len(background)
    at_limit = 0.5 + 0.5 * (0.3 - reached) / (1 - reached)
    by_hand = (reached * 0.5 + (0.3 - reached) * (0.5 + at_limit) / 2) / 0.3
    assert aupro(maps, masks) == pytest.approx(by_hand, abs=1e-9)
    assert aupro(maps, masks) == pytest.approx(slow_aupro(maps, masks, 0.3), abs=1e-12)
    # Stretching the rates that were reached to [0, 1] instead, as the reference's loop does, would read 0.5.
    assert aupro(maps, masks) > 0.56


def test_constant_maps_are_worth_chance():
    _, masks = make_maps(1)
    result = pixel_metrics(np.full(masks.shape, 0.7, dtype=np.float32), masks)
    assert result["pixel_auroc"] == pytest.approx(0.5)
    assert result["pixel_ap"] == pytest.approx(masks.mean())
    assert result["aupro_30"] == pytest.approx(0.15)
    assert result["aupro_05"] == pytest.approx(0.025)


def test_perfect_and_inverted_maps():
    _, masks = make_maps(2)
    assert set(pixel_metrics(masks.astype(np.float32), masks).values()) == {1.0}
    inverted = pixel_metrics(1 - masks.astype(np.float32), masks)
    assert inverted["pixel_auroc"] == inverted["aupro_30"] == 0.0


def test_regions_touching_at_a_corner_are_one():
    mask = np.zeros((6, 6), dtype=bool)
    mask[0:3, 0:3] = mask[3, 3] = True  # 9 pixels, and 1 that touches them diagonally
    found_big = np.zeros((6, 6), dtype=np.float32)
    found_big[0:3, 0:3] = 1
    # One region of 10 pixels: 9/10 found at no false alarm. Two regions would give 1/2.
    reached = aupro([found_big], [mask], max_fpr=1e-6)
    assert reached == pytest.approx(0.9, abs=1e-6)
    mask[3, 3], mask[5, 5] = False, True
    assert aupro([found_big], [mask], max_fpr=1e-6) == pytest.approx(0.5, abs=1e-6)


def test_small_and_large_regions_weigh_the_same_in_aupro():
    mask = np.zeros((20, 20), dtype=bool)
    mask[:10, :10] = mask[15, 15] = True
    only_small = np.zeros((20, 20), dtype=np.float32)
    only_small[15, 15] = 1
    assert aupro([only_small], [mask], max_fpr=1e-6) == pytest.approx(0.5, abs=1e-6)


def test_images_without_defects_count_as_background():
    maps, masks = make_maps(3, num_defective=2)
    false_alarm = maps.copy()
    false_alarm[-1] = 1.0  # an image without any defect
    assert not masks[-1].any()
    assert pixel_metrics(false_alarm, masks)["aupro_30"] < pixel_metrics(maps, masks)["aupro_30"]
    as_none = [mask if mask.any() else None for mask in masks]
    assert pixel_metrics(false_alarm, as_none) == pixel_metrics(false_alarm, masks)


def test_images_may_differ_in_size():
    small, large = make_maps(4, size=(9, 9)), make_maps(5, size=(16, 24))
    maps, masks = [*small[0], *large[0]], [*small[1], *large[1]]
    flat_maps, flat_masks = (np.concatenate([a.ravel() for a in arrays]) for arrays in (maps, masks))
    result = pixel_metrics(maps, masks)
    assert result["pixel_auroc"] == pytest.approx(roc_auc_score(flat_masks, flat_maps), abs=1e-12)
    assert result["aupro_30"] == pytest.approx(slow_aupro(maps, masks, 0.3), abs=1e-12)


def test_scores_outside_the_unit_interval_are_ranked_as_they_are():
    maps, masks = make_maps(6)
    assert pixel_metrics(maps * 50 - 20, masks)["pixel_auroc"] == pytest.approx(
        roc_auc_score(masks.ravel(), (maps * 50 - 20).ravel()), abs=1e-12
    )


def test_undefined_metrics_are_absent():
    maps, masks = make_maps(7)
    assert image_metrics([0.1, 0.2], [1, 1]) == {}
    assert pixel_metrics(maps, np.zeros_like(masks)) == {}
    assert pixel_metrics(maps, np.ones_like(masks)) == {}
    assert aupro(maps, np.zeros_like(masks)) is None


# -- Many images ----------------------------------------------------------------------------------------------------


def predictions(seed=0, num_images=24, **kwargs):
    maps, masks = make_maps(seed, num_images=num_images, num_defective=num_images * 2 // 3, **kwargs)
    labels = masks.any(axis=(1, 2)).astype(int)
    rng = np.random.default_rng(seed)
    scores = np.round(rng.normal(0.3, 0.1, num_images) + 0.15 * labels, 2)
    types = [("hole", "scratch")[i % 2] if label else "good" for i, label in enumerate(labels)]
    return maps, masks, scores, labels, types


def test_result_has_every_metric_and_is_json():
    result = evaluate_predictions(*predictions(), threshold=0.4)
    assert set(METRIC_NAMES) <= set(result)
    assert set(result["intervals"]) == {*METRIC_NAMES, "false_alarm_rate", "miss_rate"}
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert (result["num_images"], result["num_normal"], result["num_anomalous"]) == (24, 8, 16)


def test_each_defect_type_is_judged_against_all_normal_images():
    maps, masks, scores, labels, types = predictions()
    result = evaluate_predictions(maps, masks, scores, labels, types, threshold=0.4, n_bootstrap=0)
    assert set(result["defect_types"]) == {"hole", "scratch"}
    keep = [i for i, name in enumerate(types) if name != "scratch"]
    expected = {
        **image_metrics(scores[keep], labels[keep]),
        **pixel_metrics(maps[keep], masks[keep]),
        "num_anomalous": types.count("hole"),
        "num_without_mask": 0,
        "miss_rate": np.mean([scores[i] <= 0.4 for i in keep if labels[i]]),
    }
    assert result["defect_types"]["hole"] == pytest.approx(expected)


def test_rates_at_the_threshold():
    maps = np.zeros((5, 4, 4), dtype=np.float32)
    scores, labels = [0.1, 0.5, 0.5001, 0.5, 0.9], [0, 0, 0, 1, 1]
    result = evaluate_predictions(maps, [None] * 5, scores, labels, threshold=0.5)
    # A score equal to the threshold is not above it: the pipeline's own rule.
    assert result["false_alarm_rate"] == pytest.approx(1 / 3)
    assert result["miss_rate"] == 0.5
    assert result["threshold"] == 0.5
    assert "false_alarm_rate" not in evaluate_predictions(maps, [None] * 5, scores, labels)


def test_no_false_alarm_among_few_images_leaves_room_for_doubt():
    maps = np.zeros((41, 2, 2), dtype=np.float32)
    result = evaluate_predictions(maps, [None] * 41, np.zeros(41), np.zeros(41, int), threshold=0.5)
    low, high = result["intervals"]["false_alarm_rate"]
    assert (result["false_alarm_rate"], low) == (0.0, 0.0)
    assert high == pytest.approx(1 - 0.025 ** (1 / 41))  # Clopper-Pearson


def test_an_infinite_threshold_flags_nothing_and_stays_out_of_the_json():
    # A model calibrated on too few images cannot promise its false-alarm rate and has the threshold infinity.
    result = evaluate_predictions(*predictions(), threshold=float("inf"))
    assert (result["false_alarm_rate"], result["miss_rate"]) == (0.0, 1.0)
    assert "threshold" not in result
    json.dumps(result, allow_nan=False)


def test_an_anomalous_image_without_mask_counts_in_image_metrics_alone():
    maps, masks, scores, labels, types = predictions()
    masks = list(masks)
    masks[0] = None
    assert labels[0] == 1
    result = evaluate_predictions(maps, masks, scores, labels, types)
    assert result["num_without_mask"] == 1
    assert result["image_auroc"] == image_metrics(scores, labels)["image_auroc"]
    assert result["pixel_ap"] == pixel_metrics(maps[1:], masks[1:])["pixel_ap"]


@pytest.mark.parametrize("label", [0, 1])
def test_a_single_class_gives_what_is_defined(label):
    maps, masks = make_maps(8, num_defective=6 * label)
    result = evaluate_predictions(maps, masks, np.linspace(0, 1, 6), [label] * 6, threshold=0.5)
    assert "image_auroc" not in result and "image_auroc" not in result["intervals"]
    assert ("pixel_auroc" in result) == bool(label)
    assert ("miss_rate" in result) == bool(label) and ("false_alarm_rate" in result) != bool(label)
    json.dumps(result, allow_nan=False)


def test_intervals_are_repeatable_and_hold_the_value():
    first, second = (evaluate_predictions(*predictions(1), threshold=0.4) for _ in range(2))
    assert first == second
    for name, (low, high) in first["intervals"].items():
        assert 0 <= low <= first[name] <= high <= 1
        assert low < high
    assert evaluate_predictions(*predictions(1), n_bootstrap=0)["intervals"] == {}


def test_intervals_agree_with_resampling_the_images_themselves():
    maps, masks, scores, labels, types = predictions(2)
    ours = evaluate_predictions(maps, masks, scores, labels, types, n_bootstrap=2000)["intervals"]
    rng = np.random.default_rng(99)
    normal, anomalous = np.flatnonzero(labels == 0), np.flatnonzero(labels == 1)
    samples = []
    for _ in range(400):
        drawn = np.concatenate([rng.choice(group, len(group)) for group in (normal, anomalous)])
        samples.append({**image_metrics(scores[drawn], labels[drawn]), **pixel_metrics(maps[drawn], masks[drawn])})
    for name in METRIC_NAMES:
        low, high = np.percentile([sample[name] for sample in samples], [2.5, 97.5])
        assert ours[name] == pytest.approx([low, high], abs=0.15 * (high - low) + 0.01), name


def test_intervals_of_aupro_resample_regions_not_pixels():
    # Every image has a large region that is found and a single pixel that is found in every other image. Which images
    # are drawn moves AUPRO by a lot and pixel AUROC by nearly nothing.
    masks = np.zeros((20, 20, 20), dtype=bool)
    masks[:, :10, :10] = masks[:, 15, 15] = True
    maps = np.random.default_rng(0).uniform(0, 0.5, masks.shape).astype(np.float32)
    maps[:, :10, :10] = 0.9
    maps[:, 15, 15] = np.where(np.arange(20) % 2, 0.9, 0.0)
    result = evaluate_predictions(maps, masks, np.arange(20), [1] * 20)
    assert result["aupro_05"] == pytest.approx(0.75, abs=1e-6)
    low, high = result["intervals"]["aupro_05"]
    # Half of a binomial share of 20 images: standard deviation sqrt(0.25 / 20) / 2.
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(0.25 / 20) / 2, rel=0.2)
    low, high = result["intervals"]["pixel_auroc"]
    assert high - low < 0.01


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"anomaly_map": np.zeros((4, 5))}, r"\(4, 5\).*\(4, 4\)"),
        ({"anomaly_map": np.full((4, 4), np.nan)}, "NaN"),
        ({"anomaly_map": np.zeros((1, 4, 4))}, "height, width"),
        ({"label": 0}, "defect pixels"),
        ({"label": 2}, "label must be"),
        ({"score": float("nan")}, "score"),
    ],
)
def test_bad_predictions_are_refused(change, message):
    good = {"anomaly_map": np.zeros((4, 4)), "mask": np.eye(4), "score": 0.5, "label": 1}
    AnomalyEvaluator().update(**good)
    with pytest.raises(ValueError, match=message):
        AnomalyEvaluator().update(**(good | change))


def test_other_bad_arguments():
    maps, masks = make_maps()
    with pytest.raises(ValueError, match="no image"):
        AnomalyEvaluator().compute()
    with pytest.raises(ValueError, match=r"max_fpr .* got 30"):
        aupro(maps, masks, 30)
    with pytest.raises(ValueError):
        evaluate_predictions(maps, masks[:-1], [0.1] * 6, [0] * 6)


# -- A pipeline on a dataset ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipe():
    """The real pipeline at toy size; untrained, which is no obstacle to checking the accounting."""
    torch.manual_seed(0)
    pipe = build_pipeline("tiny", 32)
    pipe.register_to_config(calibration_scores=[0.2, 0.4, 0.6, 0.8] * 10)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def widget(tmp_path_factory):
    return load_category(make_mvtec(tmp_path_factory.mktemp("mvtec")))


def test_evaluate_pipeline_equals_evaluating_its_outputs(pipe, widget):
    result = evaluate_pipeline(pipe, widget, batch_size=3, progress=False)
    test = widget["test"]
    output = pipe(test["image"][:], batch_size=8)
    masks = [None if mask is None else binary_mask(mask) for mask in test["mask"]]
    expected = evaluate_predictions(
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


def test_limit_spreads_over_the_dataset(pipe, widget):
    result = evaluate_pipeline(pipe, widget["test"], limit=4, progress=False)
    assert len(result.predictions) == result.metrics["num_images"] == 4
    assert {p["defect_type"] for p in result.predictions} == {"good", "hole", "scratch"}


def test_results_can_be_saved_and_drawn(pipe, widget, tmp_path):
    result = evaluate_pipeline(pipe, widget, progress=False, num_worst=2)
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


def test_without_masks_there_are_no_pixel_metrics(pipe, tmp_path):
    result = evaluate_pipeline(pipe, load_category(make_folder(tmp_path)), progress=False)
    assert "image_auroc" in result.metrics and "pixel_auroc" not in result.metrics
    assert result.metrics["num_without_mask"] == result.metrics["num_anomalous"] == 5


def test_only_normal_images_can_be_evaluated_and_drawn(pipe, widget, tmp_path):
    result = evaluate_pipeline(pipe, widget["train"], progress=False)
    assert "image_auroc" not in result.metrics and "false_alarm_rate" in result.metrics
    assert [f.name for f in save_plots(result, widget["train"], tmp_path)] == [
        "score_histogram.png",
        "worst_cases.png",
    ]


def test_bad_arguments_of_evaluate_pipeline(pipe, widget):
    with pytest.raises(ValueError, match="no test images"):
        evaluate_pipeline(pipe, widget["test"].select([]))
    with pytest.raises(ValueError, match="at least 1"):
        evaluate_pipeline(pipe, widget, limit=0)


@pytest.mark.parametrize("module", ["datasets", "matplotlib"])
def test_a_missing_extra_says_what_to_install(pipe, widget, tmp_path, monkeypatch, module):
    result = evaluate_pipeline(pipe, widget, progress=False)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r'this needs .*: pip install "diffusionad-hf\[train\]"'):
        evaluate_pipeline(pipe, widget)
        save_plots(result, widget, tmp_path)


def test_the_hardware_is_named_as_people_know_it():
    name = describe_hardware(torch.device("cpu"))
    assert name.endswith(f"{torch.get_num_threads()} threads") and not name.startswith(",")
