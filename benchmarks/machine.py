"""What the measurements share: the machine, its matmul peak, the clock, and how results are reported."""

import argparse
import gc
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.recorded import differences
from diffusionad_hf.evaluation.evaluator import describe_hardware
from diffusionad_hf.files import write_json
from diffusionad_hf.flags import DashedParser

# A type this many times slower than float32 is not computed by the processor itself, and can take hours.
_SLOW = 4
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CPU = torch.device("cpu")


def make_parser(description: str, repeats: int | None = None, device: bool = False) -> DashedParser:
    """A parser with `--json`, and with `--repeats` and `--device` if the measurement has them."""
    parser = DashedParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything here")
    if repeats:
        parser.add_argument("--repeats", type=_positive, default=repeats, metavar="N", help="default: %(default)s")
    if device:
        best = "cuda" if torch.cuda.is_available() else "cpu"
        parser.add_argument("--device", type=find_device, default=best, metavar="D", help="default: %(default)s")
    return parser


def _positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1")
    return int(text)


def find_device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError):
        raise argparse.ArgumentTypeError(f"{name}: not available on this machine; leave it out, or use cpu") from None


def describe(device: torch.device) -> dict[str, str]:
    """The machine and the software that a measurement was taken with."""
    return {
        "hardware": describe_hardware(device),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": version("diffusers"),
        "date": time.strftime("%Y-%m-%d"),
    }


def timed(function: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, including all it started on the device."""
    wait = (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)
    wait()
    began = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - began


def measure_in_turns(
    functions: dict[str, Callable[[], object]], device: torch.device, repeats: int, warmup: int = 1
) -> dict[str, list[float]]:
    """
    Seconds of `repeats` calls of every function, after a warm-up.

    They take turns, so that a machine that slows down for a while does so for all of them.
    """
    for function in functions.values():
        for _ in range(warmup):
            function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            seconds[name].append(timed(function, device))
    return seconds


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


@cache
def matmul_peak(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """
    FLOP/s of the best of five square matrix products: what the device can do in that type, as measured.

    On a GPU, float32 products use TF32 if the convolutions do.
    """
    size = size or (2048 if device.type == "cpu" else 8192)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    try:
        seconds = measure_in_turns({"matmul": lambda: a @ b}, device, repeats=5, warmup=2)["matmul"]
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return 2 * size**3 / min(seconds)


def find_slow_types(device: torch.device, names: list[str]) -> dict[str, str]:
    """The types among `names` that this device lacks, judged by a small matrix product, and what to say about each."""

    def seconds(name: str) -> float:
        a = torch.ones(256, 256, device=device, dtype=DTYPES[name])
        return min(measure_in_turns({"probe": lambda: a @ a}, device, repeats=5)["probe"])

    ratios = {name: seconds(name) / seconds("float32") for name in names if name != "float32"}
    return {
        name: f"{name}: {ratio:.0f} times slower than float32 here, not measured"
        for name, ratio in ratios.items()
        if ratio > _SLOW
    }


def count_flops(function: Callable[[], object]) -> int:
    """Floating-point operations of the convolutions and matrix products of one call; a product and a sum are two."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def compile_everything() -> None:
    """Beyond eight variants of a function torch.compile would go on uncompiled, and only its log would say so."""
    # By the names that torch 2.6 knows; later ones call them recompile_limit.
    torch._dynamo.config.cache_size_limit = 256
    torch._dynamo.config.accumulated_cache_size_limit = 1024
    torch._dynamo.config.fail_on_cache_limit_hit = True


def measure_rows(
    rows: list[dict[str, Any]],
    prepare: Callable[[dict[str, Any]], Callable[[], object]],
    flops_per_image: float,
    device: torch.device,
    repeats: int,
) -> None:
    """
    Adds its measurements to each row, or the reason why there are none.

    On a CPU the rows take turns. On a GPU, which may not have the memory for all, they are measured one after another.

    Args:
        rows: The settings, each with a `dtype` and a `batch_size`.
        prepare: Returns the call to measure for a row.
        flops_per_image: As counted by `count_flops`.
        device: Where everything is computed.
        repeats: Timed calls of each row.
    """
    dtypes = {row["dtype"] for row in rows}
    too_slow = find_slow_types(device, list(dtypes))
    peaks = {name: matmul_peak(device, DTYPES[name]) for name in dtypes - too_slow.keys()}
    calls, seconds, on_gpu = {}, {}, device.type == "cuda"
    for number, row in enumerate(rows):
        if row["dtype"] in too_slow:
            row["error"] = too_slow[row["dtype"]]
            continue
        call = None
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
            before = torch.cuda.memory_allocated(device)
        try:
            call = prepare(row)
            # Compiling happens here. It does not count for the peak memory, but what the call keeps does.
            row["first_call_s"] = timed(call, device)
            if on_gpu:
                torch.cuda.reset_peak_memory_stats(device)
                call()
                row["memory_gb"] = (torch.cuda.max_memory_allocated(device) - before) / 1e9
                seconds |= measure_in_turns({str(number): call}, device, repeats)
            else:
                calls[str(number)] = call
        except (RuntimeError, MemoryError) as error:
            row["error"] = " ".join(str(error).split())[:200]
    seconds |= measure_in_turns(calls, device, repeats)
    for number, taken in seconds.items():
        row = rows[int(number)]
        row |= {f"{name}_s": value for name, value in spread(taken).items()}
        row["images_per_s"] = row["batch_size"] / row["median_s"]
        row["share_of_peak"] = flops_per_image * row["images_per_s"] / peaks[row["dtype"]]


def save(result: dict[str, Any], file: Path | None) -> None:
    """Writes the result as JSON if a file is given; long measurements call it as they go, as they may be cut off."""
    if file is not None:
        write_json(file, result)


def report(
    result: dict[str, Any],
    file: Path | None,
    table: list[dict[str, Any]] | None = None,
    recorded: list[dict[str, Any]] | None = None,
    keys: Sequence[str] = (),
) -> None:
    """
    Prints the machine, the other settings and the table, by default `result["rows"]`; saves the whole result.

    Given recorded rows, it prints and saves what the table is apart from those with equal `keys`.
    """
    print(", ".join(result["machine"].values()))
    for name in [name for name in result if name not in ("machine", "rows")]:
        print(f"{name}: {result[name]}")
    table = table or result["rows"]
    _print(table, "{:.4g}")
    if apart := differences(table, recorded or [], keys):
        print("\nmeasured here minus recorded:")
        _print(apart, "{:+.4f}")
        result["differences"] = apart
    save(result, file)


def _print(table: list[dict[str, Any]], number: str) -> None:
    print(pandas.DataFrame(table).to_string(index=False, na_rep="", float_format=number.format))
