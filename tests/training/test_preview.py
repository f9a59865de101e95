"""The contact sheet, from the command line to the pixels."""

import numpy as np
import pytest
from PIL import Image

from diffusionad_hf.training.preview import COLUMNS, TITLE, main


@pytest.fixture
def data_dir(tmp_path):
    rng = np.random.default_rng(0)
    for split in ("train/good", "test/good"):
        folder = tmp_path / "data" / "disc" / split
        folder.mkdir(parents=True)
        for i in range(5):
            y, x = np.mgrid[:80, :80]
            image = np.full((80, 80, 3), 200.0) + rng.normal(0, 2, (80, 80, 3))
            image[(y - 40) ** 2 + (x - 38 - i) ** 2 < 600] = (60, 90, 40)
            Image.fromarray(np.clip(image, 0, 255).astype(np.uint8)).save(folder / f"{i:03d}.png")
    return tmp_path / "data"


def column(sheet, name, size):
    i = COLUMNS.index(name)
    return np.asarray(sheet)[2 * TITLE :, i * size : (i + 1) * size]


def run(data_dir, tmp_path, *options):
    output = tmp_path / "out" / "sheet.png"
    code = main(["--data-dir", str(data_dir), "--output", str(output), "--resolution", "64", *options])
    return code, Image.open(output) if code == 0 else None


def test_the_sheet_shows_images_foregrounds_anomalies_and_masks(data_dir, tmp_path, capsys):
    code, sheet = run(data_dir, tmp_path, "--category", "disc", "--rows", "3")
    assert code == 0 and sheet.size == (6 * 64, 3 * 64 + 2 * TITLE)
    assert "disc: object" in capsys.readouterr().out
    images, foregrounds = column(sheet, "image", 64), column(sheet, "foreground", 64)
    kept = (images == foregrounds).all(2)
    assert 0.25 < kept.mean() < 0.4, "the disc fills 0.29 of the picture"
    assert images[kept].mean() < 80 and foregrounds[~kept].mean() < 80 < images[~kept].mean()
    anomalies, masks = column(sheet, "anomaly", 64), column(sheet, "mask", 64)
    changed = (anomalies != images).any(2)
    assert changed.any() and (masks[changed] == 255).all()


def test_it_is_repeatable_and_the_seed_matters(data_dir, tmp_path):
    sheets = [np.asarray(run(data_dir, tmp_path, "--rows", "2", "--seed", seed)[1]).copy() for seed in ("1", "1", "2")]
    assert np.array_equal(sheets[0], sheets[1]) and not np.array_equal(sheets[0], sheets[2])


def test_given_textures_masks_and_kind_are_used(data_dir, tmp_path, capsys):
    (tmp_path / "textures").mkdir()
    Image.new("RGB", (20, 20), (255, 0, 0)).save(tmp_path / "textures" / "red.png")
    (tmp_path / "masks").mkdir()
    for i in range(5):
        mask = Image.new("L", (80, 80))
        mask.paste(255, (0, 0, 40, 80))
        mask.save(tmp_path / "masks" / f"{i:03d}.png")
    textures, masks = str(tmp_path / "textures"), str(tmp_path / "masks")
    code, sheet = run(data_dir, tmp_path, "--texture-dir", textures, "--foreground-dir", masks)
    assert code == 0 and "foreground 50.0% of the picture (given)" in capsys.readouterr().out
    assert not column(sheet, "mask", 64)[:, 33:].any(), "nothing beyond the left half"
    code, sheet = run(data_dir, tmp_path, "--foreground", "texture")
    assert code == 0 and "texture" in capsys.readouterr().out
    assert np.array_equal(column(sheet, "image", 64), column(sheet, "foreground", 64))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--category", "nothing"], "nothing"),
        (["--texture-dir", "does/not/exist"], "does/not/exist"),
        (["--foreground-dir", "does/not/exist"], "does/not/exist"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(data_dir, tmp_path, capsys, options, message):
    code, _ = run(data_dir, tmp_path, *options)
    error = capsys.readouterr().err
    assert code == 2 and message in error and error.count("\n") == 1


def test_flags_out_of_range_and_an_output_that_is_no_picture(data_dir, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(data_dir, tmp_path, "--rows", "0")
    assert "--rows" in capsys.readouterr().err
    assert main(["--data-dir", str(data_dir), "--output", str(tmp_path / "sheet.txt")]) == 2
    assert "sheet.txt" in capsys.readouterr().err
