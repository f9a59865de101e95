"""What a person sees on the picture, in the mask and in the list of regions must be true, and must agree."""

import dataclasses
import json
import os

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from diffusionad_hf import visualization
from diffusionad_hf.visualization import (
    anomaly_map_16bit,
    find_regions,
    heat_map,
    location_words,
    mask_image,
    overlay,
    region_threshold,
    save_image,
    side_by_side,
)


def blank(height=60, width=80):
    return np.zeros((height, width), dtype=np.float32)


def photo(height=60, width=80, color=(120, 130, 140)):
    return Image.new("RGB", (width, height), color)


def bumps(height, width, seed=0, cells=7):
    """A smooth random map with several regions, some of which run out of the picture."""
    coarse = np.random.default_rng(seed).random((cells, cells), dtype=np.float32) ** 2
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)).clip(0, 1)


def luminance(rgb):
    """Relative luminance (ITU-R BT.709) of sRGB colours 0..255."""
    linear = np.where(rgb / 255 <= 0.04045, rgb / 255 / 12.92, ((rgb / 255 + 0.055) / 1.055) ** 2.4)
    return linear @ [0.2126, 0.7152, 0.0722]


# Heat colours


def heat_scale():
    """All colours of the scale, (256, 3)."""
    return np.asarray(heat_map(np.arange(256)[None] / 255))[0].astype(float)


def test_lightness_of_the_heat_scale_rises_without_a_break():
    lightness = luminance(heat_scale())
    assert (np.diff(lightness) > -1e-3).all() and lightness[0] < 0.01 and lightness[-1] > 0.9


def test_heat_scale_is_the_published_one():
    colormaps = pytest.importorskip("matplotlib").colormaps
    published = colormaps["inferno"](np.arange(256))[:, :3] * 255
    assert np.abs(heat_scale() - published).max() <= 7


@pytest.mark.parametrize("draw", [anomaly_map_16bit, lambda m: mask_image(m, 0.5), lambda m: find_regions(m, 0.5)])
@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (np.array([[0.1, np.nan]]), "from nan"),
        (np.array([[0.1, np.inf]]), "to inf"),
        (np.array([[0.0, 255.0]]), "from 0 to 255"),
        (np.zeros((1, 4, 4)), r"got shape \(1, 4, 4\)"),
        (np.zeros((0, 4)), "non-empty"),
    ],
)
def test_unusable_maps_are_named(draw, bad, words):
    with pytest.raises(ValueError, match=words):
        draw(bad)


# Overlay


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (4000, 8), (8, 4000), (300, 400)])
@pytest.mark.parametrize("value", [0.0, 0.6, 1.0])
def test_overlay_keeps_every_size(size, value):
    anomaly_map = np.full(size, value, dtype=np.float32)
    regions = find_regions(anomaly_map, 0.5)
    result = overlay(
        photo(*size), anomaly_map, threshold=0.5, regions=regions, highlight=regions[0] if regions else None
    )
    assert result.size == size[::-1] and result.mode == "RGB"


def test_normal_areas_stay_the_photo_to_the_last_bit():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8))
    anomaly_map = blank() + 0.15
    anomaly_map[20:30, 30:40] = 0.9
    result = np.asarray(overlay(image, anomaly_map, threshold=0.5)).astype(int)
    changed = (result != np.asarray(image)).any(axis=2)
    assert changed[20:30, 30:40].all()
    changed[17:33, 27:43] = False  # the region, its outline of two 1-pixel lines around it
    assert not changed.any()


def test_heat_grows_with_the_value_and_with_opacity():
    anomaly_map = np.tile(np.linspace(0, 1, 80, dtype=np.float32), (60, 1))
    image = photo(color=(128, 128, 128))

    def shift(**kwargs):
        return np.abs(np.asarray(overlay(image, anomaly_map, contour=False, **kwargs))[0].astype(float) - 128).sum(
            axis=1
        )

    half = shift()
    assert half[0] == 0 and (np.diff(half) >= -4).all() and half[-1] > 100
    assert shift(opacity=1.0)[-1] > 1.8 * half[-1]
    assert (shift(opacity=0.0) == 0).all()
    red, _, blue = np.asarray(overlay(image, anomaly_map))[0, -1].astype(int)
    assert red > 160 and blue < 100, "the strongest heat must be a strong warm colour, on a bright ground too"
    # The scale is centred on the threshold: the same value is hotter against a lower limit.
    assert shift(threshold=0.2)[20] > shift(threshold=0.5)[20]


@pytest.mark.parametrize("ground", [(0, 0, 0), (255, 255, 255), (128, 128, 128), (200, 60, 40)])
def test_outline_shows_on_any_ground_without_colour(ground):
    anomaly_map = blank(300, 300)
    anomaly_map[100:200, 100:200] = 0.9
    result = np.asarray(overlay(photo(300, 300, ground), anomaly_map, threshold=0.5, opacity=0)).astype(float)
    contrast = np.abs(luminance(result) - luminance(np.array(ground, dtype=float)))
    for line in (contrast[150, :100], contrast[150, 200:], contrast[:100, 150], contrast[200:, 150]):
        assert line.max() > 0.15
    assert (result[101:199, 101:199] == ground).all(), "the outline must not cover the region"
    assert (result[:90] == ground).all()


def test_outline_follows_the_region_round_holes_and_at_the_border():
    anomaly_map = blank(300, 300)
    anomaly_map[:100, :] = 0.9  # runs out of the picture on three sides
    anomaly_map[200:280, 100:180] = 0.9
    anomaly_map[230:250, 130:150] = 0.0
    ground = np.array((128, 128, 128))
    drawn = (
        np.asarray(overlay(photo(300, 300, (128, 128, 128)), anomaly_map, threshold=0.5, opacity=0)) != ground
    ).any(axis=2)
    assert drawn[0].all() and drawn[:100, 0].all() and drawn[:100, -1].all() and drawn[100].all()
    assert drawn[230, 130:150].all() and drawn[230:250, 149].all()
    assert not drawn[20:90, 20:280].any() and not drawn[240, 140]


@pytest.mark.parametrize("side", [100, 1000, 2000])
def test_outline_width_scales_with_the_picture(side):
    anomaly_map = blank(side, side)
    anomaly_map[side // 4 : side // 2, side // 4 : side // 2] = 0.9
    image = photo(side, side)
    drawn = np.asarray(overlay(image, anomaly_map, threshold=0.5, opacity=0)) != np.asarray(image)
    width = drawn[3 * side // 8, : side // 2].any(axis=1).sum()
    assert 2 <= width and 0.004 * side <= width <= max(2, 0.01 * side)


def test_one_hot_pixel_is_outlined():
    anomaly_map = blank()
    anomaly_map[30, 40] = 0.9
    result = np.asarray(overlay(photo(), anomaly_map, threshold=0.5, opacity=0))
    changed = (result != np.asarray(photo())).any(axis=2)
    assert changed[29:32, 39:42].sum() == 8 and not changed[30, 40]


def test_no_threshold_or_no_contour_draws_no_line():
    for options in ({"threshold": 0.3, "contour": False}, {}):
        assert overlay(photo(), bumps(60, 80), opacity=0, **options).tobytes() == photo().tobytes()


def test_highlight_frames_the_picked_region_only():
    anomaly_map = blank(300, 400)
    anomaly_map[50:80, 50:90] = 0.9
    anomaly_map[200:240, 300:330] = 0.8
    first, second = find_regions(anomaly_map, 0.5)
    plain = np.asarray(overlay(photo(300, 400), anomaly_map, threshold=0.5)).astype(int)
    framed = np.asarray(overlay(photo(300, 400), anomaly_map, threshold=0.5, highlight=second)).astype(int)
    ys, xs = np.nonzero((plain != framed).any(axis=2))
    assert 0 < 300 - xs.min() < 12 and 0 < xs.max() - 329 < 12
    assert 0 < 200 - ys.min() < 12 and 0 < ys.max() - 239 < 12
    assert (plain[200:240, 300:330] == framed[200:240, 300:330]).all()


def test_tags_stay_inside_the_picture_beside_their_regions():
    anomaly_map = blank(300, 400)
    anomaly_map[:20, :20] = 0.9
    anomaly_map[150:160, 200:220] = 0.8
    anomaly_map[-20:, -3:] = 0.7
    regions = find_regions(anomaly_map, 0.5)
    plain = np.asarray(overlay(photo(300, 400), anomaly_map, threshold=0.5)).astype(int)
    tagged = np.asarray(overlay(photo(300, 400), anomaly_map, threshold=0.5, regions=regions)).astype(int)
    changed = (plain != tagged).any(axis=2)
    assert changed[:25, :25].sum() > 50 and changed[125:155, 180:205].sum() > 50 and changed[255:285, 370:].sum() > 120
    assert (plain[150:160, 200:220] == tagged[150:160, 200:220]).all(), (
        "a tag with room beside must not hide the region"
    )


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_photos_of_any_mode(mode):
    image = photo().convert(mode)
    assert overlay(image, blank()).tobytes() == image.convert("RGB").tobytes()


def test_the_photo_is_left_alone():
    image, anomaly_map = photo(), bumps(60, 80)
    before = image.tobytes(), anomaly_map.tobytes()
    overlay(image, anomaly_map, threshold=0.3, regions=find_regions(anomaly_map, 0.3))
    assert (image.tobytes(), anomaly_map.tobytes()) == before


def test_a_map_of_another_size_is_refused():
    with pytest.raises(ValueError, match="anomaly_map is 80 x 60 pixels, but image is 60 x 80"):
        overlay(photo(80, 60), blank())


# Thresholds, masks, 16-bit maps


def test_a_rejected_map_always_shows_a_region():
    for seed in range(5):
        values = np.random.default_rng(seed).random((64, 64), dtype=np.float32) ** 4
        score = float(np.sort(values.ravel())[-50:].mean())
        assert find_regions(values, region_threshold(score))
        assert not find_regions(values * 0.5, region_threshold(score))


def test_region_threshold_is_always_a_usable_pixel_threshold():
    assert region_threshold(0.37) == 0.37
    assert region_threshold(None) == 0.5
    assert region_threshold(float("inf")) == region_threshold(1.2) == 0.99
    assert region_threshold(0.0) == region_threshold(-1.0) == 0.01
    with pytest.raises(ValueError, match="image_threshold is NaN"):
        region_threshold(float("nan"))


def test_mask_regions_and_map_agree():
    anomaly_map = bumps(300, 400)
    mask = np.asarray(mask_image(anomaly_map, 0.3))
    assert mask_image(anomaly_map, 0.3).mode == "L"
    assert (mask == np.where(anomaly_map >= 0.3, 255, 0)).all()
    assert sum(region.area_px for region in find_regions(anomaly_map, 0.3)) == (mask > 0).sum()
    assert (np.asarray(mask_image(anomaly_map, 0.0)) == 255).all()


def test_specks_are_left_out_of_list_mask_and_picture_alike():
    anomaly_map = blank(600, 600)
    anomaly_map[100, 100:104] = 0.9  # 4 pixels, below 360,000 / 65,536
    anomaly_map[400:402, 400:403] = 0.9  # 6 pixels, above
    assert [region.area_px for region in find_regions(anomaly_map, 0.5)] == [6]
    assert np.count_nonzero(mask_image(anomaly_map, 0.5)) == 6
    drawn = np.asarray(overlay(photo(600, 600), anomaly_map, threshold=0.5, opacity=0)) != np.asarray(photo(600, 600))
    assert not drawn[:200].any() and drawn[390:410].any()


def test_16_bit_map_survives_a_png_round_trip(tmp_path):
    anomaly_map = bumps(60, 80)
    anomaly_map[0, 0], anomaly_map[0, 1] = 0.0, 1.0
    path = save_image(anomaly_map_16bit(anomaly_map), tmp_path / "map.png")
    with Image.open(path) as loaded:
        assert loaded.mode == "I;16"
        values = np.asarray(loaded)
    assert values[0, 0] == 0 and values[0, 1] == 65535
    assert np.abs(values / 65535 - anomaly_map).max() <= 0.51 / 65535


# Regions


def test_a_region_is_described_exactly():
    anomaly_map = blank()
    anomaly_map[10:14, 20:30] = 0.6
    anomaly_map[11, 27] = 0.8
    (region,) = find_regions(anomaly_map, 0.5)
    assert region.box == (20, 10, 30, 14) and region.area_px == 40 and region.peak_xy == (27, 11)
    assert region.area_fraction == pytest.approx(40 / 4800)
    assert region.peak == pytest.approx(0.8) and region.mean == pytest.approx(0.605)
    assert json.loads(json.dumps(dataclasses.asdict(region)))["box"] == [20, 10, 30, 14]


def test_regions_join_diagonally_and_include_the_threshold_itself():
    anomaly_map = blank()
    anomaly_map[[5, 6, 7], [5, 6, 7]] = 0.5
    (region,) = find_regions(anomaly_map, 0.5)
    assert region.area_px == 3 and region.box == (5, 5, 8, 8) and region.peak_xy == (6, 6)
    assert find_regions(anomaly_map, 0.51) == []


def test_regions_come_strongest_first_then_largest():
    anomaly_map = blank()
    anomaly_map[0:4, 0:4] = 0.7
    anomaly_map[0:2, 40:42] = 0.9
    anomaly_map[40:50, 0:10] = 0.99998
    anomaly_map[50:52, 40:42] = 0.99999
    assert [region.area_px for region in find_regions(anomaly_map, 0.5)] == [100, 4, 4, 16]


def test_the_peak_of_a_saturated_region_is_in_its_middle_and_on_it():
    anomaly_map = blank()
    anomaly_map[10:21, 30:51] = 1.0
    anomaly_map[40:51, 10:21] = 1.0
    anomaly_map[43:48, 13:18] = 0.0
    plate, ring = find_regions(anomaly_map, 0.5)
    assert plate.peak_xy == (40, 15)
    x, y = ring.peak_xy
    assert anomaly_map[y, x] == 1.0


def test_regions_against_a_plain_loop():
    anomaly_map = bumps(120, 90, seed=3, cells=12)
    regions = find_regions(anomaly_map, 0.35)
    assert len(regions) > 3
    seen = np.zeros(anomaly_map.shape, dtype=bool)
    for region in regions:
        x0, y0, x1, y1 = region.box
        x, y = region.peak_xy
        assert x0 <= x < x1 and y0 <= y < y1 and region.peak == pytest.approx(anomaly_map[y, x])
        members, todo = set(), [(x, y)]
        while todo:
            px, py = todo.pop()
            inside = 0 <= px < 90 and 0 <= py < 120
            if (px, py) in members or not inside or anomaly_map[py, px] < 0.35:
                continue
            members.add((px, py))
            todo += [(px + dx, py + dy) for dx in (-1, 0, 1) for dy in (-1, 0, 1)]
        xs, ys = np.array(sorted(members)).T
        assert (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) == region.box
        assert len(members) == region.area_px
        assert anomaly_map[ys, xs].mean() == pytest.approx(region.mean, rel=1e-5)
        assert anomaly_map[ys, xs].max() == pytest.approx(region.peak) and not seen[ys, xs].any()
        seen[ys, xs] = True
    assert (seen == (anomaly_map >= 0.35)).all()


@pytest.mark.parametrize(("row", "rows"), [("upper", (0, 5)), ("", (28, 32)), ("lower", (55, 60))])
@pytest.mark.parametrize(("column", "columns"), [("left", (0, 5)), ("centre", (38, 42)), ("right", (75, 80))])
def test_location_words(row, rows, column, columns):
    assert words_for(rows, columns) == f"{row} {column}".strip()


def test_location_words_of_large_regions():
    assert words_for((2, 58), (3, 77)) == "most of the image"
    assert words_for((0, 60), (38, 42)) == "centre"


def words_for(rows, columns):
    anomaly_map = blank()
    anomaly_map[slice(*rows), slice(*columns)] = 0.9
    (region,) = find_regions(anomaly_map, 0.5)
    return location_words(region, (80, 60))


# Sheets


def test_pictures_side_by_side_are_whole_and_in_order():
    sizes, colors = [(10, 10), (400, 100), (8, 4000)], [(200, 0, 0), (0, 160, 0), (0, 0, 220)]
    row = np.asarray(side_by_side([Image.new("RGB", s, c) for s, c in zip(sizes, colors, strict=True)], 100, gap=5))
    edges = [np.nonzero((row[50] == color).all(axis=1))[0][[0, -1]].tolist() for color in colors]
    assert row.shape == (100, 100 + 5 + 400 + 5 + 1, 3) and edges == [[0, 99], [105, 504], [510, 510]]
    assert (row[:, 100:105] == 255).all()


# Writing


def test_save_image_makes_folders_replaces_and_leaves_no_litter(tmp_path):
    path = tmp_path / "a" / "b" / "picture.png"
    assert save_image(photo(color=(1, 2, 3)), path) == path
    save_image(photo(color=(4, 5, 6)), str(path))
    with Image.open(path) as loaded:
        assert loaded.getpixel((0, 0)) == (4, 5, 6)
    assert os.listdir(path.parent) == ["picture.png"]
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask, "others must be able to read it as any file written here"


def test_an_interrupted_save_image_leaves_the_old_file(tmp_path, monkeypatch):
    path = save_image(photo(), tmp_path / "picture.png")
    before = path.read_bytes()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save_image(photo(color=(1, 2, 3)), path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["picture.png"]


def test_save_image_names_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "taken").write_text("x")
    with pytest.raises(OSError, match="taken"):
        save_image(photo(), tmp_path / "taken" / "p.png")
    with pytest.raises(OSError, match="taken/deeper"):
        save_image(photo(), tmp_path / "taken" / "deeper" / "p.png")


def test_save_image_names_what_a_format_cannot_hold_and_leaves_the_old_file(tmp_path):
    path = tmp_path / "map.jpg"
    save_image(photo(), path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"cannot write .*map.jpg: cannot write mode I;16 as JPEG"):
        save_image(anomaly_map_16bit(blank()), path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["map.jpg"]
    for name in ("map.xyz", "map"):
        with pytest.raises(ValueError, match="is not a picture format; use .png"):
            save_image(photo(), tmp_path / name)


@pytest.mark.parametrize("threshold", [0.3, 0.7])
def test_what_is_drawn_in_strips_looks_as_if_drawn_at_once(monkeypatch, threshold):
    random = np.random.default_rng(0)
    values = ndimage.gaussian_filter(random.random((300, 90)), 6)
    values = (values - values.min()) / np.ptp(values)
    photo = Image.fromarray((random.random((300, 90, 3)) * 255).astype(np.uint8))
    at_once = overlay(photo, values, threshold=threshold)
    monkeypatch.setattr(visualization, "_STRIP", 7)
    assert np.array_equal(overlay(photo, values, threshold=threshold), at_once)


def test_the_threshold_is_the_middle_of_the_scale():
    """Whatever it is: half of the colours are for what lies below it."""
    photo = Image.new("RGB", (16, 16), "white")
    drawn = [
        np.asarray(overlay(photo, np.full((16, 16), threshold), threshold=threshold, opacity=1, contour=False))
        for threshold in (0.2, 0.5, 0.8)
    ]
    assert np.array_equal(drawn[0], drawn[1]) and np.array_equal(drawn[1], drawn[2])
    half = np.asarray(overlay(photo, np.full((16, 16), 0.4), threshold=0.8, opacity=1, contour=False))
    assert np.array_equal(half, overlay(photo, np.full((16, 16), 0.1), threshold=0.2, opacity=1, contour=False))
    assert not np.array_equal(half, drawn[0])
