"""Inspection of many files: one bad file never stops the others, and nothing already done is lost."""

import csv
import glob
import io
import json
import os
import queue
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from ..files import replace_file, replacing
from ..pipeline_diffusionad import DiffusionADPipeline, InvalidImageError, load_image
from ..visualization import find_regions, location_words, mask_image, overlay, region_threshold, save_image

__all__ = [
    "IMAGE_SUFFIXES",
    "Failure",
    "Inspection",
    "Item",
    "find_images",
    "format_table",
    "inspect_batches",
    "inspect_files",
    "picture_names",
    "read_images",
    "read_list",
    "write_csv",
    "write_json",
]

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif"})

# Images are read by so many threads while the model is at work, and at most so many batches wait for it.
_READERS = 8
_BATCHES_AHEAD = 2


class Item(NamedTuple):
    """
    One image to inspect.

    Args:
        name: What it is called in the results.
        source: The image file's path, its content, or its address (of any file system that `fsspec` reads).
        picture: Path of its pictures in the output folder, without `_overlay.png` and the like.
    """

    name: str
    source: Path | bytes | str
    picture: str = ""


@dataclass(frozen=True)
class Inspection:
    """
    What was found on one image.

    Args:
        file: The image.
        score: Its anomaly score.
        threshold: Scores above it are anomalous; `None` without one.
        verdict: `"anomalous"`, `"normal"`, or `None` without a threshold.
        p_value: Probability of such a score on a normal image; `None` where the model is not calibrated.
        seconds: Time of the pipeline for this image, its share of the batch's.
        where: The regions in words, strongest first.
        regions: Boxes `(x0, y0, x1, y1)` in px of the image, half open, with area and peak.
        pictures: Files that were written, by kind: overlay, mask, reconstruction.
    """

    file: str
    score: float
    threshold: float | None
    verdict: str | None
    p_value: float | None
    seconds: float
    where: list[str]
    regions: list[dict[str, Any]]
    pictures: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Failure:
    """A file that could not be inspected, and why, in one line."""

    file: str
    error: str


def find_images(inputs: Sequence[str | os.PathLike]) -> tuple[list[Path], list[Failure]]:
    """
    The image files that files, folders (with all below them) and glob patterns name, in order and each once.

    Returns:
        `tuple[list[Path], list[Failure]]`: The files, and the inputs that name none.
    """
    files: dict[Path, None] = {}
    failures = []
    for item in inputs:
        name = os.fspath(item)
        path = Path(name)
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
            reason = "no images in this folder"
        elif path.is_file():
            found, reason = [path], ""
        elif glob.has_magic(name):
            found = sorted(Path(p) for p in glob.glob(name, recursive=True) if Path(p).is_file())
            reason = "no file matches this pattern"
        else:
            found, reason = [], "no such file or folder"
        if not found:
            failures.append(Failure(name, f"{name}: {reason}."))
        files.update(dict.fromkeys(found))
    return list(files), failures


def read_list(path: Path) -> list[Path]:
    """
    The image files that a text file names, one a line, in order and each once; whether they exist shows when they
    are read.

    Raises:
        OSError: If there is no such file.
        ValueError: If it is no text, or names no file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give a text file with the path of an image on each line.")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text; give a file with the path of an image on each line.") from error
    files = list(dict.fromkeys(Path(line.strip()) for line in lines if line.strip()))
    if not files:
        raise ValueError(f"{path}: names no file; give the path of an image on each line.")
    return files


def read_images(files: Iterable[Path]) -> Iterator[tuple[Path, torch.Tensor | Failure]]:
    """Decodes files ahead of whoever asks for them, in order; those that cannot be read come as a [`Failure`]."""
    for (item,), (image,) in _read_ahead([Item(str(file), file)] for file in files):
        yield item.source, image


def inspect_files(
    pipe: DiffusionADPipeline,
    files: Sequence[Path],
    output_dir: Path | None = None,
    *,
    batch_size: int | None = None,
) -> Iterator[Inspection | Failure]:
    """
    Inspects files batch by batch and writes their pictures as it goes.

    Args:
        pipe: The pipeline.
        files: Image files.
        output_dir: Folder for the overlay, mask and reconstruction of every image; none are written without it.
        batch_size: Images per pass; the pipeline's default without.

    Yields:
        [`Inspection`] or [`Failure`]: One per file, in order.

    Raises:
        OSError: If a picture cannot be written.
    """
    names = picture_names(files)
    batch_size = batch_size or pipe.default_batch_size
    items = [Item(str(file), file, names[file]) for file in files]
    batches = (items[start : start + batch_size] for start in range(0, len(items), batch_size))
    for _, results in inspect_batches(pipe, batches, output_dir):
        yield from results


def inspect_batches(
    pipe: DiffusionADPipeline, batches: Iterable[Sequence[Item]], output_dir: Path | None = None
) -> Iterator[tuple[Sequence[Item], Iterator[Inspection | Failure]]]:
    """
    Inspects batches as they come, each in one pass, while threads read those that follow.

    Args:
        pipe: The pipeline.
        batches: What to inspect; iterated in a thread of its own.
        output_dir: As for [`inspect_files`].

    Yields:
        Each batch with the results of its items, in order, which are made, pictures and all, as they are asked for.

    Raises:
        OSError: If a picture cannot be written, or an address cannot be read.
    """
    for batch, images in _read_ahead(batches):
        yield batch, _inspect_batch(pipe, batch, images, output_dir)


def _read_ahead(batches: Iterable[Sequence[Item]]) -> Iterator[tuple[Sequence[Item], list[torch.Tensor | Failure]]]:
    """Batches with their images. Reading runs ahead in threads, by a bounded number of batches."""
    ready: queue.Queue = queue.Queue(maxsize=_BATCHES_AHEAD)
    stopped = threading.Event()

    def put(entry: Any) -> None:
        while not stopped.is_set():
            try:
                return ready.put(entry, timeout=0.1)
            except queue.Full:
                continue

    def produce() -> None:
        try:
            for batch in batches:
                put((batch, [pool.submit(_read, item) for item in batch]))
                if stopped.is_set():
                    return
            put(None)
        except BaseException as error:  # raised where the batches are consumed
            put(error)

    pool = ThreadPoolExecutor(_READERS, thread_name_prefix="read")
    threading.Thread(target=produce, name="read-ahead", daemon=True).start()
    try:
        while (entry := ready.get()) is not None:
            if isinstance(entry, BaseException):
                raise entry
            batch, images = entry
            yield batch, [image.result() for image in images]
    finally:
        stopped.set()
        pool.shutdown(wait=False, cancel_futures=True)


def _read(item: Item) -> torch.Tensor | Failure:
    """Decodes an image. An address that cannot be reached is no fault of the image, and raises."""
    source = item.source
    if isinstance(source, str):
        import fsspec

        with fsspec.open(source, "rb") as file:
            source = file.read()
    try:
        if isinstance(source, Path):
            return load_image(source)
        with Image.open(io.BytesIO(source)) as image:
            return load_image(image, item.name)
    except (InvalidImageError, OSError) as error:
        text = str(error)
        return Failure(item.name, text if item.name in text else f"{item.name}: damaged, or no image ({text}).")
    # Decoders raise whatever they stumble over.
    except Exception as error:
        return Failure(item.name, f"{item.name}: damaged, or no image ({' '.join(str(error).split())}).")


def _inspect_batch(
    pipe: DiffusionADPipeline,
    batch: Sequence[Item],
    images: Sequence[torch.Tensor | Failure],
    output_dir: Path | None,
) -> Iterator[Inspection | Failure]:
    good = [image for image in images if isinstance(image, torch.Tensor)]
    started = time.perf_counter()
    output = pipe(good, batch_size=len(good)) if good else None
    seconds = (time.perf_counter() - started) / max(len(good), 1)
    threshold = pipe.threshold
    drawn = region_threshold(threshold)
    row = 0
    for item, image in zip(batch, images, strict=True):
        if isinstance(image, Failure):
            yield image
            continue
        anomaly_map, score = output.anomaly_map[row], float(output.anomaly_score[row])
        verdict = None if threshold is None else ("anomalous" if output.is_anomalous[row] else "normal")
        # A normal image has no regions to show, in its mask neither, whatever single pixels of its map say.
        regions = [] if verdict == "normal" else find_regions(anomaly_map, drawn)
        pictures = {}
        if output_dir is not None:
            photo = Image.fromarray(_eight_bit(image.permute(1, 2, 0).numpy()))
            drawings = {
                "overlay": overlay(photo, anomaly_map, threshold=drawn, contour=verdict != "normal"),
                "mask": Image.new("L", photo.size) if verdict == "normal" else mask_image(anomaly_map, drawn),
                "reconstruction": Image.fromarray(_eight_bit(output.reconstruction[row])),
            }
            for kind, drawing in drawings.items():
                pictures[kind] = str(save_image(drawing, output_dir / f"{item.picture}_{kind}.png"))
        yield Inspection(
            file=item.name,
            score=score,
            threshold=threshold,
            verdict=verdict,
            p_value=None if output.p_value is None else float(output.p_value[row]),
            seconds=seconds,
            where=[location_words(region, anomaly_map.shape[::-1]) for region in regions],
            regions=[asdict(region) for region in regions],
            pictures=pictures,
        )
        row += 1


def picture_names(files: Sequence[Path]) -> dict[Path, str]:
    """A name for each file's pictures: its own, with as much of its path as it takes to tell it from the others."""
    if len(files) < 2 or len({file.parent for file in files}) == 1:
        root = files[0].parent if files else Path()
    else:
        root = Path(os.path.commonpath([file.absolute().parent for file in files]))
    names: dict[Path, str] = {}
    taken = set()
    for file in files:
        relative = file.absolute().relative_to(root.absolute()).with_suffix("")
        name = str(relative)
        if name in taken:  # the same stem with another suffix
            name = f"{name}_{file.suffix[1:]}"
        taken.add(name)
        names[file] = name
    return names


def _eight_bit(array: np.ndarray) -> np.ndarray:
    return array if array.dtype == np.uint8 else (array * 255).round().astype(np.uint8)


def format_table(results: Sequence[Inspection | Failure]) -> str:
    """The results as a plain-text table."""
    header = ("file", "score", "threshold", "p-value", "verdict", "seconds", "where")
    rows = [header]
    for result in results:
        if isinstance(result, Failure):
            rows.append((result.file, "", "", "", "not read", "", ""))
            continue
        rows.append(
            (
                result.file,
                f"{result.score:.4f}",
                "-" if result.threshold is None else f"{result.threshold:.4f}",
                "-" if result.p_value is None else f"{result.p_value:.3f}",
                result.verdict or "-",
                f"{result.seconds:.2f}",
                ", ".join(dict.fromkeys(result.where[:3])),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def write_json(path: Path, model: str, results: Sequence[Inspection | Failure]) -> None:
    """Writes all results as one JSON file."""
    content = {
        "model": model,
        "images": [asdict(result) for result in results if isinstance(result, Inspection)],
        "failures": [asdict(result) for result in results if isinstance(result, Failure)],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps(_finite(content), indent=2) + "\n")


def write_csv(path: Path, results: Sequence[Inspection | Failure]) -> None:
    """Writes a row per image; files that could not be read have their reason in the last column."""
    columns = [
        "file",
        "score",
        "threshold",
        "verdict",
        "p_value",
        "seconds",
        "regions",
        "largest_box",
        "where",
        "error",
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=columns, restval="")
        writer.writeheader()
        for result in results:
            if isinstance(result, Failure):
                writer.writerow(asdict(result))
                continue
            row = {name: getattr(result, name) for name in columns[:6]}
            largest = max(result.regions, key=lambda region: region["area_px"], default=None)
            row["regions"] = len(result.regions)
            row["largest_box"] = "" if largest is None else " ".join(map(str, largest["box"]))
            row["where"] = "; ".join(result.where)
            writer.writerow({name: "" if value is None else value for name, value in row.items()})


def _finite(value: Any) -> Any:
    """JSON has no infinity: a threshold that no score exceeds is written as null."""
    if isinstance(value, float) and not np.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
