"""Reports open anywhere, say everything, and let no file name speak for them."""

import base64
import io
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from diffusionad_hf.report import NOT_INSPECTED, Entry, embedded, write_report

HOSTILE = "<script>alert(1)</script>\"' onload=x {{ 7 * 7 }}.png"


def noise(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def page(tmp_path):
    picture = embedded(noise(60, 40))
    entries = [
        Entry("b.png", "normal", 0.1, 0.5, picture=picture),
        Entry("bad.png", NOT_INSPECTED, note="bad.png: damaged"),
        Entry(HOSTILE, "anomalous", 0.9, 0.005, ["left", "right", "centre", "upper left"], picture=picture),
        Entry("ä\udce4.png", "undecided", 0.2, note="Unlike any normal image the model knows.", picture=picture),
    ]
    path = tmp_path / "new" / "report.html"
    write_report(path, "Inspection", entries, lead="Calibrated.", facts={"Model": HOSTILE})
    return path


@pytest.mark.parametrize("size", [(1, 1), (1130, 600), (2600, 2600)])
def test_no_picture_takes_more_than_40_kb_however_hard_it_is_to_compress(size):
    address = embedded(noise(*size))
    kind, content = address.split(",")
    assert kind == "data:image/webp;base64" and len(address) <= 40_100
    assert Image.open(io.BytesIO(base64.b64decode(content))).size[0] >= min(size[0], 100)


def test_a_report_holds_everything_the_highest_score_first_and_what_was_not_read_last(page):
    text = page.read_text(encoding="utf-8")
    order = [text.index(f">{score}<") for score in ("0.9000", "0.2000", "0.1000")] + [text.index(">bad.png<")]
    assert order == sorted(order)
    assert "bad.png: damaged" in text and "left, right, centre, 1 more" in text and "Unlike any" in text
    assert text.count("data:image/webp;base64,") == 3
    assert "//" not in re.sub(r"data:image/webp;base64,[^\"]*", "", text), "no address of anything"


def test_names_are_text_whatever_they_are(page):
    text = page.read_text(encoding="utf-8")
    assert text.count("<script") == 1 and "&lt;script&gt;alert(1)" in text and "onload=x" in text and "{{ 7" in text
    assert "\\udce4.png" in text


def test_an_empty_report_and_one_of_a_single_photo(tmp_path):
    for entries in ([], [Entry("a.png", "normal", 0.1, picture=embedded(noise(9, 9)), regions=["1 · centre"])]):
        write_report(tmp_path / "r.html", "Nothing", entries)
        text = (tmp_path / "r.html").read_text(encoding="utf-8")
        assert "<table" not in text and ("1 · centre" in text) == bool(entries)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs the browser chromium")
def test_in_a_browser_it_sorts_filters_prints_and_asks_for_nothing(page):
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    asked, errors = [], []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 390, "height": 800}, color_scheme="dark")
        tab.on("request", lambda r: asked.append(r.url))
        tab.on("console", lambda m: errors.append(m.text))
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.on("dialog", lambda dialog: errors.append(dialog.message))
        tab.goto(page.as_uri())

        def shown():
            return [cell.split(" ")[-1] for cell in tab.locator("#rows tr:visible td:nth-child(2)").all_inner_texts()]

        assert shown() == ["anomalous", "undecided", "normal", "inspected"]
        tab.get_by_role("button", name="Score").click()
        assert shown() == ["inspected", "normal", "undecided", "anomalous"]
        figures = tab.locator("#pictures figure").evaluate_all("all => all.map(one => one.dataset.verdict)")
        assert figures == ["normal", "undecided", "anomalous"]
        tab.get_by_role("button", name="File").click()
        tab.get_by_role("button", name="File").click()
        assert tab.locator("th[aria-sort=ascending]").inner_text().startswith("File")
        tab.locator("[data-show=normal]").click()
        assert len(shown()) == 3 and "normal" not in shown() and tab.locator("#pictures figure:visible").count() == 2
        assert tab.evaluate("document.documentElement.scrollWidth") == 390
        assert tab.pdf(prefer_css_page_size=True).startswith(b"%PDF")
        browser.close()
    assert [url for url in asked if not url.startswith("data:")] == [page.as_uri()] and not errors
