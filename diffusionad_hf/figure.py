"""One picture that says it all: verdict, score and threshold; photo with outlines, anomaly map, how it should look."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from .images_diffusionad import to_uint8
from .pipeline_diffusionad import DiffusionADPipelineOutput
from .verdicts_diffusionad import ANOMALOUS, NORMAL, UNDECIDED, Verdict
from .visualization import DEFAULT_THRESHOLD, Region, checked_map, find_regions, heat_map, overlay, region_threshold

# Okabe and Ito's blue and vermilion, which all kinds of colour blindness tell apart; the marks' shapes, the words and
# the lightness of the bar (light below the threshold, dark above) say the same in grey.
_COLORS = {NORMAL: "#0072b2", ANOMALOUS: "#c24e00", UNDECIDED: "#6b6b6b"}
_BELOW, _ABOVE = "#a9d3ec", "#c24e00"
_GREY_BELOW, _GREY_ABOVE, _INK, _SOFT = "#d8d8d8", "#8c8c8c", "#17202a", "#55606b"
_PANEL = (350, 640)  # at most, of panels side by side; wide photos lie one below another
_WIDE = 1090
_GAP, _TEXT = 20, 15  # pixels
_MOST_REGIONS = 12
_CHECKED = 128  # px of the longest side
_FAITHFUL = 0.5
NOT_SHOWN = "How it should look is not shown: the reconstruction misses too much of what is normal in this photo."


def figure(
    image: Image.Image,
    anomaly_map: np.ndarray,
    verdict: Verdict,
    score: float,
    *,
    threshold: float | None = None,
    p_value: float | None = None,
    reconstruction: Image.Image | None = None,
    regions: Sequence[Region] = (),
) -> Image.Image:
    """
    Draws a result, readable in grey print and by colour-blind people.

    Args:
        image: The photo, of any size and shape.
        anomaly_map: `(H, W)` in [0, 1], of any size. Where it is reduced, the largest values stay.
        verdict: With its sentence.
        score: In [0, 1].
        threshold: What the score was compared with; `None`, or infinite, if nothing was.
        p_value: How often a normal photo scores this high, if that is known.
        reconstruction: Of the photo, of any size, for [`as_it_should_look`]. `None` has no panel.
        regions: In pixels of the photo, strongest first; outlined, and the first 12 numbered, unless
            the verdict is normal.

    Returns:
        RGB image, at most 1,130 px wide.

    Raises:
        ValueError: If the map is none, or the score is no number.
    """
    if not math.isfinite(score):
        raise ValueError(f"score={score}: must be a number.")
    threshold = threshold if threshold is not None and math.isfinite(threshold) else None
    pivot = region_threshold(threshold)
    wide = image.width > 2 * image.height
    scale = _WIDE / image.width if wide else min(_PANEL[0] / image.width, _PANEL[1] / image.height)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    photo = _fit(image, size)
    values = _fit_map(checked_map(anomaly_map), size)
    shown = [] if verdict.word == NORMAL else [_scaled(region, scale) for region in regions[:_MOST_REGIONS]]
    outlined = overlay(photo, values, threshold=pivot, opacity=0, contour=verdict.word != NORMAL, regions=shown)
    panels = [("Photo", outlined), ("Anomaly map", heat_map(values, pivot))]
    normal = None if reconstruction is None else as_it_should_look(photo, reconstruction, values, pivot)
    if normal is not None:
        panels.append(("As it should look", normal))

    column = max(size[0], 180)
    width = max((1 if wide else len(panels)) * (column + _GAP) + _GAP, 580)
    head = _Head(verdict, score, threshold, p_value, width - 2 * _GAP)
    foot = [] if normal is not None or reconstruction is None else _wrapped(NOT_SHOWN, _TEXT, width - 2 * _GAP)
    row = size[1] + 2 * _GAP + 12  # with its title
    top, scale_height = _GAP + head.height + 12, 34
    bottom = top + (len(panels) * row if wide else row) + scale_height
    picture = Image.new("RGB", (width, bottom + 21 * len(foot)), "white")
    draw = ImageDraw.Draw(picture)
    head.draw(draw, (_GAP, _GAP))
    _write(draw, (_GAP, bottom - _GAP // 2), foot)
    y = top
    for i, (title, panel) in enumerate(panels):
        x = _GAP if wide else _GAP + i * (column + _GAP)
        draw.text((x, y), title, font=_font(_TEXT), fill=_INK)
        picture.paste(panel, (x, y + _GAP + 4))
        below = y + _GAP + 4 + size[1] + 6
        y += row if wide else 0
        if title == "Anomaly map":
            length = min(column, _PANEL[0])
            picture.paste(heat_map(np.linspace(0, 1, length)[None].repeat(10, axis=0)), (x, below))
            mark = pivot if threshold is None else threshold
            _ticks(draw, x, below + 12, length, pivot, {0: "0", mark: f"{mark:.3g}", 1: "1"})
            y += scale_height if wide else 0
    return picture


def figure_of(image: Image.Image, output: DiffusionADPipelineOutput, row: int, threshold: float | None) -> Image.Image:
    """
    Draws what a pipeline said of a photo.

    Args:
        image: The photo.
        output: What `pipe([..., image, ...])` gave, as arrays.
        row: The photo's place in it.
        threshold: `pipe.threshold`.
    """
    verdict, anomaly_map = (output.verdict or [])[row], output.anomaly_map[row]
    threshold = threshold if threshold is not None and math.isfinite(threshold) else None
    return figure(
        image,
        anomaly_map,
        verdict,
        float(output.anomaly_score[row]),
        threshold=threshold,
        p_value=None if output.p_value is None else float(output.p_value[row]),
        reconstruction=Image.fromarray(to_uint8(output.reconstruction[row])),
        regions=[] if verdict.word == NORMAL else find_regions(anomaly_map, region_threshold(threshold)),
    )


def as_it_should_look(
    photo: Image.Image, reconstruction: Image.Image, anomaly_map: np.ndarray, threshold: float
) -> Image.Image | None:
    """
    The photo, with the suspected places as the model reconstructs them.

    Reconstructed as a whole, a photo loses what lies below the noise that the model sees it through, such as an
    engraving, and at its edge some of that noise stays. Neither is asked for where nothing is suspected. There, the
    photo tells whether the reconstruction is any good: of the photo's detail (lightness without what is smoother than
    3 px in a photo of 128 px), it has to explain half of the variance or more.

    Args:
        photo, reconstruction: RGB, of any sizes.
        anomaly_map: `(H, W)` in [0, 1], of any size.
        threshold: Of pixels. Suspected is what reaches it, with what reaches half of it around.

    Returns:
        RGB image of the photo's size; `None` if the reconstruction is not good enough, or hardly anything is known to
        be right.
    """
    scale = min(_CHECKED / max(photo.size), 1)
    size = (max(1, round(photo.width * scale)), max(1, round(photo.height * scale)))
    detail = []
    for picture in (photo, reconstruction):
        light = np.asarray(_fit(picture, size).convert("L"), np.float32)
        detail.append(light - ndimage.gaussian_filter(light, 3))
    known = _fit_map(anomaly_map, size) < threshold / 2
    missed, all_detail = (((detail[0] - other) ** 2)[known].sum() for other in (detail[1], 0))
    if known.mean() < 0.2 or missed > (1 - _FAITHFUL) * all_detail:
        return None
    values = _fit_map(anomaly_map, photo.size)
    suspected = ndimage.binary_propagation(values >= threshold, mask=values >= threshold / 2)
    reach = max(1, round(max(photo.size) / 64))  # beyond the edge of a defect, where the map has fallen already
    share = ndimage.gaussian_filter(ndimage.maximum_filter(suspected, 2 * reach + 1).astype(np.float32), reach / 2)
    return Image.composite(_fit(reconstruction, photo.size), photo.convert("RGB"), Image.fromarray(to_uint8(share)))


class _Head:
    """Mark, word, numbers, sentence and score bar of a verdict."""

    def __init__(self, verdict: Verdict, score: float, threshold: float | None, p_value: float | None, width: int):
        self.verdict, self.score, self.threshold, self.width = verdict, score, threshold, width
        self.numbers = f"score {score:.4f}"
        self.numbers += ", no threshold" if threshold is None else f", threshold {threshold:.4f}"
        self.numbers += "" if p_value is None else f", p = {p_value:.2g}"
        self.lines = _wrapped(verdict.sentence, _TEXT, width)
        self.height = 48 + 21 * len(self.lines) + 66

    def draw(self, draw: ImageDraw.ImageDraw, at: tuple[int, int]) -> None:
        x, y = at
        word = self.verdict.word
        _mark(draw, (x, y, x + 36, y + 36), word)
        draw.text(
            (x + 48, y + 1),
            word.capitalize(),
            font=_font(30),
            fill=_COLORS[word],
            stroke_width=1,
            stroke_fill=_COLORS[word],
        )
        draw.text((x + self.width, y + 12), self.numbers, font=_font(_TEXT), fill=_INK, anchor="ra")
        _write(draw, (x, y + 48), self.lines)
        y += 48 + 21 * len(self.lines) + 18
        # The scale is that of the anomaly map: the threshold is its middle.
        middle = DEFAULT_THRESHOLD if self.threshold is None else region_threshold(self.threshold)
        below, above = (_GREY_BELOW, _GREY_ABOVE) if word == UNDECIDED else (_BELOW, _ABOVE)
        draw.rectangle((x, y, x + self.width - 1, y + 13), fill=below)
        if self.threshold is not None:
            draw.rectangle((x + self.width // 2, y, x + self.width - 1, y + 13), fill=above)
        marked = {} if self.threshold is None else {self.threshold: f"threshold {self.threshold:.3g}"}
        _ticks(draw, x, y + 16, self.width, middle, {0: "0", **marked, 1: "1"})
        to = x + float(np.interp(self.score, (0, middle, 1), (0, 0.5, 1))) * (self.width - 1)
        draw.polygon([(to - 9, y - 12), (to + 9, y - 12), (to, y + 4)], fill=_INK, outline="white")


def _mark(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], word: str) -> None:
    """A tick in a disc, a cross in a square, or a question mark in a ring."""
    x, y, right, _ = box
    if word == ANOMALOUS:
        draw.rectangle(box, fill=_COLORS[word])
        draw.line((x + 10, y + 10, right - 10, y + 26), fill="white", width=5)
        draw.line((x + 10, y + 26, right - 10, y + 10), fill="white", width=5)
    elif word == NORMAL:
        draw.ellipse(box, fill=_COLORS[word])
        draw.line((x + 9, y + 19, x + 16, y + 26, x + 27, y + 11), fill="white", width=5, joint="curve")
    else:
        draw.ellipse(box, outline=_COLORS[word], width=4)
        draw.text((x + 18, y + 18), "?", font=_font(24), fill=_COLORS[word], anchor="mm", stroke_width=1)


def _ticks(draw: ImageDraw.ImageDraw, x: int, y: int, length: int, middle: float, ticks: dict[float, str]) -> None:
    for value, name in ticks.items():
        to = x + round(float(np.interp(value, (0, middle, 1), (0, 0.5, 1))) * (length - 1))
        draw.line((to, y - 2, to, y + 4), fill=_INK, width=1)
        draw.text(
            (to, y + 5), name, font=_font(13), fill=_SOFT, anchor="la" if value <= 0 else "ra" if value >= 1 else "ma"
        )


def _write(draw: ImageDraw.ImageDraw, at: tuple[int, int], lines: Sequence[str]) -> None:
    for i, line in enumerate(lines):
        draw.text((at[0], at[1] + 21 * i), line, font=_font(_TEXT), fill=_INK)


@lru_cache
def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def _wrapped(text: str, size: int, width: int) -> list[str]:
    """Lines of words, none longer than the width in px, if no word is."""
    lines: list[str] = []
    for word in text.split():
        if lines and _font(size).getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _fit(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    return picture.convert("RGB").resize(size, Image.Resampling.BICUBIC, reducing_gap=3)


def _fit_map(anomaly_map: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The map at a size (width, height): enlarged as the pipeline does it; reduced so that no defect vanishes."""
    values = torch.as_tensor(np.ascontiguousarray(anomaly_map), dtype=torch.float32)[None, None]
    shape = size[::-1]
    smaller = tuple(map(min, shape, values.shape[-2:]))
    return F.interpolate(F.adaptive_max_pool2d(values, smaller), shape, mode="bilinear")[0, 0].numpy()


def _scaled(region: Region, scale: float) -> Region:
    x0, y0, x1, y1 = region.box
    return replace(
        region, box=(math.floor(x0 * scale), math.floor(y0 * scale), math.ceil(x1 * scale), math.ceil(y1 * scale))
    )
