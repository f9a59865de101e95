"""Images a second of the anomaly synthesis, on one CPU core or on a GPU.

    python -m benchmarks.synthesis [--device cuda] [--texture_dir DTD/images] [--json FILE]

Counts every image, also the half that stays normal: this is the rate at which training batches come out. The images
are smooth noise with a foreground over a seventh of them, as large as the screws of MVTec AD with their surroundings.
On a CPU the clock is the processor time of the one thread, so that other programs do not count. The reference's own
loader makes 80 images a second on a core.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from diffusionad_hf.training.synthesis import AnomalySynthesizer
from diffusionad_hf.training.textures import FolderTextures, ProceduralTextures


def run(
    device: str = "cpu", *, size: int = 256, batch: int = 16, repeats: int = 20, texture_dir: str | Path | None = None
) -> dict:
    """Measures the synthesis.

    Args:
        device: where the images lie. On "cpu" one thread is used.
        size: side of the images in pixels.
        batch: images a call.
        repeats: calls in each of the five timings; the median counts.
        texture_dir: folder of textures; procedural ones without.

    Returns:
        What was measured: images a second (median, lowest and highest of five) and the settings.
    """
    threads = torch.get_num_threads()
    if device == "cpu":
        torch.set_num_threads(1)
    try:
        textures = FolderTextures(texture_dir, size, 200) if texture_dir else ProceduralTextures(size, 60)
        generator = torch.Generator().manual_seed(0)
        images = F.interpolate(torch.rand(batch, 3, 32, 32, generator=generator), size=size, mode="bilinear").to(
            device
        )
        foreground = torch.zeros(batch, 1, size, size, device=device)
        foreground[:, :, 2 * size // 5 : 3 * size // 5, size // 8 : 7 * size // 8] = 1
        synthesizer = AnomalySynthesizer(textures)

        def seconds(first_epoch: int) -> float:
            clock = time.perf_counter if images.is_cuda else time.process_time
            start = clock()
            for epoch in range(first_epoch, first_epoch + repeats):
                synthesizer(images, range(batch), epoch, foreground)
            if images.is_cuda:
                torch.cuda.synchronize(images.device)
            return clock() - start

        seconds(0)  # warm-up
        rates = sorted(batch * repeats / seconds(i * repeats) for i in range(5))
    finally:
        torch.set_num_threads(threads)
    return {
        "images_per_second": round(rates[2], 1),
        "lowest": round(rates[0], 1),
        "highest": round(rates[-1], 1),
        "device": torch.cuda.get_device_name(images.device)
        if images.is_cuda
        else f"{platform.machine()} CPU, 1 thread",
        "size": size,
        "batch": batch,
        "textures": "folder" if texture_dir else "procedural",
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", type=int, default=256, help="side of the images in pixels")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--texture_dir", type=Path)
    parser.add_argument("--json", type=Path, help="also write the result here")
    options = vars(parser.parse_args())
    file = options.pop("json")
    result = json.dumps(run(**options), indent=2)
    print(result)
    if file:
        file.write_text(result + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
