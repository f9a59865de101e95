"""A verdict on a photo of something else must come with a warning, one on a part with a defect must not."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps

from demo_part.generate import render_part
from diffusionad_hf.familiarity_diffusionad import FEWEST_IMAGES, MOST_IMAGES, SLACK, Familiarity, _distances, describe
from diffusionad_hf.files import bundled
from diffusionad_hf.images_diffusionad import load_image

DATA = Path(os.environ.get("DIFFUSIONAD_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


def render(seed, size=96):
    return Image.fromarray(render_part(np.random.default_rng(seed), size=size))


@pytest.fixture(scope="module")
def parts():
    return [render(seed) for seed in range(12)]


@pytest.fixture(scope="module")
def familiarity(parts):
    return Familiarity.of([describe(load_image(part)) for part in parts])


def test_other_normal_parts_are_familiar_at_any_size_and_with_a_scratch(familiarity):
    for seed in range(100, 106):
        part = render(seed)
        scratched = np.array(part)
        scratched[30:60, 40:43] = 255
        for image in (part, part.resize((300, 300)), scratched):
            assert familiarity.strangeness(load_image(image)) < 1


def test_a_defect_on_a_tenth_of_the_photo_does_not_make_it_unfamiliar(familiarity, parts):
    for seed in range(100, 106):
        part = np.array(render(seed))
        part[30:60, 30:58] = (255, 0, 200)
        assert familiarity.strangeness(load_image(Image.fromarray(part))) < 1


@pytest.mark.skipif(not DATA.is_dir(), reason="no real data")
def test_real_defects_are_mostly_familiar_and_other_products_are_not():
    category = {name: DATA / "mvtec_ad" / name for name in ("bottle", "screw")}
    grids = {
        pattern: [describe(load_image(file)) for file in sorted(category["bottle"].glob(pattern))]
        for pattern in ("train/good/*", "test/broken_*/*", "test/good/*")
    }
    familiarity = Familiarity.of(grids["train/good/*"][::4])
    shares = {
        pattern: np.mean([familiarity.strangeness(grid) > 1 for grid in some]) for pattern, some in grids.items()
    }
    assert shares["test/good/*"] == 0 and shares["test/broken_*/*"] < 0.15
    screws = sorted((category["screw"] / "test/good").glob("*"))[:10]
    assert min(familiarity.strangeness(load_image(file)) for file in screws) > 1


def test_other_things_are_not(familiarity, parts):
    part = parts[0]
    rng = np.random.default_rng(0)
    others = {
        "noise": rng.integers(0, 256, (96, 96, 3), dtype=np.uint8),
        "black": np.zeros((96, 96, 3), np.uint8),
        "white": np.full((96, 96, 3), 255, np.uint8),
        "mean colour": np.full((96, 96, 3), np.array(part).mean(axis=(0, 1)), np.uint8),
        "negative": ImageOps.invert(part),
        "underexposed": part.point(lambda v: v // 2),
        "out of focus": part.filter(ImageFilter.GaussianBlur(3)),
        "upside down": part.rotate(180),
        "on its side": part.rotate(90),
        "mirrored": ImageOps.mirror(part),
        "close-up": part.crop((0, 0, 40, 40)),
        "far away": ImageOps.expand(part, 40, (60, 60, 65)),
    }
    strangeness = {name: familiarity.strangeness(load_image(image)) for name, image in others.items()}
    assert min(strangeness.values()) > 1, strangeness


def test_the_embedded_model_knows_its_part_and_which_way_round_it_lies():
    file = bundled("space/checkpoints/demo-part/model_index.json")
    familiarity = Familiarity.from_json(json.loads(file.read_text(encoding="utf-8"))["familiarity"])
    for seed in (7001, 7002):
        part = render(seed, 256)
        assert familiarity.strangeness(load_image(part)) < 1
        others = [part.rotate(180), part.rotate(90), ImageOps.mirror(part), part.filter(ImageFilter.GaussianBlur(6))]
        assert min(familiarity.strangeness(load_image(other)) for other in others) > 1


def test_copies_of_one_photo_do_not_make_its_noise_strange(parts):
    image = load_image(parts[0]).float() / 255
    familiarity = Familiarity.of([describe(image)] * 10)
    noisy = (image + 0.01 * torch.randn(image.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    assert familiarity.strangeness(noisy) < 1


def test_five_images_are_enough_fewer_tell_nothing_and_of_many_a_hundred_are_kept(parts):
    grids = [describe(load_image(part)) for part in parts[:FEWEST_IMAGES]]
    assert Familiarity.of(grids).strangeness(load_image(parts[0])) == 0
    assert Familiarity.of(grids[1:]) is None
    data = json.loads(json.dumps(Familiarity.of(grids * 21).to_json()))
    assert len(Familiarity.from_json(data).grids) == MOST_IMAGES == 100


def test_a_photo_and_its_thumbnail_look_alike():
    photo = torch.rand(3, 1024, 1024, generator=torch.Generator().manual_seed(0))
    large, small = (describe(image).astype(int) for image in (photo, torch.nn.functional.avg_pool2d(photo, 8)))
    assert np.abs(large - small).mean() < 6


def test_the_normal_image_farthest_from_the_others_sets_the_limit(parts):
    usual, odd = describe(load_image(parts[0])), describe(load_image(parts[0]).flip(1))
    grids = [usual] * 9 + [odd]
    distance = float(_distances(odd, np.stack(grids))[:-1].min())
    assert Familiarity.of(grids).limit == pytest.approx(SLACK * distance)


def test_it_travels_as_json_and_damage_is_noticed(familiarity, parts):
    data = json.loads(json.dumps(familiarity.to_json()))
    image = load_image(parts[3])
    assert Familiarity.from_json(data).strangeness(image) == familiarity.strangeness(image)
    limits = [{"limit": limit} for limit in (0, "x", float("nan"), float("inf"))]
    grids = [{"grids": grids} for grids in ([], ["AAAA"], data["grids"] * MOST_IMAGES)]
    for broken in ({}, *({**data, **part} for part in (*limits, *grids))):
        with pytest.raises(ValueError, match="damaged"):
            Familiarity.from_json(broken)
