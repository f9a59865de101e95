"""Foregrounds: the user's masks, and estimates against masks known exactly or drawn with care."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from demo_part.generate import generate
from diffusionad_hf.training.foreground import ForegroundEstimator, find_foregrounds, load_foreground
from diffusionad_hf.training.textures import ProceduralTextures

SCREWS = Path(__file__).parents[3] / "shared" / "data" / "mvtec_ad" / "screw" / "train" / "good"
REFERENCE = Path(__file__).parents[1] / "fixtures" / "screw_foreground.json"


def estimate_foregrounds(images, kind="auto"):
    estimator = ForegroundEstimator(images, kind)
    return estimator.kind, [estimator(image) for image in images]


def iou(a, b):
    return (a & b).sum() / (a | b).sum()


def draw_object(rng, shape=(128, 128), light=60):
    """A turned, shaded lozenge in uneven light, with a soft shadow beside it: `(image, mask)`."""
    height, width = shape
    canvas = Image.new("L", (width, height))
    angle, center = rng.uniform(0, np.pi), np.array([width, height]) * rng.uniform(0.42, 0.58, 2)
    along, across = np.array([np.cos(angle), np.sin(angle)]), np.array([-np.sin(angle), np.cos(angle)])
    corners = [center + 0.32 * min(shape) * along, center + 0.14 * min(shape) * across]
    corners += [2 * center - corners[0], 2 * center - corners[1]]
    ImageDraw.Draw(canvas).polygon([tuple(corner) for corner in corners], fill=255)
    mask = np.asarray(canvas) > 0
    y, x = np.mgrid[:height, :width]
    shadow = np.exp(-(((x - center[0] - 14) ** 2 + (y - center[1] - 14) ** 2) / 500))
    image = 200 + 25 * x / width - 20 * (y / height) ** 2 - 25 * shadow + rng.normal(0, 2, shape)
    image[mask] = light + 25 * (x[mask] / width) + rng.normal(0, 6, mask.sum())
    return np.repeat(np.clip(image, 0, 255).astype(np.uint8)[..., None], 3, axis=2), mask


@pytest.fixture(scope="module")
def screws():
    if not SCREWS.is_dir():
        pytest.skip("MVTec AD screw is not here")
    reference = json.loads(REFERENCE.read_text(encoding="utf-8"))
    masks = {}
    for name, runs in reference["runs"].items():
        values = np.arange(len(runs)) % 2 == 1
        masks[name] = np.repeat(values, runs).reshape(reference["shape"])
    images = [np.array(Image.open(SCREWS / name).convert("RGB")) for name in masks]
    return images, list(masks.values())


def test_screws_are_objects_with_the_outlines_drawn_by_hand(screws):
    images, references = screws
    kind, masks = estimate_foregrounds(images)
    overlaps = [iou(mask, reference) for mask, reference in zip(masks, references, strict=True)]
    assert kind == "object"
    assert np.mean(overlaps) >= 0.93 and min(overlaps) >= 0.85


def test_demo_parts_are_objects_whose_bores_belong_to_them(tmp_path):
    folder = generate(tmp_path, seed=3, train=6, test_good=1, test_defective=1, size=128, workers=1)
    images = [np.array(Image.open(path).convert("RGB")) for path in sorted((folder / "train" / "good").iterdir())]
    kind, masks = estimate_foregrounds(images)
    assert kind == "object"
    for mask in masks:
        assert 0.5 < mask.mean() < 0.7
        assert mask[54:74, 54:74].all(), "the bore in the middle"
        assert not mask[:3].any() and not mask[-3:].any() and not mask[:, :3].any() and not mask[:, -3:].any()


@pytest.mark.parametrize("light", [60, 135], ids=["dark", "little contrast"])
def test_objects_are_found_in_uneven_light_and_without_their_shadow(light):
    rng = np.random.default_rng(0)
    images, truths = zip(*[draw_object(rng, light=light) for _ in range(5)], strict=True)
    kind, masks = estimate_foregrounds(images)
    assert kind == "object"
    assert all(mask.dtype == bool and mask.shape == truth.shape for mask, truth in zip(masks, truths, strict=True))
    assert min(iou(mask, truth) for mask, truth in zip(masks, truths, strict=True)) > 0.9


def test_one_image_is_enough_and_sizes_may_differ():
    rng = np.random.default_rng(1)
    image, truth = draw_object(rng, (400, 300))
    kind, masks = estimate_foregrounds([image])
    assert kind == "object" and masks[0].shape == (400, 300) and iou(masks[0], truth) > 0.9
    pairs = [draw_object(rng, shape) for shape in ((96, 128), (300, 200))]
    kind, masks = estimate_foregrounds([image for image, _ in pairs])
    assert [mask.shape for mask in masks] == [(96, 128), (300, 200)]


def test_textures_are_told_from_objects():
    bank = ProceduralTextures(160, 18, seed=1).bank.permute(0, 2, 3, 1).numpy()
    rng = np.random.default_rng(0)
    for i in (0, 1, 2, 3, 5, 6, 7, 8, 9, 11):  # all families but the gradients, which are lit surfaces and no texture
        corners = rng.integers(0, 64, (5, 2))
        crops = [np.ascontiguousarray(bank[i][y : y + 96, x : x + 96]) for y, x in corners]
        kind, masks = estimate_foregrounds(crops)
        assert kind == "texture", f"texture {i}"
        assert all(mask.all() for mask in masks)
    kind, (flat,) = estimate_foregrounds([np.full((32, 48, 3), 77, np.uint8)])
    assert kind == "texture" and flat.shape == (32, 48) and flat.all()


def test_the_kind_can_be_given():
    rng = np.random.default_rng(2)
    images, truths = zip(*[draw_object(rng) for _ in range(3)], strict=True)
    kind, masks = estimate_foregrounds(images, kind="texture")
    assert kind == "texture" and all(mask.all() for mask in masks)
    kind, masks = estimate_foregrounds(images, kind="object")
    assert kind == "object" and iou(masks[0], truths[0]) > 0.9
    kind, masks = estimate_foregrounds([np.full((32, 32, 3), 9, np.uint8)], kind="object")
    assert kind == "object" and masks[0].all(), "nothing found: anomalies may lie anywhere"


def save_mask(path, value=255):
    mask = np.zeros((10, 12), np.uint8)
    mask[2:5, 3:9] = value
    Image.fromarray(mask).save(path)
    return mask > 127


def test_masks_of_the_user_are_found_by_stem(tmp_path):
    first, second = save_mask(tmp_path / "000.png"), save_mask(tmp_path / "001_mask.bmp")
    masks = [load_foreground(path) for path in find_foregrounds(tmp_path, ["good/000.jpg", "001.png"])]
    assert np.array_equal(masks[0], first) and np.array_equal(masks[1], second)
    assert masks[0].dtype == bool and torch.from_numpy(masks[0]).any()


def test_masks_that_are_missing_empty_or_broken_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        find_foregrounds(tmp_path / "nowhere", [])
    with pytest.raises(FileNotFoundError, match="007.png.*007"):
        find_foregrounds(tmp_path, ["007.png"])
    save_mask(tmp_path / "1.png", value=0)
    with pytest.raises(ValueError, match="1.png is empty"):
        load_foreground(tmp_path / "1.png")
    (tmp_path / "2.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match="2.png cannot be read"):
        load_foreground(tmp_path / "2.png")
