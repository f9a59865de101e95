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
    "familiarity": "which photos count as unlike the normal ones, on real products",
    "blocks": "bookkeeping of an inspection of 300,000 files",
    "real": "real products: trained and evaluated from nothing, category by category",
    "tiles": "time and memory of long images, in tiles and whole",
    "page": "the web demo: first paint, first verdict, a batch of 500 photos, 1,000 requests",
    "visitors": "the web demo: latency of 20 visitors while five others flood, drip and send bombs",
    "teach": "the web demo: from photos to the first verdict, and what other visitors wait for meanwhile",
    "runtimes": "exported models: OpenVINO and ONNX against PyTorch",
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measures speed and memory; results and how they were taken are in benchmarks/README.md.",
        epilog="measurements:\n"
        + "\n".join(f"  {name:<11} {what}" for name, what in MEASUREMENTS.items())
        + "\n\n`python -m benchmarks NAME --help` lists a measurement's options.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=MEASUREMENTS, metavar="NAME", help="one of those below")
    parser.add_argument("options", nargs=argparse.REMAINDER, metavar="...", help="its options")
    args = parser.parse_args(argv)
    sys.argv = [f"{parser.prog} {args.name}", *args.options]
    importlib.import_module(f"benchmarks.{args.name}").main()


if __name__ == "__main__":
    main()
