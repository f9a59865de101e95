"""Texture banks: from folders as they are found, and from nothing."""

import numpy as np
import pytest
import torch
from PIL import Image

from diffusionad_hf.training.textures import FolderTextures, ProceduralTextures


def save(path, color, size=(30, 20), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path)


def test_a_folder_becomes_a_bank_in_the_order_of_its_sorted_paths(tmp_path):
    save(tmp_path / "b" / "1.png", (0, 0, 255))
    save(tmp_path / "a" / "2.JPG", (250, 0, 0), size=(400, 300))
    save(tmp_path / "a" / "deeper" / "3.png", 128, mode="L")
    (tmp_path / "notes.txt").write_text("not an image")
    bank = FolderTextures(tmp_path, 16).bank
    assert bank.shape == (3, 3, 16, 16) and bank.dtype == torch.uint8
    assert bank[0, 0].float().mean() > 245 and bank[0, 2].float().mean() < 10, "a/2.JPG is red: channels are RGB"
    assert torch.all(bank[1] == 128)
    assert torch.all(bank[2, 2] == 255) and torch.all(bank[2, :2] == 0)


def test_proportions_are_kept(tmp_path):
    circle = np.zeros((40, 80, 3), dtype=np.uint8)
    circle[10:30, 30:50] = 255  # a centred square
    Image.fromarray(circle).save(tmp_path / "wide.png")
    square = FolderTextures(tmp_path, 40).bank[0, 0] > 128
    assert square.any(0).sum() == square.any(1).sum() == 20


def test_bad_files_are_named_and_skipped(tmp_path, caplog):
    save(tmp_path / "good.png", (1, 2, 3))
    (tmp_path / "bad.png").write_bytes(b"not a PNG")
    (tmp_path / "empty.jpg").write_bytes(b"")
    whole = (tmp_path / "good.png").read_bytes()
    (tmp_path / "truncated.png").write_bytes(whole[: len(whole) // 2])
    bank = FolderTextures(tmp_path, 8).bank
    assert len(bank) == 1
    for name in ("bad.png", "empty.jpg", "truncated.png"):
        assert name in caplog.text


def test_the_limit_takes_from_the_whole_folder(tmp_path):
    for i in range(20):
        save(tmp_path / f"{i:02d}.png", (i * 10, 0, 0), size=(4, 4))
    bank = FolderTextures(tmp_path, 4, limit=5).bank
    assert bank[:, 0, 0, 0].tolist() == [0, 40, 80, 120, 160]


def test_missing_and_empty_folders_say_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.*ProceduralTextures"):
        FolderTextures(tmp_path / "nowhere", 8)
    with pytest.raises(ValueError, match=f"{tmp_path.name}.*ProceduralTextures"):
        FolderTextures(tmp_path, 8)
    (tmp_path / "bad.png").write_bytes(b"not a PNG")
    with pytest.raises(ValueError, match="no readable image in it; give a folder"):
        FolderTextures(tmp_path, 8)


def test_procedural_textures_are_repeatable_and_a_longer_bank_begins_like_a_shorter_one():
    bank = ProceduralTextures(32, 24, seed=5).bank
    assert bank.shape == (24, 3, 32, 32) and bank.dtype == torch.uint8
    assert torch.equal(bank[:12], ProceduralTextures(32, 12, seed=5).bank)
    assert not torch.equal(bank[:12], ProceduralTextures(32, 12, seed=6).bank)


def test_procedural_textures_vary_in_colour_contrast_and_scale():
    bank = ProceduralTextures(64, 120).bank.float()
    assert len({tuple(texture.flatten().tolist()) for texture in bank}) == 120
    assert bank.std((2, 3)).amax(1).min() > 0.5, "none is flat"
    means = bank.mean((2, 3))
    assert means.std(0).min() > 30, "colours vary"
    grey = (bank[:, 0] == bank[:, 1]).flatten(1).float().mean(1)
    assert 0 < (grey > 0.3).sum() < 60, "some are grey"
    # Detail: how much neighbours differ, against the whole contrast, from gradients to white noise.
    detail = bank.diff(dim=3).abs().mean((1, 2, 3)) / bank.std((1, 2, 3)).clamp_min(1)
    assert detail.min() < 0.15 and detail.max() > 0.8
