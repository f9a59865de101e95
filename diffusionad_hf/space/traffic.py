"""Keeps the page usable for everyone, whatever some visitors do: what may be called, how often, and who waits."""

import asyncio
import inspect
import ipaddress
import json
import logging
import os
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import wraps
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

from gradio.queueing import Event, Queue
from gradio.utils import LRUCache

from ..files import one_line
from .decoding import SECONDS
from .intake import LIMITS, MB

logger = logging.getLogger("space")

# The routes of gradio's that the page, its clients and assistants use; the others do not exist here.
_ROUTES = re.compile(
    r"/(?:$|config/?$|gradio_api/info/?$|gradio_api/openapi\.json$|assets/|static/|svelte/|theme\.css$|favicon\.ico$"
    r"|manifest\.json$|robots\.txt$|pwa_icon|login_check/?$|gradio_api/(?:app_id|login_check|startup-events|theme\.css"
    r"|upload|upload_progress|queue/join|queue/data|call/.*|run/.*|cancel|reset|heartbeat/.*|file=(?!\w+:).*|mcp/?.*)/?$)"
)
# What a page loads many of at a time, and what is put together anew for each that asks.
_CHEAP = re.compile(r"/(?:assets|static|svelte|gradio_api/file=)")
_TOOLS = re.compile(r"/gradio_api/mcp(/|$)")
_COSTLY = re.compile(r"/(?:$|config|gradio_api/(?:info|openapi))")
_CALL = re.compile(r"/gradio_api/(?:call|run|queue/join)")
_HALF_LIFE = 60.0  # seconds after which half of what a visitor took is forgotten
FULL = "The server's disk is full for the moment. Try again in an hour."
QUICK = "draw"  # the kind of call that draws a result again


def address_of(scope: dict[str, Any]) -> str:
    """The IP address that calls, through as many proxies as the environment variable DIFFUSIONAD_PROXIES says."""
    proxies = int(os.environ.get("DIFFUSIONAD_PROXIES") or ("SPACE_ID" in os.environ))
    client = (scope.get("client") or ("unknown",))[0]
    if proxies:
        told = [value for name, value in scope["headers"] if name == b"x-forwarded-for"]
        hops = b",".join(told).decode("latin-1").split(",") if told else []
        # Each proxy appends the address that called it; what stands before, a caller may have made up.
        client = hops[-min(proxies, len(hops))].strip() if hops else client
    try:
        ip = ipaddress.ip_address(client)
    except ValueError:
        return client[:64]
    # Whoever has an IPv6 address has a whole network of them.
    return str(ip if ip.version == 4 else ipaddress.ip_network(f"{ip}/64", strict=False))


class _TooMuch(Exception):
    """A request that went beyond a limit while it was read."""


class Guard:
    """
    Middleware in front of the whole server: unknown routes, floods, endless and slow requests end here.

    Args:
        app: What it guards.
        uploads: The folder in which uploads lie.
    """

    def __init__(self, app: Any, uploads: Path):
        self.app = app
        self.uploads = uploads
        self._open: Counter[str] = Counter()
        self._uploading: Counter[str] = Counter()
        self._calls: dict[str, tuple[float, float]] = {}  # address: calls left, when
        self._stored, self._looked = 0, float("-inf")
        self._sent: dict[str, tuple[float, float]] = {}  # address: bytes of its uploads, when

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # the page uses no websockets
            await send({"type": "websocket.close"})
            return
        address, path = address_of(scope), scope["path"]
        is_upload = path.rstrip("/") == "/gradio_api/upload"
        refusal = self._refusal(scope, address, path)
        if refusal:
            await self._refuse(send, address, *refusal)
            return
        if (is_upload or _TOOLS.match(path)) and await self._is_full(address):
            await _answer(send, 507, FULL)
            return
        with _counted(self._open, address):
            if not is_upload:
                await self._serve(scope, receive, send, LIMITS.tool_bytes if _TOOLS.match(path) else LIMITS.call_bytes)
                return
            while self._uploading[address] >= LIMITS.uploading_per_address:
                await asyncio.sleep(0.02)  # its body is not read meanwhile
            with _counted(self._uploading, address):
                received = 0

                async def counted() -> dict[str, Any]:
                    nonlocal received
                    message = await receive()
                    received += len(message.get("body", b""))
                    return message

                try:
                    await self._serve(scope, counted, send, LIMITS.request_bytes)
                finally:
                    sent = self._sent_by(address) + received
                    self._sent.pop(address, None)
                    self._sent[address] = (sent, time.monotonic())
                    while len(self._sent) > 10_000:
                        del self._sent[next(iter(self._sent))]  # who has not sent for longest

    async def _serve(self, scope: dict[str, Any], receive: Any, send: Any, most_bytes: int) -> None:
        body = _Body(receive, most_bytes + MB, LIMITS.upload_seconds)  # a form adds a little to each of its files
        answering = _Answer(send, body)
        try:
            await self.app(scope, body.receive, answering.send)
        except Exception as error:
            if not isinstance(error, _TooMuch):
                logger.info("%s %s: %s", scope["method"], scope["path"][:100], one_line(error))
            await answering.fail()

    def _refusal(self, scope: dict[str, Any], address: str, path: str) -> tuple[int, str] | None:
        if not _ROUTES.match(path) or b"deep_link" in unquote_to_bytes(scope["query_string"]):
            return 404, "There is nothing here."
        if self._open[address] >= LIMITS.open_per_address or not self._may_call(address, scope["method"], path):
            return 429, "Too many requests from your address. Wait a moment."
        return None

    async def _refuse(self, send: Any, address: str, status: int, detail: str) -> None:
        """Lets whoever asks too often wait: most try again at once, and each time costs the server something."""
        if status == 429 and self._open[address] < LIMITS.open_per_address:
            with _counted(self._open, address):
                await asyncio.sleep(1)
        await _answer(send, status, detail)

    def _sent_by(self, address: str) -> float:
        """Bytes that an address uploaded, those long ago counting less."""
        sent, when = self._sent.get(address, (0.0, 0.0))
        return sent * max(0.0, 1 - (time.monotonic() - when) / 3600)

    async def _is_full(self, address: str) -> bool:
        """Whether uploads fill their share of the disk, looked up every few seconds; not all is for who sent much."""
        if time.monotonic() > self._looked + 5:
            self._looked = time.monotonic()
            self._stored = await asyncio.to_thread(bytes_in, self.uploads)
        spared = LIMITS.spared_bytes if self._sent_by(address) > LIMITS.spared_bytes / 2 else 0
        return self._stored > LIMITS.stored_bytes - spared

    def _may_call(self, address: str, method: str, path: str) -> bool:
        """Takes what a call costs of what an address has, which comes back at a steady rate."""
        begins = method == "POST" and _CALL.match(path)
        cost = 0 if _CHEAP.match(path) else 10 if _COSTLY.match(path) else 3 if begins else 1
        most, now = 15.0 * LIMITS.calls_per_second, time.monotonic()
        left, before = self._calls.pop(address, (most, now))
        while len(self._calls) > 10_000:
            del self._calls[next(iter(self._calls))]  # who has not called for longest
        left = min(most, left + (now - before) * LIMITS.calls_per_second)
        self._calls[address] = (left - cost if left >= cost else left, now)
        return left >= cost


@contextmanager
def _counted(counter: Counter[str], address: str) -> Iterator[None]:
    counter[address] += 1
    try:
        yield
    finally:
        counter[address] -= 1
        if not counter[address]:
            del counter[address]


class _Body:
    """A request's body, which ends with an error beyond a size, and if all of it takes too long."""

    def __init__(self, receive: Any, most_bytes: int, most_seconds: float):
        self._receive = receive
        self._left = self._most = most_bytes
        self._end, self._seconds = time.monotonic() + most_seconds, most_seconds
        self._done = False
        self.failure = ""

    async def receive(self) -> dict[str, Any]:
        if self._done:  # what comes now is that the caller has left
            return await self._receive()
        try:
            message = await asyncio.wait_for(self._receive(), self._end - time.monotonic())
        except asyncio.TimeoutError:
            message, self.failure = {}, f"The request took longer than {self._seconds:g} s."
        self._left -= len(message.get("body", b""))
        if self._left < 0:
            self.failure = f"The request is larger than {self._most // MB} MB."
        if self.failure:
            raise _TooMuch(self.failure)
        self._done = not message.get("more_body")
        return message


class _Answer:
    """The answer to a request, which says so if the request was cut off, whatever the server makes of that."""

    def __init__(self, send: Any, body: _Body):
        self._send = send
        self._body = body
        self._started = self._ended = False

    async def send(self, message: dict[str, Any]) -> None:
        if self._body.failure:
            await self.fail()
        elif not self._ended:
            self._started = True
            self._ended = message["type"] == "http.response.body" and not message.get("more_body")
            await self._send(message)

    async def fail(self) -> None:
        """Answers with one line; an answer that has begun ends."""
        if self._ended:
            return
        self._ended = True
        if self._started:
            await self._send({"type": "http.response.body"})
        else:
            status, said = (413, self._body.failure) if self._body.failure else (400, "This request is malformed.")
            await _answer(self._send, status, said)


async def _answer(send: Any, status: int, detail: str) -> None:
    body = json.dumps({"detail": detail}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def bytes_in(folder: Path) -> int:
    total = 0
    for entry in os.scandir(folder):
        try:
            # Small ones count for more, as there may be many.
            files = os.scandir(entry) if entry.is_dir() else [entry]
            total += sum(max(file.stat().st_size, 100_000) for file in files)
        except OSError:  # swept meanwhile
            continue
    return total


def charged(function: Callable) -> Callable:
    """The function, or generator, which tells [`FairQueue`] what it computes; what it waits for costs nothing."""

    def step(work: Callable, *args: Any, **kwargs: Any) -> Any:
        began = time.thread_time()
        try:
            return work(*args, **kwargs)
        finally:
            # None past the queue: what is done when a page closes, or an example is chosen.
            SECONDS.get([]).append(time.thread_time() - began)

    def one(*args: Any, **kwargs: Any) -> Any:
        return step(function, *args, **kwargs)

    def many(*args: Any, **kwargs: Any) -> Iterator[Any]:
        with closing(function(*args, **kwargs)) as steps:
            while (found := step(next, steps, None)) is not None:
                yield found

    # gradio reads what it passes off a function's signature.
    return wraps(function)(many if inspect.isgeneratorfunction(function) else one)


class FairQueue(Queue):
    """
    gradio's queue, in which nobody takes all places or all of the processor.

    Whoever took least of the last minutes comes first. An address runs one call of a kind at a time, and of the
    addresses that took much, one runs at all; but drawing a result again, which is quick, waits for none of them.
    """

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self._taken: dict[str, tuple[float, float]] = {}  # address: seconds, when
        self._running: dict[Event, list[float]] = {}  # seconds that they computed
        # Answers that were not fetched: gradio's 2,000 would let a flood push out other visitors' answers.
        self.pending_messages_per_session = LRUCache(20_000)

    async def push(self, body: Any, request: Any, username: str | None) -> Any:
        # gradio takes an empty name for one in one place and for none in another, and then fails for all who wait.
        body.session_hash = body.session_hash or None
        if body.session_hash and not re.fullmatch(r"[A-Za-z0-9_-]{1,100}", body.session_hash):
            return False, "A session's name has letters and digits, at most 100.", "error"
        waiting = [event for queue in self.event_queue_per_concurrency_id.values() for event in queue.queue]
        address = address_of(request.scope)
        of_address = sum(_address(event) == address for event in waiting)
        of_session = sum(event.session_hash == body.session_hash for event in waiting)
        if of_address >= LIMITS.waiting_per_address or of_session >= LIMITS.waiting_per_session:
            return False, "Too much of yours is waiting already. Try again when some of it is done.", "queue_full"
        return await super().push(body, request, username)

    def compute_analytics_summary(self, records: Any) -> dict[str, Any]:
        """Nobody reads it, and it fails for everyone once a name in it is no valid text."""
        return {}

    def get_events(self) -> tuple[list[Event], bool, str] | None:
        queues = list(self.event_queue_per_concurrency_id.items())
        random.shuffle(queues)
        for name, queue in queues:
            if queue.concurrency_limit is not None and queue.current_concurrency >= queue.concurrency_limit:
                continue
            ready = [event for event in queue.queue if self._may_run(event)]
            if ready:
                event = min(ready, key=lambda event: (self._took(_address(event)), event.enqueue_time))
                queue.queue.remove(event)
                self._running[event] = []
                return [event], False, name
        return None

    def _may_run(self, event: Event) -> bool:
        address, kind = _address(event), event.concurrency_id
        if any(_address(e) == address and e.concurrency_id == kind for e in self._running):
            return False
        if kind == QUICK or not self._is_heavy(address):
            return True
        return not any(self._is_heavy(_address(e)) for e in self._running if e.concurrency_id != QUICK)

    async def process_events(self, events: list[Event], *args: Any, **kwargs: Any) -> None:
        [event] = events  # none of our functions takes several calls at a time
        SECONDS.set(self._running[event])
        try:
            await super().process_events(events, *args, **kwargs)
        finally:
            while len(self._taken) > 10_000:
                del self._taken[next(iter(self._taken))]
            address = _address(event)
            taken = self._took(address) + sum(self._running.pop(event))
            self._taken.pop(address, None)
            self._taken[address] = (taken, time.monotonic())

    def _is_heavy(self, address: str) -> bool:
        running = sum(sum(taken) for event, taken in self._running.items() if _address(event) == address)
        return self._took(address) + running > LIMITS.light_seconds

    def _took(self, address: str) -> float:
        """Seconds that an address took, those long ago counting less."""
        seconds, when = self._taken.get(address, (0.0, 0.0))
        return seconds * 2 ** ((when - time.monotonic()) / _HALF_LIFE) if seconds else 0.0


def _address(event: Event) -> str:
    return address_of(event.request.scope)
