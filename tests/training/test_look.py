"""What is said of photos before a training, from folders to lines."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from diffusionad_hf.training.arguments import TrainingConfig
from diffusionad_hf.training.look import look, save_kinds

from .runs import run


@pytest.fixture
def photos(data, tmp_path):
    """A plain folder of twelve photos."""
    return shutil.copytree(data / "demo-part/train/good", tmp_path / "photos")


def files(folder):
    return sorted(folder.iterdir())


def seen(folder, **options):
    return look(TrainingConfig(data_dir=folder, image_size=64, **options))


def said(folder, **options):
    return " ".join(seen(folder, **options).notes)


def stripes(path, seed):
    """A photo of quite another product."""
    noise = np.random.default_rng(seed).normal(0, 8, (64, 64, 3))
    bars = np.where(np.arange(64) // 4 % 2, 230.0, 20.0)[:, None, None] * (0.2, 1.0, 0.3)
    Image.fromarray((bars + noise).clip(0, 255).astype(np.uint8)).save(path)


def test_number_size_and_kind_are_said_and_nothing_else_of_good_photos(photos):
    assert said(photos).startswith("12 photos, 64 x 64 px. Treated as photos of an object that fills ")


def test_sizes_and_shapes_that_differ(photos):
    Image.open(files(photos)[0]).resize((128, 128)).save(photos / "large.png")
    Image.open(files(photos)[1]).resize((128, 64)).save(photos / "wide.png")
    assert (
        "64 x 64 px to 128 x 128 px; 1 of another shape than the others are squashed to theirs: photos/wide.png"
        in (said(photos))
    )


def test_duplicates_count_once(photos):
    shutil.copy(files(photos)[0], photos / "copy.png")
    found = seen(photos)
    assert "Left out, 1 duplicate(s): photos/copy.png = photos/000.png." in found.notes
    assert len(found.normal) == 12 and "copy.png" not in "".join(found.names)


def test_one_photo_over_and_over_is_refused_in_one_line_and_watchers_learn_it(photos, tmp_path, capsys):
    for file in files(photos)[1:]:
        shutil.copy(files(photos)[0], file)
    assert run(photos, tmp_path / "out", texture_dir=None) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"all 12 photos of {photos} are the same picture" in error
    progress = json.loads((tmp_path / "out/progress.json").read_text())
    assert progress["phase"] == "failed" and progress["error"] in error


@pytest.mark.parametrize("count, reason", [(0, "holds nothing"), (1, "1 normal image(s): at least 2 are needed")])
def test_too_few_photos(count, reason, photos, tmp_path, capsys):
    for file in files(photos)[count:]:
        file.unlink()
    assert run(photos, tmp_path / "out", texture_dir=None) == 2
    assert reason in capsys.readouterr().err.splitlines()[-1]


def test_a_damaged_photo_among_few_is_named_and_left_out(photos):
    file = files(photos)[3]
    file.write_bytes(file.read_bytes()[:200])
    found = seen(photos)
    assert len(found.normal) == 11 and any(n.startswith("Left out, damaged: ") and "003.png" in n for n in found.notes)


def test_a_test_image_that_is_learnt_from_is_named_also_stored_anew(data, tmp_path):
    folder = shutil.copytree(data / "demo-part", tmp_path / "part")
    assert "test image(s) are almost the same" not in said(folder)
    Image.open(files(folder / "train/good")[5]).save(folder / "test/good/again.jpg", quality=60)
    assert "1 test image(s) are almost the same as a photo that is learnt from" in said(folder)
    assert "good/again.jpg = good/005.png" in said(folder)


def test_two_products_in_one_folder_are_said_with_a_sheet(photos, tmp_path):
    assert seen(photos).kinds is None
    for i in range(4):
        stripes(photos / f"stripes{i}.png", i)
    found = seen(photos)
    assert [len(rows) for rows in found.kinds] == [12, 4]
    line = save_kinds(found, tmp_path / "kinds.png")
    assert "two different products, 12 and 4 (photos/stripes0.png" in line and str(tmp_path / "kinds.png") in line
    sheet = np.asarray(Image.open(tmp_path / "kinds.png"))
    assert sheet.shape[1] == 6 * 160 and (sheet[2 * 160 : 2 * 160 + 24] == 255).all()
    assert sheet[-160:, :160, 1].std() > 80, "stripes in the second block"


def test_feedback_moves_photos_where_they_belong(data, tmp_path):
    folder = shutil.copytree(data / "demo-part", tmp_path / "part")
    tested = files(folder / "test/good")[0]
    other = shutil.copy(tested, tmp_path / "from-the-line.png")
    Image.open(tested).rotate(90).save(other)
    marks = [
        {"file": str(tested), "mark": "fine", "verdict": "anomalous"},
        {"file": "from-the-line.png", "mark": "defect"},
        {"file": "from-the-line.png", "mark": "fine"},  # on second thoughts
        {"file": "005.png", "mark": "defect"},
    ]
    (tmp_path / "marks.json").write_text(json.dumps({"marks": marks, "model": "x"}))
    # The name alone is not enough where two photos have it.
    for file in folder.glob("test/*/005.png"):
        file.unlink()
    for file in folder.glob("ground_truth/*/005*"):
        file.unlink()
    before, after = seen(folder), seen(folder, feedback=tmp_path / "marks.json")
    assert len(after.normal) == len(before.normal) + 2 - 1 and len(after.test) == len(before.test) - 1
    assert not any(name.endswith("good/005.png") for name in after.names)
    assert "Feedback: 2 photo(s) confirmed as fine are learnt from, 1 of them no longer test images; 1 marked" in (
        " ".join(after.notes)
    )


@pytest.mark.parametrize(
    "content, reason",
    [
        ("{", "is not of the form"),
        ("[]", "is not of the form"),
        ('{"marks": [{"file": "000.png"}]}', "is not of the form"),
        ('{"marks": [{"file": "000.png", "mark": "good"}]}', "is not of the form"),
        ('{"marks": [{"file": "nowhere.png", "mark": "fine"}]}', "the photo nowhere.png is not there"),
    ],
)
def test_feedback_that_makes_no_sense(content, reason, photos, tmp_path):
    (tmp_path / "marks.json").write_text(content)
    with pytest.raises(ValueError, match=f"^`feedback`.*{reason}"):
        seen(photos, feedback=tmp_path / "marks.json")
