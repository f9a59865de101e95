"""Contact sheet of what training will see: images, foregrounds, synthetic anomalies and their masks.

python -m diffusionad_hf.training.preview --data-dir D --category C --output sheet.png
"""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from ..files import escape_output
from ..flags import DashedParser, as_flags
from ..images_diffusionad import to_uint8
from ..visualization import save_image
from .arguments import TrainingConfig, add_former_size
from .dataset import spread
from .foreground import KINDS
from .look import Photos, look
from .steps import build_synthesizer
from .synthesis import AnomalySynthesizer, Textures
from .textures import FolderTextures, ProceduralTextures

COLUMNS = ("image", "foreground", "anomaly", "mask", "another", "mask")
TITLE = 22  # height of a line of text in pixels


def contact_sheet(
    images: torch.Tensor, foregrounds: torch.Tensor | None, synthesizer: AnomalySynthesizer, title: str
) -> Image.Image:
    """A row for each image `(N, 3, H, W)`: itself, its foreground, and two synthetic anomalies with their masks."""
    shown = torch.ones_like(images[:, :1]) if foregrounds is None else foregrounds.float()
    outside = images.mean(1, keepdim=True).expand_as(images) * 0.3
    columns = [images, torch.where(shown > 0.5, images, outside)]
    for epoch in (0, 1):
        batch = synthesizer(images, range(len(images)), epoch, foregrounds)
        columns += [batch.images, batch.masks.expand_as(images)]
    count, _, height, width = images.shape
    sheet = torch.stack(columns, dim=1).permute(0, 3, 1, 4, 2).reshape(count * height, len(columns) * width, 3)
    pixels = to_uint8(sheet).numpy()
    picture = Image.new("RGB", (pixels.shape[1], pixels.shape[0] + 2 * TITLE), "white")
    picture.paste(Image.fromarray(pixels), (0, 2 * TITLE))
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(14)
    draw.text((4, 2), title, fill="black", font=font)
    for i, name in enumerate(COLUMNS):
        draw.text((i * width + 4, TITLE + 2), name, fill="black", font=font)
    return picture


def main(argv: list[str] | None = None) -> int:
    parser = DashedParser(prog="python -m diffusionad_hf.training.preview", description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", required=True, help="folder of the dataset, or a dataset id on the Hub")
    parser.add_argument("--category", help="may be left out if there is only one")
    parser.add_argument("--output", type=Path, required=True, help="picture to write")
    parser.add_argument("--texture-dir", help="folder of texture images; procedural textures without it")
    parser.add_argument("--foreground-dir", help="folder of masks named like the images; estimated without it")
    parser.add_argument("--foreground", choices=KINDS, default="auto", help="what the images show, if known")
    parser.add_argument("--image-size", default="256", help="as in training (default: %(default)s)")
    add_former_size(parser)
    parser.add_argument("--value-range", type=float, help="as in training")
    parser.add_argument("--rows", type=int, default=8, help="images on the sheet (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the synthesis (default: %(default)s)")
    escape_output()
    args = parser.parse_args(argv)
    if args.rows < 1 or args.seed < 0:
        parser.error("--rows must be at least 1, and --seed 0")
    try:
        if args.output.suffix.lower() not in Image.registered_extensions():
            raise ValueError(f"--output {args.output} must end in a picture's extension, such as .png")
        own = vars(args) | {"image_size": getattr(args, "resolution", args.image_size)}
        names = {option.name for option in fields(TrainingConfig)}
        config = TrainingConfig(**{name: value for name, value in own.items() if name in names})
        title = save_preview(look(config), config, args.output, args.rows)
    except (ValueError, OSError, ImportError) as error:
        print(as_flags(f"error: {error}"), file=sys.stderr)
        return 2
    print(f"{title}\nwrote {args.output}")
    return 0


def save_preview(photos: Photos, args: TrainingConfig, path: Path, most: int = 8) -> str:
    """Writes the sheet of at most so many photos; returns its title."""
    normal = photos.normal
    rows = spread(len(normal), most)
    if args.texture_dir:
        textures: Textures = FolderTextures(args.texture_dir, normal.size, 200)
    else:
        textures = ProceduralTextures(normal.size, 60, args.seed)
    synthesizer = build_synthesizer(args, textures, photos.kind, anomaly_probability=1.0)
    title, shown = f"{args.category or Path(args.data_dir).name}: {photos.kind}", None
    if normal.foregrounds is not None:
        shown = torch.stack([normal.foregrounds[row] for row in rows])
        source = "given" if args.foreground_dir else "estimated"
        title += f", foreground {shown.mean():.1%} of the picture ({source})"
    images = torch.stack([normal.pixels(row) for row in rows])
    save_image(contact_sheet(images, shown, synthesizer, title), path)
    return title


if __name__ == "__main__":
    sys.exit(main())
