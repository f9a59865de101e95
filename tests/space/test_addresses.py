"""Images named by an address: from public hosts only, within limits, whatever the other side does."""

import asyncio
import gzip
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from diffusionad_hf.space import addresses
from diffusionad_hf.space.intake import LIMITS, Refusal
from tests.space.conftest import png

PUBLIC = "203.0.113.9"


class Answers(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append((self.path, self.headers["Host"], self.headers["Accept-Encoding"]))
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path[4:])
            self.end_headers()
            return
        self.send_response(404 if self.path == "/absent.png" else 200)
        if self.path == "/packed.png":
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        try:
            for piece in self.pieces():
                self.wfile.write(piece)
        except ConnectionError:
            pass

    def pieces(self):
        if self.path == "/endless.png":
            while True:
                yield b"x" * 100_000
        if self.path == "/drip.png":
            for _ in range(50):
                yield b"x"
                time.sleep(0.1)
        yield gzip.compress(b"x" * 10_000_000) if self.path == "/packed.png" else png()

    def log_message(self, *_):
        pass


@pytest.fixture
def host(monkeypatch):
    """A server that is taken for a public host named `photos.example`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    resolve = addresses._resolve

    async def resolved(name, port):
        return "127.0.0.1" if name == "photos.example" else await resolve(name, port)

    monkeypatch.setattr(addresses, "_resolve", resolved)
    limits = replace(LIMITS, fetch_seconds=1, image_bytes=1_000_000)
    monkeypatch.setattr(addresses, "LIMITS", limits)
    server.url = f"http://photos.example:{server.server_port}"
    yield server
    server.shutdown()
    server.server_close()


def fetch(url, folder):
    return asyncio.run(addresses.fetch(url, folder))


def test_an_image_is_fetched_once_resolved_and_as_it_is(host, tmp_path):
    path, name = fetch(f"{host.url}/to/{host.url}/a%20photo.png", tmp_path)
    assert path.read_bytes() == png() and path.parent.parent == tmp_path and len(path.parent.name) == 64
    assert name == "a photo.png"
    assert {(asked[1], asked[2]) for asked in host.asked} == {(host.url.removeprefix("http://"), "identity")}


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/endless.png", "larger than 0 MB"),
        ("/drip.png", "takes longer than 1 s"),
        ("/packed.png", "does not give a file"),
        ("/absent.png", "does not give a file"),
        ("/to/http://127.0.0.1:{port}/a.png", "does not give a file"),
        ("/to/http://[::1]:{port}/a.png", "does not give a file"),
        ("/to/file:///etc/passwd", "does not give a file"),
        ("/to//to//to//to//to//a.png", "does not give a file"),
    ],
)
def test_limits_hold_and_redirects_lead_nowhere_else(host, tmp_path, path, reason):
    with pytest.raises(Refusal, match=reason):
        fetch(host.url + path.format(port=host.server_port), tmp_path)
    assert not list(tmp_path.rglob("image")) and not any("127.0.0.1" in asked[1] for asked in host.asked)


def test_a_name_is_resolved_once_for_every_request(monkeypatch, tmp_path):
    """A second answer of the name server, a private one, is never asked for."""
    answers = iter([[(0, 0, 0, "", (PUBLIC, 80))], [(0, 0, 0, "", ("127.0.0.1", 80))]])
    connected = []

    async def getaddrinfo(self, *_, **__):
        return next(answers)

    async def send(self, request, **_):
        connected.append((request.url.host, request.headers["Host"], request.extensions["sni_hostname"]))
        raise OSError("no such machine")

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(addresses.httpx.AsyncClient, "send", send)
    monkeypatch.setattr(addresses, "is_public", lambda address: address == PUBLIC)
    with pytest.raises(Refusal, match="does not give a file"):
        fetch("https://rebinding.example/a.png", tmp_path)
    assert connected == [(PUBLIC, "rebinding.example", "rebinding.example")]


def test_a_host_with_one_private_address_is_refused(monkeypatch, tmp_path):
    async def getaddrinfo(self, *_, **__):
        return [(0, 0, 0, "", (address, 80)) for address in ("93.184.215.14", "127.0.0.1")]

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", getaddrinfo)
    with pytest.raises(ValueError, match="not a public address"):
        asyncio.run(addresses._resolve("mixed.example", 80))


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "224.0.0.1"]
    + ["255.255.255.255", "192.0.2.1", "198.18.0.1", "240.0.0.1", "::1", "::", "fe80::1", "fc00::1", "fec0::1"]
    + [
        "2002:7f00:1::",
        "64:ff9b::7f00:1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "::127.0.0.1",
        "64:ff9b:1::1",
        "3fff::1",
        "ff02::1",
        "2001:db8::1",
        "2001::1",
    ],
)
def test_addresses_that_are_not_for_everyone_are_not_public(address):
    assert not addresses.is_public(address)


@pytest.mark.parametrize("address", ["93.184.215.14", "8.8.8.8", "2606:2800:220:1:248:1893:25c8:1946"])
def test_public_addresses_are(address):
    assert addresses.is_public(address)


@pytest.mark.parametrize(
    "url",
    [
        "http://u:p@photos.example/a.png",
        "http://8.8.8.8:99999999999999/",
        "https://",
        "http://[",
        "http://a b/",
        "http://\0/",
    ],
)
def test_what_is_no_web_address_is_refused(host, tmp_path, url):
    with pytest.raises(Refusal, match="does not give a file"):
        fetch(url, tmp_path)
    assert not host.asked
