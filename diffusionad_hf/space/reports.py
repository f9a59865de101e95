"""What visitors take away: JSON, one report page, and the table and archive of a batch."""

import base64
import html
import json
import math
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

from ..files import replacing
from ..inspection.records import write_csv
from ..version import __version__ as VERSION
from ..visualization import Region, location_words
from .models import Calibration
from .views import Result, View, headline, p_words, region_words


def finite(threshold: float | None) -> float | None:
    """A threshold for JSON and tables, which know no infinite numbers."""
    return threshold if threshold is not None and math.isfinite(threshold) else None


def result_json(result: Result, calibration: Calibration, regions: Sequence[Region]) -> dict:
    """A result for other software: scores and strengths in [0, 1], boxes half-open (x0, y0, x1, y1) in pixels."""
    verdict, strangeness = result.verdict(calibration), result.strangeness(calibration)
    return {
        "name": result.name,
        "category": result.category,
        "verdict": verdict.word,
        "reason": verdict.reason,
        "sentence": verdict.sentence,
        "is_anomalous": verdict.is_anomalous,
        "anomaly_score": result.score,
        "threshold": finite(calibration.threshold),
        "calibrated_threshold": finite(calibration.calibrated_threshold),
        "p_value": result.p_value(calibration),
        "calibration_images": len(calibration.scores),
        "strangeness": strangeness,
        "looks_unfamiliar": None if strangeness is None else strangeness > 1,
        "settings_changed": result.settings_changed,
        "width": result.size[0],
        "height": result.size[1],
        "regions": [
            {
                "box": list(region.box),
                "place": location_words(region, result.size),
                "area_px": region.area_px,
                "area_fraction": round(region.area_fraction, 6),
                "strength": round(region.peak, 4),
            }
            for region in regions
        ],
        "version": VERSION,
    }


def report_page(result: Result, calibration: Calibration, view: View, normal: Path) -> str:
    """One self-contained HTML page, to be printed or filed."""
    regions = "".join(
        f"<li>{html.escape(region_words(i, region, result.size))}</li>" for i, region in enumerate(view.regions, 1)
    )
    pictures = "".join(
        f'<figure><img alt="{title}" src="data:image/jpeg;base64,{base64.b64encode(path.read_bytes()).decode()}">'
        f"<figcaption>{title}</figcaption></figure>"
        for title, path in {
            "Photo": view.photo,
            "Anomaly map": view.overlay,
            "As it should look": normal,
        }.items()
    )
    verdict, p_value, threshold = (
        result.verdict(calibration),
        result.p_value(calibration),
        finite(calibration.threshold),
    )
    notes = [verdict.sentence] + ([] if p_value is None else [p_words(p_value, len(calibration.scores))])
    rows = {
        "Score": f"{result.score:.4f}",
        "Threshold": "none" if threshold is None else f"{threshold:.4f}",
        "Category": html.escape(result.category),
        "Photo": f"{result.size[0]} × {result.size[1]} px",
        "Time": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "Software": f"diffusionad-hf {VERSION}",
    }
    name = html.escape(result.name)
    listed = f"<ol>{regions}</ol>" if regions else "<p>None above the threshold.</p>"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{name}</title>
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; color: #17202a; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
h1 {{ font-size: 1.6rem; margin: 0 }} h2 {{ font-size: 1.1rem }}
dl {{ display: grid; grid-template-columns: 8rem 1fr; margin: 1rem 0 }}
ol {{ list-style: none; padding: 0 }}
dt {{ color: #566 }} dd {{ margin: 0 }} .pictures {{ display: grid; grid-template-columns: 1fr 1fr; gap: 1rem }}
figure {{ margin: 0; break-inside: avoid }} img {{ width: 100% }} figcaption {{ color: #566 }}
</style></head><body>
<h1>{html.escape(headline(verdict))}</h1><p>{name}</p><p>{html.escape(" ".join(notes))}</p>
<dl>{"".join(f"<dt>{key}</dt><dd>{value}</dd>" for key, value in rows.items())}</dl>
<div class="pictures">{pictures}</div>
<h2>Regions</h2>{listed}
</body></html>
"""


COLUMNS = ["File", "Verdict", "Score", "p-value", "Regions", "Note"]


@dataclass(frozen=True)
class Row:
    """One file of a batch: its record with its pictures by kind, or a record that says why there are none."""

    record: dict
    pictures: dict[str, Path] = field(default_factory=dict)

    @classmethod
    def refused(cls, name: str, reason: str) -> "Row":
        return cls({"name": name, "error": reason[:1].upper() + reason[1:]})

    @property
    def cells(self) -> list[str]:
        record = self.record
        if "error" in record:
            return [record["name"], "Not inspected", "", "", "", record["error"]]
        return [
            record["name"],
            record["verdict"],
            f"{record['anomaly_score']:.4f}",
            "" if record["p_value"] is None else f"{record['p_value']:.4f}",
            str(len(record["regions"])),
            "" if record["reason"] == "calibrated" else record["sentence"],
        ]


def sort_rows(rows: Sequence[Row]) -> list[Row]:
    """The highest score first; files that could not be inspected last."""
    return sorted(rows, key=lambda row: (-row.record.get("anomaly_score", -1), row.record["name"].lower()))


def write_table(rows: Sequence[Row], threshold: float | None, path: Path) -> None:
    """Writes the rows as CSV, in the encoding that Excel recognises."""
    shown = "" if threshold is None else f"{threshold:.6g}"
    write_csv(path, [*COLUMNS, "Threshold"], ([*row.cells, shown] for row in rows), encoding="utf-8-sig")


def write_archive(rows: Sequence[Row], table: Path, path: Path) -> None:
    """Packs the table, the records and the pictures, named after their photos."""
    with replacing(path) as partial, zipfile.ZipFile(partial, "w") as bundle:
        bundle.write(table, table.name, zipfile.ZIP_DEFLATED)
        records = json.dumps([row.record for row in rows], indent=2, ensure_ascii=False)
        bundle.writestr("results.json", records, zipfile.ZIP_DEFLATED)
        taken: set[str] = set()
        for row in rows:
            # `a.png` and `a.jpg` would share their pictures' names.
            stem = Path(row.record["name"]).stem
            stem = row.record["name"] if stem.lower() in taken else stem
            taken.add(stem.lower())
            for kind, picture in row.pictures.items():
                bundle.write(picture, f"{kind}s/{stem}-{kind}{picture.suffix}")
