"""`diffusionad export`."""

import argparse
from pathlib import Path
from typing import Any

from .options import add_command, add_model_option, load_pipeline, read_normal_images, report_left_out


def add_commands(commands: Any) -> None:
    parser = add_command(
        commands,
        "export",
        "write a model for OpenVINO or ONNX Runtime, which are faster on a CPU",
        _export,
        description="Writes a model as one graph for OpenVINO or ONNX Runtime, into a folder that inspect,\n"
        "calibrate and evaluate take as --model.",
        epilog="OpenVINO's own tools report usage statistics to their maker on export; `opt_in_out --opt_out` stops "
        "that.\n\nexample: diffusionad export --model my_model --precision int8 int8_model --calibration-images good/",
    )
    parser.add_argument("output_dir", metavar="OUT", type=Path, help="folder to write; an earlier export is replaced")
    add_model_option(parser)
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


def _export(args: argparse.Namespace) -> int:
    from ..export.exporting import ORIGINAL, export_pipeline

    pipe = load_pipeline(args, "cpu")
    images: list = []
    failures: list[str] = []
    if args.calibration_images:
        images, failures = read_normal_images(args.calibration_images, pipe)
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
                f"It is not calibrated for {record['precision']}: its verdicts are undecided until "
                "`diffusionad calibrate` is run on this folder."
            )
    return report_left_out(failures)
