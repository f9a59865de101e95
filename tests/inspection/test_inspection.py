"""Inspection of many files and the command line, as scripts and people use it."""

import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusionad_hf import DiffusionADPipeline
from diffusionad_hf.cli.main import main
from diffusionad_hf.inspection.inspection import Inspection, find_images, inspect_files, write_csv, write_json
from tests.conftest import make_pipeline
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


def run(*arguments):
    return main([str(a) for a in arguments])


# ---- which files
# --------------------------------------------------------------------------------------------------------------------


def test_files_folders_and_patterns_each_once(photos, monkeypatch):
    monkeypatch.chdir(photos.parent)
    files, failures = find_images(["photos", "photos/*.png", "photos/a.png"])
    assert [f.as_posix() for f in files] == ["photos/a.jpg", "photos/a.png", "photos/b.png", "photos/deep/a.png"]
    assert failures == []


def test_inputs_that_name_nothing_are_said(photos):
    (photos / "empty").mkdir()
    _, failures = find_images([photos / "empty", photos / "*.gif", photos / "nothing.png"])
    assert [f.error.split(": ")[1] for f in failures] == [
        "no images in this folder.",
        "no file matches this pattern.",
        "no such file or folder.",
    ]


def test_suffixes_count_in_upper_case_too(tmp_path):
    for name in ("A.PNG", "b.Jpg", "c.TXT"):
        (tmp_path / name).touch()
    files, _ = find_images([tmp_path])
    assert [file.name for file in files] == ["A.PNG", "b.Jpg"]


def test_two_stars_in_a_pattern_reach_every_depth(photos):
    (photos / "deep" / "down").mkdir()
    (photos / "deep" / "down" / "c.png").touch()
    files, _ = find_images([photos / "**" / "*.png"])
    names = [file.relative_to(photos).as_posix() for file in files]
    assert names == ["a.png", "b.png", "deep/a.png", "deep/down/c.png"]


# ---- inspect
#
#
#
#
#
#
#
#
#
#
#
# ---------------------------------------------------------------------------------------------------------------------


def test_inspect_writes_pictures_json_csv_and_a_table(photos, model_dir, tmp_path, capsys):
    out = tmp_path / "out"
    assert (
        run(
            "inspect",
            photos,
            "--model",
            model_dir,
            "--output-dir",
            out,
            "--json",
            out / "r.json",
            "--csv",
            out / "r.csv",
        )
        == 0
    )
    printed = capsys.readouterr().out
    report = json.loads((out / "r.json").read_text())
    rows = list(csv.DictReader((out / "r.csv").open()))
    assert len(report["images"]) == len(rows) == 4 and report["failures"] == []
    pipe = DiffusionADPipeline.from_pretrained(model_dir)
    for image, row in zip(report["images"], rows, strict=True):
        expected = pipe(image["file"])
        assert image["score"] == pytest.approx(expected.anomaly_score[0], abs=1e-5) == float(row["score"])
        assert image["p_value"] == pytest.approx(expected.p_value[0])
        assert image["verdict"] == ("anomalous" if expected.is_anomalous[0] else "normal") == row["verdict"]
        assert image["file"] in printed and f"{image['score']:.4f}" in printed
        size = Image.open(image["file"]).size
        assert set(image["pictures"]) == {"overlay", "mask", "reconstruction"}
        for picture in image["pictures"].values():
            assert Image.open(picture).size == size
    pictures = [p for image in report["images"] for p in image["pictures"].values()]
    assert len(set(pictures)) == 12


def test_regions_lie_where_the_map_is_high(photos, model_dir, tmp_path):
    # A threshold under every score makes every image anomalous; regions then are what the map says.
    pipe = DiffusionADPipeline.from_pretrained(model_dir)
    anomaly_map = pipe(photos / "b.png").anomaly_map[0]
    threshold = float(np.quantile(anomaly_map, 0.9))
    assert (
        run("inspect", photos / "b.png", "--model", model_dir, "--threshold", threshold, "--json", tmp_path / "r.json")
        == 0
    )
    image = json.loads((tmp_path / "r.json").read_text())["images"][0]
    assert image["verdict"] == "anomalous" and image["threshold"] == threshold and image["regions"] and image["where"]
    for region in image["regions"]:
        x0, y0, x1, y1 = region["box"]
        assert (
            anomaly_map[y0:y1, x0:x1].max() == pytest.approx(region["peak"], abs=1e-4) and region["peak"] >= threshold
        )
        assert 0 < region["area_px"] <= (x1 - x0) * (y1 - y0)


@pytest.mark.parametrize("kind", UNUSABLE)
def test_one_bad_file_never_stops_the_others(kind, photos, photo, model_dir, tmp_path, capsys):
    bad = unusable(kind, photo, photos)
    out = tmp_path / "out"
    arguments = (photos, "--model", model_dir, "--output-dir", out, "--json", out / "r.json", "--csv", out / "r.csv")
    assert run("inspect", *arguments, "--batch-size", 2) == 2
    report = json.loads((out / "r.json").read_text())
    assert len(report["images"]) == 4
    assert [f["file"] for f in report["failures"]] == [str(bad)]
    assert str(bad) in capsys.readouterr().err
    assert [row["error"] != "" for row in csv.DictReader((out / "r.csv").open())].count(True) == 1


def test_results_after_a_bad_file_are_those_of_their_own_images(pipe, photo, tmp_path):
    files = [tmp_path / f"{i}.png" for i in range(4)]
    for i, file in enumerate(files):
        Image.fromarray(np.roll(photo, 9 * i, axis=0)).save(file)
    files[1].write_bytes(b"no image")
    results = list(inspect_files(pipe, files, batch_size=4))
    assert [result.file for result in results] == [str(file) for file in files]
    scores = [results[i].score for i in (0, 2, 3)]
    expected = [float(pipe(files[i]).anomaly_score[0]) for i in (0, 2, 3)]
    assert min(np.diff(sorted(expected))) > 1e-5, "or they could not be told apart"
    assert scores == pytest.approx(expected, abs=1e-6)


def test_a_normal_image_has_no_regions_though_single_pixels_lie_above_the_threshold(photo, tmp_path):
    file = tmp_path / "a.png"
    Image.fromarray(photo).save(file)
    pipe = make_pipeline()
    found = pipe(file)
    score, peak = float(found.anomaly_score[0]), float(found.anomaly_map[0].max())
    assert score < peak
    pipe.register_to_config(threshold=(score + peak) / 2)
    (result,) = inspect_files(pipe, [file], tmp_path / "out")
    assert result.verdict == "normal" and result.regions == [] and result.where == []
    mask = Image.open(result.pictures["mask"])
    assert mask.size == Image.open(file).size and not np.asarray(mask).any()


def test_the_mask_follows_the_threshold(photo, tmp_path):
    file = tmp_path / "a.png"
    Image.fromarray(photo).save(file)
    pipe = make_pipeline()
    anomaly_map = pipe(file).anomaly_map[0]
    for share in (0.9, 0.7):
        threshold = float(np.quantile(anomaly_map, share))
        pipe.register_to_config(threshold=threshold)
        (result,) = inspect_files(pipe, [file], tmp_path / "out")
        mask = np.asarray(Image.open(result.pictures["mask"]))
        assert result.verdict == "anomalous"
        np.testing.assert_array_equal(mask > 0, anomaly_map >= threshold)


def test_a_threshold_that_no_score_exceeds_is_null_in_json(tmp_path):
    write_json(tmp_path / "r.json", "model", [Inspection("a.png", 0.1, math.inf, "normal", 0.5, 0.1, [], [])])
    written = (tmp_path / "r.json").read_text()
    assert json.loads(written)["images"][0]["threshold"] is None and "Infinity" not in written


def test_the_table_counts_the_regions_and_shows_the_largest(tmp_path):
    areas = {(0, 0, 2, 2): 4, (5, 5, 8, 8): 9, (1, 4, 2, 5): 1}
    regions = [{"box": box, "area_px": area} for box, area in areas.items()]
    write_csv(tmp_path / "r.csv", [Inspection("a.png", 0.9, 0.5, "anomalous", 0.05, 0.1, ["top left"], regions)])
    with (tmp_path / "r.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert row["regions"] == "3" and row["largest_box"] == "5 5 8 8"


def test_batch_size_does_not_change_a_result(photos, model_dir, tmp_path):
    scores = []
    for size in (1, 3, 8):
        assert run("inspect", photos, "--model", model_dir, "--json", tmp_path / "r.json", "--batch-size", size) == 0
        scores.append([image["score"] for image in json.loads((tmp_path / "r.json").read_text())["images"]])
    np.testing.assert_allclose(scores[1], scores[0], atol=1e-6)
    np.testing.assert_allclose(scores[2], scores[0], atol=1e-6)


def test_results_are_kept_when_a_picture_cannot_be_written(photos, model_dir, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "deep").write_text("a file where a folder has to be")
    arguments = (photos, "--model", model_dir, "--output-dir", out, "--json", tmp_path / "r.json", "--batch-size", 1)
    assert run("inspect", *arguments) == 2
    assert "deep" in capsys.readouterr().err
    assert len(json.loads((tmp_path / "r.json").read_text())["images"]) == 3


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["{photos}/nothing.png"], "nothing.png: no such file or folder"),
        (["{photos}/empty"], "empty: no images in this folder"),
        (["{photos}", "--device", "cuda:7"], "--device cuda:7"),
        (["{photos}", "--output-dir", "{photos}/a.png/out"], "cannot write there"),
        (["{photos}", "--json", "{photos}/a.png/r.json"], "cannot write there"),
    ],
)
def test_nothing_to_do_is_one_line_and_exit_code_2(arguments, reason, photos, model_dir, capsys):
    (photos / "empty").mkdir()
    assert run("inspect", *(a.format(photos=photos) for a in arguments), "--model", model_dir) == 2
    error = capsys.readouterr().err
    assert reason in error and error.count("\n") == 1


def test_a_model_that_is_not_there(photos, tmp_path, capsys):
    assert run("inspect", photos, "--model", tmp_path / "nothing") == 2
    assert "nothing: no such folder" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--batch-size", "0"], ["--batch-size", "x"], ["--false-alarm-rate", "1.5"]])
def test_nonsense_values_are_named(arguments, photos, model_dir, capsys):
    with pytest.raises(SystemExit) as stopped:
        run("inspect", photos, "--model", model_dir, *arguments)
    assert stopped.value.code == 2 and arguments[0] in capsys.readouterr().err


def test_an_uncalibrated_model_gives_scores_and_says_what_to_do(photos, pipe, tmp_path, capsys):
    pipe.save_pretrained(tmp_path / "model")
    assert run("inspect", photos, "--model", tmp_path / "model") == 0
    assert "not calibrated" in capsys.readouterr().out
    assert run("inspect", photos, "--model", tmp_path / "model", "--false-alarm-rate", 0.1) == 2


def test_the_false_alarm_rate_chooses_the_threshold(photos, model_dir, tmp_path):
    thresholds = []
    for rate in (0.05, 0.5):
        run("inspect", photos, "--model", model_dir, "--json", tmp_path / "r.json", "--false-alarm-rate", rate)
        thresholds.append(json.loads((tmp_path / "r.json").read_text())["images"][0]["threshold"])
    assert thresholds[0] > thresholds[1]


def test_help_needs_neither_torch_nor_diffusers():
    code = (
        "import sys; from diffusionad_hf.cli.main import main\n"
        "try: main(['inspect', '--help'])\nexcept SystemExit: pass\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code + "assert not {'torch', 'diffusers'} & set(sys.modules)"], capture_output=True
    )
    assert done.returncode == 0 and b"INPUT" in done.stdout, done.stderr


# ---- calibrate
#
#
#
#
#
#
#
#
#
#
#
# ---------------------------------------------------------------------------------------------------------------------


def test_calibrate_sets_the_threshold_of_a_folder(photos, photo, pipe, tmp_path, capsys):
    pipe.save_pretrained(tmp_path / "model")
    bad = unusable("text", photo, photos)
    assert run("calibrate", photos, "--model", tmp_path / "model", "--false-alarm-rate", 0.4) == 2
    assert str(bad) in capsys.readouterr().err
    calibrated = DiffusionADPipeline.from_pretrained(tmp_path / "model")
    files = [photos / "a.jpg", photos / "a.png", photos / "b.png", photos / "deep" / "a.png"]
    np.testing.assert_allclose(calibrated.config.calibration_scores, sorted(pipe(files).anomaly_score), atol=1e-4)
    assert calibrated.threshold == calibrated.config.calibration_scores[-2]


def test_calibrate_into_another_folder_leaves_the_first_alone(photos, pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    before = (tmp_path / "model/model_index.json").read_bytes()
    arguments = ("--model", tmp_path / "model", "--false-alarm-rate", 0.4, "--output-dir", tmp_path / "new")
    assert run("calibrate", photos, *arguments) == 0
    assert (tmp_path / "model/model_index.json").read_bytes() == before
    assert DiffusionADPipeline.from_pretrained(tmp_path / "new").threshold is not None


def test_too_few_images_for_the_promised_rate_are_said(photos, pipe, tmp_path, caplog):
    pipe.save_pretrained(tmp_path / "model")
    assert run("calibrate", photos, "--model", tmp_path / "model", "--false-alarm-rate", 0.05) == 0
    assert "Give 19 or more" in caplog.text


def test_calibrating_a_hub_model_asks_where_to(photos, capsys):
    assert run("calibrate", photos, "--model", "org/name") == 2
    assert "--output-dir" in capsys.readouterr().err


# ---- evaluate
#
#
#
#
#
#
#
#
#
#
#
# ---------------------------------------------------------------------------------------------------------------------


def test_evaluate_prints_and_writes_the_metrics(model_dir, tmp_path, capsys):
    root = Path(tmp_path) / "data" / "part"
    rng = np.random.default_rng(0)
    for i in range(4):
        for folder in ("train/good", "test/good", "test/hole", "ground_truth/hole"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        image = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        mask = np.zeros((32, 32), np.uint8)
        mask[4:9, 4:9] = 255
        Image.fromarray(image).save(root / f"train/good/{i}.png")
        Image.fromarray(image).save(root / f"test/good/{i}.png")
        Image.fromarray(np.where(mask[..., None], 255 - image, image)).save(root / f"test/hole/{i}.png")
        Image.fromarray(mask).save(root / f"ground_truth/hole/{i}_mask.png")
    (root / "test/good/9.png").write_bytes(b"")
    arguments = (
        "--model",
        model_dir,
        "--data-dir",
        root.parent,
        "--json",
        tmp_path / "e.json",
        "--plots",
        tmp_path / "plots",
    )
    # One of nine files is more than the 5 % that may be unusable.
    assert run("evaluate", *arguments) == 2 and "9.png" in capsys.readouterr().err
    (root / "test/good/9.png").unlink()
    assert run("evaluate", *arguments) == 0
    printed, written = capsys.readouterr().out, json.loads((tmp_path / "e.json").read_text())
    assert f"{written['image_auroc']:.4f}" in printed and f"{written['aupro_30']:.4f}" in printed
    assert written["num_images"] == 8 and {p.name for p in (tmp_path / "plots").iterdir()} >= {"roc_curve.png"}


def test_a_pass_takes_the_pipelines_default_number_of_images_unless_asked(tmp_path, pipe, photo, monkeypatch):
    files = [tmp_path / f"{i}.png" for i in range(pipe.default_batch_size + 1)]
    for file in files:
        Image.fromarray(photo).save(file)
    passes, inspect = [], DiffusionADPipeline._inspect
    monkeypatch.setattr(
        DiffusionADPipeline,
        "_inspect",
        lambda self, pixels, *args: (passes.append(len(pixels)), inspect(self, pixels, *args))[1],
    )
    assert len(list(inspect_files(pipe, files))) == len(files)
    assert passes == [pipe.default_batch_size, 1]
    passes.clear()
    list(inspect_files(pipe, files[:5], batch_size=3))
    assert passes == [3, 2]
