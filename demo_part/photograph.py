"""One photograph of the part: pose, light, shading, lens and sensor."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image
from scipy import ndimage

from .part import (
    BOSS_RADIUS,
    CANVAS_WIDTH,
    NORMAL_LAYOUT,
    SUPERSAMPLING,
    Surface,
    at_phase,
    canvas_side,
    grid,
    new_surface,
    textures,
)

MIN_SIZE = 64
MAX_SLOPE = 2.0


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


def draw_shot(rng: np.random.Generator, size: int) -> Shot:
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


@lru_cache(maxsize=2)
def _boss_frame(n: int) -> tuple[slice, np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The turned boss: its box on the canvas, weight, cosine and sine of the angle, texture rows and columns."""
    half = math.ceil((BOSS_RADIUS + 0.01) * n / CANVAS_WIDTH)
    box = slice(n // 2 - half, n // 2 + half)
    x, y = grid(n)
    x, y = x[:, box], y[box]
    radius = np.maximum(np.hypot(x, y), 1e-6)
    rows = (radius * (n / CANVAS_WIDTH)).astype(np.int32)
    columns = ((np.arctan2(y, x) / (2 * np.pi) + 0.5) * n).astype(np.int32)
    weight = np.clip((BOSS_RADIUS - radius) / 0.006, 0, 1)
    return box, weight, x / radius, y / radius, rows, columns


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
    x, y = grid(n)
    tiles = textures(n)
    grain = at_phase(tiles["grain"], shot.phases[0])
    brushed = at_phase(tiles["brushed"], shot.phases[1])

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
    turned = np.take(at_phase(tiles["turned"], shot.phases[2]), rows * n + columns)
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

    cloud = at_phase(tiles["cloud"], shot.phases[3])
    metal = (0.17 * shot.ambient * open_sky + 0.20 * shot.light_power * lit * diffuse) * (
        1 + tone + 0.02 * grain + 0.03 * cloud
    )
    metal *= surface.albedo
    glare = (0.66 * shot.light_power) * lit * mirror * (1 + 0.03 * grain)

    granite = at_phase(tiles["granite"], shot.phases[4])
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


def photograph(surface: Surface, shot: Shot) -> np.ndarray:
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


def expose(picture: np.ndarray, shot: Shot) -> np.ndarray:
    """Add the sensor's noise and quantise: (size, size, 3) uint8."""
    return np.clip(picture + 2.2 * shot.sensor_noise + 0.5, 0, 255).astype(np.uint8)


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
    check_size(size)
    shot = draw_shot(rng, size)
    return expose(photograph(new_surface(canvas_side(size), NORMAL_LAYOUT), shot), shot)


def check_size(size: int) -> None:
    if size < MIN_SIZE:
        raise ValueError(f"size must be at least {MIN_SIZE} pixels, got {size}")
