"""Images a second of the anomaly synthesis, on one CPU core or on a GPU.

    python -m benchmarks synthesis [--device cuda] [--texture-dir DTD/images] [--json FILE]

Counts every image, also the half that stays normal: this is the rate at which training batches are made. The images
are smooth noise with a foreground over a seventh of them, as large as the screws of MVTec AD with their surroundings.
On a CPU the clock is the processor time of the one thread, so that other programs do not count. The reference's own
loader makes 80 images a second on a core.
"""

import time
from itertools import count
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.machine import describe, make_parser, report, spread, timed
from diffusionad_hf.training.synthesis import AnomalySynthesizer
from diffusionad_hf.training.textures import FolderTextures, ProceduralTextures

_CALLS = 20  # in each timing


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__, repeats=5, device=True)
    parser.add_argument("--size", type=int, default=256, help="side of the images in px (default: 256)")
    parser.add_argument("--batch", type=int, default=16, help="images a call (default: 16)")
    parser.add_argument("--texture-dir", type=Path, help="folder of textures; procedural ones without it")
    args = parser.parse_args(argv)
    device, size = args.device, args.size
    if device.type == "cpu":
        torch.set_num_threads(1)
    textures = FolderTextures(args.texture_dir, size, 200) if args.texture_dir else ProceduralTextures(size, 60)
    coarse = torch.rand(args.batch, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    images = F.interpolate(coarse, size=size, mode="bilinear").to(device)
    foreground = torch.zeros(args.batch, 1, size, size, device=device)
    foreground[:, :, 2 * size // 5 : 3 * size // 5, size // 8 : 7 * size // 8] = 1
    synthesizer, epochs = AnomalySynthesizer(textures), count()

    def calls() -> None:
        for _ in range(_CALLS):
            synthesizer(images, range(args.batch), next(epochs), foreground)

    def rate() -> float:
        began = time.process_time()
        elapsed = timed(calls, device)
        return args.batch * _CALLS / (time.process_time() - began if device.type == "cpu" else elapsed)

    rate()  # warm-up
    row = {"px": size, "batch_size": args.batch, "textures": "folder" if args.texture_dir else "procedural"}
    row |= {f"{name}_images_per_s": value for name, value in spread([rate() for _ in range(args.repeats)]).items()}
    report({"machine": describe(device), "rows": [row]}, args.json)


if __name__ == "__main__":
    main()
