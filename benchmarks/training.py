"""Images a second of training steps, and on a GPU their peak memory.

    python -m benchmarks training                                        # tiny and small on a CPU
    python -m benchmarks training --device cuda --presets paper small --dtypes float32 bfloat16 --compile

A step is what `training/train.py` does with a batch: anomalies synthesised, noise and timesteps drawn, both networks
forward and backward, one step of Adam (fused on a GPU). Images come from memory. On a CPU the settings take turns, on
a GPU they are measured one after another, `--repeats` times each. What cannot be measured, such as a batch that does
not fit into memory, has its reason instead; compiled networks are not measured with gradient checkpointing, which
torch.compile cannot compile. Compiling happens in the first step, which does not count for the peak memory.
Operations are those of the convolutions and matrix products of the forward pass times three (recomputation for
gradient checkpointing is not counted); the peak is the best square matrix product of the same type in the same run.
"""

from collections.abc import Callable
from itertools import count, product
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.inference import count_image
from benchmarks.machine import (
    compile_everything,
    describe,
    make_parser,
    measure_rows,
    report,
    save,
)
from diffusionad_hf import PRESETS, build_pipeline
from diffusionad_hf.training.loop import prepare_batch
from diffusionad_hf.training.losses import DiffusionADObjective
from diffusionad_hf.training.memory import keep_freed_memory
from diffusionad_hf.training.synthesis import AnomalySynthesizer
from diffusionad_hf.training.textures import ProceduralTextures


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__, repeats=5, device=True)
    parser.add_argument("--presets", nargs="+", choices=list(PRESETS), default=["tiny", "small"])
    parser.add_argument("--resolution", type=int, default=256, help="of the images in px (default: 256)")
    parser.add_argument("--batch-sizes", type=int, nargs="+", metavar="B", help="default: 4; on a GPU 16")
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32"], help="autocast")
    parser.add_argument("--layouts", nargs="+", choices=["contiguous", "channels_last"], default=["channels_last"])
    parser.add_argument("--gradient-checkpointing", action="store_true", help="also measure with it")
    parser.add_argument("--compile", action="store_true", help="also measure with torch.compile")
    args = parser.parse_args(argv)
    device = args.device
    if device.type == "cpu":
        keep_freed_memory()
    compile_everything()
    settings = {
        "px": [args.resolution],
        "batch_size": args.batch_sizes or [4 if device.type == "cpu" else 16],
        "dtype": args.dtypes,
        "layout": args.layouts,
        "checkpointing": [False, True] if args.gradient_checkpointing else [False],
        "compiled": [False, True] if args.compile else [False],
    }
    result: dict[str, Any] = {"machine": describe(device), "rows": []}
    for preset in args.presets:
        rows = [dict(zip(settings, values, strict=True)) for values in product(*settings.values())]
        rows = [{"preset": preset, **row} for row in rows if not (row["checkpointing"] and row["compiled"])]
        flops = 3 * count_image(build_pipeline(preset, args.resolution))
        measure_rows(rows, lambda row: _training_step(row, device), flops, device, args.repeats)
        result["rows"] += rows
        save(result, args.json)
    report(result, args.json)


def _training_step(row: dict[str, Any], device: torch.device) -> Callable[[], None]:
    torch.manual_seed(0)
    size, batch = row["px"], row["batch_size"]
    pipe = build_pipeline(row["preset"], size)
    for network in (pipe.unet, pipe.segmenter):
        if row["checkpointing"]:
            network.enable_gradient_checkpointing()
        if row["layout"] == "channels_last":
            network.to(memory_format=torch.channels_last)
        if row["compiled"]:
            network.compile(dynamic=False)
    objective = DiffusionADObjective(pipe.unet, pipe.segmenter, pipe.scheduler).train().to(device)
    optimizer = torch.optim.Adam(objective.parameters(), lr=1e-4, fused=device.type == "cuda")
    synthesizer = AnomalySynthesizer(ProceduralTextures(size, 60), seed=0)
    images = F.interpolate(torch.rand(batch, 3, 16, 16), size=size, mode="bilinear")
    foreground = torch.ones(batch, 1, size, size)
    epochs = count()

    def step() -> None:
        samples = {
            "image": images,
            "index": torch.arange(batch),
            "epoch": torch.full((batch,), next(epochs)),
            "foreground": foreground,
        }
        inputs = prepare_batch(samples, synthesizer, pipe.scheduler, device, seed=0)
        with torch.autocast(device.type, torch.bfloat16, enabled=row["dtype"] == "bfloat16"):
            loss = objective(**inputs)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    main()
