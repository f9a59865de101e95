"""Who may call how often, and who waits for whom."""

import asyncio
import base64
import json
import time
from contextvars import ContextVar
from dataclasses import replace
from types import SimpleNamespace

import gradio as gr
import pytest
from gradio.state_holder import SessionState
from PIL import Image

from diffusionad_hf.space import decoding, traffic
from diffusionad_hf.space.decoding import decode
from diffusionad_hf.space.intake import LIMITS, MB, Refusal
from diffusionad_hf.space.page import Page
from diffusionad_hf.space.traffic import FairQueue, Guard, address_of, charged


def scope(path="/config", address="192.0.2.1", **more):
    return {
        "type": "http",
        "method": "POST",
        "path": path,
        "query_string": b"",
        "headers": [],
        "client": (address, 1),
    } | more


def test_a_caller_s_address_is_what_the_last_trusted_proxy_saw(monkeypatch):
    headers = [(b"x-forwarded-for", b"1.1.1.1, 2.2.2.2"), (b"x-forwarded-for", b"3.3.3.3")]
    monkeypatch.delenv("SPACE_ID", raising=False)
    for proxies, expected in {"0": "192.0.2.1", "1": "3.3.3.3", "2": "2.2.2.2", "9": "1.1.1.1"}.items():
        monkeypatch.setenv("DIFFUSIONAD_PROXIES", proxies)
        assert address_of(scope(headers=headers)) == expected
        assert address_of(scope()) == "192.0.2.1"
    monkeypatch.delenv("DIFFUSIONAD_PROXIES")
    assert address_of(scope(headers=headers)) == "192.0.2.1"
    monkeypatch.setenv("SPACE_ID", "org/space")
    assert address_of(scope(headers=headers)) == "3.3.3.3"


def test_a_network_of_ipv6_is_one_address():
    assert address_of(scope(address="2001:db8::1")) == address_of(scope(address="2001:db8::ffff")) == "2001:db8::/64"
    assert address_of(scope(address="2001:db8:0:1::1")) != "2001:db8::/64"


class Server:
    """Behind a guard: reads each request to its end, and answers once it may."""

    def __init__(self, folder):
        self.guard = Guard(self, folder)
        self.reading = self.most = 0
        self.go_on = asyncio.Event()

    async def __call__(self, scope, receive, send):
        self.reading += 1
        self.most = max(self.most, self.reading)
        while (await receive()).get("more_body"):
            pass
        await self.go_on.wait()
        self.reading -= 1
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    async def ask(self, path, size=0, address="192.0.2.1"):
        sent, pieces = [], [b"x" * MB] * (size // MB) + [b""]

        async def receive():
            return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}

        async def send(message):
            sent.append(message)

        await self.guard(scope(path, address), receive, send)
        return sent[0]["status"], json.loads(sent[-1]["body"])


def test_a_page_may_send_many_photos_at_once_and_nothing_else_is_large(tmp_path, monkeypatch):
    monkeypatch.setattr(traffic, "LIMITS", replace(LIMITS, upload_bytes=MB, request_bytes=8 * MB, call_bytes=MB))

    async def run():
        server = Server(tmp_path)
        server.go_on.set()
        return [
            (await server.ask(path, size * MB))[0]
            for path, size in (("/gradio_api/upload", 8), ("/gradio_api/upload", 11), ("/gradio_api/call/upload", 4))
        ]

    assert asyncio.run(run()) == [200, 413, 413]


def test_uploads_of_an_address_wait_for_one_another_and_for_nobody_else(tmp_path):
    async def run():
        server = Server(tmp_path)
        mine = [asyncio.create_task(server.ask("/gradio_api/upload")) for _ in range(10)]
        await asyncio.sleep(0.1)
        assert server.reading == LIMITS.uploading_per_address
        other = asyncio.create_task(server.ask("/gradio_api/upload", address="192.0.2.2"))
        await asyncio.sleep(0.1)
        assert server.reading == LIMITS.uploading_per_address + 1
        waiting = mine.pop()
        waiting.cancel()
        server.go_on.set()
        answers = await asyncio.gather(*mine, other)
        return [status for status, _ in answers], server.guard

    statuses, guard = asyncio.run(run())
    assert statuses == [200] * 10 and not guard._open and not guard._uploading, "nothing is counted for ever"


def test_connections_of_an_address_are_limited(tmp_path):
    async def run():
        server = Server(tmp_path)
        many = [asyncio.create_task(server.ask("/gradio_api/queue/data")) for _ in range(LIMITS.open_per_address)]
        await asyncio.sleep(0.1)
        refused, _ = await server.ask("/gradio_api/queue/data")
        other = asyncio.create_task(server.ask("/gradio_api/queue/data", address="192.0.2.2"))
        server.go_on.set()
        return refused, {status for status, _ in await asyncio.gather(*many, other)}

    assert asyncio.run(run()) == (429, {200})


def test_a_call_counts_more_than_what_a_page_is_made_of_and_who_asks_too_often_waits(tmp_path, monkeypatch):
    now, waited = 1000.0, []

    async def sleep(seconds):
        waited.append(seconds)

    monkeypatch.setattr(traffic.time, "monotonic", lambda: now)
    monkeypatch.setattr(traffic.asyncio, "sleep", sleep)

    async def count(path, address):
        server, answered = Server(tmp_path), 0
        server.go_on.set()
        while (await server.ask(path, address=address))[0] == 200:
            answered += 1
        assert not server.guard._open, "nothing is counted for ever"
        return answered

    paths = ("/gradio_api/heartbeat/a", "/gradio_api/queue/join", "/gradio_api/call/inspect", "/config")
    assert [asyncio.run(count(path, "192.0.2.1")) for path in paths] == [300, 100, 100, 30]
    assert waited == [1] * 4


def test_a_full_disk_refuses_uploads_and_many_small_files_fill_it(tmp_path, monkeypatch):
    monkeypatch.setattr(traffic, "LIMITS", replace(LIMITS, stored_bytes=MB))

    async def ask(path):
        server = Server(tmp_path)
        server.go_on.set()
        return (await server.ask(path))[0]

    assert asyncio.run(ask("/gradio_api/upload")) == 200
    for number in range(11):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "a").write_bytes(b"x")
    assert asyncio.run(ask("/gradio_api/upload")) == asyncio.run(ask("/gradio_api/mcp/")) == 507
    assert asyncio.run(ask("/gradio_api/queue/join")) == 200


def test_files_in_texts_do_not_fill_the_disk_either(tmp_path, monkeypatch):
    page = Page(tmp_path)
    photo = {"path": "data:image/png;base64," + base64.b64encode(b"x" * 3 * MB).decode()}
    assert asyncio.run(page._fetched(photo))["path"].startswith(str(tmp_path))
    monkeypatch.setattr("diffusionad_hf.space.page.LIMITS", replace(LIMITS, stored_bytes=4 * MB, spared_bytes=2 * MB))
    with pytest.raises(Refusal, match="disk is full"):
        asyncio.run(page._fetched(photo))


def test_one_address_does_not_fill_the_disk_for_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(traffic, "LIMITS", replace(LIMITS, stored_bytes=8 * MB, spared_bytes=2 * MB))

    async def run():
        server = Server(tmp_path)
        server.go_on.set()
        before = await server.ask("/gradio_api/upload", 7 * MB)
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "photo.png").write_bytes(b"x" * 7 * MB)
        server.guard._looked = float("-inf")
        theirs = await server.ask("/gradio_api/upload", MB, "192.0.2.2")
        mine = await server.ask("/gradio_api/upload")
        return [status for status, _ in (before, theirs, mine)]

    assert asyncio.run(run()) == [200, 200, 507]


@pytest.fixture
def queue():
    queue = FairQueue(live_updates=True, concurrency_count=9, update_intervals=1, max_size=9, blocks=gr.Blocks())
    for name, limit in (("inspect", 3), ("batch", 2), ("draw", 2)):
        queue.event_queue_per_concurrency_id[name] = SimpleNamespace(
            queue=[], concurrency_limit=limit, current_concurrency=0
        )
    return queue


class Call(SimpleNamespace):
    __hash__ = object.__hash__


def wait(queue, address, kind="inspect"):
    waiting = queue.event_queue_per_concurrency_id[kind].queue
    call = Call(request=SimpleNamespace(scope=scope(address=address)), concurrency_id=kind, enqueue_time=len(waiting))
    waiting.append(call)
    return call


def next_of(queue):
    found = queue.get_events()
    return found and found[0][0]


def test_an_address_runs_one_call_of_a_kind_and_the_others_pass_it(queue):
    first, second, other = wait(queue, "1.1.1.1"), wait(queue, "1.1.1.1"), wait(queue, "2.2.2.2")
    assert [next_of(queue), next_of(queue), next_of(queue)] == [first, other, None]
    batch = wait(queue, "1.1.1.1", "batch")
    assert next_of(queue) is batch
    del queue._running[first]
    assert next_of(queue) is second


def test_who_took_least_comes_first_and_what_was_taken_is_forgotten(queue, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(traffic.time, "monotonic", lambda: now)
    queue._taken |= {"1.1.1.1": (4.0, now), "2.2.2.2": (2.0, now)}
    greedy, modest, new = (wait(queue, address) for address in ("1.1.1.1", "2.2.2.2", "3.3.3.3"))
    assert [next_of(queue), next_of(queue), next_of(queue)] == [new, modest, greedy]
    now += 60
    assert queue._took("1.1.1.1") == pytest.approx(2)


def test_of_those_who_took_much_one_runs_at_a_time(queue, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(traffic.time, "monotonic", lambda: now)
    queue._taken |= dict.fromkeys(("1.1.1.1", "2.2.2.2"), (2 * LIMITS.light_seconds, now))
    first, second = wait(queue, "1.1.1.1"), wait(queue, "2.2.2.2", "batch")
    running = next_of(queue)
    assert running in (first, second) and next_of(queue) is None
    light, moved = wait(queue, "3.3.3.3"), wait(queue, "1.1.1.1", "draw")
    # Whose batch runs can go on moving the sliders.
    assert {next_of(queue), next_of(queue)} == {light, moved}
    del queue._running[running]
    assert next_of(queue) in {first, second} - {running}
    queue._running[light].append(LIMITS.light_seconds + 1)
    wait(queue, "3.3.3.3", "batch")
    assert next_of(queue) is None


def run(queue, monkeypatch, call, work):
    """Lets the queue call a function, or take all of a generator, in a thread, as gradio does."""

    async def process(self, events):
        found.append(await asyncio.to_thread(work))

    found = []
    monkeypatch.setattr(traffic.Queue, "process_events", process)
    assert next_of(queue) is call
    asyncio.run(queue.process_events([call]))
    return found[0]


def busy(seconds):
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def test_what_a_call_computes_is_charged_to_its_address_and_what_it_waits_for_is_not(queue, monkeypatch):
    @charged
    def failing():
        time.sleep(0.2)
        busy(0.05)
        raise RuntimeError("failed")

    with pytest.raises(RuntimeError):
        run(queue, monkeypatch, wait(queue, "1.1.1.1"), failing)
    assert 0.04 < queue._took("1.1.1.1") < 0.15 and not queue._running


def test_every_step_of_a_batch_is_charged(queue, monkeypatch):
    @charged
    def steps():
        for _ in range(3):
            busy(0.02)
            yield 1

    assert run(queue, monkeypatch, wait(queue, "1.1.1.1"), lambda: list(steps())) == [1, 1, 1]
    assert 0.05 < queue._took("1.1.1.1") < 0.15
    assert list(steps()) == [1, 1, 1]  # past the queue


def test_decoding_is_charged_too(queue, monkeypatch, tmp_path):
    Image.new("RGB", (4000, 4000)).save(tmp_path / "large.png")
    work = charged(lambda: decode(tmp_path / "large.png", 50_000_000)[0].shape)
    assert run(queue, monkeypatch, wait(queue, "1.1.1.1"), work) == (3, 4000, 4000)
    with_decoding = queue._took("1.1.1.1")
    monkeypatch.setattr(decoding, "SECONDS", ContextVar("seconds elsewhere"))
    run(queue, monkeypatch, wait(queue, "2.2.2.2"), work)
    assert with_decoding > queue._took("2.2.2.2") + 0.05


def test_a_session_keeps_nothing_of_how_the_page_looks(tmp_path):
    """Gradio's takes the server's time and memory for every call that comes without a session."""
    with Page(tmp_path) as page:
        shown = gr.Textbox("hello")
    session = SessionState(page)
    assert not any(session.config_values.values())
    session[shown._id] = shown  # as after every answer
    assert not any(session.config_values.values())
    assert session[shown._id] is shown
    # The page itself is told everything.
    [component] = [c for c in page.get_config_file()["components"] if c["id"] == shown._id]
    assert component["props"]["value"] == "hello"
