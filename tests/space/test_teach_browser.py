"""The Teach tab and the marks as a person uses them: one training of two steps in Chromium."""

import json
import re
import zipfile

import pytest

from diffusionad_hf import DiffusionADPipeline
from tests.space.conftest import archive
from tests.space.test_browser import (  # noqa: F401
    CHROMIUM,
    browser,
    choose,
    expect,
    give,
    move,
    owners,
    pytestmark,
    saved,
    tab,
    until,
    upload,
    visit,
)
from tests.space.test_teach import lessons, photos, quick  # noqa: F401


@pytest.fixture
def server(quick):  # noqa: F811
    return quick


def test_from_photos_to_verdicts_marks_and_a_second_product(visit, server, photos, parts, tmp_path):  # noqa: F811
    page, other = visit(viewport={"width": 1280, "height": 900}), visit()
    tab(page, "Teach")
    expect(page, "#teach-state", "20 to 500 photos of normal parts")
    give(page, "teach-files", *photos[:3])
    expect(page, "#teach-state .error", "3 usable photos; teaching takes 20 or more")
    page.locator("#teach-files button[aria-label='Clear']").click()
    expect(page, "#teach-state", "20 to 500 photos of normal parts")
    assert page.locator("#teach-start").is_disabled()
    (tmp_path / "broken.png").write_bytes(b"not a photo")
    more = archive(tmp_path / "more.zip", [(f.name, f.read_bytes()) for f in photos[4:]])
    give(page, "teach-files", *photos[:4], tmp_path / "broken.png", more)
    expect(page, "#teach-state h2", "20 photos: 9.1 % false alarms at best")
    expect(page, "#teach-state", "broken.png: not an image")
    page.wait_for_selector("#teach-seen :text('Made-up defect')", timeout=240_000)
    page.locator("#teach-name input, #teach-name textarea").fill("Widget")
    page.click("#teach-start")
    page.locator("#teach-state h2").filter(has_text=re.compile("Widget (is ready|has not)")).wait_for(timeout=240_000)
    page.wait_for_selector("#teach-picture img")
    name, path = saved(page, "#teach-download")
    assert name == "widget.zip"
    with zipfile.ZipFile(path) as product:
        product.extractall(tmp_path)
    assert len(DiffusionADPipeline.from_pretrained(tmp_path / "widget").config.calibration_scores) == 10
    page.click("#teach-hub button")
    page.click("#teach-push")
    expect(page, "#teach-pushed .error", "Enter a Hugging Face token of yours")
    # Chosen at once, for this visitor alone.
    assert "Widget\nYours, from 20 photos" in page.locator("#category label:has(input:checked)").inner_text()
    tab(page, "Inspect")
    upload(page, parts[0])
    page.wait_for_selector("#verdict h2")
    expect(page, "#threshold", "Calibrated on 10 normal images")
    page.click("#mark-fine")
    expect(page, "#mark-said", "Marked as fine. In all: 1 marked as fine, 0 as defects.")
    assert "Widget" not in other.inner_text("body")
    # A batch, with one of its photos marked; and the marks as a file.
    tab(page, "Batch")
    give(page, "batch-files", *parts[1:4])
    page.click("#batch-start")
    page.locator("#batch-table tbody tr").filter(has_text=parts[2].name).click()
    expect(page, "#batch-detail h2", parts[2].name)
    page.click("#batch-mark-defect")
    expect(page, "#batch-mark-said", f"{parts[2].name}: Marked as a defect. In all: 1 marked as fine, 1 as defects.")
    name, path = saved(page, "#batch-mark-export")
    marks = json.loads(path.read_text())["marks"]
    assert name == "feedback.json" and [(m["file"], m["mark"]) for m in marks] == [
        (parts[0].name, "fine"),
        (parts[2].name, "defect"),
    ]
    assert all(mark["category"] == "Widget" and mark["verdict"] for mark in marks)
    # The same photos with what was marked make another product, which says what changed.
    tab(page, "Teach")
    page.locator("#teach-marks input").check()
    page.click("#teach-start")
    expect(page, "#teach-state h2", "Widget (2)")
    expect(page, "#teach-state", "1 photo(s) confirmed as fine")
    choose(page, "Widget\nYours")
    kept = len(lessons(server))
    page.close()
    until(lambda: len(lessons(server)) == kept - 2, "photos of a closed page are left on the disk")
    assert not owners(server)


def test_photos_are_taken_one_by_one_with_the_camera(browser, server):  # noqa: F811
    fake = ["--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"]
    with_camera = browser.browser_type.launch(executable_path=CHROMIUM, args=["--headless=new", "--no-sandbox", *fake])
    page = with_camera.new_page(extra_http_headers={"X-Forwarded-For": "203.0.113.250"})
    page.goto(server.url)
    page.wait_for_selector("#verdict .card")
    tab(page, "Teach")
    page.click("#teach-camera-panel > button")
    page.get_by_text("Click to Access Webcam").click()
    for number in (1, 2):
        page.wait_for_function("document.querySelector('#teach-camera video')?.videoWidth > 0")
        page.click("#teach-camera [aria-label='capture photo']")
        expect(page, "#teach-count", f"{number} taken, {20 - number} more to go.")
    page.click("#teach-use")
    expect(page, "#teach-state .error", "teaching takes 20 or more")  # both may show the same
    page.click("#teach-anew")
    page.locator("#teach-count").filter(has_text="taken").wait_for(state="hidden")
    with_camera.close()
