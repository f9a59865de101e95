"""What loading by Hub id says and does where the Hub, the network, the repo or the disk is in the way."""

import hashlib
import logging
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from diffusionad_hf import DiffusionADPipeline
from tests.loopback_hub import LoopbackHub

REPO = "org/model"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
IMAGE = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(9))
LOAD = "import sys; from diffusionad_hf import DiffusionADPipeline; DiffusionADPipeline.from_pretrained('org/model')"


@pytest.fixture(scope="module")
def files(model_dir):
    """A repo's files, by path."""
    paths = [path for path in Path(model_dir).rglob("*") if path.is_file() and "fp16" not in path.name]
    return {str(path.relative_to(model_dir)): path.read_bytes() for path in paths}


@pytest.fixture
def load(hub, files, monkeypatch, tmp_path):
    """Loads by id in this process with a cache of its own; says how long the client wanted to wait in `load.waits`."""
    hub.add_repo(REPO, files)
    monkeypatch.setattr(constants, "DEFAULT_DOWNLOAD_TIMEOUT", 5)

    def load(repo_id=REPO, token=True, **kwargs):
        with monkeypatch.context() as patch:
            hub.adopt_client(patch, tmp_path / "home", token=token)
            patch.setattr(constants, "HF_HUB_OFFLINE", load.offline)
            # A lock on the cache that another thread holds is polled, in fractions of a second: as often as it takes.
            patch.setattr("time.sleep", lambda s, sleep=time.sleep: load.waits.append(s) if s >= 0.5 else sleep(s))
            return DiffusionADPipeline.from_pretrained(repo_id, cache_dir=tmp_path / "cache", **kwargs)

    load.waits, load.offline = [], False
    return load


def message(load, *arguments, **kwargs):
    """The line that a load fails with."""
    with pytest.raises(OSError) as error:
        load(*arguments, **kwargs)
    assert "\n" not in str(error.value) and "hf_" not in str(error.value).replace("hf_wrong", "")
    return str(error.value)


# ---- who may see what -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whose", ["user", "stranger", "nobody"])
def test_a_missing_and_a_private_repo_look_the_same(hub, files, load, whose):
    hub.add_repo("other/private", files, private=True)
    token = {"user": hub.token, "stranger": hub.stranger_token, "nobody": None}[whose]
    for repo_id in ("org/missing", "other/missing"):
        assert message(load, repo_id, token).startswith(f"{repo_id}: no such repo")
    assert message(load, "other/private", token=hub.read_token).startswith("other/private: no such repo")


def test_a_private_repo_loads_with_a_token_of_the_login_or_of_the_call(hub, files, load, monkeypatch, tmp_path):
    hub.add_repo("org/private", files, private=True)
    assert "org/private: no such repo" in message(load, "org/private", token=None)
    load("org/private", token=hub.read_token)
    hub.adopt_client(monkeypatch, tmp_path / "home", token=None)
    DiffusionADPipeline.from_pretrained("org/private", cache_dir=tmp_path / "cache", token=hub.read_token)


def test_an_unknown_token(load):
    assert "the Hub does not know your token; log in" in message(load, token="hf_wrong")


@pytest.mark.parametrize("whose", ["stranger", "nobody"])
def test_a_gated_repo_says_where_to_ask(hub, files, load, whose):
    hub.add_repo("org/gated", files, gated="manual")
    said = message(load, "org/gated", hub.stranger_token if whose == "stranger" else None)
    assert f"org/gated: access is restricted; ask for it at {hub.endpoint}/org/gated, then log in" in said
    hub.repo("org/gated").readers.add("stranger")
    load("org/gated", hub.stranger_token)


def test_an_unknown_revision(hub, load):
    assert f"no branch, tag or commit 'v9'; see {hub.endpoint}/{REPO}" in message(load, revision="v9")


# ---- what is in the repo --------------------------------------------------------------------------------------------


def test_a_repo_that_is_no_pipeline(hub, load):
    hub.add_repo("org/other", {"README.md": "# Nothing here\n"})
    assert message(load, "org/other") == "org/other: the repo has no model_index.json, so there is no pipeline in it"


def test_a_variant_that_is_not_there(load):
    assert "variant=fp16" in message(load, variant="fp16")


@pytest.mark.parametrize("what", ["missing", "cut", "without a tensor", "without a component"])
def test_weights_that_are_incomplete(hub, files, load, what, tmp_path):
    broken = dict(files)
    if what == "missing":
        del broken[WEIGHTS]
    elif what == "cut":
        broken[WEIGHTS] = broken[WEIGHTS][:-1000]
    elif what == "without a tensor":
        (tmp_path / "weights").write_bytes(files[WEIGHTS])
        weights = load_file(tmp_path / "weights")
        del weights["conv_in.weight"]
        save_file(weights, tmp_path / "weights", metadata={"format": "pt"})
        broken[WEIGHTS] = (tmp_path / "weights").read_bytes()
    else:
        broken = {name: content for name, content in files.items() if not name.startswith("segmenter")}
    hub.add_repo("org/broken", broken)
    said = message(load, "org/broken")
    assert said.startswith("org/broken: the model is incomplete or damaged; load it once with force_download=True")


def test_a_model_of_a_newer_version_of_this_package(hub, files, load):
    index = files["model_index.json"].decode()
    assert '"_diffusionad_format": 1' in index
    hub.add_repo("org/newer", files | {"model_index.json": index.replace('_format": 1', '_format": 2')})
    said = message(load, "org/newer")
    assert "org/newer: " in said and "written by a newer version" in said and "pip install --upgrade" in said


# ---- where the network fails ----------------------------------------------------------------------------------------


def test_without_network_the_cached_copy_is_used_and_said_so(files, monkeypatch, tmp_path, caplog):
    kwargs = {"cache_dir": tmp_path / "cache"}
    with LoopbackHub(tmp_path / "hub") as hub:
        hub.add_repo(REPO, files)
        hub.adopt_client(monkeypatch, tmp_path / "home")
        score = DiffusionADPipeline.from_pretrained(REPO, **kwargs)(IMAGE).anomaly_score[0]
    # The Hub is gone.
    for name in ("diffusers", "huggingface_hub"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    assert DiffusionADPipeline.from_pretrained(REPO, **kwargs)(IMAGE).anomaly_score[0] == score
    assert "cache" in caplog.text.lower()
    for arguments in ({"revision": "v2", **kwargs}, {"cache_dir": tmp_path / "empty"}):
        with pytest.raises(OSError, match=f"^{REPO}: the Hub cannot be reached .* the cache holds no whole copy"):
            DiffusionADPipeline.from_pretrained(REPO, **arguments)


def test_offline_by_argument_and_by_environment(hub, load):
    assert message(load, local_files_only=True).endswith("load the model once without local_files_only")
    load.offline = True
    assert "HF_HUB_OFFLINE is set" in message(load)
    load.offline = False
    load()
    asked = len(hub.requests)
    load(local_files_only=True)
    load.offline = True
    load()
    assert len(hub.requests) == asked


@pytest.mark.parametrize("path", [f"^GET /api/models/{REPO}", f"^GET /{REPO}/resolve/[^/]*/model_index", "^GET /lfs/"])
@pytest.mark.parametrize("status", [429, 503])
def test_a_hub_that_refuses_twice_and_then_answers(hub, load, path, status):
    hub.faults.add(path, status=status, times=2)
    assert load()(IMAGE).anomaly_score[0] > 0
    assert load.waits


def test_a_hub_that_never_answers_well(hub, load):
    hub.faults.add(f"/{REPO}", status=503, times=999)
    said = message(load)
    assert "(503)" in said and "the cache holds no whole copy" in said
    assert len(load.waits) < 30


@pytest.mark.parametrize("status", [429, 503])
def test_an_ill_hub_leaves_the_cached_copy(hub, load, status):
    score = load()(IMAGE).anomaly_score[0]
    hub.faults.add(".", status=status, times=999)
    assert load()(IMAGE).anomaly_score[0] == score


def test_a_download_that_is_cut_goes_on_where_it_stopped(hub, files, load, tmp_path):
    (tmp_path / "weights").write_bytes(files[WEIGHTS])
    # The client writes, and resumes, by 10 MiB.
    large = {**load_file(tmp_path / "weights"), "padding": torch.zeros(2**23 * 3)}
    save_file(large, tmp_path / "weights", metadata={"format": "pt"})
    data = (tmp_path / "weights").read_bytes()
    hub.add_repo("org/large", files | {WEIGHTS: data})
    link = f"^GET /lfs/{hashlib.sha256(data).hexdigest()}/"
    hub.faults.add(link, cut_after=15 * 2**20)
    load("org/large")
    assert [request.range for request in hub.requests if re.search(link, f"GET {request.path}")] == [
        None,
        f"bytes={10 * 2**20}-",
    ]


def test_a_download_that_is_cut_every_time(hub, load):
    hub.faults.add("^GET /lfs/", cut_after=1000, times=999)
    assert message(load).startswith(f"{REPO}: the Hub cannot be reached (peer closed connection")


def test_two_processes_download_the_same_repo_at_once(hub, files, tmp_path):
    hub.add_repo(REPO, files)
    hub.faults.add("^GET /lfs/", delay=1.0, times=99)
    command, environment = [sys.executable, "-c", LOAD], hub.environment(tmp_path / "home")
    running = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in running:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    (unet,) = (tmp_path / "home").glob(f"hub/*/snapshots/*/{WEIGHTS}")
    assert unet.read_bytes() == files[WEIGHTS]
    assert not list((tmp_path / "home").rglob("*.incomplete"))


CAN_MOUNT = (
    shutil.which("unshare")
    and not subprocess.run(
        ["unshare", "-rm", "sh", "-c", "mount -t tmpfs -o size=1m none /mnt"], capture_output=True
    ).returncode
)


@pytest.mark.skipif(not CAN_MOUNT, reason="a small disk cannot be mounted here")
def test_a_disk_that_is_full_while_downloading(hub, files, tmp_path):
    hub.add_repo(REPO, files)
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f'mount -t tmpfs -o size=4m none "{disk}" && exec "$@"'
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", mount, "sh", sys.executable, "-c", LOAD],
        env=hub.environment(disk / "home"),
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert f"OSError: {REPO}: the disk is full; free some space, or pass cache_dir=" in done.stderr
