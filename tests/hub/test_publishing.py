"""Publishing, listing and loading again, with the real client and a Hub on the loopback interface."""

import argparse
import json
import os
import re
import shutil
import socket
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from PIL import Image
from safetensors.torch import load_file

from diffusionad_hf import DiffusionADPipeline
from diffusionad_hf.cli.hub import add_commands
from diffusionad_hf.hub.publishing import list_models, publish_model
from tests.loopback_hub import LoopbackHub

REPO = "org/diffusionad-mvtec-screw"
IMAGE = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(9))
WEIGHTS = "diffusion_pytorch_model"
PUBLISHED = {
    "README.md",
    "model_index.json",
    "images_diffusionad.py",
    "familiarity_diffusionad.py",
    "verdicts_diffusionad.py",
    "pipeline_diffusionad.py",
    "scheduler/scheduler_config.json",
    "scheduler/scheduling_norm_guided.py",
    "segmenter/config.json",
    f"segmenter/{WEIGHTS}.fp16.safetensors",
    f"segmenter/{WEIGHTS}.safetensors",
    "segmenter/modeling_anomaly_segmenter.py",
    "unet/config.json",
    f"unet/{WEIGHTS}.fp16.safetensors",
    f"unet/{WEIGHTS}.safetensors",
    "unet/modeling_norm_guided_unet.py",
}

KEPT = {"evaluation.json", "previews/sheet.png", "TRAINING.md"}
"""What a repo also holds where the model's folder has it."""


@pytest.fixture
def client(hub, monkeypatch, tmp_path):
    """This process's client, with the user's token and an empty cache."""
    hub.adopt_client(monkeypatch, tmp_path / "home")
    return HfApi()


@pytest.fixture
def folder(model_dir, tmp_path):
    """A model folder as the trainer leaves it, with all that must not leave the machine."""
    folder = tmp_path / "run"
    shutil.copytree(model_dir, folder)
    secrets = f"token hf_secret, path {tmp_path}"
    for name in (
        "checkpoint-9/optimizer.bin",
        "checkpoint-9/model.safetensors",
        "logs/events.out",
        "best/unet/x.safetensors",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(secrets)
    for name in (".env", "notes.md", "training_curve.csv", "unet/training_state.pt", "unet/extra.json"):
        (folder / name).write_text(secrets)
    config = json.loads((folder / "unet/config.json").read_text())
    (folder / "unet/config.json").write_text(json.dumps({**config, "_name_or_path": str(folder)}))
    arguments = {"category": "screw", "max_train_steps": 1200, "train_batch_size": 8, "foreground_dir": str(tmp_path)}
    (folder / "training_arguments.json").write_text(json.dumps(arguments))
    evaluation = {
        "num_images": 30,
        "num_normal": 10,
        "num_anomalous": 20,
        "image_auroc": 0.9125,
        "resolution": 32,
        "provenance": {"model": str(folder), "device": "cpu"},
    }
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    (folder / "TRAINING.md").write_text("# How it was trained\n")
    (folder / "previews").mkdir()
    note = Image.Exif()
    note[0x010E] = secrets
    Image.new("RGB", (40, 30), "teal").save(folder / "previews/sheet.png", exif=note)
    return folder


def commits(api, repo_id=REPO, **kwargs):
    return [commit.title for commit in api.list_repo_commits(repo_id, **kwargs)][:-1]


def run(command, *arguments):
    """A command's exit code, as the command line calls it."""
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers()
    add_commands(commands)
    args = parser.parse_args([command, *arguments])
    return args.run(args)


# ---- publishing -----------------------------------------------------------------------------------------------------


def test_what_a_repo_holds_and_what_stays_at_home(hub, client, folder, tmp_path, capsys):
    assert run("publish", str(folder), "--repo-id", REPO, "--dataset", "MVTec AD") == 0
    assert capsys.readouterr().out.strip() == f"{hub.endpoint}/{REPO}"
    files = hub.files(REPO)
    assert set(files) - {".gitattributes"} == PUBLISHED | KEPT
    for name, content in files.items():
        assert not re.search(rb"hf_secret|" + str(tmp_path).encode(), content), name
    evaluation = json.loads(files["evaluation.json"])
    assert evaluation["image_auroc"] == 0.9125 and evaluation["provenance"] == {"model": REPO, "device": "cpu"}


def test_weights_come_in_float32_and_in_half_precision_whatever_the_folder_holds(hub, client, tmp_path, model_dir):
    DiffusionADPipeline.from_pretrained(model_dir, dtype=torch.float16).save_pretrained(tmp_path / "half")
    original = load_file(tmp_path / f"half/unet/{WEIGHTS}.safetensors")
    publish_model(tmp_path / "half", REPO)
    for name, content in hub.files(REPO).items():
        if name.endswith(".safetensors"):
            (tmp_path / Path(name).name).write_bytes(content)
            weights = load_file(tmp_path / Path(name).name)
            expected = torch.float16 if "fp16" in name else torch.float32
            assert {w.dtype for w in weights.values() if w.is_floating_point()} == {expected}, name
            if name.startswith("unet"):
                assert all(torch.equal(weights[key].float(), original[key].float()) for key in original)


def test_publishing_the_same_again_makes_no_commit(hub, client, folder):
    publish_model(folder, REPO, collection="DiffusionAD")
    head = client.model_info(REPO).sha
    publish_model(folder, REPO, collection="DiffusionAD")
    assert client.model_info(REPO).sha == head and len(commits(client)) == 1

    pipe = DiffusionADPipeline.from_pretrained(folder)
    pipe.register_to_config(threshold=0.875)
    pipe.save_config(folder)
    publish_model(folder, REPO)
    assert len(commits(client)) == 2
    assert json.loads(hub.files(REPO)["model_index.json"])["threshold"] == 0.875


def test_what_an_earlier_version_had_goes_and_what_others_put_there_stays(hub, client, folder):
    publish_model(folder, REPO)
    hub.add_files(REPO, {"unet/evil.py": "", "docs/how.py": "", "LICENSE": "", "segmenter/x.safetensors": ""})
    for name in KEPT:
        (folder / name).unlink()
    publish_model(folder, REPO)
    assert set(hub.files(REPO)) == PUBLISHED | {".gitattributes", "docs/how.py", "LICENSE"}


def test_a_branch_is_made_and_main_left_alone(hub, client, model_dir):
    url = publish_model(model_dir, REPO, revision="retrained")
    assert url == f"{hub.endpoint}/{REPO}/tree/retrained"
    assert PUBLISHED <= set(hub.files(REPO, "retrained")) and set(hub.files(REPO)) == {".gitattributes"}


def test_a_pull_request_comes_from_anyone_and_changes_nothing_yet(hub, monkeypatch, tmp_path, model_dir):
    hub.add_repo(REPO, {"README.md": "# Theirs\n"})
    hub.adopt_client(monkeypatch, tmp_path, token=hub.stranger_token)
    url = publish_model(model_dir, REPO, create_pr=True)
    assert url == f"{hub.endpoint}/{REPO}/discussions/1"
    assert hub.files(REPO)["README.md"] == b"# Theirs\n"
    assert PUBLISHED <= set(hub.files(REPO, "refs/pr/1"))


def test_a_collection_groups_the_categories(hub, client, model_dir):
    for _ in range(2):
        for category in ("screw", "cable"):
            publish_model(
                model_dir, f"org/diffusionad-{category}", category=category, collection="DiffusionAD on MVTec"
            )
    (collection,) = hub.collections.values()
    assert (collection["title"], collection["owner"]["name"]) == ("DiffusionAD on MVTec", "org")
    assert [item["id"] for item in collection["items"]] == ["org/diffusionad-screw", "org/diffusionad-cable"]


def test_a_private_repo_is_private_or_not_published(hub, client, model_dir):
    publish_model(model_dir, REPO, private=True, collection="Secret")
    assert hub.repo(REPO).private and all(collection["private"] for collection in hub.collections.values())
    publish_model(model_dir, REPO)  # a repo keeps what it is
    assert hub.repo(REPO).private

    hub.add_repo("org/public")
    with pytest.raises(ValueError, match="org/public exists and is public"):
        publish_model(model_dir, "org/public", private=True)
    assert set(hub.files("org/public")) == {".gitattributes"}


def test_examples_become_the_pictures_of_the_card(hub, client, model_dir, tmp_path, photo):
    Image.fromarray(photo).save(tmp_path / "part of customer X.png")
    publish_model(model_dir, REPO, examples=[tmp_path / "part of customer X.png"] * 2)
    files = hub.files(REPO)
    assert {name for name in files if name.startswith("previews")} == {
        "previews/example_1.png",
        "previews/example_2.png",
    }
    assert b"customer" not in b"".join(files.values())
    (tmp_path / "sheet.png").write_bytes(files["previews/example_1.png"])
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width == 760, "the photo and its map; nothing to show of how it should look"
        assert len(sheet.convert("RGB").getcolors(maxcolors=10**6)) > 50


def test_the_photos_to_try_the_model_on_go_along_without_metadata(hub, client, folder, photo):
    (folder / "examples").mkdir()
    Image.fromarray(photo).save(folder / "examples" / "good.jpg", exif=b"Exif\x00\x00hf_secret")
    (folder / "examples" / "README.md").write_text("by A. Photographer")
    publish_model(folder, REPO)
    files = hub.files(REPO)
    assert {"examples/good.png", "examples/README.md"} == {name for name in files if name.startswith("examples")}
    assert b"hf_secret" not in files["examples/good.png"]


REFUSED = {
    # case: repo id, arguments, token, what the message says
    "no token": (REPO, {}, None, "needs a Hugging Face token: log in"),
    "an unknown token": (REPO, {}, "hf_wrong", "does not know your token"),
    "a read-only token": (REPO, {}, "read", "your token may not do that"),
    "somebody else's name": ("somebody/model", {}, "write", "your token may not do that"),
    "a name without owner": ("screw", {}, "write", "give ORG/NAME"),
    "a name the client refuses": ("org/a b", {}, "write", '`repo_id` "org/a b"'),
    "a name the Hub refuses": ("org/_.git", {}, "write", ".git"),
    "a licence the Hub does not know": (
        REPO,
        {"license": "mine"},
        "write",
        'refuses the model card: "license" must be',
    ),
    "a pull request to nothing": (REPO, {"create_pr": True}, "write", "no such repo"),
    "a pull request to a branch": (REPO, {"create_pr": True, "revision": "v2"}, "write", "leave out `revision`"),
    "no such folder": (REPO, {"model_dir": "nowhere"}, "write", "nowhere: no such folder"),
    "a folder without model": (REPO, {"model_dir": "."}, "write", "model_index.json"),
    "no such evaluation": (REPO, {"evaluation": "nowhere.json"}, "write", "nowhere.json: no such file"),
    "no such example": (REPO, {"examples": ["nowhere.png"]}, "write", "nowhere.png"),
    "a data set without name": (REPO, {"dataset": "!"}, "write", "`dataset`"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_in_one_line_and_leaves_no_repo(hub, monkeypatch, tmp_path, model_dir, case):
    repo_id, arguments, token, words = REFUSED[case]
    hub.adopt_client(
        monkeypatch, tmp_path / "home", token={"write": hub.token, "read": hub.read_token}.get(token, token)
    )
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises((OSError, ValueError)) as error:
        publish_model(**{"model_dir": model_dir, "repo_id": repo_id, **arguments})
    message = str(error.value)
    assert words in message and "\n" not in message and "hf_" not in message.replace("hf_wrong", "")
    assert not hub.repos


def test_a_read_only_token_is_told_so_where_the_repo_exists(hub, monkeypatch, tmp_path, model_dir):
    hub.add_repo(REPO)
    hub.adopt_client(monkeypatch, tmp_path, token=hub.read_token)
    with pytest.raises(OSError, match=f"{REPO}: your token may not do that .*write role"):
        publish_model(model_dir, REPO)


def test_a_hub_that_refuses_twice_and_then_takes_it(hub, client, model_dir, monkeypatch):
    waits = []
    monkeypatch.setattr("time.sleep", waits.append)
    hub.faults.add("^PUT /upload/", status=503, times=2)
    publish_model(model_dir, REPO)
    assert waits and PUBLISHED <= set(hub.files(REPO)) and len(commits(client)) == 1


def test_a_model_that_nobody_evaluated_is_published_with_a_card_that_says_so(hub, client, model_dir):
    publish_model(model_dir, REPO, dataset="mvtec", category="screw")
    card = hub.files(REPO)["README.md"].decode()
    assert "**This model has not been evaluated.**" in card and "AUROC" not in card
    (model,) = list_models("org")
    assert model["image_auroc"] is None and model["category"] == "screw"


@pytest.mark.parametrize(("status", "words"), [(500, "out of order"), (429, "too many requests")])
def test_a_hub_that_is_ill(hub, client, model_dir, monkeypatch, status, words):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.faults.add("POST /api/repos/create", status=status, times=99)
    with pytest.raises(OSError, match=f"{REPO}: .*{words}"):
        publish_model(model_dir, REPO)


def test_no_network(monkeypatch, tmp_path, model_dir):
    with LoopbackHub(tmp_path / "hub") as hub:
        pass
    hub.adopt_client(monkeypatch, tmp_path / "home")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with socket.socket() as taken:  # so that no other program listens there meanwhile
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", int(hub.endpoint.rpartition(":")[2])))
        with pytest.raises(OSError, match=f"{REPO}: the Hub cannot be reached"):
            publish_model(model_dir, REPO)
        with pytest.raises(OSError, match="the Hub cannot be reached"):
            list_models()


# ---- and loading again ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(tmp_path_factory, model_dir):
    """A Hub with a published model: `v1` is a tag of it, and `main` has another threshold since. Do not change it."""
    with LoopbackHub(tmp_path_factory.mktemp("hub")) as hub, pytest.MonkeyPatch.context() as monkeypatch:
        hub.adopt_client(monkeypatch, tmp_path_factory.mktemp("home"))
        publish_model(model_dir, REPO, category="screw")
        HfApi().create_tag(REPO, tag="v1")
        pipe = DiffusionADPipeline.from_pretrained(model_dir, threshold=0.875)
        retuned = tmp_path_factory.mktemp("retuned")
        pipe.save_pretrained(retuned)
        publish_model(retuned, REPO, category="screw")
        monkeypatch.undo()
        yield hub


@pytest.fixture(scope="module")
def score(model_dir):
    return DiffusionADPipeline.from_pretrained(model_dir)(IMAGE).anomaly_score[0]


def test_a_published_model_loads_with_equal_scores_then_offline(published, monkeypatch, tmp_path, score):
    published.adopt_client(monkeypatch, tmp_path, token=None)
    cache = {"cache_dir": tmp_path / "cache"}
    assert DiffusionADPipeline.from_pretrained(REPO, **cache)(IMAGE).anomaly_score[0] == pytest.approx(score, abs=1e-6)
    downloaded = {path.name for path in (tmp_path / "cache").rglob("*.safetensors")}
    assert downloaded == {f"{WEIGHTS}.safetensors"}
    asked = len(published.requests)
    cached = DiffusionADPipeline.from_pretrained(REPO, local_files_only=True, **cache)
    assert cached(IMAGE).anomaly_score[0] == pytest.approx(score, abs=1e-6)
    assert len(published.requests) == asked


def test_branches_tags_and_commits(published, monkeypatch, tmp_path):
    published.adopt_client(monkeypatch, tmp_path)
    newest, first, _ = [commit.commit_id for commit in HfApi().list_repo_commits(REPO)]
    for revision, threshold in {None: 0.875, "main": 0.875, newest: 0.875, "v1": None, first: None}.items():
        pipe = DiffusionADPipeline.from_pretrained(REPO, revision=revision, cache_dir=tmp_path / "cache")
        assert pipe.config.threshold == threshold, revision


def test_the_half_precision_variant_is_a_smaller_download(published, monkeypatch, tmp_path, score):
    published.adopt_client(monkeypatch, tmp_path)
    pipe = DiffusionADPipeline.from_pretrained(REPO, variant="fp16", dtype=torch.float32, cache_dir=tmp_path / "cache")
    assert pipe(IMAGE).anomaly_score[0] == pytest.approx(score, abs=1e-2)
    assert {p.name for p in (tmp_path / "cache").rglob("*.safetensors")} == {f"{WEIGHTS}.fp16.safetensors"}


def test_the_lines_of_the_card_run_as_they_stand(published, monkeypatch, tmp_path, photo, capsys):
    published.adopt_client(monkeypatch, tmp_path / "home")
    monkeypatch.chdir(tmp_path)
    Image.fromarray(photo).save("photo.png")
    (code,) = re.findall(r"```python\n(.*?)```", published.files(REPO)["README.md"].decode(), re.DOTALL)
    assert len([line for line in code.splitlines() if line]) <= 5
    found = {}
    exec(code, found)
    assert found["result"].anomaly_map[0].shape == photo.shape[:2]
    assert found["result"].reconstruction[0].shape == photo.shape
    assert capsys.readouterr().out.startswith("[")


class Pickled:
    """Writes a file when it is unpickled."""

    def __init__(self, proof):
        self.proof = proof

    def __reduce__(self):
        return os.mkdir, (self.proof,)


@pytest.mark.parametrize(
    "name", ["TRAINING.md", "evaluation.json", "training_arguments.json", "previews/a.png", "unet"]
)
def test_links_out_of_a_model_folder_are_refused(hub, client, model_dir, tmp_path, name):
    folder, secret = tmp_path / "model", tmp_path / "secret"
    shutil.copytree(model_dir, folder)
    target = folder / name
    if target.is_dir():
        target.rename(secret)
    else:
        secret.write_text("hf_token")
        target.parent.mkdir(exist_ok=True)
        target.unlink(missing_ok=True)
    target.symlink_to(secret)
    with pytest.raises(ValueError, match=f"{name}.*: a link, or no regular file"):
        publish_model(folder, REPO)
    assert not hub.repos


def test_code_and_pickles_that_someone_put_there_are_neither_run_nor_opened(hub, client, model_dir, tmp_path, score):
    publish_model(model_dir, REPO)
    torch.save(Pickled(str(tmp_path / "unpickled")), tmp_path / "pickle.bin")
    pickled = (tmp_path / "pickle.bin").read_bytes()
    code = f"import os; os.mkdir({str(tmp_path / 'executed')!r})\n"
    modules = [name for name in PUBLISHED if name.endswith(".py")]
    hub.add_files(REPO, dict.fromkeys([*modules, "setup.py", "unet/__init__.py", "unet/diffusers.py"], code))
    hub.add_files(REPO, {f"{part}/{WEIGHTS}.bin": pickled for part in ("unet", "segmenter")})
    cache = {"cache_dir": tmp_path / "cache"}
    assert DiffusionADPipeline.from_pretrained(REPO, **cache)(IMAGE).anomaly_score[0] == pytest.approx(score, abs=1e-6)
    assert not list((tmp_path / "cache").rglob("*.bin"))

    # Nor where the pickle is all there is.
    safe = [name for name in PUBLISHED if name.endswith(".safetensors")]
    client.delete_files(REPO, safe)
    with pytest.raises(OSError, match=REPO):
        DiffusionADPipeline.from_pretrained(REPO, **cache)
    assert not (tmp_path / "executed").exists() and not (tmp_path / "unpickled").exists()
    # The traps do spring.
    torch.load(tmp_path / "pickle.bin", weights_only=False)
    exec(code)
    assert (tmp_path / "executed").exists() and (tmp_path / "unpickled").exists()


# ---- listing --------------------------------------------------------------------------------------------------------


def card(category, auroc=None, tags=("diffusionad",)):
    lines = ["---", f"tags: [{', '.join(tags)}]", f"category: {category}"]
    if auroc is not None:
        data = "dataset: {type: mvtec-ad, name: MVTec AD}"
        metrics = f"metrics: [{{type: pixel_auroc, value: 0.5}}, {{type: image_auroc, value: {auroc}}}]"
        lines.append(
            f"model-index: [{{name: x, results: [{{task: {{type: image-segmentation}}, {data}, {metrics}}}]}}]"
        )
    return "\n".join([*lines, "---", ""])


@pytest.fixture
def shelf(hub, client, model_dir):
    """A Hub with several models, more than one page of a listing."""
    hub.page_size = 2
    hub.add_repo("org/b", {"README.md": card("cable", 0.75)})
    hub.add_repo("org/a", {"README.md": card("screw", 0.9876)})
    hub.add_repo("org/unevaluated", {"README.md": card("nut")})
    hub.add_repo("org/secret", {"README.md": card("bolt", 0.5)}, private=True)
    hub.add_repo("org/strange", {"README.md": "---\ntags: [diffusionad]\nmodel-index: nonsense\n---\n"})
    hub.add_repo("org/unrelated", {"README.md": card("cat", 0.9, tags=["diffusers"])})
    hub.add_repo("other/c", {"README.md": card("tile", 0.25)})
    return hub


def test_models_are_listed_by_id_over_several_pages(shelf):
    found = {model["id"]: (model["category"], model["image_auroc"]) for model in list_models()}
    assert found == {
        "org/a": ("screw", 0.9876),
        "org/b": ("cable", 0.75),
        "org/secret": ("bolt", 0.5),
        "org/strange": (None, None),
        "org/unevaluated": ("nut", None),
        "other/c": ("tile", 0.25),
    }
    assert list(found) == sorted(found)
    assert [model["id"] for model in list_models("other")] == ["other/c"]
    assert list_models("nobody") == []
    assert "org/secret" not in [model["id"] for model in list_models("org", token=shelf.stranger_token)]


def test_a_published_model_is_found_with_its_figures(hub, client, folder):
    publish_model(folder, REPO, dataset="mvtec")
    (model,) = list_models("org")
    info = client.model_info(REPO, files_metadata=True)
    assert model["id"] == REPO and model["category"] == "screw" and model["image_auroc"] == 0.9125
    assert model["size"] >= sum(file.size for file in info.siblings)
    assert model["last_modified"] == info.last_modified.isoformat()


def test_the_list_command(shelf, capsys):
    assert run("list", "--org", "org") == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["category", "image", "AUROC", "size", "date", "model"]
    assert rows[0].split()[:2] == ["screw", "0.988"] and rows[0].endswith("org/a")
    assert rows[2].endswith("org/secret (private)") and rows[4].split()[:2] == ["nut", "-"]
    assert run("list", "--json") == 0
    assert json.loads(capsys.readouterr().out) == list_models()
    assert run("list", "--org", "nobody") == 0
    assert "No DiffusionAD models of nobody" in capsys.readouterr().out
