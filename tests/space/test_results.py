"""One visitor's results are theirs alone, and not for ever."""

import inspect
import json
import os
import time
from pathlib import Path

import pytest

from diffusionad_hf.space.intake import Refusal
from diffusionad_hf.space.results import Results


def test_a_result_opens_for_its_owner_only_and_every_other_key_is_refused_alike(results):
    key, folder = results.new("anna")
    assert results.open(key, "anna") == folder
    wrong = ["", "..", "../" + "a" * 29, "a" * 31, "A" * 32, "a" * 32, "g" * 32, None, 5, ["a" * 32]]
    for tried, visitor in ((key, "ben"), (key, ""), *((other, "anna") for other in wrong)):
        with pytest.raises(Refusal, match="no longer kept"):
            results.open(tried, visitor)


def test_sweeping_removes_what_was_not_used_for_an_hour_and_nothing_else(results):
    (results.uploads / "example").mkdir()
    results.keep_what_is_there()
    (results.uploads / "upload").mkdir()
    (results.uploads / "upload" / "photo.png").write_bytes(b"x")
    _, old_folder = results.new("anna")
    hour_ago = time.time() - 3700
    used, used_folder = results.new("anna")
    for entry in (results.uploads / "example", results.uploads / "upload", old_folder, used_folder):
        os.utime(entry, (hour_ago, hour_ago))
    new, _ = results.new("ben")
    results.open(used, "anna")  # which counts as a use
    results.sweep()
    assert (results.uploads / "example").exists() and not (results.uploads / "upload").exists()
    assert results.open(new, "ben").exists() and used_folder.exists() and not old_folder.exists()


def test_uploads_are_swept_whatever_they_are_called_and_one_that_resists_stops_no_other(results):
    """Files of visitors' have any name, and are never taken for notes of the server's."""
    precious = results.folder.parent / "precious"
    precious.mkdir()
    hour_ago = time.time() - 3700
    folders = [results.uploads / name for name in ("a", "b", "c")]
    for folder, content in zip(folders, (json.dumps({"x": str(precious)}), "[1]", "{"), strict=True):
        folder.mkdir()
        (folder / ".shown").write_text(content)
        os.utime(folder, (hour_ago, hour_ago))
    _, damaged = results.new("anna")
    (damaged / ".shown").write_text("[1]")
    os.utime(damaged, (hour_ago, hour_ago))
    results.sweep()
    assert precious.exists() and not any(folder.exists() for folder in folders)


def test_a_visitor_s_copy_of_what_lies_on_the_shelf_is_theirs_and_the_shelf_stays(results):
    example = results.shelf / "example"
    example.mkdir()
    for name in ("map.npy", "photo.jpg"):
        (example / name).write_text(name)
    shown = results.show(example, example / "photo.jpg")
    results.keep_what_is_there()
    key, folder = results.copy(example, ["map.npy", "photo.jpg"], "anna")
    assert results.open(key, "anna") == folder and (folder / "map.npy").read_text() == "map.npy"
    with pytest.raises(Refusal):
        results.open(key, "ben")
    results.show(folder, folder / "photo.jpg")
    results.forget("anna")
    hour_ago = time.time() - 3700
    for entry in (results.shelf, example, Path(shown).parent):
        os.utime(entry, (hour_ago, hour_ago))
    results.sweep()
    assert not folder.exists() and (example / "map.npy").exists() and Path(shown).exists()


def test_leaving_removes_one_visitor_s_results_and_what_was_shown_of_them(results):
    (_, mine), (_, theirs) = results.new("anna"), results.new("ben")
    shown = {}
    for folder in (mine, theirs):
        (folder / "a.png").write_bytes(b"x")
        shown[folder] = Path(results.show(folder, folder / "a.png"))
    results.forget("anna")
    assert theirs.exists() and shown[theirs].exists() and not mine.exists() and not shown[mine].exists()


def test_each_picture_is_served_from_a_folder_of_its_own_whose_name_tells_nothing(results):
    key, folder = results.new("anna")
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes(name.encode())
    first, second = (Path(results.show(folder, folder / name)) for name in ("a.png", "b.png"))
    assert first.read_bytes() == b"a.png" and results.show(folder, folder / "a.png") == str(first)
    assert first.parent != second.parent and [file.name for file in first.parent.iterdir()] == ["a.png"]
    assert all(path.is_relative_to(results.uploads) and key not in str(path) for path in (first, second))
    changed = second.parent.stat().st_mtime_ns
    assert results.show(folder, folder / "b.png") == str(second)
    assert second.parent.stat().st_mtime_ns == changed, "not made anew: a browser may be reading it"
    (folder / "c.png").write_bytes(b"other")
    (folder / "c.png").replace(folder / "b.png")
    results.show(folder, folder / "b.png")
    assert second.read_bytes() == b"other"
    (folder / "a.png").unlink()
    results.show(folder, folder / "b.png")
    assert not first.parent.exists() and second.exists(), "what the result no longer has is no longer served"


def test_the_stated_hour_is_kept_by_itself(tmp_path):
    parameters = inspect.signature(Results).parameters, inspect.signature(Results.sweep_forever).parameters
    assert parameters[0]["keep_seconds"].default + parameters[1]["every_seconds"].default <= 3600
    results = Results(tmp_path / "server", keep_seconds=0.2)
    results.sweep_forever(every_seconds=0.05)
    _, folder = results.new("anna")
    (folder / "photo.png").write_bytes(b"x")
    (results.uploads / "upload.png").write_bytes(b"x")
    for _ in range(200):
        if not folder.exists() and not (results.uploads / "upload.png").exists():
            return
        time.sleep(0.05)
    raise AssertionError("photos outlived their time")
