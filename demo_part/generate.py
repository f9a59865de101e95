"""Procedural photographs of a machined flange, normal and defective, in the MVTec AD folder layout.

    python -m demo_part.generate --out DIR --seed S

The part is a height field with material maps, lit by one near light and seen from above, as on a granite inspection
table. A defect changes the height field, the material or the drawing of the part, never the finished picture, so the
light falls on it as on the rest. Its mask is where the picture really differs from that of the same part, same
place, same light and same sensor noise, without the defect.

Lengths are fractions of the picture's width; the origin is the part's centre, x to the right and y downwards.
"""

from __future__ import annotations

import argparse
import math
import sys
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage
from tqdm import tqdm

CATEGORY = "demo-part"
MIN_SIZE = 64
# Sensor noise hardly compresses: zlib's default effort takes twice as long to save a tenth.
PNG_EFFORT = 3

SUPERSAMPLING = 2
# The scene is drawn in the part's own frame, and the camera moves: the margin keeps the frame's border out of sight.
CANVAS_WIDTH = 1.16

PLATE_HALF, PLATE_CORNER, PLATE_THICKNESS = 0.395, 0.085, 0.055
# Edges are broken at 30 degrees, so that they catch the light.
CHAMFER, CHAMFER_SLOPE = 0.013, 0.55
BOSS_RADIUS, BOSS_HEIGHT, BORE_RADIUS = 0.232, 0.028, 0.098
GROOVE_RADIUS, GROOVE_WIDTH, GROOVE_DEPTH = 0.163, 0.022, 0.014
BOLT_OFFSET, BOLT_RADIUS = 0.296, 0.040
ENGRAVING_DEPTH = 0.006
MAX_SLOPE = 2.0


# --- the drawing of the part -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """What the part's drawing asks for: holes as (x, y, radius), engravings as (text, x, y, letter height)."""

    holes: tuple[tuple[float, float, float], ...]
    texts: tuple[tuple[str, float, float, float], ...]


NORMAL_LAYOUT = Layout(
    holes=(
        (-BOLT_OFFSET, -BOLT_OFFSET, BOLT_RADIUS),
        (BOLT_OFFSET, -BOLT_OFFSET, BOLT_RADIUS),
        (-BOLT_OFFSET, BOLT_OFFSET, BOLT_RADIUS),
        (BOLT_OFFSET, BOLT_OFFSET, BOLT_RADIUS),
        (0.318, 0.0, 0.020),
    ),
    texts=(("FX-2047", 0.0, 0.318, 0.072), ("DN25", 0.0, -0.318, 0.062)),
)


@dataclass
class Surface:
    """The scene in the part's own frame; every field is (n, n) float32 on the supersampled canvas.

    Attributes:
        height: Height over the table, in picture widths.
        metal: Coverage of metal in [0, 1]; the rest is the table.
        albedo: Factor on the colour of the metal.
        gloss: Factor on the mirror-like part of the reflection.
        stain: Opacity of a stain in [0, 1].
        stain_colour: Its colour, linear RGB.
    """

    height: np.ndarray
    metal: np.ndarray
    albedo: np.ndarray
    gloss: np.ndarray
    stain: np.ndarray
    stain_colour: tuple[float, float, float] = (0.0, 0.0, 0.0)

    @property
    def pixels_per_unit(self) -> float:
        return self.height.shape[0] / CANVAS_WIDTH


def _canvas_side(size: int) -> int:
    return round(CANVAS_WIDTH * SUPERSAMPLING * size)


@lru_cache(maxsize=2)
def _grid(n: int) -> tuple[np.ndarray, np.ndarray]:
    axis = ((np.arange(n, dtype=np.float32) + 0.5) / n - 0.5) * np.float32(CANVAS_WIDTH)
    return axis[None, :], axis[:, None]


def _engraving(n: int, text: str, x: float, y: float, letter_height: float) -> np.ndarray:
    """Depth profile of a text in [0, 1], (n, n): flat bottom, flanks as wide as a cutter's tip."""
    scale = n / CANVAS_WIDTH
    canvas = Image.new("L", (n, n))
    font = ImageFont.load_default(size=letter_height * scale * 1.35)
    at = (n / 2 + x * scale, n / 2 + y * scale)
    ImageDraw.Draw(canvas).text(
        at, text, fill=255, font=font, anchor="mm", stroke_width=max(1, round(0.002 * scale)), stroke_fill=255
    )
    return ndimage.gaussian_filter(np.asarray(canvas, np.float32) / 255, 0.0018 * scale)


@lru_cache(maxsize=8)
def _drawn_part(n: int, layout: Layout) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Height, metal coverage and albedo, each (n, n), of a flawless part machined to `layout`."""
    x, y = _grid(n)
    scale = n / CANVAS_WIDTH
    qx, qy = np.abs(x) - (PLATE_HALF - PLATE_CORNER), np.abs(y) - (PLATE_HALF - PLATE_CORNER)
    inside = PLATE_CORNER - np.hypot(np.maximum(qx, 0), np.maximum(qy, 0)) - np.minimum(np.maximum(qx, qy), 0)
    height = PLATE_THICKNESS - CHAMFER_SLOPE * np.maximum(CHAMFER - inside, 0)
    metal = np.clip(inside * scale + 0.5, 0, 1)

    radius = np.hypot(x, y)
    height += BOSS_HEIGHT * np.clip((BOSS_RADIUS - radius) / 0.022, 0, 1)
    groove = np.clip((GROOVE_WIDTH / 2 - np.abs(radius - GROOVE_RADIUS)) / 0.006, 0, 1)
    height -= GROOVE_DEPTH * groove
    # Oil and dust stay in what is cut in.
    albedo = 1 - 0.25 * groove
    for text in layout.texts:
        engraving = _engraving(n, *text)
        height -= ENGRAVING_DEPTH * engraving
        albedo -= 0.4 * engraving
    for hx, hy, hole_radius in (*layout.holes, (0.0, 0.0, BORE_RADIUS)):
        outside = np.hypot(x - hx, y - hy) - hole_radius
        height -= CHAMFER_SLOPE * np.maximum(min(CHAMFER, hole_radius / 3) - np.maximum(outside, 0), 0)
        metal *= np.clip(outside * scale + 0.5, 0, 1)
    return tuple(field.astype(np.float32) for field in (height * metal, metal, albedo))


def _new_surface(n: int, layout: Layout) -> Surface:
    height, metal, albedo = (field.copy() for field in _drawn_part(n, layout))
    # What is cut in is also duller.
    return Surface(height, metal, albedo, gloss=albedo.copy(), stain=np.zeros_like(height))


# --- materials -------------------------------------------------------------------------------------------------------


def _unit_variance(field: np.ndarray) -> np.ndarray:
    return ((field - field.mean()) / field.std()).astype(np.float32)


@lru_cache(maxsize=2)
def _textures(n: int) -> dict[str, np.ndarray]:
    """Periodic texture tiles of zero mean and unit variance, (n, n); a picture takes them at its own phase."""
    rng = np.random.default_rng(20470)
    scale = n / CANVAS_WIDTH

    def streaks(length: float, width: float) -> np.ndarray:
        noise = rng.standard_normal((n, n), dtype=np.float32)
        noise = ndimage.gaussian_filter1d(noise, length * scale, axis=1, mode="wrap")
        return _unit_variance(ndimage.gaussian_filter1d(noise, width * scale, axis=0, mode="wrap"))

    def blobs(sigma: float) -> np.ndarray:
        return _unit_variance(
            ndimage.gaussian_filter(rng.standard_normal((n, n), dtype=np.float32), sigma * scale, mode="wrap")
        )

    brushed = _unit_variance(streaks(0.06, 0.0011) + 0.8 * streaks(0.15, 0.0025) + 0.5 * streaks(0.3, 0.006))
    crystals = blobs(0.0022)
    granite = blobs(0.0013) * 0.6 + np.maximum(crystals - 0.9, 0) * 2.2 - np.maximum(-crystals - 1.2, 0)
    return {
        "brushed": brushed,
        "turned": _unit_variance(streaks(0.10, 0.0014) + 0.9 * streaks(1.0, 0.0028)),
        "grain": blobs(0.0012),
        "fracture": blobs(0.0045),
        "cloud": blobs(0.05),
        "granite": _unit_variance(granite),
    }


@lru_cache(maxsize=2)
def _boss_frame(n: int) -> tuple[slice, np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The turned boss: its box on the canvas, weight, cosine and sine of the angle, texture rows and columns."""
    half = math.ceil((BOSS_RADIUS + 0.01) * n / CANVAS_WIDTH)
    box = slice(n // 2 - half, n // 2 + half)
    x, y = _grid(n)
    x, y = x[:, box], y[box]
    radius = np.maximum(np.hypot(x, y), 1e-6)
    rows = (radius * (n / CANVAS_WIDTH)).astype(np.int32)
    columns = ((np.arctan2(y, x) / (2 * np.pi) + 0.5) * n).astype(np.int32)
    weight = np.clip((BOSS_RADIUS - radius) / 0.006, 0, 1)
    return box, weight, x / radius, y / radius, rows, columns


# --- one photograph --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shot:
    """Everything that differs between two photographs of flawless parts.

    `sensor_noise` is (size, size, 3) of unit variance; `phases` are offsets into the texture tiles in [0, 1).
    """

    size: int
    angle: float
    scale: float
    shift: tuple[float, float]
    light_azimuth: float
    light_tilt: float
    light_power: float
    ambient: float
    warmth: float
    roughness: float
    table_tone: float
    blur: float
    vignetting: float
    phases: np.ndarray
    sensor_noise: np.ndarray


def _draw_shot(rng: np.random.Generator, size: int) -> Shot:
    return Shot(
        size=size,
        angle=math.radians(rng.uniform(-4, 4)),
        scale=rng.uniform(0.98, 1.02),
        shift=(rng.uniform(-0.03, 0.03), rng.uniform(-0.03, 0.03)),
        light_azimuth=math.radians(rng.uniform(-130, -110)),
        light_tilt=rng.uniform(0.36, 0.44),
        light_power=rng.uniform(0.92, 1.08),
        ambient=rng.uniform(0.9, 1.1),
        warmth=rng.uniform(-0.02, 0.03),
        roughness=rng.uniform(0.92, 1.08),
        table_tone=rng.uniform(0.9, 1.1),
        blur=rng.uniform(0.35, 0.6),
        vignetting=rng.uniform(0.10, 0.2),
        phases=rng.random((6, 2)),
        sensor_noise=rng.standard_normal((size, size, 3), dtype=np.float32),
    )


def _at_phase(tile: np.ndarray, phase: np.ndarray) -> np.ndarray:
    n = tile.shape[0]
    return np.roll(tile, (int(phase[0] * n), int(phase[1] * n)), axis=(0, 1))


def _cast_shadow(height: np.ndarray, direction: tuple[float, float], rise: float, scale: float) -> np.ndarray:
    """Share of the light that is blocked, (n, n): march from each point towards the light, at half resolution."""
    n = height.shape[0]
    low = height[::2, ::2]
    blocked = np.zeros_like(low)
    for distance in np.linspace(0.006, 0.075, 9):
        dx, dy = (round(c * distance * scale / 2) for c in direction)
        above = np.roll(low, (-dy, -dx), axis=(0, 1)) - low - np.float32(distance * rise)
        np.maximum(blocked, above, out=blocked)
    blocked = ndimage.uniform_filter(np.minimum(blocked / 0.012, 1), max(3, round(0.012 * scale / 2)))
    return _doubled(blocked, n)


def _doubled(low: np.ndarray, n: int) -> np.ndarray:
    return np.asarray(Image.fromarray(low).resize((n, n), Image.Resampling.BILINEAR))


def _shade(surface: Surface, shot: Shot) -> np.ndarray:
    """Light every point of the canvas: (n, n, 3) linear RGB."""
    n = surface.height.shape[0]
    scale = surface.pixels_per_unit
    x, y = _grid(n)
    tiles = _textures(n)
    grain = _at_phase(tiles["grain"], shot.phases[0])
    brushed = _at_phase(tiles["brushed"], shot.phases[1])

    slope_x = np.empty_like(surface.height)
    slope_y = np.empty_like(surface.height)
    slope_x[:, 1:-1] = surface.height[:, :-2] - surface.height[:, 2:]
    slope_y[1:-1] = surface.height[:-2] - surface.height[2:]
    slope_x[:, [0, -1]] = 0
    slope_y[[0, -1]] = 0
    slope_x *= np.float32(scale / 2)
    slope_y *= np.float32(scale / 2)
    np.clip(slope_x, -MAX_SLOPE, MAX_SLOPE, out=slope_x)
    np.clip(slope_y, -MAX_SLOPE, MAX_SLOPE, out=slope_y)

    # The light, seen from the part's frame, which the camera sees turned by `angle`.
    azimuth = shot.light_azimuth - shot.angle
    to_light = (math.cos(azimuth), math.sin(azimuth))
    # A mirror facet shines if its slope is that of the half vector; a near light makes that slope vary over the part.
    off_x = slope_x + (0.55 * x - np.float32(shot.light_tilt * to_light[0]))
    off_y = slope_y + (0.55 * y - np.float32(shot.light_tilt * to_light[1]))

    # Brushed along x: facets scatter across the brushing direction far more than along it.
    along, across = 0.30 * shot.roughness, 0.62 * shot.roughness
    lobe = np.square(off_x * np.float32(1 / along)) + np.square((off_y + 0.07 * brushed) * np.float32(1 / across))
    tone = 0.035 * brushed
    box, weight, cosine, sine, rows, columns = _boss_frame(n)
    turned = np.take(_at_phase(tiles["turned"], shot.phases[2]), rows * n + columns)
    radial = off_x[box, box] * cosine + off_y[box, box] * sine + 0.06 * turned
    tangential = off_y[box, box] * cosine - off_x[box, box] * sine
    boss_lobe = np.square(tangential * np.float32(1.35 / along)) + np.square(radial * np.float32(1 / across))
    lobe[box, box] += weight * (boss_lobe - lobe[box, box])
    tone[box, box] += weight * (0.03 * turned - tone[box, box])
    mirror = np.exp(-lobe) * surface.gloss

    length = np.sqrt(1 + slope_x * slope_x + slope_y * slope_y)
    diffuse = np.maximum((slope_x * to_light[0] + slope_y * to_light[1]) * 0.75 + 0.8, 0) / length

    low = surface.height[::4, ::4]
    hollow = ndimage.gaussian_filter(low, 0.022 * scale / 4) - low
    open_sky = 1 - np.clip(_doubled(hollow, n) / 0.055, 0, 0.75)
    lit = 1 - 0.9 * _cast_shadow(surface.height, to_light, 1.1, scale)

    cloud = _at_phase(tiles["cloud"], shot.phases[3])
    metal = (0.17 * shot.ambient * open_sky + 0.20 * shot.light_power * lit * diffuse) * (
        1 + tone + 0.02 * grain + 0.03 * cloud
    )
    metal *= surface.albedo
    glare = (0.66 * shot.light_power) * lit * mirror * (1 + 0.03 * grain)

    granite = _at_phase(tiles["granite"], shot.phases[4])
    table = np.maximum(0.052 + 0.017 * granite, 0.008) * shot.table_tone
    table *= 0.45 * open_sky**2 + 0.8 * lit

    colour = np.empty((n, n, 3), np.float32)
    # A warm lamp in a room of cool daylight.
    metal_tint = (0.97, 1.0, 1.05)
    glare_tint = (1.02 + shot.warmth, 1.0, 0.96 - shot.warmth)
    table_tint = (0.93, 1.0, 1.10)
    veil = 1 - surface.stain
    for channel in range(3):
        of_metal = metal * metal_tint[channel] + glare * glare_tint[channel]
        # A stain lets some metal through and lies in the same light.
        of_metal *= veil + surface.stain * surface.stain_colour[channel]
        of_table = table * table_tint[channel]
        colour[..., channel] = of_table + surface.metal * (of_metal - of_table)
    return colour


def _photograph(surface: Surface, shot: Shot) -> np.ndarray:
    """Shade, place before the camera and develop: (size, size, 3) float32 in [0, 255], before sensor noise."""
    n, wide = surface.height.shape[0], SUPERSAMPLING * shot.size
    colour = _shade(surface, shot)
    cosine, sine = math.cos(shot.angle) / shot.scale, math.sin(shot.angle) / shot.scale
    centre = wide / 2
    shift_x, shift_y = centre + shot.shift[0] * wide, centre + shot.shift[1] * wide
    to_canvas = (
        cosine,
        sine,
        n / 2 - cosine * shift_x - sine * shift_y,
        -sine,
        cosine,
        n / 2 + sine * shift_x - cosine * shift_y,
    )
    picture = np.empty((shot.size, shot.size, 3), np.float32)
    for channel in range(3):
        placed = Image.fromarray(np.ascontiguousarray(colour[..., channel])).transform(
            (wide, wide), Image.Transform.AFFINE, to_canvas, Image.Resampling.BILINEAR
        )
        reduced = np.asarray(placed.reduce(SUPERSAMPLING))
        picture[..., channel] = ndimage.gaussian_filter(reduced, shot.blur * shot.size / 256, truncate=3)

    axis = np.linspace(-1, 1, shot.size, dtype=np.float32)
    towards_light = axis[None, :] * math.cos(shot.light_azimuth) + axis[:, None] * math.sin(shot.light_azimuth)
    falloff = 1 + 0.13 * towards_light - shot.vignetting * (axis[None, :] ** 2 + axis[:, None] ** 2) / 2
    picture *= falloff[..., None]
    # A film-like shoulder keeps highlights from clipping.
    picture /= 1 + 0.28 * picture
    return np.power(np.clip(picture, 0, 1), np.float32(1 / 2.2)) * 255


def _expose(picture: np.ndarray, shot: Shot) -> np.ndarray:
    """Add the sensor's noise and quantise: (size, size, 3) uint8."""
    return np.clip(picture + 2.2 * shot.sensor_noise + 0.5, 0, 255).astype(np.uint8)


# --- defects ---------------------------------------------------------------------------------------------------------


def _spot(surface: Surface, rng: np.random.Generator, clearance: float) -> tuple[float, float]:
    """A point of the metal at least `clearance` away from the outline and from every hole."""
    n, scale = surface.height.shape[0], surface.pixels_per_unit
    while True:
        x, y = rng.uniform(-PLATE_HALF, PLATE_HALF, 2)
        row, column = int(n / 2 + y * scale), int(n / 2 + x * scale)
        reach = max(1, int(clearance * scale))
        window = surface.metal[max(0, row - reach) : row + reach + 1, max(0, column - reach) : column + reach + 1]
        if window.min() > 0.99:
            return x, y


def _box_around(
    surface: Surface, x: float, y: float, reach: float
) -> tuple[tuple[slice, slice], np.ndarray, np.ndarray]:
    """The part of the canvas within `reach` of a point on either axis, with its x (1, k) and y (m, 1)."""
    n, scale = surface.height.shape[0], surface.pixels_per_unit
    rows, columns = (
        slice(max(0, int(n / 2 + (c - reach) * scale)), min(n, int(n / 2 + (c + reach) * scale) + 1)) for c in (y, x)
    )
    grid_x, grid_y = _grid(n)
    return (rows, columns), grid_x[:, columns], grid_y[rows]


def _near_path(surface: Surface, path: np.ndarray, reach: float) -> tuple[tuple[slice, slice], np.ndarray, np.ndarray]:
    """Distance to a path and the place along it.

    Args:
        surface: The scene.
        path: (k, 2) points, x and y.
        reach: How far from the path the answer is wanted.

    Returns:
        Box on the canvas; distance inside the box; nearest path point as a fraction of the path in [0, 1].
    """
    n, scale = surface.height.shape[0], surface.pixels_per_unit
    steps = np.concatenate([[0], np.cumsum(np.hypot(*np.diff(path, axis=0).T))])
    dense = np.linspace(0, steps[-1], max(2, int(steps[-1] * scale * 2)))
    pixels = np.stack([np.interp(dense, steps, path[:, axis]) for axis in (1, 0)]) * scale + n / 2
    margin = int(reach * scale) + 2
    low = np.clip(pixels.min(1).astype(int) - margin, 0, n - 1)
    high = np.clip(pixels.max(1).astype(int) + margin, 1, n)
    box = (slice(low[0], high[0]), slice(low[1], high[1]))
    rows, columns = (np.clip(pixels[a].astype(int), low[a], high[a] - 1) - low[a] for a in (0, 1))
    along = np.zeros(high - low, np.float32)
    along[rows, columns] = dense / steps[-1]
    off = np.ones(high - low, bool)
    off[rows, columns] = False
    distance, nearest = ndimage.distance_transform_edt(off, return_indices=True)
    return box, (distance / scale).astype(np.float32), along[tuple(nearest)]


def _share_on_metal(surface: Surface, path: np.ndarray) -> float:
    pixels = path * surface.pixels_per_unit + surface.height.shape[0] / 2
    return float(ndimage.map_coordinates(surface.metal, pixels[:, ::-1].T, order=1).mean())


def _scratch(surface: Surface, rng: np.random.Generator) -> None:
    """One to three shallow grooves of varying width; the bare metal in them is bright, its lips catch the light."""
    while True:
        start = np.array(_spot(surface, rng, 0.01))
        heading = rng.uniform(0, 2 * np.pi)
        length = rng.uniform(0.13, 0.36)
        end = start + length * np.array([math.cos(heading), math.sin(heading)])
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
            hx, hy, radius = NORMAL_LAYOUT.holes[rng.integers(4)]
            out = rng.uniform(0, 2 * np.pi)
            start = np.array([hx, hy]) + radius * np.array([math.cos(out), math.sin(out)])
            heading = out
        else:
            heading = rng.integers(4) * np.pi / 2 + rng.normal(0, 0.35)
            along = rng.uniform(-0.28, 0.28)
            side = round(heading / (np.pi / 2)) % 4
            start = np.array(_on_outline(side, along))
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
        box, x, y = _box_around(surface, cx, cy, 2.5 * radius * stretch)
        dx, dy = x - cx, y - cy
        u = (dx * math.cos(turn) + dy * math.sin(turn)) / stretch
        v = dy * math.cos(turn) - dx * math.sin(turn)
        q = np.sqrt(u * u + v * v) / radius
        q *= 1 + 0.10 * np.sin(2 * np.arctan2(v, u) + rng.uniform(0, 6)) + 0.06 * np.sin(3 * np.arctan2(v, u))
        hollow = np.exp(-(q**2.6) * 1.5)
        rim = np.exp(-((q - 1.15) ** 2) * 14)
        surface.height[box] += (
            surface.metal[box] * np.float32(radius * rng.uniform(0.28, 0.42)) * (0.14 * rim - hollow)
        )
        cx, cy = cx + rng.uniform(-0.04, 0.04), cy + rng.uniform(-0.04, 0.04)


STAIN_COLOURS = ((0.40, 0.13, 0.03), (0.30, 0.17, 0.05), (0.10, 0.09, 0.08), (0.10, 0.20, 0.32))


def _stain(surface: Surface, rng: np.random.Generator) -> None:
    """Dried liquid or rust: a soft lobed patch, darker at its rim, with a few splashes; the metal shines through."""
    cx, cy = _spot(surface, rng, 0.02)
    radius = rng.uniform(0.035, 0.085)
    box, x, y = _box_around(surface, cx, cy, 3 * radius)
    lobes = [(cx, cy, radius)]
    for _ in range(rng.integers(1, 4)):
        out = rng.uniform(0, 2 * np.pi)
        lobes.append((cx + radius * math.cos(out), cy + radius * math.sin(out), radius * rng.uniform(0.35, 0.75)))
    for _ in range(rng.integers(0, 4)):
        out, away = rng.uniform(0, 2 * np.pi), radius * rng.uniform(1.6, 2.3)
        lobes.append((cx + away * math.cos(out), cy + away * math.sin(out), radius * rng.uniform(0.08, 0.2)))
    wet = np.zeros_like(surface.stain[box])
    for lx, ly, lobe_radius in lobes:
        dx, dy = x - lx, y - ly
        angle = np.arctan2(dy, dx)
        outline = 1.0
        for order in (2, 3, 5, 7):
            outline = outline + rng.normal(0, 0.22 / order) * np.cos(order * angle + rng.uniform(0, 6))
        wet = np.maximum(wet, np.clip(1.0 - np.hypot(dx, dy) / (lobe_radius * outline), 0, 1) * lobe_radius)
    soak = np.clip(wet / (0.16 * radius), 0, 1)
    soak *= soak * (3 - 2 * soak)
    rim = soak * np.exp(-np.square(wet / (0.16 * radius) - 1))
    tiles = _textures(surface.height.shape[0])
    mottle, cloud = (_at_phase(tiles[name], rng.random(2))[box] for name in ("grain", "cloud"))
    opacity = rng.uniform(0.5, 0.7)
    stain = soak * opacity * (1 + 0.06 * mottle + 0.12 * cloud) + 0.18 * rim
    surface.stain[box] = np.clip(stain, 0, 0.93) * surface.metal[box]
    surface.stain_colour = STAIN_COLOURS[rng.integers(len(STAIN_COLOURS))]
    surface.gloss *= 1 - 0.55 * surface.stain


def _chip(surface: Surface, rng: np.random.Generator) -> None:
    """A piece broken off the outline or off the boss: tilted, rough facets cut the edge away."""
    radius = rng.uniform(0.05, 0.085)
    if rng.random() < 0.65:
        side, along = rng.integers(4), rng.uniform(-0.36, 0.36)
        centre = _on_outline(side, along)
        outward, floor = (np.pi, -np.pi / 2, 0, np.pi / 2)[side], 0.0
    else:
        outward = rng.uniform(0, 2 * np.pi)
        reach = BOSS_RADIUS if rng.random() < 0.5 else BORE_RADIUS
        centre = (reach * math.cos(outward), reach * math.sin(outward))
        floor = PLATE_THICKNESS + 0.002 if reach == BOSS_RADIUS else 0.02
        outward += np.pi if reach == BORE_RADIUS else 0
    top = PLATE_THICKNESS + (BOSS_HEIGHT if floor else 0)
    box, x, y = _box_around(surface, *centre, 1.3 * radius + 0.04)
    dx, dy = x - centre[0], y - centre[1]
    cut = np.hypot(dx, dy) - radius * 1.3
    for spread in rng.uniform(-1.1, 1.1, 4):
        nx, ny = math.cos(outward + spread), math.sin(outward + spread)
        cut = np.maximum(cut, -(dx * nx + dy * ny) - radius * rng.uniform(0.35, 0.8))
    tiles = _textures(surface.height.shape[0])
    grain, fracture = (_at_phase(tiles[name], rng.random(2))[box] for name in ("grain", "fracture"))
    bottom = np.maximum(top + cut * rng.uniform(1.1, 2.0) + 0.0012 * grain + 0.005 * fracture, floor)
    height, metal = surface.height[box], surface.metal[box]
    broken = np.clip((height - bottom) / 0.004, 0, 1) * metal
    left = np.where(metal > 0, np.minimum(height, bottom), height)
    # Where all of the thickness is gone, the table shows.
    metal *= np.where(broken > 0, np.clip((left - 0.004) * surface.pixels_per_unit / 2, 0, 1), 1)
    surface.height[box] = left
    surface.albedo[box] *= 1 + 0.1 * broken
    surface.gloss[box] *= 1 - 0.45 * broken


def _missing_feature(layout: Layout, rng: np.random.Generator) -> Layout:
    """A hole was never drilled, or a text never engraved."""
    absent = rng.integers(len(layout.holes) + len(layout.texts))
    if absent < len(layout.holes):
        return replace(layout, holes=tuple(h for i, h in enumerate(layout.holes) if i != absent))
    return replace(layout, texts=tuple(t for i, t in enumerate(layout.texts) if i != absent - len(layout.holes)))


_SURFACE_DEFECTS: dict[str, Callable[[Surface, np.random.Generator], None]] = {
    "scratch": _scratch,
    "dent": _dent,
    "stain": _stain,
    "crack": _crack,
    "chip": _chip,
}
# Their masks must not swell.
_THIN_DEFECTS = ("scratch", "crack")
DEFECT_TYPES = (*_SURFACE_DEFECTS, "missing_feature")


def _changed_pixels(flawless: np.ndarray, defective: np.ndarray, gap: float) -> np.ndarray:
    """Where two pictures, (H, W, 3) in [0, 255] without sensor noise, differ visibly: (H, W) bool.

    Gaps of the kind that a person marking the defect would paint over (between letters, inside a hole, where a groove
    happens to have the brightness of its surroundings) are closed up to twice `gap`, in pixels of a 256-pixel picture.
    """
    size = flawless.shape[0]
    difference = np.abs(defective - flawless).max(axis=2)
    changed = difference > 9
    reach = max(1, round(gap * size / 256))
    padded = np.pad(changed, reach)
    disc = np.hypot(*np.mgrid[-reach : reach + 1, -reach : reach + 1]) <= reach
    closed = ndimage.binary_fill_holes(ndimage.binary_closing(padded, disc))[reach:-reach, reach:-reach]
    labels, count = ndimage.label(closed, np.ones((3, 3)))
    areas = np.bincount(labels.ravel(), minlength=count + 1)
    areas[0] = 0
    return (areas >= 8 * (size / 256) ** 2)[labels]


def _clearly_visible(flawless: np.ndarray, defective: np.ndarray, mask: np.ndarray) -> bool:
    """Whether a person would see the defect, even in the picture shrunk to half its size."""
    half = [ndimage.uniform_filter(p, (2, 2, 1))[::2, ::2] for p in (flawless, defective)]
    strength = np.abs(half[1] - half[0]).max(axis=2)
    enough = 24 * (flawless.shape[0] / 256) ** 2
    return bool(mask.any()) and np.count_nonzero(strength > 28) >= enough


# --- public functions ------------------------------------------------------------------------------------------------


def render_part(rng: np.random.Generator, size: int = 256) -> np.ndarray:
    """Photograph a flawless part.

    Args:
        rng: Source of pose, light, texture and sensor noise; equal states give equal pictures.
        size: Side of the picture in pixels, at least 64.

    Returns:
        (size, size, 3) uint8 RGB.

    Raises:
        ValueError: If `size` is too small.
    """
    _check_size(size)
    shot = _draw_shot(rng, size)
    return _expose(_photograph(_new_surface(_canvas_side(size), NORMAL_LAYOUT), shot), shot)


def render_defective_part(
    rng: np.random.Generator, defect_type: str, size: int = 256
) -> tuple[np.ndarray, np.ndarray]:
    """Photograph a part with one defect; without it, the picture would be `render_part` of the same `rng` state.

    Args:
        rng: Source of randomness; equal states give equal pictures.
        defect_type: One of `DEFECT_TYPES`.
        size: Side of the picture in pixels, at least 64.

    Returns:
        The picture, (size, size, 3) uint8 RGB, and the mask of its visibly changed pixels, (size, size) bool.

    Raises:
        ValueError: If `size` is too small or the defect type is unknown.
    """
    _check_size(size)
    if defect_type not in DEFECT_TYPES:
        raise ValueError(f"unknown defect type {defect_type!r}; choose one of {', '.join(DEFECT_TYPES)}")
    shot = _draw_shot(rng, size)
    n = _canvas_side(size)
    flawless = _photograph(_new_surface(n, NORMAL_LAYOUT), shot)
    while True:
        if defect_type in _SURFACE_DEFECTS:
            surface = _new_surface(n, NORMAL_LAYOUT)
            _SURFACE_DEFECTS[defect_type](surface, rng)
        else:
            surface = _new_surface(n, _missing_feature(NORMAL_LAYOUT, rng))
        defective = _photograph(surface, shot)
        mask = _changed_pixels(flawless, defective, gap=2 if defect_type in _THIN_DEFECTS else 4)
        # Light may hide a defect, as in life; a test set should hold those that a person can see.
        if _clearly_visible(flawless, defective, mask):
            return _expose(defective, shot), mask


def _check_size(size: int) -> None:
    if size < MIN_SIZE:
        raise ValueError(f"size must be at least {MIN_SIZE} pixels, got {size}")


@dataclass(frozen=True)
class _Job:
    folder: Path
    split: str
    defect_type: str
    index: int
    seed: int
    size: int


def _write(job: _Job) -> None:
    """Render and save one picture, from a random stream that only its seed, split, type and index decide."""
    stream = zlib.crc32(f"{job.split}/{job.defect_type}".encode())
    rng = np.random.default_rng(np.random.SeedSequence([job.seed, stream, job.index]))
    target = job.folder / job.split / job.defect_type / f"{job.index:03d}.png"
    if job.defect_type == "good":
        Image.fromarray(render_part(rng, job.size)).save(target, compress_level=PNG_EFFORT)
        return
    picture, mask = render_defective_part(rng, job.defect_type, job.size)
    Image.fromarray(picture).save(target, compress_level=PNG_EFFORT)
    truth = job.folder / "ground_truth" / job.defect_type / f"{job.index:03d}_mask.png"
    Image.fromarray(mask.astype(np.uint8) * 255).save(truth)


def generate(
    out: str | Path,
    seed: int,
    *,
    train: int = 300,
    test_good: int = 100,
    test_defective: int = 100,
    size: int = 256,
    workers: int = 1,
    progress: bool = False,
) -> Path:
    """Write a whole category in the MVTec AD layout, `out`/demo-part/{train,test,ground_truth}.

    A picture depends on the seed and on its own place (split, type, index) alone, so larger sets begin with the
    smaller ones and the number of workers changes nothing.

    Args:
        out: Folder to create; may exist if it is empty.
        seed: Seed of the whole set, at least 0.
        train: Number of normal training pictures.
        test_good: Number of normal test pictures.
        test_defective: Number of defective test pictures, shared evenly among `DEFECT_TYPES`.
        size: Side of the pictures in pixels.
        workers: Number of processes.
        progress: Whether to show a progress bar.

    Returns:
        The category's folder.

    Raises:
        ValueError: If a number is out of range.
        FileExistsError: If `out` is a file or a folder that is not empty.
        OSError: If `out` cannot be written.
    """
    _check_size(size)
    counts = {"train": train, "test_good": test_good, "test_defective": test_defective}
    for name, value in {"seed": seed, **counts}.items():
        if value < 0:
            raise ValueError(f"{name} must not be negative, got {value}")
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not an empty folder; choose another one or remove it")

    folder = out / CATEGORY
    share, rest = divmod(test_defective, len(DEFECT_TYPES))
    wanted = [("train", "good", train), ("test", "good", test_good)]
    wanted += [("test", name, share + (i < rest)) for i, name in enumerate(DEFECT_TYPES)]
    jobs = [_Job(folder, split, name, i, seed, size) for split, name, count in wanted for i in range(count)]
    try:
        for split, name, count in wanted:
            if count or name == "good":
                (folder / split / name).mkdir(parents=True, exist_ok=True)
            if count and name != "good":
                (folder / "ground_truth" / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot create {folder}: {error.strerror}; choose a folder that can be written") from error

    def run(done: Iterable[None]) -> None:
        for _ in tqdm(done, total=len(jobs), unit="image", disable=not progress):
            pass

    if workers == 1:
        run(map(_write, jobs))
    else:
        # A fresh interpreter each: forking a process that already runs threads may hang.
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            run(pool.map(_write, jobs, chunksize=4))
    return folder


def main(argv: list[str] | None = None) -> int:
    """Command line of the generator; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m demo_part.generate", description="Make photographs of a machined part, normal and defective."
    )
    add = partial(parser.add_argument, type=int)
    parser.add_argument("--out", type=Path, required=True, help="folder to create (the category lands in it)")
    add("--seed", required=True, help="seed of the set; equal seeds give equal files")
    add("--train", default=300, help="normal training pictures (default: %(default)s)")
    add("--test-good", default=100, help="normal test pictures (default: %(default)s)")
    add("--test-defective", default=100, help="defective test pictures over all types (default: %(default)s)")
    add("--size", default=256, help="side of the pictures in pixels (default: %(default)s)")
    add("--workers", default=2, help="processes (default: %(default)s)")
    options = vars(parser.parse_args(argv))
    try:
        folder = generate(progress=True, **options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
