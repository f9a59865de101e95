"""Categories that live on a Hub: an organisation's models appear by themselves; and a full queue refuses politely."""

import time
import urllib.error
from concurrent.futures import ThreadPoolExecutor

import pytest
from gradio_client import handle_file

from diffusionad_hf.space.models import Models, about
from tests.loopback_hub import LoopbackHub
from tests.space.conftest import Server, copies, inspect


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
    parameters = client.view_api(return_format="dict")["named_endpoints"]["/inspect"]["parameters"]
    types = {parameter["parameter_name"]: parameter["type"] for parameter in parameters}
    assert types["category"]["enum"] == ["org/flange", "org/gone"]
    record, _ = inspect(client, parts[0], category="org/flange")
    assert record["category"] == "org/flange" and record["looks_unfamiliar"] is False
    assert record["calibration_images"] == 12
    with pytest.raises(Exception, match="org/gone: this model could not be loaded"):
        inspect(client, parts[0], category="org/gone")
    assert "no-such-org" in hub_server.log


def test_its_card_is_told_under_about(organisation, monkeypatch, tmp_path):
    organisation.adopt_client(monkeypatch, tmp_path / "home", token=None)
    text = about(Models("org"), "org/flange")
    assert "| image AUROC | 0.875 | flanges |" in text and "Calibrated on 12 normal images" in text
    assert text.endswith("### Limits\n\n- One light only.\n- Steel only.")
    assert about(Models("org/gone"), "org/gone").endswith("could not be loaded. Choose another category.")


def test_without_a_hub_the_page_says_that_it_has_no_models(monkeypatch, tmp_path, organisation, caplog):
    organisation.adopt_client(monkeypatch, tmp_path / "home", token=None)
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the client's attempts
    assert Models("org").names == []
    assert "org" in caplog.text


def test_a_full_queue_refuses_politely_and_recovers(hub_server, tmp_path, parts):
    client = hub_server.client()
    many = [handle_file(str(copies(tmp_path / "many.zip", parts[0], 32)))]
    batches = [client.submit(many, "org/flange", None, None, api_name="/inspect_batch") for _ in range(2)]
    while not any(batch.status().code.name == "PROCESSING" for batch in batches):
        assert not any(batch.done() for batch in batches)
        time.sleep(0.05)
    empty = {"data": [[], "org/flange", None, None]}
    # Faster than they are refused for holding nothing.
    with ThreadPoolExecutor(32) as pool, pytest.raises(urllib.error.HTTPError) as refused:
        list(pool.map(lambda _: hub_server.post("call/inspect_batch", empty), range(90)))
    assert refused.value.code == 503 and b"Too much of yours is waiting" in refused.value.read()
    for batch in batches:
        assert len(batch.result(timeout=120)[0]) == 32
    assert inspect(client, parts[0], category="org/flange")[0]["name"] == parts[0].name
