"""Looks at the photos before a training: what is wrong with them, and what they show."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.cluster import KMeans
from sklearn.metrics import silhouette_score
from sklearn.neighbors import NearestNeighbors

from ..data import add_normal, check_images, load_category
from ..familiarity_diffusionad import pixel_digest
from ..files import shorten
from ..images_diffusionad import load_image, resize_image, to_uint8
from ..modeling_perceptual_segmenter import PerceptualSegmenter
from ..visualization import save_image
from .arguments import TrainingConfig
from .dataset import NormalImages, TableImages, spread
from .feedback import Feedback, read_feedback
from .images import find_foregrounds_of, fit_size, in_threads, shown_size

# Thumbnails of one photo that was resized or stored anew differ by at most this share of the usual distance from one
# photo to the most similar other one, or by half a level. Measured on five real products: 0.02 to 0.26 at half the
# size and a JPEG quality of 50; other photos 0.47 and more.
_SAME_SHOT, _SAME_LEVELS = 0.3, 0.5
_THUMBNAIL = 32
# Two kinds of photos: the silhouette of two clusters. Five real products by themselves had 0.08 to 0.41 (rolls of a
# fabric), two of them mixed 0.52 and more.
_TWO_KINDS = 0.47
_FEWEST, _MOST = 6, 100
_SHEET_SIDE, _SHEET_COLUMNS = 160, 6


@dataclass
class Photos:
    """
    The photos of a training.

    Args:
        normal: Those to train on or hold out, each once, with foregrounds.
        kind: `"object"` or `"texture"`.
        test: Table of test images (see `data`), perhaps empty.
        notes: What was seen, a line each.
        kinds: Rows of the normal photos by kind, if they seem to be of two.
        feedback: What people marked.
    """

    normal: NormalImages
    kind: str
    test: Any
    notes: list[str] = field(default_factory=list)
    kinds: tuple[list[int], list[int]] | None = None
    feedback: Feedback = Feedback()

    @property
    def names(self) -> list[str]:
        return _short(self.normal.images)


def look(args: TrainingConfig) -> Photos:
    """
    Reads every photo once.

    Raises:
        ValueError: If they cannot be trained on: there are none, all are the same, or too many are damaged.
    """
    data = load_category(args.data_dir, args.category)
    feedback = Feedback() if args.feedback is None else read_feedback(args.feedback, args.data_dir)
    table, test = _apply(feedback, data["train"], data["test"])
    usable, damaged = check_images(table, args.value_range)
    images = TableImages(usable)
    normal = NormalImages(images, fit_size(args, images), value_range=args.value_range)
    thumbnails, digests = [], []
    for digest, thumbnail in in_threads(partial(_read, normal), range(len(images))):
        digests.append(digest)
        thumbnails.append(thumbnail)
    notes = [f"{len(table)} photos, {_sizes(images)}."]
    notes += [f"Left out, damaged: {reason}" for reason in damaged]
    # Otherwise one of them might be held out to calibrate on while the other is trained on.
    first = {digest: row for row, digest in reversed(list(enumerate(digests)))}
    rows = sorted(first.values())
    if len(rows) == 1 < len(digests):
        raise ValueError(
            f"all {len(digests)} photos of {args.data_dir} are the same picture: give photos of different pieces."
        )
    if len(rows) < len(digests):
        names = _short(images)
        copies = [
            f"{names[row]} = {names[first[digest]]}" for row, digest in enumerate(digests) if first[digest] != row
        ]
        notes.append(f"Left out, {len(copies)} duplicate(s): {shorten(copies)}.")
        normal = normal.only(rows, TableImages(usable.select(rows)))
    photos = Photos(normal, "", test, notes, feedback=feedback)
    notes += _feedback_notes(photos, len(data["test"]))
    notes += _near_duplicates(photos, np.stack([thumbnails[row] for row in rows]))
    photos.kinds = _two_kinds(normal)
    photos.kind = find_foregrounds_of(normal, args)
    share = "" if normal.foregrounds is None else f" that fills {_share(normal):.0%} of the picture"
    notes.append(f"Treated as photos of {'an object' + share if photos.kind == 'object' else 'a texture'}.")
    return photos


def save_kinds(photos: Photos, path: Path) -> str:
    """Draws some photos of either kind, a block each, and returns what is to be said."""
    blocks = [rows[: 3 * _SHEET_COLUMNS] for rows in photos.kinds or ()]
    lines = [-(-len(rows) // _SHEET_COLUMNS) for rows in blocks]
    gap, side = 24, _SHEET_SIDE
    sheet = Image.new("RGB", (_SHEET_COLUMNS * side, sum(lines) * side + gap), "white")
    top = 0
    for rows, height in zip(blocks, lines, strict=True):
        for i, row in enumerate(rows):
            picture = Image.fromarray(to_uint8(photos.normal.pixels(row)).permute(1, 2, 0).numpy())
            sheet.paste(picture.resize((side, side)), (i % _SHEET_COLUMNS * side, top + i // _SHEET_COLUMNS * side))
        top += height * side + gap
    save_image(sheet, path)
    counts = [len(rows) for rows in photos.kinds or ()]
    names = [photos.names[row] for row in (photos.kinds or ([], []))[1]]
    return (
        f"These photos look like two different products, {counts[0]} and {counts[1]} ({shorten(names, 3)}), see "
        f"{path}: train a model for each, unless both are meant."
    )


def _short(images: Any) -> list[str]:
    """The names of the photos, each with its folder's."""
    return ["/".join(Path(str(name)).parts[-2:]) for name in images.names]


def _read(normal: NormalImages, row: int) -> tuple[str, np.ndarray]:
    pixels = normal.pixels(row)
    return pixel_digest(pixels), _thumbnail(pixels)


def _thumbnail(pixels: torch.Tensor) -> np.ndarray:
    """Grey levels from 0 to 255, `(1024,)`."""
    grey = pixels.mean(0, keepdim=True)[None] * 255
    return F.interpolate(grey, size=(_THUMBNAIL, _THUMBNAIL), mode="bilinear", antialias=True).flatten().numpy()


def _apply(feedback: Feedback, train: Any, test: Any) -> tuple[Any, Any]:
    """Adds photos confirmed as normal, which are no test images then, and takes those marked as defects out."""
    fine, defects = set(feedback.fine), set(feedback.defects)
    if not fine and not defects:
        return train, test

    def without(table: Any, left_out: set[Path]) -> tuple[Any, set[Path]]:
        paths = [Path(str(name)).resolve() for name in TableImages(table).names] if len(table) else []
        kept = [row for row, path in enumerate(paths) if path not in left_out]
        return table.select(kept), set(paths)

    test, _ = without(test, fine)
    train, there = without(train, defects)
    return add_normal(train, [str(path) for path in feedback.fine if path not in there]), test


def _feedback_notes(photos: Photos, tests: int) -> list[str]:
    feedback = photos.feedback
    if not feedback.fine and not feedback.defects:
        return []
    note = f"Feedback: {len(feedback.fine)} photo(s) confirmed as fine are learnt from"
    if moved := tests - len(photos.test):
        note += f", {moved} of them no longer test images"
    return [f"{note}; {len(feedback.defects)} marked as defects only measure."]


def _sizes(images: TableImages) -> str:
    shapes = [shown_size(images[row]) for row in range(len(images))]
    small, large = min(shapes, key=np.prod), max(shapes, key=np.prod)
    text = f"{small[0]} x {small[1]} px" + ("" if small == large else f" to {large[0]} x {large[1]} px")
    ratios = np.log([width / height for width, height in shapes])
    odd = np.flatnonzero(np.abs(ratios - np.median(ratios)) > np.log(1.1))
    if len(odd):
        text += f"; {len(odd)} of another shape than the others are squashed to theirs: "
        text += shorten(_short(images)[row] for row in odd)
    return text


def _near_duplicates(photos: Photos, thumbnails: np.ndarray) -> list[str]:
    """What to say of photos that are shots of the same moment as others."""
    if len(thumbnails) < 3:
        return []
    names = photos.names
    neighbours = NearestNeighbors(n_neighbors=1).fit(thumbnails)
    scale = _THUMBNAIL  # from a sum over pixels to a root mean square
    own, _ = neighbours.kneighbors()
    limit = max(_SAME_SHOT * float(np.median(own)) / scale, _SAME_LEVELS)
    notes = []
    if alike := [names[row] for row in np.flatnonzero(own[:, 0] / scale < limit)]:
        notes.append(
            f"{len(alike)} photos are almost the same as another one, so they count for less: {shorten(alike)}."
        )
    test = TableImages(photos.test)
    tested = spread(len(test), 5 * _MOST) if len(test) else []

    def read(row: int) -> np.ndarray | None:
        try:
            return _thumbnail(resize_image(load_image(test[row]), photos.normal.size).float())
        except (OSError, ValueError):  # named where test images are checked
            return None

    shots = [(row, shot) for row, shot in zip(tested, in_threads(read, tested), strict=True) if shot is not None]
    if shots:
        distances, nearest = neighbours.kneighbors(np.stack([shot for _, shot in shots]))
        pairs = [
            f"{_short(test)[row]} = {names[near]}"
            for (row, _), near, distance in zip(shots, nearest[:, 0], distances[:, 0] / scale, strict=True)
            if distance < limit
        ]
        if pairs:
            notes.append(
                f"{len(pairs)} test image(s) are almost the same as a photo that is learnt from, so results on them "
                f"look better than they are: {shorten(pairs)}."
            )
    return notes


def _two_kinds(normal: NormalImages) -> tuple[list[int], list[int]] | None:
    """The rows of two kinds of photos, the smaller kind last; of some of the photos, if there are many."""
    rows = spread(len(normal), _MOST)
    if len(rows) < _FEWEST:
        return None
    encoder = PerceptualSegmenter().load_encoder().backbone.eval()
    features = []
    for row in rows:
        pixels = F.interpolate(normal.pixels(row)[None], size=(128, 128), mode="bilinear", antialias=True)
        with torch.no_grad():
            features.append(torch.cat([level.mean((2, 3))[0] for level in encoder(pixels)]).numpy())
    described = np.stack(features)
    if np.ptp(described, axis=0).max() < 1e-6:
        return None
    labels = KMeans(2, n_init=4, random_state=0).fit(described).labels_
    if silhouette_score(described, labels) < _TWO_KINDS:
        return None
    groups = [[row for row, label in zip(rows, labels, strict=True) if label == which] for which in (0, 1)]
    large, small = sorted(groups, key=len, reverse=True)
    return large, small


def _share(normal: NormalImages) -> float:
    masks: Sequence[torch.Tensor] = normal.foregrounds
    return float(np.mean([masks[row].mean().item() for row in spread(len(masks), _MOST)]))
