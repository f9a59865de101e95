"""The golden outputs of the paper's own code, and the rule that fills the weights they were computed with."""

import json
from pathlib import Path
from zlib import crc32

import numpy as np
import torch

FIXTURES = Path(__file__).parent / "fixtures"
CONFIGURATIONS = ("px64", "px256")


def tensor_from_name(name: str, shape: list[int]) -> torch.Tensor:
    """The tensor that the goldens' rule gives for a parameter's name and shape."""
    if name.endswith("num_batches_tracked"):
        return torch.tensor(0)
    i = np.arange(int(np.prod(shape)), dtype=np.float64)
    x = np.sin((i + 1) * 12.9898 + crc32(name.encode()) % 1000) * 43758.5453
    u = 2 * (x - np.floor(x)) - 1
    if name.endswith("running_var"):
        values = 1 + 0.5 * np.abs(u)
    elif name.endswith(("running_mean", ".bias")):
        values = 0.05 * u
    elif len(shape) == 1:
        values = 1 + 0.1 * u
    else:
        values = np.sqrt(6 / np.prod(shape[1:])) * u * (0.25 if name.endswith("fin_out.0.weight") else 1)
    return torch.from_numpy(values.astype(np.float32).reshape(shape))


def reference_weights(configuration: str, network: str) -> dict[str, torch.Tensor]:
    """State dict of the reference's `unet` or `seg`."""
    shapes = json.loads((FIXTURES / "official_state_dict_shapes.json").read_text())[configuration][network]
    return {name: tensor_from_name(name, shape) for name, shape in shapes.items()}


def write_reference_checkpoint(path: Path, configuration: str) -> Path:
    """Writes a `params-last.pt` as the reference's train.py does, its arguments in a `defaultdict(str)`."""
    from collections import defaultdict

    args = defaultdict(str)
    size = int(configuration.removeprefix("px"))
    args.update(img_size=[size, size], T=1000, num_heads=4, num_head_channels=-1, dropout=0, base_channels=32)
    args.update(condition_w=1, eval_normal_t=200, eval_noisier_t=400, less_t_range=300, channels=3)
    torch.save(
        {
            "n_epoch": 3000,
            "unet_model_state_dict": reference_weights(configuration, "unet"),
            "seg_model_state_dict": reference_weights(configuration, "seg"),
            "args": args,
        },
        path,
    )
    return path


def golden_inputs(configuration: str, batch: int = 2, seed: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    """The images `(N, 3, S, S)` and the noise `(2, N, 3, S, S)` of the goldens."""
    size = int(configuration.removeprefix("px"))
    rng = np.random.default_rng(seed)
    x = rng.random((batch, 3, size, size), dtype=np.float32)
    noise = [rng.standard_normal((batch, 3, size, size), dtype=np.float32) for _ in range(2)]
    return torch.from_numpy(x), torch.from_numpy(np.stack(noise))
