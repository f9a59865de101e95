"""The drawing of a machined flange as a height field with material maps, and the textures of its materials.

Lengths are fractions of the picture's width; the origin is the part's centre, x to the right and y downwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

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


# x, y, radius
HOLES = (
    (-BOLT_OFFSET, -BOLT_OFFSET, BOLT_RADIUS),
    (BOLT_OFFSET, -BOLT_OFFSET, BOLT_RADIUS),
    (-BOLT_OFFSET, BOLT_OFFSET, BOLT_RADIUS),
    (BOLT_OFFSET, BOLT_OFFSET, BOLT_RADIUS),
    (0.318, 0.0, 0.020),
)
# text, x, y, letter height
TEXTS = (("FX-2047", 0.0, 0.318, 0.072), ("DN25", 0.0, -0.318, 0.062))


@dataclass
class Surface:
    """The scene in the part's own frame; every array is (n, n) float32 on the supersampled canvas."""

    height: np.ndarray  # over the table, in picture widths
    metal: np.ndarray  # coverage in [0, 1]; the rest is the table
    albedo: np.ndarray  # factor on the colour of the metal
    gloss: np.ndarray  # factor on the mirror-like part of the reflection
    stain: np.ndarray  # opacity in [0, 1]
    stain_colour: tuple[float, float, float] = (0.0, 0.0, 0.0)  # linear RGB

    @property
    def side(self) -> int:
        return len(self.height)

    @property
    def pixels_per_unit(self) -> float:
        return self.side / CANVAS_WIDTH


def canvas_side(size: int) -> int:
    return round(CANVAS_WIDTH * SUPERSAMPLING * size)


@lru_cache(maxsize=2)
def grid(n: int) -> tuple[np.ndarray, np.ndarray]:
    axis = ((np.arange(n, dtype=np.float32) + 0.5) / n - 0.5) * np.float32(CANVAS_WIDTH)
    return axis[None, :], axis[:, None]


def _engraving(n: int, text: str, x: float, y: float, letter_height: float) -> np.ndarray:
    """Depth profile of a text in [0, 1], (n, n): flat bottom, flanks as wide as a cutter's tip."""
    scale = n / CANVAS_WIDTH
    canvas = Image.new("L", (n, n))
    font = ImageFont.load_default(size=letter_height * scale * 1.35)
    at, stroke = (n / 2 + x * scale, n / 2 + y * scale), max(1, round(0.002 * scale))
    ImageDraw.Draw(canvas).text(at, text, fill=255, font=font, anchor="mm", stroke_width=stroke)
    return ndimage.gaussian_filter(np.asarray(canvas, np.float32) / 255, 0.0018 * scale)


@lru_cache(maxsize=8)
def _drawn_part(n: int, holes: tuple, texts: tuple) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Height, metal coverage and albedo, each (n, n)."""
    x, y = grid(n)
    scale = n / CANVAS_WIDTH
    qx, qy = (np.abs(axis) - (PLATE_HALF - PLATE_CORNER) for axis in (x, y))
    inside = PLATE_CORNER - np.hypot(np.maximum(qx, 0), np.maximum(qy, 0)) - np.minimum(np.maximum(qx, qy), 0)
    height = PLATE_THICKNESS - CHAMFER_SLOPE * np.maximum(CHAMFER - inside, 0)
    metal = np.clip(inside * scale + 0.5, 0, 1)

    radius = np.hypot(x, y)
    height += BOSS_HEIGHT * np.clip((BOSS_RADIUS - radius) / 0.022, 0, 1)
    groove = np.clip((GROOVE_WIDTH / 2 - np.abs(radius - GROOVE_RADIUS)) / 0.006, 0, 1)
    height -= GROOVE_DEPTH * groove
    # Oil and dust stay in what is cut in.
    albedo = 1 - 0.25 * groove
    for text in texts:
        engraving = _engraving(n, *text)
        height -= ENGRAVING_DEPTH * engraving
        albedo -= 0.4 * engraving
    for hx, hy, hole_radius in (*holes, (0.0, 0.0, BORE_RADIUS)):
        outside = np.hypot(x - hx, y - hy) - hole_radius
        height -= CHAMFER_SLOPE * np.maximum(min(CHAMFER, hole_radius / 3) - np.maximum(outside, 0), 0)
        metal *= np.clip(outside * scale + 0.5, 0, 1)
    return tuple(field.astype(np.float32) for field in (height * metal, metal, albedo))


def new_surface(n: int, holes: tuple = HOLES, texts: tuple = TEXTS) -> Surface:
    height, metal, albedo = (field.copy() for field in _drawn_part(n, holes, texts))
    # What is cut in is also duller.
    return Surface(height, metal, albedo, gloss=albedo.copy(), stain=np.zeros_like(height))


def _unit_variance(field: np.ndarray) -> np.ndarray:
    return ((field - field.mean()) / field.std()).astype(np.float32)


@lru_cache(maxsize=2)
def textures(n: int) -> dict[str, np.ndarray]:
    """Periodic texture tiles of zero mean and unit variance, (n, n); a picture takes them at its own phase."""
    rng = np.random.default_rng(20470)
    scale = n / CANVAS_WIDTH

    def blurred_noise(sigma: float | tuple[float, float], axes: tuple[int, int] = (0, 1)) -> np.ndarray:
        noise = rng.standard_normal((n, n), dtype=np.float32)
        return _unit_variance(ndimage.gaussian_filter(noise, np.multiply(sigma, scale), mode="wrap", axes=axes))

    def streaks(length: float, width: float) -> np.ndarray:
        return blurred_noise((length, width), axes=(1, 0))

    brushed = _unit_variance(streaks(0.06, 0.0011) + 0.8 * streaks(0.15, 0.0025) + 0.5 * streaks(0.3, 0.006))
    crystals = blurred_noise(0.0022)
    granite = blurred_noise(0.0013) * 0.6 + np.maximum(crystals - 0.9, 0) * 2.2 - np.maximum(-crystals - 1.2, 0)
    return {
        "brushed": brushed,
        "turned": _unit_variance(streaks(0.10, 0.0014) + 0.9 * streaks(1.0, 0.0028)),
        "grain": blurred_noise(0.0012),
        "fracture": blurred_noise(0.0045),
        "cloud": blurred_noise(0.05),
        "granite": _unit_variance(granite),
    }


def at_phase(tile: np.ndarray, phase: np.ndarray) -> np.ndarray:
    n = tile.shape[0]
    return np.roll(tile, (int(phase[0] * n), int(phase[1] * n)), axis=(0, 1))
