"""Real products, from nothing: trains each category and evaluates it on its test images.

    python -m benchmarks real --data DIR                    # every category with a test set below DIR
    python -m benchmarks real --data DIR --quick            # 40 steps and few test images: does it run?
    python -m benchmarks real --data DIR --categories mvtec_ad/bottle cookie --seeds 0 1 2
    python -m benchmarks real --data DIR --categories mvtec_ad/bottle --photos 5 10 25 50 --seeds 0 1 2    # few photos

Categories lie below DIR in the layout of MVTec AD, at any depth. Everything is trained with the preset's own values:
the same for every category, on a GPU if there is one. Test images are read once the training is over. Textures are
those of DIR/dtd/images if it is there. The table has the mean of the seeds and half the distance between their
extremes. With `--photos`, each seed also draws which photos are learnt from.
"""

import itertools
import math
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import CPU, describe, make_parser, matmul_peak, report, save
from benchmarks.recorded import TRIALS, read_rows

COLUMNS = (
    *("image_auroc", "pixel_auroc", "pixel_ap", "aupro_30", "wall_seconds", "processor_seconds", "peak_gb"),
    "seconds_per_image",
)
_QUICK = ["--max-train-steps", "40", "--validation-steps", "40"]
_QUICK_TEST_IMAGES = 40


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder of the categories")
    parser.add_argument("--categories", nargs="+", metavar="C", help="paths below DIR; all of them by default")
    parser.add_argument("--preset", default="perceptual")
    parser.add_argument("--resolution", type=int, help="the preset's by default")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="S", help="one training each")
    parser.add_argument(
        "--photos", type=int, nargs="+", default=[0], metavar="N", help="learn from N of the photos only"
    )
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--max-train-steps", type=int, metavar="N", help="the preset's by default")
    parser.add_argument("--quick", action="store_true", help="whether it runs, not how well")
    parser.add_argument("--output-dir", type=Path, metavar="DIR", help="keep the pipelines here")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    categories = args.categories or find_categories(args.data)
    if not categories:
        raise SystemExit(f"{args.data}: no folder below it holds train/good and test.")
    options = ["--preset", args.preset, "--report-to", "none", *(_QUICK if args.quick else [])]
    if (textures := args.data / "dtd/images").is_dir():
        options += ["--texture-dir", str(textures)]
    options += ["--resolution", str(args.resolution)] if args.resolution else []
    options += ["--max-train-steps", str(args.max_train_steps)] if args.max_train_steps else []
    device = torch.device("cuda") if torch.cuda.is_available() else CPU

    result: dict[str, Any] = {"machine": describe(device), "threads": args.threads, "options": options, "rows": []}
    where = f"{args.threads} threads" if device == CPU else "the GPU"
    result["machine"]["matmul"] = f"{matmul_peak(device, torch.float32) / 1e9:.0f} GFLOP/s on {where}"
    with tempfile.TemporaryDirectory() as scratch:
        for category in categories:
            for photos, seed in itertools.product(args.photos, args.seeds):
                name = "-".join([*Path(category).parts, *([str(photos)] if photos else []), str(seed)])
                folder = args.data / category
                if photos:
                    folder = draw_photos(folder, photos, seed, Path(scratch) / "drawn" / name)
                output = (args.output_dir or Path(scratch)) / name
                row = run(folder, output, [*options, "--seed", str(seed)], device, args.quick)
                result["rows"].append({"category": category, "photos": photos or "all", "seed": seed, **row})
                save(result, args.json)
                print(_summary(result["rows"][-1:]), file=sys.stderr, flush=True)
    same = itertools.groupby(result["rows"], key=lambda row: (row["category"], row["photos"]))
    as_recorded = args.preset == "perceptual" and not (args.quick or args.max_train_steps)
    recorded = read_rows(TRIALS, "What the default preset reaches") if as_recorded else []
    report(result, args.json, [_summary(list(rows)) for _, rows in same], recorded, ["category", "px", "photos"])


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    summary = {name: rows[0][name] for name in ("category", "px", "photos")}
    for name in COLUMNS:
        # Metrics that need masks are absent without them.
        if values := [row[name] for row in rows if name in row]:
            half_range = f" ± {(max(values) - min(values)) / 2:.3f}" if len(values) > 1 else ""
            summary[name] = f"{statistics.mean(values):.3f}{half_range}"
    return summary


def find_categories(data: Path) -> list[str]:
    """The categories below a folder, as paths relative to it."""
    return sorted(
        str(p.parent.parent.relative_to(data)) for p in data.rglob("train/good") if (p / "../../test").is_dir()
    )


def draw_photos(folder: Path, count: int, seed: int, target: Path) -> Path:
    """A category as it is, but for its normal photos: links to `count` of them, drawn by the seed."""
    photos = sorted((folder / "train/good").iterdir())
    if count > len(photos):
        raise SystemExit(f"--photos {count}: {folder} has {len(photos)} to learn from.")
    (target / "train/good").mkdir(parents=True)
    for photo in random.Random(seed).sample(photos, count):
        (target / "train/good" / photo.name).symlink_to(photo.resolve())
    for part in ("test", "ground_truth"):
        (target / part).symlink_to((folder / part).resolve())
    return target


def run(
    folder: Path, output: Path, options: list[str], device: torch.device = CPU, quick: bool = False
) -> dict[str, Any]:
    """Trains one category, where Accelerate does, and evaluates it on a device."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    from diffusionad_hf import DiffusionADPipeline
    from diffusionad_hf.data import load_category
    from diffusionad_hf.evaluation.evaluator import evaluate_pipeline
    from diffusionad_hf.training import loop

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    where = ["--data-dir", str(folder.parent), "--category", folder.name, "--output-dir", str(output)]
    wall, processor = time.perf_counter(), time.process_time()
    if loop.main([*where, *options]):
        raise SystemExit(f"{folder}: the training failed.")
    spent = {"wall_seconds": time.perf_counter() - wall, "processor_seconds": time.process_time() - processor}
    if device.type == "cuda":
        spent["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    pipe = DiffusionADPipeline.from_pretrained(output).to(device)
    pipe.set_progress_bar_config(disable=True)
    test = load_category(str(folder.parent), folder.name)["test"]
    if quick:
        test = test.select(range(0, len(test), max(1, len(test) // _QUICK_TEST_IMAGES)))
    px = round(math.prod(pipe.size) ** 0.5)
    return {"px": px, **spent, **evaluate_pipeline(pipe, test, progress=False).metrics}


if __name__ == "__main__":
    main()
