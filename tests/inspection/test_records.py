"""Tables and reports: what spreadsheets and other software make of them."""

import csv
import json
import math

import pytest

from diffusionad_hf.inspection.records import Failure, Inspection, write_results, write_table


def inspection(file, score, threshold=0.5, **more):
    given = {"verdict": "normal", "reason": "calibrated", "sentence": "", "p_value": None, "is_familiar": None}
    given |= {"strangeness": None, "seconds": 0.1, "where": [], "regions": []}
    return Inspection(file, score, threshold, **given | more)


def test_a_threshold_that_no_score_exceeds_is_null_in_json_and_odd_names_are_kept(tmp_path):
    results = [inspection("odd-\udce9.png", 0.1, math.inf), Failure("b.png", "damaged")]
    write_results(tmp_path / "r.json", "model", results)
    written = json.loads((tmp_path / "r.json").read_text(), parse_constant=pytest.fail)
    assert written["images"][0]["threshold"] is None and written["images"][0]["file"] == "odd-\udce9.png"
    assert written["failures"] == [{"file": "b.png", "error": "damaged"}]


def test_the_table_counts_the_regions_and_shows_the_largest(tmp_path):
    areas = {(0, 0, 2, 2): 4, (5, 5, 8, 8): 9, (1, 4, 2, 5): 1}
    regions = [{"box": box, "area_px": area} for box, area in areas.items()]
    found = inspection("odd-\udce9.png", 0.9, where=["top left", "centre"], regions=regions)
    write_table(tmp_path / "r.csv", [found, Failure("b.png", "b.png: damaged")])
    with (tmp_path / "r.csv").open(newline="") as file:
        row, failed = csv.DictReader(file)
    assert row["regions"] == "3" and row["largest_box"] == "5 5 8 8" and row["where"] == "top left; centre"
    assert row["file"] == "odd-\\udce9.png" and row["p_value"] == "" and row["score"] == "0.9"
    assert failed["error"] == "b.png: damaged" and failed["score"] == ""


@pytest.mark.parametrize(
    "text, cell",
    [
        *((text, f"'{text}") for text in ("=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", " =1")),
        ("a;=1", "a;'=1"),
        ("a, -1.png", "a,' -1.png"),
        ('a\n"=1', "a\n'\"=1"),
        ("part-1+2@home=x.png", "part-1+2@home=x.png"),
    ],
)
def test_no_text_is_a_formula_and_every_field_is_quoted(text, cell, tmp_path):
    write_table(tmp_path / "new" / "r.csv", [Failure(text, "damaged"), inspection("a", -0.5)])
    raw = (tmp_path / "new" / "r.csv").read_bytes().decode()
    rows = list(csv.DictReader(raw.splitlines(True)))
    assert [(row["file"], row["score"]) for row in rows] == [(cell, ""), ("a", "-0.5")]
    assert all(line.startswith('"') for line in raw.splitlines() if "\n" not in text and "\r" not in text)
