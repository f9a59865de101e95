"""Synthetic anomalies: the stream, the shapes and the blend, against definitions written out slowly."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps
from scipy import ndimage

from diffusionad_hf.training import batches, colors, synthesis
from diffusionad_hf.training.synthesis import AnomalySynthesizer, perlin_noise, shuffle_tiles

SIZE = 48


def make_bank(count=5, size=SIZE):
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, 3, size, size), dtype=np.uint8))


def make_synthesizer(bank=None, **options):
    return AnomalySynthesizer(SimpleNamespace(bank=make_bank() if bank is None else bank), **options)


def spoil(images, foreground=None, **options):
    """An anomaly on every image, anywhere unless a foreground is given."""
    make = make_synthesizer(make_bank(size=images.shape[-1]), anomaly_probability=1.0, **options)
    return make(images, range(len(images)), 0, torch.ones_like(images[:, :1]) if foreground is None else foreground)


@pytest.fixture(scope="module")
def images():
    return torch.rand(40, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def foreground():
    masks = torch.zeros(40, 1, SIZE, SIZE)
    masks[:, :, 10:30, 5:40] = 1
    return masks


def batches_equal(a, b):
    return torch.equal(a.images, b.images) and torch.equal(a.masks, b.masks) and torch.equal(a.labels, b.labels)


@pytest.mark.parametrize("with_foreground", [True, False])
def test_a_sample_is_the_same_alone_in_any_batch_and_in_any_order(images, foreground, with_foreground):
    foreground = foreground if with_foreground else None
    make = make_synthesizer(seed=3)
    whole = make(images, range(100, 140), 2, foreground)
    assert 0 < whole.labels.sum() < 40
    for order in ([17], [3, 4, 5], list(range(39, -1, -1))):
        part = make(
            images[order], torch.tensor([100 + i for i in order]), 2, None if foreground is None else foreground[order]
        )
        expected = synthesis.SyntheticBatch(whole.images[order], whole.masks[order], whole.labels[order])
        assert batches_equal(part, expected)


@pytest.mark.parametrize("with_foreground", [True, False])
def test_images_taken_together_as_on_a_gpu_come_out_the_same(images, foreground, with_foreground, monkeypatch):
    foreground = foreground if with_foreground else None
    one_by_one = make_synthesizer(seed=3)(images, range(40), 2, foreground)
    monkeypatch.setattr(synthesis, "IMAGES_AT_ONCE", 40)
    assert batches_equal(one_by_one, make_synthesizer(seed=3)(images, range(40), 2, foreground))


def test_seed_epoch_and_index_each_change_the_sample_and_nothing_else_does(images):
    torch.manual_seed(0)
    first = make_synthesizer(seed=3)(images, range(40), 0)
    torch.manual_seed(1)
    np.random.seed(1)
    assert batches_equal(first, make_synthesizer(seed=3)(images, range(40), 0))
    for other in (
        make_synthesizer(seed=4)(images, range(40), 0),
        make_synthesizer(seed=3)(images, range(40), 1),
        make_synthesizer(seed=3)(images, range(40, 80), 0),
    ):
        assert not torch.equal(first.labels, other.labels)


def test_an_unused_option_does_not_shift_the_stream(images, foreground):
    masks = [
        make_synthesizer(self_augmentation_probability=p)(images, range(40), 0, foreground).masks for p in (0.0, 1.0)
    ]
    assert torch.equal(*masks)


def test_about_half_of_the_images_get_an_anomaly_and_the_others_are_untouched():
    images = torch.rand(800, 3, 64, 64)
    batch = make_synthesizer()(images, range(800), 0, torch.ones(800, 1, 64, 64))
    assert 0.45 < batch.labels.float().mean() < 0.55
    assert torch.equal(batch.labels, batch.masks.flatten(1).any(1).long())
    normal = batch.labels == 0
    assert torch.equal(batch.images[normal], images[normal])


def test_masks_are_binary_inside_the_foreground_and_pixels_outside_keep_their_bits(images, foreground):
    before = images.clone()
    batch = make_synthesizer(anomaly_probability=1.0)(images, range(40), 0, foreground)
    assert torch.equal(images, before), "the input was modified"
    assert set(batch.masks.unique().tolist()) == {0.0, 1.0}
    assert torch.all(batch.masks <= foreground)
    assert torch.equal(batch.images * (1 - batch.masks), images * (1 - batch.masks))
    assert batch.labels.sum() > 30
    assert batch.images.min() >= 0 and batch.images.max() <= 1


def test_blend_is_image_times_one_minus_opacity_plus_source_times_opacity(monkeypatch):
    """With a black source the opacity can be read off."""
    monkeypatch.setattr(colors, "OPERATIONS", (lambda x, u: x,) * 10)
    images = torch.full((300, 3, 32, 32), 0.9)
    bank = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    batch = make_synthesizer(bank, self_augmentation_probability=0.0)(images, range(300), 0)
    opacities = []
    for image, mask in zip(batch.images, batch.masks, strict=True):
        if mask.any():
            values = image[:, mask[0] > 0]
            assert values.max() - values.min() < 1e-6, "one opacity for each image"
            opacities.append(1 - values.mean().item() / 0.9)
    assert 0.2 - 1e-6 <= min(opacities) < 0.25 and 0.75 < max(opacities) <= 0.8 + 1e-6
    assert np.mean(opacities) == pytest.approx(0.5, abs=0.05)


def test_anomalies_come_from_the_image_itself_or_from_a_texture_as_asked(monkeypatch):
    monkeypatch.setattr(colors, "OPERATIONS", (lambda x, u: x,) * 10)
    images = torch.full((40, 3, 32, 32), 0.5)  # its shuffled tiles look like itself
    bank = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    own = make_synthesizer(bank, self_augmentation_probability=1.0)(images, range(40), 0)
    foreign = make_synthesizer(bank, self_augmentation_probability=0.0)(images, range(40), 0)
    assert own.labels.sum() > 10 and torch.allclose(own.images, images)
    assert torch.all(foreign.images[foreign.masks.expand_as(images) > 0] < 0.41)


def slow_perlin(angles, rows, columns, height, width):
    """Perlin noise one pixel at a time: gradients at the four nodes around it, dotted with the way from them."""
    noise = np.zeros((height, width))
    for i in range(height):
        for j in range(width):
            y, x = i * rows / height, j * columns / width
            total = 0.0
            for node_y in (math.floor(y), math.floor(y) + 1):
                for node_x in (math.floor(x), math.floor(x) + 1):
                    dy, dx = y - node_y, x - node_x
                    angle = angles[node_y, node_x]
                    s, t = 1 - abs(dy), 1 - abs(dx)
                    weight = (6 * s**5 - 15 * s**4 + 10 * s**3) * (6 * t**5 - 15 * t**4 + 10 * t**3)
                    total += weight * (dy * math.cos(angle) + dx * math.sin(angle))
            noise[i, j] = math.sqrt(2) * total
    return noise


def test_perlin_noise_matches_a_per_pixel_definition():
    rng = np.random.default_rng(0)
    angles = rng.random((3, 9, 9)) * 2 * math.pi
    cells = np.array([[1, 8], [4, 2], [3, 1]])  # 3 does not divide the height
    fields = perlin_noise(torch.from_numpy(angles).float(), cells, 32, 24)
    for field, angle, (rows, columns) in zip(fields, angles, cells, strict=True):
        expected = slow_perlin(angle, rows, columns, 32, 24)
        assert np.abs(expected).max() > 0.2
        np.testing.assert_allclose(field.numpy(), expected, atol=1e-5)


def test_a_foreground_that_is_empty_or_missed_leaves_the_image_normal(images):
    nowhere = torch.zeros(40, 1, SIZE, SIZE)
    batch = make_synthesizer(anomaly_probability=1.0)(images, range(40), 0, nowhere)
    assert batch.labels.sum() == 0 and torch.equal(batch.images, images)
    nowhere[:, :, 0, 0] = 1  # one pixel in the corner: out of reach of most rotated fields
    batch = make_synthesizer(anomaly_probability=1.0)(images, range(40), 0, nowhere)
    assert torch.equal(batch.labels, batch.masks.flatten(1).any(1).long())
    normal = batch.labels == 0
    assert normal.any() and torch.equal(batch.images[normal], images[normal])


def test_textured_categories_get_a_random_part_of_the_image(images, monkeypatch):
    monkeypatch.setattr(synthesis, "THRESHOLD", -1.0)
    batch = make_synthesizer(anomaly_probability=1.0)(images, range(40), 0)
    sizes, corners = [], set()
    for mask in batch.masks[:, 0]:
        rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        sizes.append((len(rows) * len(columns)) / SIZE**2)
        corners.add((int(rows[0]), int(columns[0])))
    assert min(sizes) < 0.3 and max(sizes) > 0.6 and len(corners) > 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtype_is_kept_and_normal_pixels_keep_their_bits(foreground, dtype):
    images = torch.rand(40, 3, SIZE, SIZE, dtype=torch.float64).to(dtype)
    batch = make_synthesizer()(images, range(40), 0, foreground)
    assert batch.images.dtype == dtype and batch.masks.dtype == torch.float32 and batch.labels.dtype == torch.int64
    outside = (1 - batch.masks).to(dtype)
    assert batch.labels.any() and torch.equal(batch.images * outside, images * outside)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_same_anomalies_appear(images, foreground):
    cpu = make_synthesizer()(images, range(40), 0, foreground)
    gpu = make_synthesizer()(images.cuda(), range(40), 0, foreground)
    assert gpu.images.is_cuda and gpu.masks.is_cuda and gpu.labels.is_cuda
    assert torch.equal(cpu.labels, gpu.labels.cpu())
    assert (cpu.masks != gpu.masks.cpu()).float().mean() < 1e-3
    assert (cpu.images - gpu.images.cpu()).abs().mean() < 1e-3


def test_textures_of_another_size_and_images_that_are_not_square():
    images = torch.rand(12, 3, 40, 56)
    batch = make_synthesizer(make_bank(size=20))(images, range(12), 0, torch.ones(12, 1, 40, 56))
    assert batch.images.shape == images.shape and batch.labels.any()


def test_tiles_are_shuffled_whole_and_none_is_lost():
    image = torch.arange(64.0).view(1, 1, 8, 8).repeat_interleave(2, 2).repeat_interleave(2, 3).expand(1, 3, 16, 16)
    rng = np.random.default_rng(0)
    shuffled = shuffle_tiles(image, rng.random((1, 16)), rng.random((1, 16)))
    tiles = shuffled[0, 0, ::2, ::2]
    assert torch.equal(tiles.repeat_interleave(2, 0).repeat_interleave(2, 1), shuffled[0, 0])
    assert sorted(tiles.flatten().tolist()) == list(range(64)) and not torch.equal(shuffled, image)
    columns = (tiles[0] % 8).tolist()
    assert all(c % 2 == 0 for c in columns[:4]) and all(c % 2 == 1 for c in columns[4:])


def test_tiles_of_a_side_that_eight_does_not_divide():
    image = torch.rand(2, 3, 23, 9)
    rng = np.random.default_rng(0)
    shuffled = shuffle_tiles(image, rng.random((2, 16)), rng.random((2, 16)))
    assert torch.equal(shuffled.flatten(2).sort(2).values, image.flatten(2).sort(2).values)


@pytest.fixture(scope="module")
def photo():
    """A smooth colourful picture as `(1, 3, 32, 32)` in [0, 1] and as Pillow's."""
    y, x = np.mgrid[:32, :32] / 31
    levels = np.round(255 * np.stack([0.2 + 0.6 * x, 0.1 + 0.5 * y, 0.7 - 0.5 * x * y], axis=-1)).astype(np.uint8)
    return torch.from_numpy(levels.transpose(2, 0, 1)[None].copy()).float() / 255, Image.fromarray(levels)


def assert_like_pillow(result, expected, tolerance=1):
    np.testing.assert_allclose(result[0].permute(1, 2, 0).numpy() * 255, np.asarray(expected), atol=tolerance)


def test_colour_operations_agree_with_pillow(photo):
    x, picture = photo
    assert_like_pillow(colors._invert(x, np.zeros((1, 3))), ImageOps.invert(picture))
    assert_like_pillow(colors._equalize(x, np.zeros((1, 3))), ImageOps.equalize(picture))
    for u in (0.0, 0.3, 0.99):
        numbers = np.full((1, 3), u)
        assert_like_pillow(colors._autocontrast(x, numbers), ImageOps.autocontrast(picture, int(21 * u)), 1.5)
        assert_like_pillow(colors._sharpness(x, numbers), ImageEnhance.Sharpness(picture).enhance(0.1 + 1.8 * u), 2)
        solarized = colors._solarize(x, np.array([[0.4, u, 0.0]]))
        assert_like_pillow(solarized, ImageOps.solarize(picture, math.floor(32 + 96 * u) + 1), 1e-3)
    assert torch.equal(colors._solarize(x, np.array([[0.6, 0.1, 0.0]])), x)


def test_hue_and_saturation_agree_with_colorsys(photo):
    import colorsys

    x, _ = photo
    u = np.array([[0.9, 0.3, 0.0]])
    result = colors._hue_saturation(x.clone(), u)
    for i, j in ((0, 0), (5, 30), (31, 31), (16, 2)):
        hue, saturation, value = colorsys.rgb_to_hsv(*x[0, :, i, j].tolist())
        saturation = min(max(saturation + (-50 + 100 * 0.3) / 255, 0), 1)
        expected = colorsys.hsv_to_rgb((hue + (-50 + 100 * 0.9) / 255) % 1, saturation, value)
        np.testing.assert_allclose(result[0, :, i, j].numpy(), expected, atol=1e-5)


def test_gamma_brightness_posterize_and_rotation(photo):
    x, _ = photo
    gamma = colors._gamma(x, np.array([[0.0, 1 / 3, 1.0]]))
    torch.testing.assert_close(gamma, torch.stack([x[:, 0] ** 0.5, x[:, 1], x[:, 2] ** 2], dim=1))
    luma = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    for order, expected in ((0.9, lambda y: (y + 15 / 255) * 1.1), (0.0, lambda y: y * 1.1 + 15 / 255)):
        bright = colors._brightness(x, np.array([[0.75, 0.75, order]]))
        torch.testing.assert_close((bright * luma).sum(1), expected((x * luma).sum(1)), atol=1e-5, rtol=0)
    assert set((colors._posterize(x, np.zeros((1, 3))) * 255).round().unique().tolist()) == {64.0, 192.0}
    torch.testing.assert_close(colors._rotate_source(x, np.full((1, 3), 0.5)), x)
    turned = batches.rotate(x, np.array([90.0]))
    assert torch.allclose(turned, x.rot90(1, (2, 3)), atol=1e-4) or torch.allclose(
        turned, x.rot90(-1, (2, 3)), atol=1e-4
    )


def saturated_images():
    """Black, white, grey, nearly white, a white background, saturated noise and single colours, `(12, 3, 19, 16)`."""
    generator = torch.Generator().manual_seed(5)
    noise = torch.rand(3, 19, 16, generator=generator)
    levels = (0.0, 1.0, 0.5, 1 - 2**-24, 1 / 255, 2**-140)
    images = [torch.full((3, 19, 16), level) for level in levels]
    part = torch.ones(3, 19, 16)
    part[:, 5:12, 4:9] = noise[:, 5:12, 4:9]
    colours = [torch.ones(3, 19, 16) * torch.tensor(c)[:, None, None] for c in ((1.0, 0.0, 0.0), (1.0, 1.0, 0.0))]
    return torch.stack([*images, part, noise, noise.round(), *colours, (noise * 3).clamp(0, 1)])


@pytest.mark.parametrize("last", range(10))
def test_operations_in_any_order_stay_in_range_even_on_saturated_and_constant_images(last):
    """Exactly: what exceeds 1 by a rounding is negative once inverted, and then its gamma is not a number."""
    images, rng = saturated_images(), np.random.default_rng(last)
    for first, second in itertools.permutations(set(range(10)) - {last}, 2):
        order = np.ones((len(images), 10))
        order[:, [first, second, last]] = 0.1, 0.2, 0.3
        parameters = rng.choice([0.0, 0.25, 0.5, 0.999, *rng.random(4)], (len(images), 9))
        result = colors.change_colors(images.clone(), order, parameters)
        assert result.shape == images.shape
        assert ((result >= 0) & (result <= 1)).all(), (first, second, last)


def test_anomalies_of_every_kind_stay_in_range_on_saturated_images_and_textures():
    images = saturated_images()
    bank = torch.full((2, 3, 57, 57), 255, dtype=torch.uint8)
    bank[1, :, ::2] = 0
    make = make_synthesizer(
        bank, anomaly_probability=1.0, line_probability=0.3, displaced_probability=0.3, erased_probability=0.3
    )
    for epoch in range(20):
        made = make(images, range(len(images)), epoch, torch.ones(len(images), 1, 19, 16)).images
        assert ((made >= 0) & (made <= 1)).all()


def test_each_source_gets_three_different_operations(monkeypatch):
    calls = torch.zeros(200, 10)

    def recorder(number):
        def operation(x, u):
            calls[x[:, 0, 0, 0].long(), number] += 1
            return x

        return operation

    monkeypatch.setattr(colors, "OPERATIONS", tuple(recorder(i) for i in range(10)))
    rng = np.random.default_rng(0)
    ids = torch.arange(200.0)[:, None, None, None].expand(200, 3, 8, 8).clone()
    colors.change_colors(ids, rng.random((200, 10)), rng.random((200, 9)))
    assert torch.all(calls.sum(1) == 3) and calls.max() == 1
    assert calls.sum(0).min() > 35  # 60 expected of each


OURS = {"line_probability": 0.4, "displaced_probability": 0.4, "erased_probability": 0.4}


def test_lines_and_displaced_pieces_keep_the_promises_of_the_stream(images, foreground):
    make = make_synthesizer(seed=3, **OURS)
    whole = make(images, range(100, 140), 2, foreground)
    part = make(images[[7, 3]], [107, 103], 2, foreground[[7, 3]])
    expected = synthesis.SyntheticBatch(whole.images[[7, 3]], whole.masks[[7, 3]], whole.labels[[7, 3]])
    assert batches_equal(part, expected)
    assert not (whole.masks * (1 - foreground)).any()
    outside = (whole.masks == 0).expand_as(images)
    assert torch.equal(whole.images[outside], images[outside])
    assert torch.equal(whole.labels == 1, whole.masks.flatten(1).any(1))


def test_normal_images_are_the_same_whatever_the_anomalies_look_like(images):
    plain = make_synthesizer(seed=3)(images, range(40), 0)
    ours = make_synthesizer(seed=3, **OURS)(images, range(40), 0)
    assert not ours.labels[plain.labels == 0].any()


def test_lines_are_thin(monkeypatch):
    images = torch.rand(40, 3, 128, 128)
    everywhere = torch.ones(40, 1, 128, 128)

    def width(**options):
        make = make_synthesizer(make_bank(size=128), anomaly_probability=1.0, **options)
        masks = make(images, range(40), 0, everywhere).masks[:, 0].numpy().astype(bool)
        # Area over perimeter: half the width of a long line, and far more for a blob of the same size.
        inner = (
            masks[:, 1:-1, 1:-1] & masks[:, :-2, 1:-1] & masks[:, 2:, 1:-1] & masks[:, 1:-1, :-2] & masks[:, 1:-1, 2:]
        )
        kept = masks.any((1, 2))
        return float(np.median(inner.sum((1, 2))[kept] / masks.sum((1, 2))[kept])), masks.mean()

    lines, area = width(line_probability=1.0)
    monkeypatch.setattr(synthesis, "PERLIN_SCALES", (0, 3))
    blobs, _ = width()
    assert lines < 0.35 < blobs
    assert 0.005 < area < 0.1


def test_lines_lie_in_a_part_of_the_image():
    make = make_synthesizer(make_bank(size=64), anomaly_probability=1.0, line_probability=1.0)
    masks = make(torch.rand(40, 3, 64, 64), range(40), 0, torch.ones(40, 1, 64, 64)).masks[:, 0]
    boxes = [mask.nonzero() for mask in masks if mask.any()]
    shares = [float((box.amax(0) - box.amin(0) + 1).prod()) / 64**2 for box in boxes]
    assert len(shares) > 30 and np.median(shares) < 0.6


def test_lines_are_of_many_widths():
    ramp = torch.linspace(-1, 1, 128)[:, None].expand(128, 128)[None, None, None].repeat(2, 1, 1, 1, 1)
    thin, wide = synthesis._lines(ramp, np.full((2, 2), 4), np.array([0.0, 1.0]), ramp.shape[-1]).sum((1, 2, 3, 4))
    assert 0 < 2 * thin <= wide


def test_corners_that_rotation_leaves_empty_are_no_lines():
    masks = spoil(torch.rand(60, 3, 64, 64), line_probability=1.0).masks
    nothing_else = -F.max_pool2d(-masks, 5, 1)  # 1 where all of 5 x 5 px are anomalous
    assert masks.any() and nothing_else.mean() < 1e-3


def colours_that_tell_the_place(count, size):
    """Images whose every pixel has a colour of its own, black in blue."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    return torch.stack([y / 100, x / 100, torch.zeros(size, size)])[None].repeat(count, 1, 1, 1)


def moves(image, mask):
    """By how much each pixel of an anomaly was moved, down and right, as the colours of its image tell."""
    rows, columns = mask[0].nonzero(as_tuple=True)
    from_row, from_column = (image[:2, rows, columns] * 100).round().long()
    return (rows - from_row) % len(mask[0]), (columns - from_column) % len(mask[0])


def test_displaced_pieces_are_pixels_of_the_image_from_elsewhere():
    size = 64
    made = spoil(colours_that_tell_the_place(20, size), displaced_probability=1.0)
    assert made.labels.sum() > 10
    for i in made.labels.nonzero()[:, 0]:
        down, right = moves(made.images[i], made.masks[i])
        assert down.unique().numel() == right.unique().numel() == 1  # one move for the whole piece
        distance = math.hypot(*(min(int(d[0]), size - int(d[0])) / size for d in (down, right)))
        assert 0.08 < distance < 0.42


def test_pieces_are_displaced_in_every_direction_however_rare_they_are():
    size, options = 64, {"displaced_probability": 0.2, "self_augmentation_probability": 0.0}
    made = spoil(colours_that_tell_the_place(120, size), **options)
    directions = set()
    for i in made.labels.nonzero()[:, 0]:
        if not made.images[i, 2].any():  # no texture, which all the others are made of
            down, right = moves(made.images[i], made.masks[i])
            directions.add((bool(down[0] < size / 2), bool(right[0] < size / 2)))
    assert len(directions) == 4


def test_displaced_pieces_are_large_enough_for_a_feature_however_fine_the_other_anomalies(monkeypatch):
    monkeypatch.setattr(synthesis, "PERLIN_SCALES", (5, 6))
    made = spoil(torch.rand(20, 3, 64, 64), displaced_probability=1.0)
    assert made.masks.any() and np.median([ndimage.label(mask)[1] for mask in made.masks[:, 0].numpy()]) < 12


def test_displaced_pieces_mark_only_what_shows():
    flat = torch.full((10, 3, 64, 64), 0.5)
    made = spoil(flat, displaced_probability=1.0)
    assert torch.equal(made.images, flat) and not made.masks.any() and not made.labels.any()


@pytest.mark.parametrize("size", [64, 256])
def test_features_that_stand_alone_vanish_without_a_seam(size):
    # Plates in slanting light, each with two holes, a dark one and a faint one: the only structure there is to erase.
    y, x = torch.meshgrid(torch.arange(size) / size, torch.arange(size) / size, indexing="ij")
    plate = (0.5 + 0.2 * x + 0.1 * y).expand(3, size, size)
    holes = [disc(size, 0.3, 0.65), disc(size, 0.7, 0.3)]
    drilled = torch.where(holes[0], 0.1, torch.where(holes[1], plate - 0.25, plate))
    images = drilled.expand(2000 // size, 3, size, size)
    made = spoil(images, erased_probability=1.0)
    assert made.labels.all()
    changed = (made.images != images).any(1, keepdim=True)
    assert torch.equal(changed, (made.masks > 0) & changed)
    # Whole or not at all: half of a hole would still show where it was.
    left = torch.stack([((made.images - plate).abs() > 0.06)[..., hole].float().mean((1, 2)) for hole in holes], 1)
    gone = left < 0.02
    assert gone.any(0).all(), "each of the two has its turn"
    assert float(gone.any(1).float().mean()) > 0.7
    # What covers them fits in: no pixel around shows a step.
    for image, vanished in zip(made.images, gone, strict=True):
        for hole, is_gone in zip(holes, vanished, strict=True):
            around = F.max_pool2d(hole[None, None].float(), size // 16 * 2 + 1, 1, size // 16)[0, 0] > 0
            if is_gone:
                assert float((image - plate)[:, around].abs().max()) < 0.08


def test_erasing_where_nothing_stands_alone_or_may_be_touched():
    noise = torch.rand(6, 3, 64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    made = spoil(noise, erased_probability=1.0)
    assert made.images.dtype == torch.float64 and made.labels.all()
    untouchable = spoil(noise, torch.zeros(6, 1, 64, 64), erased_probability=1.0)
    assert torch.equal(untouchable.images, noise) and not untouchable.labels.any()


def test_erasing_stays_inside_the_foreground(images, foreground):
    make = make_synthesizer(anomaly_probability=1.0, erased_probability=1.0)
    made = make(images, range(40), 0, foreground)
    assert made.labels.any() and not (made.masks * (1 - foreground)).any()
    outside = (made.masks == 0).expand_as(images)
    assert torch.equal(made.images[outside], images[outside])
    part = make(images[[5]], [5], 0, foreground[[5]])
    assert torch.equal(part.images[0], made.images[5])


def disc(size, row, column, radius=0.05):
    y, x = torch.meshgrid(torch.arange(size) / size, torch.arange(size) / size, indexing="ij")
    return (y - row) ** 2 + (x - column) ** 2 <= radius**2


def test_only_features_of_the_product_are_erased():
    # Two alike, of which one lies beside the product: were that one erased, nothing would be marked.
    images = torch.where(disc(64, 0.5, 0.2) | disc(64, 0.5, 0.8), 0.1, 0.6).expand(12, 3, 64, 64)
    foreground = torch.zeros(12, 1, 64, 64)
    foreground[..., :32] = 1
    assert spoil(images, foreground, erased_probability=1.0).labels.all()


def test_an_opening_of_the_product_is_no_feature_of_it():
    opening, hole = disc(64, 0.5, 0.25, 0.065), disc(64, 0.5, 0.75)
    images = torch.where(opening | hole, 0.1, 0.6).expand(30, 3, 64, 64)
    made = spoil(images, (~opening).float().expand(30, 1, 64, 64), erased_probability=1.0)
    assert (made.masks[:, 0, hole].mean(1) > 0.5).all()


def test_a_feature_is_covered_with_a_piece_of_the_product_however_plain_the_background():
    hole = disc(64, 0.5, 0.5)
    foreground = torch.zeros(12, 1, 64, 64)
    foreground[..., 12:52, 12:52] = 1
    grain = 0.02 * torch.randn(12, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    images = torch.where(foreground > 0, torch.where(hole, 0.1, 0.6).expand(12, 3, 64, 64) + grain, 0.0)
    filled = spoil(images, foreground, erased_probability=1.0).images[:, :, hole]
    assert filled.mean((1, 2)).median() == pytest.approx(0.6, abs=0.05)


@pytest.mark.parametrize("size", [64, 256])
def test_the_faint_edges_of_a_feature_vanish_with_it(size):
    y, x = torch.meshgrid(torch.arange(size) / size, torch.arange(size) / size, indexing="ij")
    spot = 0.4 * torch.exp(-((y - 0.5) ** 2 + (x - 0.5) ** 2) / (2 * 0.02**2))
    made = spoil((0.6 - spot).expand(6, 3, size, size), erased_probability=1.0)
    left = (made.images - 0.6).abs().amax((1, 2, 3))
    assert made.labels.all() and left.median() < 0.04
