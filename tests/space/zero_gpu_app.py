"""The page as the package `spaces` runs it on ZeroGPU. Only `move` and `init` are ours: they would touch a GPU."""

import os
from pathlib import Path


def _init(device):
    os.environ["CUDA_VISIBLE_DEVICES"] = device


def _move(callback=None):
    from spaces.zero.torch.patching import cuda_aliases

    for pretended, tensor in cuda_aliases.items():
        if tensor is not None:
            pretended.data = tensor


if __name__ == "__main__":
    import torch

    # What the package takes from torch's builds for GPUs.
    torch.version.cuda, torch._C._cuda_init, torch.cuda._is_in_bad_fork = "12.8", bool, bool
    from spaces.zero import torch as worker

    from diffusionad_hf.space.app import main

    worker.init, worker.move = _init, _move
    main(Path(__file__).resolve().parents[2] / "space")
