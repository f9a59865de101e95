"""The size of the normal images of a category, and the foregrounds on which anomalies may lie."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from PIL import Image

from ..images_diffusionad import to_uint8
from ..presets import size_multiple
from .arguments import TrainingConfig
from .dataset import NormalImages, PackedMasks, TableImages, spread
from .foreground import MOST_LEARNT_FROM, ForegroundEstimator, find_foregrounds, load_foreground

T = TypeVar("T")
# Tolerates the rounding of a resize.
_SAME_SHAPE = 0.02
# The largest ratio of a photo's sides.
_LONGEST = 16


def find_foregrounds_of(normal: NormalImages, args: TrainingConfig) -> str:
    """Gives the images their foregrounds, which textures have none of; returns "object" or "texture"."""
    if args.foreground == "whole":
        normal.foregrounds = torch.ones(1).expand(len(normal), 1, *normal.size)
        return "object"
    if args.foreground_dir is not None:
        normal.foregrounds = PackedMasks(given_foregrounds(args.foreground_dir, normal.images, normal.size))
        return "object"
    estimator = learn_foreground(normal, args.foreground)
    if estimator.kind == "object":
        normal.foregrounds = PackedMasks(estimated_foregrounds(estimator, normal, range(len(normal))))
    return estimator.kind


def fit_size(args: TrainingConfig, images: TableImages) -> tuple[int, int]:
    """Height and width for the training: those asked for, or of that many pixels in the photos' usual shape."""
    if len(args.sides) == 2:
        return args.sides[0], args.sides[1]
    shapes = [shown_size(images[row]) for row in spread(len(images), MOST_LEARNT_FROM)]
    ratio = float(np.median([width / height for width, height in shapes]))
    if max(ratio, 1 / ratio) > _LONGEST:
        raise ValueError(
            f"`image_size` {args.image_size}: the photos are {max(ratio, 1 / ratio):.0f} times as long as wide; from "
            f"{_LONGEST} times on, cut them into pieces, or give HEIGHTxWIDTH."
        )
    multiple = size_multiple(args.architecture, args.resolution)
    sides = range(multiple, _LONGEST * args.resolution, multiple)

    def misfit(size: tuple[int, int]) -> float:
        (height, width), log = size, math.log
        # The shape matters more than the number of pixels, which is the cost.
        return 2 * abs(log(width / height / ratio)) + abs(log(height * width / args.resolution**2))

    return min(itertools.product(sides, sides), key=misfit)


def learn_foreground(reader: NormalImages, kind: str) -> ForegroundEstimator:
    """An estimator of foregrounds, fitted to some of the images."""
    return ForegroundEstimator([_uint8(reader, i) for i in spread(len(reader), MOST_LEARNT_FROM)], kind)


def estimated_foregrounds(
    estimator: ForegroundEstimator, reader: NormalImages, rows: Sequence[int]
) -> Iterator[np.ndarray]:
    """The estimated foregrounds of some images, `(H, W)` bool each."""
    yield from in_threads(lambda row: estimator(_uint8(reader, row)), rows)


def in_threads(work: Callable[[int], T], rows: Sequence[int]) -> Iterator[T]:
    """The results of `work` for each row, in order."""
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # as many as computing may take here
        # In parts, because `map` keeps all results in memory until they are consumed.
        for first in range(0, len(rows), 64):
            yield from pool.map(work, rows[first : first + 64])


def given_foregrounds(
    folder: str, images: TableImages, size: tuple[int, int], rows: Sequence[int] | None = None
) -> Iterator[np.ndarray]:
    """The user's masks of all images, or of some, `(H, W)` bool each."""
    rows = range(len(images)) if rows is None else rows
    for row, path in zip(rows, find_foregrounds(folder, [str(images.names[row]) for row in rows]), strict=True):
        mask = load_foreground(path)
        height, width = mask.shape
        shown = shown_size(images[row])
        if abs(width * shown[1] / (height * shown[0]) - 1) > _SAME_SHAPE:
            raise ValueError(
                f"foreground {path} is {width} x {height} pixels but its image {images.names[row]} is {shown[0]} x "
                f"{shown[1]}: make a mask of the image's size."
            )
        yield np.asarray(Image.fromarray(mask).resize(size[::-1], Image.Resampling.NEAREST))


def shown_size(source: str | Image.Image) -> tuple[int, int]:
    """Width and height of an image once the rotation in its EXIF tags is applied, as loading it does."""
    with Image.open(source) if isinstance(source, str) else source as image:
        return image.size[::-1] if image.getexif().get(0x0112, 1) >= 5 else image.size


def _uint8(reader: NormalImages, row: int) -> np.ndarray:
    return to_uint8(reader.pixels(row)).permute(1, 2, 0).numpy()
