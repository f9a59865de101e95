"""Categories that live on a Hub: an organisation's models appear by themselves; and a full queue refuses politely."""

import json
import time
import urllib.error
import urllib.request
import zipfile

import pytest
from gradio_client import handle_file

from tests.loopback_hub import LoopbackHub
from tests.space.conftest import Server


@pytest.fixture(scope="module")
def organisation(tmp_path_factory, checkpoints):
    """A Hub with a model, somebody's other model, and one that is not for everyone."""
    folder = checkpoints / "flange"
    files = {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
    with LoopbackHub(tmp_path_factory.mktemp("hub")) as hub:
        hub.add_repo("org/flange", files)
        hub.add_repo("org/other", {"README.md": "---\ntags: [llama]\n---\n"})
        hub.add_repo("org/secret", {"README.md": "---\ntags: [diffusionad]\n---\n"}, private=True)
        yield hub


@pytest.fixture(scope="module")
def hub_server(tmp_path_factory, organisation):
    folder = tmp_path_factory.mktemp("hub-server")
    environment = organisation.environment(folder / "home", token=None)
    running = Server(folder, "org, no-such-org, org/gone", environment)
    yield running
    running.stop()


def test_an_organisation_s_models_are_the_categories(hub_server, parts):
    client = hub_server.client()
    (category,) = (
        p
        for p in client.view_api(return_format="dict")["named_endpoints"]["/inspect"]["parameters"]
        if p["parameter_name"] == "category"
    )
    assert category["type"]["enum"] == ["org/flange", "org/gone"]
    record, _ = client.predict(image=handle_file(str(parts[0])), category="org/flange", api_name="/inspect")
    assert record["category"] == "org/flange" and record["looks_unfamiliar"] is False
    assert record["calibration_images"] == 12
    with pytest.raises(Exception, match="org/gone: this model could not be loaded"):
        client.predict(image=handle_file(str(parts[0])), category="org/gone", api_name="/inspect")
    assert "no-such-org" in hub_server.log


def test_its_card_is_told_under_about(organisation, monkeypatch, tmp_path):
    from diffusionad_hf.space.models import Models, about

    organisation.adopt_client(monkeypatch, tmp_path / "home", token=None)
    models = Models("org")
    text = about(models, "org/flange")
    assert "| image AUROC | 0.875 | flanges |" in text and "One light only." in text
    assert about(Models("org/gone"), "org/gone").endswith("could not be loaded. Choose another category.")


def test_without_a_hub_the_page_says_that_it_has_no_models(monkeypatch, tmp_path, organisation, caplog):
    from diffusionad_hf.space.models import Models

    organisation.adopt_client(monkeypatch, tmp_path / "home", token=None)
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the client's attempts
    assert Models("org").names == []
    assert "org" in caplog.text


def test_a_full_queue_refuses_politely_and_recovers(hub_server, tmp_path, parts):
    """Two batches run, sixty callers wait, and the next one is told so."""
    with zipfile.ZipFile(tmp_path / "many.zip", "w") as bundle:
        for i in range(32):
            bundle.write(parts[0], f"{i}.png")
    client = hub_server.client()
    archive = [handle_file(str(tmp_path / "many.zip"))]
    batches = [client.submit(archive, "org/flange", None, None, api_name="/inspect_batch") for _ in range(2)]
    while any(batch.status().code.name != "PROCESSING" for batch in batches):
        assert not any(batch.done() for batch in batches)
        time.sleep(0.05)
    nothing = json.dumps({"data": [[], "org/flange", None, None]}).encode()
    call = urllib.request.Request(
        f"{hub_server.url}gradio_api/call/inspect_batch", nothing, {"Content-Type": "application/json"}
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        for _ in range(70):
            urllib.request.urlopen(call).close()
    assert refused.value.code == 503 and b"Queue is full" in refused.value.read()
    for batch in batches:
        assert len(batch.result(timeout=120)[0]) == 32
    record, _ = client.predict(image=handle_file(str(parts[0])), category="org/flange", api_name="/inspect")
    assert record["name"] == parts[0].name
