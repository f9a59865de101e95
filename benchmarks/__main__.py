"""`python -m benchmarks NAME ...`: one command for every measurement."""

import argparse
import importlib
import sys

# Only the measurement that is asked for is imported, as all of them import torch.
MEASUREMENTS = {
    "inference": "images a second, against the paper's way of computing",
    "training": "images a second (and GPU memory) of a training step, synthesis included",
    "synthesis": "synthetic anomalies a second",
    "metrics": "time and memory of the evaluation's metrics",
    "intervals": "how often the 95 % intervals of an evaluation hold the truth",
    "promises": "whether calibrations keep the false-alarm rate that they promise",
    "embedded": "the embedded models on their test photos",
    "familiarity": "which photos count as unlike the normal ones, on real products",
    "blocks": "bookkeeping of an inspection of 300,000 files",
    "real": "real products: trained and evaluated from nothing, category by category",
    "tiles": "time and memory of long images, in tiles and whole",
    "page": "the web demo: first paint, first verdict, a batch of 500 photos, 1,000 requests",
    "visitors": "the web demo: latency of 20 visitors while five others flood, drip and send bombs",
    "teach": "the web demo: from photos to the first verdict, and what other visitors wait for meanwhile",
    "runtimes": "exported models: OpenVINO and ONNX against PyTorch",
}
# {(page, heading): what rebuilds the figures of its table, with the seeds of the record}
TABLES = {
    ("README.md", "What is embedded"): ["embedded --data DIR"],
    ("README.md", "Measured on real products"): [
        "real --data DIR --categories mvtec_ad/bottle mpdd/metal_plate cookie --seeds 0 1 2 --threads 1",
        "real --data DIR --categories aitex/fabric_03 --threads 1",
        "real --data DIR --categories mvtec_ad/screw --resolution 512 --threads 2",
    ],
    ("space/README.md", "Photos of something else"): ["familiarity --data DIR"],
    ("benchmarks/README.md", "Inspection"): [
        "inference --presets small tiny --batch-sizes 1 4 --dtypes float32 bfloat16 --repeats 4"
    ],
    ("benchmarks/README.md", "Long images in tiles"): ["tiles --height 256 --widths 256 1024 4096 --whole 1024"],
    ("benchmarks/README.md", "Intervals"): ["intervals"],
    ("benchmarks/README.md", "What calibrations promise"): ["promises"],
    ("benchmarks/README.md", "Other runtimes"): ["runtimes --preset small --threads 2"],
    ("benchmarks/README.md", "Training"): [
        "training --presets tiny small --dtypes float32 bfloat16 --layouts contiguous channels_last"
    ],
    ("benchmarks/README.md", "Photos of something else"): ["familiarity --data DIR"],
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measures speed and memory; results and how they were taken are in benchmarks/README.md.",
        epilog="measurements:\n"
        + "\n".join(f"  {name:<11} {what}" for name, what in MEASUREMENTS.items())
        + "\n\ntables, and what rebuilds them (DIR: folder of the data sets, each in MVTec AD's layout):\n"
        + "\n".join(_commands(*table) for table in TABLES)
        + "\n\n`python -m benchmarks NAME --help` lists a measurement's options. Figures that follow from data\n"
        "and seeds (embedded, real, intervals, promises, familiarity) are compared with the recorded ones at the end.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=MEASUREMENTS, metavar="NAME", help="one of those below")
    parser.add_argument("options", nargs=argparse.REMAINDER, metavar="...", help="its options")
    args = parser.parse_args(argv)
    sys.argv = [f"{parser.prog} {args.name}", *args.options]
    importlib.import_module(f"benchmarks.{args.name}").main()


def _commands(page: str, heading: str) -> str:
    lines = [f"    python -m benchmarks {command}" for command in TABLES[page, heading]]
    return "\n".join([f'  {page}, "{heading}"', *lines])


if __name__ == "__main__":
    main()
