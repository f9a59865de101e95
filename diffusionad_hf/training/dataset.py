"""The normal images of one category, which need not fit in memory, and the order in which they are trained on."""

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from ..images_diffusionad import load_image, resize_image, to_uint8

_CACHE_BYTES = 2**30
# Enough for a calibrated false-alarm rate with a standard deviation below one percentage point.
_MOST_HELD_OUT = 500


def digest_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


class TableImages(Sequence):
    """The images of a `datasets` table: file paths, or images decoded on access if the table contains them."""

    def __init__(self, table: Any):
        encoded = table.cast_column("image", type(table.features["image"])(decode=False)).select_columns("image")
        self._table, self._encoded = table, encoded
        self.names: list[str | None] = []
        self._paths: list[str | None] = []
        for row in encoded:
            self.names.append(row["image"]["path"])
            self._paths.append(row["image"]["path"] if row["image"]["bytes"] is None else None)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Any:
        path = self._paths[index]
        return self._table[int(index)]["image"] if path is None else path

    def digests(self) -> list[str]:
        """Of each image's file, and so the same on every machine."""
        contents = (row["image"]["bytes"] or Path(row["image"]["path"]).read_bytes() for row in self._encoded)
        return [digest_of(content) for content in contents]


class PackedMasks(Sequence):
    """`(H, W)` bool masks of one size, packed to one bit per pixel."""

    def __init__(self, masks: Iterable[np.ndarray]):
        self._packed = []
        for mask in masks:
            self._shape = (1, *mask.shape)
            self._packed.append(np.packbits(mask))

    def __len__(self) -> int:
        return len(self._packed)

    def digest(self) -> str:
        return digest_of(b"".join(mask.tobytes() for mask in self._packed))

    def __getitem__(self, index: int) -> torch.Tensor:
        """`(1, H, W)` float32 of 0 and 1."""
        bits = np.unpackbits(self._packed[index], count=math.prod(self._shape))
        return torch.from_numpy(bits.reshape(self._shape)).float()


class NormalImages(Dataset):
    """Normal images at the model's size (H, W), with the object's foreground `(1, H, W)` if given.

    Items are accessed by `(epoch, index)`. Resized images are cached if all of them fit into 1 GiB.
    """

    def __init__(
        self,
        images: Sequence[Any],
        size: tuple[int, int],
        foregrounds: Sequence[torch.Tensor] | None = None,
        value_range: float | None = None,
    ):
        self.images = images
        self.size = size
        self.foregrounds = foregrounds
        self.value_range = value_range
        fits = len(images) * 3 * math.prod(size) <= _CACHE_BYTES
        self._cache: dict[int, torch.Tensor] | None = {} if fits else None

    def __len__(self) -> int:
        return len(self.images)

    def only(
        self, rows: Sequence[int], images: Sequence[Any], foregrounds: Sequence[torch.Tensor] | None = None
    ) -> "NormalImages":
        """Those of some rows, which are `images` with these foregrounds, without reading them again."""
        chosen = NormalImages(images, self.size, foregrounds, self.value_range)
        if self._cache is not None:
            chosen._cache = {new: self._cache[old] for new, old in enumerate(rows) if old in self._cache}
        return chosen

    def pixels(self, index: int) -> torch.Tensor:
        """One image, `(3, H, W)` float32 in [0, 1]."""
        if self._cache is None:
            return self.read(index)
        if index not in self._cache:
            self._cache[index] = to_uint8(self.read(index))
        return self._cache[index].float() / 255

    def read(self, index: int) -> torch.Tensor:
        """As [`pixels`], but without the cache."""
        return resize_image(load_image(self.images[index], f"training image {index}", self.value_range), self.size)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, index = key
        item = {"image": self.pixels(index), "epoch": epoch, "index": index}
        if self.foregrounds is not None:
            item["foreground"] = self.foregrounds[index]
        return item


class StepSampler(Sampler):
    """Batches of `(epoch, index)`, a pure function of the seed and the step.

    Steps and processes take consecutive parts of one endless sequence of permutations, so the order does not depend on
    the number of processes, and a resumed run only needs its step.
    """

    def __init__(self, length: int, batch_size: int, batches: range, seed: int, process: int = 0, processes: int = 1):
        self.length, self.batch_size, self.batches, self.seed = length, batch_size, batches, seed
        self.process, self.processes = process, processes
        self._epoch, self._order = -1, np.empty(0, int)

    def __len__(self) -> int:
        return len(self.batches)

    def _at(self, position: int) -> tuple[int, int]:
        epoch, place = divmod(position, self.length)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng((self.seed, epoch)).permutation(self.length)
        return epoch, int(self._order[place])

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in self.batches:
            first = (batch * self.processes + self.process) * self.batch_size
            yield [self._at(first + i) for i in range(self.batch_size)]


def split_holdout(count: int, fraction: float, seed: int, needed: int = 1) -> tuple[list[int], list[int]]:
    """
    Splits the rows of `count` images at random: those to train on, and those held out, a fraction of them or, if that
    is more, the `needed` ones, but these at most half of all, and at most 500.
    """
    if count < 2:
        raise ValueError(f"{count} normal image(s): at least 2 are needed, one to train on and one to calibrate with.")
    order = np.random.default_rng((seed, 0x5EED)).permutation(count)
    held_out = max(1, round(count * fraction), min(needed, count // 2))
    held_out = min(held_out, count - 1, _MOST_HELD_OUT)
    return sorted(order[held_out:].tolist()), sorted(order[:held_out].tolist())


def spread(count: int, most: int) -> list[int]:
    """At most `most` of `count` indices, evenly spaced."""
    return sorted({int(index) for index in np.linspace(0, count - 1, min(count, most))})
