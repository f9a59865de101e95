"""`diffusionad evaluate` on a small test set."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusionad_hf.cli import evaluate as command
from diffusionad_hf.cli.main import main
from diffusionad_hf.evaluation.intervals import show
from tests.conftest import make_pipeline
from tests.dataset_factory import make_flat, make_folder, make_mvtec


def test_evaluate_prints_and_writes_the_metrics(model_dir, tmp_path, capsys):
    root = tmp_path / "data" / "part"
    rng = np.random.default_rng(0)
    for folder in ("train/good", "test/good", "test/hole", "ground_truth/hole"):
        (root / folder).mkdir(parents=True)
    mask = np.zeros((32, 32), np.uint8)
    mask[4:9, 4:9] = 255
    for i in range(4):
        image = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(image).save(root / f"train/good/{i}.png")
        Image.fromarray(image).save(root / f"test/good/{i}.png")
        Image.fromarray(np.where(mask[..., None], 255 - image, image)).save(root / f"test/hole/{i}.png")
        Image.fromarray(mask).save(root / f"ground_truth/hole/{i}_mask.png")
    (root / "test/good/9.png").write_bytes(b"")
    arguments = ["evaluate", "--model", model_dir, "--data-dir", str(root.parent)]
    arguments += ["--json", str(tmp_path / "e.json"), "--plots", str(tmp_path / "plots")]
    # One of nine files is more than the 5 % that may be unusable.
    assert main(arguments) == 2 and "9.png" in capsys.readouterr().err
    (root / "test/good/9.png").unlink()
    assert main(arguments) == 0
    printed, written = capsys.readouterr().out, json.loads((tmp_path / "e.json").read_text())
    assert show(written, "image_auroc") in printed and show(written, "aupro_30") in printed
    assert "8 images: 4 normal, 4 anomalous (4 with a mask)" in printed and "4 normal images of the dataset" in printed
    assert written["num_images"] == 8 and {p.name for p in (tmp_path / "plots").iterdir()} >= {"roc_curve.png"}


def test_names_that_are_no_text_and_pictures_of_former_runs(model_dir, tmp_path, capsys):
    root = make_folder(tmp_path / "data", normal=2, defects={"dent": 2}, masks=True)
    try:
        for folder in ("good", "dent", "ground_truth/dent"):
            (root / folder / "001.png").rename(os.fsdecode(os.fsencode(root / folder) + b"/\xc1\xe3.png"))
        for folder in ("", "ground_truth"):
            (root / folder / "dent").rename(os.fsdecode(os.fsencode(root / folder) + b"/\xe9"))
    except OSError:
        pytest.skip("this file system takes no such names")
    (root / "good/.ipynb_checkpoints").mkdir()
    shutil.copy(root / "good/000.png", root / "good/.ipynb_checkpoints/000-checkpoint.png")
    data = ("--model", model_dir, "--data-dir", str(root))
    for _ in range(2):
        assert main(["evaluate", *data, "--json", str(tmp_path / "e.json"), "--plots", str(root / "plots")]) == 0
        found = json.loads((tmp_path / "e.json").read_text())["predictions"]
        assert [p["file"] for p in found[::2]] == ["good/000.png", "\\udce9/000.png"] and len(found) == 4
        assert [p["file"] for p in found[1::2]] == ["good/\\udcc1\\udce3.png", "\\udce9/\\udcc1\\udce3.png"]
        # Nor do an inspection's pictures count the next time.
        main(["inspect", str(root / "good"), "--model", model_dir, "--output-dir", str(root / "report")])
    assert "4 images: 2 normal, 2 anomalous (2 with a mask)" in capsys.readouterr().out


@pytest.fixture
def evaluate(monkeypatch, tmp_path, capsys):
    """Runs the command with a model that is never loaded; returns exit code, JSON (or None) and what was printed."""
    pipe = make_pipeline()

    def run(data, *options, change=None):
        if change:
            change(pipe)
        monkeypatch.setattr(command, "load_pipeline", lambda *_: pipe)
        file = tmp_path / "evaluation.json"
        code = main(["evaluate", "--model", "any", "--data-dir", str(data), "--json", str(file), *options])
        printed = capsys.readouterr()

        def refuse(constant):
            raise AssertionError(f"{constant} is no JSON")

        found = json.loads(file.read_text(), parse_constant=refuse) if file.is_file() else None
        return code, found, printed.out + printed.err

    return run


def without_train(root):
    shutil.rmtree(make_mvtec(root, good=5) / "widget/train")
    return root


@pytest.mark.parametrize(
    ("make", "normal"),
    [
        (lambda root: make_folder(root, normal=10, masks=True), 10),
        (without_train, 5),
        (lambda root: without_train(root) / "widget", 5),
        (lambda root: without_train(root) / "widget/test", 5),
    ],
    ids=["good and bad", "test without train", "its category", "its test folder"],
)
def test_every_image_and_every_mask_counts(evaluate, tmp_path, make, normal):
    code, found, printed = evaluate(make(tmp_path / "data"))
    assert code == 0, printed
    assert (found["num_normal"], found["num_anomalous"], found["num_without_mask"]) == (normal, 5, 0)
    assert "pixel_auroc" in found and f"{normal + 5} images: {normal} normal, 5 anomalous (5 with a mask)" in printed
    assert "give --split" in printed


def test_a_split_is_made_when_asked_for_and_printed(evaluate, tmp_path):
    code, found, printed = evaluate(make_folder(tmp_path / "data", normal=10), "--split")
    assert code == 0 and (found["num_normal"], found["num_anomalous"]) == (2, 5)
    assert "8 normal images of the dataset are for training and were not evaluated." in printed


@pytest.mark.parametrize(
    ("name", "reason"), [("test/loose.png", "would not count"), ("masks/hole/0.png", "without an image")]
)
def test_a_picture_that_would_not_count_is_refused(evaluate, tmp_path, name, reason):
    root = make_mvtec(tmp_path / "data") / "widget"
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (48, 32)).save(root / name)
    code, found, printed = evaluate(root)
    assert code == 2 and found is None and str(root / name) in printed and reason in printed


def test_pictures_in_deeper_folders_count_and_one_that_cannot_be_read_is_named(evaluate, tmp_path):
    root = make_mvtec(tmp_path / "data") / "widget"
    for name in ("test/good/deeper/0.png", "test/good/1.ico"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (48, 32)).save(root / name)
    code, found, printed = evaluate(root)
    assert code == 2 and found["num_normal"] == 4 and "1.ico" in printed


def test_test_images_that_are_not_there(evaluate, tmp_path):
    code, found, printed = evaluate(make_mvtec(tmp_path / "data", good=0, defects={}))
    assert code == 2 and found is None and "has no test images" in printed


@pytest.mark.parametrize("kind", ["normal", "anomalous"])
def test_one_class_only_leaves_the_auroc_unknown(evaluate, tmp_path, kind):
    root = tmp_path / "data"
    if kind == "normal":
        make_flat(root)
    else:
        shutil.rmtree(make_mvtec(root) / "widget/test/good")
        shutil.rmtree(root / "widget/train")
    code, found, printed = evaluate(root, change=lambda pipe: pipe.register_to_config(threshold=2.0))
    other = "anomalous" if kind == "normal" else "normal"
    assert code == 0 and "image_auroc" not in found and found["unknown"]["image_auroc"] == f"no {other} images"
    lines = {" ".join(line.split()) for line in printed.splitlines()}
    assert f"image AUROC unknown: no {other} images" in lines
    rates = {
        "false alarms at the threshold 2.0000": "0 % [0 %, 46 %]" if kind == "normal" else "unknown: no normal images",
        "misses at the threshold 2.0000": "100 % [48 %, 100 %]"
        if kind == "anomalous"
        else "unknown: no anomalous images",
    }
    assert {f"{name} {shown}" for name, shown in rates.items()} <= lines


def test_equal_scores_are_worth_chance(evaluate, tmp_path):
    for name in ("good/0", "good/1", "good/2", "hole/0", "hole/1"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), "gray").save(tmp_path / f"data/{name}.png")
    code, found, printed = evaluate(tmp_path / "data")
    low, high = found["intervals"]["image_auroc"]
    assert code == 0 and found["image_auroc"] == 0.5 and low < 0.1 and high > 0.9
    assert "image AUROC" in printed and "0.50 [0.0" in printed


def test_scores_that_are_no_numbers_are_refused(evaluate, tmp_path):
    def spoil(pipe):
        with torch.no_grad():
            list(pipe.segmenter.parameters())[-1].fill_(float("nan"))

    code, found, printed = evaluate(make_folder(tmp_path / "data"), change=spoil)
    assert code == 2 and found is None and "the networks' score is nan, which is no number" in printed


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="peaks of memory are read from /proc")
def test_large_photos_take_bounded_memory(model_dir, tmp_path):
    large = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)).resize(
        (4000, 3000)
    )
    mask = Image.new("L", large.size)
    mask.paste(255, (500, 500, 1500, 1200))
    for folder in ("train/good", "test/good", "test/hole", "ground_truth/hole"):
        (tmp_path / "part" / folder).mkdir(parents=True)
    large.save(tmp_path / "part/train/good/0.jpg")
    for i in range(4):
        for folder in ("good", "hole"):
            os.link(tmp_path / "part/train/good/0.jpg", tmp_path / f"part/test/{folder}/{i}.jpg")
        mask.save(tmp_path / f"part/ground_truth/hole/{i}_mask.png")
    # Not `ru_maxrss`, which takes over what the process that started this one had. On top of the libraries, of which
    # some versions take 150 MB more.
    code = (
        "import sys, datasets; from pathlib import Path; from diffusionad_hf.evaluation import evaluator; "
        "from diffusionad_hf.cli.main import main; "
        "taken = lambda name: int(Path('/proc/self/status').read_text().split(name)[1].split()[0]); "
        "libraries = taken('VmHWM:'); code = main(sys.argv[1:]); print(taken('VmHWM:') - libraries); sys.exit(code)"
    )
    data = ("evaluate", "--model", model_dir, "--data-dir", tmp_path / "part")
    done = subprocess.run([sys.executable, "-c", code, *map(str, data)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "8 images: 4 normal, 4 anomalous (4 with a mask)" in done.stdout
    assert int(done.stdout.split()[-1]) / 1024**2 < 1.1, "GB"
