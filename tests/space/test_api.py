"""The named endpoints, from gradio's client and from plain HTTP, against a server process."""

import csv
import json
import urllib.error
import urllib.request
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from gradio_client import handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from tests.space.test_intake import png


@pytest.fixture(scope="module")
def client(server):
    return server.client()


def test_the_endpoints_are_the_documented_ones(client):
    endpoints = client.view_api(return_format="dict")["named_endpoints"]
    assert set(endpoints) == {"/inspect", "/inspect_batch", "/calibrate"}
    names = [parameter["parameter_name"] for parameter in endpoints["/inspect"]["parameters"]]
    assert names == ["image", "category", "threshold", "calibration_file", "num_noises"]
    assert all(endpoint["description"] for endpoint in endpoints.values())


def test_inspect_answers_as_the_pipeline_does(client, model, parts):
    record, overlay = client.predict(handle_file(str(parts[1])), "flange", None, None, 1, api_name="/inspect")
    expected = model.pipe(parts[1])
    assert record["anomaly_score"] == pytest.approx(float(expected.anomaly_score[0]), abs=1e-5)
    assert record["is_anomalous"] == bool(expected.is_anomalous[0])
    assert record["threshold"] == model.pipe.threshold and record["p_value"] == float(expected.p_value[0])
    assert record["name"] == parts[1].name and not record["looks_unfamiliar"]
    Image.open(overlay).load()
    # The other arguments can be left out.
    low, _ = client.predict(image=handle_file(str(parts[1])), threshold=0.0, api_name="/inspect")
    assert low["category"] == "flange" and low["anomaly_score"] == record["anomaly_score"]
    assert low["is_anomalous"] and low["regions"]


def test_a_calibration_file_of_one_call_serves_the_next(client, parts):
    files = [handle_file(str(part)) for part in parts]
    summary, file = client.predict(files, "flange", 0.2, api_name="/calibrate")
    assert summary["images"] == 12 and summary["unusable"] == []
    record, _ = client.predict(
        image=handle_file(str(parts[0])), calibration_file=handle_file(file), api_name="/inspect"
    )
    assert record["threshold"] == pytest.approx(summary["threshold"]) and record["calibration_images"] == 12


def test_a_batch_lists_the_unusable(client, parts, tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    files = [handle_file(str(path)) for path in (*parts[:3], tmp_path / "notes.txt")]
    records, table, archive = client.predict(files, "flange", None, None, api_name="/inspect_batch")
    assert len(records) == 4 and records[-1] == {
        "name": "notes.txt",
        "error": "Not an image, or of a format that Pillow does not read.",
    }
    with open(table, encoding="utf-8-sig", newline="") as file:
        assert len(list(csv.reader(file))) == 5
    assert Path(archive).suffix == ".zip"


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
def test_bad_input_is_one_line_without_a_path_of_the_server(client, server, parts, tmp_path, arguments, reason):
    text = tmp_path / "notes.txt"
    text.write_text("hello")
    call = {"image": handle_file(str(parts[0])), "category": "flange"}
    call |= {name: handle_file(str(text)) if value == "text" else value for name, value in arguments.items()}
    with pytest.raises(AppError, match=reason) as caught:
        client.predict(**call, api_name="/inspect")
    assert str(server.temporary) not in str(caught.value) and "\n" not in str(caught.value)
    record, _ = client.predict(handle_file(str(parts[0])), api_name="/inspect")
    assert record["name"] == parts[0].name, "the page goes on"


def test_a_photo_on_its_side_is_turned_as_its_camera_says(client, parts, tmp_path):
    photo = Image.open(parts[0]).crop((0, 0, 96, 48))
    exif = photo.getexif()
    exif[0x0112] = 6
    photo.save(tmp_path / "turned.jpg", exif=exif)
    record, overlay = client.predict(image=handle_file(str(tmp_path / "turned.jpg")), api_name="/inspect")
    assert (record["width"], record["height"]) == (48, 96)
    with Image.open(overlay) as picture:
        assert picture.height == 2 * picture.width


def test_a_hostile_archive_is_rows_and_leaves_nothing_behind(client, server, tmp_path):
    with zipfile.ZipFile(tmp_path / "in.zip", "w", zipfile.ZIP_DEFLATED) as bundle:
        bundle.writestr("../../../evil.png", png())
        bundle.writestr("bomb.png", b"\0" * 60_000_000)
        link = zipfile.ZipInfo("link.png")
        link.external_attr = 0o120777 << 16
        bundle.writestr(link, "/etc/passwd")
    records, _, archive = client.predict(
        [handle_file(str(tmp_path / "in.zip"))], "flange", None, None, api_name="/inspect_batch"
    )
    assert {r["name"]: r.get("error", "")[:11] for r in records} == {
        "evil.png": "",
        "bomb.png": "Larger than",
        "link.png": "A link, whi",
    }
    assert not any(".." in name for name in zipfile.ZipFile(archive).namelist())
    assert not [*server.temporary.parent.parent.rglob("evil.png")]
    assert not [*server.temporary.glob("diffusionad-space-*/tmp*")], "unpacked files are gone"


def post(server, path, body):
    request = urllib.request.Request(
        f"{server.url}gradio_api/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    return json.load(urllib.request.urlopen(request))


def call_of_the_page(server, owner, component, data):
    """What the page sends when a control, found by its id, is moved."""
    config = json.load(urllib.request.urlopen(f"{server.url}config"))
    number = next(c["id"] for c in config["components"] if c["props"].get("elem_id") == component)
    call = next(d for d in config["dependencies"] if [number, "input"] in [list(t) for t in d["targets"]])
    return post(server, "run/predict", {"data": data, "fn_index": call["id"], "session_hash": owner})["data"]


def test_a_result_s_key_opens_nothing_for_another_visitor(client, server, parts):
    client.predict(image=handle_file(str(parts[0])), api_name="/inspect")
    owner_file = max(server.temporary.glob("diffusionad-space-*/results/*/.owner"), key=lambda f: f.stat().st_mtime)
    assert owner_file.read_text() == client.session_hash
    key = owner_file.parent.name
    verdict, pictures, _ = call_of_the_page(server, client.session_hash, "threshold", [key, 0.99, 0.6])
    assert "No defect found" in verdict and pictures
    for other, tried in (
        ("somebody", key),
        ("", key),
        (client.session_hash, "../" + key),
        (client.session_hash, [key]),
    ):
        verdict, *rest = call_of_the_page(server, other, "threshold", [tried, 0.99, 0.6])
        assert "no longer kept" in verdict and key not in json.dumps(rest)


def test_assistants_find_the_same_three_tools(server, parts):
    """Runs where the optional package `mcp` is installed."""
    pytest.importorskip("mcp", reason='pip install "mcp<2"')
    import asyncio
    import base64

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
    assert {tool.name for tool in tools} == {"inspect", "inspect_batch", "calibrate"}
    assert all(p["description"] for tool in tools for p in tool.inputSchema["properties"].values())
    assert not answer.isError and "anomaly_score" in answer.content[0].text


def test_files_of_the_server_cannot_be_named_as_input_or_fetched(server, checkpoints):
    secret = checkpoints / "flange" / "model_index.json"
    body = {"data": [{"path": str(secret), "meta": {"_type": "gradio.FileData"}}, "flange", None, None, 1]}
    event = post(server, "call/inspect", body)["event_id"]
    answer = urllib.request.urlopen(f"{server.url}gradio_api/call/inspect/{event}").read().decode()
    assert "event: error" in answer and "event: complete" not in answer
    for path in (secret, "/etc/passwd", f"{server.temporary}/../log.txt"):
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(f"{server.url}gradio_api/file={path}")


def test_answers_of_many_callers_are_not_mixed_up(server, model, parts):
    expected = dict(zip([p.name for p in parts], model.pipe(parts).anomaly_score, strict=True))

    def caller(part):
        own = server.client()
        return [own.predict(handle_file(str(part)), api_name="/inspect")[0] for _ in range(2)]

    with ThreadPoolExecutor(6) as pool:
        for part, records in zip(parts, pool.map(caller, parts), strict=True):
            for record in records:
                assert record["name"] == part.name
                assert record["anomaly_score"] == pytest.approx(float(expected[part.name]), abs=1e-5)
