"""Metrics against scikit-learn, against their definitions written out slowly, and on the cases that break metrics."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from diffusionad_hf.evaluation.metrics import aupro, image_metrics, pixel_metrics


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


@pytest.mark.parametrize("levels", [None, 12, 2], ids=["no ties", "ties", "three values"])
@pytest.mark.parametrize("size", [(11, 13), (24, 30)])
def test_metrics_equal_scikit_learn_and_the_definition_of_aupro(size, levels):
    maps, masks = make_maps(size[0], size=size, levels=levels)
    y, p = masks.ravel(), maps.ravel()
    expected = {
        "pixel_auroc": roc_auc_score(y, p),
        "pixel_ap": average_precision_score(y, p),
        "pixel_f1_max": sklearn_f1_max(y, p),
        "aupro_30": slow_aupro(maps, masks, 0.3),
        "aupro_05": slow_aupro(maps, masks, 0.05),
    }
    assert pixel_metrics(maps, masks) == pytest.approx(expected, abs=1e-9)
    assert aupro(maps, masks) == pixel_metrics(maps, masks)["aupro_30"]
    scores, labels = maps[:, :3, :3].mean(axis=(1, 2)), masks.any(axis=(1, 2))
    expected = {
        "image_auroc": roc_auc_score(labels, scores),
        "image_ap": average_precision_score(labels, scores),
        "image_f1_max": sklearn_f1_max(labels, scores),
    }
    assert image_metrics(scores, labels) == pytest.approx(expected, abs=1e-12)


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
    # Stretching the rates that were reached to [0, 1], as the reference's loop does, would give 0.5.
    assert by_hand > 0.56


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
    # One region of 10 pixels: 9/10 found at no false alarm, then a straight line to (1, 1). Two would start at 1/2.
    assert aupro([found_big], [mask]) == pytest.approx(0.9 + 0.1 * 0.15)
    mask[3, 3], mask[5, 5] = False, True
    assert aupro([found_big], [mask]) == pytest.approx(0.5 + 0.5 * 0.15)


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


def test_undefined_metrics_are_absent():
    maps, masks = make_maps(7)
    assert image_metrics([0.1, 0.2], [1, 1]) == {}
    assert pixel_metrics(maps, np.zeros_like(masks)) == {}
    assert pixel_metrics(maps, np.ones_like(masks)) == {}
    assert aupro(maps, np.zeros_like(masks)) is None


def test_bad_arguments():
    maps, masks = make_maps()
    for metric in (aupro, pixel_metrics):
        with pytest.raises(ValueError):
            metric(maps, masks[:-1])
