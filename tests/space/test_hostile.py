"""Visitors who mean harm: what they send is refused in a line, and the page goes on for everyone else."""

import base64
import http.client
import json
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.space.conftest import inspect


def elsewhere(path, url, body=None, address="198.51.100.7"):
    """Status and body of a request that comes from an address of its own, so that its limits concern no other test."""
    headers = {"X-Forwarded-For": address, "Content-Type": "application/json"}
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url + path, data, headers)) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def call(server, payload):
    """The error of a call of `/inspect` with a payload that no client of gradio's makes."""
    return error_of(server, "inspect", {"data": [payload, "flange", None, None, 1]})


def error_of(server, endpoint, body):
    event = server.post(f"call/{endpoint}", body)["event_id"]
    answer = urllib.request.urlopen(f"{server.url}gradio_api/call/{endpoint}/{event}").read().decode()
    assert "event: error" in answer and "event: complete" not in answer
    return json.loads(answer.partition("data: ")[2].splitlines()[0])["error"]


@pytest.fixture(scope="module")
def client(server):
    return server.client()


def test_no_file_of_the_server_s_is_read_in_any_spelling_of_a_payload(server, client, parts, checkpoints):
    inspect(client, parts[0])
    someones = next(server.temporary.glob("diffusionad-space-*/results/*/photo.jpg"))
    refusals, meta = set(), {"meta": {"_type": "gradio.FileData"}}
    for path in (parts[0], someones, checkpoints / "flange", "/no/such.png", "/proc/self/fd/3", "/dev/stdin"):
        file = {"path": str(path)}
        marked = {**file, "meta": {"_type": "gradio.FileData"}, "url": "http://example.com/x.png", "is_stream": True}
        refusals |= {call(server, payload) for payload in (file, marked)}
        assert {call(server, payload) for payload in ([file], [marked])} == {"Only one file is taken here."}
        body = {"data": [[file, {**file, **meta}], "flange", None, None]}
        refusals.add(error_of(server, "inspect_batch", body))
    assert refusals == {"This file is not among your uploads. Upload it again."}
    for payload in (
        "/etc/passwd",
        {"image": {"path": "/etc/passwd"}},
        {"path": {"path": "/etc/passwd"}},
        {"path": ["/etc"]},
    ):
        assert call(server, payload) == "A file must be given as an upload or an address."


def test_texts_for_files_are_files_or_refused(server, parts):
    """As assistants send them."""
    for text, words in ((str(parts[0]), "not among your uploads"), ("x", "not among"), ("data", "not among")):
        assert words in error_of(server, "inspect_batch", {"data": [[text], "flange", None, None, None]})
    photo = "data:image/png;base64," + base64.b64encode(parts[0].read_bytes()).decode()
    event = server.post("call/inspect_batch", {"data": [[photo], "flange", None, None, None]})["event_id"]
    answer = urllib.request.urlopen(f"{server.url}gradio_api/call/inspect_batch/{event}").read().decode()
    assert "event: complete" in answer and '"anomaly_score"' in answer


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "0x7f.1", "2130706433", "[::ffff:127.0.0.1]"])
def test_addresses_inside_the_server_s_network_are_refused(server, host):
    port = server.url.split(":")[2]
    error = call(server, {"path": f"http://{host}:{port}favicon.ico", "meta": {"_type": "gradio.FileData"}})
    assert "this address does not give a file" in error


@pytest.mark.parametrize(
    "path",
    ["monitoring", "monitoring/summary", "gradio_api/vibe-code", "gradio_api/proxy=http://example.com/", "docs"]
    + ["gradio_api/file=http://example.com/", "gradio_api/runs", "gradio_api/token", "?deep_link=a"],
)
def test_routes_that_the_page_does_not_use_do_not_exist(server, path):
    status, body = elsewhere(path, server.url)
    assert status == 404 and json.loads(body) == {"detail": "There is nothing here."}


def test_values_may_be_left_out_at_the_end_if_they_need_not_be_given(server):
    assert error_of(server, "inspect", {"data": [None]}) == "This call takes 6 values, not 1."
    assert error_of(server, "inspect", {"data": [None, "flange"]}) == error_of(
        server, "inspect", {"data": [None, "flange", None, None, 1, None]}
    )


@pytest.mark.parametrize("name", ["run", "api"])
def test_queued_functions_cannot_be_called_past_the_queue(server, name):
    body = {"data": [None, "flange", None, None, 1]}
    assert elsewhere(f"gradio_api/{name}/inspect", server.url, body)[0] == 404


def test_one_session_does_not_fill_the_queue(server, client, parts):
    """Its calls beyond its share are refused, and another visitor is served meanwhile."""
    config = json.load(urllib.request.urlopen(f"{server.url}config"))
    index = next(d["id"] for d in config["dependencies"] if d["api_name"] == "inspect")
    body = {"data": [None, "flange", None, None, 1], "session_hash": "greedy", "fn_index": index}
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: elsewhere("gradio_api/queue/join", server.url, body), range(60)))
    refused = [body for status, body in answers if status == 503]
    assert 0 < len(refused) < 60 and all(b"Too much of yours is waiting" in body for body in refused)
    assert inspect(client, parts[1])[0]["name"] == parts[1].name


@pytest.mark.parametrize("session", ["a\ud800", "a b", "\0", "x" * 101, "../x"])
def test_a_session_s_name_is_plain(server, client, parts, session):
    config = json.load(urllib.request.urlopen(f"{server.url}config"))
    index = next(d["id"] for d in config["dependencies"] if d["api_name"] == "inspect")
    body = {"data": [None, "flange", None, None, 1], "session_hash": session, "fn_index": index}
    status, answer = elsewhere("gradio_api/queue/join", server.url, body)
    assert status == 400 and b"letters and digits" in answer


def test_only_uploads_may_be_large(server):
    """Whatever the last part of an address is."""
    body = {"data": ["x" * 4_000_000]}
    for path in ("run/upload", "call/upload", "run/mcp", "call/mcp"):
        assert elsewhere(f"gradio_api/{path}", server.url, body)[0] == 413, path


def test_a_flood_from_one_address_is_slowed_down(server, client, parts):
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: elsewhere("config", server.url, address="198.51.100.8")[0], range(60)))
    assert set(answers) == {200, 429} and inspect(client, parts[0])[0]["name"] == parts[0].name
    time.sleep(1)
    assert elsewhere("config", server.url, address="198.51.100.8")[0] == 200


def test_a_request_that_is_too_large_is_cut_off(server):
    connection = http.client.HTTPConnection(server.url.split("/")[2])
    connection.putrequest("POST", "/gradio_api/call/inspect")
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Transfer-Encoding", "chunked")
    connection.endheaders()
    sent = 0
    try:
        for _ in range(50):
            connection.send(b"f4240\r\n%s\r\n" % (b" " * 1_000_000))
            sent += 1
            time.sleep(0.01)
    except ConnectionError:
        pass
    assert sent < 50 or connection.getresponse().status == 413
