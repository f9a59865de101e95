"""The loopback Hub, exercised by the real `huggingface_hub` client: a test double that lies is worse than none."""

import hashlib
import inspect
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi, snapshot_download
from huggingface_hub.errors import (
    BadRequestError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session

from tests import loopback_hub
from tests.loopback_hub import LoopbackHub, metadata_of

hub = loopback_hub.hub  # the fixture
WEIGHTS = bytes(range(256)) * 400  # binary, so it goes through LFS whatever its name


@pytest.fixture
def api(hub, monkeypatch, tmp_path):
    """The client of this process, pointed at the loopback Hub with an empty cache and the user's token."""
    hub.adopt_client(monkeypatch, tmp_path / "home")
    return HfApi()


@pytest.fixture
def waits(monkeypatch):
    """The seconds that the client wanted to wait between attempts, without waiting them."""
    seconds = []
    monkeypatch.setattr("time.sleep", seconds.append)
    return seconds


def asked(hub, *methods, path=""):
    """The requests with one of these methods and `path` in their path, oldest first."""
    return [request for request in hub.requests if request.method in methods and path in request.path]


def model_folder(folder: Path, weights: bytes = WEIGHTS) -> Path:
    (folder / "unet").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: mit\ntags: [anomaly-detection]\n---\n# A model\n")
    (folder / "model_index.json").write_text('{"_class_name": "X"}')
    (folder / "empty.txt").touch()
    (folder / "unet" / "weights with spaces.safetensors").write_bytes(weights)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_subprocess_inherits_nothing_that_concerns_another_hub(hub, monkeypatch, tmp_path):
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_TOKEN", "hf_real")
    monkeypatch.setenv("KEPT", "1")
    environment = hub.environment(tmp_path, token=None)
    assert environment["KEPT"] == "1"
    assert not {"HTTPS_PROXY", "HF_HUB_OFFLINE", "HF_TOKEN"} & set(environment)
    assert (environment["HF_ENDPOINT"], environment["HF_HOME"]) == (hub.endpoint, str(tmp_path))
    assert hub.environment(tmp_path)["HF_TOKEN"] == hub.token


# The round trip


def test_another_process_uploads_and_a_third_downloads_in_a_fresh_cache(hub, tmp_path):
    folder = model_folder(tmp_path / "model", os.urandom(11_000_000))
    upload = (
        "import sys; from huggingface_hub import HfApi; api = HfApi(); api.create_repo(sys.argv[1], private=True);"
    )
    upload += "api.upload_folder(repo_id=sys.argv[1], folder_path=sys.argv[2])"
    download = "import sys; from huggingface_hub import snapshot_download; print(snapshot_download(sys.argv[1]))"
    run = [sys.executable, "-c"]
    subprocess.run([*run, upload, "org/screw", str(folder)], env=hub.environment(tmp_path / "a"), check=True)
    result = subprocess.run(
        [*run, download, "org/screw"],
        env=hub.environment(tmp_path / "b", token=hub.read_token),
        check=True,
        capture_output=True,
        text=True,
    )
    downloaded = contents(Path(result.stdout.strip()))
    assert downloaded.pop(".gitattributes")
    assert downloaded == contents(folder)
    assert (tmp_path / "b" / "hub") in Path(result.stdout.strip()).parents
    cdn = [request for request in hub.requests if request.server == "cdn"]
    assert [request.method for request in cdn] == ["PUT", "GET"]
    assert not any(request.authenticated for request in cdn), "a Hub token left the Hub"

    anonymous = subprocess.run(
        [*run, download, "org/screw"], env=hub.environment(tmp_path / "c", token=None), capture_output=True, text=True
    )
    assert "RepositoryNotFoundError" in anonymous.stderr


def test_large_files_go_up_in_parts(hub, api):
    hub.multipart_above, hub.part_size = 1_000_000, 2**20
    data = os.urandom(2**21 + 5)
    hub.add_repo("org/screw")
    api.upload_file(path_or_fileobj=data, path_in_repo="unet/weights.bin", repo_id="org/screw")
    assert len(asked(hub, "PUT")) == 3
    assert hub.files("org/screw")["unet/weights.bin"] == data
    assert Path(api.hf_hub_download("org/screw", "unet/weights.bin")).read_bytes() == data


def test_uploading_the_same_again_makes_no_commit(hub, api, tmp_path):
    folder = model_folder(tmp_path / "model")
    hub.add_repo("org/screw")
    first = api.upload_folder(repo_id="org/screw", folder_path=folder)
    again = api.upload_folder(repo_id="org/screw", folder_path=folder)
    assert again.oid == first.oid
    assert len(asked(hub, "POST", path="/commit/")) == 1
    assert len(asked(hub, "PUT")) == 1

    (folder / "model_index.json").write_text("{}")
    changed = api.upload_folder(repo_id="org/screw", folder_path=folder)
    titles = [commit.title for commit in api.list_repo_commits("org/screw")]
    assert changed.oid != first.oid
    assert titles == ["Upload folder using huggingface_hub"] * 2 + ["initial commit"]
    assert hub.files("org/screw")["model_index.json"] == b"{}"


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_ids_are_those_of_git(hub, api, tmp_path):
    files = {"a.txt": "1", "a/b.txt": "2", "a/c/d.txt": "3", "a-b/e.txt": "", "z": "é"}
    hub.add_repo("org/screw", files)
    folder = tmp_path / "checkout"
    for path, data in hub.files("org/screw").items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)

    def git(*arguments, **options):
        return subprocess.check_output(["git", "-C", str(folder), *arguments], **options).decode()

    git("init", "--quiet")
    git("-c", "core.autocrlf=false", "add", "--all")
    listed = dict(
        line.split(" ", 2)[2].split("\t")[::-1]
        for line in git("ls-tree", "-r", "-t", git("write-tree").strip()).splitlines()
    )
    entries = api.list_repo_tree("org/screw", recursive=True)
    assert {entry.path: getattr(entry, "blob_id", None) or entry.tree_id for entry in entries} == listed


def test_files_of_every_kind_of_revision(hub, api):
    hub.add_repo("org/screw", {"config.json": "1"})
    old = api.model_info("org/screw").sha
    api.create_tag("org/screw", tag="v1.0", tag_message="first")
    api.create_branch("org/screw", branch="feature/new")
    hub.add_files("org/screw", {"config.json": "2"})
    api.upload_file(path_or_fileobj=b"3", path_in_repo="config.json", repo_id="org/screw", revision="feature/new")
    pull = api.upload_file(path_or_fileobj=b"4", path_in_repo="config.json", repo_id="org/screw", create_pr=True)
    assert (pull.pr_num, pull.pr_revision) == (1, "refs/pr/1")
    expected = {None: "2", "main": "2", old: "1", "v1.0": "1", "feature/new": "3", "refs/pr/1": "4"}
    got = {r: Path(api.hf_hub_download("org/screw", "config.json", revision=r)).read_text() for r in expected}
    assert got == expected
    api.upload_file(path_or_fileobj=b"5", path_in_repo="config.json", repo_id="org/screw", revision="refs/pr/1")
    assert hub.files("org/screw", "refs/pr/1")["config.json"] == b"5"
    assert snapshot_download("org/screw", revision="v1.0").endswith(old)

    refs = api.list_repo_refs("org/screw", include_pull_requests=True)
    assert [ref.name for ref in refs.branches] == ["main", "feature/new"]
    assert [(ref.name, ref.target_commit) for ref in refs.tags] == [("v1.0", old)]
    assert [ref.ref for ref in refs.pull_requests] == ["refs/pr/1"]
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_tag("org/screw", tag="v1.0")
    api.create_tag("org/screw", tag="v1.0", exist_ok=True)
    api.create_branch("org/screw", branch="feature/new", exist_ok=True)
    api.delete_tag("org/screw", tag="v1.0")
    api.delete_branch("org/screw", branch="feature/new")
    assert not api.revision_exists("org/screw", "v1.0")
    assert not api.revision_exists("org/screw", "feature/new")


def test_one_commit_adds_copies_and_deletes(hub, api):
    hub.add_repo("org/screw", {"old/a.txt": "a", "old/b.bin": WEIGHTS, "keep.txt": "k", "gone.txt": "g"})
    api.create_commit(
        "org/screw",
        [
            CommitOperationAdd("new/c.txt", b"c"),
            CommitOperationCopy("keep.txt", "copied.txt"),
            CommitOperationCopy("old/b.bin", "copied.bin"),
            CommitOperationDelete("gone.txt"),
            CommitOperationDelete("old/"),
        ],
        commit_message="Rearrange",
    )
    files = hub.files("org/screw")
    del files[".gitattributes"]
    assert files == {"new/c.txt": b"c", "keep.txt": b"k", "copied.txt": b"k", "copied.bin": WEIGHTS}
    with pytest.raises(RemoteEntryNotFoundError, match="doesn't exist"):
        api.delete_file("gone.txt", "org/screw")
    stale = hub.repo("org/screw").branches["main"].parent.oid
    with pytest.raises(HfHubHTTPError, match="412"):
        api.create_commit("org/screw", [CommitOperationAdd("x", b"")], commit_message="x", parent_commit=stale)


def test_files_that_no_pattern_sends_to_lfs_are_named_in_gitattributes(hub, api):
    hub.add_repo("org/screw")
    api.upload_file(path_or_fileobj=WEIGHTS, path_in_repo="preview.png", repo_id="org/screw")
    assert "preview.png filter=lfs" in hub.files("org/screw")[".gitattributes"].decode()
    assert api.get_paths_info("org/screw", ["preview.png"])[0].lfs.sha256 == hashlib.sha256(WEIGHTS).hexdigest()


def test_the_tree_folder_by_folder_in_pages(hub, api):
    hub.page_size = 3
    files = {f"unet/{i}.txt": str(i) for i in range(7)} | {"vae/deep/x.txt": "x", "w.safetensors": WEIGHTS}
    hub.add_repo("org/screw", files)
    last = hub.add_files("org/screw", {"unet/3.txt": "changed"})
    entries = list(api.list_repo_tree("org/screw", recursive=True, expand=True))
    assert {e.path for e in entries} == {*files, ".gitattributes", "unet", "vae", "vae/deep"}
    assert {e.path for e in entries if e.last_commit.oid == last.oid} == {"unet", "unet/3.txt"}
    assert {e.path for e in api.list_repo_tree("org/screw")} == {".gitattributes", "unet", "vae", "w.safetensors"}
    assert [e.path for e in api.list_repo_tree("org/screw", "vae/deep")] == ["vae/deep/x.txt"]
    with pytest.raises(RemoteEntryNotFoundError):
        list(api.list_repo_tree("org/screw", "nowhere"))
    assert [e.path for e in api.get_paths_info("org/screw", ["vae", "unet/1.txt", "nowhere"])] == ["vae", "unet/1.txt"]


def test_xet_clients_and_others_share_files(hub, tmp_path):
    pytest.importorskip("hf_xet")
    folder = model_folder(tmp_path / "model", os.urandom(2_000_000))
    hub.add_repo("org/screw")
    code = "import sys; from huggingface_hub import *; api = HfApi();"
    upload = code + "print(*(api.upload_folder(repo_id='org/screw', folder_path=sys.argv[1]).oid for _ in '12'))"
    download = code + "print(snapshot_download('org/screw'))"

    def run(script, home, **variables):
        environment = {**hub.environment(tmp_path / home), **variables}
        script = [sys.executable, "-c", script, str(folder)]
        return subprocess.run(script, env=environment, check=True, capture_output=True, text=True).stdout.strip()

    first, again = run(upload, "a", HF_HUB_DISABLE_XET="0").split()
    assert again == first, "nothing changed, yet there is a new commit"
    assert not asked(hub, "PUT")
    for home, disable in (("b", "0"), ("c", "1")):
        downloaded = contents(Path(run(download, home, HF_HUB_DISABLE_XET=disable)))
        del downloaded[".gitattributes"]
        assert downloaded == contents(folder)
        assert len(asked(hub, "GET", path="/lfs/")) == int(disable), "only a client without Xet asks the CDN"


# Who may do what


@pytest.mark.parametrize(
    ("repo_id", "filename", "revision", "token", "error", "status"),
    [
        ("org/missing", "config.json", None, "token", RepositoryNotFoundError, 404),
        ("org/missing", "config.json", None, None, RepositoryNotFoundError, 401),
        ("missing", "config.json", None, "token", RepositoryNotFoundError, 404),
        ("org/private", "config.json", None, None, RepositoryNotFoundError, 401),
        ("org/private", "config.json", None, "stranger_token", RepositoryNotFoundError, 404),
        ("org/gated", "config.json", None, None, GatedRepoError, 401),
        ("org/gated", "config.json", None, "stranger_token", GatedRepoError, 403),
        ("org/open", "config.json", "v9", "token", RevisionNotFoundError, 404),
        ("org/open", "config.json", "0" * 40, "token", RevisionNotFoundError, 404),
        ("org/open", "missing.json", None, None, RemoteEntryNotFoundError, 404),
        ("org/open", "config.json", None, "hf_expired", HfHubHTTPError, 401),
    ],
)
def test_what_cannot_be_read(hub, api, repo_id, filename, revision, token, error, status):
    hub.add_repo("org/open", {"config.json": "{}"})
    hub.add_repo("org/private", {"config.json": "{}"}, private=True)
    hub.add_repo("org/gated", {"config.json": "{}"}, gated="manual")
    token = token and getattr(hub, token, token)
    with pytest.raises(HfHubHTTPError) as caught:
        api.hf_hub_download(repo_id, filename, revision=revision, token=token or False)
    assert type(caught.value) is error
    assert caught.value.response.status_code == status


def test_what_can_be_read(hub, api):
    hub.add_repo("org/private", {"config.json": "{}"}, private=True)
    gated = hub.add_repo("org/gated", {"config.json": "{}"}, gated="auto")
    for token in (hub.token, hub.read_token):
        for repo_id in ("org/private", "org/gated"):
            assert api.hf_hub_download(repo_id, "config.json", token=token, force_download=True)
    assert api.model_info("org/gated", token=False).gated == "auto", (
        "what is behind the gate is secret, not that it is there"
    )
    gated.readers.add("stranger")
    assert api.hf_hub_download("org/gated", "config.json", token=hub.stranger_token, force_download=True)
    assert not api.repo_exists("org/private", token=False)


def test_who_can_write(hub, api):
    hub.add_repo("org/screw")
    upload = {"path_or_fileobj": WEIGHTS, "path_in_repo": "w.bin", "repo_id": "org/screw"}
    for token, status in ((False, 401), (hub.read_token, 403), (hub.stranger_token, 403)):
        with pytest.raises(HfHubHTTPError) as caught:
            api.upload_file(**upload, token=token)
        assert caught.value.response.status_code == status
        with pytest.raises(HfHubHTTPError) as caught:
            api.create_repo("org/new", token=token)
        assert caught.value.response.status_code == status
    assert len(hub.repo("org/screw").commits) == 1
    assert api.upload_file(**upload, token=hub.stranger_token, create_pr=True).pr_num == 1
    assert "w.bin" not in hub.files("org/screw")


def test_repositories_are_created_once_and_under_allowed_names(hub, api):
    url = api.create_repo("screw", private=True)
    assert (url.repo_id, url.repo_type) == ("alice/screw", "model")
    assert hub.repo("alice/screw").private
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo("alice/screw")
    assert api.create_repo("alice/screw", exist_ok=True).repo_id == "alice/screw"
    with pytest.raises(HFValidationError):
        api.create_repo("org/a--b")
    with pytest.raises(BadRequestError):  # with the client's own check out of the way
        inspect.unwrap(HfApi.create_repo)(api, "org/a--b")


def test_whose_token_it_is(hub, api):
    assert (api.whoami()["name"], api.whoami()["orgs"][0]["name"]) == ("alice", "org")
    assert api.whoami(hub.read_token)["auth"]["accessToken"]["role"] == "read"
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        api.whoami("hf_expired")


# Faults


def test_a_cut_download_resumes_where_it_stopped(hub, api, waits):
    data = os.urandom(25_000_000)
    hub.add_repo("org/screw", {"w.safetensors": data})
    hub.faults.add("^GET /lfs/", cut_after=12_000_000)
    assert Path(api.hf_hub_download("org/screw", "w.safetensors")).read_bytes() == data
    whole, rest = asked(hub, "GET", path="/lfs/")
    assert (whole.range, whole.status) == (None, 200)
    assert (rest.range, rest.status) == (f"bytes={10 * 2**20}-", 206)


def test_a_cut_upload_is_sent_again(hub, api, waits, tmp_path):
    weights = tmp_path / "w.safetensors"
    weights.write_bytes(os.urandom(3_000_000))
    hub.add_repo("org/screw")
    hub.faults.add("^PUT /upload/", cut_after=1_000_000)
    api.upload_file(path_or_fileobj=weights, path_in_repo="w.safetensors", repo_id="org/screw")
    assert [request.status for request in asked(hub, "PUT")] == [None, 200]
    assert hub.files("org/screw")["w.safetensors"] == weights.read_bytes()


def test_refusals_are_passing(hub, api, waits):
    hub.add_repo("org/screw", {"config.json": "{}"})
    hub.faults.add("/preupload/", status=503, times=2)
    api.upload_file(path_or_fileobj=b"x", path_in_repo="x.txt", repo_id="org/screw")
    assert [request.status for request in asked(hub, "POST", path="/preupload/")] == [503, 503, 200]
    hub.faults.add("^HEAD .*/config.json", status=429, times=2, retry_after=7)  # the first try falls back to the cache
    assert api.hf_hub_download("org/screw", "config.json")
    assert waits == [1, 2, 8], "twice the client's own pace, then what the Hub asked for and a second"


def test_an_ill_hub_leaves_the_cached_copy(hub, api, waits):
    hub.add_repo("org/screw", {"config.json": "{}"})
    first = api.hf_hub_download("org/screw", "config.json")
    hub.faults.add("config.json", status=500, times=100)
    assert api.hf_hub_download("org/screw", "config.json") == first
    hub.faults.clear()
    hub.faults.add("config.json", delay=1)
    assert api.hf_hub_download("org/screw", "config.json", etag_timeout=0.1) == first
    with pytest.raises(ValueError, match="Force download failed"):
        hub.faults.add("config.json", status=500, times=100)
        api.hf_hub_download("org/screw", "config.json", force_download=True)


def test_a_hub_that_is_away_and_comes_back(monkeypatch, tmp_path):
    hub = LoopbackHub(tmp_path / "loopback-hub")
    with hub:
        hub.add_repo("org/screw", {"config.json": "{}", "more.json": "[]"})
        hub.adopt_client(monkeypatch, tmp_path / "home")
        first = HfApi().hf_hub_download("org/screw", "config.json")
    assert HfApi().hf_hub_download("org/screw", "config.json") == first
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(LocalEntryNotFoundError):
        HfApi().hf_hub_download("org/screw", "more.json")
    with hub:
        hub.adopt_client(monkeypatch, tmp_path / "home")
        assert Path(HfApi().hf_hub_download("org/screw", "more.json")).read_text() == "[]"


def test_a_lost_answer_was_a_commit(hub, api, tmp_path):
    folder = model_folder(tmp_path / "model")
    hub.add_repo("org/screw")
    hub.faults.add("/commit/main", cut_after=0)
    with pytest.raises(Exception, match="without sending a response"):
        api.upload_folder(repo_id="org/screw", folder_path=folder)
    assert "model_index.json" in hub.files("org/screw")
    api.upload_folder(repo_id="org/screw", folder_path=folder)
    assert len(hub.repo("org/screw").commits) == 2


def test_links_to_storage_are_signed_and_take_ranges(hub, api):
    hub.add_repo("org/screw", {"w.bin": WEIGHTS}, private=True)
    headers = {"authorization": f"Bearer {hub.token}"}
    redirect = get_session().get(
        f"{hub.endpoint}/org/screw/resolve/main/w.bin", headers=headers, follow_redirects=False
    )
    assert (redirect.status_code, redirect.headers["X-Linked-Size"]) == (302, str(len(WEIGHTS)))
    assert redirect.headers["X-Linked-Etag"] == f'"{hashlib.sha256(WEIGHTS).hexdigest()}"'
    link = redirect.headers["Location"]
    assert link.startswith(hub.cdn_endpoint)
    part = get_session().get(link, headers={"Range": "bytes=100-199"})
    assert (part.status_code, part.content) == (206, WEIGHTS[100:200])
    assert part.headers["Content-Range"] == f"bytes 100-199/{len(WEIGHTS)}"
    assert get_session().get(link, headers={"Range": f"bytes={len(WEIGHTS)}-"}).status_code == 416
    assert get_session().get(link.split("?")[0]).status_code == 403
    assert get_session().get(link, headers=headers).status_code == 400


def test_what_is_not_here_is_not_found(hub, api):
    for path in ("/api/papers", "/api/models/org/screw/likers", "/robots.txt"):
        assert get_session().get(hub.endpoint + path).status_code == 404


# Finding things


CARD = """---
license: cc-by-nc-sa-4.0
library_name: diffusers
pipeline_tag: image-segmentation
tags: [anomaly-detection, {category}]
datasets: [mvtec-ad]
model-index:
- name: {category}
  results:
  - task: {{type: image-segmentation}}
    dataset: {{type: mvtec-ad, name: MVTec AD}}
    metrics: [{{type: auroc, value: 0.99}}]
---
From https://arxiv.org/abs/2303.08730
"""


def test_models_are_found_by_tag_author_and_name_in_pages(hub, api):
    hub.page_size = 2
    for category in ("screw", "cable", "grid", "wood", "zipper"):
        hub.add_repo(f"org/ad-{category}", {"README.md": CARD.format(category=category)})
    hub.add_repo("alice/ad-screw", {"README.md": "no metadata"})
    hub.add_repo("org/secret", {"README.md": CARD.format(category="screw")}, private=True)

    def found(**query):
        return [model.id for model in api.list_models(**query)]

    assert found(author="org", search="AD-") == [f"org/ad-{c}" for c in ("zipper", "wood", "grid", "cable", "screw")]
    assert len(asked(hub, "GET", path="/api/models")) == 3, "three pages of two"
    assert found(filter=["anomaly-detection", "screw"], token=False) == ["org/ad-screw"]
    assert found(filter="screw") == ["org/secret", "org/ad-screw"]
    assert found(pipeline_tag="image-segmentation", limit=3) == ["org/secret", "org/ad-zipper", "org/ad-wood"]
    assert found(filter="license:cc-by-nc-sa-4.0", search="wood") == ["org/ad-wood"]
    assert found(author="nobody") == []
    hub.add_files("org/ad-cable", {"x.txt": "x"})
    assert found(sort="last_modified", limit=1) == ["org/ad-cable"]


def test_a_listing_tells_what_it_is_asked_for(hub, api):
    hub.add_repo("org/screw", {"README.md": CARD.format(category="screw"), "w.safetensors": WEIGHTS})
    (plain,) = api.list_models(author="org")
    assert (plain.last_modified, plain.card_data, plain.siblings) == (None, None, None)
    (full,) = api.list_models(author="org", full=True, cardData=True)
    assert full.last_modified and full.card_data.license == "cc-by-nc-sa-4.0"
    assert "w.safetensors" in [sibling.rfilename for sibling in full.siblings]
    (expanded,) = api.list_models(author="org", expand=["usedStorage", "cardData"])
    assert expanded.used_storage > len(WEIGHTS)
    assert expanded.card_data.eval_results[0].metric_value == 0.99
    assert expanded.tags is None


def test_the_page_of_a_model(hub, api):
    commit = hub.add_repo(
        "org/screw", {"README.md": CARD.format(category="screw"), "w.safetensors": WEIGHTS}
    ).branches["main"]
    info = api.model_info("org/screw", files_metadata=True)
    assert (info.sha, info.author, info.library_name, info.private) == (commit.oid, "org", "diffusers", False)
    assert abs((info.last_modified - commit.date).total_seconds()) < 0.001
    tags = {
        "diffusers",
        "anomaly-detection",
        "screw",
        "license:cc-by-nc-sa-4.0",
        "dataset:mvtec-ad",
        "arxiv:2303.08730",
    }
    assert tags < set(info.tags)
    weights = next(sibling for sibling in info.siblings if sibling.rfilename == "w.safetensors")
    assert (weights.size, weights.lfs.sha256) == (len(WEIGHTS), hashlib.sha256(WEIGHTS).hexdigest())
    assert info.card_data.eval_results[0].dataset_name == "MVTec AD"


RESULT = "{task: {type: t}, dataset: {type: d, name: D}, metrics: [{type: a, value: 1}]}"


@pytest.mark.parametrize(
    ("metadata", "complaint"),
    [
        ("license: my-own", "license"),
        ("tags: [a: b", "YAML"),
        (f"model-index: [{{name: x, results: [{RESULT.replace('type: d, ', '')}]}}]", "dataset.type"),
        (f"model-index: [{{name: x, results: [{RESULT.replace('1', '.nan')}]}}]", "value"),
    ],
)
def test_cards_that_the_hub_refuses(hub, api, metadata, complaint):
    hub.add_repo("org/screw")
    with pytest.raises(ValueError, match=complaint):
        card = f"---\n{metadata}\n---\n".encode()
        api.upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id="org/screw")
    assert "README.md" not in hub.files("org/screw")


# Collections and Spaces


def test_collections(hub, api):
    for category in ("screw", "cable", "grid", "wood", "zipper"):
        hub.add_repo(f"org/{category}")
    collection = api.create_collection("Screws & more", namespace="org", description="One model a category")
    assert collection.slug.startswith("org/screws-more-")
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_collection("Screws & more", namespace="org")
    assert api.create_collection("Screws & more", namespace="org", exists_ok=True).slug == collection.slug
    for category in ("screw", "cable", "grid", "wood", "zipper"):
        api.add_collection_item(collection.slug, f"org/{category}", "model", note=category)
    with pytest.raises(HfHubHTTPError, match="409"):
        api.add_collection_item(collection.slug, "org/screw", "model")
    api.add_collection_item(collection.slug, "org/screw", "model", exists_ok=True)
    with pytest.raises(RepositoryNotFoundError):
        api.add_collection_item(collection.slug, "org/missing", "model")
    items = api.get_collection(collection.slug).items
    assert [(item.item_id, item.note) for item in items][-1] == ("org/zipper", "zipper")
    assert len(items) == 5
    (listed,) = api.list_collections(owner="org", item="models/org/screw")
    assert len(listed.items) == 4, "a listing shows the first four"
    assert list(api.list_collections(owner="alice")) == []
    with pytest.raises(HfHubHTTPError, match="403"):
        api.create_collection("Mine", namespace="org", token=hub.read_token)
    secret = api.create_collection("Secret", namespace="org", private=True)
    with pytest.raises(HfHubHTTPError, match="404"):
        api.get_collection(secret.slug, token=False)


def test_a_space(hub, api, tmp_path):
    with pytest.raises(ValueError, match="space_sdk"):
        api.create_repo("org/demo", repo_type="space")
    url = api.create_repo("org/demo", repo_type="space", space_sdk="gradio")
    assert (url.repo_type, url.repo_id) == ("space", "org/demo")
    template = hub.files("org/demo", repo_type="space")["README.md"].decode()
    assert metadata_of(template)["sdk"] == "gradio"
    assert api.get_space_runtime("org/demo").stage == "NO_APP_FILE"
    folder = tmp_path / "space"
    folder.mkdir()
    (folder / "app.py").write_text("print()")
    (folder / "example.png").write_bytes(WEIGHTS)
    header = {"title": "Demo", "sdk": "gradio", "app_file": "app.py", "colorFrom": "blue"}
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(header)}---\n")
    api.upload_folder(repo_id="org/demo", repo_type="space", folder_path=folder)
    info = api.space_info("org/demo")
    assert (info.sdk, info.runtime.stage, info.card_data.title) == ("gradio", "RUNNING", "Demo")
    downloaded = contents(Path(snapshot_download("org/demo", repo_type="space")))
    assert downloaded["app.py"] == b"print()" and downloaded["example.png"] == WEIGHTS
    assert [space.id for space in api.list_spaces(author="org")] == ["org/demo"]
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("org/demo")
    for line in ("colorFrom: black", "short_description: " + "x" * 61, "sdk: flask"):
        with pytest.raises(ValueError, match=line.split(":")[0]):
            card = f"---\nsdk: gradio\n{line}\n---\n".encode()
            api.upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id="org/demo", repo_type="space")


def test_datasets_are_repositories_too(hub, api):
    hub.add_repo("org/normal-images", {"train.csv": "a,b\n1,2\n"}, repo_type="dataset")
    path = api.hf_hub_download("org/normal-images", "train.csv", repo_type="dataset")
    assert Path(path).read_text() == "a,b\n1,2\n"
    assert api.dataset_info("org/normal-images").id == "org/normal-images"
