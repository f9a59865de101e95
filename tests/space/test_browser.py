"""The page as a person uses it: Chromium against a server process. Skipped where there is no Chromium."""

import csv
import hashlib
import itertools
import json
import re
import shutil
import time
import zipfile

import pytest
from PIL import Image

from tests.space.conftest import Server, archive, copies

playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
CHROMIUM = shutil.which("chromium")
ADDRESSES = itertools.count(1)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs the browser chromium")


@pytest.fixture(scope="module")
def browser():
    quiet = "--no-sandbox --disable-gpu --disable-quic --disable-background-networking --disable-component-update"
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=CHROMIUM, args=["--headless=new", *quiet.split()])
        yield running
        running.close()


@pytest.fixture
def visit(browser, server):
    """Opens the page for fresh visitors, who must not leave this machine nor see an error in the console."""
    contexts, strangers, errors = [], [], []

    def visit(of=server, **options):
        # From an address of its own: those who ask for much wait for each other.
        headers = {"X-Forwarded-For": f"203.0.113.{next(ADDRESSES)}"}
        contexts.append(browser.new_context(extra_http_headers=headers, **options))
        page = contexts[-1].new_page()
        page.set_default_timeout(90_000)
        own = (of.url, "data:", "blob:")
        page.on("request", lambda r: None if r.url.startswith(own) else strangers.append(r.url))
        page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(of.url)
        page.wait_for_selector("#verdict .card")
        return page

    yield visit
    for context in contexts:
        context.close()
    assert not strangers, "a request left this machine"
    assert not errors


@pytest.fixture(scope="module")
def shop(tmp_path_factory, tried):
    running = Server(tmp_path_factory.mktemp("shop"), str(tried))
    yield running
    running.stop()


@pytest.fixture
def page(visit):
    return visit(viewport={"width": 1280, "height": 900})


def upload(page, path):
    page.set_input_files("#photo input[type=file]", str(path))


def inspect(page, path):
    upload(page, path)
    expect(page, "#verdict h2", "efect found")


def give(page, field, *files):
    """Puts files into the field of another tab and waits until they are uploaded."""
    page.set_input_files(f"#{field} input[type=file]", [str(file) for file in files])
    page.wait_for_selector(f"#{field} :text('{files[-1].stem}')", state="attached")


def remove_photo(page, words="Add a photo"):
    page.locator("#photo button[aria-label='Clear'], #photo button[aria-label='Remove Image']").first.click()
    expect(page, "#verdict", words)


def choose(page, category):
    page.locator("#category label").filter(has_text=category).click()


def move(page, slider, value):
    control = page.locator(f"#{slider} input[type=range]")
    control.scroll_into_view_if_needed()  # waits until a panel that was just opened holds still
    control.evaluate("(e, v) => { e.value = v; e.dispatchEvent(new Event('input', {bubbles: true})) }", str(value))


def shown(page, slider):
    return float(page.locator(f"#{slider} input[type=range]").input_value())


def tab(page, name):
    button = page.get_by_role("tab", name=name)
    if not button.is_visible():  # on a phone, the last ones are in a menu
        page.locator(".overflow-menu > button").click()
        button = page.locator(".overflow-dropdown button").filter(has_text=name)
    button.click()


def expect(page, selector, text):
    page.locator(selector).filter(has_text=text).first.wait_for()


def until(condition, complaint):
    for _ in range(300):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError(complaint)


def wait_until_nothing_is_unpacked(server):
    until(lambda: not [*server.temporary.glob("diffusionad-space-*/tmp*")], "what was unpacked is left on the disk")


def owners(server):
    return {file.read_text() for file in server.temporary.glob("diffusionad-space-*/results/*/.owner")}


def saved(page, button):
    with page.expect_download() as download:
        page.click(button)
    return download.value.suggested_filename, download.value.path()


def test_photo_to_verdict_then_regions_the_threshold_and_the_false_alarm_rate_without_the_model(page, server, parts):
    inspect(page, parts[0])
    page.wait_for_selector("#pictures img")
    assert "Score 0." in page.inner_text("#verdict") and "of the 12 normal images" in page.inner_text("#verdict")
    runs, picture = server.runs, page.locator("#pictures .over img")
    expect(page, "#scale", "this photo 0.")
    move(page, "threshold", 0.01)
    expect(page, "#verdict h2", "Anomalous: defect found")
    expect(page, "#verdict", "threshold 0.010")
    expect(page, "#scale", "At 0.010, 12 of the 12 normal photos")
    region = page.locator("#regions button").filter(has_text="1 · most of the image")
    expect(page, "#regions", "96 × 96 px")
    for framed in (True, False):
        region.click()
        assert region.get_attribute("aria-pressed") == str(framed).lower()
        assert page.locator("#pictures .frame").is_visible() == framed
    before = picture.get_attribute("src")
    move(page, "threshold", 0.99)
    expect(page, "#verdict h2", "Normal: no defect found")
    expect(page, "#verdict", "threshold 0.990")
    playwright.expect(picture).not_to_have_attribute("src", before, timeout=90_000)
    page.wait_for_selector("#regions button", state="detached")
    page.click("#advanced button")
    move(page, "rate", 30)
    expect(page, "#threshold", "30 % false alarms")
    move(page, "rate", 1)
    expect(page, "#threshold", "12 normal images are too few for 1 %")
    expect(page, "#verdict .undecided h2", "Undecided: too few calibration images")
    move(page, "threshold", 0.7)
    expect(page, "#verdict", "At your threshold 0.7; 12 normal images cannot promise")
    page.click("#threshold-back")
    expect(page, "#verdict", "Calibrated on 12 normal images for a false-alarm rate of 10 %")
    assert server.runs == runs


def test_opening_the_advanced_settings_changes_nothing_and_they_work(page, server, parts):
    page.click("#advanced button")
    page.wait_for_selector("#seed input, #seed textarea")
    upload(page, parts[0])
    expect(page, "#verdict", "of the 12 normal images")
    for entered, answer in (
        ("900", "the small one (900) must be below the big one"),
        ("many", "The small timestep must be a whole number"),
        ("100", "Other settings than it was calibrated with"),
        ("", "of the 12 normal images"),
    ):
        page.locator("#small-timestep input, #small-timestep textarea").fill(entered)
        page.click("#again")
        expect(page, "#verdict", answer)


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
    page.focus("#pictures input[type=range]")
    page.keyboard.press("Home")
    assert page.evaluate("getComputedStyle(document.querySelector('.over')).clipPath").startswith("inset(0")
    page.focus("#category input")
    before = page.inner_text("#verdict"), shown(page, "threshold")
    for _ in range(12):
        page.keyboard.press("Tab")
    page.wait_for_timeout(500)
    assert (page.inner_text("#verdict"), shown(page, "threshold")) == before and server.runs == runs, (
        "Tab changes nothing"
    )
    page.get_by_role("tab", name="Inspect").focus()
    for name in ("Batch", "Calibrate", "Teach", "About"):
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        page.wait_for_selector(f"[role=tab][aria-selected=true]:has-text('{name}')")


def test_downloads_hold_what_they_say(page, parts):
    inspect(page, parts[2])
    move(page, "threshold", 0.01)
    expect(page, "#verdict", "threshold 0.010")
    for kind, mode in {"overlay": "RGB", "mask": "L", "map": "I;16"}.items():
        name, path = saved(page, f"#download-{kind}")
        assert name == f"part-02-{kind}.png"
        with Image.open(path) as image:
            assert image.size == (96, 96) and image.mode == mode
    name, path = saved(page, "#download-json")
    record = json.loads(path.read_text())
    assert (
        name == "part-02.json"
        and record["verdict"] == "anomalous"
        and record["threshold"] == 0.01
        and record["regions"]
    )
    name, path = saved(page, "#download-report")
    assert name == "part-02-report.html" and "Anomalous: defect found" in path.read_text(encoding="utf-8")


def test_the_page_opens_with_an_example_and_each_product_has_its_own(visit, shop, parts):
    page = visit(shop, viewport={"width": 1280, "height": 900})
    expect(page, "#verdict .tag", "Example: deep-scratch.png")
    page.wait_for_selector("#pictures img")
    expect(page, "#category label:has(:checked)", "brass")
    expect(page, "#category", "Image AUROC 0.875 · rendered images, CC BY-SA 4.0")
    runs = shop.runs
    assert runs == 1, "inspected when the server starts, not for each visitor"
    until(lambda: page.inner_text("#verdict").count("threshold 0.990") or move(page, "threshold", 0.99), "it is stuck")
    expect(page, "#verdict .tag", "Example")
    assert shop.runs == runs
    name, path = saved(page, "#download-json")
    assert name == "deep-scratch.json" and json.loads(path.read_text())["threshold"] == 0.99
    choose(page, "Flange")
    expect(page, "#verdict .tag", "Example: deep-scratch.png")
    expect(page, ".source", "a workshop")
    assert page.locator(".examples button:visible").all_inner_texts() == ["✓ good", "✓ good", "✕ deep scratch"]
    page.locator(".examples button:visible").first.click()
    page.wait_for_selector("#verdict .tag", state="detached")
    page.wait_for_selector("#photo img")
    assert shop.runs == runs + 2
    choose(page, "brass")  # whose example it is not
    expect(page, "#verdict .tag", "Example")
    page.wait_for_selector("#photo img", state="detached")
    upload(page, parts[0])
    page.wait_for_selector("#verdict .tag", state="detached")
    remove_photo(page, "Example")


def test_a_blank_photo_is_undecided_and_without_examples_nothing_is_open(page, white):
    expect(page, "#verdict .note", "Add a photo")
    assert not page.locator("#result, #normal, .examples button").filter(visible=True).count()
    upload(page, white)
    expect(page, "#verdict .undecided h2", "Undecided: unlike any normal image")


def test_no_camera_and_no_image_are_said_on_the_page(page, notes):
    page.click("#photo [aria-label='Capture from camera']")
    expect(page, "#camera .error", "no camera")
    page.click("#photo [aria-label='Upload file']")
    page.wait_for_selector("#camera .error", state="hidden")
    upload(page, notes)
    page.get_by_text("Invalid file type: notes.txt").first.wait_for()


def test_a_tiff_is_shown_and_inspected_as_it_was_sent(page, server, parts, tmp_path):
    first, second = Image.open(parts[0]).convert("L").convert("I;16"), Image.open(parts[1]).convert("I;16")
    first = first.point(lambda value: value * 256)
    first.save(tmp_path / "deep.tiff", save_all=True, append_images=[second])
    runs = server.runs
    upload(page, tmp_path / "deep.tiff")
    expect(page, "#verdict", "only the first one was inspected")
    page.wait_for_function("document.querySelector('#photo img')?.naturalWidth > 0")
    page.wait_for_timeout(500)
    assert server.runs == runs + 1, "what is shown instead is not inspected"
    score = page.inner_text("#verdict p").split(",")[0]
    page.click("#advanced button")
    page.click("#again")
    until(lambda: server.runs == runs + 2, "it did not run again")
    expect(page, "#verdict p", f"{score},")  # again, and hidden while it is inspected


def test_a_broken_image_is_a_message_and_the_next_one_a_verdict(page, server, parts, tmp_path):
    for content in (b"GIF89a", b"\x89PNG\r\n\x1a\n broken", b"just text"):
        (tmp_path / "broken.png").write_bytes(content)
        upload(page, tmp_path / "broken.png")
        expect(page, "#verdict .error", "broken.png")
        assert str(server.temporary) not in page.inner_text("body")
        remove_photo(page)
    inspect(page, parts[0])


def test_a_batch_with_a_bad_file_and_its_downloads(page, parts, notes, tmp_path):
    more = archive(tmp_path / "more.zip", [("in/zip.png", parts[5].read_bytes())])
    inspect(page, parts[0])
    move(page, "threshold", 0.99)  # is none of the other tab's business
    expect(page, "#verdict", "At your threshold 0.99")
    tab(page, "Batch")
    info = page.locator("#batch-threshold").filter(has_text="Calibrated on 12 normal images").inner_text()
    calibrated = float(re.search(r"images: (\d\.\d+)", info)[1])
    until(lambda: shown(page, "batch-threshold") == pytest.approx(calibrated, abs=1e-3), "another one is shown")
    page.click("#batch-start")
    expect(page, "#batch-summary .error", "Choose images or a zip archive first")
    give(page, "batch-files", *parts[:3], notes, more)
    page.click("#batch-start")
    expect(page, "#batch-summary .tile", "1 not inspected")
    expect(page, "#batch-summary", "Calibrated on 12 normal images for a false-alarm rate of 10 %")
    expect(page, "#batch-table", "Not an image")
    assert page.locator("#batch-table tbody tr").count() == 5
    rows = lambda: page.locator("#batch-table tbody tr").filter(visible=True).all_inner_texts()  # noqa: E731
    page.get_by_role("button", name="File", exact=True).click()
    names = [row.split("\t")[0] for row in rows()]
    assert names == sorted(names)
    page.locator("#batch-summary .tile.error").click()
    assert [row.split("\t")[0] for row in rows()] == ["notes.txt"]
    page.locator("#batch-summary .tile.all").click()
    for name in (parts[1].name, "zip.png"):
        page.locator("#batch-table tr").filter(has_text=name).click()
        expect(page, "#batch-detail h2", name)
        page.wait_for_function("document.querySelector('#batch-detail .over img')?.naturalWidth > 0")
        assert page.locator("#batch-table tr[aria-selected=true]").inner_text().startswith(name)
    expect(page, "#batch-detail", "Score 0.")
    _, path = saved(page, "#batch-csv")
    with path.open(encoding="utf-8-sig", newline="") as file:
        assert {row["File"] for row in csv.DictReader(file)} == {*[p.name for p in parts[:3]], "notes.txt", "zip.png"}
    name, path = saved(page, "#batch-zip")
    with zipfile.ZipFile(path) as bundle:
        assert name.endswith(".zip") and bundle.testzip() is None and "overlays/zip-overlay.jpg" in bundle.namelist()


def test_a_batch_can_be_stopped(page, server, parts, tmp_path):
    tab(page, "Batch")
    give(page, "batch-files", copies(tmp_path / "many.zip", parts[0], 200))
    runs = server.runs
    page.click("#batch-start")
    expect(page, "#batch-summary", "of 200 images")
    page.click("#batch-stop")
    expect(page, "#batch-summary .note", "Stopped.")
    wait_until_nothing_is_unpacked(server)
    assert server.runs - runs < 30, "it ran on"
    page.locator("#batch-files button[aria-label='Clear']").click()
    give(page, "batch-files", parts[1])
    page.click("#batch-start")
    page.wait_for_selector("#batch-summary .tile")


def test_calibrating_changes_the_threshold_of_the_other_tabs_and_can_be_saved_loaded_and_undone(page, parts, tmp_path):
    inspect(page, parts[0])
    tab(page, "Batch")
    move(page, "batch-threshold", 0.99)
    give(page, "batch-files", parts[0])
    page.click("#batch-start")
    expect(page, "#batch-summary", "At your threshold 0.99; calibrated: 0.")
    page.click("#batch-threshold-back")
    until(lambda: shown(page, "batch-threshold") < 0.9, "there is no way back")
    page.click("#batch-start")
    expect(page, "#batch-summary", "Calibrated on 12 normal images")
    move(page, "batch-threshold", 0.99)  # which a new calibration replaces
    tab(page, "Calibrate")
    give(page, "normal-files", *parts[:3])
    page.click("#calibrate-start")
    expect(page, "#calibration .error", "3 usable images; a calibration takes 10")
    page.locator("#normal-files button[aria-label='Clear']").click()
    give(page, "normal-files", *parts[:11])
    move(page, "calibration-rate", 20)
    page.click("#calibrate-start")
    expect(page, "#calibration", "11 images of yours")
    name, path = saved(page, "#calibration-save")
    data = json.loads(path.read_text())
    assert name == "calibration-flange.json" and len(data["scores"]) == 11 and data["false_alarm_rate"] == 0.2
    tab(page, "Inspect")
    expect(page, "#threshold", "Calibrated on 11 images of yours")
    expect(page, "#verdict", f"threshold {sorted(data['scores'])[-2]:.3f}")
    expect(page, "#verdict", "of the 11 normal images")
    tab(page, "Batch")
    until(lambda: shown(page, "batch-threshold") < 0.9, "the former threshold is shown")
    page.click("#batch-start")
    expect(page, "#batch-summary", "Calibrated on 11 normal images")
    tab(page, "Calibrate")
    page.click("#calibration-forget")
    expect(page, "#calibration", "12 normal images")
    page.set_input_files("#calibration-file input[type=file]", shutil.copy(path, tmp_path / "c.json"))
    expect(page, "#calibration", "11 images of yours")


def test_every_threshold_is_that_of_the_chosen_product_though_another_one_is_calibrated_meanwhile(visit, shop, parts):
    page, held = visit(shop, viewport={"width": 1280, "height": 900}), []
    expect(page, "#verdict", "Calibrated on 12 normal images")
    tab(page, "Batch")
    give(page, "batch-files", parts[0])
    page.click("#batch-start")
    expect(page, "#batch-summary", "brass: threshold 0.")
    brass = shown(page, "batch-threshold")
    choose(page, "Flange")
    until(lambda: shown(page, "batch-threshold") > brass + 0.05, "the other product's is shown")

    def hold(route):
        data = route.request.post_data_json["data"]
        if not held and len(data) == 4 and data[1] == "steel" and isinstance(data[0], list):
            held.append(route)
        else:
            route.continue_()

    tab(page, "Calibrate")
    give(page, "normal-files", *parts[:11])
    page.route("**/queue/join*", hold)
    page.click("#calibrate-start")
    until(lambda: page.wait_for_timeout(100) or held, "it is not calibrated")
    choose(page, "brass")
    expect(page, "#calibration", "brass: threshold")
    held[0].continue_()
    expect(page, "#calibration", "11 images of yours")
    tab(page, "Inspect")
    page.wait_for_timeout(1000)
    expect(page, "#verdict", f"threshold {brass:.3f}. Calibrated on 12 normal images")
    assert shown(page, "threshold") == brass


def test_two_tabs_keep_to_themselves_and_leaving_one_midway_hurts_no_one(page, visit, server, parts):
    other, visits, session = visit(), set(), re.compile(rb'"session_hash":"(\w+)"')
    found = lambda r: {hashlib.sha256(m).hexdigest() for m in session.findall(r.post_data_buffer or b"")}  # noqa: E731
    other.on("request", lambda r: visits.update(found(r)))
    tab(other, "Batch")
    give(other, "batch-files", *parts)
    other.click("#batch-start")
    expect(other, "#batch-summary", "of 12 images")
    upload(page, parts[0])
    assert visits & owners(server)
    other.close()
    expect(page, "#verdict h2", "efect found")
    page.wait_for_selector("#pictures img")
    assert server.process.poll() is None
    wait_until_nothing_is_unpacked(server)
    until(lambda: not visits & owners(server), "a closed tab's results are left on the disk")
    move(page, "threshold", 0.99)
    expect(page, "#verdict", "threshold 0.990")


def test_models_that_fail_or_cannot_be_loaded_are_messages_and_the_other_goes_on(page, parts):
    choose(page, "fragile")
    upload(page, parts[0])
    expect(page, "#verdict .error", "fragile: the model failed on this image")
    choose(page, "no-such-model")
    expect(page, "#verdict .error", "could not be loaded")
    choose(page, "flange")
    expect(page, "#verdict h2", "efect found")


def test_a_product_chosen_while_another_one_is_inspected_gets_its_own_verdict(page, parts):
    held = []

    def hold(route):
        data = route.request.post_data_json["data"]
        if not held and len(data) > 5 and data[1] == "fragile":
            held.append(route)
        else:
            route.continue_()

    inspect(page, parts[0])
    page.route("**/queue/join*", hold)
    choose(page, "fragile")
    until(lambda: page.wait_for_timeout(100) or held, "it is not inspected")
    choose(page, "no-such-model")
    page.wait_for_timeout(2000)
    held[0].continue_()
    expect(page, "#verdict .error", "could not be loaded")


def test_no_verdict_of_the_former_photo_is_read_beside_the_next_one(page, parts):
    held = []
    inspect(page, parts[0])
    page.route("**/queue/join*", lambda route: route.continue_() if held else held.append(route))
    upload(page, parts[1])
    until(lambda: page.wait_for_timeout(100) or held, "it is not inspected")
    page.locator("#verdict h2").wait_for(state="hidden")
    held[0].continue_()
    page.locator("#verdict h2").wait_for()


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
        if ((a + .05) / (b + .05) < 4.5) pale[text.slice(0, 40)] = (a + .05) / (b + .05);
    }
    return pale;
}"""


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_every_text_can_be_read_in_light_and_dark(visit, parts, mode):
    page = visit(color_scheme=mode)
    inspect(page, parts[0])
    page.click("#advanced button")
    ground = page.evaluate("getComputedStyle(document.querySelector('.card')).backgroundColor")
    assert ground.startswith("rgb(") and (sum(map(int, ground[4:-1].split(","))) > 384) == (mode == "light")
    for threshold, words in ((0, "Anomalous: defect found"), (0.99, "Normal: no defect found")):
        move(page, "threshold", threshold)
        page.locator("#verdict h2").get_by_text(words, exact=True).wait_for()
        assert page.evaluate(PALE) == {}, words
    for name, button in {
        "Batch": "#batch-start",
        "Calibrate": "#calibrate-start",
        "Teach": None,
        "About": None,
    }.items():
        tab(page, name)
        if button:
            page.click(button)
            page.wait_for_selector(".card.error:visible")
        assert page.evaluate(PALE) == {}, name


def test_it_fits_a_phone_and_every_control_has_a_name(visit, parts):
    page = visit(viewport={"width": 390, "height": 844}, has_touch=True)
    inspect(page, parts[0])
    page.wait_for_selector("#pictures img")
    for name in ("Inspect", "Batch", "Calibrate", "Teach", "About"):
        tab(page, name)
        page.wait_for_timeout(200)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, name
    unnamed = """() => [...document.querySelectorAll('button, input:not([type=file]):not([type=hidden]), img')]
        .filter(e => e.offsetParent && !(e.innerText || e.ariaLabel || e.title || e.alt || e.labels?.length
            || e.getAttribute('aria-labelledby') || e.closest('label'))).map(e => e.outerHTML.slice(0, 120))"""
    assert page.evaluate(unnamed) == []


@pytest.mark.parametrize("width", [390, 768, 1440])
def test_nothing_stands_in_the_way_of_anyone(visit, shop, parts, notes, width):
    """What axe-core knows of WCAG, in the states that the page can be in."""
    axe = pytest.importorskip(
        "axe_playwright_python.sync_playwright", reason="pip install axe-playwright-python"
    ).Axe()
    page = visit(shop, viewport={"width": width, "height": 844})

    def check(state):
        for _ in range(20):  # what fades in or out is pale for a moment
            found = axe.run(page, options={"resultTypes": ["violations"]}).response["violations"]
            if not found:
                return
            page.wait_for_timeout(500)
        raise AssertionError((state, [(v["id"], [node["html"][:160] for node in v["nodes"][:3]]) for v in found]))

    expect(page, "#verdict .tag", "Example")
    box = page.locator("#verdict .card").bounding_box()
    assert box["y"] + box["height"] <= 844, "the verdict is on the first screen"
    page.wait_for_function("document.querySelector('#pictures .over img')?.naturalWidth > 0")
    check("example")
    moved = page.locator("#regions button")
    until(lambda: moved.count() or move(page, "threshold", 0.01), "no regions")  # the page may still be loading
    moved.first.click()
    page.click("#advanced button")
    check("region framed, settings open")
    upload(page, parts[0])
    page.wait_for_selector("#verdict .tag", state="detached")
    check("own photo")
    tab(page, "Batch")
    give(page, "batch-files", parts[0], notes)
    page.click("#batch-start")
    page.locator("#batch-table [data-row]").first.click()
    page.wait_for_selector("#batch-detail .compare")
    check("batch")
    for name in ("Calibrate", "About"):
        tab(page, name)
        check(name)
