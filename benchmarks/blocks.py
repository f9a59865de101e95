"""
Seconds that `diffusionad inspect --parquet` spends on its bookkeeping for 300,000 files: all but images and model.

Blocks of made-up results are written and merged.
"""

import tempfile
import time
from pathlib import Path

from benchmarks.machine import CPU, describe, make_parser, report
from diffusionad_hf.inspection.blocks import _row, _write_block, merge_blocks, open_run
from diffusionad_hf.inspection.inputs import FileInputs
from diffusionad_hf.inspection.records import Inspection

_FILES, _BATCH_SIZE = 300_000, 16
_REGION = {"box": (1, 2, 30, 40), "area_px": 900, "area_fraction": 0.1, "peak": 0.9, "peak_xy": (9, 9), "mean": 0.7}


def main(argv: list[str] | None = None) -> None:
    args = make_parser(__doc__).parse_args(argv)
    rows = []
    began = time.perf_counter()

    def mark(step: str) -> None:
        rows.append({"step": step, "seconds": time.perf_counter() - began - sum(row["seconds"] for row in rows)})

    with tempfile.TemporaryDirectory() as folder:
        inputs = FileInputs([Path(f"photos/{i // 1000:04d}/{i:07d}.png") for i in range(_FILES)])
        mark("list the files")
        next(inputs.read(0, 1))
        mark("name the pictures")
        with open_run(Path(folder) / "blocks", inputs, {"model": "none"}, _BATCH_SIZE) as run:
            verdict = ("anomalous", "calibrated", "Calibrated.", 0.01, True, 0.5)
            for block in run.missing():
                items = inputs.read(*run.span(block))
                found = (Inspection(i.name, 0.9, 0.5, *verdict, 0, ["top left"], [_REGION]) for i in items)
                _write_block(run, block, [_row(result) for result in found])
            mark("write the blocks")
            assert not run.missing()
            mark("find what is missing")
            merge_blocks(run, Path(folder) / "results.parquet")
            mark("merge the blocks")
    report({"machine": describe(CPU), "files": _FILES, "blocks": len(run.blocks), "rows": rows}, args.json)


if __name__ == "__main__":
    main()
