"""Reports: one HTML file with everything in it, to be opened from disk, sorted, printed on A4 and filed."""

import base64
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from PIL import Image

from .files import replace_file
from .verdicts_diffusionad import ANOMALOUS, NORMAL, UNDECIDED
from .version import __version__

MARKS = {ANOMALOUS: "✕", UNDECIDED: "?", NORMAL: "✓"}
NOT_INSPECTED = "not inspected"
_MOST_BYTES = 30_000  # of a picture; base64 makes 40 kB of them


@dataclass(frozen=True)
class Entry:
    """
    A row of a report, with its picture.

    Args:
        name: Of the photo; any text.
        verdict: A verdict's word, or `"not inspected"`.
        score, p_value: In [0, 1]; `None` if there is none.
        where: Where the regions lie, in words, strongest first.
        regions: All that is said of each region, below the picture.
        note: What else is to be said, such as why nothing is decided or the file was not read.
        picture: What [`embedded`] gave for the [`figure`] of the photo; empty without one.
    """

    name: str
    verdict: str
    score: float | None = None
    p_value: float | None = None
    where: Sequence[str] = ()
    regions: Sequence[str] = ()
    note: str = ""
    picture: str = ""


def embedded(picture: Image.Image) -> str:
    """A picture as a `data:` address of at most 40 kB, WebP: as good as that allows, and if need be smaller."""
    picture = picture.convert("RGB")
    for quality in (75, 50, 25, 0):
        encoded = io.BytesIO()
        picture.save(encoded, "WEBP", quality=quality, method=2)
        if encoded.tell() <= _MOST_BYTES:
            return f"data:image/webp;base64,{base64.b64encode(encoded.getbuffer()).decode()}"
    return embedded(picture.reduce(2))


def write_report(
    path: Path,
    title: str,
    entries: Sequence[Entry] = (),
    *,
    lead: str = "",
    facts: Mapping[str, Any] | None = None,
    sections: Sequence[tuple[str, str, str]] = (),
) -> None:
    """
    Writes a report.

    Args:
        path: The file, replaced if it exists; its folder is made.
        title, lead: Heading and first sentence.
        entries: The highest score comes first; what was not read, last.
        facts: A list of names and values under the title; time and software are added.
        sections: Heading, sentence and [`embedded`] picture of each section between the facts and the entries.

    Raises:
        OSError: If the file cannot be written.
    """
    readable = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = readable.from_string(Path(__file__).with_suffix(".html").read_text(encoding="utf-8"))
    ordered = sorted(entries, key=lambda entry: (entry.score is None, -(entry.score or 0), entry.name.lower()))
    counted = Counter(entry.verdict for entry in entries)
    about = {
        "Written": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "Software": f"diffusionad-hf {__version__}",
    }
    page = template.render(
        title=title,
        lead=lead,
        facts={**(facts or {}), **about},
        sections=sections,
        entries=ordered,
        counts={word: counted[word] for word in (*MARKS, NOT_INSPECTED) if counted[word]},
        marks=MARKS,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, page)
