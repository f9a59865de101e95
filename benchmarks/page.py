"""The web demo as a person meets it in a browser, and as many clients meet it at once.

    python -m benchmarks page                     # about ten minutes on two cores
    python -m benchmarks page --photos 100 --rounds 1

Chromium opens the page at three widths: seconds to the first paint and to the example's verdict, layout shift (0 is
none; under 0.1 is called good), and seconds from giving a photo to its verdict. A batch of `--photos` is inspected;
then the longest frame while its table is scrolled, and seconds to filter and sort it and to open a row. At last 20
clients ask 200 times a round, each answer is compared with that of a client alone, and the server's memory is read.
"""

import concurrent.futures
import io
import json
import shutil
import statistics
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.machine import describe, report
from benchmarks.visitors import Visitor, serving
from diffusionad_hf.files import bundled, one_line
from diffusionad_hf.flags import DashedParser

_WIDTHS = (390, 768, 1440)
_CLIENTS, _REQUESTS = 20, 200  # of a round
_VERDICTS = 5  # photos whose verdict is waited for
_WATCH = """
window.shift = 0;
new PerformanceObserver(list => { for (const e of list.getEntries()) if (!e.hadRecentInput) window.shift += e.value })
    .observe({type: "layout-shift", buffered: true});
"""
_PAINT = "performance.getEntriesByName('first-contentful-paint')[0].startTime / 1000"
_SCROLL = """async () => {
    const table = document.querySelector("#batch-table tbody").closest("[style*=overflow], .table-wrap, div");
    let longest = 0, last = performance.now();
    for (let i = 0; i < 60; i++) {
        window.scrollBy(0, 120); table.scrollBy(0, 120);
        const now = await new Promise(requestAnimationFrame);
        longest = Math.max(longest, now - last); last = now;
    }
    return longest;
}"""


def _photos(count: int) -> list[bytes]:
    """Photos of a product, each with a pixel of its own."""
    examples = sorted(bundled("space/checkpoints/cookie/examples").glob("*.jpg"))
    made = []
    for i in range(count):
        pixels = np.array(Image.open(examples[i % len(examples)]).convert("RGB"))
        pixels[0, 0] = i % 256, i // 256, 0
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
        made.append(buffer.getvalue())
    return made


def _seconds(act: Callable[[], object]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def measure_page(browser: Any, url: str, width: int, photos: list[Path]) -> dict[str, Any]:
    """Opens the page once and gives it photos, one after another."""
    context = browser.new_context(viewport={"width": width, "height": 900})
    page = context.new_page()
    page.add_init_script(_WATCH)
    began = time.perf_counter()
    page.goto(url, wait_until="commit")
    page.wait_for_selector("#verdict .card h2", timeout=60_000)
    row = {"what": f"page, {width} px", "example_s": time.perf_counter() - began}
    page.wait_for_timeout(1500)
    row |= {"first_paint_s": page.evaluate(_PAINT), "layout_shift": page.evaluate("window.shift")}
    waited = []
    for photo in photos:
        before = page.inner_text("#verdict .card")
        began = time.perf_counter()
        page.set_input_files("#photo input[type=file]", str(photo))
        page.wait_for_function(
            "old => document.querySelector('#verdict h2')?.checkVisibility({visibilityProperty: true})"
            " && document.querySelector('#verdict .card').innerText != old",
            arg=before,
            timeout=60_000,
        )
        waited.append(time.perf_counter() - began)
    context.close()
    return row | {"verdict_s": statistics.median(waited), "worst_verdict_s": max(waited)}


def measure_batch(browser: Any, url: str, archive: Path, count: int) -> dict[str, Any]:
    """A batch in the browser: the time it takes, and how the page behaves with so many rows."""
    context = browser.new_context(viewport={"width": 1440, "height": 900})
    page = context.new_page()
    page.goto(url)
    page.get_by_role("tab", name="Batch").click()
    page.set_input_files("#batch-files input[type=file]", str(archive))
    page.wait_for_selector(f"#batch-files :text('{archive.stem}')", state="attached")
    began = time.perf_counter()
    page.click("#batch-start")
    page.wait_for_selector("#batch-summary .tile", timeout=1_200_000)
    row: dict[str, Any] = {"what": f"batch of {count}", "batch_s": time.perf_counter() - began}
    rows = page.locator("#batch-table tbody tr")
    row["rows"] = rows.count()
    row["longest_frame_ms"] = page.evaluate(_SCROLL)

    def opened() -> None:
        rows.nth(count // 2).click()
        page.wait_for_function("document.querySelector('#batch-detail img')?.naturalWidth > 0")

    row["open_row_s"] = _seconds(opened)
    row["sort_s"] = _seconds(lambda: page.get_by_role("button", name="File", exact=True).click())
    row["filter_s"] = _seconds(lambda: page.locator("#batch-summary .tile.all").click())
    context.close()
    return row


def measure_load(url: str, category: str, server: Any, rounds: int) -> list[dict[str, Any]]:
    """Rounds of many calls at once: how many answers differ from those of a client alone."""
    photos = _photos(8)

    def ask(visitor: Visitor, photo: bytes) -> tuple[str, float]:
        answer = visitor.call("inspect", visitor.upload("photo.jpg", photo), category, None, None, 1).decode()
        *_, last = answer.strip().split("\n")
        record = json.loads(last.removeprefix("data: "))[0]
        return record["verdict"], record["anomaly_score"]

    alone = [ask(Visitor(url, 250, category), photo) for photo in photos]
    table = []
    for number in range(rounds):
        waited: list[float] = []
        wrong = refused = 0

        def client(place: int, first: int = 1 + number * _CLIENTS, waited: list[float] = waited) -> list[str]:
            visitor, said = Visitor(url, first + place, category), []
            for i in range(_REQUESTS // _CLIENTS):
                which = (place + i) % len(photos)
                began = time.perf_counter()
                try:
                    right = ask(visitor, photos[which]) == alone[which]
                except Exception as error:
                    print(f"refused: {one_line(error)}", file=sys.stderr)
                    said.append("refused")
                    continue
                waited.append(time.perf_counter() - began)
                said.append("right" if right else "wrong")
            return said

        began = time.perf_counter()
        with concurrent.futures.ThreadPoolExecutor(_CLIENTS) as pool:
            said = [word for words in pool.map(client, range(_CLIENTS)) for word in words]
        wrong, refused = said.count("wrong"), said.count("refused")
        row = {"what": f"round {number + 1} of {_REQUESTS}", "right": len(said) - wrong - refused, "wrong": wrong}
        row |= {"refused": refused, "round_s": time.perf_counter() - began, "request_s": statistics.median(waited)}
        table.append(row | {"worst_s": max(waited), "memory_mb": _memory(server.pid)})
    return table


def _memory(pid: int) -> float:
    """What a process takes now."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")) / 1e3


def main(argv: list[str] | None = None) -> None:
    """Runs the measurement."""
    parser = DashedParser(prog="python -m benchmarks page", description=__doc__.split("\n")[0])
    parser.add_argument("--photos", type=int, default=500, metavar="N", help="of the batch; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="of 200 requests; default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything here")
    args = parser.parse_args(argv)
    from playwright.sync_api import sync_playwright

    if (chromium := shutil.which("chromium")) is None:
        raise SystemExit("chromium: not found; install it (Debian: apt-get install chromium).")
    result: dict[str, Any] = {"machine": describe(torch.device("cpu")), "rows": []}
    with tempfile.TemporaryDirectory() as folder, serving() as (url, category, server), sync_playwright() as driver:
        files = [Path(folder) / f"photo-{i}.jpg" for i in range(_VERDICTS)]
        for file, photo in zip(files, _photos(_VERDICTS), strict=True):
            file.write_bytes(photo)
        archive = Path(folder) / "photos.zip"
        with zipfile.ZipFile(archive, "w") as bundle:
            for i, photo in enumerate(_photos(args.photos)):
                bundle.writestr(f"photo-{i:03}.jpg", photo)
        browser = driver.chromium.launch(executable_path=chromium, args=["--headless=new", "--no-sandbox"])
        for width in _WIDTHS:
            result["rows"].append(measure_page(browser, url, width, files))
        result["rows"].append(measure_batch(browser, url, archive, args.photos))
        browser.close()
        result["rows"] += measure_load(url, category, server, args.rounds)
    report(result, args.json)


if __name__ == "__main__":
    main()
