"""Procedural photographs of a machined flange, normal and defective, in the MVTec AD folder layout.

    python -m demo_part --out DIR --seed S

The part is lit by one near light and seen from above, as on a granite inspection table: `part` draws it, `defects`
damages it, `photograph` takes the picture.
"""

from __future__ import annotations

import argparse
import sys
import zlib
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from .defects import DEFECT_TYPES, render_defective_part
from .photograph import check_size, render_part

CATEGORY = "demo-part"
# Sensor noise hardly compresses: zlib's default level takes twice as long to save a tenth.
PNG_EFFORT = 3


def _write(folder: Path, seed: int, size: int, job: tuple[str, str, int]) -> None:
    """Renders and saves one picture; its random stream depends only on seed, split, kind and index."""
    split, kind, index = job
    stream = zlib.crc32(f"{split}/{kind}".encode())
    rng = np.random.default_rng(np.random.SeedSequence([seed, stream, index]))
    if kind == "good":
        picture = render_part(rng, size)
    else:
        picture, mask = render_defective_part(rng, kind, size)
        Image.fromarray(mask.astype(np.uint8) * 255).save(folder / f"ground_truth/{kind}/{index:03d}_mask.png")
    Image.fromarray(picture).save(folder / f"{split}/{kind}/{index:03d}.png", compress_level=PNG_EFFORT)


def generate(
    out: str | Path,
    seed: int,
    *,
    train: int = 300,
    test_good: int = 100,
    test_defective: int = 100,
    size: int = 256,
    workers: int = 1,
    progress: bool = False,
) -> Path:
    """Write a whole category in the MVTec AD layout, `out`/demo-part/{train,test,ground_truth}.

    A picture depends only on the seed, its split, type and index, so larger sets begin with the smaller ones and the
    number of workers changes nothing.

    Args:
        out: Folder to create; may exist if it is empty.
        seed: Seed of the whole set.
        train, test_good: Numbers of normal pictures.
        test_defective: Number of defective pictures, shared evenly among `DEFECT_TYPES`.
        size: Side of the pictures in pixels.
        workers: Number of processes.
        progress: Whether to show a progress bar.

    Returns:
        The category's folder.

    Raises:
        ValueError: If a number is out of range.
        OSError: If `out` cannot be written or is not an empty folder.
    """
    check_size(size)
    numbers = {"seed": seed, "train": train, "test_good": test_good, "test_defective": test_defective}
    for name, value in numbers.items():
        if value < 0:
            raise ValueError(f"{name} must not be negative, got {value}")
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not an empty folder; choose another one or remove it")

    folder = out / CATEGORY
    share, rest = divmod(test_defective, len(DEFECT_TYPES))
    wanted = [("train", "good", train), ("test", "good", test_good)]
    wanted += [("test", name, share + (i < rest)) for i, name in enumerate(DEFECT_TYPES)]
    jobs = [(split, name, i) for split, name, count in wanted for i in range(count)]
    folders = [f"{split}/{name}" for split, name, count in wanted if count or name == "good"]
    folders += [f"ground_truth/{name}" for _, name, count in wanted if count and name != "good"]
    try:
        for name in folders:
            (folder / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot create {folder}: {error.strerror}; choose a folder that can be written") from error

    write = partial(_write, folder, seed, size)
    # Spawned, as forking a process that already runs threads may hang.
    with ProcessPoolExecutor(workers, get_context("spawn")) if workers > 1 else nullcontext() as pool:
        done = pool.map(write, jobs, chunksize=4) if pool else map(write, jobs)
        for _ in tqdm(done, total=len(jobs), unit="image", disable=not progress):
            pass
    return folder


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m demo_part", description="Make photographs of a machined part, normal and defective."
    )
    add = partial(parser.add_argument, type=int)
    parser.add_argument("--out", type=Path, required=True, help="folder to create (the category lands in it)")
    add("--seed", required=True, help="seed of the set; equal seeds give equal files")
    add("--train", default=300, help="normal training pictures (default: %(default)s)")
    add("--test-good", default=100, help="normal test pictures (default: %(default)s)")
    add("--test-defective", default=100, help="defective test pictures over all types (default: %(default)s)")
    add("--size", default=256, help="side of the pictures in pixels (default: %(default)s)")
    add("--workers", default=2, help="processes (default: %(default)s)")
    options = vars(parser.parse_args(argv))
    try:
        folder = generate(progress=True, **options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
