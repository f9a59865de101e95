"""The loopback Hub, exercised by the real `huggingface_hub` client: what other tests rely on and do not see."""

import hashlib

import pytest
from huggingface_hub import HfApi, get_session
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from tests.loopback_hub import card_errors

WEIGHTS = bytes(range(256)) * 400


def test_a_subprocess_inherits_nothing_that_concerns_another_hub(hub, monkeypatch, tmp_path):
    for name in ("HTTPS_PROXY", "HF_HUB_OFFLINE", "HF_TOKEN", "KEPT"):
        monkeypatch.setenv(name, "1")
    environment = hub.environment(tmp_path, token=None)
    assert environment["KEPT"] == "1" and not {"HTTPS_PROXY", "HF_HUB_OFFLINE", "HF_TOKEN"} & set(environment)
    assert (environment["HF_ENDPOINT"], environment["HF_HOME"]) == (hub.endpoint, str(tmp_path))


@pytest.mark.parametrize(
    ("repo_id", "revision", "token", "error", "status"),
    [
        ("org/missing", None, "token", RepositoryNotFoundError, 404),
        ("org/private", None, None, RepositoryNotFoundError, 401),
        ("org/private", None, "stranger_token", RepositoryNotFoundError, 404),
        ("org/gated", None, None, GatedRepoError, 401),
        ("org/gated", None, "stranger_token", GatedRepoError, 403),
        ("org/gated", "v9", "token", RevisionNotFoundError, 404),
        ("org/gated", None, "hf_expired", HfHubHTTPError, 401),
    ],
)
def test_what_cannot_be_read(hub, monkeypatch, tmp_path, repo_id, revision, token, error, status):
    hub.adopt_client(monkeypatch, tmp_path)
    hub.add_repo("org/private", {"config.json": "{}"}, private=True)
    hub.add_repo("org/gated", {"config.json": "{}"}, gated="manual")
    with pytest.raises(HfHubHTTPError) as caught:
        HfApi().hf_hub_download(
            repo_id, "config.json", revision=revision, token=token and getattr(hub, token, token) or False
        )
    assert type(caught.value) is error and caught.value.response.status_code == status


def test_large_files_come_from_another_host_and_in_ranges(hub):
    hub.add_repo("org/screw", {"w.bin": WEIGHTS})
    token = {"authorization": f"Bearer {hub.token}"}
    redirect = get_session().get(f"{hub.endpoint}/org/screw/resolve/main/w.bin", headers=token, follow_redirects=False)
    assert (redirect.status_code, redirect.headers["X-Linked-Size"]) == (302, str(len(WEIGHTS)))
    assert redirect.headers["X-Linked-Etag"] == f'"{hashlib.sha256(WEIGHTS).hexdigest()}"'
    link = redirect.headers["Location"]
    assert not link.startswith(hub.endpoint)
    part = get_session().get(link, headers={"Range": "bytes=100-199"})
    assert (part.status_code, part.content) == (206, WEIGHTS[100:200])
    assert get_session().get(link, headers=token).status_code == 400, "a token must not leave the Hub"
    assert get_session().get(f"{hub.endpoint}/api/models/org/screw/likers").status_code == 404


RESULT = "{task: {type: t}, dataset: {type: d, name: D}, metrics: [{type: a, value: 1}]}"


@pytest.mark.parametrize(
    ("metadata", "complaint"),
    [
        ("license: my-own", "license"),
        ("tags: [a: b", "YAML"),
        (f"model-index: [{{name: x, results: [{RESULT.replace('type: d, ', '')}]}}]", "dataset.type"),
        (f"model-index: [{{name: x, results: [{RESULT.replace('1', '.nan')}]}}]", "value"),
        ("sdk: flask", "sdk"),
        ("short_description: " + "x" * 61, "short_description"),
    ],
)
def test_cards_that_the_hub_refuses(metadata, complaint):
    (error,) = card_errors(f"---\n{metadata}\n---\n", "space")
    assert complaint in error
