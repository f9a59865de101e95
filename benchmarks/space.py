"""Load and speed of the inspection page.

    python -m benchmarks.space --models space/checkpoints --images DIR --requests 200 --json FILE

Starts the page as a process of its own, then: the time until it answers; a request's overhead over the bare model;
20 callers at once with 200 requests, each answer compared with the pipeline's own score of that image; the server's
memory and disk before and after; and, where Chromium is, the time from moving the threshold to the new verdict and
picture. A refusal because the queue is full counts as an answer, and is reported. The clients check no certificates:
gradio's would read the machine's certificate store anew for every request, 0.15 s each, though the page speaks http.
"""

import argparse
import json
import os
import re
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gradio_client import Client, handle_file

from diffusionad_hf import DiffusionADPipeline

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM_ARGUMENTS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]


def start(models: str, folder: Path) -> tuple[subprocess.Popen, str, float]:
    """The process, its address, and how long it took to answer."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "DIFFUSIONAD_MODELS": models,
        "GRADIO_SERVER_PORT": str(port),
        "TMPDIR": str(folder),
        "PYTHONPATH": str(ROOT),
    }
    began = time.perf_counter()
    log = (folder / "log.txt").open("wb")
    process = subprocess.Popen([sys.executable, str(ROOT / "space/app.py")], env=environment, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}/"
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return process, url, time.perf_counter() - began
        except (urllib.error.URLError, OSError):
            if process.poll() is not None:
                raise SystemExit((folder / "log.txt").read_text(encoding="utf-8")) from None
            time.sleep(0.05)


def memory_mb(process: subprocess.Popen) -> float:
    status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024


def disk_mb(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 2**20


def model_ms(folder: Path) -> list[float]:
    """What the server says that each run of the model took."""
    return [float(ms) for ms in re.findall(r"ran .* in (\d+) ms", (folder / "log.txt").read_text(encoding="utf-8"))]


def connect(url: str) -> Client:
    return Client(url, verbose=False, ssl_verify=False)


def overhead(url: str, image: Path, folder: Path, repeats: int) -> dict:
    client = connect(url)
    client.predict(handle_file(str(image)), api_name="/inspect")
    seen = len(model_ms(folder))
    whole = []
    for _ in range(repeats):
        began = time.perf_counter()
        client.predict(handle_file(str(image)), api_name="/inspect")
        whole.append(1000 * (time.perf_counter() - began))
    inside = model_ms(folder)[seen:]
    extra = [w - m for w, m in zip(whole, inside, strict=True)]
    return {
        "request_ms": statistics.median(whole),
        "model_ms": statistics.median(inside),
        "overhead_ms": statistics.median(extra),
    }


def load(url: str, images: list[Path], scores: dict[str, float], callers: int, requests: int) -> dict:
    def caller(number: int) -> list[tuple[str, float]]:
        client = connect(url)
        answers = []
        for i in range(number, requests, callers):
            image = images[i % len(images)]
            began = time.perf_counter()
            try:
                record, _ = client.predict(handle_file(str(image)), api_name="/inspect")
                right = record["name"] == image.name and abs(record["anomaly_score"] - scores[image.name]) < 1e-4
                kind = "right" if right else "wrong"
            except Exception as error:
                kind = "refused" if "full" in str(error).lower() else f"failed: {str(error)[:80]}"
            answers.append((kind, time.perf_counter() - began))
        client.close()
        return answers

    began = time.perf_counter()
    with ThreadPoolExecutor(callers) as pool:
        answers = [answer for batch in pool.map(caller, range(callers)) for answer in batch]
    seconds = sorted(took for _, took in answers)
    kinds = [kind for kind, _ in answers]
    return {
        "answers": {kind: kinds.count(kind) for kind in sorted(set(kinds))},
        "seconds_all": time.perf_counter() - began,
        "seconds_median": statistics.median(seconds),
        "seconds_worst": seconds[-1],
    }


def threshold_ms(url: str, image: Path, moves: int) -> list[float] | None:
    """From the slider's event to the new verdict and the new picture, decoded, in the browser."""
    chromium = shutil.which("chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        chromium = None
    if chromium is None:
        return None
    script = """async value => {
        const slider = document.querySelector('#threshold input[type=range]');
        const picture = () => [...document.querySelectorAll('#pictures img')].at(-1);
        const former = picture().src, began = performance.now();
        slider.value = value;
        slider.dispatchEvent(new Event('input', {bubbles: true}));
        const words = `threshold ${value.toFixed(3)}`;
        while (picture().src === former || !document.querySelector('#verdict').innerText.includes(words))
            await new Promise(resolve => setTimeout(resolve, 5));
        await picture().decode();
        return performance.now() - began;
    }"""
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=CHROMIUM_ARGUMENTS)
        page = browser.new_page()
        page.goto(url)
        page.set_input_files("#photo input[type=file]", str(image))
        page.wait_for_selector("#verdict h2")
        page.wait_for_selector("#pictures img")
        page.wait_for_timeout(2000)
        taken = []
        for i in range(moves):
            taken.append(page.evaluate(script, 0.2 + 0.6 * i / moves))
            page.wait_for_timeout(300)
        browser.close()
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description="Load and speed of the inspection page.")
    parser.add_argument("--models", required=True, help="folder of one or more models; the first is used")
    parser.add_argument("--images", type=Path, required=True, help="folder of images")
    parser.add_argument("--callers", type=int, default=20)
    parser.add_argument("--requests", type=int, default=200, help="of a round, from all callers together")
    parser.add_argument("--rounds", type=int, default=5, help="memory and disk are looked at before and after each")
    parser.add_argument("--repeats", type=int, default=20, help="of the single request and of the threshold's move")
    parser.add_argument("--json", type=Path, help="where to write the figures as well")
    arguments = parser.parse_args()
    images = sorted(arguments.images.rglob("*.png"))
    images = list({image.name: image for image in images}.values())[:20]
    first = sorted(Path(arguments.models).resolve().glob("*/model_index.json"))[0].parent
    pipe = DiffusionADPipeline.from_pretrained(first)
    pipe.set_progress_bar_config(disable=True)
    scores = {image.name: float(pipe(image).anomaly_score[0]) for image in images}
    del pipe
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        process, url, ready = start(str(Path(arguments.models).resolve()), folder)
        report = {"ready_s": ready, **overhead(url, images[0], folder, arguments.repeats)}
        moves = threshold_ms(url, images[0], arguments.repeats)
        if moves:
            report |= {"threshold_ms": statistics.median(moves), "threshold_ms_worst": max(moves)}
        # Again and again: what the first round fills once and for all, such as caches and thread stacks, is no leak.
        memory, disk, kinds = [memory_mb(process)], [disk_mb(folder)], Counter()
        for _ in range(arguments.rounds):
            answered = load(url, images, scores, arguments.callers, arguments.requests)
            kinds.update(answered.pop("answers"))
            memory.append(memory_mb(process))
            disk.append(disk_mb(folder))
        report |= {"answers": dict(kinds), **answered, "memory_mb": memory, "disk_mb": disk}
        process.terminate()
        process.wait()
        report["disk_mb_after_exit"] = sum(map(disk_mb, folder.glob("diffusionad-space-*")))
        report["server_cpu_s"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    figures = json.dumps(report, indent=2)
    print(figures)
    if arguments.json:
        arguments.json.write_text(figures + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
