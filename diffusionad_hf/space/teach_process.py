"""The process in which a product is taught: it yields to everything else, and ends with its server.

python -m diffusionad_hf.space.teach_process SECONDS BYTES (train ... | preview PHOTOS FOLDER)
"""

import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

TOO_MUCH_MEMORY = 77  # exit code
_GRACE = 120.0  # seconds for the best weights so far to be calibrated once time is up
MADE_UP = 3  # synthetic defects that a preview shows
_SHOWN_FROM = 8  # photos that the preview learns the foreground from: quick, and enough to see what it is


def _step_back() -> None:
    """Lets everything else go first, and is the first to go if memory runs out."""
    os.nice(int(os.environ.get("DIFFUSIONAD_TEACH_NICE") or 19))
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def _memory() -> int:
    """Bytes in use; 0 where that cannot be known."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _watch(seconds: float, most_bytes: int) -> None:
    """Ends this process with its server or beyond its memory; asks it to finish when its time is up."""
    server, end, asked = os.getppid(), time.monotonic() + seconds, False
    while os.getppid() == server and time.monotonic() < end + _GRACE:
        if _memory() > most_bytes:
            os._exit(TOO_MUCH_MEMORY)
        if time.monotonic() > end and not asked:
            asked = True
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)
    os._exit(1)


def preview(photos: str, folder: str) -> int:
    """
    Shows what a training will see, of three photos: `foreground-N.png`, which textures have none of, and
    `defect-N.png`.
    """
    import numpy as np
    import torch
    from PIL import Image

    from ..images_diffusionad import to_uint8
    from ..training.arguments import TrainingConfig, load_preset
    from ..training.dataset import NormalImages, spread
    from ..training.images import estimated_foregrounds, fit_size, learn_foreground
    from ..training.synthesis import AnomalySynthesizer
    from ..training.textures import ProceduralTextures
    from ..visualization import overlay, save_image

    def picture(image: torch.Tensor) -> Image.Image:
        return Image.fromarray(to_uint8(image).permute(1, 2, 0).contiguous().numpy())

    files = [str(file) for file in sorted(Path(photos).iterdir())]
    options = load_preset("perceptual")
    size = fit_size(TrainingConfig(data_dir=photos, output_dir=folder, **options), files)
    reader = NormalImages([files[i] for i in spread(len(files), _SHOWN_FROM)], size)
    estimator, rows = learn_foreground(reader, "auto"), spread(len(reader), MADE_UP)
    images, foregrounds = torch.stack([reader.read(row) for row in rows]), None
    pictures = {}
    if estimator.kind == "object":
        masks = torch.from_numpy(np.stack(list(estimated_foregrounds(estimator, reader, rows))))[:, None]
        pictures["foreground"] = list(map(picture, torch.where(masks, images, images.mean(1, keepdim=True) / 4 + 0.7)))
        foregrounds = masks.float()
    synthesizer = AnomalySynthesizer(
        ProceduralTextures(size, 30),
        seed=0,
        anomaly_probability=1.0,
        self_augmentation_probability=0.0 if foregrounds is None else 0.5,
        **{name: value for name, value in options.items() if name.endswith("_probability")},
    )
    made = synthesizer(images, range(len(rows)), 0, foregrounds)
    pictures["defect"] = [
        overlay(picture(image), mask[0].numpy(), threshold=0.5, opacity=0.0)
        for image, mask in zip(made.images, made.masks, strict=True)
    ]
    for name, several in pictures.items():
        for i, made_up in enumerate(several):
            save_image(made_up, Path(folder) / f"{name}-{i}.png")
    return 0


def main(argv: list[str]) -> int:
    seconds, most_bytes, command, *arguments = argv
    _step_back()
    threading.Thread(target=_watch, args=(float(seconds), int(most_bytes)), daemon=True).start()
    if command == "preview":
        return preview(*arguments)
    from ..cli.main import main as diffusionad

    return diffusionad([command, *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
