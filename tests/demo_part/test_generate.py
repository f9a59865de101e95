"""The procedural product photographs: repeatable, laid out as MVTec AD, with masks that tell the truth."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from demo_part.generate import DEFECT_TYPES, generate, main, render_defective_part, render_part

REPO = Path(__file__).resolve().parents[2]
SIZE = 96


def _files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.png"))}


@pytest.fixture(scope="module")
def small_set(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("demo")
    return generate(out, 5, train=2, test_good=2, test_defective=len(DEFECT_TYPES) + 2, size=SIZE)


def test_layout_pairs_every_defective_picture_with_a_mask(small_set):
    assert small_set.name == "demo-part"
    assert sorted(p.name for p in (small_set / "train" / "good").iterdir()) == ["000.png", "001.png"]
    assert {p.name for p in (small_set / "test").iterdir()} == {"good", *DEFECT_TYPES}
    pictures = {(p.parent.name, p.stem) for p in (small_set / "test").rglob("*.png") if p.parent.name != "good"}
    masks = {(p.parent.name, p.stem.removesuffix("_mask")) for p in (small_set / "ground_truth").rglob("*.png")}
    assert pictures == masks
    # The total is shared evenly; the first types take the remainder.
    assert [len(list((small_set / "test" / name).iterdir())) for name in DEFECT_TYPES] == [2, 2] + [1] * (
        len(DEFECT_TYPES) - 2
    )


def test_files_are_rgb_pictures_and_black_and_white_masks_of_the_asked_size(small_set):
    for path in small_set.rglob("*.png"):
        with Image.open(path) as picture:
            assert picture.size == (SIZE, SIZE)
            is_mask = "ground_truth" in path.parts
            assert picture.mode == ("L" if is_mask else "RGB")
            if is_mask:
                assert set(np.unique(picture)) == {0, 255}


def test_same_seed_same_bytes_whatever_the_counts_and_workers(small_set, tmp_path):
    larger = generate(tmp_path, 5, train=3, test_good=2, test_defective=2 * len(DEFECT_TYPES), size=SIZE, workers=2)
    few, many = _files(small_set), _files(larger)
    assert len(many) > len(few)
    assert {name: many[name] for name in few} == few


def test_seeds_splits_and_indices_all_give_different_pictures(small_set, tmp_path):
    other = generate(tmp_path, 6, train=2, test_good=2, test_defective=0, size=SIZE)
    normal = [
        data
        for folder in (small_set, other)
        for name, data in _files(folder).items()
        if Path(name).parent.name == "good"
    ]
    assert len(normal) == 8
    assert len(set(normal)) == 8


def test_normal_parts_vary_but_modestly():
    pictures = np.stack([render_part(np.random.default_rng(i), 64) for i in range(12)]).astype(np.float32)
    brightness = pictures.mean(axis=(1, 2, 3))
    assert brightness.std() > 0.5
    assert np.ptp(brightness) < 40
    # Whatever the pose, the middle of the plate's left half is bright metal and the corner is dark table.
    assert pictures[:, 28:36, 12:15].mean(axis=(1, 2, 3)).min() > 1.5 * pictures[:, :3, :3].mean(axis=(1, 2, 3)).max()


@pytest.mark.parametrize("defect_type", DEFECT_TYPES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_defect_changes_what_its_mask_says_and_nothing_else(defect_type, seed):
    size = 128
    flawless = render_part(np.random.default_rng(seed), size).astype(np.float32)
    picture, mask = render_defective_part(np.random.default_rng(seed), defect_type, size)
    assert picture.shape == (size, size, 3) and picture.dtype == np.uint8
    assert mask.shape == (size, size) and mask.dtype == bool
    assert 0.001 < mask.mean() < 0.08
    change = np.abs(picture - flawless).max(axis=2)
    # Sensor noise is the same in both, so that any difference is the defect's.
    assert change[mask].mean() > 10
    assert change[~mask].mean() < 0.15
    assert (change[~mask] > 12).mean() < 0.001


@pytest.mark.parametrize("defect_type", DEFECT_TYPES)
def test_defects_are_still_visible_after_shrinking(defect_type):
    for seed in range(10, 13):
        flawless, defective = (
            np.asarray(Image.fromarray(picture).resize((64, 64), Image.Resampling.BOX), np.float32)
            for picture in (
                render_part(np.random.default_rng(seed), 128),
                render_defective_part(np.random.default_rng(seed), defect_type, 128)[0],
            )
        )
        assert np.abs(defective - flawless).max() > 25


def test_repeated_draws_of_one_type_differ_in_place_and_size():
    masks = [render_defective_part(np.random.default_rng(seed), "dent", 64)[1] for seed in range(5)]
    assert len({mask.tobytes() for mask in masks}) == 5
    assert len({int(mask.sum()) for mask in masks}) > 2


def test_unknown_defect_type_names_the_known_ones():
    with pytest.raises(ValueError, match="'rust'.*scratch"):
        render_defective_part(np.random.default_rng(0), "rust")


@pytest.mark.parametrize("render", [render_part, lambda rng, size: render_defective_part(rng, "dent", size)])
def test_a_size_too_small_to_show_the_part_is_refused(render):
    with pytest.raises(ValueError, match="at least 64 pixels, got 63"):
        render(np.random.default_rng(0), 63)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--train", "-1"], "train must not be negative, got -1"),
        (["--test-good", "-2"], "test_good must not be negative"),
        (["--test-defective", "-3"], "test_defective must not be negative"),
        (["--seed", "-4"], "seed must not be negative"),
        (["--size", "16"], "size must be at least 64"),
        (["--workers", "0"], "workers must be at least 1"),
    ],
)
def test_bad_numbers_end_with_one_clear_line_and_write_nothing(arguments, words, tmp_path, capsys):
    out = tmp_path / "new"
    assert main(["--out", str(out), "--seed", "1", *arguments]) == 2
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1
    assert not out.exists()


def test_a_folder_with_content_is_never_written_into(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("precious")
    assert main(["--out", str(tmp_path), "--seed", "1"]) == 2
    assert f"{tmp_path} exists and is not an empty folder" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_an_out_folder_that_cannot_be_made_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["--out", str(tmp_path / "file" / "below"), "--seed", "1"]) == 2
    message = capsys.readouterr().err
    assert "cannot create" in message and str(tmp_path / "file" / "below") in message and message.count("\n") == 1


def test_the_command_makes_a_set_and_explains_itself(tmp_path):
    command = [sys.executable, "-m", "demo_part.generate"]
    shown = subprocess.run([*command, "--help"], cwd=REPO, capture_output=True, text=True, check=True).stdout
    assert "--test-defective" in shown and "default: 300" in shown
    counts = ["--train", "1", "--test-good", "0", "--test-defective", "1", "--size", "64"]
    subprocess.run(
        [*command, "--out", str(tmp_path), "--seed", "3", *counts], cwd=REPO, capture_output=True, check=True
    )
    assert set(_files(tmp_path)) == {
        "demo-part/train/good/000.png",
        f"demo-part/test/{DEFECT_TYPES[0]}/000.png",
        f"demo-part/ground_truth/{DEFECT_TYPES[0]}/000_mask.png",
    }
