"""The GPU of Hugging Face's ZeroGPU, which lends it to single calls, each in a process forked from the server.

What such a call takes and gives is pickled. So models stay on the processor here, and are copied to the GPU there.
"""

import os
import pickle
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from contextvars import Context, copy_context
from pathlib import Path
from typing import Any

import torch

from .intake import LIMITS

try:
    from spaces import GPU
    from spaces.config import Config

    IS_ZERO = Config.zero_gpu
except ImportError:
    IS_ZERO = False

    def GPU(**_: Any) -> Callable:  # noqa: N802
        return lambda function: function


def is_lent() -> bool:
    """Whether there is one for this call: it is taken from a visitor's share, and what the server does has none."""
    if not IS_ZERO:
        return False
    from gradio.context import LocalContext

    return LocalContext.request.get(None) is not None


@GPU(duration=LIMITS.gpu_seconds)
def infer(packed: bytes):
    """What a pickled pipeline, images and settings give."""
    pipe, images, settings = pickle.loads(packed)
    return pipe.to("cuda" if torch.cuda.is_available() else "cpu")(*images, **settings)


def visitor() -> Context:
    """In whose name a GPU is asked for later, when the call of now is over."""
    from gradio.context import LocalContext

    context = copy_context()
    context.run(LocalContext.event_id.set, None)  # nobody waits for its messages then
    return context


def run(command: list[str], environment: dict[str, str], folder: Path, log: Path) -> Iterator[tuple[int, int | None]]:
    """
    Runs a program in a process group of its own, which is gone when this ends: yields the process's id, and its exit
    code once there is one.
    """
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            env=environment,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        while process.poll() is None:
            yield process.pid, None
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.5)
        yield process.pid, process.returncode
    finally:
        with suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL) if hasattr(os, "killpg") else process.kill()
        process.wait()


@GPU(duration=LIMITS.teaching_gpu_seconds)
def run_on_lent(command: list[str], environment: dict[str, str], folder: Path, log: Path):
    """As [`run`], on the GPU that is lent, which is no time to step back for others; it ends with the server."""
    server, device = os.getppid(), os.environ.get("CUDA_VISIBLE_DEVICES", "")
    lent = {**environment, "CUDA_VISIBLE_DEVICES": device, "DIFFUSIONAD_TEACH_NICE": "0"}
    for found in run(command, lent, folder, log):
        if os.getppid() != server:
            return
        yield found
