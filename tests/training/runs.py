"""Trainings small enough for a test: in this process, and in others that can be killed."""

import json
import multiprocessing
import os
import resource
import signal
import sys
from pathlib import Path
from unittest import mock

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors.torch import load_file

from diffusionad_hf.presets import PRESETS
from diffusionad_hf.training import loop as train

WEIGHTS = "diffusion_pytorch_model.safetensors"
# Narrow enough that trainings take a second and checkpoints a few megabytes.
NARROW = {"tiny": {**PRESETS["tiny"], "base_channels": 8, "norm_num_groups": 8, "segmenter_base_channels": 4}}

# Its children are processes of their own that need not import torch again.
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["tests.training.runs"])


# As short as a training gets.
OPTIONS = {
    "preset": "tiny",
    "image_size": 32,
    "max_train_steps": 4,
    "train_batch_size": 2,
    "validation_steps": 2,
    "checkpointing_steps": 2,
    "holdout_fraction": 0.25,
    "false_alarm_rate": 0.25,
    "lr_warmup_steps": 1,
    "report_to": "none",
    # Otherwise the faster one is taken, which depends on the processor and on what else runs.
    "mixed_precision": "no",
}


def arguments(data, output, **options):
    """A command line; `None` leaves an option out, `True` is a flag."""
    values = {
        "data_dir": data,
        "output_dir": output,
        "texture_dir": data.parent / "textures",
        **OPTIONS,
        **options,
    }
    command = []
    for name, value in values.items():
        if value is not None:
            flag = f"--{name.replace('_', '-')}"
            command += [flag] if value is True else [flag, str(value)]
    return command


def forget_accelerator():
    """Lets the next training of this process set up its own."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def run(data, output, **options):
    """Trains in this process; returns the exit code."""
    forget_accelerator()
    with mock.patch.dict(PRESETS, NARROW):
        return train.main(arguments(data, output, **options))


def start(data, output, *, die_at=None, largest_file=None, **options):
    """
    Starts a training in a process of its own, which writes what it says to `<output>.log`.

    Args:
        die_at: `(event, text)`: it gets SIGKILL at the first audit event of that name with the text in its
            arguments, such as the renaming of a file.
        largest_file: The system kills it in the middle of writing a file beyond this many bytes.
    """
    log = output.with_name(f"{output.name}.log")
    process = _processes.Process(
        target=_train_in_child, args=(arguments(data, output, **options), log, die_at, largest_file)
    )
    log.touch()
    process.start()
    return process, log


def _train_in_child(command, log, die_at, largest_file):
    torch.set_num_threads(1)
    PRESETS.update(NARROW)
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if die_at is not None:
        event, text = die_at

        def hook(name, details):
            if name == event and text in str(details):
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
    if largest_file is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
    sys.exit(train.main(command))


def weights(folder):
    """All tensors of a pipeline folder's networks, by name."""
    return {
        f"{network}.{name}": tensor
        for network in ("unet", "segmenter")
        for name, tensor in load_file(Path(folder) / network / WEIGHTS).items()
    }


def losses(folder):
    """The losses as the last checkpoint holds them: not rounded, unlike the curve's."""
    (*_, file) = sorted(Path(folder).glob("checkpoint-*/training_state.json"))
    return json.loads(file.read_text())["losses"]


def same(first, second):
    """Whether two such dictionaries are equal bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
