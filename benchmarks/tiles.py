"""Time and memory of images that go through the networks in tiles.

    python -m benchmarks tiles                # `perceptual` with random weights, 512 px high, up to 8192 px wide

Every width is inspected in a process of its own: the most memory it took, less what it had taken once the model was
loaded, and the seconds of one image. Without tiles (the column `whole`), memory grows with the image.
"""

import multiprocessing
import resource
import time
from typing import Any

import torch

from benchmarks.machine import CPU, describe, make_parser, report
from diffusionad_hf import DiffusionADPipeline, build_pipeline


def measure(height: int, width: int, tile: int | None) -> dict[str, Any]:
    torch.manual_seed(0)
    networks = build_pipeline("perceptual", height).components
    pipe = DiffusionADPipeline(**networks, image_size=(height, width), tile_size=tile)
    scan = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    pipe(scan)
    seconds = time.perf_counter() - began
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"px": f"{height} x {width}", "tile": tile or "whole", "mb": peak, "seconds": seconds}


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--height", type=int, default=512, help="of the images, and of the tiles, in px")
    parser.add_argument("--widths", type=int, nargs="+", default=[512, 2048, 8192], help="of the images in px")
    parser.add_argument("--whole", type=int, default=2048, help="largest width that is inspected without tiles too")
    args = parser.parse_args(argv)
    cases = [(width, tile) for width in args.widths for tile in (args.height, None) if tile or width <= args.whole]
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        rows = [pool.apply(measure, (args.height, *case)) for case in cases]
    report({"machine": describe(CPU), "threads": torch.get_num_threads(), "rows": rows}, args.json)


if __name__ == "__main__":
    main()
