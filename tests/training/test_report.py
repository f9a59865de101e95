"""The report of a training: what it rests on and what it came to, for people who were not there."""

import csv
import re

from PIL import Image


def test_a_training_leaves_a_report_that_agrees_with_its_files(trained):
    page = (trained / "report.html").read_text(encoding="utf-8")
    steps = [row["step"] for row in csv.DictReader((trained / "training_curve.csv").open())]
    assert f"{steps[-1]} steps in 0 minutes" in page and "://" not in page
    for heading in ("Curve", "Scores", "What was learnt from", "Pictures"):
        assert f"<h2>{heading}</h2>" in page
    for fact in ("Device", "Preset", "Photos", "Steps", "Notes"):
        assert f"<dt>{fact}</dt>" in page
    # Three held-out photos, each as it is and with a defect; all have their picture, the best ones as well.
    names = re.findall(r'<td data-key="(held-out[^"]*)">', page)
    assert len(names) == len(set(names)) == 6 and sum("synthetic" in name for name in names) == 3
    assert all(len(address) < 40_100 for address in re.findall(r'src="([^"]*)"', page))
    assert page.count("<img") == 3 + 6 + page.count("<h2>Worst test images")
    assert Image.open(trained / "preview.png").width
