"""The first thing that is wrong is said, at once, and not what comes after it."""

import logging
import re

import pytest
from huggingface_hub import constants

from diffusionad_hf.cli.main import main
from tests.dataset_factory import make_folder


@pytest.fixture(autouse=True)
def nobody(monkeypatch, tmp_path):
    """No login, and a Hub that does not answer."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.hf_api.ENDPOINT", "http://127.0.0.1:9", raising=False)
    monkeypatch.setattr("diffusionad_hf.hub.checks.get_token", lambda: None)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["calibrate", "{photos}", "--model", "nothing"], "nothing: no such folder"),
        (["calibrate", "{photos}", "--model", "./runs/nothing"], "./runs/nothing: no such folder"),
        (["calibrate", "{photos}", "--model", "runs/nothing"], "runs/nothing: no folder here; .* --output-dir"),
        (["calibrate", "nowhere", "--model", "{model}"], "nowhere: no such file or folder"),
        (["inspect", "{photos}", "--model", "nothing"], "nothing: no such folder"),
        (["inspect", "https://example.org/a.png", "--model", "nothing"], "a.png: an address; download it first"),
        (["evaluate", "--data-dir", "nowhere", "--model", "nothing"], "nowhere"),
        (["evaluate", "--data-dir", "{damaged}", "--model", "nothing"], "nothing: no such folder"),
        (["export", "out", "--model", "nothing"], "nothing: no such folder"),
        (["publish", "nothing", "--repo-id", "me/x"], "nothing: no such folder"),
        (["publish", "{photos}", "--repo-id", "me/x"], "photos: no model_index.json in this folder"),
        (["publish", "{model}", "--repo-id", "me/x", "--evaluation", "no.json"], "no.json: no such file"),
        (["publish", "{model}", "--repo-id", "me/x", "--examples", "no.png"], "no.png: no such image file"),
        (["publish", "{model}", "--repo-id", "x"], "ORG/NAME"),
        (["publish", "{model}", "--repo-id", "me/x"], "token"),
        (["convert", "nothing.pt", "out"], "nothing.pt"),
        (["list"], "the Hub cannot be reached"),
    ],
)
def test_the_first_thing_that_is_wrong_is_said(command, words, tmp_path, pipe, capsys, caplog):
    photos = make_folder(tmp_path / "photos")
    model = tmp_path / "model"
    pipe.save_pretrained(model)
    damaged = make_folder(tmp_path / "damaged")
    for file in damaged.rglob("*.png"):
        file.write_bytes(b"damaged")
    with caplog.at_level(logging.WARNING):
        assert main([part.format(photos=photos, model=model, damaged=damaged) for part in command]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("diffusionad: error: ")
    assert re.search(words, said), said
    assert "Retry" not in caplog.text
