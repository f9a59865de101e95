"""Pieces of the page in HTML: the compared pictures, their regions, the scale of scores, products and batch tables."""

import html
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

import numpy as np

from ..verdicts_diffusionad import ANOMALOUS, NORMAL, UNDECIDED
from ..visualization import region_words
from .models import Calibration, Product
from .reports import Row
from .views import Result, View

KINDS = {ANOMALOUS: "bad", NORMAL: "good", UNDECIDED: "undecided"}
_BINS = 50

# Frames a region's place in the picture of the same tab, and lets it go at the next press.
_FRAME = (
    "const tab=this.closest('[role=tabpanel]'),all=[...tab.querySelectorAll('.regions button')],"
    "on=this.ariaPressed!=='true';all.forEach(b=>b.ariaPressed=b===this&&on);"
    "tab.querySelectorAll('.frame').forEach((f,i)=>f.hidden=!(on&&all[i]===this))"
)
_SLIDE = "this.closest('.block').style.setProperty('--at',this.value+'%')"
# A new photo: the line goes where it belongs there. (Pictures are also loaded before they are on the page.)
_REST = (
    "const b=this.closest('.block'),r=b?.querySelector('[type=range]');b?.style.removeProperty('--at');"
    "if(r)r.value=r.getAttribute('value')"
)
# Sorts the rows of a table by a column, at the next press the other way round.
_SORT = (
    "const i=this.closest('th').cellIndex,h=this.closest('th'),t=h.closest('table'),down=h.ariaSort==='ascending',"
    "key=r=>r.cells[i].dataset.key??r.cells[i].textContent,n=(a,b)=>isNaN(a)||isNaN(b)||a===''||b===''?"
    "a.localeCompare(b,undefined,{numeric:true}):a-b;for(const o of h.parentNode.cells)o.ariaSort=null;"
    "h.ariaSort=down?'descending':'ascending';"
    "t.tBodies[0].append(...[...t.tBodies[0].rows].sort((a,b)=>(down?-1:1)*n(key(a),key(b))))"
)


def address(served: str) -> str:
    """Where the browser finds a served file, relative to the page."""
    return f"gradio_api/file={quote(Path(served).as_posix())}"


def compare(result: Result, view: View, photo: str, overlay: str) -> str:
    """The photo and, over it, the anomaly map, with a line between them that can be moved.

    The map is on the side of what is most suspicious, and at rest the line lies just beside that.

    Args:
        result: What was inspected.
        view: How it is drawn.
        photo: The address of the photo.
        overlay: The address of the anomaly map.
    """
    width, height = result.size
    peak = round(100 * view.strongest)
    side, rest = ("left", min(max(peak + 22, 50), 82)) if peak < 50 else ("right", max(min(peak - 22, 50), 18))
    count = f"{len(view.regions)} region{'s' * (len(view.regions) != 1)}"
    frames = "".join(
        f'<i class="frame" style="left:{100 * x0 / width:.2f}%;top:{100 * y0 / height:.2f}%;'
        f'width:{100 * (x1 - x0) / width:.2f}%;height:{100 * (y1 - y0) / height:.2f}%" hidden></i>'
        for x0, y0, x1, y1 in (region.box for region in view.regions)
    )
    return (
        f'<div class="compare {side}" style="--rest:{rest}%;--ratio:{width / height:.4f}">'
        f'<img src="{photo}" alt="{html.escape(result.name)}" onload="{_REST}">'
        f'<div class="over"><img src="{overlay}" alt="Its anomaly map, {count} outlined"></div>{frames}'
        '<span class="of-photo">Photo</span><span class="of-map">Anomaly map</span>'
        f'<input type="range" min="0" max="100" value="{rest}" oninput="{_SLIDE}" '
        'aria-label="Line between photo and anomaly map"></div>'
    )


def region_list(result: Result, view: View, overlay: str) -> str:
    """The regions, each with its cutting of the anomaly map; a press frames it in the picture."""
    width, height = result.size
    items = ""
    for number, region in enumerate(view.regions, 1):
        x0, y0, x1, y1 = region.box
        side = min(max(1.5 * max(x1 - x0, y1 - y0), 0.15 * min(width, height)), min(width, height))
        left = min(max((x0 + x1 - side) / 2, 0), width - side)
        top = min(max((y0 + y1 - side) / 2, 0), height - side)
        cutting = (
            f"background:url({overlay}) {-left / side * 100:.1f}cqw {-top / side * 100:.1f}cqw/"
            f"{width / side * 100:.1f}cqw {height / side * 100:.1f}cqw"
        )
        place, _, rest = region_words(number, region, result.size).partition(", ")
        items += (
            f'<li><button type="button" aria-pressed="false" onclick="{_FRAME}"><i><b style="{cutting}"></b></i>'
            f"<span><strong>{place}</strong>{rest}</span></button></li>"
        )
    return f'<h3>Regions</h3><ol class="regions">{items}</ol>' if items else ""


def score_scale(result: Result, calibration: Calibration) -> str:
    """The scores of the normal photos and the one of this photo, over which the threshold is moved."""
    threshold = calibration.shown_threshold
    counts, _ = np.histogram(calibration.scores, _BINS, (0, 1))
    passing, _ = np.histogram([value for value in calibration.scores if value <= threshold], _BINS, (0, 1))
    bars = ""
    for i in counts.nonzero()[0]:
        top = 100.0
        # One upon the other, as the threshold may lie within a bar.
        for kind, count in (("within", passing[i]), ("beyond", counts[i] - passing[i])):
            if count:
                share = max(8, 100 * count / counts.max())
                top -= share
                bars += f'<rect class="{kind}" x="{i}" width="0.9" y="{top:.1f}" height="{share:.1f}"/>'
    score = min(max(result.score, 0), 1)
    words = "No normal photos to compare with."
    if total := len(calibration.scores):
        rejected = sum(value > threshold for value in calibration.scores)
        whose = "of your normal photos" if calibration.yours else "normal photos used for calibration"
        words = f"At {threshold:.3f}, {rejected} of the {total} {whose} would be called anomalous."
    return (
        f'<div class="scale" style="--score:{100 * score:.1f}%;--threshold:{100 * threshold:.1f}%">'
        f'<svg viewBox="0 0 {_BINS} 100" preserveAspectRatio="none" aria-hidden="true">{bars}</svg>'
        f'<b class="{"late" if score > 0.7 else "early"}">this photo {result.score:.3f}</b></div><p>{words}</p>'
    )


def product_words(product: Product) -> str:
    return f"{product.title}\n{product.facts[:1].upper()}{product.facts[1:]}"


def pictures_css(pictures: Sequence[Sequence[str]]) -> str:
    """Puts pictures on the products and on their examples: the addresses of each product's pictures."""
    rules = ""
    for i, shown in enumerate(pictures):
        if shown:
            rules += f"#category label:nth-of-type({i + 1})::before{{background-image:url({shown[0]})!important}}"
        for j, picture in enumerate(shown, 1):
            rules += f"#examples-{i} button:nth-of-type({j})::before{{background-image:url({picture})}}"
    return f"<style>{rules}</style>"


def batch_table(rows: Sequence[Row]) -> str:
    """The rows of a batch, which can be sorted and filtered, and opened with the `data-row` they carry."""
    names = ("File", "Verdict", "Score", "Where", "Note")
    head = "".join(f'<th scope="col"><button type="button" onclick="{_SORT}">{name}</button></th>' for name in names)
    body = ""
    for row in rows:
        name, verdict, score, _, _, where, note = (html.escape(cell) for cell in row.cells)
        kind = KINDS.get(row.cells[1], "error")
        opens = f'<button type="button" data-row="{row.folder}">{name}</button>' if row.pictures else name
        bar = f'<meter min="0" max="1" value="{score}" aria-hidden="true"></meter>' if score else ""
        body += (
            f'<tr class="{kind}"><td>{opens}</td><td><b>{verdict}</b></td>'
            f'<td data-key="{score or -1}">{score[:5]}{bar}</td><td>{where}</td><td>{note}</td></tr>'
        )
    return (
        f'<div class="rows" tabindex="0" role="region" aria-label="Inspected photos"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )
