"""The web demo as a Space: deployed with the real client to a Hub on the loopback interface, fetched, and started."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from huggingface_hub import HfApi, snapshot_download

import diffusionad_hf
from diffusionad_hf.cli.main import main
from diffusionad_hf.hub.spaces import MODELS_VARIABLE, deploy_space
from tests.loopback_hub import metadata_of

SPACE = "org/inspection"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def client(hub, monkeypatch, tmp_path):
    """This process's client, with the user's token and an empty cache."""
    hub.adopt_client(monkeypatch, tmp_path / "home")
    return HfApi()


def files(hub):
    return hub.files(SPACE, repo_type="space")


def deploy(*arguments):
    return main(["deploy-space", "--repo-id", SPACE, *arguments])


def test_what_is_deployed_answers_without_the_repository(hub, client, tmp_path, capsys):
    gradio_client = pytest.importorskip("gradio_client", reason="the page needs gradio: pip install -e .[space]")
    assert deploy() == 0
    assert capsys.readouterr().out.strip() == f"{hub.endpoint}/spaces/{SPACE}"
    folder = Path(snapshot_download(SPACE, repo_type="space", local_dir=tmp_path / "space"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "DIFFUSIONAD_"))}
    environment = {**kept, "GRADIO_SERVER_PORT": str(port), "HF_HUB_OFFLINE": "1"}
    log = (tmp_path / "log.txt").open("w+")
    running = subprocess.Popen([sys.executable, "app.py"], cwd=folder, env=environment, stdout=log, stderr=log)
    try:
        wait_for(f"http://127.0.0.1:{port}/", running, log)
        page = gradio_client.Client(f"http://127.0.0.1:{port}/", verbose=False)
        for name, defective in (("scratch", True), ("good", False)):
            photo = gradio_client.handle_file(str(folder / f"checkpoints/demo-part/examples/{name}.png"))
            record, _ = page.predict(image=photo, category="demo-part", api_name="/inspect")
            assert record["category"] == "demo-part" and record["is_anomalous"] == defective
    finally:
        running.terminate()
        running.wait(timeout=60)
        log.close()
    # The package that ran is the one that was deployed: Python has compiled it there.
    assert list(folder.glob("diffusionad_hf/__pycache__/pipeline_diffusionad.*.pyc"))


def wait_for(url, process, log):
    for _ in range(900):
        try:
            return urllib.request.urlopen(url, timeout=5).close()
        except (urllib.error.URLError, OSError):
            if process.poll() is not None:
                log.seek(0)
                raise AssertionError(log.read()) from None
            time.sleep(0.2)
    raise AssertionError("the page did not start")


def test_what_goes_along_and_what_stays_at_home(hub, client, tmp_path):
    app = tmp_path / "space"
    shutil.copytree(ROOT / "space", app, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (
        *(".env", "notes.txt", "outputs/r.json", "__pycache__/app.cpython-311.pyc", ".gradio/x"),
        *(f"checkpoints/demo-part/{name}" for name in ("optimizer.bin", "unet/training_state.pt", "examples/me.txt")),
    ):
        (app / name).parent.mkdir(parents=True, exist_ok=True)
        (app / name).write_text(f"hf_secret {tmp_path}")
    assert deploy("--app-dir", str(app)) == 0
    found = files(hub)
    there = {".gitattributes", "requirements.txt", "app.py", "README.md"}
    there |= {f"checkpoints/demo-part/{name}" for name in ("model_index.json", "README.md", "examples/scratch.png")}
    there |= {f"checkpoints/demo-part/{part}/diffusion_pytorch_model.safetensors" for part in ("unet", "segmenter")}
    there |= {f"diffusionad_hf/{file.name}" for file in Path(diffusionad_hf.__file__).parent.glob("*.py")} | {
        "diffusionad_hf/space/style.css",
        "diffusionad_hf/efficientnet_lite0.safetensors",
        "diffusionad_hf/efficientnet_lite0.LICENSE.txt",
    }
    assert there <= set(found) and "diffusionad_hf/hub/model_card.md" in found
    allowed = {"", *".py .pyi .typed .md .css .txt .png .jpg .json .safetensors".split()}
    for name, content in found.items():
        assert Path(name).suffix in allowed, name
        assert not re.search(rb"hf_secret|" + str(tmp_path).encode() + rb"|" + str(ROOT).encode(), content), name
    asked = found["requirements.txt"].decode().splitlines()
    assert not any(line.startswith("diffusionad") for line in asked), "there is no such package on an index"
    assert {"jinja2", "diffusers", "safetensors", "torch"} <= {re.match(r"[\w-]+", line)[0] for line in asked}
    header = metadata_of(found["README.md"].decode())
    assert header["sdk"] == "gradio" and header["app_file"] == "app.py" and not header.get("models")
    picture = urllib.request.urlopen(header["thumbnail"], timeout=10).read()
    assert picture == (app / "thumbnail.png").read_bytes(), "the address works for whoever sees the link"


def test_the_same_again_makes_no_commit_and_an_update_one(hub, client, tmp_path):
    app = tmp_path / "space"
    shutil.copytree(ROOT / "space", app, ignore=shutil.ignore_patterns("__pycache__"))
    for expected in (1, 1):
        deploy_space(SPACE, app_dir=app)
        assert len(client.list_repo_commits(SPACE, repo_type="space")) == 1 + expected
    hub.add_files(SPACE, {"diffusionad_hf/old.py": "", "NOTES.md": "theirs"}, repo_type="space")
    (app / "more.py").write_text("pass")
    deploy_space(SPACE, app_dir=app)
    found = files(hub)
    assert found["more.py"] == b"pass" and found["NOTES.md"] == b"theirs" and "diffusionad_hf/old.py" not in found


def test_models_of_ones_own(hub, client):
    deploy_space(SPACE)
    assert hub.repo(SPACE, "space").variables == {}
    for _ in range(2):
        assert deploy("--models", "org/diffusionad-screw", "org") == 0
        assert client.get_space_variables(SPACE)[MODELS_VARIABLE].value == "org/diffusionad-screw,org"
        found = files(hub)
        assert metadata_of(found["README.md"].decode())["models"] == ["org/diffusionad-screw"]
        assert not [name for name in found if name.startswith(("checkpoints/", "examples/"))]
    changes = [r for r in hub.requests if r.path.endswith("/variables") and r.method != "GET"]
    assert len(changes) == 1, "each change restarts the Space"
    deploy_space(SPACE)
    assert hub.repo(SPACE, "space").variables == {} and "checkpoints/demo-part/model_index.json" in files(hub)


def test_a_private_space_is_private_or_not_deployed(hub, client):
    deploy_space(SPACE, private=True)
    assert hub.repo(SPACE, "space").private
    hub.add_repo("org/public", repo_type="space", space_sdk="gradio")
    with pytest.raises(ValueError, match="org/public exists and is public"):
        deploy_space("org/public", private=True)
    assert set(hub.files("org/public", repo_type="space")) == {".gitattributes", "README.md"}


REFUSED = {
    # case: repo id, arguments, token, what the message says
    "no token": (SPACE, {}, None, "needs a Hugging Face token: log in"),
    "a read-only token": (SPACE, {}, "read", "your token may not do that"),
    "somebody else's name": ("somebody/space", {}, "write", "your token may not do that"),
    "a name without owner": ("space", {}, "write", "give ORG/NAME"),
    "a model that cannot be": (SPACE, {"models": ["a b"]}, "write", '`models` "a b"'),
    "no app": (SPACE, {"app_dir": "nowhere"}, "write", "leave out `app_dir`"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_in_one_line_and_leaves_no_space(hub, monkeypatch, tmp_path, case):
    repo_id, arguments, token, words = REFUSED[case]
    token = {"write": hub.token, "read": hub.read_token}.get(token)
    hub.adopt_client(monkeypatch, tmp_path / "home", token=token)
    with pytest.raises((OSError, ValueError)) as error:
        deploy_space(repo_id, **arguments)
    assert words in str(error.value) and "\n" not in str(error.value) and not hub.repos
