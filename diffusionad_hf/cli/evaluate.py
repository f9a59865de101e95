"""`diffusionad evaluate` and `diffusionad convert`."""

import argparse
from pathlib import Path
from typing import Any

from .options import add_command, add_pipeline_options, check_writable, load_pipeline, report_left_out


def add_commands(commands: Any) -> None:
    parser = add_command(
        commands,
        "evaluate",
        "measure a model on a labelled test set: image and pixel AUROC, AP, exact AUPRO, error rates",
        _evaluate,
        epilog="example: diffusionad evaluate --model my_model --data-dir mvtec_ad --category screw "
        "--json evaluation.json",
    )
    add_pipeline_options(parser)
    parser.add_argument(
        "--data-dir",
        required=True,
        metavar="D",
        help="dataset: MVTec AD, VisA, DAGM or plain folder layout, or a Hub dataset id",
    )
    parser.add_argument("--category", metavar="C", help="which category; may be left out if there is only one")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all metrics as JSON")
    parser.add_argument(
        "--plots", metavar="DIR", type=Path, help="write the ROC curve, score histograms and the worst misses here"
    )

    parser = add_command(
        commands,
        "convert",
        "turn a params-*.pt of the paper's own code into a pipeline folder",
        _convert,
        epilog="example: diffusionad convert outputs/model/diff-params-ARGS=1/screw/params-best.pt screw-pipeline",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="the file; nothing in it is executed")
    parser.add_argument("output_dir", metavar="OUTPUT_DIR", type=Path, help="the pipeline folder to write")


def _evaluate(args: argparse.Namespace) -> int:
    from ..data import check_images, load_category
    from ..evaluation.evaluator import evaluate_pipeline
    from ..evaluation.plots import save_plots

    check_writable(args.json and args.json.parent, args.plots)
    test, problems = check_images(load_category(args.data_dir, args.category)["test"])
    pipe = load_pipeline(args, args.device)
    result = evaluate_pipeline(pipe, test, batch_size=args.batch_size)
    print(_format_metrics(result.metrics))
    if args.json is not None:
        result.save_json(args.json)
    if args.plots is not None:
        save_plots(result, test, args.plots)
    return report_left_out(problems)


def _format_metrics(metrics: dict) -> str:
    from ..evaluation.metrics import METRIC_NAMES

    lines = [f"{metrics['num_images']} images, {metrics['num_anomalous']} of them anomalous"]
    intervals = metrics.get("intervals", {})
    for key, name in METRIC_NAMES.items():
        if key in metrics:
            interval = "  [{:.4f}, {:.4f}]".format(*intervals[key]) if key in intervals else ""
            lines.append(f"{name:<24} {metrics[key]:.4f}{interval}")
    for key, name in {"false_alarm_rate": "false-alarm rate", "miss_rate": "miss rate"}.items():
        if key in metrics:
            at = f" {metrics['threshold']:.4f}" if "threshold" in metrics else ""
            lines.append(f"{name:<24} {metrics[key]:.1%}  at the threshold{at}")
    lines.append(f"{'seconds per image':<24} {metrics['seconds_per_image']:.3f}")
    for kind, values in metrics.get("defect_types", {}).items():
        found = ", ".join(f"{METRIC_NAMES[k]} {values[k]:.4f}" for k in ("image_auroc", "aupro_30") if k in values)
        lines.append(f"  {kind:<22} {found}")
    return "\n".join(lines)


def _convert(args: argparse.Namespace) -> int:
    from ..convert import pipeline_from_checkpoint

    pipe = pipeline_from_checkpoint(args.checkpoint)
    check_writable(args.output_dir)
    pipe.save_pretrained(args.output_dir)
    height, width = pipe.size
    print(
        f"Wrote {args.output_dir}: {width} x {height} px, not calibrated; run `diffusionad calibrate` with "
        "normal images next."
    )
    return 0
