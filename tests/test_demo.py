"""The embedded model and the bundled examples: what a newcomer sees first."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from demo_part import generate as demo_parts
from diffusionad_hf import DiffusionADPipeline
from diffusionad_hf.cli.main import main
from diffusionad_hf.evaluation.metrics import aupro, image_metrics

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "space/checkpoints/demo-part"
EXAMPLES = ROOT / "space/checkpoints/demo-part/examples"


@pytest.fixture(scope="module")
def demo_pipe():
    pipe = DiffusionADPipeline.from_pretrained(MODEL)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_embedded_model_is_small_half_precision_and_calibrated(demo_pipe):
    assert sum(f.stat().st_size for f in MODEL.rglob("*") if f.is_file()) < 25e6
    for network in ("unet", "segmenter"):
        tensors = load_file(MODEL / network / "diffusion_pytorch_model.safetensors").values()
        assert {t.dtype for t in tensors if t.is_floating_point()} == {torch.float16}
    assert len(demo_pipe.config.calibration_scores) >= 19 and np.isfinite(demo_pipe.threshold)


def test_the_demo_command_tells_good_from_bad(tmp_path, capsys):
    report = tmp_path / "report.json"
    arguments = ["inspect", str(EXAMPLES), "--model", str(MODEL), "--output-dir", str(tmp_path), "--json", str(report)]
    assert main(arguments) == 1
    printed = capsys.readouterr().out
    for image in json.loads(report.read_text())["images"]:
        name = Path(image["file"]).name
        assert image["verdict"] == ("normal" if name.startswith("good") else "anomalous"), name
        assert name in printed and all(Path(p).is_file() for p in image["pictures"].values())
        assert bool(image["regions"]) == (image["verdict"] == "anomalous")


def test_defects_on_fresh_parts_are_found_where_they_are(demo_pipe):
    """A sample of what the recorded evaluation measures on 100 + 100 parts; the bounds leave room for so few."""
    rng = np.random.default_rng(987)
    good = [demo_parts.render_part(rng) for _ in range(10)]
    bad, masks = zip(
        *(demo_parts.render_defective_part(rng, kind) for kind in demo_parts.DEFECT_TYPES for _ in range(2)),
        strict=True,
    )
    output = demo_pipe([*good, *bad])
    labels = [0] * len(good) + [1] * len(bad)
    assert image_metrics(output.anomaly_score, labels)["image_auroc"] > 0.97
    blank = [np.zeros(masks[0].shape, bool)] * len(good)
    assert aupro(output.anomaly_map, [*blank, *masks]) > 0.9


def test_what_is_recorded_beside_the_model_is_the_models(demo_pipe):
    recorded = json.loads((MODEL / "evaluation.json").read_text())
    assert recorded["threshold"] == pytest.approx(demo_pipe.threshold)
    assert recorded["num_images"] == 200 and recorded["num_anomalous"] == 100
    assert recorded["image_auroc"] >= 0.98 and recorded["aupro_30"] >= 0.85
    assert 0.01 <= recorded["false_alarm_rate"] <= 0.1
    assert (MODEL / "training_curve.csv").is_file() and (MODEL / "training_arguments.json").is_file()
