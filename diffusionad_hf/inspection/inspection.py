"""Inspection of many files: one bad file never stops the others, and nothing already done is lost."""

import codecs
import glob
import logging
import math
import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import torch
from PIL import Image

from ..data import looks_like_image
from ..figure import figure
from ..files import escaped, files_below, is_litter, one_line, short_name
from ..images_diffusionad import InvalidImageError, load_image, resize_image, to_uint8
from ..pipeline_diffusionad import DiffusionADPipeline
from ..verdicts_diffusionad import NORMAL
from ..visualization import (
    find_regions,
    is_own_picture,
    location_words,
    mask_image,
    overlay,
    region_threshold,
    save_image,
)
from .records import Failure, Inspection

logger = logging.getLogger(__name__)

# Decoder threads, and the batches that may wait for the model: beyond this, disk I/O is the bottleneck.
_READERS = 8
_BATCHES_AHEAD = 2


class Item(NamedTuple):
    """
    One image to inspect: its name in the results; its path, content, or address (of any file system that `fsspec`
    reads); and the path of its pictures in the output folder, without `_figure.png` and the like.
    """

    name: str
    source: Path | bytes | str
    picture: str = ""


@dataclass(frozen=True)
class Pictures:
    """
    The pictures of inspected images.

    Args:
        folder: Where each image's [`figure`] is written; `None` to write none.
        parts: Whether overlay, mask and reconstruction are written too, at the photo's size.
        seen: Called with each inspection and its figure.
    """

    folder: Path | None = None
    parts: bool = False
    seen: Callable[[Inspection, Image.Image], Any] | None = None


def find_images(inputs: Sequence[str | os.PathLike]) -> tuple[list[Path], list[Failure]]:
    """
    The image files that files, folders (with all below them) and glob patterns name, in order and each once; and the
    inputs that name none. In folders, litter and pictures of inspections do not count.
    """
    files: dict[Path, None] = {}
    failures: list[Failure] = []
    own: list[Path] = []
    for item in inputs:
        name = os.path.expanduser(item)
        path = Path(name)
        if path.is_dir():
            found = [p for p in files_below(path) if looks_like_image(p)]
            reason = "no images in this folder"
        elif path.is_file():
            found, reason = [path], ""
        elif glob.has_magic(name):
            found = sorted(Path(p) for p in glob.glob(name, recursive=True) if Path(p).is_file())
            # What the pattern itself names is meant.
            found = [p for p in found if not any(map(is_litter, set(p.parts) - set(path.parts)))]
            reason = "no file matches this pattern"
        else:
            found, reason = [], "an address; download it first" if "://" in name else "no such file or folder"
        if not path.is_file():
            written = [p for p in found if is_own_picture(p)]
            own, found = own + written, sorted(set(found) - set(written))
        if not found:
            failures.append(Failure(escaped(name), f"{escaped(name)}: {reason}."))
        files.update(dict.fromkeys(found))
    if own:
        logger.warning(f"{len(own)} picture(s) that an inspection wrote are left out, such as {escaped(own[0])}.")
    return list(files), failures


def read_list(path: Path) -> list[Path]:
    """
    The image files that a text file names, one a line, in order and each once. It may begin with a byte-order mark,
    also that of UTF-16, and names that are no text are taken as they are.
    """
    content = path.read_bytes()
    encoding = "utf-16" if content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
    text = content.decode(encoding, "surrogateescape")
    if "\0" in text:
        raise ValueError(f"{path}: not a text file; give one with the path of an image on each line.")
    lines = [line.rstrip("\r") for line in text.split("\n" if "\n" in text else "\r")]
    # Spaces around a name are part of it if there is such a file.
    files = list(dict.fromkeys(Path(s if os.path.exists(s) else s.strip()) for s in lines if s.strip()))
    if not files:
        raise ValueError(f"{path}: names no file; give the path of an image on each line.")
    return files


def read_small(files: Iterable[Path], pipe: DiffusionADPipeline) -> Iterator[torch.Tensor | Failure]:
    """Images, 8-bit and at the model's resolution already, so that thousands of photos fit in memory."""
    for _, (image,) in _read_ahead(([Item(escaped(file), file)] for file in files), pipe.config.value_range):
        yield image if isinstance(image, Failure) else to_uint8(resize_image(image, pipe.size))


def inspect_files(
    pipe: DiffusionADPipeline,
    files: Sequence[Path],
    pictures: Pictures | None = None,
    *,
    batch_size: int | None = None,
) -> Iterator[Inspection | Failure]:
    """
    Inspects files batch by batch and draws their pictures, if any are wanted, as it goes.

    Yields:
        [`Inspection`] or [`Failure`]: One per file, in order.

    Raises:
        OSError: If a picture cannot be written.
    """
    names = picture_names(files)
    items = (Item(escaped(file), file, names[file]) for file in files)
    return inspect_batches(pipe, batched(items, batch_size or pipe.default_batch_size), pictures)


def batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch


def inspect_batches(
    pipe: DiffusionADPipeline, batches: Iterable[Sequence[Item]], pictures: Pictures | None = None
) -> Iterator[Inspection | Failure]:
    """Inspects batches as [`inspect_files`] does; they are iterated in another thread."""
    with closing(_read_ahead(batches, pipe.config.value_range)) as batches_with_images:
        for batch, images in batches_with_images:
            yield from _inspect_batch(pipe, batch, images, pictures or Pictures())


def _read_ahead(
    batches: Iterable[Sequence[Item]], value_range: float | None = None
) -> Generator[tuple[Sequence[Item], list[torch.Tensor | Failure]], None, None]:
    """Batches with their images. Threads run ahead by a bounded number of batches: one takes them, others decode."""
    batches = iter(batches)
    source, readers = ThreadPoolExecutor(1, "batches"), ThreadPoolExecutor(_READERS, "read")

    def take() -> tuple[Sequence[Item], list[Future]]:
        batch = next(batches, ())
        return batch, [readers.submit(_read, item, value_range) for item in batch]

    ahead = deque(source.submit(take) for _ in range(_BATCHES_AHEAD))
    try:
        while (taken := ahead.popleft().result())[0]:
            ahead.append(source.submit(take))
            yield taken[0], [image.result() for image in taken[1]]
    finally:
        for pool in (source, readers):
            pool.shutdown(wait=False, cancel_futures=True)


def _read(item: Item, value_range: float | None) -> torch.Tensor | Failure:
    """Decodes an image. An address that cannot be reached is no fault of the image, and raises."""
    source = item.source
    if isinstance(source, str):
        with fsspec.open(source, "rb") as file:
            source = file.read()
    try:
        return load_image(source, item.name, value_range)
    except (InvalidImageError, OSError, MemoryError) as error:
        text = escaped(one_line(error)) or "out of memory"
        return Failure(item.name, text if item.name in text else f"{item.name}: {text}.")


def _inspect_batch(
    pipe: DiffusionADPipeline, batch: Sequence[Item], images: Sequence[torch.Tensor | Failure], pictures: Pictures
) -> Iterator[Inspection | Failure]:
    good = [image for image in images if isinstance(image, torch.Tensor)]
    started = time.perf_counter()
    output: Any = pipe(good, batch_size=len(good)) if good else None
    seconds = (time.perf_counter() - started) / max(len(good), 1)
    threshold = pipe.threshold if pipe.threshold is None or math.isfinite(pipe.threshold) else None
    drawn = region_threshold(threshold)
    row = 0
    for item, image in zip(batch, images, strict=True):
        if isinstance(image, Failure):
            yield image
            continue
        anomaly_map, score = output.anomaly_map[row], float(output.anomaly_score[row])
        verdict = output.verdict[row]
        # A normal image has no regions to show, in its mask neither, whatever single pixels of its map say.
        regions = [] if verdict.word == NORMAL else find_regions(anomaly_map, drawn)
        p_value = None if output.p_value is None else float(output.p_value[row])
        drawings: dict[str, Image.Image] = {}
        if pictures.folder is not None or pictures.seen is not None:
            photo = Image.fromarray(to_uint8(image.permute(1, 2, 0).numpy()))
            normal = Image.fromarray(to_uint8(output.reconstruction[row]))
            drawings["figure"] = figure(
                photo,
                anomaly_map,
                verdict,
                score,
                threshold=threshold,
                p_value=p_value,
                reconstruction=normal,
                regions=regions,
            )
            if pictures.parts:
                drawings["overlay"] = overlay(photo, anomaly_map, threshold=drawn, contour=verdict.word != NORMAL)
                blank = verdict.word == NORMAL
                drawings["mask"] = Image.new("L", photo.size) if blank else mask_image(anomaly_map, drawn)
                drawings["reconstruction"] = normal
        written = {}
        if pictures.folder is not None:
            for kind, drawing in drawings.items():
                written[kind] = escaped(save_image(drawing, pictures.folder / f"{item.picture}_{kind}.png"))
        inspection = Inspection(
            file=item.name,
            score=score,
            threshold=threshold,
            verdict=verdict.word,
            reason=verdict.reason,
            sentence=verdict.sentence,
            p_value=p_value,
            is_familiar=None if output.is_familiar is None else bool(output.is_familiar[row]),
            strangeness=None if output.strangeness is None else float(output.strangeness[row]),
            seconds=seconds,
            where=[location_words(region, anomaly_map.shape[::-1]) for region in regions],
            regions=[asdict(region) for region in regions],
            pictures=written,
        )
        if pictures.seen is not None:
            pictures.seen(inspection, drawings["figure"])
        yield inspection
        row += 1


def picture_names(files: Sequence[Path]) -> dict[Path, str]:
    """
    A name for each file's pictures, which is text: its own, with as much of its path as it takes to tell it from the
    others, and shortened if the pictures' names would be too long.
    """
    paths = [os.path.abspath(file) for file in files]
    root = os.path.commonpath({os.path.dirname(path) for path in paths}) if paths else ""
    names: dict[Path, str] = {}
    taken = set()

    def short(name: str) -> str:
        folder, name = os.path.split(name)
        return os.path.join(folder, short_name(name, len("_reconstruction.png")))

    for file, path in zip(files, paths, strict=True):
        name, suffix = os.path.splitext(os.path.relpath(path, root))
        name = short(escaped(name))
        # The same stem with another suffix, or in capitals, which not all file systems tell apart.
        while name.lower() in taken:
            name = short(f"{name}_{escaped(suffix[1:])}")
        taken.add(name.lower())
        names[file] = name
    return names
