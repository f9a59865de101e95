"""The named endpoints, from gradio's client and from plain HTTP, against a server process."""

import asyncio
import base64
import csv
import hashlib
import html
import json
import re
import urllib.error
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

import numpy as np
import pytest
from gradio_client import handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from tests.space.conftest import archive, inspect, png


@pytest.fixture(scope="module")
def client(server):
    return server.client()


def sent(*files):
    return [handle_file(str(file)) for file in files]


def test_the_endpoints_are_the_documented_ones(client):
    endpoints = client.view_api(return_format="dict")["named_endpoints"]
    teaching = {"/train", "/training_status", "/training_result"}
    assert set(endpoints) == {"/inspect", "/inspect_batch", "/calibrate", *teaching}
    names = [parameter["parameter_name"] for parameter in endpoints["/inspect"]["parameters"]]
    assert names == ["image", "category", "threshold", "calibration_file", "num_noises", "training"]
    assert all(endpoint["description"] for endpoint in endpoints.values())


def test_inspect_answers_as_the_pipeline_does(client, model, parts):
    record, overlay = client.predict(handle_file(str(parts[1])), "flange", None, None, 1, api_name="/inspect")
    expected = model.pipe(parts[1])
    assert record["anomaly_score"] == pytest.approx(float(expected.anomaly_score[0]), abs=1e-5)
    assert record["is_anomalous"] == bool(expected.is_anomalous[0])
    assert (record["verdict"], record["reason"]) == (expected.verdict[0].word, "calibrated")
    assert record["threshold"] == model.pipe.threshold and record["p_value"] == float(expected.p_value[0])
    assert record["name"] == parts[1].name and (record["width"], record["height"]) == (96, 96)
    assert not record["looks_unfamiliar"] and not record["settings_changed"]
    Image.open(overlay).load()
    # The other arguments can be left out.
    low, _ = inspect(client, parts[1], threshold=0.0)
    assert low["category"] == "flange" and low["anomaly_score"] == record["anomaly_score"]
    assert low["is_anomalous"] and low["regions"]
    assert low["sentence"] == f"At your threshold 0; calibrated: {model.pipe.threshold:.4g}."


def test_a_calibration_file_of_one_call_serves_the_next(client, parts):
    summary, file = client.predict(sent(*parts), "flange", 0.2, api_name="/calibrate")
    assert summary["images"] == 12 and summary["unusable"] == []
    record, _ = inspect(client, parts[0], calibration_file=handle_file(file))
    assert record["threshold"] == pytest.approx(summary["threshold"]) and record["calibration_images"] == 12


def test_a_batch_lists_the_unusable(client, parts, notes):
    records, table, bundle = client.predict(sent(*parts[:3], notes), "flange", None, None, api_name="/inspect_batch")
    assert len(records) == 4 and records[-1]["name"] == "notes.txt" and "Not an image" in records[-1]["error"]
    with open(table, encoding="utf-8-sig", newline="") as file:
        assert len(list(csv.reader(file))) == 5
    assert ZipFile(bundle).testzip() is None


def test_a_hidden_file_stops_no_other_photo(client, parts, tmp_path):
    hidden = tmp_path / "._part.png"
    hidden.write_bytes(b"what macOS leaves beside a photo")
    records, _, _ = client.predict(sent(hidden, parts[0]), "flange", None, None, api_name="/inspect_batch")
    assert [record["name"] for record in records] == [parts[0].name]
    with pytest.raises(AppError, match="A hidden file"):
        inspect(client, hidden)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"image": None}, "Choose an image first"),
        ({"image": "text"}, "notes.txt: not an image"),
        ({"category": "no-such"}, "There is no category 'no-such'"),
        ({"category": "no-one/no-such-model"}, "could not be loaded"),
        ({"category": "fragile"}, "fragile: the model failed on this image"),
        ({"threshold": 7}, "threshold must be a number from 0 to 1"),
        ({"num_noises": 1000}, "Noise draws must be a whole number from 1 to 16"),
        ({"calibration_file": "text"}, "not a calibration file"),
    ],
)
def test_bad_input_is_one_line_without_a_path_of_the_server(client, server, parts, notes, arguments, reason):
    call = {"image": handle_file(str(parts[0])), "category": "flange"}
    call |= {name: handle_file(str(notes)) if value == "text" else value for name, value in arguments.items()}
    with pytest.raises(AppError, match=reason) as caught:
        client.predict(**call, api_name="/inspect")
    assert str(server.temporary) not in str(caught.value) and "\n" not in str(caught.value)
    assert inspect(client, parts[0])[0]["name"] == parts[0].name, "the page goes on"


def test_a_photo_on_its_side_is_turned_as_its_camera_says(client, parts, tmp_path):
    photo = Image.open(parts[0]).crop((0, 0, 96, 48))
    exif = photo.getexif()
    exif[0x0112] = 6
    photo.save(tmp_path / "turned.jpg", exif=exif)
    record, overlay = inspect(client, tmp_path / "turned.jpg")
    width, height = Image.open(overlay).size
    assert (record["width"], record["height"]) == (48, 96) and height == 2 * width


def test_a_hostile_archive_is_rows_and_leaves_nothing_behind(client, server, tmp_path):
    link = ZipInfo("link.png")
    link.external_attr = 0o120777 << 16
    members = [("../../../evil.png", png()), ("bomb.png", b"\0" * 60_000_000), (link, "/etc/passwd")]
    hostile = archive(tmp_path / "in.zip", members, compression=ZIP_DEFLATED)
    records, _, bundle = client.predict(sent(hostile), "flange", None, None, api_name="/inspect_batch")
    reasons = {record["name"]: record.get("error", "")[:6] for record in records}
    assert reasons == {"evil.png": "", "bomb.png": "Larger", "link.png": "A link"}
    assert not any(".." in name for name in ZipFile(bundle).namelist())
    assert not [*server.temporary.parent.parent.rglob("evil.png")]
    assert not [*server.temporary.glob("diffusionad-space-*/tmp*")], "unpacked files are gone"


def status_of(url):
    try:
        return urllib.request.urlopen(url).status
    except urllib.error.HTTPError as error:
        return error.code


def call_of_the_page(server, owner, component, data):
    """What the page sends when a control, found by its id, is moved."""
    config = json.load(urllib.request.urlopen(f"{server.url}config"))
    number = next(c["id"] for c in config["components"] if c["props"].get("elem_id") == component)
    call = next(d for d in config["dependencies"] if [number, "input"] in [list(t) for t in d["targets"]])
    return server.queued({"data": data, "fn_index": call["id"], "session_hash": owner})


def test_a_result_s_key_opens_nothing_for_another_visitor(client, server, parts):
    inspect(client, parts[0])
    owner_file = max(server.temporary.glob("diffusionad-space-*/results/*/.owner"), key=lambda f: f.stat().st_mtime)
    assert owner_file.read_text() == hashlib.sha256(client.session_hash.encode()).hexdigest()
    key, mine = owner_file.parent.name, client.session_hash
    verdict, pictures, *_ = call_of_the_page(server, mine, "threshold", [key, 0.99, 0.6, 10, None])
    assert "no defect found" in verdict and pictures
    hashed = hashlib.sha256(mine.encode()).hexdigest()
    for other, tried in (("somebody", key), (hashed, key), (mine, "../" + key)):
        verdict, *rest = call_of_the_page(server, other, "threshold", [tried, 0.99, 0.6, 10, None])
        assert "no longer kept" in verdict and key not in json.dumps(rest)
    assert (
        "must be a number or a text"
        in call_of_the_page(server, mine, "threshold", [[key], 0.99, 0.6, 10, None])["error"]
    )
    # Nor is anything of it served, though the owner sees its pictures.
    served = [urllib.parse.unquote(path) for path in re.findall(r"file=([^\"'&?)]+)", html.unescape(pictures))]
    assert served
    assert all(urllib.request.urlopen(f"{server.url}gradio_api/file={path}").status == 200 for path in served)
    private = [path for path in owner_file.parent.rglob("*") if path.is_file()]
    beside = [str(Path(path).parent / name) for path in served for name in ("original", "map.npy", "photo.jpg", "..")]
    assert len(private) > 5 and all(key not in path for path in served)
    for path in {*map(str, private), *beside} - set(served):
        assert status_of(f"{server.url}gradio_api/file={path}") == 403, path


def test_assistants_find_the_same_tools(server, parts):
    """Runs where the optional package `mcp` is installed."""
    pytest.importorskip("mcp", reason='pip install "mcp<2"')
    from mcp import ClientSession
    from mcp.client.streamable_http import streamable_http_client

    photo = "data:image/png;base64," + base64.b64encode(parts[0].read_bytes()).decode()

    async def talk():
        async with streamable_http_client(f"{server.url}gradio_api/mcp/") as (read, write, _):
            async with ClientSession(read, write) as session:
                await session.initialize()
                tools = (await session.list_tools()).tools
                return tools, await session.call_tool("inspect", {"image": photo, "category": "flange"})

    tools, answer = asyncio.run(talk())
    teaching = {"train", "training_status", "training_result"}
    assert {tool.name for tool in tools} == {"inspect", "inspect_batch", "calibrate", *teaching}
    assert all(p["description"] for tool in tools for p in tool.inputSchema["properties"].values())
    assert not answer.isError and "anomaly_score" in answer.content[0].text


def test_files_of_the_server_cannot_be_named_as_input_or_fetched(server, checkpoints):
    secret = checkpoints / "flange" / "model_index.json"
    body = {"data": [{"path": str(secret), "meta": {"_type": "gradio.FileData"}}, "flange", None, None, 1]}
    event = server.post("call/inspect", body)["event_id"]
    answer = urllib.request.urlopen(f"{server.url}gradio_api/call/inspect/{event}").read().decode()
    assert "event: error" in answer and "event: complete" not in answer
    for path in (secret, "/etc/passwd", f"{server.temporary}/../log.txt"):
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(f"{server.url}gradio_api/file={path}")


def test_answers_of_many_callers_are_not_mixed_up(server, model, parts):
    def caller(part):
        own = server.client()
        return [inspect(own, part)[0] for _ in range(2)]

    with ThreadPoolExecutor(6) as pool:
        records = sum(pool.map(caller, parts), [])
    assert [record["name"] for record in records] == [part.name for part in parts for _ in range(2)]
    expected = np.repeat(model.pipe(parts).anomaly_score, 2)
    np.testing.assert_allclose([record["anomaly_score"] for record in records], expected, atol=1e-5)
