"""The page as a person uses it: Chromium against a server process. Skipped where there is no Chromium."""

import csv
import json
import re
import shutil
import time
import zipfile

import pytest
from PIL import Image

playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs the browser chromium")

ARGUMENTS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield running
        running.close()


@pytest.fixture
def page(browser, server):
    """A fresh visitor, who must not leave this machine nor see an error in the console."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    page = context.new_page()
    page.set_default_timeout(90_000)
    strangers, errors = [], []
    page.on("request", lambda r: None if r.url.startswith((server.url, "data:", "blob:")) else strangers.append(r.url))
    page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(server.url)
    page.wait_for_selector("#verdict .card")
    yield page
    context.close()
    assert not strangers, "a request left this machine"
    assert not errors


def upload(page, path):
    page.set_input_files("#photo input[type=file]", str(path))


def inspect(page, path):
    upload(page, path)
    expect(page, "#verdict h2", "efect found")


def choose(page, category):
    page.locator("#category input").click()
    page.get_by_role("option", name=category).click()


def move(page, slider, value):
    control = page.locator(f"#{slider} input[type=range]")
    control.scroll_into_view_if_needed()  # waits until a panel that was just opened holds still
    control.evaluate("(e, v) => { e.value = v; e.dispatchEvent(new Event('input', {bubbles: true})) }", str(value))


def tab(page, name):
    page.get_by_role("tab", name=name).click()


def expect(page, selector, text):
    page.locator(selector).filter(has_text=text).first.wait_for()


def until(condition, complaint):
    for _ in range(300):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError(complaint)


def unpacked(server):
    return [*server.temporary.glob("diffusionad-space-*/tmp*")]


def owners(server):
    return {file.read_text() for file in server.temporary.glob("diffusionad-space-*/results/*/.owner")}


def saved(page, button):
    with page.expect_download() as download:
        page.click(button)
    return download.value.suggested_filename, download.value.path()


def test_photo_to_verdict_then_the_threshold_without_the_model(page, server, parts):
    inspect(page, parts[0])
    page.wait_for_selector("#pictures img")
    assert "Score 0." in page.inner_text("#verdict") and "of the 12 normal images" in page.inner_text("#verdict")
    runs = server.runs
    move(page, "threshold", 0)
    expect(page, "#verdict h2", "Defect found")
    expect(page, "#verdict", "threshold 0.000")
    before = page.locator("#pictures img").last.get_attribute("src")
    move(page, "threshold", 0.99)
    expect(page, "#verdict h2", "No defect found")
    expect(page, "#verdict", "threshold 0.990")
    page.wait_for_function("src => [...document.querySelectorAll('#pictures img')].at(-1).src !== src", arg=before)
    assert server.runs == runs


def test_a_region_that_is_picked_is_framed_and_there_are_none_without_a_defect(page, server, parts):
    inspect(page, parts[0])
    move(page, "threshold", 0.01)
    page.wait_for_selector("#regions :text('1 · most of the image, 96 × 96 px')")
    before, runs = page.locator("#pictures img").last.get_attribute("src"), server.runs
    page.locator("#regions input[type=radio]").nth(1).check()
    page.wait_for_function("src => [...document.querySelectorAll('#pictures img')].at(-1).src !== src", arg=before)
    move(page, "threshold", 0.99)
    expect(page, "#verdict h2", "No defect found")
    page.wait_for_selector("#regions", state="hidden")
    assert server.runs == runs


def test_a_false_alarm_rate_moves_the_threshold(page, server, parts):
    inspect(page, parts[0])
    runs = server.runs
    page.click("#advanced button")
    move(page, "rate", 30)
    expect(page, "#threshold", "30 % false alarms")
    move(page, "rate", 1)
    expect(page, "#threshold", "12 normal images are too few for 1 %")
    expect(page, "#verdict", "threshold 1.000")
    assert server.runs == runs


def test_opening_the_advanced_settings_changes_nothing_and_they_work(page, server, parts):
    page.click("#advanced button")
    page.wait_for_selector("#seed input, #seed textarea")
    upload(page, parts[0])
    expect(page, "#verdict", "of the 12 normal images")
    box = page.locator("#small-timestep input, #small-timestep textarea")
    box.fill("900")
    page.click("#again")
    expect(page, "#verdict .error", "the small one (900) must be below the big one")
    box.fill("many")
    page.click("#again")
    expect(page, "#verdict .error", "The small timestep must be a whole number")
    box.fill("100")
    page.click("#again")
    expect(page, "#verdict", "Other settings than it was calibrated with")
    box.fill("")
    page.click("#again")
    expect(page, "#verdict", "of the 12 normal images")


def test_the_keyboard_is_enough(page, server, parts):
    inspect(page, parts[0])
    runs = server.runs
    assert page.locator("#verdict [role=status] h2").count() == 1, "a screen reader announces the verdict"
    page.focus("#threshold input[type=range]")
    page.keyboard.press("End")
    expect(page, "#verdict", "threshold 1.000")
    page.keyboard.press("ArrowLeft")
    expect(page, "#verdict", "threshold 0.999")
    assert server.runs == runs
    page.get_by_role("tab", name="Inspect").focus()
    for name in ("Batch", "Calibrate", "About"):
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        page.wait_for_selector(f"[role=tab][aria-selected=true]:has-text('{name}')")


def test_downloads_hold_what_they_say(page, parts):
    inspect(page, parts[2])
    move(page, "threshold", 0.01)
    expect(page, "#verdict h2", "Defect found")
    for kind, mode in {"overlay": "RGB", "mask": "L", "map": "I;16"}.items():
        name, path = saved(page, f"#download-{kind}")
        assert name == f"part-02-{kind}.png"
        with Image.open(path) as image:
            assert image.size == (96, 96) and image.mode == mode
    name, path = saved(page, "#download-json")
    record = json.loads(path.read_text())
    assert name == "part-02.json" and record["is_anomalous"] and record["threshold"] == 0.01 and record["regions"]
    name, path = saved(page, "#download-report")
    assert name == "part-02-report.html" and "Defect found" in path.read_text(encoding="utf-8")


def test_an_example_is_inspected_at_a_click_and_a_blank_photo_comes_with_a_warning(page, tmp_path):
    page.locator("#examples button", has_text="good").first.click()
    expect(page, "#verdict h2", "efect found")
    page.locator("#photo button[aria-label='Clear'], #photo button[aria-label='Remove Image']").first.click()
    expect(page, "#verdict .note", "Add a photo")
    Image.new("RGB", (200, 200), "white").save(tmp_path / "blank.png")
    upload(page, tmp_path / "blank.png")
    expect(page, "#verdict .warning", "Unlike any normal flange image")


@pytest.mark.parametrize("content", [b"GIF89a", b"\x89PNG\r\n\x1a\n broken", b"just text"])
def test_a_broken_image_is_a_message_and_the_next_one_a_verdict(page, server, parts, tmp_path, content):
    (tmp_path / "broken.png").write_bytes(content)
    upload(page, tmp_path / "broken.png")
    expect(page, "#verdict .error", "broken.png")
    assert str(server.temporary) not in page.inner_text("body")
    page.locator("#photo button[aria-label='Clear'], #photo button[aria-label='Remove Image']").first.click()
    expect(page, "#verdict .note", "Add a photo")
    inspect(page, parts[0])


def test_a_batch_with_a_bad_file_and_its_downloads(page, parts, tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with zipfile.ZipFile(tmp_path / "more.zip", "w") as bundle:
        bundle.write(parts[5], "in/zip.png")
    tab(page, "Batch")
    page.click("#batch-start")
    expect(page, "#batch-summary .error", "Choose images or a zip archive first")
    files = [str(path) for path in (*parts[:3], tmp_path / "notes.txt", tmp_path / "more.zip")]
    page.set_input_files("#batch-files input[type=file]", files)
    page.wait_for_selector("#batch-files :text('more')")
    page.click("#batch-start")
    expect(page, "#batch-summary .tile", "1 not inspected")
    expect(page, "#batch-table", "Not an image")
    page.wait_for_selector("#batch-gallery img")
    _, path = saved(page, "#batch-csv")
    with path.open(encoding="utf-8-sig", newline="") as file:
        assert {row["File"] for row in csv.DictReader(file)} == {*[p.name for p in parts[:3]], "notes.txt", "zip.png"}
    name, path = saved(page, "#batch-zip")
    with zipfile.ZipFile(path) as bundle:
        assert name.endswith(".zip") and bundle.testzip() is None and "overlays/zip-overlay.jpg" in bundle.namelist()


def test_a_batch_can_be_stopped(page, server, parts, tmp_path):
    with zipfile.ZipFile(tmp_path / "many.zip", "w") as bundle:
        for i in range(200):
            bundle.write(parts[0], f"{i}.png")
    tab(page, "Batch")
    page.set_input_files("#batch-files input[type=file]", str(tmp_path / "many.zip"))
    page.wait_for_selector("#batch-files :text('many')")
    runs = server.runs
    page.click("#batch-start")
    expect(page, "#batch-summary", "of 200 images")
    page.click("#batch-stop")
    expect(page, "#batch-summary .note", "Stopped.")
    until(lambda: not unpacked(server), "what was unpacked is left on the disk")
    assert server.runs - runs < 30, "it ran on"
    page.locator("#batch-files button[aria-label='Clear']").click()
    page.set_input_files("#batch-files input[type=file]", str(parts[1]))
    page.wait_for_selector("#batch-files :text('part-01')")
    page.click("#batch-start")
    page.wait_for_selector("#batch-summary .tile")


def test_calibrating_changes_the_threshold_of_the_other_tabs_and_can_be_saved_loaded_and_undone(page, parts, tmp_path):
    inspect(page, parts[0])
    tab(page, "Calibrate")
    page.set_input_files("#normal-files input[type=file]", [str(path) for path in parts[:3]])
    page.wait_for_selector("#normal-files :text('part-02')")
    page.click("#calibrate-start")
    expect(page, "#calibration .error", "3 usable images; a calibration takes 10")
    page.locator("#normal-files button[aria-label='Clear']").click()
    page.set_input_files("#normal-files input[type=file]", [str(path) for path in parts[:11]])
    page.wait_for_selector("#normal-files :text('part-10')", state="attached")
    move(page, "calibration-rate", 20)
    page.click("#calibrate-start")
    expect(page, "#calibration", "11 images of yours")
    name, path = saved(page, "#calibration-save")
    data = json.loads(path.read_text())
    assert name == "calibration-flange.json" and len(data["scores"]) == 11 and data["false_alarm_rate"] == 0.2
    tab(page, "Inspect")
    expect(page, "#threshold", "Calibrated on 11 images of yours")
    expect(page, "#verdict", f"threshold {sorted(data['scores'])[-2]:.3f}")
    tab(page, "Calibrate")
    page.click("#calibration-forget")
    expect(page, "#calibration", "12 normal images")
    shutil.copy(path, tmp_path / "c.json")
    page.set_input_files("#calibration-file input[type=file]", str(tmp_path / "c.json"))
    expect(page, "#calibration", "11 images of yours")


def test_two_tabs_keep_to_themselves_and_leaving_one_midway_hurts_no_one(page, browser, server, parts):
    other = browser.new_page()
    visits = set()
    session = re.compile(rb'"session_hash":"(\w+)"')
    other.on("request", lambda r: visits.update(m.decode() for m in session.findall(r.post_data_buffer or b"")))
    other.goto(server.url)
    other.wait_for_selector("#verdict .card")
    tab(other, "Batch")
    other.set_input_files("#batch-files input[type=file]", [str(part) for part in parts])
    other.wait_for_selector("#batch-files :text('part-11')", state="attached")
    other.click("#batch-start")
    expect(other, "#batch-summary", "of 12 images")
    upload(page, parts[0])
    assert visits & owners(server)
    other.close()
    expect(page, "#verdict h2", "efect found")
    page.wait_for_selector("#pictures img")
    assert server.process.poll() is None
    until(lambda: not unpacked(server), "what was unpacked is left on the disk")
    until(lambda: not visits & owners(server), "a closed tab's results are left on the disk")
    move(page, "threshold", 0.99)
    expect(page, "#verdict", "threshold 0.990")


def test_models_that_fail_or_cannot_be_loaded_are_messages_and_the_other_goes_on(page, parts):
    choose(page, "fragile")
    upload(page, parts[0])
    expect(page, "#verdict .error", "fragile: the model failed on this image")
    tab(page, "Batch")
    page.set_input_files("#batch-files input[type=file]", str(parts[0]))
    page.wait_for_selector("#batch-files :text('part-00')")
    page.click("#batch-start")
    expect(page, "#batch-table", "The model failed on this image")
    tab(page, "Inspect")
    choose(page, "no-one/no-such-model")
    expect(page, "#verdict .error", "could not be loaded")
    choose(page, "flange")
    expect(page, "#verdict h2", "efect found")


# The ratio of WCAG 2 between each visible text and the first opaque ground behind it, where it is below AA.
PALE = """() => {
    const brush = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
    const rgba = css => {
        brush.clearRect(0, 0, 1, 1); brush.fillStyle = css; brush.fillRect(0, 0, 1, 1);
        const [r, g, b, a] = brush.getImageData(0, 0, 1, 1).data; return [r, g, b, a / 255];
    };
    const light = c => c.slice(0, 3).map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
    const ground = e => {
        for (let c; e; e = e.parentElement) if ((c = rgba(getComputedStyle(e).backgroundColor))[3] > .99) return c;
        return [255, 255, 255, 1];
    };
    const pale = {}, texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (texts.nextNode()) {
        const e = texts.currentNode.parentElement, text = texts.currentNode.data.trim(), style = getComputedStyle(e);
        if (text.length < 2 || !e.offsetParent || ['SCRIPT', 'STYLE'].includes(e.tagName)
            || !e.checkVisibility({opacityProperty: true, visibilityProperty: true})) continue;
        const [a, b] = [light(rgba(style.color)), light(ground(e))].sort((x, y) => y - x);
        const big = parseFloat(style.fontSize) >= 24 || parseFloat(style.fontSize) >= 18.6 && style.fontWeight >= 700;
        if ((a + .05) / (b + .05) < (big ? 3 : 4.5)) pale[text.slice(0, 40)] = (a + .05) / (b + .05);
    }
    return pale;
}"""


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_every_text_can_be_read_in_light_and_dark(browser, server, parts, mode):
    context = browser.new_context(color_scheme=mode)
    page = context.new_page()
    page.goto(f"{server.url}?__theme={mode}")
    page.wait_for_selector("#verdict .card")
    inspect(page, parts[0])
    page.click("#advanced button")
    ground = page.evaluate("getComputedStyle(document.querySelector('.card')).backgroundColor")
    assert ground.startswith("rgb(") and (sum(map(int, ground[4:-1].split(","))) > 384) == (mode == "light")
    for threshold, words in ((0, "Defect found"), (0.99, "No defect found")):
        move(page, "threshold", threshold)
        page.locator("#verdict h2").get_by_text(words, exact=True).wait_for()
        assert page.evaluate(PALE) == {}, words
    for name, button in {"Batch": "#batch-start", "Calibrate": "#calibrate-start", "About": None}.items():
        tab(page, name)
        if button:
            page.click(button)
            page.wait_for_selector(".card.error:visible")
        assert page.evaluate(PALE) == {}, name
    context.close()


def test_it_fits_a_phone_and_every_control_has_a_name(browser, server, parts):
    context = browser.new_context(viewport={"width": 390, "height": 844}, has_touch=True)
    page = context.new_page()
    page.goto(server.url)
    page.wait_for_selector("#verdict .card")
    inspect(page, parts[0])
    page.wait_for_selector("#pictures img")
    for name in ("Inspect", "Batch", "Calibrate", "About"):
        tab(page, name)
        page.wait_for_timeout(200)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, name
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll('button, input:not([type=file]):not([type=hidden]), img')].filter(e =>
            e.offsetParent && !(e.innerText || e.ariaLabel || e.title || e.alt || e.labels?.length
                || e.getAttribute('aria-labelledby') || e.closest('label'))).map(e => e.outerHTML.slice(0, 120))"""
    )
    context.close()
    assert not unnamed
