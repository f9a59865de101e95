"""What the measurements share: the machine, its matmul peak, the clock, and how results are written."""

import argparse
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from diffusionad_hf.evaluation.evaluator import describe_hardware

SLOW = 4
"""A type this many times slower than float32 is not computed by the processor itself, and can take hours."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_options(parser: argparse.ArgumentParser, repeats: int) -> None:
    """The options of every measurement."""
    parser.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1 ...; the GPU, if there is one, by default")
    parser.add_argument("--repeats", type=_positive, default=repeats, metavar="N", help=f"default: {repeats}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything here")
    parser.add_argument(
        "--slow-types",
        action="store_true",
        help=f"also measure types that a small matrix product shows to be {SLOW} times slower than float32 here",
    )


def _positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1")
    return int(text)


def find_device(name: str | None) -> torch.device:
    """
    The device of that name, or the best one there is.

    Raises:
        SystemExit: If it is not there.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError):
        raise SystemExit(f"--device {name}: not available on this machine; leave it out, or give cpu.") from None


def describe(device: torch.device) -> dict[str, str]:
    """The machine and the software that a measurement was taken with."""
    from importlib.metadata import version

    return {
        "hardware": describe_hardware(device),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": version("diffusers"),
        "date": time.strftime("%Y-%m-%d"),
    }


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(function: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call, all that it started on the device included."""
    synchronize(device)
    began = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - began


def take_turns(device: torch.device) -> bool:
    """Whether all that is compared can be held at once, to be measured in turns: in main memory, not in a GPU's."""
    return device.type == "cpu"


def measure_in_turns(
    functions: dict[str, Callable[[], Any]], device: torch.device, repeats: int, warmup: int = 1
) -> dict[str, list[float]]:
    """
    Seconds of every function, `repeats` each.

    They take turns, so that a machine that slows down or has other work for a while does so for all of them.
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
    """Median, lowest and highest."""
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def matmul_peak(device: torch.device, dtype: torch.dtype, size: int | None = None, repeats: int = 5) -> float:
    """
    FLOP/s of the best of several square matrix products: what the device can do in that type, as measured.

    On a GPU, float32 products use TF32 where the convolutions do.
    """
    size = size or (2048 if device.type == "cpu" else 8192)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    try:
        seconds = measure_in_turns({"matmul": lambda: a @ b}, device, repeats, warmup=2)["matmul"]
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return 2 * size**3 / min(seconds)


def find_slow_types(device: torch.device, names: list[str], slow_types: bool = False) -> dict[str, str]:
    """
    The types among `names` that this device lacks, judged by a small matrix product, each with what to say of it.

    Args:
        device: Where to compute.
        names: Of `DTYPES`.
        slow_types: Measure them all the same: nothing is found.
    """
    if slow_types:
        return {}

    def seconds(name: str) -> float:
        a = torch.ones(256, 256, device=device, dtype=DTYPES[name])
        return min(measure_in_turns({"probe": lambda: a @ a}, device, repeats=5)["probe"])

    ratios = {name: seconds(name) / seconds("float32") for name in names if name != "float32"}
    return {
        name: f"{name}: {ratio:.0f} times slower than float32 here, not measured (--slow-types measures it)"
        for name, ratio in ratios.items()
        if ratio > SLOW
    }


def count_flops(function: Callable[[], Any]) -> int:
    """Floating-point operations of the convolutions and matrix products of one call; a product and a sum are two."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


class PeakMemory:
    """
    A context that holds, afterwards, by how much the GPU's memory in use rose at most, as `bytes`.

    `None` in main memory: there freed memory is kept and used again, so that only a process of its own tells.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.bytes: int | None = None

    def __enter__(self) -> "PeakMemory":
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        self.restart()
        return self

    def restart(self) -> None:
        """Forgets the peak so far, but not what was in use at first."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self._before


def compile_everything() -> None:
    """
    Lets torch.compile compile as many sizes and types as a benchmark measures.

    Beyond eight variants of a function it would go on uncompiled, and only its log would say so.
    """
    torch._dynamo.config.recompile_limit = 256
    torch._dynamo.config.accumulated_recompile_limit = 1024
    torch._dynamo.config.fail_on_recompile_limit_hit = True


def set_free(device: torch.device) -> None:
    """Gives a GPU back what nothing holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def save(result: dict[str, Any], file: Path | None) -> None:
    """Writes the result as JSON where asked for; called as it grows, for measurements take long and may be cut off."""
    if file is not None:
        file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def report(result: dict[str, Any], table: str, file: Path | None) -> None:
    """Prints the machine and the table, and writes all of it as JSON where asked for."""
    machine = ", ".join(result["machine"].values())
    print(f"{machine}\n\n{table}")
    if file is not None:
        save(result, file)
        print(f"\nAll of it in {file}.", file=sys.stderr)
