"""Training from Python: one call, one configuration, callbacks."""

import json

import numpy as np
import pytest
from PIL import Image

from diffusionad_hf.training import TrainingConfig, train

from .runs import OPTIONS, forget_accelerator, same, weights


@pytest.fixture
def config(data, tmp_path):
    forget_accelerator()
    return TrainingConfig(texture_dir=data.parent / "textures", output_dir=tmp_path / "model", **OPTIONS)


def test_train_returns_the_calibrated_pipeline_and_tells_callbacks_how_far_it_is(config, data, tmp_path, trained):
    seen, pictures = [], []

    def watch(progress):
        seen.append((progress.phase, progress.step, progress.loss, progress.seconds_left))
        if progress.picture_step not in (None, *pictures):
            assert Image.open(tmp_path / "model" / progress.picture).height == 256
            pictures.append(progress.picture_step)

    pipe = train(data / "demo-part", config, callbacks=[watch])
    assert len(pipe.config.calibration_scores) == 3 and pipe(np.zeros((40, 30, 3), np.uint8)).p_value is not None
    assert same(weights(tmp_path / "model"), weights(trained)), "as from the command line"
    phases = list(dict.fromkeys(phase for phase, *_ in seen))
    assert phases == ["looking", "probing", "training", "calibrating", "evaluating", "done"]
    assert [step for phase, step, *_ in seen if phase == "training"][-1] == 4 and pictures == [1, 2, 3, 4]
    assert all(loss > 0 and left >= 0 for phase, step, loss, left in seen if phase == "training" and step)
    progress = json.loads((tmp_path / "model/progress.json").read_text())
    assert (progress["phase"], progress["step"], progress["validation"]["step"]) == ("done", 4, 4)
    assert len(progress["plan"]) == 5 and progress["seconds_left"] == 0 and (tmp_path / "model/preview.png").is_file()
    assert "On 7 test images" in progress["notes"][-1] and (tmp_path / "model/evaluation.json").is_file()


def test_a_callback_stops_the_training_which_still_returns_a_calibrated_model(config, data):
    pipe = train(data, config, callbacks=[lambda progress: progress.step == 1 and progress.stop()])
    assert pipe.threshold is not None
    steps = []
    train(data, config, callbacks=[lambda progress: steps.append(progress.step)])
    assert 1 in steps and steps[-1] == 4, "goes on from there"


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"max_steps": 3}, "no option of a training: max_steps"),
        ({"preset": "huge"}, "one of fast, paper, perceptual, tiny"),
    ],
)
def test_options_that_do_not_exist_are_refused(options, reason):
    with pytest.raises(ValueError, match=reason):
        TrainingConfig(**options)


def test_photos_are_needed_and_name_the_output_folder():
    with pytest.raises(ValueError, match="`data_dir`: give a folder of normal photos"):
        train()
    for photos, category, folder in (
        ("x/cookie/train/good", None, "runs/cookie"),
        ("mvtec_ad", "Metal Nut", "runs/mvtec_ad-metal-nut"),
        ("acme/widgets", None, "runs/widgets"),
    ):
        assert TrainingConfig(data_dir=photos, category=category).output_dir == folder
    assert TrainingConfig().max_train_steps == 100, "the default preset's, not the largest one's"
