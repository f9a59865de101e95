"""`diffusionad evaluate` and `diffusionad convert`."""

import argparse
from pathlib import Path
from typing import Any

from .options import (
    add_command,
    add_pipeline_options,
    check_writable,
    format_table,
    load_pipeline,
    report_left_out,
)


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
    parser.add_argument(
        "--split",
        action="store_true",
        help="test on what training holds out (a fifth of the normal images, and the defects) if the dataset has no "
        "test split: needed if the model was trained on this dataset; by default every image counts",
    )
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
    data = load_category(args.data_dir, args.category, hold_out=args.split)
    # First what takes no time to be wrong.
    pipe = load_pipeline(args, args.device)
    test, problems = check_images(data["test"], pipe.config.value_range)
    result = evaluate_pipeline(pipe, test, batch_size=args.batch_size)
    num_train = len(data["train"])
    print(_format_metrics(result.metrics))
    if num_train:
        print(f"{num_train} normal images of the dataset are for training and were not evaluated.")
    elif not args.split:
        print("All images of the dataset count: if the model was trained on some of them, give --split.")
    if args.json is not None:
        result.save_json(args.json)
    if args.plots is not None:
        save_plots(result, test, args.plots)
    return report_left_out(problems)


def _format_metrics(metrics: dict) -> str:
    from ..evaluation.intervals import show
    from ..evaluation.metrics import METRIC_NAMES

    at = f" at the threshold {metrics['threshold']:.4f}" if "threshold" in metrics else ""
    names = METRIC_NAMES | {"false_alarm_rate": f"false alarms{at}", "miss_rate": f"misses{at}"}

    count = "{num_images} images: {num_normal} normal, {num_anomalous} anomalous".format(**metrics)
    count += f" ({metrics['num_anomalous'] - metrics['num_without_mask']} with a mask); 95 % intervals in brackets"
    rows = []
    for key, name in names.items():
        if key in metrics:
            rows.append((name, show(metrics, key)))
        elif key in metrics["unknown"]:
            rows.append((name, f"unknown: {metrics['unknown'][key]}"))
    rows.append(("seconds per image", f"{metrics['seconds_per_image']:.3g}"))
    for kind, values in metrics["defect_types"].items():
        found = [f"{METRIC_NAMES[key]} {show(values, key)}" for key in ("image_auroc", "aupro_30") if key in values]
        rows.append((f"  {kind} (of {values['num_anomalous']})", ", ".join(found)))
    return f"{count}\n{format_table(rows)}"


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
