"""Synthetic anomalies on normal images: Perlin-shaped patches of foreign texture, a batch at a time, on its device.

The distributions are those of the reference (`data/dataset_beta_thresh.py`, `data/perlin.py`), which builds one image
at a time with OpenCV and imgaug. Every random number of a sample comes from a counter-based stream keyed on (seed,
epoch, index), so a sample does not depend on its batch or on the number of workers and processes.

Small deviations from the reference: colours are float32, not rounded to 8 bits between operations; brightness changes
act on the luma alone (imgaug draws one of several colour spaces); the object's foreground is binary (the reference
keeps the grey edge of a resized one); the foreground of textured categories is a random rectangle (the reference
downloads mask files).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .batches import column, replace, rotate, select, shift
from .colors import OPERATIONS_PER_SOURCE, change_colors
from .erasing import erase

PERLIN_SCALES = (0, 6)  # the noise has 2^k cells along an axis, k in [low, high), each axis on its own
THRESHOLD = 0.5  # noise above it is anomalous; noise lies in [-1, 1]
OPACITY = (0.2, 0.8)  # bounds of an anomaly's opacity, drawn uniformly for each image
TILES = 8  # strips per axis of the self-augmented source
MAX_ATTEMPTS = 50  # Perlin fields tried before an image stays normal
ATTEMPTS_AT_ONCE = 8  # bounds memory: this many fields an image are evaluated together
IMAGES_AT_ONCE = 1  # on a CPU, so that an image stays in the cache; a GPU takes the whole batch; same result

# Every sample draws all of these uniform numbers, used or not, so that no option changes the others' numbers.
_DRAWS = {
    "anomalous": 1,
    "cells": 2,
    "opacity": 1,
    "source": 1,
    "texture": 1,
    "operations": 10,
    "parameters": 3 * OPERATIONS_PER_SOURCE,
    "rows": 2 * TILES,
    "columns": 2 * TILES,
    "region": 4,
    "rotations": MAX_ATTEMPTS,
    "line": 2,
    "displaced": 3,
    "erased": 3,
}


class Textures(Protocol):
    """A source of textures, such as those of `training.textures`."""

    bank: Tensor


@dataclass(frozen=True)
class SyntheticBatch:
    """A batch in which some images have a synthetic anomaly.

    Attributes:
        images: `(N, 3, H, W)`, dtype and device of the input; bit for bit the input where `masks` is 0.
        masks: `(N, 1, H, W)` float32, 1 on the anomaly.
        labels: `(N,)` int64, 1 where the mask is not empty.
    """

    images: Tensor
    masks: Tensor
    labels: Tensor


class AnomalySynthesizer:
    """Puts synthetic anomalies on normal images (paper, section 3.4; reference: `perlin_synthetic`).

    Args:
        textures: source of foreign texture; its `bank` is `(K, 3, S, S)` uint8, resized to the images if necessary.
        seed: with the epoch and an image's index it determines everything drawn for that image.
        anomaly_probability: share of the images that get an anomaly.
        self_augmentation_probability: share of the anomalies made from the image itself (colours changed, 8 x 8 tiles
            shuffled) instead of a texture. The reference: 0.5 for objects, 0 for textured categories.
        line_probability: share of the anomalies that are thin lines (zero crossings of the noise, in a random part of
            the image) instead of blobs, for scratches and cracks. Not in the reference.
        displaced_probability: share of the anomalies that are opaque copies of another part of the image, moved by 0.1
            to 0.4 of its size, for misplaced features. Not in the reference.
        erased_probability: share of the anomalies that cover some structure, preferably an isolated one, with a plain
            piece of the product, for missing features. Not in the reference.
    """

    def __init__(
        self,
        textures: Textures,
        *,
        seed: int = 0,
        anomaly_probability: float = 0.5,
        self_augmentation_probability: float = 0.5,
        line_probability: float = 0.0,
        displaced_probability: float = 0.0,
        erased_probability: float = 0.0,
    ) -> None:
        self.seed = seed
        self.anomaly_probability = anomaly_probability
        self.self_augmentation_probability = self_augmentation_probability
        self.line_probability = line_probability
        self.displaced_probability = displaced_probability
        self.erased_probability = erased_probability
        self._bank = textures.bank
        self.texture_digest: str | None = getattr(textures, "digest", None)

    @torch.no_grad()
    def __call__(
        self, images: Tensor, indices: Sequence[int] | Tensor, epoch: int, foreground: Tensor | None = None
    ) -> SyntheticBatch:
        """Returns the images, some of them with an anomaly.

        Args:
            images: `(N, 3, H, W)` floating point in [0, 1], on any device; not modified.
            indices: N indices of the images in their dataset.
            epoch: at least 0.
            foreground: `(N, 1, H, W)`, above 0.5 where an anomaly may be. None, for textured categories: a random
                rectangle for each image.
        """
        height, width = images.shape[-2:]
        masks = torch.zeros(len(images), 1, height, width, device=images.device)
        labels = torch.zeros(len(images), dtype=torch.int64, device=images.device)

        streams = [_stream(self.seed, epoch, int(index)) for index in indices]
        draws = _named(np.stack([stream.random(sum(_DRAWS.values())) for stream in streams]))
        chosen = np.flatnonzero(draws["anomalous"][:, 0] < self.anomaly_probability)
        result = images.clone()
        step = max(len(chosen), 1) if images.is_cuda else IMAGES_AT_ONCE
        for rows in (chosen[i : i + step] for i in range(0, len(chosen), step)):
            # For a single image, a slice avoids a copy.
            where = slice(rows[0], rows[0] + 1) if len(rows) == 1 else torch.from_numpy(rows).to(images.device)
            part = {name: values[rows] for name, values in draws.items()}
            if foreground is None:
                allowed = _rectangles(part["region"], height, width).to(images.device)
            else:
                allowed = (foreground.to(images.device)[where].float() - 0.5).gt_(0)
            mask = self._masks([streams[row] for row in rows], part, allowed)
            normal = images[where].to(torch.promote_types(images.dtype, torch.float32))
            source = self._sources(normal.float(), part).to(normal.dtype)
            low, high = OPACITY
            # The reference draws the image's weight from U(0.2, 0.8), which is the same by symmetry.
            opacity = low + part["opacity"] * (high - low)
            displaced = part["displaced"][:, 0] < self.displaced_probability
            if displaced.any():
                own = select(normal, displaced)
                moved = _move(own, part["displaced"][displaced, 1:])
                mask = replace(mask, displaced, select(mask, displaced) * _differs(own, moved))
                source = replace(source, displaced, moved)
                opacity[displaced] = 1
            erased = part["erased"][:, 0] < self.erased_probability
            if erased.any():
                own = select(normal, erased)
                filled = erase(own, select(allowed, erased), part["erased"][erased, 1:])
                reach = math.isqrt(height * width) // 64 * 2 + 1  # to cover the feature's faint edges too
                covered = F.max_pool2d(_differs(own, filled), reach, 1, reach // 2)
                mask = replace(mask, erased, select(allowed, erased) * covered)
                source = replace(source, erased, filled)
                opacity[erased] = 1
            opacity = column(opacity, normal)
            blended = torch.addcmul(normal, mask * opacity, source.sub_(normal))  # exactly `normal` outside the mask
            result[where] = blended.to(images.dtype)
            masks[where] = mask
            labels[where] = mask.flatten(1).amax(1).long()
        return SyntheticBatch(result, masks, labels)

    def _masks(self, streams: list[np.random.Generator], draws: dict[str, np.ndarray], allowed: Tensor) -> Tensor:
        """Thresholded, rotated Perlin noise inside `allowed`, both `(n, 1, H, W)` of 0 and 1.

        As in the reference, a field with nothing inside is redrawn, up to 50 times; after that the mask stays empty.
        """
        low, high = PERLIN_SCALES
        cells = 2 ** (low + (draws["cells"] * (high - low)).astype(np.int64))
        lines = draws["line"][:, 0] < self.line_probability
        displaced = draws["displaced"][:, 0] < self.displaced_probability
        # More cells would give many tangled lines, and displaced pieces too small to cover a feature.
        cells[lines | displaced] = np.minimum(cells[lines | displaced], 4)
        nodes = 2 ** (high - 1) + 1
        height, width = allowed.shape[-2:]
        # Made as a square, so that blobs are as wide as high on a long image too, and cut out of its middle.
        side = max(height, width)
        row, column = (side - height) // 2, (side - width) // 2
        middle = (..., slice(row, row + height), slice(column, column + width))
        masks = torch.zeros_like(allowed)
        pending = allowed.flatten(1).amax(1).cpu().numpy() > 0
        first, count = 0, 1
        while first < MAX_ATTEMPTS and pending.any():
            count = min(count, MAX_ATTEMPTS - first)
            left = np.flatnonzero(pending)
            angles = np.zeros((len(left), count, nodes, nodes), dtype=np.float32)
            for k, i in enumerate(left):
                rows, columns = cells[i] + 1
                angles[k, :, :rows, :columns] = streams[i].random((count, rows, columns)) * (2 * math.pi)
            angles = torch.from_numpy(angles).to(allowed.device).flatten(0, 1)
            noise = perlin_noise(angles, cells[left].repeat(count, 0), side, side)[:, None]
            degrees = draws["rotations"][left, first : first + count].reshape(-1) * 180 - 90
            rotated = rotate(noise, degrees).unflatten(0, (len(left), count))
            shapes = rotated[middle].sub(THRESHOLD).gt_(0)
            if lines[left].any():
                these = left[lines[left]]
                drawn = _lines(
                    select(rotated, lines[left]), cells[these], draws["line"][these, 1], math.isqrt(height * width)
                )[middle]
                drawn *= _rectangles(draws["region"][these], height, width).to(drawn)[:, None]
                shapes = replace(shapes, lines[left], drawn)
            tried = shapes.mul_(select(allowed, pending)[:, None])
            hit = tried.flatten(2).amax(2).cpu().numpy() > 0
            best = torch.from_numpy(np.arange(len(left)) * count + hit.argmax(1)).to(allowed.device)
            masks = replace(masks, pending, tried.flatten(0, 1).index_select(0, best))
            pending[left] = ~hit.any(1)
            # Then 1, 2, 4, 8, 8 ... more fields for the images still without a mask.
            first, count = first + count, min(max(first, 1), ATTEMPTS_AT_ONCE)
        return masks

    def _sources(self, normal: Tensor, draws: dict[str, np.ndarray]) -> Tensor:
        """The anomalies' content: `(n, 3, H, W)` float32 in [0, 1]."""
        if self._bank.device != normal.device:
            self._bank = self._bank.to(normal.device)
        from_self = draws["source"][:, 0] < self.self_augmentation_probability
        source = normal.clone()
        if not from_self.all():
            picked = (draws["texture"][~from_self, 0] * len(self._bank)).astype(np.int64)
            textures = self._bank.index_select(0, torch.from_numpy(picked).to(normal.device)).float().div_(255)
            if textures.shape[-2:] != normal.shape[-2:]:
                # Rounding may exceed 1.
                textures = F.interpolate(textures, normal.shape[-2:], mode="bilinear", antialias=True).clamp_(0, 1)
            source = replace(source, ~from_self, textures)
        source = change_colors(source, draws["operations"], draws["parameters"])
        if from_self.any():
            own = select(source, from_self)
            source = replace(
                source, from_self, shuffle_tiles(own, draws["rows"][from_self], draws["columns"][from_self])
            )
        return source


def perlin_noise(angles: Tensor, cells: np.ndarray, height: int, width: int) -> Tensor:
    """Perlin noise, each field with its own number of cells (reference: `rand_perlin_2d_np`).

    Uses only indexing and element-wise arithmetic, so that the bits of a field do not depend on its batch.

    Args:
        angles: `(B, G, G)` directions of the gradients in radians at nodes (row, column); a field with (r, c) cells
            reads the first r + 1 rows and c + 1 columns.
        cells: `(B, 2)` int, cells along height and width, below G.
        height, width: of the result in pixels; pixel i lies at `i * cells / size` cells.

    Returns:
        `(B, height, width)` float32 in [-1, 1].
    """
    batch, nodes, _ = angles.shape

    def positions(axis: int, size: int) -> list[Tensor]:
        position = np.arange(size) * cells[:, axis, None] / size
        cell = np.floor(position).astype(np.int64)
        t = (position - cell).astype(np.float32)
        fade = t * t * t * (t * (t * 6 - 15) + 10)
        return [torch.from_numpy(x).to(angles.device) for x in (cell, t, fade)]

    column, tx, fade_x = (x[:, None].expand(batch, nodes, width) for x in positions(1, width))
    row, ty, fade_y = (x.reshape(-1, 1) for x in positions(0, height))
    # A corner's ramp, dy cos + dx sin, is linear in dy: interpolate its slope and offset along x on every row
    slope, offset = angles.cos(), angles.sin()
    slope = torch.lerp(slope.gather(2, column), slope.gather(2, column + 1), fade_x).flatten(0, 1)
    offset = torch.lerp(offset.gather(2, column) * tx, offset.gather(2, column + 1) * (tx - 1), fade_x).flatten(0, 1)
    # then along y between the two rows of nodes around each pixel.
    top = row.flatten() + torch.arange(batch, device=angles.device).repeat_interleave(height) * nodes
    above = torch.addcmul(offset.index_select(0, top), slope.index_select(0, top), ty)
    below = torch.addcmul(offset.index_select(0, top + 1), slope.index_select(0, top + 1), ty - 1)
    return torch.lerp(above, below, fade_y).mul_(math.sqrt(2)).view(batch, height, width)


def shuffle_tiles(images: Tensor, rows: np.ndarray, columns: np.ndarray) -> Tensor:
    """Shuffles the 8 x 8 tiles of `(N, 3, H, W)` images by rows and by columns, as the reference does.

    Rows of tiles are shuffled. Columns are too, but even ones end up on the left and odd ones on the right. If 8 does
    not divide a side, its last strip is shorter. `rows` and `columns` are `(N, 16)` uniform numbers, one per strip.
    """
    height, width = images.shape[-2:]
    row, column = np.arange(height) // (height // TILES), np.arange(width) // (width // TILES)
    # The pixels of a strip share a number, so a stable sort moves whole strips.
    orders = (rows[:, row], columns[:, column] + column % 2)
    row_order, column_order = (
        torch.from_numpy(np.argsort(order, axis=1, kind="stable")).to(images.device) for order in orders
    )
    lines = torch.arange(images.shape[0] * 3, device=images.device).view(-1, 3, 1) * height + row_order[:, None]
    images = images.reshape(-1, width).index_select(0, lines.flatten()).view_as(images)
    return images.gather(3, column_order[:, None, None, :].expand_as(images))


def _lines(noise: Tensor, cells: np.ndarray, u: np.ndarray, size: int) -> Tensor:
    """Where the noise `(n, count, 1, S, S)` crosses 0: lines of about 1 to 2 px in images of 128, of more in larger
    ones (`size`); `u` `(n,)` says how wide."""
    # The noise has a slope of about 1.2 per cell at its zeros, which turns a width in px into a bound of its values.
    bound = (0.3 + 0.7 * u) * size / 128 * 1.2 * (cells / noise.shape[-1]).max(axis=1)
    bound = torch.from_numpy(bound).to(noise)[:, None, None, None, None]
    # The exact zeros that rotation leaves in the corners are not crossings.
    return (noise.abs() < bound).logical_and_(noise != 0).to(noise.dtype)


def _move(images: Tensor, u: np.ndarray) -> Tensor:
    """Moves each image cyclically by 0.1 to 0.4 of its size in a direction of its own."""
    height, width = images.shape[-2:]
    angle, distance = 2 * np.pi * u[:, 0], 0.1 + 0.3 * u[:, 1]
    down = np.rint(np.sin(angle) * distance * height).astype(np.int64)
    right = np.rint(np.cos(angle) * distance * width).astype(np.int64)
    return shift(images, torch.from_numpy(down).to(images.device), torch.from_numpy(right).to(images.device))


def _differs(images: Tensor, others: Tensor) -> Tensor:
    """1 where two images differ visibly, by more than 0.06 on average over 3 x 3 px; `(N, 1, H, W)`."""
    difference = (images - others).abs().amax(1, keepdim=True)
    return F.avg_pool2d(difference, 3, 1, 1, count_include_pad=False).sub_(0.06).gt_(0)


def _rectangles(u: np.ndarray, height: int, width: int) -> Tensor:
    """Random rectangles in which the anomalies of textures lie, with 0.3 to 1 of the sides of the image."""
    inside = []
    for axis, size in enumerate((height, width)):
        length = (0.3 + 0.7 * u[:, axis : axis + 1]) * size
        start = u[:, axis + 2 : axis + 3] * (size - length)
        pixel = np.arange(size) + 0.5
        inside.append((pixel >= start) & (pixel < start + length))
    return torch.from_numpy((inside[0][:, :, None] & inside[1][:, None, :])[:, None].astype(np.float32))


def _stream(seed: int, epoch: int, index: int) -> np.random.Generator:
    key = np.array([seed, epoch], dtype=np.uint64)
    counter = np.array([0, 0, 0, index], dtype=np.uint64)  # in the highest word, so that streams never overlap
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def _named(draws: np.ndarray) -> dict[str, np.ndarray]:
    ends = np.cumsum(list(_DRAWS.values()))
    return dict(zip(_DRAWS, np.split(draws, ends[:-1], axis=1), strict=True))
