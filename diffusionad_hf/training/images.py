"""Loads the normal images of a category and the foregrounds on which anomalies may lie."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image

from ..data import check_images, load_category
from ..images_diffusionad import to_uint8
from .arguments import TrainingConfig
from .dataset import NormalImages, PackedMasks, TableImages, spread
from .foreground import MOST_LEARNT_FROM, ForegroundEstimator, find_foregrounds, load_foreground

# Tolerates the rounding of a resize.
_SAME_SHAPE = 0.02


def load_images(args: TrainingConfig) -> tuple[TableImages, str, Sequence[torch.Tensor] | None]:
    """The normal images, "object" or "texture", and the foreground of each, `(1, S, S)`; `None` for textures."""
    usable, _ = check_images(load_category(args.data_dir, args.category)["train"])
    images = TableImages(usable)
    size = args.resolution
    if args.foreground == "whole":
        return images, "object", torch.ones(1).expand(len(images), 1, size, size)
    reader = NormalImages(images, size)
    if args.foreground_dir is not None:
        return images, "object", PackedMasks(given_foregrounds(args.foreground_dir, images, size))
    estimator = learn_foreground(reader, args.foreground)
    if estimator.kind == "texture":
        return images, "texture", None
    return images, "object", PackedMasks(estimated_foregrounds(estimator, reader, range(len(reader))))


def learn_foreground(reader: NormalImages, kind: str) -> ForegroundEstimator:
    """An estimator of foregrounds, fitted to some of the images."""
    return ForegroundEstimator([_uint8(reader, i) for i in spread(len(reader), MOST_LEARNT_FROM)], kind)


def estimated_foregrounds(
    estimator: ForegroundEstimator, reader: NormalImages, rows: Sequence[int]
) -> Iterator[np.ndarray]:
    """The estimated foregrounds of some images, `(S, S)` bool each."""
    with ThreadPoolExecutor() as pool:
        # In parts, because `map` keeps all results in memory until they are consumed.
        for first in range(0, len(rows), 64):
            yield from pool.map(lambda row: estimator(_uint8(reader, row)), rows[first : first + 64])


def given_foregrounds(
    folder: str, images: TableImages, size: int, rows: Sequence[int] | None = None
) -> Iterator[np.ndarray]:
    """The user's masks of all images, or of some, `(S, S)` bool each."""
    rows = range(len(images)) if rows is None else rows
    for row, path in zip(rows, find_foregrounds(folder, [str(images.names[row]) for row in rows]), strict=True):
        mask = load_foreground(path)
        height, width = mask.shape
        source = images[row]
        with Image.open(source) if isinstance(source, str) else source as image:
            # Loading an image applies the rotation in its EXIF tags.
            shown = image.size[::-1] if image.getexif().get(0x0112, 1) >= 5 else image.size
        if abs(width * shown[1] / (height * shown[0]) - 1) > _SAME_SHAPE:
            raise ValueError(
                f"foreground {path} is {width} x {height} pixels but its image {images.names[row]} is {shown[0]} x "
                f"{shown[1]}: make a mask of the image's size."
            )
        yield np.asarray(Image.fromarray(mask).resize((size, size), Image.Resampling.NEAREST))


def _uint8(reader: NormalImages, row: int) -> np.ndarray:
    return to_uint8(reader.read(row)).permute(1, 2, 0).numpy()
