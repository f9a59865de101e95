"""Which photos count as unfamiliar: normal and defective ones, other products, and altered copies of normal ones.

    python -m benchmarks familiarity --data DIR

Categories lie below DIR in the layout of MVTec AD. Each learns what is normal from training images only, drawn at
random; no network has a part in it. The share of the category's test images that are unfamiliar, mean of the draws.
"""

import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from benchmarks.machine import CPU, make_parser, report
from benchmarks.machine import describe as describe_machine
from benchmarks.real import find_categories
from benchmarks.recorded import BENCHMARKS, read_rows
from diffusionad_hf.familiarity_diffusionad import Familiarity, describe
from diffusionad_hf.images_diffusionad import load_image
from diffusionad_hf.inspection.inspection import find_images


def _crop(share: float) -> Callable[[Image.Image], Image.Image]:
    return lambda photo: ImageOps.fit(ImageOps.crop(photo, int(min(photo.size) * (1 - share) / 2)), photo.size)


def _tilted(photo: Image.Image, degrees: float = 15) -> Image.Image:
    """Turned, with its edge continued into the corners."""
    across, down = (side // 4 for side in photo.size)
    padded = Image.fromarray(np.pad(np.asarray(photo), ((down, down), (across, across), (0, 0)), mode="edge"))
    box = (across, down, across + photo.width, down + photo.height)
    return padded.rotate(degrees, Image.Resampling.BILINEAR).crop(box)


ALTERED: dict[str, Callable[[Image.Image], Image.Image]] = {
    "half the light": lambda photo: ImageEnhance.Brightness(photo).enhance(0.5),
    "a fifth less": lambda photo: ImageEnhance.Brightness(photo).enhance(0.8),
    "half again": lambda photo: ImageEnhance.Brightness(photo).enhance(1.5),
    "middle half": _crop(0.5),
    "middle 4 fifths": _crop(0.8),
    "upside down": lambda photo: photo.rotate(180),
    "a quarter turn": lambda photo: photo.transpose(Image.Transpose.ROTATE_90).resize(photo.size),
    "tilted 15°": _tilted,
    "blur 1 %": lambda photo: photo.filter(ImageFilter.GaussianBlur(photo.width / 100)),
    "blur 2 %": lambda photo: photo.filter(ImageFilter.GaussianBlur(photo.width / 50)),
}
_NORMAL = 20  # photos of each category that are altered


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder of the categories")
    parser.add_argument("--known", type=int, nargs="+", default=[13, 25, 50, 100], help="normal images learnt from")
    parser.add_argument("--draws", type=int, default=5, help="default: %(default)s")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    categories = find_categories(args.data)
    tests = {category: _tests(args.data / category) for category in categories}
    rows = []
    for category in categories:
        train = [_grid(file) for file in find_images([args.data / category / "train/good"])[0]]
        others = [grid for other in categories if other != category for grid in tests[other]["normal"]]
        photos = tests[category] | {"other products": others, "blank, noise": _blank()}
        for known in sorted({min(known, len(train)) for known in args.known}):
            draws = [np.random.default_rng(seed).permutation(len(train))[:known] for seed in range(args.draws)]
            learnt = [Familiarity.of([train[i] for i in draw]) for draw in draws]
            shares = {
                name: statistics.mean(one.strangeness(grid) > 1 for one in learnt for grid in grids)
                for name, grids in photos.items()
            }
            rows.append({"category": category, "known": known, **{name: f"{v:.2f}" for name, v in shares.items()}})
    result = {"machine": describe_machine(CPU), "draws": args.draws, "rows": rows}
    report(result, args.json, recorded=read_rows(BENCHMARKS, "Photos of something else"), keys=["category", "known"])


def _grid(photo: Path | Image.Image) -> np.ndarray:
    return describe(load_image(photo))


def _blank() -> list[np.ndarray]:
    greys = [Image.new("RGB", (256, 256), (level,) * 3) for level in (0, 64, 128, 191, 255)]
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    return [*map(_grid, greys), _grid(Image.fromarray(noise))]


def _tests(folder: Path) -> dict[str, list[np.ndarray]]:
    """The grids of a category's test images, and of altered copies of the first normal ones."""
    files = find_images([folder / "test"])[0]
    normal = [file for file in files if file.parent.name == "good"]
    photos = [Image.open(file).convert("RGB") for file in normal[:_NORMAL]]
    return {
        "normal": [_grid(file) for file in normal],
        "defective": [_grid(file) for file in files if file.parent.name != "good"],
        **{name: [_grid(alter(photo)) for photo in photos] for name, alter in ALTERED.items()},
    }


if __name__ == "__main__":
    main()
