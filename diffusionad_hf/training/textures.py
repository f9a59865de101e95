"""Textures for synthetic anomalies: from a folder such as DTD's, or procedural ones."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from scipy import ndimage
from scipy.spatial import KDTree

from ..files import files_below
from ..images_diffusionad import IMAGE_SUFFIXES, to_uint8
from .dataset import digest_of

logger = logging.getLogger(__name__)


class FolderTextures:
    """The images below a folder, decoded once.

    If there are more than `limit` images, evenly spaced ones of the sorted list are used, so every subfolder of DTD
    is represented. Each is scaled to cover the size and cropped at the centre (the reference distorts it).

    Args:
        folder: searched recursively for images.
        size: height and width of the textures in pixels, or one number for squares.
        limit: largest number of images kept, of `3 * H * W` bytes each: 0.4 GB for 2,000 of 256 x 256 px.

    Attributes:
        bank: `(K, 3, H, W)` uint8.
        digest: of the files' names and sizes.

    Raises:
        FileNotFoundError: if the folder does not exist.
        ValueError: if no image in it can be read.
    """

    def __init__(self, folder: str | Path, size: int | tuple[int, int], limit: int = 2000) -> None:
        folder = Path(folder)
        height, width = np.broadcast_to(size, 2).tolist()
        if not folder.is_dir():
            raise FileNotFoundError(f"texture folder {folder} does not exist; without one, use ProceduralTextures")
        paths = [path for path in files_below(folder) if path.suffix.lower() in IMAGE_SUFFIXES]
        paths = [paths[i * len(paths) // limit] for i in range(limit)] if len(paths) > limit else paths
        bank = []
        for path in paths:
            try:
                with Image.open(path) as image:
                    image.draft("RGB", (width, height))  # lets JPEG decode at a fraction of its size
                    fitted = ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.BICUBIC)
                    bank.append(torch.from_numpy(np.array(fitted)).permute(2, 0, 1))
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                logger.warning("texture %s skipped: %s", path, error)
        if not bank:
            raise ValueError(
                f"`texture_dir` {folder}: no readable image in it; give a folder of images such as DTD's, or leave it "
                "out to have textures made (ProceduralTextures)."
            )
        self.bank = torch.stack(bank)
        self.digest = digest_of(
            "".join(f"{path.relative_to(folder)} {path.stat().st_size}\n" for path in paths).encode()
        )


class ProceduralTextures:
    """Textures of six families in turn, each with random scale and colours.

    Noise of several spectra, warped stripes, warped checkers, Voronoi cells, gradients and blotches. Texture i depends
    only on size, seed and i. They are made as squares, which longer sides repeat as in mirrors.

    Args:
        size: height and width of the textures in pixels, or one number for squares.
        count: number of textures.
        seed: at least 0.

    Attributes:
        bank: `(count, 3, H, W)` uint8.
    """

    def __init__(self, size: int | tuple[int, int], count: int = 500, seed: int = 0) -> None:
        height, width = np.broadcast_to(size, 2).tolist()
        side = math.isqrt(height * width)
        rngs = [np.random.default_rng([seed, i]) for i in range(count)]
        bank = [_colored(_FAMILIES[i % len(_FAMILIES)](rng, side), rng) for i, rng in enumerate(rngs)]
        missing = [(0, 0), (0, 0), (0, max(height - side, 0)), (0, max(width - side, 0))]
        self.bank = torch.from_numpy(np.pad(np.stack(bank), missing, mode="symmetric")[..., :height, :width].copy())


def _smooth_noise(rng: np.random.Generator, size: int, exponent: float) -> np.ndarray:
    """`(size, size)` noise in [0, 1] whose amplitude falls with frequency^-exponent: 0 is white, 1 pink, 2 brown."""
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])
    frequency[0, 0] = 1 / size
    noise = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((size, size))) * frequency**-exponent, (size, size))
    return _stretched(noise)


def _stretched(field: np.ndarray) -> np.ndarray:
    """`field` scaled to [0, 1], clipped at its 1st and 99th percentile."""
    low, high = np.percentile(field, (1, 99))
    return np.clip((field - low) / max(high - low, 1e-8), 0, 1)


def _axes(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Two orthogonal coordinates in [-0.7, 0.7], turned by a random angle and bent a little."""
    y, x = (np.mgrid[:size, :size] + 0.5) / size - 0.5
    angle, bend = rng.uniform(0, np.pi), rng.choice([0.0, 0.05, 0.15])
    u, v = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    return u + bend * _smooth_noise(rng, size, 2), v + bend * _smooth_noise(rng, size, 2)


def _wave(position: np.ndarray, hard: bool) -> np.ndarray:
    wave = 0.5 + 0.5 * np.sin(2 * np.pi * position)
    return (wave > 0.5).astype(float) if hard else wave


def _noise(rng: np.random.Generator, size: int) -> np.ndarray:
    return _smooth_noise(rng, size, rng.uniform(0, 2))


def _stripes(rng: np.random.Generator, size: int) -> np.ndarray:
    return _wave(_axes(rng, size)[0] * rng.uniform(2, size / 6), rng.random() < 0.5)


def _checkers(rng: np.random.Generator, size: int) -> np.ndarray:
    u, v = _axes(rng, size)
    frequency, hard = rng.uniform(2, size / 12), rng.random() < 0.5
    a, b = _wave(u * frequency, hard), _wave(v * frequency * rng.uniform(0.5, 2), hard)
    return rng.choice([np.abs(a - b), a * b, np.maximum(a, b)])


def _cells(rng: np.random.Generator, size: int) -> np.ndarray:
    """Voronoi cells: a level for each, or the distance to the point, or to the border, or the borders alone."""
    points = rng.random((int(np.exp(rng.uniform(np.log(8), np.log(400)))), 2)) * size
    pixels = np.mgrid[:size, :size].reshape(2, -1).T
    distances, nearest = KDTree(points).query(pixels, k=2)
    border = distances[:, 1] - distances[:, 0]
    kind = rng.integers(4)
    if kind == 0:
        return rng.random(len(points))[nearest[:, 0]].reshape(size, size)
    field = (distances[:, 0], border, np.minimum(border, size / 100))[kind - 1]
    return _stretched(field.reshape(size, size))


def _gradient(rng: np.random.Generator, size: int) -> np.ndarray:
    u, v = _axes(rng, size)
    return _stretched(u if rng.random() < 0.5 else np.hypot(u - rng.uniform(-0.5, 0.5), v - rng.uniform(-0.5, 0.5)))


def _blotches(rng: np.random.Generator, size: int) -> np.ndarray:
    """Smooth noise cut into two to four levels, with soft edges."""
    noise = _smooth_noise(rng, size, rng.uniform(1.2, 2.5))
    levels = rng.integers(2, 5)
    cut = np.minimum(np.floor(noise * levels), levels - 1) / (levels - 1)
    return ndimage.gaussian_filter(cut, rng.uniform(0, 1.5))


_FAMILIES = (_noise, _stripes, _checkers, _cells, _gradient, _blotches)


def _colored(field: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """`(3, S, S)` uint8: a field in [0, 1] through a ramp of two to four colours, a quarter of them grey, grained."""
    colors = rng.random((rng.integers(2, 5), 3))
    colors = np.repeat(colors[:, :1], 3, axis=1) if rng.random() < 0.25 else colors
    stops = np.linspace(0, 1, len(colors))
    image = np.stack([np.interp(field, stops, colors[:, channel]) for channel in range(3)])
    image += rng.choice([0.0, 0.02, 0.06]) * rng.standard_normal(field.shape)
    return to_uint8(image)
