"""One visitor's results are theirs alone, and not for ever."""

import inspect
import os
import time

import pytest

from diffusionad_hf.space.intake import Refusal
from diffusionad_hf.space.results import Results


def test_a_result_opens_for_its_owner_only(results):
    key, folder = results.new("anna")
    assert results.open(key, "anna") == folder
    for other in ("ben", ""):
        with pytest.raises(Refusal):
            results.open(key, other)


@pytest.mark.parametrize(
    "key", ["", "..", "../" + "a" * 29, "a" * 31, "A" * 32, "a" * 32, "g" * 32, None, 5, ["a" * 32]]
)
def test_every_other_key_is_refused_alike(results, key):
    with pytest.raises(Refusal, match="no longer kept"):
        results.open(key, "anna")


def test_sweeping_removes_what_was_not_used_for_an_hour_and_nothing_else(results):
    (results.folder / "example").mkdir()
    results.keep_what_is_there()
    (results.folder / "upload").mkdir()
    (results.folder / "upload" / "photo.png").write_bytes(b"x")
    old, old_folder = results.new("anna")
    hour_ago = time.time() - 3700
    for entry in (results.folder / "example", results.folder / "upload", old_folder):
        os.utime(entry, (hour_ago, hour_ago))
    new, _ = results.new("ben")
    results.sweep()
    assert (results.folder / "example").exists() and not (results.folder / "upload").exists()
    results.open(new, "ben")
    with pytest.raises(Refusal):
        results.open(old, "anna")


def test_using_a_result_keeps_it(results):
    key, folder = results.new("anna")
    os.utime(folder, (1, 1))
    results.open(key, "anna")
    results.sweep()
    assert folder.exists()


def test_leaving_removes_one_visitor_s_results(results):
    mine, _ = results.new("anna")
    theirs, _ = results.new("ben")
    results.forget("anna")
    with pytest.raises(Refusal):
        results.open(mine, "anna")
    results.open(theirs, "ben")


def test_the_stated_hour_is_kept_by_itself(tmp_path):
    parameters = inspect.signature(Results).parameters, inspect.signature(Results.sweep_forever).parameters
    assert parameters[0]["keep_seconds"].default + parameters[1]["every_seconds"].default <= 3600
    results = Results(tmp_path / "server", keep_seconds=0.2)
    results.sweep_forever(every_seconds=0.05)
    _, folder = results.new("anna")
    (folder / "photo.png").write_bytes(b"x")
    (results.folder / "upload.png").write_bytes(b"x")
    for _ in range(200):
        if not folder.exists() and not (results.folder / "upload.png").exists():
            return
        time.sleep(0.05)
    raise AssertionError("photos outlived their time")
