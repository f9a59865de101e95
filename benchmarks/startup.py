"""Time until something happens: imports, --help, and the first image from a cold start.

    python -m benchmarks startup

Everything is started as a process of its own, in turns; the first turn, which fills the disk's cache, does not count.
Imports are compared with those of the diffusers classes that the package is built on. Seconds on the wall are what a
user waits; processor seconds count no other programs. One photo of 1,024 px is inspected with an untrained `tiny`
model at 256 px, or with `--model`.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.machine import add_options, describe, find_device, report, spread

__all__ = ["main"]

# What the package's modules import from diffusers.
_PARTS = (
    "from diffusers import ConfigMixin, DDPMScheduler, DiffusionPipeline, ModelMixin, SchedulerMixin, UNet2DModel\n"
    "from diffusers.models.attention_processor import Attention"
)
_NAMES = {
    "torch": "import torch",
    "parts": "import the diffusers parts",
    "classes": "import all of diffusionad_hf's classes",
    "help": "diffusionad --help",
    "inspect": "diffusionad inspect, one photo",
    "steps": "the same in Python, step by step:",
}
_STEPS = """
import json, sys, time
times, last = {}, time.perf_counter()
def done(name):
    global last
    now = time.perf_counter()
    times[name], last = now - last, now
from diffusionad_hf import DiffusionADPipeline
done("import")
pipe = DiffusionADPipeline.from_pretrained(sys.argv[1]).to(sys.argv[3])
done("load the model")
pipe(sys.argv[2])
done("first image")
pipe(sys.argv[2])
done("second image")
print(json.dumps(times))
"""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="M", help="a pipeline folder instead of an untrained `tiny` one")
    parser.add_argument("--only", nargs="+", choices=_NAMES, default=_NAMES, metavar="NAME", help=", ".join(_NAMES))
    add_options(parser, repeats=5)
    args = parser.parse_args(argv)
    device = find_device(args.device)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        photo = _save_photo(folder / "photo.png")
        model = args.model or _save_model(folder / "model")
        commands = _commands(str(photo), str(model), str(device))
        turns = [{name: _run(commands[name]) for name in args.only} for _ in range(args.repeats + 1)][1:]
    rows = [
        {
            "name": name,
            "wall_seconds": spread([turn[name].wall for turn in turns]),
            "processor_seconds": spread([turn[name].processor for turn in turns]),
        }
        for name in args.only
    ]
    medians = {row["name"]: row["processor_seconds"]["median"] for row in rows}
    result: dict[str, Any] = {"machine": describe(device), "rows": rows}
    if {"classes", "parts"} <= medians.keys():
        result["import_ratio"] = medians["classes"] / medians["parts"]
    if "steps" in args.only:
        steps = [json.loads(turn["steps"].printed) for turn in turns]
        result["steps"] = {name: spread([step[name] for step in steps]) for name in steps[0]}
    report(result, _table(result), args.json)


def _commands(photo: str, model: str, device: str) -> dict[str, list[str]]:
    python, cli = [sys.executable, "-c"], [sys.executable, "-m", "diffusionad_hf"]
    return {
        "torch": [*python, "import torch"],
        "parts": [*python, _PARTS],
        "classes": [*python, "from diffusionad_hf import *"],
        "help": [*cli, "--help"],
        "inspect": [*cli, "inspect", photo, "--model", model, "--device", device],
        "steps": [*python, _STEPS, model, photo, device],
    }


def _save_model(folder: Path) -> Path:
    from diffusionad_hf import build_pipeline

    build_pipeline("tiny", 256).save_pretrained(folder)
    return folder


def _save_photo(file: Path) -> Path:
    import numpy as np
    from PIL import Image

    y, x = np.mgrid[:1024, :1024]
    Image.fromarray((127 + 60 * np.sin(x / 50) + 60 * np.cos(y / 70)).astype(np.uint8)).convert("RGB").save(file)
    return file


class _Run(NamedTuple):
    wall: float
    processor: float
    printed: str


def _run(command: list[str]) -> _Run:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\nfailed: {done.stderr}")
    return _Run(wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout)


def _table(result: dict[str, Any]) -> str:
    lines = [f"{'':<40} {'seconds':>8} {'lowest':>8} {'highest':>8} {'processor':>10}"]
    for row in result["rows"]:
        wall = row["wall_seconds"]
        lines.append(
            f"{_NAMES[row['name']]:<40} {wall['median']:>8.2f} {wall['lowest']:>8.2f} {wall['highest']:>8.2f} "
            f"{row['processor_seconds']['median']:>10.2f}"
        )
    for name, seconds in result.get("steps", {}).items():
        lines.append(f"  {name:<38} {seconds['median']:>8.2f} {seconds['lowest']:>8.2f} {seconds['highest']:>8.2f}")
    if "import_ratio" in result:
        lines += ["", f"our classes / the diffusers parts, processor seconds: {result['import_ratio']:.2f}"]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
