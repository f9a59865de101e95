"""What visitors take away: JSON, reports, and the table and archive of a batch."""

import json
import math
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from ..files import replacing, short_name
from ..inspection.records import write_csv
from ..report import NOT_INSPECTED, Entry, embedded, write_report
from ..version import __version__ as VERSION
from ..visualization import Region, location_words, region_words
from .models import Calibration
from .views import Drawing, Result, p_words


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
        "note": result.note,
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


def _note(record: dict) -> str:
    """What is to be said of a photo beside its verdict."""
    return " ".join(filter(None, ("" if record["reason"] == "calibrated" else record["sentence"], record["note"])))


COLUMNS = ["File", "Verdict", "Score", "p-value", "Regions", "Where", "Note"]


@dataclass(frozen=True)
class Row:
    """One file of a batch: its record with its pictures by kind, or a record that says why there are none."""

    record: dict
    entry: Entry
    pictures: dict[str, Path] = field(default_factory=dict)

    @classmethod
    def of(cls, drawing: Drawing, figure: Image.Image, pictures: dict[str, Path] | None = None) -> "Row":
        regions, size = drawing.photo_regions, drawing.result.size
        record = result_json(drawing.result, drawing.calibration, regions)
        entry = Entry(
            name=record["name"],
            verdict=record["verdict"],
            score=record["anomaly_score"],
            p_value=record["p_value"],
            where=[region["place"] for region in record["regions"]],
            regions=[region_words(i, region, size) for i, region in enumerate(regions, 1)],
            note=_note(record),
            picture=embedded(figure),
        )
        return cls(record, entry, pictures or {})

    @classmethod
    def refused(cls, name: str, reason: str) -> "Row":
        reason = reason[:1].upper() + reason[1:]
        return cls({"name": name, "error": reason}, Entry(name, NOT_INSPECTED, note=reason))

    @property
    def folder(self) -> str:
        """The name of its pictures' folder in that of the batch."""
        return self.pictures["overlay"].parent.name

    @property
    def cells(self) -> list[str]:
        record = self.record
        if "error" in record:
            return [record["name"], "Not inspected", "", "", "", "", record["error"]]
        return [
            record["name"],
            record["verdict"],
            f"{record['anomaly_score']:.4f}",
            "" if record["p_value"] is None else f"{record['p_value']:.4f}",
            str(len(record["regions"])),
            ", ".join(dict.fromkeys(region["place"] for region in record["regions"])),
            _note(record),
        ]


def sort_rows(rows: Sequence[Row]) -> list[Row]:
    """The highest score first; files that could not be inspected last."""
    return sorted(rows, key=lambda row: (-row.record.get("anomaly_score", -1), row.record["name"].lower()))


def write_table(rows: Sequence[Row], threshold: float | None, path: Path) -> None:
    """Writes the rows as CSV, in the encoding that Excel recognises."""
    shown = "" if threshold is None else f"{threshold:.6g}"
    write_csv(path, [*COLUMNS, "Threshold"], ([*row.cells, shown] for row in rows), encoding="utf-8-sig")


def write_single_report(path: Path, row: Row, title: str) -> None:
    """Writes the report of one photo."""
    record = row.record
    facts = {
        "Photo": f"{record['name']}, {record['width']} × {record['height']} px",
        "Category": record["category"],
        "Score": f"{record['anomaly_score']:.4f}",
        "Threshold": "none" if record["threshold"] is None else f"{record['threshold']:.4f}",
    }
    p_value = record["p_value"]
    notes = [record["sentence"]] + ([] if p_value is None else [p_words(p_value, record["calibration_images"])])
    write_report(path, title, [row.entry], lead=" ".join(notes), facts=facts)


def write_batch_report(rows: Sequence[Row], category: str, calibration: Calibration, path: Path) -> None:
    threshold = finite(calibration.threshold)
    facts = {"Category": category, "Threshold": "none" if threshold is None else f"{threshold:.4f}"}
    # What holds for every photo, whatever its score.
    write_report(path, "Inspection", [row.entry for row in rows], lead=calibration.verdict(0).sentence, facts=facts)


def write_archive(rows: Sequence[Row], files: Sequence[Path], path: Path) -> None:
    """Packs table and report, the records, and the pictures, named after their photos."""
    with replacing(path) as partial, zipfile.ZipFile(partial, "w") as bundle:
        for file in files:
            bundle.write(file, file.name, zipfile.ZIP_DEFLATED)
        records = json.dumps([row.record for row in rows], indent=2, ensure_ascii=False)
        bundle.writestr("results.json", records, zipfile.ZIP_DEFLATED)
        taken: set[str] = set()
        for row in rows:
            # `a.png` and `a.jpg` would share their pictures' names.
            stem = Path(row.record["name"]).stem
            stem = row.record["name"] if stem.lower() in taken else stem
            taken.add(stem.lower())
            for kind, picture in row.pictures.items():
                end = f"-{kind}{picture.suffix}"
                bundle.write(picture, f"{kind}s/{short_name(stem, len(end))}{end}")
