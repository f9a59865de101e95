"""`diffusionad inspect` and `diffusionad calibrate`."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import add_command, add_pipeline_options, check_writable, format_table, load_pipeline, rate

if TYPE_CHECKING:
    from ..inspection.inputs import Inputs
    from ..inspection.records import Failure, Inspection
    from ..pipeline_diffusionad import DiffusionADPipeline

_NO_VERDICTS = (
    "No verdicts: the model is not calibrated. Run `diffusionad calibrate` with normal images, or give --threshold."
)


def add_inspect_command(commands: Any) -> None:
    """Adds `diffusionad inspect`."""
    parser = add_command(
        commands,
        "inspect",
        "inspect images: score, verdict, and where the defects are",
        _inspect,
        epilog="exit code: 0 when all images were inspected, 2 when some could not be read (the others are done "
        "and the failures listed; with --parquet they are rows with an error, and the code is 0)\n\n"
        "example: diffusionad inspect photos/ --model org/diffusionad-mvtec-screw --output-dir report "
        "--json report.json\n\n"
        "More images than you want to wait for: --parquet writes them in blocks, and the same command goes on where\n"
        "one was interrupted or killed. With all GPUs of a machine:\n"
        "  accelerate launch --multi_gpu --num_processes 8 -m diffusionad_hf inspect \\\n"
        "      --dataset org/photos --split train --model org/diffusionad-mvtec-screw --parquet results.parquet\n"
        "(the same starts 8 processes on a CPU; accelerate's own --cpu starts only one without mpirun), or with all\n"
        "of a Ray cluster: --engine ray. Several machines need the folder of FILE, and local images, in common.",
    )
    parser.add_argument(
        "input", nargs="*", metavar="INPUT", help="image files, folders (with all below them) or glob patterns"
    )
    parser.add_argument(
        "--file-list", metavar="FILE", type=Path, help="instead of INPUTs: a text file with a path on each line"
    )
    parser.add_argument(
        "--dataset",
        metavar="D",
        help="instead of INPUTs, with --parquet: a dataset of the library `datasets` (Hub id, folder or file), "
        "streamed",
    )
    parser.add_argument("--dataset-config", metavar="C", help="configuration of the dataset, if it has several")
    parser.add_argument("--dataset-revision", metavar="R", help="branch, tag or commit of a dataset on the Hub")
    parser.add_argument("--split", metavar="S", help="split of the dataset, if it has several")
    parser.add_argument("--image-column", metavar="C", help="column of images of the dataset, if it has several")
    add_pipeline_options(parser)
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
        help="write a row per image as Parquet: in blocks of 16 batches (in FILE.blocks), from which an interrupted "
        "run goes on, then merged; of a folder DIR, the table is DIR/results.parquet",
    )
    parser.add_argument(
        "--engine",
        choices=("local", "accelerate", "ray"),
        help="who inspects the blocks: this process, those of `accelerate launch`, or a Ray cluster (RAY_ADDRESS, or "
        "the one on this machine); the table does not depend on it (default: accelerate if launched by it, else "
        "local)",
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


def add_calibrate_command(commands: Any) -> None:
    """Adds `diffusionad calibrate`."""
    parser = add_command(
        commands,
        "calibrate",
        "set a model's threshold and p-values from normal images that it was not trained on",
        _calibrate,
        epilog="example: diffusionad calibrate good_parts/ --model my_model --false-alarm-rate 0.02",
    )
    parser.add_argument("input", nargs="+", metavar="INPUT", help="normal images: files, folders or glob patterns")
    add_pipeline_options(parser)
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


# ---- inspect --------------------------------------------------------------------------------------------------------


def _inspect(args: argparse.Namespace) -> int:
    if sum(map(bool, (args.input, args.file_list, args.dataset))) != 1:
        raise ValueError("give either INPUTs, --file-list or --dataset.")
    if args.parquet is not None:
        return _inspect_in_blocks(args)
    if args.dataset is not None:
        raise ValueError("--dataset: give --parquet FILE for the results.")
    if args.engine not in (None, "local") or _num_processes() > 1:
        raise ValueError("several processes share the work only with --parquet FILE.")
    from tqdm import tqdm

    from ..inspection.inspection import find_images, inspect_files, read_list
    from ..inspection.records import Failure, write_report, write_table

    files, results = (read_list(args.file_list), []) if args.file_list else find_images(args.input)
    if not files:
        raise ValueError(" ".join(failure.error for failure in results))
    check_writable(args.output_dir, args.json and args.json.parent, args.csv and args.csv.parent)
    pipe = _load_inspector(args, args.device)
    try:
        found = inspect_files(pipe, files, args.output_dir, batch_size=args.batch_size)
        for result in tqdm(found, total=len(files), desc="inspecting", unit="image", file=sys.stderr):
            results.append(result)
    finally:
        # Also when interrupted or when the disk is full: what is done is done.
        if args.json is not None:
            write_report(args.json, args.model, results)
        if args.csv is not None:
            write_table(args.csv, results)
    print(_format_results(results))
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


def _num_processes() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def _load_inspector(args: argparse.Namespace, device: str | None) -> "DiffusionADPipeline":
    overrides = {"threshold": args.threshold, "false_alarm_rate": args.false_alarm_rate}
    pipe = load_pipeline(args, device, **{name: value for name, value in overrides.items() if value is not None})
    if args.false_alarm_rate is not None and pipe.config.calibration_scores is None:
        raise ValueError(f"--false-alarm-rate: {args.model} is not calibrated; run `diffusionad calibrate` first.")
    return pipe


def _format_results(results: Sequence["Inspection | Failure"]) -> str:
    from ..inspection.records import Failure

    rows = [("file", "score", "threshold", "p-value", "verdict", "seconds", "where")]
    for result in results:
        if isinstance(result, Failure):
            rows.append((result.file, "", "", "", "not read", "", ""))
            continue
        rows.append(
            (
                result.file,
                f"{result.score:.4f}",
                "-" if result.threshold is None else f"{result.threshold:.4f}",
                "-" if result.p_value is None else f"{result.p_value:.3f}",
                result.verdict or "-",
                f"{result.seconds:.2f}",
                ", ".join(dict.fromkeys(result.where[:3])),
            )
        )
    return format_table(rows)


def _inspect_in_blocks(args: argparse.Namespace) -> int:
    from contextlib import ExitStack
    from functools import partial

    from tqdm import tqdm

    from ..files import require
    from ..inspection.blocks import merge_blocks, open_run
    from ..inspection.engines import AccelerateEngine, LocalEngine, RayEngine

    require("pyarrow", "train")
    if args.json is not None or args.csv is not None:
        raise ValueError("--json and --csv hold all results in memory; leave them out with --parquet.")
    name = args.engine or ("accelerate" if _num_processes() > 1 else "local")
    if name != "accelerate" and _num_processes() > 1:
        raise ValueError(f"--engine {name}: is one process; leave out `accelerate launch`.")
    target, folder = args.parquet, args.parquet.with_name(f"{args.parquet.name}.blocks")
    if args.parquet.is_dir() or not args.parquet.suffix:
        # Readers of folders of Parquet files pass over names that begin with an underscore.
        target, folder = args.parquet / "results.parquet", args.parquet / "_blocks"
    with ExitStack() as stack:
        # Told to stop, by a scheduler or by the launcher after another process crashed: clean up as after Ctrl-C.
        stack.callback(signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, signal.default_int_handler))
        engines = {"local": LocalEngine, "accelerate": AccelerateEngine, "ray": RayEngine}
        engine = stack.enter_context(engines[name](args.device))
        inputs = engine.decide(lambda: _find_inputs(args, target.parent))
        description, batch_size = engine.load(partial(_load_inspector, args))
        batch_size = args.batch_size or batch_size
        run = engine.decide(lambda: stack.enter_context(open_run(folder, inputs, args.model, description, batch_size)))
        missing = engine.decide(run.missing)
        done = run.num_images - run.count(missing)
        if engine.is_main and done:
            print(f"{folder}: goes on after {done} images that are done.", file=sys.stderr)
        blocks = engine.share(missing)
        share = f" (process 1 of {engine.num_processes})" if engine.num_processes > 1 else ""
        bar = {"desc": f"inspecting{share}", "unit": "image", "file": sys.stderr, "disable": not engine.is_main}
        with tqdm(total=run.count(blocks), **bar) as progress:
            for images in engine.inspect(inputs, run, blocks, args.output_dir):
                progress.update(images)
        engine.wait()
        if engine.is_main:
            summary = merge_blocks(run, target)
            calibrated = description["threshold"] != "None"
            verdicts = f", {summary.anomalous} anomalous" if calibrated else ""
            print(f"{target}: {summary.images} images{verdicts}, {summary.failed} could not be read.")
            if not calibrated:
                print(_NO_VERDICTS)
            for error in summary.errors:
                print(f"  {error}", file=sys.stderr)
            if summary.failed > len(summary.errors):
                print(f"  and {summary.failed - len(summary.errors)} more: see the column `error`.", file=sys.stderr)
    return 0


def _find_inputs(args: argparse.Namespace, target_dir: Path) -> "Inputs":
    from ..inspection.inputs import DatasetInputs, FileInputs
    from ..inspection.inspection import find_images, read_list

    check_writable(target_dir, args.output_dir)
    if args.dataset is not None:
        return DatasetInputs(args.dataset, args.dataset_config, args.split, args.image_column, args.dataset_revision)
    if args.file_list is not None:
        return FileInputs(read_list(args.file_list))
    files, failures = find_images(args.input)
    if failures:
        # Better now than after a day's work.
        raise ValueError(" ".join(failure.error for failure in failures))
    return FileInputs(files)


# ---- calibrate ------------------------------------------------------------------------------------------------------


def _calibrate(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from ..calibration import calibrate
    from ..inspection.inspection import find_images, read_small
    from ..inspection.records import Failure

    if args.output_dir is None and not Path(args.model).is_dir():
        raise ValueError(
            f"--model {args.model}: comes from the Hub; give --output-dir to say where to save it calibrated."
        )
    files, failures = find_images(args.input)
    if not files:
        raise ValueError(" ".join(failure.error for failure in failures))
    target = args.output_dir or Path(args.model)
    check_writable(target)
    pipe = load_pipeline(args, args.device)
    reading = read_small(files, pipe.config.image_size)
    images = []
    for image in tqdm(reading, total=len(files), desc="reading", unit="image", file=sys.stderr):
        (failures if isinstance(image, Failure) else images).append(image)
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
        f"from {len(scores)} normal images (scores {scores[0]:.4f} to {scores[-1]:.4f})."
    )
    for failure in failures:
        print(f"  left out: {failure.error}", file=sys.stderr)
    return 2 if failures else 0
