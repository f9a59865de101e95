"""`diffusionad inspect` and `diffusionad calibrate`, as scripts and people use them."""

import csv
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

from diffusionad_hf import DiffusionADPipeline
from diffusionad_hf.cli.main import main
from tests.test_pipeline_images import UNUSABLE, unusable


@pytest.fixture
def photos(tmp_path, photo):
    """Four good images: two folders deep, two of one stem, one greyscale."""
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    Image.fromarray(photo).save(folder / "a.png")
    Image.fromarray(photo[::-1]).save(folder / "a.jpg")
    Image.fromarray(photo[..., 0]).save(folder / "b.png")
    Image.fromarray(photo.transpose(1, 0, 2)).save(folder / "deep" / "a.png")
    (folder / "notes.txt").write_text("not an image, and not meant to be one")
    return folder


@pytest.fixture
def uncalibrated(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def run(*arguments):
    return main([str(a) for a in arguments])


def test_inspect_writes_pictures_json_csv_and_a_table(photos, model_dir, tmp_path, capsys):
    out = tmp_path / "out"
    files = ("--output-dir", out, "--json", out / "r.json", "--csv", out / "r.csv", "--report", out / "r.html")
    code = run("inspect", photos, "--model", model_dir, *files, "--parts")
    printed, report = capsys.readouterr().out, json.loads((out / "r.json").read_text())
    rows = list(csv.DictReader((out / "r.csv").open()))
    assert len(report["images"]) == len(rows) == 4 and report["failures"] == []
    assert code == any(image["verdict"] == "anomalous" for image in report["images"])
    pipe = DiffusionADPipeline.from_pretrained(model_dir)
    for image, row in zip(report["images"], rows, strict=True):
        expected = pipe(image["file"])
        assert image["score"] == pytest.approx(expected.anomaly_score[0], abs=1e-5) == float(row["score"])
        assert image["p_value"] == pytest.approx(expected.p_value[0])
        assert image["verdict"] == ("anomalous" if expected.is_anomalous[0] else "normal") == row["verdict"]
        assert image["file"] in printed and f"{image['score']:.4f}" in printed
        assert Image.open(image["pictures"].pop("figure")).width in (760, 1130)
        assert set(image["pictures"]) == {"overlay", "mask", "reconstruction"}
        assert {Image.open(picture).size for picture in image["pictures"].values()} == {Image.open(image["file"]).size}
    page = (out / "r.html").read_text()
    assert page.count("data:image/webp") == 4 and all(image["file"] in page for image in report["images"])
    assert len({picture for image in report["images"] for picture in image["pictures"].values()}) == 12


@pytest.mark.parametrize("kind", UNUSABLE)
def test_one_bad_file_never_stops_the_others(kind, photos, photo, model_dir, tmp_path, capsys):
    bad, out = unusable(kind, photo, photos), tmp_path / "out"
    arguments = (photos, "--model", model_dir, "--output-dir", out, "--json", out / "r.json", "--csv", out / "r.csv")
    assert run("inspect", *arguments, "--batch-size", 2, "--report", out / "r.html") == 2
    report = json.loads((out / "r.json").read_text())
    assert len(report["images"]) == 4 and [f["file"] for f in report["failures"]] == [str(bad)]
    assert str(bad) in capsys.readouterr().err and str(bad) in (out / "r.html").read_text()
    assert [row["error"] != "" for row in csv.DictReader((out / "r.csv").open())].count(True) == 1


def test_a_name_that_is_no_text_is_escaped_everywhere(photos, model_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        (photos / "a.png").rename(os.fsdecode(os.fsencode(photos) + b"/\xc1\xe3.png"))
    except OSError:
        pytest.skip("this file system takes no such names")
    files = ("--output-dir", "out", "--json", "r.json", "--csv", "r.csv")
    assert run("inspect", "photos", "--model", model_dir, *files) in (0, 1)
    name = "photos/\\udcc1\\udce3.png"
    (image,) = (image for image in json.loads(Path("r.json").read_text())["images"] if "udc" in image["file"])
    (row,) = (row for row in csv.DictReader(open("r.csv")) if "udc" in row["file"])
    assert image["file"] == row["file"] == name and name in capsys.readouterr().out
    assert all(Path(picture).is_file() for picture in image["pictures"].values())
    os.truncate(os.fsencode(photos) + b"/\xc1\xe3.png", 0)
    assert run("inspect", "photos", "--model", model_dir, *files) == 2
    assert json.loads(Path("r.json").read_text())["failures"] == [
        {"file": name, "error": f"{name}: the file is empty (0 bytes)."}
    ]


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_any_name_is_printed_whatever_the_output_s_encoding(photos, model_dir, encoding):
    (photos / "deep/a.png").rename(photos / "deep/零件-é.png")
    command = [sys.executable, "-m", "diffusionad_hf", "inspect", photos / "deep", "--model", model_dir]
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run(command, capture_output=True, env=environment)
    assert done.returncode in (0, 1), done.stderr
    assert "零件-é.png".encode(encoding, "backslashreplace") in done.stdout


def test_a_long_name_is_inspected_as_any_other(photos, model_dir, tmp_path):
    (photos / "b.png").rename(photos / f"{'b' * 240}.png")
    out = tmp_path / "out"
    assert run("inspect", photos, "--model", model_dir, "--output-dir", out, "--json", out / "r.json") in (0, 1)
    assert len(json.loads((out / "r.json").read_text())["images"]) == 4 and len(list(out.rglob("*_figure.png"))) == 4


def test_results_are_kept_when_a_picture_cannot_be_written(photos, model_dir, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "deep").write_text("a file where a folder has to be")
    arguments = (photos, "--model", model_dir, "--output-dir", out, "--json", tmp_path / "r.json", "--batch-size", 1)
    assert run("inspect", *arguments) == 2
    assert "deep" in capsys.readouterr().err
    assert len(json.loads((tmp_path / "r.json").read_text())["images"]) == 3


REFUSED = [
    (["inspect", "{photos}/nothing.png"], "nothing.png: no such file or folder"),
    (["inspect", "{photos}/empty"], "empty: no images in this folder"),
    (["inspect", "{photos}", "--device", "cuda:7"], "--device cuda:7"),
    (["inspect", "{photos}", "--output-dir", "{photos}/a.png/out"], "cannot write there"),
    (["inspect", "{photos}", "--json", "{photos}/a.png/r.json"], "cannot write there"),
    (["inspect", "{photos}", "--report", "{photos}/a.png/r.html"], "cannot write there"),
    (["inspect", "{photos}", "--parts"], "--parts: give --output-dir"),
    (["inspect", "{photos}", "--model", "./nothing"], "nothing: no such folder"),
    (["inspect", "{photos}", "--model", "{model}", "--false-alarm-rate", "0.1"], "is not calibrated"),
    (["inspect", "{photos}", "--threshold", "nan"], "threshold=nan: must be a finite number"),
    (["inspect", "{photos}", "--threshold", "inf"], "threshold=inf: must be a finite number"),
    (["calibrate", "{photos}", "--model", "org/name"], "--output-dir"),
    (["calibrate", "{photos}/empty"], "empty: no images in this folder"),
]


@pytest.mark.parametrize("arguments, reason", REFUSED)
def test_what_cannot_be_done_is_one_line_and_exit_code_2(arguments, reason, photos, model_dir, uncalibrated, capsys):
    (photos / "empty").mkdir()
    command, *rest = (argument.format(photos=photos, model=uncalibrated) for argument in arguments)
    assert run(command, "--model", model_dir, *rest) == 2
    error = capsys.readouterr().err
    assert reason in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["--batch-size", "0"],
        ["--batch-size", "x"],
        *(["--false-alarm-rate", rate] for rate in ("1.5", "0", "1", "nan")),
    ],
)
def test_nonsense_values_are_named(arguments, photos, model_dir, capsys):
    with pytest.raises(SystemExit) as stopped:
        run("inspect", photos, "--model", model_dir, *arguments)
    assert stopped.value.code == 2 and arguments[0] in capsys.readouterr().err


def test_an_uncalibrated_model_gives_scores_and_says_what_to_do(photos, uncalibrated, capsys):
    assert run("inspect", photos, "--model", uncalibrated) == 3
    assert "4 undecided: The model is not calibrated" in capsys.readouterr().out


def test_a_rate_that_so_few_images_cannot_promise_leaves_all_undecided(photos, model_dir, tmp_path, capsys):
    files = ("--json", tmp_path / "r.json", "--csv", tmp_path / "r.csv")
    assert run("inspect", photos, "--model", model_dir, "--false-alarm-rate", 0.001, *files) == 3
    printed = capsys.readouterr().out
    assert "25 normal images cannot promise a false-alarm rate of 0.1 %; that takes 999." in printed
    assert "normal " not in printed.split("4 undecided")[0] and "anomalous" not in printed
    images, rows = json.loads((tmp_path / "r.json").read_text())["images"], csv.DictReader((tmp_path / "r.csv").open())
    for record in (*images, *rows):
        assert (record["verdict"], record["reason"]) == ("undecided", "rate_not_promised")


def test_a_model_whose_scores_are_no_numbers_gives_no_verdicts(photos, model_dir, tmp_path, capsys):
    pytest.importorskip("pyarrow", reason="results in Parquet need pip install -e .[train]")
    broken = DiffusionADPipeline.from_pretrained(model_dir)
    with torch.no_grad():
        list(broken.segmenter.parameters())[-1].fill_(float("nan"))
    broken.save_pretrained(tmp_path / "broken")
    for arguments in (("--csv", tmp_path / "r.csv"), ("--parquet", tmp_path / "r.parquet")):
        assert run("inspect", photos, "--model", tmp_path / "broken", *arguments) == 2
        said = capsys.readouterr()
        assert "the networks' score is nan" in said.err and "normal" not in said.out


def test_a_photo_of_something_else_is_undecided_in_every_file(photo, uncalibrated, tmp_path, capsys):
    pq = pytest.importorskip("pyarrow.parquet", reason="results in Parquet need pip install -e .[train]")
    good, new = tmp_path / "good", tmp_path / "new"
    for folder in (good, new):
        folder.mkdir()
    for i in range(6):
        Image.fromarray((photo * (0.9 + 0.02 * i)).astype(np.uint8)).save(good / f"{i}.png")
    assert run("calibrate", good, "--model", uncalibrated, "--false-alarm-rate", 0.2) == 0
    Image.new("RGB", (40, 48), "white").save(new / "white.png")
    shutil.copy(good / "2.png", new / "known.png")
    names = ("r.json", "r.csv", "r.html", "r.parquet")
    json_file, csv_file, report, parquet = (tmp_path / name for name in names)
    files = ("--json", json_file, "--csv", csv_file, "--report", report)
    assert run("inspect", new, "--model", uncalibrated, *files) == 3
    assert "1 undecided: Unlike any normal image the model knows" in capsys.readouterr().out
    assert "Unlike any normal image" in report.read_text()
    assert run("inspect", new, "--model", uncalibrated, "--parquet", parquet) == 0
    known, white = json.loads(json_file.read_text())["images"]
    cells = list(csv.DictReader(csv_file.open()))
    for record in (white, cells[1], pq.read_table(parquet).to_pylist()[1]):
        found = record["verdict"], record["reason"], str(record["is_familiar"])
        assert found == ("undecided", "unfamiliar", "False") and float(record["strangeness"]) > 1
    assert known["is_familiar"] is True and cells[0]["is_familiar"] == "True"


def test_a_calibration_of_other_settings_is_said_in_every_file(photos, model_dir, tmp_path, capsys):
    calibrated = DiffusionADPipeline.from_pretrained(model_dir)
    calibrated.register_to_config(calibrated_settings=calibrated.settings)
    calibrated.save_pretrained(tmp_path / "model")
    DiffusionADPipeline.from_pretrained(tmp_path / "model", image_size=64).save_pretrained(tmp_path / "larger")
    files = ("--report", tmp_path / "r.html", "--json", tmp_path / "r.json")
    assert run("inspect", photos, "--model", tmp_path / "larger", *files) == 3
    assert "4 undecided: Other settings than the model was calibrated with" in capsys.readouterr().out
    report, images = (tmp_path / "r.html").read_text(), json.loads((tmp_path / "r.json").read_text())["images"]
    assert {(image["verdict"], image["p_value"]) for image in images} == {("undecided", None)}
    assert "Other settings than" in report and "for a false-alarm rate" not in report


def test_a_threshold_set_by_hand_decides_and_says_so(photos, model_dir, capsys):
    for threshold, code, word in ((0.99, 0, "normal"), (0.01, 1, "anomalous")):
        assert run("inspect", photos, "--model", model_dir, "--threshold", threshold) == code
        assert f"4 {word}: At your threshold {threshold}; calibrated: 0.4" in capsys.readouterr().out


def test_the_false_alarm_rate_chooses_the_threshold(photos, model_dir, tmp_path):
    thresholds = []
    for rate in (0.05, 0.5):
        run("inspect", photos, "--model", model_dir, "--json", tmp_path / "r.json", "--false-alarm-rate", rate)
        thresholds.append(json.loads((tmp_path / "r.json").read_text())["images"][0]["threshold"])
    assert thresholds[0] > thresholds[1]


def test_calibrate_sets_the_threshold_of_a_folder(photos, photo, pipe, uncalibrated, capsys):
    bad = unusable("text", photo, photos)
    assert run("calibrate", photos, "--model", uncalibrated, "--false-alarm-rate", 0.4) == 2
    assert str(bad) in capsys.readouterr().err
    calibrated = DiffusionADPipeline.from_pretrained(uncalibrated)
    files = [photos / "a.jpg", photos / "a.png", photos / "b.png", photos / "deep" / "a.png"]
    np.testing.assert_allclose(calibrated.config.calibration_scores, sorted(pipe(files).anomaly_score), atol=1e-4)
    assert calibrated.threshold == calibrated.config.calibration_scores[-2]


def test_copies_litter_and_pictures_of_inspections_do_not_count_in_a_calibration(photos, uncalibrated, capsys):
    run("inspect", photos, "--model", uncalibrated, "--output-dir", photos / "report")
    (photos / ".ipynb_checkpoints").mkdir()
    shutil.copy(photos / "a.png", photos / ".ipynb_checkpoints/a-checkpoint.png")
    (photos / "again").symlink_to("deep")
    assert run("calibrate", photos, "--model", uncalibrated, "--false-alarm-rate", 0.4) == 0
    shutil.copy(photos / "a.png", photos / "deep/copy.png")
    assert run("calibrate", photos, "--model", uncalibrated, "--false-alarm-rate", 0.4) == 2
    assert "left out: 1 image(s) that are copies of others" in capsys.readouterr().err
    assert len(DiffusionADPipeline.from_pretrained(uncalibrated).config.calibration_scores) == 4


def test_calibrate_into_another_folder_leaves_the_first_alone_and_says_if_images_are_too_few(
    photos, uncalibrated, tmp_path, caplog
):
    before = (uncalibrated / "model_index.json").read_bytes()
    assert run("calibrate", photos, "--model", uncalibrated, "--output-dir", tmp_path / "new") == 0
    assert (
        uncalibrated / "model_index.json"
    ).read_bytes() == before and "the threshold is set for 20 %" in caplog.text
    assert np.isfinite(DiffusionADPipeline.from_pretrained(tmp_path / "new").threshold)
