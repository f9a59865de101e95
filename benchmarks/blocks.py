"""
Seconds that `diffusionad inspect --parquet` spends on its bookkeeping: all but the images and the model.

Blocks of made-up results are written for as many files as asked for, and merged.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.machine import describe, report
from diffusionad_hf.flags import DashedParser
from diffusionad_hf.inspection.blocks import _row, _write_block, merge_blocks, open_run
from diffusionad_hf.inspection.inputs import FileInputs
from diffusionad_hf.inspection.records import Inspection

REGION = {"box": (1, 2, 30, 40), "area_px": 900, "area_fraction": 0.1, "peak": 0.9, "peak_xy": (9, 9), "mean": 0.7}


def main(argv: list[str] | None = None) -> None:
    """Measures and prints."""
    parser = DashedParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=300_000, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="images per pass (default: 16)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything here")
    args = parser.parse_args(argv)
    seconds = {}
    marks = [time.perf_counter()]

    def mark(name: str) -> None:
        marks.append(time.perf_counter())
        seconds[name] = marks[-1] - marks[-2]

    with tempfile.TemporaryDirectory() as folder:
        inputs = FileInputs([Path(f"photos/{i // 1000:04d}/{i:07d}.png") for i in range(args.files)])
        mark("listing the files")
        next(inputs.read(0, 1))
        mark("naming the pictures")
        with open_run(Path(folder) / "blocks", inputs, {"model": "none"}, args.batch_size) as run:
            for block in run.missing():
                items = inputs.read(*run.span(block))
                found = (Inspection(i.name, 0.9, 0.5, "anomalous", 0.01, 0, ["top left"], [REGION]) for i in items)
                _write_block(run, block, [_row(result) for result in found])
            mark("writing the blocks")
            assert not run.missing()
            mark("finding what is missing")
            merge_blocks(run, Path(folder) / "results.parquet")
            mark("merging the blocks")
    result = {"machine": describe(torch.device("cpu")), "files": args.files, "blocks": len(run.blocks), "s": seconds}
    lines = [f"{args.files} files, {len(run.blocks)} blocks"]
    lines += [f"{name:<24} {value:7.2f} s" for name, value in [*seconds.items(), ("in all", sum(seconds.values()))]]
    report(result, "\n".join(lines), args.json)


if __name__ == "__main__":
    main()
