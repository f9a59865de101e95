"""One photograph of the part: pose, light, shading, lens and sensor."""

from __future__ import annotations

import math
from functools import lru_cache
from types import SimpleNamespace

import numpy as np
from PIL import Image
from scipy import ndimage

from .part import (
    BOSS_RADIUS,
    CANVAS_WIDTH,
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
# What differs between two photographs of flawless parts, as ranges; angles in degrees.
_RANGES = {
    "angle": (-4, 4),
    "scale": (0.98, 1.02),
    "shift_x": (-0.03, 0.03),
    "shift_y": (-0.03, 0.03),
    "light_azimuth": (-130, -110),
    "light_tilt": (0.36, 0.44),
    "light_power": (0.92, 1.08),
    "ambient": (0.9, 1.1),
    "warmth": (-0.02, 0.03),
    "roughness": (0.92, 1.08),
    "table_tone": (0.9, 1.1),
    "blur": (0.35, 0.6),
    "vignetting": (0.10, 0.2),
}


def draw_shot(rng: np.random.Generator, size: int) -> SimpleNamespace:
    """A value from each of `_RANGES`, offsets into the texture tiles in [0, 1), and sensor noise of unit variance."""
    shot = SimpleNamespace(size=size, **{name: rng.uniform(*limits) for name, limits in _RANGES.items()})
    shot.angle, shot.light_azimuth = math.radians(shot.angle), math.radians(shot.light_azimuth)
    # The sixth is not used, but without it all later random numbers would change.
    shot.phases = rng.random((6, 2))
    shot.sensor_noise = rng.standard_normal((size, size, 3), dtype=np.float32)
    return shot


@lru_cache(maxsize=2)
def _boss_frame(n: int) -> tuple[slice, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The turned boss: its box on the canvas, weight, cosine and sine of the angle, index into the texture."""
    half = math.ceil((BOSS_RADIUS + 0.01) * n / CANVAS_WIDTH)
    box = slice(n // 2 - half, n // 2 + half)
    x, y = grid(n)
    x, y = x[:, box], y[box]
    radius = np.maximum(np.hypot(x, y), 1e-6)
    rows = (radius * (n / CANVAS_WIDTH)).astype(np.int32)
    columns = ((np.arctan2(y, x) / (2 * np.pi) + 0.5) * n).astype(np.int32)
    weight = np.clip((BOSS_RADIUS - radius) / 0.006, 0, 1)
    return box, weight, x / radius, y / radius, rows * n + columns


def _cast_shadow(height: np.ndarray, direction: tuple[float, float], scale: float) -> np.ndarray:
    """Share of the light that is blocked, (n, n): march from each point towards the light, at half resolution."""
    low = height[::2, ::2]
    blocked = np.zeros_like(low)
    for distance in np.linspace(0.006, 0.075, 9):
        dx, dy = (round(c * distance * scale / 2) for c in direction)
        blocked = np.maximum(blocked, np.roll(low, (-dy, -dx), axis=(0, 1)) - low - np.float32(distance * 1.1))
    blocked = ndimage.uniform_filter(np.minimum(blocked / 0.012, 1), max(3, round(0.012 * scale / 2)))
    return _enlarged(blocked, len(height))


def _enlarged(low: np.ndarray, n: int) -> np.ndarray:
    return np.asarray(Image.fromarray(low).resize((n, n), Image.Resampling.BILINEAR))


def _shade(surface: Surface, shot: SimpleNamespace) -> np.ndarray:
    """Light every point of the canvas: (n, n, 3) linear RGB."""
    n, scale = surface.side, surface.pixels_per_unit
    x, y = grid(n)
    grain, brushed, turned, cloud, granite = (
        at_phase(textures(n)[name], phase)
        for name, phase in zip(("grain", "brushed", "turned", "cloud", "granite"), shot.phases, strict=False)
    )
    slope_y, slope_x = (np.clip(-scale * g, -MAX_SLOPE, MAX_SLOPE) for g in np.gradient(surface.height))

    # The light in the part's frame, which the camera sees turned by `angle`.
    azimuth = shot.light_azimuth - shot.angle
    to_light = (math.cos(azimuth), math.sin(azimuth))
    # A mirror facet shines if its slope is that of the half vector; a near light makes that slope vary over the part.
    off_x = slope_x + (0.55 * x - np.float32(shot.light_tilt * to_light[0]))
    off_y = slope_y + (0.55 * y - np.float32(shot.light_tilt * to_light[1]))

    # Brushed along x: facets scatter across the brushing direction far more than along it.
    along, across = 0.30 * shot.roughness, 0.62 * shot.roughness
    lobe = np.square(off_x * np.float32(1 / along)) + np.square((off_y + 0.07 * brushed) * np.float32(1 / across))
    tone = 0.035 * brushed
    # The boss is turned, so the same holds along and across circles.
    box, weight, cosine, sine, index = _boss_frame(n)
    turned = np.take(turned, index)
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
    open_sky = 1 - np.clip(_enlarged(hollow, n) / 0.055, 0, 0.75)
    lit = 1 - 0.9 * _cast_shadow(surface.height, to_light, scale)

    metal = 0.17 * shot.ambient * open_sky + 0.20 * shot.light_power * lit * diffuse
    metal *= 1 + tone + 0.02 * grain + 0.03 * cloud
    metal *= surface.albedo
    glare = (0.66 * shot.light_power) * lit * mirror * (1 + 0.03 * grain)
    table = np.maximum(0.052 + 0.017 * granite, 0.008) * shot.table_tone
    table *= 0.45 * open_sky**2 + 0.8 * lit

    # A warm lamp in a room of cool daylight.
    metal_tint = (0.97, 1.0, 1.05)
    glare_tint = (1.02 + shot.warmth, 1.0, 0.96 - shot.warmth)
    table_tint = (0.93, 1.0, 1.10)
    colour = np.empty((n, n, 3), np.float32)
    for channel in range(3):
        of_metal = metal * metal_tint[channel] + glare * glare_tint[channel]
        # A stain lets some metal through and lies in the same light.
        of_metal *= 1 - surface.stain + surface.stain * surface.stain_colour[channel]
        of_table = table * table_tint[channel]
        colour[..., channel] = of_table + surface.metal * (of_metal - of_table)
    return colour


def photograph(surface: Surface, shot: SimpleNamespace) -> np.ndarray:
    """Shade, place before the camera and develop: (size, size, 3) float32 in [0, 255], before sensor noise."""
    size, wide, middle = shot.size, SUPERSAMPLING * shot.size, surface.side / 2
    cosine, sine = math.cos(shot.angle) / shot.scale, math.sin(shot.angle) / shot.scale
    x, y = wide / 2 + shot.shift_x * wide, wide / 2 + shot.shift_y * wide
    to_canvas = (cosine, sine, middle - cosine * x - sine * y, -sine, cosine, middle + sine * x - cosine * y)
    picture = np.empty((size, size, 3), np.float32)
    for channel, colour in enumerate(np.moveaxis(_shade(surface, shot), 2, 0)):
        placed = Image.fromarray(np.ascontiguousarray(colour)).transform(
            (wide, wide), Image.Transform.AFFINE, to_canvas, Image.Resampling.BILINEAR
        )
        reduced = np.asarray(placed.reduce(SUPERSAMPLING))
        picture[..., channel] = ndimage.gaussian_filter(reduced, shot.blur * size / 256, truncate=3)

    x = np.linspace(-1, 1, size, dtype=np.float32)
    y = x[:, None]
    towards_light = x * math.cos(shot.light_azimuth) + y * math.sin(shot.light_azimuth)
    picture *= (1 + 0.13 * towards_light - shot.vignetting * (x**2 + y**2) / 2)[..., None]
    # A film-like shoulder keeps highlights from clipping.
    picture /= 1 + 0.28 * picture
    return np.power(np.clip(picture, 0, 1), np.float32(1 / 2.2)) * 255


def expose(picture: np.ndarray, shot: SimpleNamespace) -> np.ndarray:
    """Add the sensor's noise and quantise: (size, size, 3) uint8."""
    return np.clip(picture + 2.2 * shot.sensor_noise + 0.5, 0, 255).astype(np.uint8)


def render_part(rng: np.random.Generator, size: int = 256) -> np.ndarray:
    """Photograph a flawless part: (size, size, 3) uint8 RGB; equal states of `rng` give equal pictures.

    Raises:
        ValueError: If `size` is below 64 pixels.
    """
    check_size(size)
    shot = draw_shot(rng, size)
    return expose(photograph(new_surface(canvas_side(size)), shot), shot)


def check_size(size: int) -> None:
    if size < MIN_SIZE:
        raise ValueError(f"size must be at least {MIN_SIZE} pixels, got {size}")
