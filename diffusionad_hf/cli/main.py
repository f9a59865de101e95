"""The command line: `diffusionad inspect | calibrate | evaluate | convert | export | publish | list | ...`."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ..version import __version__
from .export import add_export_command
from .hub import add_deploy_space_command, add_list_command, add_publish_command

# Torch and diffusers take seconds to import: every command imports what it needs when it runs, so that --help answers
# at once.

__all__ = ["main"]

INTERRUPTED = 130

_NO_VERDICTS = (
    "No verdicts: the model is not calibrated. Run `diffusionad calibrate` with normal images, or give --threshold."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code: 0 done, 2 something was wrong with the input, 130 interrupted."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print("diffusionad: interrupted.", file=sys.stderr)
        return INTERRUPTED
    except (OSError, ValueError, ImportError, MemoryError) as error:
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
    add_export_command(commands)
    add_publish_command(commands)
    add_list_command(commands)
    add_deploy_space_command(commands)
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
        "--batch-size",
        type=positive_integer,
        metavar="N",
        help="images per pass (default: 16; on a CPU as many as fill 256 px squared, so 1 of that size)",
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

    from ..loading import load_model

    logging.disable_progress_bar()
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"--device {args.device}: not available on this machine; leave it out, or give cpu."
        ) from error
    for name in ("revision", "variant"):
        if getattr(args, name) is not None:
            kwargs[name] = getattr(args, name)
    pipe = load_model(args.model, device=args.device, **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# ---- inspect --------------------------------------------------------------------------------------------------------


def _add_inspect(commands) -> None:
    parser = _add_command(
        commands,
        "inspect",
        "Inspect images: score, verdict, and where the defects are.",
        "exit code: 0 when all images were inspected, 2 when some could not be read (the others are done "
        "and the failures listed; with --parquet they are rows with an error, and the code is 0)\n\n"
        "example: diffusionad inspect photos/ --model org/diffusionad-mvtec-screw --output-dir report "
        "--json report.json\n\n"
        "More images than you want to wait for, with all GPUs; interrupted or killed, the same again goes on:\n"
        "  accelerate launch --multi_gpu --num_processes 8 -m diffusionad_hf inspect \\\n"
        "      --dataset org/photos --split train --model org/diffusionad-mvtec-screw --parquet results.parquet\n"
        "The same starts 8 processes on a CPU (accelerate's own --cpu starts but one without mpirun).\n"
        "Several machines (--num_machines, --machine_rank, --main_process_ip) need the folder of FILE in common.",
        _inspect,
    )
    parser.add_argument(
        "input", nargs="*", metavar="INPUT", help="image files, folders (with all below them) or glob patterns"
    )
    parser.add_argument(
        "--file-list", metavar="FILE", type=Path, help="text file with the path of an image on each line"
    )
    parser.add_argument(
        "--dataset", metavar="D", help="data set of images: a Hub id, or what load_dataset reads or save_to_disk wrote"
    )
    parser.add_argument("--dataset-config", metavar="C", help="configuration of the data set, where it has several")
    parser.add_argument("--dataset-revision", metavar="R", help="branch, tag or commit of a data set on the Hub")
    parser.add_argument("--split", metavar="S", help="split of the data set, where it has several")
    parser.add_argument("--image-column", metavar="C", help="column of images of the data set, where it has several")
    _add_model_options(parser)
    parser.add_argument(
        "--output-dir",
        metavar="DIR",
        type=Path,
        help="write an overlay, a mask and the reconstruction of each image here",
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all results, with every region, as JSON")
    parser.add_argument("--csv", metavar="FILE", type=Path, help="write a row per image as CSV")
    parser.add_argument(
        "--parquet",
        metavar="FILE",
        type=Path,
        help="write a row per image as Parquet: in shards as they come (in FILE.shards), from which an interrupted "
        "run goes on, then merged; shared out to all processes of `accelerate launch`",
    )
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

    from ..inspection.inspection import (
        Failure,
        find_images,
        format_table,
        inspect_files,
        read_list,
        write_csv,
        write_json,
    )

    if sum(map(bool, (args.input, args.file_list, args.dataset))) != 1:
        raise ValueError("give either INPUTs, --file-list or --dataset.")
    if args.parquet is not None:
        return _inspect_sharded(args)
    if args.dataset is not None:
        raise ValueError("--dataset: give --parquet FILE for the results.")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("several processes share the work only with --parquet FILE.")
    files, results = (read_list(args.file_list), []) if args.file_list else find_images(args.input)
    if not files:
        raise ValueError(" ".join(failure.error for failure in results))
    for target in (args.output_dir, args.json and args.json.parent, args.csv and args.csv.parent):
        if target is not None:
            _require_writable(target)
    pipe = _load_inspector(args)
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
        print(_NO_VERDICTS)
    failures = [result for result in results if isinstance(result, Failure)]
    if args.output_dir is not None:
        print(f"Pictures in {args.output_dir}.")
    if failures:
        print(f"{len(failures)} of {len(results)} could not be read:", file=sys.stderr)
        for failure in failures:
            print(f"  {failure.error}", file=sys.stderr)
        return 2
    return 0


def _load_inspector(args: argparse.Namespace):
    overrides = {"threshold": args.threshold, "false_alarm_rate": args.false_alarm_rate}
    pipe = _load_pipeline(args, **{name: value for name, value in overrides.items() if value is not None})
    if args.false_alarm_rate is not None and pipe.config.calibration_scores is None:
        raise ValueError(f"--false-alarm-rate: {args.model} is not calibrated; run `diffusionad calibrate` first.")
    return pipe


def _inspect_sharded(args: argparse.Namespace) -> int:
    import signal
    from contextlib import ExitStack
    from datetime import timedelta

    import torch
    from accelerate import PartialState
    from tqdm import tqdm

    from ..data import require
    from ..inspection.sharded import describe_run, inspect_share, merge_shards, open_run, plan_share

    require("pyarrow")
    if args.json is not None or args.csv is not None:
        raise ValueError("--json and --csv hold all results in memory; leave them out with --parquet.")
    if args.parquet.is_dir():
        raise ValueError(
            f"--parquet {args.parquet}: is a folder; give a file, such as {args.parquet}/results.parquet."
        )
    on_cpu = args.device == "cpu" or not torch.cuda.is_available()
    # Processes may end hours apart, and wait for each other.
    state = PartialState(cpu=on_cpu, timeout=timedelta(days=7))
    if state.num_processes > 1:
        if args.device not in (None, "cpu"):
            raise ValueError(f"--device {args.device}: leave it out; each process takes a GPU of its own.")
        args.device = "cpu" if on_cpu else str(state.device)
    with ExitStack() as stack:
        # What is done is written also when a scheduler, or the launcher after another process crashed, says to stop.
        stack.callback(signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, signal.default_int_handler))
        inputs = _decided_by_main(state, lambda: _find_inputs(args))
        pipe = _load_inspector(args)
        batch_size = args.batch_size or pipe.default_batch_size
        folder = args.parquet.with_name(f"{args.parquet.name}.shards")
        run = _decided_by_main(
            state,
            lambda: stack.enter_context(
                open_run(
                    folder,
                    describe_run(pipe, inputs, args.model, batch_size),
                    batch_size,
                    inputs.num_rows,
                    state.num_processes,
                )
            ),
        )
        shown = state.is_main_process
        if shown and run.done:
            print(f"{folder}: goes on after {run.rows_done} images that are done.", file=sys.stderr)
        total = None
        if shown and inputs.num_rows is not None:
            total = sum(len(batch) for batch in plan_share(run, inputs, state.process_index, state.num_processes))
        share = f" (process 1 of {state.num_processes})" if state.num_processes > 1 else ""
        with tqdm(total=total, desc=f"inspecting{share}", unit="image", file=sys.stderr, disable=not shown) as bar:
            for rows in inspect_share(pipe, inputs, run, state, args.output_dir):
                bar.update(rows)
        state.wait_for_everyone()
        if shown:
            summary = merge_shards(folder, args.parquet, inputs.num_parts)
            verdicts = f", {summary.anomalous} anomalous" if pipe.threshold is not None else ""
            print(f"{args.parquet}: {summary.images} images{verdicts}, {summary.failed} could not be read.")
            if pipe.threshold is None:
                print(_NO_VERDICTS)
            for error in summary.errors:
                print(f"  {error}", file=sys.stderr)
            if summary.failed > len(summary.errors):
                print(f"  and {summary.failed - len(summary.errors)} more: see the column `error`.", file=sys.stderr)
    state.destroy_process_group()
    return 0


def _decided_by_main(state, decide):
    """What the main process decides, in every process. Where it fails it says so, and the others leave in silence."""
    from accelerate.utils import broadcast_object_list

    decision = [None]
    if state.is_main_process:
        try:
            decision[0] = decide()
        finally:
            broadcast_object_list(decision)
    elif broadcast_object_list(decision) == [None]:
        raise SystemExit(2)
    return decision[0]


def _find_inputs(args: argparse.Namespace):
    from ..inspection.inputs import DatasetInputs, FileInputs
    from ..inspection.inspection import find_images, read_list

    for target in (args.parquet.parent, args.output_dir):
        if target is not None:
            _require_writable(target)
    if args.dataset is not None:
        return DatasetInputs(args.dataset, args.dataset_config, args.split, args.image_column, args.dataset_revision)
    if args.file_list is not None:
        return FileInputs(read_list(args.file_list))
    files, failures = find_images(args.input)
    if failures:
        # Better now than after a day's work.
        raise ValueError(" ".join(failure.error for failure in failures))
    return FileInputs(files)


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

    from ..calibration import calibrate
    from ..inspection.inspection import Failure, find_images, read_images
    from ..pipeline_diffusionad import resize_image

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
    from ..data import check_images, load_category
    from ..evaluation.evaluator import evaluate_pipeline, save_plots

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
    from ..evaluation.evaluator import METRIC_NAMES

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
    from ..convert import pipeline_from_checkpoint

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
