"""Memory that a training step takes on a GPU, computed without one.

    python -m benchmarks.training_memory [--architecture paper] [--resolution 256] [--train_batch_size 16]

Runs a forward and backward pass on tensors that have shapes and types but no content, and follows which of them are
alive at a time. Mixed precision is bf16, with the operations that CUDA's autocast keeps in float32 kept in it. The
memory of the CUDA context, of cuDNN's workspaces and of what the allocator cannot use comes on top: 1 to 2 GB as a
rule of thumb.
"""

from __future__ import annotations

import argparse
import weakref
from unittest import mock

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffusionad_hf import PRESETS, build_pipeline
from diffusionad_hf.training.losses import DiffusionADObjective

# Master weights, their average, and Adam's two averages of the gradients, in float32 throughout.
BYTES_PER_PARAMETER = 4 + 4 + 4 + 4


class LivingTensors(TorchDispatchMode):
    """Bytes of all tensors made within it: those alive now, and the most that ever were.

    Attributes:
        now, peak: bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, weakref.finalize] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self._seen:
                    self._seen[storage._cdata] = weakref.finalize(
                        storage, self._gone, storage._cdata, storage.nbytes()
                    )
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
        return result

    def _gone(self, key: int, size: int) -> None:
        del self._seen[key]
        self.now -= size


def step_memory(
    architecture: str, *, resolution: int, batch: int, mixed_precision: bool, checkpointing: bool
) -> dict[str, float]:
    """Computes the memory of one training step.

    Args:
        architecture: one of `diffusionad_hf.PRESETS`.
        resolution: side of the images in px.
        batch: images in one forward pass.
        mixed_precision: bf16 instead of float32.
        checkpointing: recompute activations in the backward pass, in both networks.

    Returns:
        GB (10^9 bytes): `weights` with their average and the optimiser's state, `step` (activations and gradients at
        their peak), `total`.
    """
    group_norm = F.group_norm

    def float32_group_norm(sample, *args, **kwargs):
        return group_norm(sample.float(), *args, **kwargs)

    with FakeTensorMode(), mock.patch.object(F, "group_norm", float32_group_norm):
        pipe = build_pipeline(architecture, resolution)
        if checkpointing:
            pipe.unet.enable_gradient_checkpointing()
            pipe.segmenter.enable_gradient_checkpointing()
        objective = DiffusionADObjective(pipe.unet, pipe.segmenter, pipe.scheduler).train()
        parameters = sum(parameter.numel() for parameter in objective.parameters())
        steps = torch.zeros(batch, dtype=torch.int64)
        with LivingTensors() as tensors:
            inputs = {
                "images": torch.rand(batch, 3, resolution, resolution),
                "masks": torch.zeros(batch, 1, resolution, resolution),
                "noise": torch.randn(2, batch, 3, resolution, resolution),
            }
            with torch.autocast("cpu", torch.bfloat16, enabled=mixed_precision):
                loss = objective(**inputs, labels=steps, timesteps_small=steps, timesteps_big=steps)["loss"]
            loss.backward()
    weights = parameters * BYTES_PER_PARAMETER
    return {"weights": weights / 1e9, "step": tensors.peak / 1e9, "total": (weights + tensors.peak) / 1e9}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architecture", choices=tuple(PRESETS), default="paper", help="default: %(default)s")
    parser.add_argument("--resolution", type=int, default=256, help="default: %(default)s")
    parser.add_argument("--train_batch_size", type=int, default=16, help="default: %(default)s")
    args = parser.parse_args()
    print("precision  checkpointing  weights  step   total (GB)")
    for mixed_precision in (False, True):
        for checkpointing in (False, True):
            sizes = step_memory(
                args.architecture,
                resolution=args.resolution,
                batch=args.train_batch_size,
                mixed_precision=mixed_precision,
                checkpointing=checkpointing,
            )
            row = ("bf16" if mixed_precision else "float32", "yes" if checkpointing else "no")
            print(
                f"{row[0]:10} {row[1]:14} {sizes['weights']:7.2f} {sizes['step']:6.2f} {sizes['total']:7.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
