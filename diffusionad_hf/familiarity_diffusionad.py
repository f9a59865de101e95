"""Detects photos unlike anything a model was calibrated on.

An anomaly score says nothing about a photo of something else: a blank sheet often scores lower than a good part. So an
image is also compared with normal images, as a 16 x 16 grid of mean colours, local contrast and sharpness, each value
in units of its spread over the normal images. Only the nine tenths of the cells that differ least count, so that no
defect makes an image unfamiliar that covers less than a tenth of it. An image is unfamiliar if it is farther from all
normal images than 1.5 times the largest distance of one of them to its nearest neighbour: another object, place,
distance, exposure or focus, or a part that lies the wrong way round. `python -m benchmarks familiarity` measures it.
"""

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from .images_diffusionad import to_uint8

# Travels to the Hub beside the pipeline's file, which imports it and its one import of ours: names are added here and
# never taken away.
__all__ = ["Familiarity", "describe", "pixel_digest"]

CELLS = 16
DIGEST_LENGTH = 16
_LARGE = 4_000_000  # pixels
SLACK = 1.5
_COUNTED = CELLS * CELLS * 9 // 10
FEWEST_IMAGES, MOST_IMAGES = 5, 100


def describe(image: torch.Tensor) -> np.ndarray:
    """The grid of an image, (3, H, W) uint8 or float in [0, 1], as (16 * 16 * 5,) uint8.

    For each cell: mean red, green and blue, twice the standard deviation of the luminance and eight times the mean
    absolute value of its Laplacian.
    """
    if image.shape[1] * image.shape[2] > _LARGE:  # as floats, it would take a gigabyte
        image = F.interpolate(image[None], size=(1024, 1024), mode="bilinear", antialias=True)[0]
    # Contrast and sharpness are measured at one size, so that a photo and its thumbnail look alike.
    scale = 255 if image.dtype == torch.uint8 else 1
    pixels = F.interpolate(image[None].float() / scale, size=(128, 128), mode="bilinear", antialias=True)
    color = F.adaptive_avg_pool2d(pixels, CELLS)
    light = pixels.mean(dim=1, keepdim=True)
    variance = F.adaptive_avg_pool2d(light**2, CELLS) - F.adaptive_avg_pool2d(light, CELLS) ** 2
    around = F.pad(light, (1, 1, 1, 1), mode="replicate")
    neighbours = around[..., :-2, 1:-1] + around[..., 2:, 1:-1] + around[..., 1:-1, :-2] + around[..., 1:-1, 2:]
    sharpness = F.adaptive_avg_pool2d((light - neighbours / 4).abs(), CELLS)
    grid = torch.cat([color, 2 * variance.clamp(min=0).sqrt(), 8 * sharpness], dim=1).flatten()
    return to_uint8(grid).numpy()


@dataclass(frozen=True)
class Familiarity:
    """Grids of normal images, (N, 1280) uint8, and the largest distance from them that is still familiar."""

    grids: np.ndarray
    limit: float

    @classmethod
    def of(cls, grids: Sequence[np.ndarray]) -> "Familiarity | None":
        """Learns from the grids of normal images of one kind; None if there are too few of them to tell."""
        if len(grids) < FEWEST_IMAGES:
            return None
        known = np.stack(grids[:MOST_IMAGES])
        between = np.stack([_distances(grid, known) for grid in known])
        np.fill_diagonal(between, np.inf)
        # At least 4 of 255 levels: copies of one image are no reason to reject the next one for its sensor noise.
        least = 4 / float(_spread(known).mean())
        return cls(known, SLACK * max(float(between.min(axis=1).max()), least))

    def strangeness(self, image: torch.Tensor | np.ndarray) -> float:
        """How far an image, (3, H, W), or its grid is from the closest normal one; above 1 it is unfamiliar."""
        grid = image if isinstance(image, np.ndarray) else describe(image)
        return float(_distances(grid, self.grids).min()) / self.limit

    def to_json(self) -> dict:
        return {"limit": self.limit, "grids": [base64.b64encode(grid.tobytes()).decode() for grid in self.grids]}

    @classmethod
    def from_json(cls, data: dict) -> "Familiarity":
        """Reads what `to_json` gave; raises a ValueError if it is something else."""
        try:
            decoded = [np.frombuffer(base64.b64decode(grid, validate=True), np.uint8) for grid in data["grids"]]
            grids, limit = np.stack(decoded), float(data["limit"])
            if grids.shape[1] != CELLS * CELLS * 5 or len(grids) > MOST_IMAGES or not 0 < limit < np.inf:
                raise ValueError("out of range")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError("the description of normal images is damaged") from error
        return cls(grids, limit)


def _spread(grids: np.ndarray) -> np.ndarray:
    """How much each value varies over normal images, in levels, never so little that noise would decide."""
    spread = grids.astype(np.float32).std(axis=0)
    return spread + 0.15 * spread.mean() + 1


def _distances(grid: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Root mean square difference to each of the others in the cells that differ least, in units of their spread."""
    difference = (grid.astype(np.float32) - others.astype(np.float32)) / _spread(others)
    cells = (difference**2).reshape(len(others), -1, CELLS * CELLS).mean(axis=1)
    return np.sqrt(np.partition(cells, _COUNTED, axis=1)[:, :_COUNTED].mean(axis=1))


def pixel_digest(image: torch.Tensor) -> str:
    """
    Tells an image that the model was trained on: the first 16 hexadecimal digits of the SHA-256 of its pixels,
    `(3, S, S)` at the model's own size, rounded to 8 bits.
    """
    return hashlib.sha256(to_uint8(image).contiguous().numpy().tobytes()).hexdigest()[:DIGEST_LENGTH]
