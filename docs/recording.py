"""Records the web demo as an animated WebP: `python docs/recording.py docs/images/demo.webp` (needs Chromium).

It serves the page with the embedded cookie model, as `tests/space` does, and takes a picture after each thing that
a visitor does.
"""

import io
import shutil
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.space.conftest import Server  # noqa: E402

_SIZE = (1000, 860)
_EXAMPLES = ROOT / "space/checkpoints/cookie/examples"


class Film:
    """Pictures of a page, and how many milliseconds each is shown."""

    def __init__(self, page: Page):
        self.page, self.frames, self.times = page, [], []

    def shoot(self, milliseconds: int) -> None:
        self.frames.append(Image.open(io.BytesIO(self.page.screenshot())).convert("RGB"))
        self.times.append(milliseconds)

    def slide(self, selector: str, values: list[float]) -> None:
        for value in values:
            self.page.locator(selector).evaluate(
                "(e, v) => { e.value = v; e.dispatchEvent(new Event('input', {bubbles: true})) }", str(value)
            )
            self.page.wait_for_timeout(600)
            self.shoot(120)


def record(page: Page) -> Film:
    film = Film(page)
    page.wait_for_selector("#pictures img")
    page.wait_for_timeout(1500)
    film.shoot(1500)
    for photo, word in (("good.jpg", "Normal"), ("crack-2.jpg", "Anomalous")):
        page.set_input_files("#photo input[type=file]", str(_EXAMPLES / photo))
        page.wait_for_selector(f"#photo img[src*='{Path(photo).stem}']")
        page.locator("#verdict h2").filter(has_text=word).wait_for()
        page.wait_for_timeout(4000)  # until it is no longer shown as being renewed
        film.shoot(1800)
    film.slide("#pictures input[type=range]", [60, 75, 90, 100, 80, 60, 40, 20, 0, 25, 50])
    film.times[-1] = 800
    page.locator("#regions").scroll_into_view_if_needed()
    page.locator("#regions button").first.click()
    page.wait_for_timeout(500)
    film.shoot(1500)
    return film


def main(target: str) -> None:
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as tools:
        server = Server(Path(folder), str(ROOT / "space/checkpoints/cookie"))
        browser = tools.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        try:
            page = browser.new_page(viewport={"width": _SIZE[0], "height": _SIZE[1]})
            page.set_default_timeout(120_000)
            page.goto(server.url)
            film = record(page)
        finally:
            browser.close()
            server.stop()
    first, *others = (frame.resize((800, 688), Image.Resampling.LANCZOS) for frame in film.frames)
    first.save(target, save_all=True, append_images=others, duration=film.times, loop=0, quality=60, method=6)
    seconds, size = sum(film.times) / 1000, Path(target).stat().st_size // 1000
    print(f"{target}: {len(film.frames)} pictures, {seconds:.0f} s, {size} KB")


if __name__ == "__main__":
    main(*sys.argv[1:])
