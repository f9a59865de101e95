"""The report of a training: what it rests on and what it came to, for people who were not there."""

import csv
import re

from PIL import Image


def test_a_training_leaves_a_report_that_agrees_with_its_files(trained):
    page = (trained / "report.html").read_text(encoding="utf-8")
    steps = [row["step"] for row in csv.DictReader((trained / "training_curve.csv").open())]
    assert f"{steps[-1]} steps in " in page and "://" not in page
    for heading in ("Curve", "Scores", "What was learnt from", "Pictures"):
        assert f"<h2>{heading}</h2>" in page
    for fact in ("Device", "Preset", "Photos", "Steps", "Notes"):
        assert f"<dt>{fact}</dt>" in page
    # Three held-out photos, each as it is and, if one could be made, with a defect; of so few, all have their picture.
    names = re.findall(r'<td data-key="(held-out[^"]*)">', page)
    made = {f"held-out image {i}, with a synthetic defect" for i in (1, 2, 3)}
    plain = {"held-out image 1", "held-out image 2", "held-out image 3"}
    assert plain < set(names) <= plain | made and len(names) == len(set(names))
    assert all(len(address) < 40_100 for address in re.findall(r'src="([^"]*)"', page))
    assert page.count("<img") == page.count("<h2>") - 1 + len(names)
    assert Image.open(trained / "preview.png").width
