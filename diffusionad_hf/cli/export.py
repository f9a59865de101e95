"""`diffusionad export`."""

import argparse
import sys
from pathlib import Path
from typing import Any

# As in `cli`: what takes seconds to import is imported when a command runs, so that --help answers at once.

__all__ = ["add_export_command"]


def add_export_command(subparsers: Any) -> None:
    """Adds `diffusionad export`."""
    parser = subparsers.add_parser(
        "export",
        help="write a model for OpenVINO or ONNX Runtime, which are faster on a CPU",
        description="Writes a model as one graph for OpenVINO or ONNX Runtime, into a folder that inspect,\n"
        "calibrate and evaluate take as --model.",
        epilog="OpenVINO's own tools report usage statistics to their maker on export; `opt_in_out --opt_out` stops "
        "that.\n\nexample: diffusionad export --model my_model --precision int8 int8_model --calibration-images good/",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("output_dir", metavar="OUT", type=Path, help="folder to write; an earlier export is replaced")
    parser.add_argument("--model", required=True, metavar="M", help="a pipeline folder, or a Hub id such as org/name")
    parser.add_argument("--revision", metavar="R", help="branch, tag or commit of a Hub id")
    parser.add_argument("--format", choices=("openvino", "onnx"), default="openvino", help="(default: openvino)")
    parser.add_argument(
        "--precision",
        choices=("fp32", "fp16", "int8"),
        default="fp32",
        help="int8 is the fastest and needs --calibration-images (default: fp32)",
    )
    parser.add_argument(
        "--calibration-images",
        nargs="+",
        default=[],
        metavar="INPUT",
        help="normal images that the model was not trained on: files, folders or glob patterns; int8 measures its "
        "ranges on up to 64 of them, and the threshold is calibrated anew on the others",
    )
    parser.set_defaults(run=_run_export)


def _run_export(args: argparse.Namespace) -> int:
    import torch
    from diffusers.utils import logging

    from ..export.exporting import ORIGINAL, export_pipeline
    from ..inspection.inspection import Failure, find_images, read_images
    from ..loading import load_model
    from ..pipeline_diffusionad import resize_image

    files, failures = find_images(args.calibration_images)
    logging.disable_progress_bar()
    pipe = load_model(args.model, device="cpu", **({"revision": args.revision} if args.revision else {}))
    pipe.set_progress_bar_config(disable=True)
    images = []
    for _, image in read_images(files):
        if isinstance(image, Failure):
            failures.append(image)
        else:
            # As `calibrate` keeps them.
            images.append((resize_image(image, pipe.config.image_size) * 255).round().to(torch.uint8))
    if args.calibration_images and not images:
        raise ValueError("--calibration-images: " + " ".join(failure.error for failure in failures))
    exported = export_pipeline(
        pipe, args.output_dir, format=args.format, precision=args.precision, calibration_images=images
    )
    record = exported.record
    difference = record["score_difference"]
    print(
        f"Wrote {args.output_dir}: {record['format']} {record['precision']}, {record['image_size']} px; scores differ "
        f"from the original's by {difference['mean']:.4f} on average over {difference['images']} image(s), by "
        f"{difference['largest']:.4f} at most."
    )
    if exported.threshold is None:
        print("Not calibrated: run `diffusionad calibrate` with normal images next.")
    elif record["calibrated_with"] != ORIGINAL:
        print(f"The threshold {exported.threshold:.4f} was calibrated anew on normal images.")
    else:
        print(f"The threshold {exported.threshold:.4f} is the original's.")
        if record["precision"] != "fp32":
            print(
                f"It was not calibrated on {record['precision']} scores: run `diffusionad calibrate` on this folder."
            )
    for failure in failures:
        print(f"  left out: {failure.error}", file=sys.stderr)
    return 2 if failures else 0
