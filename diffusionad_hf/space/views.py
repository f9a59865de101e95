"""From a model's answer to pictures and words that a person can act on, without any user interface."""

import io
import json
import logging
import math
import re
import shutil
import time
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ..figure import as_it_should_look, figure
from ..files import link_or_copy, write_json
from ..images_diffusionad import InvalidImageError, to_uint8
from ..verdicts_diffusionad import ANOMALOUS, NORMAL, Verdict, percent
from ..visualization import (
    Region,
    anomaly_map_16bit,
    find_regions,
    mask_image,
    overlay,
    region_threshold,
    save_image,
)
from .decoding import decode
from .intake import LIMITS, Refusal, Settings
from .models import Calibration, Model, Raw

logger = logging.getLogger("space")
# The longest side of a picture on the page. Small photos are enlarged to the first, so that outlines stay thin.
VIEW_SIDES = (768, 1280)
MOST_REGIONS = 12
OPACITY = 0.6  # of the strongest heat, unless the visitor moves it


@dataclass(frozen=True)
class Result:
    """One inspected image, as kept on disk. Sizes are (width, height) in pixels of the photo."""

    name: str
    category: str
    key: str  # of the category's model
    score: float
    size: tuple[int, int]
    grid: list[int]
    settings_changed: bool
    note: str = ""
    is_example: bool = False
    value_range: float | None = None  # as the model reads images
    is_whole: bool = True  # whether the model looked at all of it

    @classmethod
    def of(
        cls, name: str, model: Model, image: torch.Tensor, raw: Raw, settings: Settings, note: str = ""
    ) -> "Result":
        size, note = (image.shape[2], image.shape[1]), " ".join(filter(None, (note, raw.note)))
        grid, changed, white = raw.grid.tolist(), settings != Settings(), model.value_range
        key, seen = model.key, raw.is_whole
        return cls(name, model.name, key, raw.score, size, grid, changed, note, value_range=white, is_whole=seen)

    def p_value(self, calibration: Calibration) -> float | None:
        return None if self.settings_changed else calibration.p_value(self.score)

    def strangeness(self, calibration: Calibration) -> float | None:
        """How unlike the normal images it is, above 1 unfamiliar; None if nothing is known of them."""
        familiarity = calibration.familiarity
        return None if familiarity is None else familiarity.strangeness(np.array(self.grid, np.uint8))

    def verdict(self, calibration: Calibration) -> Verdict:
        strangeness = self.strangeness(calibration)
        is_familiar = None if strangeness is None else strangeness <= 1
        return calibration.verdict(
            self.score, is_familiar=is_familiar, settings_changed=self.settings_changed, is_whole=self.is_whole
        )

    @property
    def file_stem(self) -> str:
        """The photo's name without its suffix, made fit for a file name."""
        return re.sub(r"[^\w ().-]", "_", Path(self.name).stem)[:60].strip(". ") or "image"


STORED = ("map.npy", "reconstruction.png", "photo.jpg", "original", "result.json")


def store(folder: Path, result: Result, image: torch.Tensor, raw: Raw, original: Path | None = None) -> Image.Image:
    """Keeps all that a later view needs: what the model said, the photo as shown, which it returns, and as sent."""
    np.save(folder / "map.npy", raw.anomaly_map)
    Image.fromarray(raw.reconstruction).save(folder / "reconstruction.png")
    photo = view_photo(image)
    photo.save(folder / "photo.jpg", quality=92, subsampling=0)
    if original is not None:
        link_or_copy(original, folder / "original")
    write_json(folder / "result.json", result.__dict__)
    return photo


def load(folder: Path) -> Result:
    """What is kept in a folder; a Refusal if it holds no inspection, but a batch, a training, or nothing any more."""
    try:
        data = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise Refusal("This result is no longer kept. Inspect the image again.") from error
    return Result(**{**data, "size": tuple(data["size"])})


def _to_pil(image: torch.Tensor) -> Image.Image:
    # Made contiguous by torch: PIL would copy a large image with all other threads waiting.
    return Image.fromarray(to_uint8(image).permute(1, 2, 0).contiguous().numpy())


def view_photo(image: torch.Tensor) -> Image.Image:
    """The photo, (3, H, W), at the size of the page."""
    photo = _to_pil(image)
    longest = max(photo.size)
    scale = min(min(max(VIEW_SIDES[0] / longest, 1), 4), VIEW_SIDES[1] / longest)
    size = tuple(max(8, round(side * scale)) for side in photo.size)
    return photo if size == photo.size else photo.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)


def thumbnail(path: Path) -> bytes:
    """A small JPEG of an image file; a blank one if it cannot be read."""
    try:
        picture = _to_pil(decode(path, LIMITS.image_pixels)[0])
    except InvalidImageError as error:
        logger.warning("%s: %s", path.name, error)
        picture = Image.new("RGB", (8, 8), "white")
    picture.thumbnail((240, 240))
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=82)
    return content.getvalue()


def kept_photo(image: torch.Tensor) -> Image.Image:
    """The photo, (3, H, W), with at most `kept_pixels`, to learn from."""
    photo = _to_pil(image)
    scale = (LIMITS.kept_pixels / (photo.width * photo.height)) ** 0.5
    if scale >= 1:
        return photo
    size = (max(1, round(photo.width * scale)), max(1, round(photo.height * scale)))
    return photo.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)


@dataclass(frozen=True)
class Drawing:
    """A result at a threshold, drawn at a size (width, height).

    What is normal has no regions, no outlines and nothing in the mask: single pixels above the threshold are no
    finding then, and to show them would contradict the verdict. `diffusionad inspect` keeps to the same rule.
    """

    result: Result
    anomaly_map: np.ndarray
    size: tuple[int, int]
    calibration: Calibration

    @cached_property
    def shows_regions(self) -> bool:
        return self.result.verdict(self.calibration).word != NORMAL

    @property
    def threshold(self) -> float:
        """Of pixels."""
        threshold = self.calibration.threshold
        return region_threshold(None if threshold == math.inf else threshold)

    @cached_property
    def values(self) -> np.ndarray:
        """The map at this size, enlarged as the pipeline does it."""
        values = torch.from_numpy(self.anomaly_map)[None, None]
        return F.interpolate(values, size=self.size[::-1], mode="bilinear")[0, 0].numpy()

    @cached_property
    def regions(self) -> list[Region]:
        return find_regions(self.values, self.threshold)[:MOST_REGIONS] if self.shows_regions else []

    @property
    def photo_regions(self) -> list[Region]:
        """The same in pixels of the photo, all but their peaks."""
        width, height = self.result.size
        x, y = width / self.size[0], height / self.size[1]
        scaled = []
        for region in self.regions:
            x0, y0, x1, y1 = region.box
            box = (math.floor(x0 * x), math.floor(y0 * y), math.ceil(x1 * x), math.ceil(y1 * y))
            scaled.append(replace(region, box=box, area_px=max(1, round(region.area_fraction * width * height))))
        return scaled

    def overlay(self, photo: Image.Image, opacity: float, *, tags: bool = True) -> Image.Image:
        """The heat over the photo, with the regions' numbers."""
        return overlay(
            photo,
            self.values,
            threshold=self.threshold,
            opacity=opacity,
            contour=self.shows_regions,
            regions=self.regions if tags else (),
        )

    def figure(self, photo: Image.Image, reconstruction: Image.Image) -> Image.Image:
        """All in one picture, of the photo at this size."""
        result, calibration = self.result, self.calibration
        return figure(
            photo,
            self.anomaly_map,
            result.verdict(calibration),
            result.score,
            threshold=calibration.threshold,
            p_value=result.p_value(calibration),
            reconstruction=reconstruction,
            regions=self.regions,
        )

    @property
    def strongest(self) -> float:
        """Where the map is strongest, from the left (0) to the right (1)."""
        return float(self.anomaly_map.max(axis=0).argmax()) / self.anomaly_map.shape[1]

    def mask(self) -> Image.Image:
        """The regions in white."""
        return mask_image(self.values, self.threshold) if self.shows_regions else Image.new("L", self.size)


@dataclass(frozen=True)
class View:
    """Paths of the pictures of one moment, the regions in them (pixels of the photo), and where the map peaks."""

    photo: Path
    overlay: Path
    regions: list[Region]
    strongest: float  # from left (0) to right (1)


def view(folder: Path, calibration: Calibration, opacity: float = OPACITY) -> View:
    """Draws a kept result as a calibration sees it. The model does not run."""
    drawing, photo, _ = kept(folder, calibration)
    picture = drawing.overlay(photo, opacity)
    # A new name each time, so that no browser shows the former picture; the last few stay for those still loading.
    for old in sorted(folder.glob("view-*.jpg"))[:-4]:
        old.unlink(missing_ok=True)
    path = folder / f"view-{time.time_ns()}.jpg"
    picture.save(path, quality=90, subsampling=0)
    return View(folder / "photo.jpg", path, drawing.photo_regions, drawing.strongest)


def normal_picture(folder: Path, calibration: Calibration) -> Path | None:
    """How the part should look, at the size of the page; None if the reconstruction is not good enough."""
    drawing, photo, reconstruction = kept(folder, calibration)
    picture = as_it_should_look(photo, reconstruction, drawing.anomaly_map, drawing.threshold)
    path = folder / f"normal-{drawing.threshold:g}.jpg"
    if picture is not None:
        picture.save(path, quality=92)
    return None if picture is None else path


def kept(folder: Path, calibration: Calibration) -> tuple[Drawing, Image.Image, Image.Image]:
    """A kept result as a calibration sees it, with its photo and its reconstruction, at the size of the page."""
    photo, reconstruction = (Image.open(folder / name).convert("RGB") for name in ("photo.jpg", "reconstruction.png"))
    return Drawing(load(folder), np.load(folder / "map.npy"), photo.size, calibration), photo, reconstruction


def full_size(folder: Path, kind: str, calibration: Calibration, opacity: float) -> Path:
    """Writes the "overlay", "mask" or "map" at the photo's own size for download, unless it is there already."""
    result = load(folder)
    drawing = Drawing(result, np.load(folder / "map.npy"), result.size, calibration)
    changes = f"-{drawing.threshold:g}-{drawing.shows_regions:d}"
    changes = {"overlay": f"{changes}-{opacity:g}", "mask": changes, "map": ""}[kind]
    path = folder / "full" / f"{kind}{changes}" / f"{result.file_stem}-{kind}.png"
    if path.exists():
        return path
    for former in (folder / "full").glob(f"{kind}*"):  # one of each kind is kept: they are large
        shutil.rmtree(former, ignore_errors=True)
    if kind == "map":
        picture = anomaly_map_16bit(drawing.values)
    elif kind == "mask":
        picture = drawing.mask()
    else:
        photo, _ = decode(folder / "original", LIMITS.image_pixels, Path(result.name).suffix, result.value_range)
        picture = drawing.overlay(_to_pil(photo), opacity, tags=False)
    return save_image(picture, path)


_UNDECIDED = {
    "not_learnt": "this model has not learnt to tell defects",
    "no_difference": "nothing can stand out with this calibration",
    "unfamiliar": "unlike any normal image of this category",
    "settings_changed": "other settings than it was calibrated with",
    "not_calibrated": "not calibrated",
    "rate_not_promised": "too few calibration images for this false-alarm rate",
    "partly_seen": "only a part of the photo was inspected",
}


def headline(verdict: Verdict) -> str:
    if verdict.is_anomalous is None:
        return f"Undecided: {_UNDECIDED[verdict.reason]}"
    return "Anomalous: defect found" if verdict.word == ANOMALOUS else "Normal: no defect found"


def p_words(p_value: float, images: int) -> str:
    """The p-value for people: how often a normal part scores this high."""
    at_least = round(p_value * (images + 1)) - 1
    share = f"{at_least or 'None'} of the {images} normal images"
    return f"{share} used for calibration scored this high (p = {p_value:.2g})."


def promise_words(calibration: Calibration) -> str:
    """What a calibration promises, and what it does not."""
    count, rate = len(calibration.scores), calibration.false_alarm_rate
    spread = math.sqrt(rate * (1 - rate) / count)
    return (
        f"About {percent(rate)} of normal parts will be called anomalous; "
        f"with only {count} images, expect {percent(max(rate - 2 * spread, 0))} to {percent(rate + 2 * spread)}."
    )
