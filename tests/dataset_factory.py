"""Writes small datasets with real files in each layout, for every test that needs images.

Normal images are a smooth grey texture; a defect is a bright square, and the mask says where. An image depends on its
name within the dataset alone, so two calls write the same bytes, wherever they write.
"""

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
    root: Path, name: str, defective: bool = False, size: tuple[int, int] = SIZE, mask: str | None = None
) -> None:
    """Writes the image `name` below `root`, and its mask under the name `mask`, if any."""
    for target, picture in zip((name, mask), make_image(name, defective, size), strict=True):
        if target is not None:
            (root / target).parent.mkdir(parents=True, exist_ok=True)
            picture.save(root / target)


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
    for split, count in (("train", train), ("test", good)):
        for i in range(count):
            write_image(root, f"{category}/{split}/{normal}/{i:03}{image_format}", size=size)
    for defect, count in defects.items():
        for i in range(count):
            mask = f"{category}/ground_truth/{defect}/{i:03}{mask_suffix}.png"
            write_image(root, f"{category}/test/{defect}/{i:03}{image_format}", True, size, mask)
    return root


def make_visa(root: Path, categories: tuple[str, ...] = ("candle", "pcb1"), *, train: int = 5, test: int = 2) -> Path:
    """VisA as downloaded: a table of files; masks hold small class numbers. Returns the root."""
    rows = [["object", "split", "label", "image", "mask"]]
    for category in categories:
        for i in range(train + test):
            image = f"{category}/Data/Images/Normal/{i:04}.JPG"
            write_image(root, image)
            rows.append([category, "train" if i < train else "test", "normal", image, ""])
        for i in range(test):
            image, mask = f"{category}/Data/Images/Anomaly/{i:03}.JPG", f"{category}/Data/Masks/Anomaly/{i:03}.png"
            write_image(root, image, True, mask=mask)
            numbers = (np.asarray(Image.open(root / mask)) > 0).astype(np.uint8) * (i + 1)
            Image.fromarray(numbers).save(root / mask)
            rows.append([category, "test", "anomaly", image, mask])
    (root / "split_csv").mkdir(parents=True)
    with (root / "split_csv" / "1cls.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return root


def make_dagm(
    root: Path, categories: tuple[str, ...] = ("Class1", "Class2"), *, normal: int = 4, defective: int = 2
) -> Path:
    """DAGM 2007: defective images in both splits, told from normal ones by their label file alone. Returns the
    root."""
    for folder in (f"{category}/{split}" for category in categories for split in ("Train", "Test")):
        lines = ["1"]
        for i in range(normal + defective):
            label = f"{i:04}_label.PNG" if i >= normal else None
            write_image(root, f"{folder}/{i:04}.PNG", i >= normal, mask=label and f"{folder}/Label/{label}")
            lines.append(f"{i}\t{int(i >= normal)}\t{i:04}.PNG\t0\t{label or 0}")
        (root / folder / "Label" / "Labels.txt").write_text("\n".join(lines) + "\n")
    return root


def make_folder(root: Path, *, normal: int = 10, defects: Mapping[str, int] = DEFECTS, masks: bool = False) -> Path:
    """A plain folder: good/, and one folder a defect; returns the root."""
    for i in range(normal):
        write_image(root, f"good/{i:03}.png")
    for name in (f"{defect}/{i:03}.png" for defect, count in defects.items() for i in range(count)):
        write_image(root, name, True, mask=f"ground_truth/{name}" if masks else None)
    return root


def make_flat(root: Path, *, normal: int = 6) -> Path:
    """Normal images and nothing else; returns the root."""
    for i in range(normal):
        write_image(root, f"{i:03}.jpg")
    return root
