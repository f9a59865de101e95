"""Inspection of files: which ones, what is found on them, and what one bad file does to the others."""

import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusionad_hf import DiffusionADPipeline
from diffusionad_hf.inspection.inspection import (
    Item,
    Pictures,
    _read_ahead,
    find_images,
    inspect_files,
    picture_names,
    read_list,
)
from diffusionad_hf.inspection.records import Failure
from tests.conftest import make_pipeline


@pytest.fixture
def file(photo, tmp_path):
    Image.fromarray(photo).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def test_files_folders_and_patterns_each_once_and_inputs_that_name_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("photos/B.PNG", "photos/a.Jpg", "photos/deep/down/c.png", "photos/notes.txt", "empty/d.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    nothing = ["empty", "photos/*.gif", "nothing.png"]
    files, failures = find_images(["photos", *nothing, "photos/**/*.[pP]*", "photos/B.PNG"])
    assert [file.as_posix() for file in files] == ["photos/B.PNG", "photos/a.Jpg", "photos/deep/down/c.png"]
    assert [failure.file for failure in failures] == nothing and len({f.error.split(":")[1] for f in failures}) == 3


def test_pictures_have_names_that_differ_and_stay_in_their_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {
        "p/a.jpg": "p/a",
        "p/a.png": "p/a_png",
        "p/deep/a.png": "p/deep/a",
        "p/../q/a.png": "q/a",
        "p/../p/a.png": "p/a_png_png",
    }
    assert picture_names([Path(name) for name in names]) == {Path(k): os.path.normpath(v) for k, v in names.items()}
    assert list(picture_names([Path("p/a.b.png")]).values()) == ["a.b"] and picture_names([]) == {}


def test_pictures_of_long_names_and_of_names_that_differ_in_capitals_alone_are_apart():
    names = list(picture_names([Path(f"p/{stem}.png") for stem in ("x" * 250, "x" * 249 + "y", "A", "a")]).values())
    assert len({name.lower() for name in names}) == 4 and max(map(len, names)) == 255 - len("_reconstruction.png")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_list_of_files_as_any_system_writes_it(tmp_path, encoding, end):
    names = ["件.png", " a.png", "b\x85c\u2028.png", "d e.png"]
    (tmp_path / " a.png").touch()
    text = end.join(str(tmp_path / name) for name in names) + f"{end}{end}  {names[0]} {end}"
    (tmp_path / "list").write_bytes(text.encode(encoding))
    assert read_list(tmp_path / "list") == [*(tmp_path / name for name in names), Path(names[0])]


def test_a_list_may_name_files_whose_names_are_no_text_and_a_picture_is_no_list(tmp_path, file):
    (tmp_path / "list").write_bytes(b"\xc1\xe3.png\n")
    assert os.fsencode(read_list(tmp_path / "list")[0]) == b"\xc1\xe3.png"
    with pytest.raises(ValueError, match="a.png: not a text file"):
        read_list(file)


def test_litter_is_left_out_of_folders_and_patterns_but_not_if_it_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["p/a.png", "p/._a.png", "p/__MACOSX/a.png", "p/.ipynb_checkpoints/a-checkpoint.png", ".q/b.png"]
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()

    def found(*inputs):
        return [file.as_posix() for file in find_images(inputs)[0]]

    assert found("p", "p/**/*.png") == ["p/a.png"]
    assert found("p/__MACOSX", "p/._a.png", "p/__MACOSX/*.png", ".q", ".q/*.png") == [*names[2:3], names[1], names[4]]


@pytest.mark.parametrize("where", ["p", "p/report", "p/report/deep"])
def test_pictures_of_inspections_are_not_inspected_whatever_is_left_of_them(pipe, photo, tmp_path, where, caplog):
    folder = tmp_path / "p"
    folder.mkdir()
    # A mask of the user's own is no picture of an inspection, whatever its name.
    for name in ("a.png", "a_mask.png"):
        Image.fromarray(photo).save(folder / name)
    files, _ = find_images([folder])
    assert len(files) == 2
    (result,) = inspect_files(pipe, files[:1], Pictures(tmp_path / "elsewhere", parts=True))
    assert len(list(inspect_files(pipe, files[1:], Pictures(tmp_path / where, parts=True)))) == 1
    (tmp_path / where / "a_mask_overlay.png").rename(tmp_path / where / "a_mask-map.png")  # as the web demo calls them
    assert find_images([folder]) == (files, [])
    assert "4 picture(s) that an inspection wrote are left out, such as" in caplog.text
    assert find_images([result.pictures["mask"]])[0] == [Path(result.pictures["mask"])]
    assert [f.error for f in find_images([tmp_path / "elsewhere"])[1]] == [
        f"{tmp_path}/elsewhere: no images in this folder."
    ]


def test_results_after_a_bad_file_are_those_of_their_own_images(pipe, photo, tmp_path):
    files = [tmp_path / f"{i}.png" for i in range(4)]
    for i, file in enumerate(files):
        Image.fromarray(np.roll(photo, 9 * i, axis=0)).save(file)
    files[1].write_bytes(b"no image")
    results = list(inspect_files(pipe, files, batch_size=4))
    assert [result.file for result in results] == [str(file) for file in files]
    assert [isinstance(result, Failure) for result in results] == [False, True, False, False]
    expected = [float(pipe(files[i]).anomaly_score[0]) for i in (0, 2, 3)]
    assert min(np.diff(sorted(expected))) > 1e-5, "or they could not be told apart"
    assert [results[i].score for i in (0, 2, 3)] == pytest.approx(expected, abs=1e-6)


def test_a_normal_image_has_no_regions_though_single_pixels_lie_above_the_threshold(file, tmp_path):
    pipe = make_pipeline()
    found = pipe(file)
    score, peak = float(found.anomaly_score[0]), float(found.anomaly_map[0].max())
    assert score < peak
    pipe.register_to_config(threshold=(score + peak) / 2)
    (result,) = inspect_files(pipe, [file], Pictures(tmp_path / "out", parts=True))
    assert result.verdict == "normal" and result.regions == [] and result.where == []
    mask = Image.open(result.pictures["mask"])
    assert mask.size == Image.open(file).size and not np.asarray(mask).any()


@pytest.mark.parametrize("share", [0.9, 0.7])
def test_regions_and_mask_are_where_the_map_is_above_the_threshold(share, file, tmp_path):
    pipe = make_pipeline()
    anomaly_map = pipe(file).anomaly_map[0]
    threshold = float(np.quantile(anomaly_map, share))
    pipe.register_to_config(threshold=threshold)
    (result,) = inspect_files(pipe, [file], Pictures(tmp_path / "out", parts=True))
    assert result.verdict == "anomalous" and result.threshold == threshold and result.regions and result.where
    np.testing.assert_array_equal(np.asarray(Image.open(result.pictures["mask"])) > 0, anomaly_map >= threshold)
    for region in result.regions:
        x0, y0, x1, y1 = region["box"]
        assert anomaly_map[y0:y1, x0:x1].max() == pytest.approx(region["peak"], abs=1e-4)
        assert region["peak"] >= threshold and 0 < region["area_px"] <= (x1 - x0) * (y1 - y0)


def test_a_pass_takes_the_pipelines_default_number_of_images_unless_asked(pipe, file, monkeypatch):
    passes, inspect = [], DiffusionADPipeline._inspect

    def counting(self, pixels, *arguments):
        passes.append(len(pixels))
        return inspect(self, pixels, *arguments)

    monkeypatch.setattr(DiffusionADPipeline, "_inspect", counting)
    assert len(list(inspect_files(pipe, [file] * (pipe.default_batch_size + 1)))) == sum(passes)
    assert passes == [pipe.default_batch_size, 1]
    passes.clear()
    list(inspect_files(pipe, [file] * 5, batch_size=3))
    assert passes == [3, 2]


def test_images_are_read_while_the_model_works_and_only_so_many():
    made, read = [], threading.Event()

    def batches():
        for i in range(20):
            made.append(i)
            if i == 2:
                read.set()
            yield [Item("x", b"")]

    reading = _read_ahead(batches())
    next(reading)
    # The consumer holds the first batch; those that follow are read meanwhile, and no more than the queue takes.
    assert read.wait(timeout=30)
    time.sleep(0.3)
    assert len(made) <= 5
    assert len(list(reading)) == 19


def test_a_source_that_fails_stops_the_run_and_is_no_row():
    def batches():
        yield [Item("a", b"")]
        raise OSError("the connection broke")

    with pytest.raises(OSError, match="the connection broke"):
        list(_read_ahead(batches()))
