"""Model cards: every number from the evaluation file, and nothing claimed that was not measured."""

import json
import math
import re

import numpy as np
import pytest
import torch
import yaml

from diffusionad_hf.evaluation.evaluator import AnomalyEvaluator
from diffusionad_hf.evaluation.intervals import show, show_parts
from diffusionad_hf.evaluation.metrics import METRIC_NAMES
from diffusionad_hf.hub.cards import build_card, find_data_source, read_evaluation
from tests.conftest import make_pipeline

REPO = "org/diffusionad-mvtec-screw"
MVTEC = find_data_source("mvtec")


@pytest.fixture
def pipe():
    """Calibrated on 99 images; its configuration may be changed."""
    pipe = make_pipeline()
    pipe.register_to_config(calibration_scores=[i / 200 for i in range(99)], false_alarm_rate=0.04)
    return pipe


def measured(threshold=None, masks=True):
    """Real metrics of made-up maps: 30 normal images, 12 with a scratch and 8 with a dent."""
    rng = np.random.default_rng(0)
    maps = rng.random((50, 16, 16)).astype(np.float32) * 0.6
    labels = np.r_[np.zeros(30, int), np.ones(20, int)]
    kinds = ["good"] * 30 + ["thread | side"] * 12 + ["dent"] * 8
    truth = []
    for anomaly_map, label in zip(maps, labels, strict=True):
        mask = np.zeros((16, 16), bool)
        if label:
            mask[4:9, 4:9] = True
            anomaly_map[mask] += 0.3
        truth.append(mask if masks or not label else None)
    evaluator = AnomalyEvaluator(threshold, n_bootstrap=50)
    for prediction in zip(maps, truth, maps.mean(axis=(1, 2)), labels, kinds, strict=True):
        evaluator.update(*prediction)
    result = evaluator.compute()
    provenance = {"device": "cuda:0", "dtype": "float32", "batch_size": 8, "hardware": "NVIDIA H100 80GB HBM3"}
    return result | {"resolution": 32, "seconds_per_image": 0.01234, "provenance": provenance}


def written(tmp_path, evaluation, pipe):
    """An evaluation after its way through a file."""
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    return read_evaluation(tmp_path / "evaluation.json", pipe)


def metadata(card):
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", str(card), re.DOTALL)[1])


def flat(card):
    """The text without line breaks, which may fall anywhere."""
    return " ".join(card.text.split())


def test_metadata_that_the_hub_filters_on(pipe):
    found = metadata(build_card(pipe, REPO, data=MVTEC, category="Screw M4"))
    assert found["library_name"] == "diffusers" and found["pipeline_tag"] == "image-segmentation"
    assert found["tags"] == ["anomaly-detection", "diffusionad", "mvtec-ad", "screw-m4"]
    assert found["license"] == "cc-by-nc-sa-4.0" and found["category"] == "Screw M4"
    assert "model-index" not in found


def test_every_number_is_that_of_the_evaluation(pipe, tmp_path):
    evaluation = written(tmp_path, measured(pipe.threshold), pipe)
    card = build_card(pipe, REPO, evaluation=evaluation, data=MVTEC, category="screw")
    (model,) = metadata(card)["model-index"]
    (result,) = model["results"]
    assert model["name"] == "diffusionad-mvtec-screw"
    assert result["dataset"] == {"type": "mvtec-ad", "name": "MVTec AD (screw)", "config": "screw", "split": "test"}
    assert {m["type"]: m["value"] for m in result["metrics"]} == {key: evaluation[key] for key in METRIC_NAMES}
    assert all(type(m["value"]) is float for m in result["metrics"])
    for key, name in METRIC_NAMES.items():
        value, low, high = show_parts(evaluation, key)
        assert f"| {name} | {value} | {low} to {high} |" in card.text
    value, low, high = show_parts(evaluation, "miss_rate")
    assert f"| misses (anomalous images passed) | {value} | {low} to {high} |" in card.text
    assert "50 test images of MVTec AD (30 normal, 20 anomalous)" in flat(card)
    assert "0.0123 s an image on NVIDIA H100 80GB HBM3 (float32, batches of 8)" in flat(card)


def test_the_table_by_kind_of_defect(pipe, tmp_path):
    evaluation = written(tmp_path, measured(pipe.threshold), pipe)
    card = build_card(pipe, REPO, evaluation=evaluation, data=MVTEC)
    dent = evaluation["defect_types"]["dent"]
    cells = [
        show(dent, "image_auroc"),
        f"{dent['pixel_auroc']:.3f}",
        f"{dent['aupro_30']:.3f}",
        show(dent, "miss_rate"),
    ]
    assert f"| dent | 8 | {' | '.join(cells)} |" in card.text and "[" in cells[0] and "[" in cells[3]
    assert "| thread \\| side | 12 |" in card.text
    assert "Tested kinds of defect: dent, thread | side. No other kind was tested." in card.text
    tables = re.findall(r"(?:^\|.*\n)+", card.text, re.MULTILINE)
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1, table
    assert len(tables) == 2


def test_what_was_not_measured_is_absent(pipe, tmp_path):
    evaluation = written(tmp_path, measured(masks=False), pipe)
    card = build_card(pipe, REPO, evaluation=evaluation)
    names = {m["type"] for m in metadata(card)["model-index"][0]["results"][0]["metrics"]}
    assert names == {"image_auroc", "image_ap", "image_f1_max"}
    for words in ("pixel AUROC", "AUPRO", "misses", "false alarms"):
        assert words not in card.text
    assert "20 images have no mask" in flat(card)


def test_a_model_that_nobody_evaluated_says_so(pipe):
    card = build_card(pipe, REPO, data=MVTEC, category="screw")
    assert "This model has not been evaluated." in card.text and "No kind of defect was tested." in card.text
    assert "AUROC" not in str(card) and "evaluation.json" not in str(card) and "None" not in card.text


def test_the_threshold_and_what_it_promises(pipe):
    text = flat(build_card(pipe, REPO))
    assert f"score exceeds **{pipe.threshold:.4f}**" in text and pipe.threshold == 0.475
    assert "on 99 normal images that the model was not trained on" in text
    assert "false-alarm rate of at most **4 %**" in text
    assert f"about {100 * math.sqrt(0.04 * 0.96 / 99):.2g} percentage points" in text


def test_too_few_images_to_promise_anything(pipe):
    pipe.register_to_config(false_alarm_rate=0.001)
    text = flat(build_card(pipe, REPO))
    assert "for calibration **every image is undecided**: that rate takes 999 or more" in text
    assert "exceeds" not in text and "inf" not in text
    pipe.register_to_config(threshold=0.9)
    text = flat(build_card(pipe, REPO))
    assert "exceeds **0.9000**. This threshold was set by hand" in text and "every image is undecided" not in text


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"calibrated_settings": {"seed": 1}}, "Other settings than the model was calibrated with"),
        ({"calibration_scores": [0.5] * 99}, "Nothing can stand out"),
    ],
)
def test_a_calibration_that_supports_nothing_promises_nothing(pipe, change, reason):
    pipe.register_to_config(**change)
    text = flat(build_card(pipe, REPO))
    assert f"**Every image is undecided.** {reason}" in text and "exceeds" not in text and "promises" not in text


def test_a_threshold_set_by_hand_promises_nothing(pipe):
    pipe.register_to_config(threshold=0.9)
    assert "exceeds **0.9000**. This threshold was set by hand and promises nothing" in flat(build_card(pipe, REPO))
    pipe.register_to_config(calibration_scores=None)
    assert "exceeds **0.9000**. The threshold was set by hand: no false-alarm rate" in flat(build_card(pipe, REPO))
    pipe.register_to_config(threshold=None)
    text = flat(build_card(pipe, REPO))
    assert "**no threshold**" in text and "exceeds" not in text


@pytest.mark.parametrize("name", ["mvtec", "MVTec AD", "mvtec-ad", "MVTec_AD", " mvtec ad "])
def test_a_known_data_set_is_known_however_it_is_spelt(name, pipe):
    assert find_data_source(name) is MVTEC
    text = flat(build_card(pipe, REPO, data=find_data_source(name), category="screw"))
    assert "[MVTec AD](https://www.mvtec.com/" in text and "cc-by-nc-sa-4.0 (**non-commercial use only**)" in text


def test_licences_are_stated_and_never_guessed(pipe):
    card = build_card(pipe, REPO, data=find_data_source("Our line 3"))
    assert "license" not in metadata(card) and "Our line 3; its licence was not recorded" in flat(card)
    card = build_card(pipe, REPO, data=MVTEC, license="other")
    assert metadata(card)["license"] == "other" and "licence of the data: cc-by-nc-sa-4.0" in flat(card)
    assert "non-commercial" not in build_card(pipe, REPO, data=find_data_source("visa")).text
    assert "The dataset was not recorded." in build_card(pipe, REPO).text


def test_training_is_told_as_recorded(pipe):
    training = {
        "max_train_steps": 3000,
        "train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "architecture": "tiny",
    }
    text = flat(build_card(pipe, REPO, training=training))
    assert "Trained for 3,000 steps of 16 images, preset `tiny`." in text
    millions = sum(p.numel() for m in (pipe.unet, pipe.segmenter) for p in m.parameters()) / 1e6
    assert f"{millions:.1f} million parameters and look at 32 x 32 px" in text
    assert "Trained for" not in build_card(pipe, REPO, training={"category": "screw"}).text


def test_what_is_said_of_the_files_is_read_off_them(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "float32")
    pipe.to(torch.float16).save_pretrained(tmp_path / "float32", variant="fp16")
    pipe.save_pretrained(tmp_path / "float16")
    text = flat(build_card(pipe, REPO, folder=tmp_path / "float32"))
    assert 'The weights are float32; `variant="fp16"` loads them as float16. Without the package' in text
    assert "trust_remote_code=True" in text and "TRAINING.md" not in text
    (tmp_path / "float16/pipeline_diffusionad.py").unlink()
    (tmp_path / "float16/TRAINING.md").write_text("# Three stages\n")
    training = {"max_train_steps": 500, "train_batch_size": 8}
    text = flat(build_card(pipe, REPO, folder=tmp_path / "float16", training=training))
    assert "The weights are float16 and compute in float32. ##" in text and "variant=" not in text
    assert "trust_remote_code" not in text, "plain diffusers finds no code in such a folder"
    assert "Last trained for 500 steps of 8 images. [TRAINING.md](TRAINING.md) tells how." in text
    assert "The weights are" not in build_card(pipe, REPO).text


def test_a_kind_of_defect_that_is_mostly_missed_is_a_limit(pipe, tmp_path):
    evaluation = written(tmp_path, measured(pipe.threshold), pipe)
    evaluation["defect_types"]["dent"]["miss_rate"] = 0.75
    evaluation["defect_types"]["thread | side"]["miss_rate"] = 0.25
    limits = build_card(pipe, REPO, evaluation=evaluation).text.partition("## Limits")[2]
    assert "- **dent is mostly missed**: 75 % of them passed as normal.\n- It knows one product" in limits
    assert limits.count("mostly missed") == 1


def test_the_size_is_width_by_height_and_tiles_are_named(pipe):
    pipe.register_to_config(image_size=[64, 512], tile_size=64)
    text = flat(build_card(pipe, REPO))
    assert "look at 512 x 64 px, in tiles of 64 x 64 px." in text and "resized to 512 x 64 px" in text


def test_pictures_are_shown_by_the_names_they_are_published_under(pipe):
    card = build_card(pipe, REPO, previews=["example_1.png", "example_2.png"])
    assert re.findall(r"!\[[^]]+\]\(([^)]+)\)", card.text) == ["previews/example_1.png", "previews/example_2.png"]


def test_the_hub_accepts_the_card(hub, monkeypatch, tmp_path, pipe):
    hub.adopt_client(monkeypatch, tmp_path)
    evaluation = written(tmp_path, measured(pipe.threshold), pipe)
    for arguments in ({}, {"evaluation": evaluation}, {"evaluation": evaluation, "data": MVTEC, "category": "screw"}):
        build_card(pipe, REPO, **arguments).validate()


REFUSED = {
    "of another resolution": ({"resolution": 256}, "measured at 256 px, but the model looks at 32 px"),
    "at another threshold": ({"threshold": 0.5}, "measured at the threshold 0.5, but the model's is 0.475"),
    "with a metric out of range": ({"image_auroc": 95.0}, "image_auroc is 95.0"),
    "with a metric that is no number": ({"image_auroc": None}, "not a result"),
    "without counts": ({"num_normal": None}, "not a result"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_evaluation_of_something_else_is_refused(pipe, tmp_path, case):
    changes, words = REFUSED[case]
    with pytest.raises(ValueError) as error:
        written(tmp_path, measured(pipe.threshold) | changes, pipe)
    message = str(error.value)
    assert str(tmp_path / "evaluation.json") in message and words in message and "evaluate again" in message


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "3", '{"num_images": 3}', "\x00"])
def test_a_file_that_is_no_evaluation(pipe, tmp_path, content):
    (tmp_path / "evaluation.json").write_text(content)
    with pytest.raises(ValueError, match="not a result of `diffusionad evaluate`"):
        read_evaluation(tmp_path / "evaluation.json", pipe)


def test_rates_of_a_model_without_threshold_are_refused(pipe, tmp_path):
    evaluation = measured(pipe.threshold)
    pipe.register_to_config(calibration_scores=None)
    with pytest.raises(ValueError, match="but the model's is None"):
        written(tmp_path, evaluation, pipe)


def test_rates_at_a_threshold_that_promises_nothing_are_taken(pipe, tmp_path):
    pipe.register_to_config(false_alarm_rate=0.001)
    evaluation = written(tmp_path, measured(math.inf), pipe)
    assert "threshold" not in evaluation
    assert "| misses (anomalous images passed) | 100 % |" in build_card(pipe, REPO, evaluation=evaluation).text
