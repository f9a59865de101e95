"""`diffusionad inspect` and `diffusionad calibrate`."""

import argparse
import os
import signal
import sys
from collections import Counter
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..files import require
from . import options

_COLUMNS = ("file", "score", "threshold", "p-value", "verdict", "seconds", "where")
_CALIBRATE_REASONS = ("not_calibrated", "rate_not_promised", "settings_changed", "no_difference")
_CALIBRATE = "Run `diffusionad calibrate` with normal images, or give --threshold."
# Exit codes of `inspect`; 2 if an input could not be read.
_SOME_ANOMALOUS, _SOME_UNDECIDED = 1, 3


def add_commands(commands: Any) -> None:
    parser = options.add_command(
        commands,
        "inspect",
        "inspect images: score, verdict, and where the defects are",
        _inspect,
        epilog="exit code: 0 if all images are normal, 1 if some are anomalous, 3 if some are undecided, 2 if some\n"
        "could not be read; the last of these that applies (with --parquet 0 or 2: its table has the verdicts)\n\n"
        "example: diffusionad inspect photos/ --model org/diffusionad-mvtec-screw --report report.html --csv r.csv\n\n"
        "For many images, --parquet writes the results in blocks; run the same command again after an interruption.\n"
        "All GPUs of a machine, or several processes on its CPU, work on it together with\n"
        "  accelerate launch --multi_gpu --num_processes 8 -m diffusionad_hf inspect \\\n"
        "      --dataset org/photos --split train --model org/diffusionad-mvtec-screw --parquet results.parquet\n"
        "and a Ray cluster with --engine ray. Several machines need a shared disk for FILE, local images and what\n"
        "`datasets` downloads.",
    )
    parser.add_argument("input", nargs="*", metavar="INPUT", help="images, folders (with subfolders) or glob patterns")
    parser.add_argument("--file-list", type=Path, help="instead of INPUTs: a text file with a path on each line")
    parser.add_argument(
        "--dataset",
        metavar="D",
        help="instead of INPUTs, with --parquet: Hub id, folder or file that `datasets` can load; Parquet is read in "
        "place, everything else downloaded first",
    )
    parser.add_argument("--dataset-config", metavar="C", help="configuration of the dataset, if it has several")
    parser.add_argument("--dataset-revision", metavar="R", help="branch, tag or commit of a dataset on the Hub")
    parser.add_argument("--split", metavar="S", help="split of the dataset, if it has several")
    parser.add_argument("--image-column", metavar="C", help="column of images of the dataset, if it has several")
    options.add_pipeline_options(parser)
    parser.add_argument("--output-dir", type=Path, help="write a picture of each image's result here")
    parser.add_argument(
        "--parts", action="store_true", help="with --output-dir: also overlay, mask and reconstruction of each image"
    )
    parser.add_argument(
        "--report", metavar="FILE", type=Path, help="write all results with their pictures as one HTML page"
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all results, with every region, as JSON")
    parser.add_argument("--csv", metavar="FILE", type=Path, help="write a row per image as CSV")
    parser.add_argument(
        "--parquet",
        metavar="FILE",
        type=Path,
        help="write a row per image as Parquet, to FILE or to results.parquet in a folder; first in blocks of 16 "
        "batches, from which an interrupted run continues",
    )
    parser.add_argument(
        "--engine",
        choices=("local", "accelerate", "ray"),
        help="what inspects the blocks: this process, those of `accelerate launch`, or a Ray cluster (RAY_ADDRESS, or "
        "on this machine) (default: accelerate if launched by it, else local)",
    )
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--threshold", type=float, help="use this threshold instead of the calibrated one")
    chosen.add_argument("--false-alarm-rate", type=options.rate, help="use the calibrated threshold for this rate")

    parser = options.add_command(
        commands,
        "calibrate",
        "set a model's threshold and p-values from normal images that it was not trained on",
        _calibrate,
        epilog="example: diffusionad calibrate good_parts/ --model my_model --false-alarm-rate 0.02",
    )
    parser.add_argument("input", nargs="+", metavar="INPUT", help="normal images: files, folders or glob patterns")
    options.add_pipeline_options(parser)
    parser.add_argument(
        "--false-alarm-rate", type=options.rate, default=0.05, help="normal images called anomalous (default: 0.05)"
    )
    parser.add_argument("--output-dir", type=Path, help="save the model here instead of into its own folder")


def _inspect(args: argparse.Namespace) -> int:
    if args.parts and args.output_dir is None:
        raise ValueError("--parts: give --output-dir DIR for the pictures.")
    if sum(map(bool, (args.input, args.file_list, args.dataset))) != 1:
        raise ValueError("give either INPUTs, --file-list or --dataset.")
    if args.parquet is not None:
        return _inspect_in_blocks(args)
    if args.dataset is not None:
        raise ValueError("--dataset: give --parquet FILE for the results.")
    if args.engine not in (None, "local") or _num_processes() > 1:
        raise ValueError("several processes share the work only with --parquet FILE.")
    from ..inspection.inspection import Pictures, find_images, inspect_files, read_list
    from ..inspection.records import Failure, Inspection, write_results, write_table
    from ..report import NOT_INSPECTED, Entry, embedded, write_report
    from ..verdicts_diffusionad import ANOMALOUS, UNDECIDED

    files, results = (read_list(args.file_list), []) if args.file_list else find_images(args.input)
    if not files:
        raise ValueError(" ".join(failure.error for failure in results))
    options.check_writable(args.output_dir, *(file and file.parent for file in (args.json, args.csv, args.report)))
    pipe = _load_inspector(args, args.device)
    entries = [Entry(failure.file, NOT_INSPECTED, note=failure.error) for failure in results]

    def enter(found: Inspection, figure: Any) -> None:
        note = "" if found.reason == "calibrated" else found.sentence
        entries.append(
            Entry(found.file, found.verdict, found.score, found.p_value, found.where, (), note, embedded(figure))
        )

    pictures = Pictures(args.output_dir, args.parts, enter if args.report else None)
    try:
        found = inspect_files(pipe, files, pictures, batch_size=args.batch_size)
        for result in tqdm(found, total=len(files), desc="inspecting", unit="image", file=sys.stderr):
            results.append(result)
            if isinstance(result, Failure):
                entries.append(Entry(result.file, NOT_INSPECTED, note=result.error))
    finally:
        # Keep the results so far, also after an interruption or a full disk.
        if args.json is not None:
            write_results(args.json, args.model, results)
        if args.csv is not None:
            write_table(args.csv, results)
        if args.report is not None:
            facts = {"Model": args.model, "Threshold": "none" if pipe.threshold is None else f"{pipe.threshold:.4f}"}
            write_report(args.report, "Inspection", entries, lead=pipe.calibration.verdict(0).sentence, facts=facts)
    print(options.format_table([_COLUMNS, *map(_cells, results)]))
    inspected = [result for result in results if isinstance(result, Inspection)]
    reasons = Counter((result.verdict, result.reason, result.sentence) for result in inspected)
    for (verdict, reason, sentence), count in reasons.items():
        if reason != "calibrated":
            help = _CALIBRATE if reason in _CALIBRATE_REASONS else ""
            print(f"{count} {verdict}: {sentence} {help}".rstrip())
    if args.output_dir is not None:
        print(f"Pictures in {args.output_dir}.")
    if args.report is not None:
        print(f"Report in {args.report}.")
    verdicts = {result.verdict for result in inspected}
    code = _SOME_UNDECIDED if UNDECIDED in verdicts else _SOME_ANOMALOUS if ANOMALOUS in verdicts else 0
    return options.report_left_out([result.error for result in results if isinstance(result, Failure)]) or code


def _num_processes() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def _load_inspector(args: argparse.Namespace, device: str | None) -> Any:
    given = {name: getattr(args, name) for name in ("threshold", "false_alarm_rate")}
    pipe = options.load_pipeline(args, device, **{name: value for name, value in given.items() if value is not None})
    if args.false_alarm_rate is not None and pipe.config.calibration_scores is None:
        raise ValueError(f"--false-alarm-rate: {args.model} is not calibrated; run `diffusionad calibrate` first.")
    return pipe


def _cells(result: Any) -> list[str]:
    if not hasattr(result, "score"):
        return [result.file, "", "", "", "not read", "", ""]
    return [
        result.file,
        f"{result.score:.4f}",
        "-" if result.threshold is None else f"{result.threshold:.4f}",
        "-" if result.p_value is None else f"{result.p_value:.3f}",
        result.verdict,
        f"{result.seconds:.2f}",
        ", ".join(dict.fromkeys(result.where[:3])),
    ]


def _inspect_in_blocks(args: argparse.Namespace) -> int:
    require("pyarrow", "train")
    from ..inspection.blocks import merge_blocks, open_run
    from ..inspection.engines import AccelerateEngine, LocalEngine, RayEngine
    from ..inspection.inspection import Pictures
    from ..verdicts_diffusionad import ANOMALOUS, UNDECIDED

    if args.json is not None or args.csv is not None or args.report is not None:
        raise ValueError("--json, --csv and --report hold all results in memory; leave them out with --parquet.")
    name = args.engine or ("accelerate" if _num_processes() > 1 else "local")
    if name != "accelerate" and _num_processes() > 1:
        raise ValueError(f"--engine {name}: runs in one process; leave out `accelerate launch`.")
    target, folder = args.parquet, args.parquet.with_name(f"{args.parquet.name}.blocks")
    if args.parquet.is_dir() or not args.parquet.suffix:
        # Readers of Parquet folders ignore names with a leading underscore.
        target, folder = args.parquet / "results.parquet", args.parquet / "_blocks"
    errors: list[str] = []
    with ExitStack() as stack:
        # A scheduler's SIGTERM, or the launcher's after a crash of another process: clean up as after Ctrl-C.
        stack.callback(signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, signal.default_int_handler))
        engines = {"local": LocalEngine, "accelerate": AccelerateEngine, "ray": RayEngine}
        engine = stack.enter_context(engines[name](args.device))
        inputs = engine.decide(lambda: _find_inputs(args, target.parent))
        description, batch_size = engine.load(partial(_load_inspector, args))
        batch_size = args.batch_size or batch_size
        run = engine.decide(lambda: stack.enter_context(open_run(folder, inputs, description, batch_size)))
        missing = engine.decide(run.missing)
        done = run.num_images - run.count(missing)
        if engine.is_main and done:
            print(f"{folder}: continues after {done} images that are done.", file=sys.stderr)
        blocks = engine.share(missing)
        share = f" (process 1 of {engine.num_processes})" if engine.num_processes > 1 else ""
        bar = {"desc": f"inspecting{share}", "unit": "image", "file": sys.stderr, "disable": not engine.is_main}
        with tqdm(total=run.count(blocks), **bar) as progress:
            for images in engine.inspect(inputs, run, blocks, Pictures(args.output_dir, args.parts)):
                progress.update(images)
        engine.wait()
        if engine.is_main:
            table = merge_blocks(run, target)
            errors = table["error"].drop_null().to_pylist()
            counts, reasons = (Counter(table[name].to_pylist()) for name in ("verdict", "reason"))
            verdicts = f"{counts[ANOMALOUS]} anomalous, {counts[UNDECIDED]} undecided"
            print(f"{target}: {len(table)} images, {verdicts}, {len(errors)} could not be read.")
            if any(reasons[reason] for reason in _CALIBRATE_REASONS):
                print(f"No verdicts: nothing supports them. {_CALIBRATE}")
            for error in errors[:10]:
                print(f"  {error}", file=sys.stderr)
            if len(errors) > 10:
                print(f"  and {len(errors) - 10} more: see the column `error`.", file=sys.stderr)
    return 2 if errors else 0


def _find_inputs(args: argparse.Namespace, target_dir: Path) -> Any:
    from ..inspection.inputs import DatasetInputs, FileInputs
    from ..inspection.inspection import find_images, read_list

    if args.dataset is not None:
        for flag, folder in (("--parquet", target_dir), ("--output-dir", args.output_dir)):
            if folder is not None and Path(args.dataset).resolve() in (folder.resolve(), *folder.resolve().parents):
                raise ValueError(f"{flag} {folder}: lies in the dataset and would change it; give another folder.")
    options.check_writable(target_dir, args.output_dir)
    if args.dataset is not None:
        return DatasetInputs(args.dataset, args.dataset_config, args.split, args.image_column, args.dataset_revision)
    if args.file_list is not None:
        return FileInputs(read_list(args.file_list))
    files, failures = find_images(args.input)
    if failures:
        raise ValueError(" ".join(failure.error for failure in failures))
    return FileInputs(files)


def _calibrate(args: argparse.Namespace) -> int:
    from ..calibration import calibrate
    from ..inspection.inspection import find_images
    from ..loading import check_may_be_on_hub

    if not Path(args.model).is_dir():
        check_may_be_on_hub(args.model)
        if args.output_dir is None:
            raise ValueError(
                f"--model {args.model}: no folder here; if it is on the Hub, give --output-dir to say where to save "
                "it calibrated."
            )
    files, missing = find_images(args.input)
    if not files:
        raise ValueError(" ".join(failure.error for failure in missing))
    target = args.output_dir or Path(args.model)
    options.check_writable(target)
    pipe = options.load_pipeline(args, args.device)
    images, failures = options.read_normal_images(args.input, pipe)
    pipe.set_progress_bar_config(disable=False, desc="calibrating", file=sys.stderr)
    scores = calibrate(pipe, images, false_alarm_rate=args.false_alarm_rate, batch_size=args.batch_size)
    if args.output_dir is not None:
        pipe.save_pretrained(args.output_dir)
    else:
        pipe.save_config(args.model)
    print(
        f"{target}: threshold {pipe.threshold:.4f} at a false-alarm rate of {pipe.config.false_alarm_rate:.1%}, "
        f"from {len(scores)} normal images (scores {scores[0]:.4f} to {scores[-1]:.4f})."
    )
    return options.report_left_out(failures)
