"""Pictures that a person can act on: heat maps, outlines, masks and lists of regions from anomaly maps.

An anomaly map is an (H, W) array in [0, 1], at the size of its image; every function here raises a ValueError for
anything else. Pixels at or above a *pixel threshold* in [0, 1], which `region_threshold` derives from the image
threshold, form regions: the same ones in `overlay`, `mask_image` and `find_regions`.
"""

import io
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from scipy import ndimage

from .files import replacing
from .images_diffusionad import to_uint8

DEFAULT_THRESHOLD = 0.5
"""Pixel threshold without calibration: the segmenter calls the pixel "more likely anomalous than not"."""

WRITER = "diffusionad-hf"
"""The `Software` that PNG files of this package name."""

_OWN_NAME = re.compile(
    r"([_-](figure|overlay|mask|map|reconstruction)|^(roc_curve|score_histogram|worst_cases|preview|kinds|progress))\.png$"
)

# Sixteen equidistant colours of matplotlib's "inferno" (S. van der Walt and N. Smith, CC0, github.com/BIDS/colormap).
# Linear interpolation stays within 7 of 255 of the published table. Its lightness rises steadily, so it reads in grey
# print and for every kind of colour blindness, which rainbow maps do not.
_INFERNO = (
    "000004 0c0826 240c4f 420a68 5d126e 781c6d 932667 ae305c c73e4c dd513a ed6925 f8850f fca50a fac62d f2e661 fcffa4"
)


_ANCHORS = np.array([list(bytes.fromhex(code)) for code in _INFERNO.split()])
_COLORS = np.stack([np.interp(np.arange(256) / 17, np.arange(16), channel) for channel in _ANCHORS.T], axis=1)
_COLORS = _COLORS.round().astype(np.uint8)  # (256, 3)
_STRIP = 1024  # rows that are drawn at a time: working copies of a whole large photo would take gigabytes
_LIGHT, _DARK = (255, 255, 255), (16, 16, 20)


@dataclass(frozen=True)
class Region:
    """One connected region of an anomaly map at or above the pixel threshold, in pixels of the image's own size."""

    box: tuple[int, int, int, int]  # (x0, y0, x1, y1), half-open: `image.crop(region.box)` is the region
    area_px: int
    area_fraction: float  # of the image
    peak: float  # largest map value
    peak_xy: tuple[int, int]  # of equal peaks (a saturated map) the one closest to the region's centroid
    mean: float  # of the map values


def region_threshold(image_threshold: float | None) -> float:
    """The pixel threshold that goes with an image threshold.

    The anomaly score is the mean of the 50 largest map values, so a map whose score reaches the threshold has values
    that reach it too: the same number is the largest pixel threshold at which every rejected image has a region (at
    the model's resolution). It is clipped to [0.01, 0.99]: below, outlines would follow differences too faint for an
    8-bit picture; above, as with the infinite threshold of a calibration on too few images, none would show.

    An uncalibrated model, with an `image_threshold` of None, gets 0.5.
    """
    if image_threshold is None:
        return DEFAULT_THRESHOLD
    if math.isnan(image_threshold):
        raise ValueError("image_threshold is NaN; pass a number, or None for an uncalibrated model")
    return min(max(float(image_threshold), 0.01), 0.99)


def overlay(
    image: Image.Image,
    anomaly_map: np.ndarray,
    *,
    threshold: float | None = None,
    opacity: float = 0.5,
    contour: bool = True,
    regions: Sequence[Region] = (),
    highlight: Region | None = None,
) -> Image.Image:
    """Lays the heat over the photo and outlines every region, so that it shows without relying on colour.

    The colour scale is centred on the threshold (0.5 without one): viewers decide on how far beyond it a value is. The
    opacity of the heat grows with the value from zero, so that normal areas stay the photo.

    Args:
        image: The photo, 8 bits a channel.
        anomaly_map: (H, W) in [0, 1], at the photo's size.
        threshold: Pixel threshold in [0, 1] (see `region_threshold`). None draws no outlines.
        opacity: Of the strongest heat, 0 (photo and outlines only) to 1.
        contour: Whether to outline the regions.
        regions: Regions to tag with their 1-based number. Pictures under 66 pixels have no room for tags.
        highlight: A region to frame.

    Returns:
        RGB image of the photo's size.
    """
    values = checked_map(anomaly_map)
    height, width = values.shape
    if image.size != (width, height):
        raise ValueError(f"anomaly_map is {width} x {height} pixels, but image is {image.width} x {image.height}")
    ramp = ((np.arange(256) / 255 - 0.2) / 0.7).clip(0, 1)  # nothing up to 0.4 of the threshold
    alpha = to_uint8(opacity * ramp**2 * (3 - 2 * ramp))
    result = image.copy() if image.mode == "RGB" else image.convert("RGB")
    for top in range(0, height, _STRIP):
        levels = _levels(values[top : top + _STRIP], threshold)
        heat = Image.fromarray(levels).convert("P")
        # Up to amber only: the scale's pale end, half transparent on a bright photo, would look weaker than orange.
        heat.putpalette(_COLORS[np.arange(256) * 4 // 5].tobytes())
        result.paste(heat.convert("RGB"), (0, top), Image.fromarray(alpha[levels]))

    if contour and threshold is not None:
        _draw_contours(result, _label_regions(values, threshold) > 0)
    if highlight is not None:
        _draw_frame(result, highlight.box)
    for number, region in enumerate(regions, start=1):
        _draw_tag(result, str(number), region.box)
    return result


def heat_map(anomaly_map: np.ndarray, threshold: float | None = None) -> Image.Image:
    """The map alone, as an RGB picture, in colours that are centred on the threshold as in `overlay`."""
    return Image.fromarray(_COLORS[_levels(checked_map(anomaly_map), threshold)])


def mask_image(anomaly_map: np.ndarray, threshold: float) -> Image.Image:
    """The regions as a picture of mode "L": 255 in a region, 0 elsewhere."""
    return Image.fromarray(_label_regions(checked_map(anomaly_map), threshold) > 0).convert("L")


def anomaly_map_16bit(anomaly_map: np.ndarray) -> Image.Image:
    """The map for other software, with 1 as 65535, of mode "I;16": save it as PNG or TIFF, which keep 16 bits."""
    return Image.fromarray((checked_map(anomaly_map) * 65535).round().astype(np.uint16))


def find_regions(anomaly_map: np.ndarray, threshold: float) -> list[Region]:
    """Lists the 8-connected regions at or above the pixel threshold, strongest first.

    Regions smaller than 1 in 65,536 of the image are left out: less than one pixel of a 256-pixel model is an artefact
    of enlarging the map. Peaks are compared to three decimals, as people read them (otherwise a speck at 0.99999 would
    precede a large region at 0.99998); equal ones are ordered by falling area, then top to bottom.
    """
    values = checked_map(anomaly_map)
    labels = _label_regions(values, threshold)
    regions = []
    for number, box in enumerate(ndimage.find_objects(labels), start=1):
        if box is None:  # a speck
            continue
        inside, strength = labels[box] == number, values[box]
        ys, xs = np.nonzero(inside)
        peak = strength[inside].max()
        from_centroid = (ys - ys.mean()) ** 2 + (xs - xs.mean()) ** 2
        nearest = np.where(strength[inside] == peak, from_centroid, np.inf).argmin()
        y0, x0 = box[0].start, box[1].start
        regions.append(
            Region(
                box=(x0, y0, box[1].stop, box[0].stop),
                area_px=len(ys),
                area_fraction=len(ys) / values.size,
                peak=float(peak),
                peak_xy=(int(x0 + xs[nearest]), int(y0 + ys[nearest])),
                mean=float(strength[inside].mean(dtype=np.float64)),
            )
        )
    return sorted(regions, key=lambda r: (-round(r.peak, 3), -r.area_px, r.box[1], r.box[0]))


def location_words(region: Region, size: tuple[int, int]) -> str:
    """Says where a region lies in an image of that `(width, height)`: "upper left", "left", "centre", …, by the third
    of the image its box is centred in, or "most of the image" for a box over 80 % of both width and height."""
    (x0, y0, x1, y1), (width, height) = region.box, size
    if x1 - x0 > 0.8 * width and y1 - y0 > 0.8 * height:
        return "most of the image"
    column = ("left", "centre", "right")[min(int(1.5 * (x0 + x1) / width), 2)]
    row = ("upper", "", "lower")[min(int(1.5 * (y0 + y1) / height), 2)]
    return f"{row} {column}".strip()


def region_words(number: int, region: Region, size: tuple[int, int]) -> str:
    """A region of an image of that `(width, height)`, with its number in the picture: where, how large, how strong."""
    x0, y0, x1, y1 = region.box
    return f"{number} · {location_words(region, size)}, {x1 - x0} × {y1 - y0} px, strength {region.peak:.2f}"


def side_by_side(images: Sequence[Image.Image], height: int = 256, gap: int = 8) -> Image.Image:
    """Puts RGB pictures of any sizes in a row, each scaled to the same height, with white gaps between them."""
    scaled = [image.resize((max(1, round(image.width * height / image.height)), height)) for image in images]
    row = Image.new("RGB", (sum(image.width for image in scaled) + gap * (len(scaled) - 1), height), "white")
    x = 0
    for image in scaled:
        row.paste(image, (x, 0))
        x += image.width + gap
    return row


def save_image(image: Image.Image, path: str | os.PathLike) -> Path:
    """Saves an image atomically, a PNG with a note of who wrote it; safe with concurrent writers.

    Args:
        image: Any PIL image; "I;16" keeps its 16 bits as PNG or TIFF.
        path: The suffix decides the format; missing folders are made, an existing file is replaced.

    Raises:
        ValueError: If the suffix is no picture format, or the format cannot hold the image's mode.
        OSError: If the folder cannot be made or written.
    """
    path = Path(path)
    image_format = Image.registered_extensions().get(path.suffix.lower())
    if image_format not in Image.SAVE:
        raise ValueError(f"cannot write {path}: {path.suffix or 'no suffix'!r} is not a picture format; use .png")
    # Encoded first: an OSError of the encoder is the picture's fault, not the folder's.
    encoded = io.BytesIO()
    try:
        image.save(encoded, format=image_format, **({"pnginfo": _png_info()} if image_format == "PNG" else {}))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"cannot write {path}: {error}") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.write_bytes(encoded.getbuffer())
    return path


def _png_info() -> PngInfo:
    info = PngInfo()
    info.add_text("Software", WRITER)
    return info


def is_own_picture(path: Path, name: str | None = None) -> bool:
    """Whether an inspection or evaluation wrote this file, of which `name` is what it was called where it lay before;
    another picture with such a name is none of its own."""
    if not _OWN_NAME.search(name or path.name):
        return False
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return image.info.get("Software") == WRITER
    except Exception:  # decoders raise whatever they stumble over
        return False


def checked_map(anomaly_map: np.ndarray) -> np.ndarray:
    """The map in float32; raises a ValueError if it is none."""
    values = np.asarray(anomaly_map, dtype=np.float32)
    # NaN is in no range.
    if values.ndim != 2 or not values.size or not (np.abs(values - 0.5) <= 0.501).all():
        raise ValueError(
            f"anomaly_map must be a non-empty (height, width) array of numbers in [0, 1], got shape {values.shape}"
            + (f" with values from {values.min():g} to {values.max():g}" if values.size else "")
        )
    return values.clip(0, 1)


def _levels(values: np.ndarray, threshold: float | None) -> np.ndarray:
    """Levels of the colour scale, uint8; the threshold (0.5 without one) is its middle."""
    return to_uint8(np.interp(values, (0, DEFAULT_THRESHOLD if threshold is None else threshold, 1), (0, 0.5, 1)))


def _label_regions(values: np.ndarray, threshold: float) -> np.ndarray:
    """(H, W) labels of the 8-connected regions that are large enough (their numbers may have gaps), 0 elsewhere."""
    labels, _ = ndimage.label(values >= threshold, structure=np.ones((3, 3)))
    specks = np.bincount(labels.ravel()) < values.size // 65536
    if specks.any():
        labels[specks[labels]] = 0
    return labels


def _line_width(size: tuple[int, int]) -> int:
    """Pixels per tone of an outline: 1 up to 450 x 450, 16 at 6000 x 4000; by area, so that it fits strips."""
    return max(1, round(math.sqrt(size[0] * size[1]) / 300))


def _draw_contours(picture: Image.Image, mask: np.ndarray) -> None:
    """Outlines the mask outside its edge, in place: a light line, then a dark one, so that one shows on any ground.

    If a region touches the picture's border, the lines follow the border on the inside, so that the outline is closed.
    """
    width = _line_width(picture.size)
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return
    margin = 2 * width + 1
    y0, y1 = max(rows[0] - margin, 0), min(rows[-1] + margin + 1, mask.shape[0])
    x0, x1 = max(columns[0] - margin, 0), min(columns[-1] + margin + 1, mask.shape[1])
    from_y, from_x = (np.minimum(np.arange(n), np.arange(n)[::-1]) for n in mask.shape)
    for top in range(y0, y1, _STRIP):
        bottom = min(top + _STRIP, y1)
        first, last = max(top - margin, 0), bottom + margin  # beyond, nothing reaches into the strip
        inner = mask[first:last, x0:x1]
        if not inner.any():
            continue
        distance = ndimage.distance_transform_edt(~inner)
        light = ~inner & (distance <= width + 0.5)
        dark = ~inner & ~light & (distance <= 2 * width + 0.5)
        if min(mask.shape) > 8 * width:  # narrower pictures would be all line
            depth = np.minimum(from_y[first:last, None], from_x[x0:x1])
            dark |= inner & (depth < width)
            light |= inner & (depth >= width) & (depth < 2 * width)
        for line, color in ((dark, _DARK), (light, _LIGHT)):
            picture.paste(color, (int(x0), int(top)), Image.fromarray(line[top - first : bottom - first]))


def _draw_frame(picture: Image.Image, box: tuple[int, int, int, int]) -> None:
    """Frames a region in place: a light rectangle between two dark ones, clear of the region's outline."""
    width = _line_width(picture.size)
    gap = 5 * width
    x0, y0 = max(box[0] - gap, 0), max(box[1] - gap, 0)
    x1, y1 = min(box[2] + gap, picture.width) - 1, min(box[3] + gap, picture.height) - 1
    draw = ImageDraw.Draw(picture)
    for inset, color in ((0, _DARK), (width, _LIGHT), (2 * width, _DARK)):
        if x1 - x0 >= 2 * inset and y1 - y0 >= 2 * inset:
            draw.rectangle((x0 + inset, y0 + inset, x1 - inset, y1 - inset), outline=color, width=width)


def _draw_tag(picture: Image.Image, text: str, box: tuple[int, int, int, int]) -> None:
    """Writes a region's number in place, light on dark, off the upper left corner of its box where there is room."""
    font: Any = ImageFont.load_default(max(7 * _line_width(picture.size), 11))
    if min(picture.size) < 6 * font.size:  # the tag would hide what it names
        return
    left, top, right, bottom = font.getbbox(text)
    pad = max(round(font.size / 4), 3)
    tag_width, tag_height = right - left + 2 * pad, bottom - top + 2 * pad
    x = min(max(box[0] - tag_width, 0), max(picture.width - tag_width, 0))
    y = min(max(box[1] - tag_height, 0), max(picture.height - tag_height, 0))
    draw = ImageDraw.Draw(picture)
    draw.rectangle((x, y, x + tag_width - 1, y + tag_height - 1), fill=_DARK, outline=_LIGHT)
    draw.text((x + pad - left, y + pad - top), text, font=font, fill=_LIGHT)
