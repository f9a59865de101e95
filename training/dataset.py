"""Normal images of one category and the order in which they are trained on."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from diffusionad_hf.pipeline_diffusionad import load_image, resize_image

__all__ = ["NormalImages", "StepSampler", "split_holdout"]

_CACHE_BYTES = 2**30


class NormalImages(Dataset):
    """
    Normal images at the model's resolution, with the object's foreground.

    Items are asked for as `(epoch, index)` and come as a dictionary of `image` `(3, S, S)` float32 in [0, 1],
    `foreground` `(1, S, S)`, `epoch` and `index`. Resized images are kept in memory up to 1 GiB in all, and decoded
    when asked for beyond.

    Args:
        images: Images or paths, as [`~diffusionad_hf.pipeline_diffusionad.load_image`] takes them; indexing may
            decode.
        resolution: Side length S in px.
        foregrounds: `(N, 1, S, S)`, or `None` for none.
    """

    def __init__(self, images: Sequence[Any], resolution: int, foregrounds: torch.Tensor | None = None):
        self.images = images
        self.resolution = resolution
        self.foregrounds = foregrounds
        fits = len(images) * 3 * resolution**2 <= _CACHE_BYTES
        self._cache: dict[int, torch.Tensor] | None = {} if fits else None

    def __len__(self) -> int:
        return len(self.images)

    def pixels(self, index: int) -> torch.Tensor:
        """One image, `(3, S, S)` float32 in [0, 1]."""
        if self._cache is None:
            return self._read(index)
        if index not in self._cache:
            self._cache[index] = (self._read(index) * 255).round().byte()
        return self._cache[index].float() / 255

    def _read(self, index: int) -> torch.Tensor:
        return resize_image(load_image(self.images[index], name=f"training image {index}"), self.resolution)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, index = key
        item = {"image": self.pixels(index), "epoch": epoch, "index": index}
        if self.foregrounds is not None:
            item["foreground"] = self.foregrounds[index]
        return item


class StepSampler(Sampler):
    """
    Batches of `(epoch, index)`, a pure function of the seed and the step.

    The epochs' permutations of the images form one endless row, of which every step takes its turn and every process
    its part of it: the order does not depend on the number of processes, and a resumed run needs nothing but its step.

    Args:
        length: Number of images.
        batch_size: Images per process and batch.
        batches: Which batches to give, counted from the start of the training.
        process, processes: Which part of each batch is this process's.
    """

    def __init__(self, length: int, batch_size: int, batches: range, seed: int, process: int = 0, processes: int = 1):
        self.length, self.batch_size, self.batches, self.seed = length, batch_size, batches, seed
        self.process, self.processes = process, processes
        self._epoch, self._order = -1, None

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


def split_holdout(count: int, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """
    Splits `count` normal images at random into those to train on and those to choose and calibrate the model with.

    Raises:
        ValueError: If there are too few for both.
    """
    if count < 2:
        raise ValueError(f"{count} normal image(s): at least 2 are needed, one to train on and one to calibrate with.")
    order = np.random.default_rng((seed, 0x5EED)).permutation(count)
    held_out = min(max(1, round(count * fraction)), count - 1)
    return sorted(order[held_out:].tolist()), sorted(order[:held_out].tolist())
