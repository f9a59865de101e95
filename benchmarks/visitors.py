"""The web demo under attack: what 20 visitors wait for an inspection, alone and beside five who mean harm.

    python -m benchmarks visitors                # two minutes: one without the five, one with them

Each visitor calls from an address of its own, sends a photo, waits for the verdict, and pauses. The five flood the
queue, drip uploads, send images and archives that unpack to far more, ask for the most costly settings, and move
sliders and download full-size pictures without end.
"""

import functools
import http.client
import io
import json
import multiprocessing
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks.machine import describe, report
from diffusionad_hf.files import bundled
from diffusionad_hf.flags import DashedParser

_PAUSE = 10.0  # seconds between two photos of one visitor


class Visitor:
    """Calls of the server from one address."""

    def __init__(self, url: str, number: int, category: str):
        self.url = f"{url}/gradio_api/"
        self.address = f"198.51.100.{number}"
        self.category = category

    def request(self, path: str, data: bytes | None = None, kind: str = "application/json") -> bytes:
        headers = {"X-Forwarded-For": self.address, "Content-Type": kind}
        with urllib.request.urlopen(urllib.request.Request(self.url + path, data, headers), timeout=120) as answer:
            return answer.read()

    def upload(self, name: str, content: bytes) -> dict[str, Any]:
        head = f'--x\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode()
        answer = self.request("upload", head + content + b"\r\n--x--\r\n", "multipart/form-data; boundary=x")
        return {"path": json.loads(answer)[0], "orig_name": name}

    def start(self, endpoint: str, *data: Any) -> str:
        return json.loads(self.request(f"call/{endpoint}", json.dumps({"data": data}).encode()))["event_id"]

    def call(self, endpoint: str, *data: Any) -> bytes:
        return self.request(f"call/{endpoint}/{self.start(endpoint, *data)}")

    def inspect(self, photo: bytes) -> float:
        """Seconds from sending a photo to its verdict."""
        began = time.perf_counter()
        answer = self.call("inspect", self.upload("photo.png", photo), self.category, None, None, 1)
        assert b"event: complete" in answer, answer[:300]
        return time.perf_counter() - began


def flood(visitor: Visitor) -> None:
    visitor.start("inspect", None, visitor.category, None, None, 16)
    visitor.request("info")


def drip(visitor: Visitor) -> None:
    address = visitor.url.split("/")[2]
    connection = http.client.HTTPConnection(address, timeout=30)
    connection.putrequest("POST", "/gradio_api/upload")
    connection.putheader("X-Forwarded-For", visitor.address)
    connection.putheader("Content-Type", "multipart/form-data; boundary=x")
    connection.putheader("Content-Length", "100000000")
    connection.endheaders()
    for _ in range(20):
        connection.send(b"x")
        time.sleep(1)
    connection.close()


def bomb(visitor: Visitor) -> None:
    image, archive = _bombs()
    visitor.call("inspect", visitor.upload("large.png", image), visitor.category, None, None, 1)
    visitor.call("inspect_batch", [visitor.upload("bomb.zip", archive)] * 20, visitor.category, None, None)


@functools.cache
def _bombs() -> tuple[bytes, bytes]:
    """An image of 49 million pixels and an archive of as many bytes, both of a few kilobytes."""
    large, packed = io.BytesIO(), io.BytesIO()
    Image.new("L", (7000, 7000)).save(large, "PNG")
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as bundle:
        bundle.writestr("a.png", bytes(49_000_000))
    return large.getvalue(), packed.getvalue()


def costly(visitor: Visitor) -> None:
    photo = visitor.upload("photo.png", _photo())
    visitor.call("inspect", photo, visitor.category, None, None, 16)


def page(visitor: Visitor) -> None:
    """Asks for a page again and again, with all that it consists of."""
    for path in ("config", "gradio_api/info", ""):
        headers = {"X-Forwarded-For": visitor.address}
        root = visitor.url.removesuffix("gradio_api/")
        urllib.request.urlopen(urllib.request.Request(root + path, headers=headers), timeout=30).read()


HOSTILE: dict[Callable[[Visitor], None], int] = {flood: 4, drip: 40, bomb: 2, costly: 8, page: 8}
"""What each of the five does, and on how many threads."""


def _photo() -> bytes:
    return next(bundled("space/checkpoints/demo-part/examples").glob("good*.png")).read_bytes()


def measure(url: str, category: str, visitors: int, seconds: float, hostile: bool) -> list[float]:
    """Seconds of every inspection of the visitors."""
    end, photo, waited = time.monotonic() + seconds, _photo(), []
    # In a process of its own, so that the visitors' clients do not wait for theirs.
    attack = multiprocessing.get_context("spawn").Process(target=harm, args=(url, category, end), daemon=True)
    if hostile:
        attack.start()

    def honest(visitor: Visitor) -> None:
        time.sleep(random.random() * _PAUSE)
        while time.monotonic() < end:
            waited.append(visitor.inspect(photo))
            time.sleep(_PAUSE)

    threads = [threading.Thread(target=honest, args=(Visitor(url, i, category),)) for i in range(1, visitors + 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if hostile:
        attack.kill()
    return waited


def harm(url: str, category: str, end: float) -> None:
    """What the five do until `end`."""

    def repeat(visitor: Visitor, act: Callable[[Visitor], None]) -> None:
        while time.monotonic() < end:
            try:
                act(visitor)
            except (OSError, http.client.HTTPException):  # refused
                time.sleep(0.2)

    if hasattr(os, "nice"):  # their computers are elsewhere: they take none of the server's time
        os.nice(19)
    _bombs()
    for number, (act, count) in enumerate(HOSTILE.items(), 200):
        for _ in range(count):
            threading.Thread(target=repeat, args=(Visitor(url, number, category), act)).start()


def main(argv: list[str] | None = None) -> None:
    """Runs the measurement."""
    parser = DashedParser(prog="python -m benchmarks visitors", description=__doc__.split("\n")[0])
    parser.add_argument("--visitors", type=int, default=20, metavar="N", help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=60, metavar="S", help="of each part; default: %(default)g")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything here")
    args = parser.parse_args(argv)
    result: dict[str, Any] = {"machine": describe(torch.device("cpu")), "rows": []}
    with serving() as (url, category, server):
        for hostile in (False, True):
            waited = measure(url, category, args.visitors, args.seconds, hostile)
            row = {"visitors": args.visitors, "hostile": len(HOSTILE) * hostile, "inspections": len(waited)}
            row |= {"median_s": statistics.median(waited), "p95_s": statistics.quantiles(waited, n=20)[-1]}
            status = Path(f"/proc/{server.pid}/status")
            if status.exists():
                peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
                row["peak_gb"] = int(peak.split()[1]) / 1e6
            result["rows"].append(row)
    report(result, args.json)


@contextmanager
def serving() -> Iterator[tuple[str, str, subprocess.Popen]]:
    """The web demo with the embedded model, which has run once: its address, its category and its process."""
    checkpoints = bundled("space/checkpoints")
    category = next(path.name for path in sorted(checkpoints.iterdir()) if path.is_dir())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    environment = {**os.environ, "DIFFUSIONAD_MODELS": str(checkpoints), "GRADIO_SERVER_PORT": str(port)}
    environment["DIFFUSIONAD_PROXIES"] = "1"
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(
            [sys.executable, "-c", "from diffusionad_hf.space.app import main; main()"], env=environment, stderr=log
        )
        try:
            _wait_for(url, server)
            Visitor(url, 0, category).inspect(_photo())
            yield url, category, server
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait()


def _wait_for(url: str, server: subprocess.Popen) -> None:
    for _ in range(300):
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            if server.poll() is not None:
                raise SystemExit("the server did not start") from None
            time.sleep(0.2)
    raise SystemExit("the server did not start in a minute")


if __name__ == "__main__":
    main()
