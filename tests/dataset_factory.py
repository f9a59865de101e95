"""Writes small data sets with real files in each layout, for every test that needs images.

Normal images are a smooth grey texture; a defect is a bright square, and the mask says where. Everything follows from
the names, so two calls write the same bytes.
"""

from __future__ import annotations

import csv
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (48, 32)  # width, height: not square, so that swapped axes show
DEFECTS = {"hole": 3, "scratch": 2}


def make_image(
    seed_name: str, defective: bool = False, size: tuple[int, int] = SIZE
) -> tuple[Image.Image, Image.Image]:
    """An RGB image and its mask (L, 0 / 255) of `size` (width, height)."""
    width, height = size
    rng = np.random.default_rng(zlib.crc32(seed_name.encode()))
    shade = 90 + 40 * np.sin(np.linspace(0, 6, width))[None, :, None] + rng.normal(0, 4, (height, width, 3))
    mask = np.zeros((height, width), dtype=bool)
    if defective:
        side = min(width, height) // 4
        top, left = rng.integers(0, height - side), rng.integers(0, width - side)
        mask[top : top + side, left : left + side] = True
        shade[mask] += 100
    return Image.fromarray(shade.clip(0, 255).astype(np.uint8)), Image.fromarray((mask * 255).astype(np.uint8))


def write_image(
    path: Path, defective: bool = False, size: tuple[int, int] = SIZE, mask_path: Path | None = None
) -> Path:
    """Write one image, and its mask if `mask_path` is given; folders are made. Returns `path`."""
    image, mask = make_image(path.as_posix()[-60:], defective, size)
    for target, picture in ((path, image), (mask_path, mask)):
        if target is not None:
            target.parent.mkdir(parents=True, exist_ok=True)
            picture.save(target)
    return path


def make_mvtec(
    root: Path,
    category: str = "widget",
    *,
    train: int = 6,
    good: int = 3,
    defects: Mapping[str, int] = DEFECTS,
    size: tuple[int, int] = SIZE,
    normal: str = "good",
    mask_suffix: str = "_mask",
    image_format: str = ".png",
) -> Path:
    """One category in MVTec AD's layout; returns the root.

    `normal="ok", defects={"ko": 3}, mask_suffix="", image_format=".bmp"` is BTAD; `defects={"bad": 3}, mask_suffix="",
    image_format=".JPG"` is VisA converted.
    """
    folder = root / category
    for split, count in (("train", train), ("test", good)):
        for i in range(count):
            write_image(folder / split / normal / f"{i:03}{image_format}", size=size)
    for defect, count in defects.items():
        for i in range(count):
            mask_path = folder / "ground_truth" / defect / f"{i:03}{mask_suffix}.png"
            write_image(folder / "test" / defect / f"{i:03}{image_format}", True, size, mask_path)
    return root


def make_visa(root: Path, categories: tuple[str, ...] = ("candle", "pcb1"), *, train: int = 5, test: int = 2) -> Path:
    """VisA as downloaded: a table of files; masks hold small class numbers. Returns the root."""
    rows = []
    for category in categories:
        images = Path(category) / "Data" / "Images"
        for i in range(train + test):
            image = images / "Normal" / f"{i:04}.JPG"
            write_image(root / image)
            rows.append([category, "train" if i < train else "test", "normal", image.as_posix(), ""])
        for i in range(test):
            image, mask = (
                images / "Anomaly" / f"{i:03}.JPG",
                Path(category) / "Data" / "Masks" / "Anomaly" / f"{i:03}.png",
            )
            write_image(root / image, True, mask_path=root / mask)
            numbers = (np.asarray(Image.open(root / mask)) > 0).astype(np.uint8) * (i + 1)
            Image.fromarray(numbers).save(root / mask)
            rows.append([category, "test", "anomaly", image.as_posix(), mask.as_posix()])
    (root / "split_csv").mkdir(parents=True)
    with (root / "split_csv" / "1cls.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["object", "split", "label", "image", "mask"], *rows])
    return root


def make_dagm(
    root: Path, categories: tuple[str, ...] = ("Class1", "Class2"), *, normal: int = 4, defective: int = 2
) -> Path:
    """DAGM 2007: defective images in both splits, told from normal ones by their label file alone. Returns the
    root."""
    for category in categories:
        for split in ("Train", "Test"):
            folder = root / category / split
            lines = ["1"]
            for i in range(normal + defective):
                name, is_defective = f"{i:04}", i >= normal
                mask_path = folder / "Label" / f"{name}_label.PNG" if is_defective else None
                write_image(folder / f"{name}.PNG", is_defective, mask_path=mask_path)
                lines.append(
                    f"{i}\t{int(is_defective)}\t{name}.PNG\t0\t" + (f"{name}_label.PNG" if is_defective else "0")
                )
            (folder / "Label" / "Labels.txt").write_text("\n".join(lines) + "\n")
    return root


def make_folder(root: Path, *, normal: int = 10, defects: Mapping[str, int] = DEFECTS, masks: bool = False) -> Path:
    """A plain folder: good/, and one folder a defect; returns the root."""
    for i in range(normal):
        write_image(root / "good" / f"{i:03}.png")
    for defect, count in defects.items():
        for i in range(count):
            mask_path = root / "ground_truth" / defect / f"{i:03}.png" if masks else None
            write_image(root / defect / f"{i:03}.png", True, mask_path=mask_path)
    return root


def make_flat(root: Path, *, normal: int = 6) -> Path:
    """Normal images and nothing else; returns the root."""
    for i in range(normal):
        write_image(root / f"{i:03}.jpg")
    return root
