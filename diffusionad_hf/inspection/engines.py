"""Who inspects the blocks of a large inspection: this process, those of `accelerate launch`, or a Ray cluster."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cached_property
from typing import Any

import torch

from ..files import require
from ..pipeline_diffusionad import DiffusionADPipeline
from .blocks import Run, describe_model, inspect_blocks
from .inputs import Inputs
from .inspection import Pictures

# Loads the pipeline, onto a device or, with `None`, wherever is best.
Load = Callable[[str | None], DiffusionADPipeline]


class LocalEngine:
    """A loop in this process, on the GPU if there is one and no other device is named."""

    is_main = True
    num_processes = 1

    def __init__(self, device: str | None = None):
        self.device = device

    def decide(self, work: Callable[[], Any]) -> Any:
        """What the main process finds, in every process."""
        return work()

    def load(self, load: Load) -> tuple[dict[str, Any], int]:
        """Loads the model; returns [`describe_model`] of it and how many images it takes per pass by default."""
        self.pipe = load(self.device)
        return describe_model(self.pipe) if self.is_main else {}, self.pipe.default_batch_size

    def share(self, blocks: Sequence[int]) -> Sequence[int]:
        return blocks

    def inspect(self, inputs: Inputs, run: Run, blocks: Sequence[int], pictures: Pictures | None) -> Iterator[int]:
        """Yields numbers of images as they are done."""
        return inspect_blocks(self.pipe, inputs, run, blocks, pictures)

    def wait(self) -> None:
        """Returns when every process has done its share."""

    def __enter__(self) -> "LocalEngine":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None: ...


class AccelerateEngine(LocalEngine):
    """The processes of `accelerate launch`: each sees to an equal run of neighbouring blocks."""

    def __init__(self, device: str | None = None):
        from accelerate import PartialState

        on_cpu = device == "cpu" or not torch.cuda.is_available()
        # Processes may end hours apart, and wait for each other.
        self._state = PartialState(cpu=on_cpu, timeout=timedelta(days=7))
        self.is_main, self.num_processes = self._state.is_main_process, self._state.num_processes
        if self.num_processes > 1:
            if device not in (None, "cpu"):
                raise ValueError(f"device {device}: leave it out; each process takes a GPU of its own.")
            device = "cpu" if on_cpu else str(self._state.device)
        super().__init__(device)

    def decide(self, work: Callable[[], Any]) -> Any:
        """If it fails the main process says why, and the others leave in silence."""
        from accelerate.utils import broadcast_object_list

        decision: list[Any] = [None]
        if self.is_main:
            try:
                decision[0] = work()
            finally:
                broadcast_object_list(decision)
        elif broadcast_object_list(decision) == [None]:
            raise SystemExit(2)
        return decision[0]

    def share(self, blocks: Sequence[int]) -> Sequence[int]:
        index, count = self._state.process_index, len(blocks)
        return blocks[count * index // self.num_processes : count * (index + 1) // self.num_processes]

    def wait(self) -> None:
        self._state.wait_for_everyone()

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        # After an error the launcher stops the others, which may still wait for this one.
        if kind is None:
            self._state.destroy_process_group()


class RayEngine(LocalEngine):
    """
    A Ray cluster: the one that `RAY_ADDRESS` names or that runs on this machine, else one started here for the run.

    A worker per GPU, or per core if there is no GPU, loads the model once and takes one block after another. Ray
    restarts workers that die, and gives them their block again; a block at which three died ends the run.
    """

    def __init__(self, device: str | None = None):
        if device not in (None, "cpu"):
            raise ValueError(f"device {device}: leave it out; Ray gives each worker a GPU of its own.")
        super().__init__(device)
        # Ray reports to its makers unless told otherwise.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        self._ray = require("ray", "ray")
        self._joined = not self._ray.is_initialized()
        if self._joined:
            self._ray.init(log_to_driver=False, logging_level="WARNING")

    def load(self, load: Load) -> tuple[dict[str, Any], int]:
        there = self._ray.cluster_resources()
        gpus = 0 if self.device == "cpu" else int(there.get("GPU", 0))
        # Restarted without end: machines may come and go for days.
        options = {"num_cpus": 1, "num_gpus": min(gpus, 1), "max_restarts": -1, "max_task_retries": 2}
        worker = self._ray.remote(**options)(_RayWorker)
        count = gpus or int(there.get("CPU", 1))
        self._workers = [worker.remote(load, self.device, os.getcwd()) for _ in range(count)]
        with self._explained():
            return self._ray.get(self._workers[0].describe.remote())

    def inspect(self, inputs: Inputs, run: Run, blocks: Sequence[int], pictures: Pictures | None) -> Iterator[int]:
        # A reference in a list stays one: each worker fetches what it stands for once.
        job = [self._ray.put((inputs, run, pictures))]
        pool = require("ray.util", "ray").ActorPool(self._workers)
        with self._explained():
            yield from pool.map_unordered(lambda worker, block: worker.inspect.remote(job, block), blocks)

    def __exit__(self, *_: Any) -> None:
        if self._joined:
            self._ray.shutdown()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Raises what a worker raised, without Ray's account of it."""
        try:
            yield
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except self._ray.exceptions.RayError as error:
            raise OSError(f"Ray gave up ({error}); finished blocks are kept: run the same again to go on.") from error


class _RayWorker:
    def __init__(self, load: Load, device: str | None, folder: str):
        self._load, self._device = load, device
        # Paths may be relative to where the command was given.
        os.chdir(folder)

    @cached_property
    def _pipe(self) -> DiffusionADPipeline:
        return self._load(self._device)

    def describe(self) -> tuple[dict[str, Any], int]:
        return describe_model(self._pipe), self._pipe.default_batch_size

    def inspect(self, job: list[Any], block: int) -> int:
        if not hasattr(self, "_job"):
            self._job = require("ray", "ray").get(job[0])
        inputs, run, pictures = self._job
        return sum(inspect_blocks(self._pipe, inputs, run, [block], pictures))
