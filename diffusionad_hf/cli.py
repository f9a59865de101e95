"""The command line: `diffusionad inspect | calibrate | evaluate | convert | publish | list`."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from .hub_commands import add_list_command, add_publish_command
from .version import __version__

# Torch and diffusers take seconds to import: every command imports what it needs when it runs, so that --help answers
# at once.

__all__ = ["main"]

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code: 0 done, 2 something was wrong with the input, 130 interrupted."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print("diffusionad: interrupted.", file=sys.stderr)
        return INTERRUPTED
    except (OSError, ValueError, ImportError) as error:
        # Whatever the user can mend is said in one line; anything else is a defect of ours and keeps its traceback.
        print(f"diffusionad: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="diffusionad",
        description="Finds defects on product images with norm-guided one-step denoising diffusion.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_inspect(commands)
    _add_calibrate(commands)
    _add_evaluate(commands)
    _add_convert(commands)
    add_publish_command(commands)
    add_list_command(commands)
    return parser


def _add_command(commands, name: str, help: str, epilog: str, run) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=help,
        description=help,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="M", help="a pipeline folder, or a Hub id such as org/name")
    parser.add_argument("--revision", metavar="R", help="branch, tag or commit of a Hub id")
    parser.add_argument(
        "--variant", metavar="V", help='weights of another type where the model has them, such as "fp16"'
    )
    parser.add_argument(
        "--device", metavar="D", help="cpu, cuda, cuda:1, mps ...; the GPU, if there is one, by default"
    )
    parser.add_argument(
        "--batch-size", type=positive_integer, default=4, metavar="N", help="images per pass (default: 4)"
    )


def positive_integer(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}: must be at least 1")
    return value


def rate(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{value}: must lie between 0 and 1, such as 0.05")
    return value


def _load_pipeline(args: argparse.Namespace, **kwargs):
    import torch
    from diffusers.utils import logging

    from . import DiffusionADPipeline

    logging.disable_progress_bar()
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device}: not available on this machine; leave it out, or give cpu.") from error
    for name in ("revision", "variant"):
        if getattr(args, name) is not None:
            kwargs[name] = getattr(args, name)
    pipe = DiffusionADPipeline.from_pretrained(args.model, **kwargs).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# ---- inspect --------------------------------------------------------------------------------------------------------


def _add_inspect(commands) -> None:
    parser = _add_command(
        commands,
        "inspect",
        "Inspect images: score, verdict, and where the defects are.",
        "exit code: 0 when all images were inspected, 2 when some could not be read (the others are done "
        "and the failures listed)\n\n"
        "example: diffusionad inspect photos/ --model org/diffusionad-mvtec-screw --output-dir report "
        "--json report.json",
        _inspect,
    )
    parser.add_argument(
        "input", nargs="+", metavar="INPUT", help="image files, folders (with all below them) or glob patterns"
    )
    _add_model_options(parser)
    parser.add_argument(
        "--output-dir",
        metavar="DIR",
        type=Path,
        help="write an overlay, a mask and the reconstruction of each image here",
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all results, with every region, as JSON")
    parser.add_argument("--csv", metavar="FILE", type=Path, help="write a row per image as CSV")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument(
        "--threshold",
        type=float,
        metavar="T",
        help="call scores above T anomalous, instead of the calibrated threshold",
    )
    chosen.add_argument(
        "--false-alarm-rate",
        type=rate,
        metavar="A",
        help="use the threshold that a calibrated model promises this rate with",
    )


def _inspect(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from .inspection import Failure, find_images, format_table, inspect_files, write_csv, write_json

    files, results = find_images(args.input)
    if not files:
        raise ValueError(" ".join(failure.error for failure in results))
    for target in (args.output_dir, args.json and args.json.parent, args.csv and args.csv.parent):
        if target is not None:
            _require_writable(target)
    overrides = {"threshold": args.threshold, "false_alarm_rate": args.false_alarm_rate}
    pipe = _load_pipeline(args, **{name: value for name, value in overrides.items() if value is not None})
    if args.false_alarm_rate is not None and pipe.config.calibration_scores is None:
        raise ValueError(f"--false-alarm-rate: {args.model} is not calibrated; run `diffusionad calibrate` first.")
    try:
        found = inspect_files(pipe, files, args.output_dir, batch_size=args.batch_size)
        for result in tqdm(found, total=len(files), desc="inspecting", unit="image", file=sys.stderr):
            results.append(result)
    finally:
        # Also when interrupted or when the disk is full: what is done is done.
        if args.json is not None:
            write_json(args.json, args.model, results)
        if args.csv is not None:
            write_csv(args.csv, results)
    print(format_table(results))
    if pipe.threshold is None:
        print(
            "No verdicts: the model is not calibrated. Run `diffusionad calibrate` with normal images, or "
            "give --threshold."
        )
    failures = [result for result in results if isinstance(result, Failure)]
    if args.output_dir is not None:
        print(f"Pictures in {args.output_dir}.")
    if failures:
        print(f"{len(failures)} of {len(results)} could not be read:", file=sys.stderr)
        for failure in failures:
            print(f"  {failure.error}", file=sys.stderr)
        return 2
    return 0


def _require_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".diffusionad-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(f"{folder}: cannot write there ({error.strerror}); choose another folder.") from error


# ---- calibrate ------------------------------------------------------------------------------------------------------


def _add_calibrate(commands) -> None:
    parser = _add_command(
        commands,
        "calibrate",
        "Set a model's threshold and p-values from normal images that it was not trained on.",
        "example: diffusionad calibrate good_parts/ --model my_model --false-alarm-rate 0.02",
        _calibrate,
    )
    parser.add_argument("input", nargs="+", metavar="INPUT", help="normal images: files, folders or glob patterns")
    _add_model_options(parser)
    parser.add_argument(
        "--false-alarm-rate",
        type=rate,
        default=0.05,
        metavar="A",
        help="share of normal images that may be called anomalous (default: 0.05)",
    )
    parser.add_argument(
        "--output-dir", metavar="DIR", type=Path, help="save the calibrated model here instead of into its own folder"
    )


def _calibrate(args: argparse.Namespace) -> int:
    import torch
    from tqdm import tqdm

    from .calibration import calibrate
    from .inspection import Failure, find_images, read_images
    from .pipeline_diffusionad import resize_image

    if args.output_dir is None and not Path(args.model).is_dir():
        raise ValueError(
            f"--model {args.model}: comes from the Hub; give --output-dir to say where to save it calibrated."
        )
    files, failures = find_images(args.input)
    if not files:
        raise ValueError(" ".join(failure.error for failure in failures))
    target = args.output_dir or Path(args.model)
    _require_writable(target)
    pipe = _load_pipeline(args)
    images = []
    for _, image in tqdm(read_images(files), total=len(files), desc="reading", unit="image", file=sys.stderr):
        if isinstance(image, Failure):
            failures.append(image)
        else:
            # At the model's resolution already, so that thousands of photos fit into memory.
            images.append((resize_image(image, pipe.config.image_size) * 255).round().to(torch.uint8))
    if not images:
        raise ValueError("none of the images could be read: " + " ".join(failure.error for failure in failures))
    pipe.set_progress_bar_config(disable=False, desc="calibrating", file=sys.stderr)
    scores = calibrate(pipe, images, false_alarm_rate=args.false_alarm_rate, batch_size=args.batch_size)
    if args.output_dir is not None:
        pipe.save_pretrained(args.output_dir)
    else:
        pipe.save_config(args.model)
    print(
        f"{target}: threshold {pipe.threshold:.4f} at a false-alarm rate of {args.false_alarm_rate:.1%}, "
        f"from {len(scores)} normal "
        f"images (scores {scores[0]:.4f} to {scores[-1]:.4f})."
    )
    for failure in failures:
        print(f"  left out: {failure.error}", file=sys.stderr)
    return 2 if failures else 0


# ---- evaluate -------------------------------------------------------------------------------------------------------


def _add_evaluate(commands) -> None:
    parser = _add_command(
        commands,
        "evaluate",
        "Measure a model on a labelled test set: image and pixel AUROC, AP, exact AUPRO, error rates at the "
        "threshold.",
        "example: diffusionad evaluate --model my_model --data-dir mvtec_ad --category screw --json evaluation.json",
        _evaluate,
    )
    _add_model_options(parser)
    parser.add_argument(
        "--data-dir",
        required=True,
        metavar="D",
        help="data set: MVTec AD, VisA, DAGM or plain folder layout, or a Hub dataset id",
    )
    parser.add_argument("--category", metavar="C", help="which category; may be left out where there is but one")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all metrics as JSON")
    parser.add_argument(
        "--plots",
        metavar="DIR",
        type=Path,
        help="write the ROC curve, score histograms and the worst misses as pictures",
    )


def _evaluate(args: argparse.Namespace) -> int:
    from .data import check_images, load_category
    from .evaluation import evaluate_pipeline, save_plots

    for target in (args.json and args.json.parent, args.plots):
        if target is not None:
            _require_writable(target)
    test, problems = check_images(load_category(args.data_dir, args.category)["test"])
    pipe = _load_pipeline(args)
    result = evaluate_pipeline(pipe, test, batch_size=args.batch_size)
    print(_format_metrics(result.metrics))
    if args.json is not None:
        result.save_json(args.json)
    if args.plots is not None:
        save_plots(result, test, args.plots)
    for problem in problems:
        print(f"  left out: {problem}", file=sys.stderr)
    return 2 if problems else 0


def _format_metrics(metrics: dict) -> str:
    from .evaluation import METRIC_NAMES

    lines = [f"{metrics['num_images']} images, {metrics['num_anomalous']} of them anomalous"]
    intervals = metrics.get("intervals", {})
    for key, name in METRIC_NAMES.items():
        if key in metrics:
            interval = "  [{:.4f}, {:.4f}]".format(*intervals[key]) if key in intervals else ""
            lines.append(f"{name:<24} {metrics[key]:.4f}{interval}")
    for key, name in {"false_alarm_rate": "false-alarm rate", "miss_rate": "miss rate"}.items():
        if key in metrics:
            lines.append(
                f"{name:<24} {metrics[key]:.1%}  at the threshold"
                + (f" {metrics['threshold']:.4f}" if "threshold" in metrics else "")
            )
    lines.append(f"{'seconds per image':<24} {metrics['seconds_per_image']:.3f}")
    for kind, values in metrics.get("defect_types", {}).items():
        found = ", ".join(f"{METRIC_NAMES[k]} {values[k]:.4f}" for k in ("image_auroc", "aupro_30") if k in values)
        lines.append(f"  {kind:<22} {found}")
    return "\n".join(lines)


# ---- convert --------------------------------------------------------------------------------------------------------


def _add_convert(commands) -> None:
    parser = _add_command(
        commands,
        "convert",
        "Turn a params-*.pt of the paper's own code into a pipeline folder.",
        "example: diffusionad convert outputs/model/diff-params-ARGS=1/screw/params-best.pt screw-pipeline",
        _convert,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="the file; nothing in it is executed")
    parser.add_argument("output_dir", metavar="OUTPUT_DIR", type=Path, help="the pipeline folder to write")


def _convert(args: argparse.Namespace) -> int:
    from .convert import pipeline_from_checkpoint

    pipe = pipeline_from_checkpoint(args.checkpoint)
    _require_writable(args.output_dir)
    pipe.save_pretrained(args.output_dir)
    size = pipe.config.image_size
    print(
        f"Wrote {args.output_dir}: {size} x {size} px, not calibrated; run `diffusionad calibrate` with "
        "normal images next."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
