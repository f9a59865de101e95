"""Six kinds of defect.

A defect changes the height field, the material or the drawing of the part, never the finished picture, so it is lit
like the rest. Its mask is where the picture differs from the same one without the defect.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import ndimage

from .part import (
    BORE_RADIUS,
    BOSS_HEIGHT,
    BOSS_RADIUS,
    HOLES,
    PLATE_HALF,
    PLATE_THICKNESS,
    TEXTS,
    Surface,
    at_phase,
    canvas_side,
    grid,
    new_surface,
    textures,
)
from .photograph import check_size, draw_shot, expose, photograph


def _window(surface: Surface, x: float, y: float, reach: float) -> tuple[slice, slice]:
    """The part of the canvas within `reach` of a point on either axis."""
    n, scale = surface.side, surface.pixels_per_unit
    first_row, first_column = (max(0, int(n / 2 + (c - reach) * scale)) for c in (y, x))
    last_row, last_column = (int(n / 2 + (c + reach) * scale) for c in (y, x))
    return slice(first_row, last_row + 1), slice(first_column, last_column + 1)


def _offsets(surface: Surface, box: tuple[slice, slice], x: float, y: float) -> tuple[np.ndarray, np.ndarray]:
    """Where the pixels of a box lie from a point: dx (1, k) and dy (m, 1)."""
    grid_x, grid_y = grid(surface.side)
    return grid_x[:, box[1]] - x, grid_y[box[0]] - y


def _spot(surface: Surface, rng: np.random.Generator, clearance: float) -> tuple[float, float]:
    """A point of the metal at least `clearance` away from the outline and from every hole."""
    n, scale = surface.side, surface.pixels_per_unit
    reach = max(1, int(clearance * scale))
    while True:
        x, y = rng.uniform(-PLATE_HALF, PLATE_HALF, 2)
        row, column = int(n / 2 + y * scale), int(n / 2 + x * scale)
        if surface.metal[row - reach : row + reach + 1, column - reach : column + reach + 1].min() > 0.99:
            return x, y


def _near_path(surface: Surface, path: np.ndarray, reach: float) -> tuple[tuple[slice, slice], np.ndarray, np.ndarray]:
    """What lies within `reach` of a path of (k, 2) points, x and y.

    Returns:
        Box on the canvas; distance inside the box; nearest path point as a fraction of the path in [0, 1].
    """
    n, scale = surface.side, surface.pixels_per_unit
    steps = np.concatenate([[0], np.cumsum(np.hypot(*np.diff(path, axis=0).T))])
    dense = np.linspace(0, steps[-1], max(2, int(steps[-1] * scale * 2)))
    pixels = np.stack([np.interp(dense, steps, path[:, axis]) for axis in (1, 0)]) * scale + n / 2
    margin = int(reach * scale) + 2
    low = np.clip(pixels.min(1).astype(int) - margin, 0, n - 1)
    high = np.clip(pixels.max(1).astype(int) + margin, 1, n)
    on_path = tuple(np.clip(pixels[a].astype(int), low[a], high[a] - 1) - low[a] for a in (0, 1))
    along = np.full(high - low, np.nan, np.float32)
    along[on_path] = dense / steps[-1]
    distance, nearest = ndimage.distance_transform_edt(np.isnan(along), return_indices=True)
    box = (slice(low[0], high[0]), slice(low[1], high[1]))
    return box, (distance / scale).astype(np.float32), along[tuple(nearest)]


def _share_on_metal(surface: Surface, path: np.ndarray) -> float:
    pixels = path * surface.pixels_per_unit + surface.side / 2
    return float(ndimage.map_coordinates(surface.metal, pixels[:, ::-1].T, order=1).mean())


def _direction(angle: float) -> np.ndarray:
    return np.array([math.cos(angle), math.sin(angle)])


def _scratch(surface: Surface, rng: np.random.Generator) -> None:
    """One to three shallow grooves of varying width; the bare metal in them is bright, its lips catch the light."""
    while True:
        start = np.array(_spot(surface, rng, 0.01))
        heading = rng.uniform(0, 2 * np.pi)
        length = rng.uniform(0.13, 0.36)
        end = start + length * _direction(heading)
        bend = (start + end) / 2 + rng.normal(0, 0.06 * length / 0.2, 2)
        t = np.linspace(0, 1, 60)[:, None]
        path = (1 - t) ** 2 * start + 2 * t * (1 - t) * bend + t**2 * end
        if _share_on_metal(surface, path) > 0.92:
            break
    for number in range(rng.integers(1, 4)):
        first = int(rng.uniform(0, 25)) if number else 0
        last = int(rng.uniform(35, 60)) if number else 60
        strand = path[first:last] + (rng.normal(0, 0.008, 2) if number else 0)
        half_width = rng.uniform(0.0028, 0.0052) * (0.6 if number else 1)
        box, distance, along = _near_path(surface, strand, 4 * half_width)
        wobble = 1 + 0.3 * np.sin(along * rng.uniform(8, 20) + rng.uniform(0, 6)) * np.sin(along * rng.uniform(20, 40))
        taper = np.minimum(1, 6 * np.minimum(along + 0.03, 1.03 - along))
        q = distance / (half_width * wobble * taper)
        groove = np.exp(-(q**2))
        lip = np.exp(-((q - 1.7) ** 2) * 3)
        on = surface.metal[box]
        surface.height[box] += on * half_width * (0.3 * lip - 0.7 * groove)
        surface.albedo[box] *= 1 + on * 1.5 * groove
        surface.gloss[box] *= 1 - on * 0.3 * groove


def _on_outline(side: int, along: float) -> tuple[float, float]:
    """A point of the plate's outline: left, top, right or bottom side, `along` from its middle."""
    return ((-PLATE_HALF, along), (along, -PLATE_HALF), (PLATE_HALF, along), (along, PLATE_HALF))[side]


def _crack_path(rng: np.random.Generator, start: np.ndarray, heading: float, length: float) -> np.ndarray:
    steps = max(4, int(length / 0.011))
    turns = heading + np.cumsum(rng.normal(0, 0.16, steps)) + rng.normal(0, 0.5, steps)
    moves = np.stack([np.cos(turns), np.sin(turns)], 1) * (length / steps) * rng.uniform(0.5, 1.5, (steps, 1))
    return np.concatenate([start[None], start + np.cumsum(moves, axis=0)])


def _crack(surface: Surface, rng: np.random.Generator) -> None:
    """A jagged, branching, dark split that starts at an edge or a hole, its lips slightly raised."""
    while True:
        if rng.random() < 0.5:
            hx, hy, radius = HOLES[rng.integers(4)]
            heading = rng.uniform(0, 2 * np.pi)
            start = np.array([hx, hy]) + radius * _direction(heading)
        else:
            heading = rng.integers(4) * np.pi / 2 + rng.normal(0, 0.35)
            start = np.array(_on_outline(round(heading / (np.pi / 2)) % 4, rng.uniform(-0.28, 0.28)))
        path = _crack_path(rng, start, heading, rng.uniform(0.12, 0.28))
        if _share_on_metal(surface, path) > 0.9:
            break
    strands = [(path, rng.uniform(0.0035, 0.0055))]
    for _ in range(rng.integers(1, 4)):
        at = rng.integers(len(path) // 4, len(path) - 2)
        away = path[at + 1] - path[at]
        branch = math.atan2(away[1], away[0]) + rng.choice((-1, 1)) * rng.uniform(0.5, 1.1)
        strands.append((_crack_path(rng, path[at], branch, rng.uniform(0.03, 0.09)), rng.uniform(0.0022, 0.0035)))
    for strand, half_width in strands:
        box, distance, along = _near_path(surface, strand, 4 * half_width)
        q = distance / (half_width * (1.15 - 0.8 * along))
        gap = np.exp(-(q**4))
        on = surface.metal[box]
        surface.height[box] += on * half_width * (0.5 * np.exp(-((q - 1.6) ** 2) * 2) - 1.5 * gap)
        surface.albedo[box] *= 1 - on * 0.93 * gap
        surface.gloss[box] *= 1 - on * gap


def _dent(surface: Surface, rng: np.random.Generator) -> None:
    """One or two blows: a smooth hollow, elongated, with metal pushed up around it."""
    cx, cy = _spot(surface, rng, 0.035)
    for _ in range(rng.integers(1, 3)):
        radius = rng.uniform(0.028, 0.055)
        turn, stretch = rng.uniform(0, np.pi), rng.uniform(1.0, 1.7)
        box = _window(surface, cx, cy, 2.5 * radius * stretch)
        dx, dy = _offsets(surface, box, cx, cy)
        u = (dx * math.cos(turn) + dy * math.sin(turn)) / stretch
        v = dy * math.cos(turn) - dx * math.sin(turn)
        q = np.sqrt(u * u + v * v) / radius
        q *= 1 + 0.10 * np.sin(2 * np.arctan2(v, u) + rng.uniform(0, 6)) + 0.06 * np.sin(3 * np.arctan2(v, u))
        hollow = np.exp(-(q**2.6) * 1.5)
        rim = np.exp(-((q - 1.15) ** 2) * 14)
        depth = np.float32(radius * rng.uniform(0.28, 0.42))
        surface.height[box] += surface.metal[box] * depth * (0.14 * rim - hollow)
        cx, cy = cx + rng.uniform(-0.04, 0.04), cy + rng.uniform(-0.04, 0.04)


STAIN_COLOURS = ((0.40, 0.13, 0.03), (0.30, 0.17, 0.05), (0.10, 0.09, 0.08), (0.10, 0.20, 0.32))


def _stain(surface: Surface, rng: np.random.Generator) -> None:
    """Dried liquid or rust: a soft lobed patch, darker at its rim, with a few splashes; the metal shines through."""
    cx, cy = _spot(surface, rng, 0.02)
    radius = rng.uniform(0.035, 0.085)
    box = _window(surface, cx, cy, 3 * radius)
    lobes = [(np.array([cx, cy]), radius)]
    for _ in range(rng.integers(1, 4)):
        edge = lobes[0][0] + radius * _direction(rng.uniform(0, 2 * np.pi))
        lobes.append((edge, radius * rng.uniform(0.35, 0.75)))
    for _ in range(rng.integers(0, 4)):
        out = _direction(rng.uniform(0, 2 * np.pi))
        lobes.append((lobes[0][0] + radius * rng.uniform(1.6, 2.3) * out, radius * rng.uniform(0.08, 0.2)))
    wet = np.zeros_like(surface.stain[box])
    for (lx, ly), lobe_radius in lobes:
        dx, dy = _offsets(surface, box, lx, ly)
        angle = np.arctan2(dy, dx)
        outline = 1.0
        for order in (2, 3, 5, 7):
            outline = outline + rng.normal(0, 0.22 / order) * np.cos(order * angle + rng.uniform(0, 6))
        wet = np.maximum(wet, np.clip(1.0 - np.hypot(dx, dy) / (lobe_radius * outline), 0, 1) * lobe_radius)
    soak = np.clip(wet / (0.16 * radius), 0, 1)
    soak *= soak * (3 - 2 * soak)
    rim = soak * np.exp(-np.square(wet / (0.16 * radius) - 1))
    mottle, cloud = (at_phase(textures(surface.side)[name], rng.random(2))[box] for name in ("grain", "cloud"))
    opacity = rng.uniform(0.5, 0.7)
    stain = soak * opacity * (1 + 0.06 * mottle + 0.12 * cloud) + 0.18 * rim
    surface.stain[box] = np.clip(stain, 0, 0.93) * surface.metal[box]
    surface.stain_colour = STAIN_COLOURS[rng.integers(len(STAIN_COLOURS))]
    surface.gloss *= 1 - 0.55 * surface.stain


def _chip(surface: Surface, rng: np.random.Generator) -> None:
    """A piece broken off the outline or off the boss: tilted, rough facets cut the edge away."""
    radius = rng.uniform(0.05, 0.085)
    if rng.random() < 0.65:
        side = rng.integers(4)
        centre = _on_outline(side, rng.uniform(-0.36, 0.36))
        outward, floor = (np.pi, -np.pi / 2, 0, np.pi / 2)[side], 0.0
    else:
        outward = rng.uniform(0, 2 * np.pi)
        reach = BOSS_RADIUS if rng.random() < 0.5 else BORE_RADIUS
        centre = (reach * _direction(outward)).tolist()
        floor = PLATE_THICKNESS + 0.002 if reach == BOSS_RADIUS else 0.02
        outward += np.pi if reach == BORE_RADIUS else 0
    top = PLATE_THICKNESS + (BOSS_HEIGHT if floor else 0)
    box = _window(surface, *centre, 1.3 * radius + 0.04)
    dx, dy = _offsets(surface, box, *centre)
    cut = np.hypot(dx, dy) - radius * 1.3
    for spread in rng.uniform(-1.1, 1.1, 4):
        nx, ny = _direction(outward + spread).tolist()
        cut = np.maximum(cut, -(dx * nx + dy * ny) - radius * rng.uniform(0.35, 0.8))
    grain, fracture = (at_phase(textures(surface.side)[name], rng.random(2))[box] for name in ("grain", "fracture"))
    bottom = np.maximum(top + cut * rng.uniform(1.1, 2.0) + 0.0012 * grain + 0.005 * fracture, floor)
    height, metal = surface.height[box], surface.metal[box]
    broken = np.clip((height - bottom) / 0.004, 0, 1) * metal
    left = np.where(metal > 0, np.minimum(height, bottom), height)
    # The table shows through if all of the thickness is gone.
    metal *= np.where(broken > 0, np.clip((left - 0.004) * surface.pixels_per_unit / 2, 0, 1), 1)
    surface.height[box] = left
    surface.albedo[box] *= 1 + 0.1 * broken
    surface.gloss[box] *= 1 - 0.45 * broken


def _without_feature(n: int, rng: np.random.Generator) -> Surface:
    """A hole was never drilled, or a text never engraved."""
    absent = rng.integers(len(HOLES) + len(TEXTS))
    holes = tuple(hole for i, hole in enumerate(HOLES) if i != absent)
    texts = tuple(text for i, text in enumerate(TEXTS, len(HOLES)) if i != absent)
    return new_surface(n, holes, texts)


_SURFACE_DEFECTS = {"scratch": _scratch, "dent": _dent, "stain": _stain, "crack": _crack, "chip": _chip}
# Their masks must not swell.
_THIN_DEFECTS = ("scratch", "crack")
DEFECT_TYPES = (*_SURFACE_DEFECTS, "missing_feature")


def _changed_pixels(flawless: np.ndarray, defective: np.ndarray, gap: float) -> np.ndarray:
    """Where two pictures, (H, W, 3) in [0, 255] without sensor noise, differ visibly: (H, W) bool.

    Gaps up to twice `gap`, in pixels of a 256-pixel picture, are closed, as by a person marking the defect (between
    letters, inside a hole, along a groove as bright as its surroundings).
    """
    size = len(flawless)
    changed = np.abs(defective - flawless).max(axis=2) > 9
    reach = max(1, round(gap * size / 256))
    padded = np.pad(changed, reach)
    disc = np.hypot(*np.mgrid[-reach : reach + 1, -reach : reach + 1]) <= reach
    closed = ndimage.binary_fill_holes(ndimage.binary_closing(padded, disc))[reach:-reach, reach:-reach]
    labels, _ = ndimage.label(closed, np.ones((3, 3)))
    return closed & (np.bincount(labels.ravel()) >= 8 * (size / 256) ** 2)[labels]


def _clearly_visible(flawless: np.ndarray, defective: np.ndarray, mask: np.ndarray) -> bool:
    """Whether a person would see the defect, even in the picture shrunk to half its size."""
    before, after = (ndimage.uniform_filter(p, (2, 2, 1))[::2, ::2] for p in (flawless, defective))
    strong = np.abs(after - before).max(axis=2) > 28
    return bool(mask.any()) and np.count_nonzero(strong) >= 24 * (len(flawless) / 256) ** 2


def render_defective_part(
    rng: np.random.Generator, defect_type: str, size: int = 256
) -> tuple[np.ndarray, np.ndarray]:
    """Photograph a part with one defect; without it, the picture would be `render_part` of the same `rng` state.

    Returns:
        The picture, (size, size, 3) uint8 RGB, and the mask of its visibly changed pixels, (size, size) bool.

    Raises:
        ValueError: If `size` is below 64 pixels or the defect type is unknown.
    """
    check_size(size)
    if defect_type not in DEFECT_TYPES:
        raise ValueError(f"unknown defect type {defect_type!r}; choose one of {', '.join(DEFECT_TYPES)}")
    shot = draw_shot(rng, size)
    n = canvas_side(size)
    flawless = photograph(new_surface(n), shot)
    while True:
        if defect_type in _SURFACE_DEFECTS:
            surface = new_surface(n)
            _SURFACE_DEFECTS[defect_type](surface, rng)
        else:
            surface = _without_feature(n, rng)
        defective = photograph(surface, shot)
        mask = _changed_pixels(flawless, defective, gap=2 if defect_type in _THIN_DEFECTS else 4)
        # The light may hide a defect; a test set should only have those that a person can see.
        if _clearly_visible(flawless, defective, mask):
            return expose(defective, shot), mask
