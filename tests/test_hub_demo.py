"""The round trip of the embedded model: published, and loaded elsewhere with and without this package."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from huggingface_hub import HfApi

from diffusionad_hf import DiffusionADPipeline
from diffusionad_hf.hub.publishing import list_models, publish_model
from tests.loopback_hub import LoopbackHub
from tests.test_pipeline_loading import BLOCKER

REPO = "org/diffusionad-demo-part"
ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "space/checkpoints/demo-part"
EXAMPLES = sorted((ROOT / "space/checkpoints/demo-part/examples").glob("*.png"))

STRANGER = f"""{BLOCKER}
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
output = pipe(sys.argv[2:])
for score, anomalous, p_value in zip(output.anomaly_score, output.is_anomalous, output.p_value):
    print("found", float(score), bool(anomalous), float(p_value))
assert not any(name.startswith("diffusionad_hf") for name in sys.modules)
"""


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A Hub with the embedded model; do not change it."""
    with LoopbackHub(tmp_path_factory.mktemp("hub")) as hub, pytest.MonkeyPatch.context() as monkeypatch:
        hub.adopt_client(monkeypatch, tmp_path_factory.mktemp("home"))
        publish_model(MODEL, REPO, dataset="Demo part", examples=EXAMPLES[-2:])
        monkeypatch.undo()
        yield hub


@pytest.fixture(scope="module")
def expected():
    pipe = DiffusionADPipeline.from_pretrained(MODEL)
    pipe.set_progress_bar_config(disable=True)
    return pipe([str(path) for path in EXAMPLES])


def test_our_class_finds_in_a_clean_cache_what_it_finds_here(published, expected, monkeypatch, tmp_path):
    published.adopt_client(monkeypatch, tmp_path / "home", token=None)
    pipe = DiffusionADPipeline.from_pretrained(REPO, cache_dir=tmp_path / "cache")
    pipe.set_progress_bar_config(disable=True)
    output = pipe([str(path) for path in EXAMPLES])
    assert output.anomaly_score.tolist() == expected.anomaly_score.tolist()
    assert output.p_value.tolist() == expected.p_value.tolist()
    # The threshold tells the bundled examples apart.
    assert output.is_anomalous.tolist() == [not path.name.startswith("good") for path in EXAMPLES]


@pytest.mark.parametrize("model", [REPO, MODEL], ids=["published", "bundled"])
@pytest.mark.parametrize("program", [STRANGER, STRANGER.removeprefix(BLOCKER)], ids=["without", "with the package"])
def test_plain_diffusers_finds_the_same(model, program, published, expected, tmp_path):
    environment = published.environment(tmp_path / "home", token=None)
    command = [sys.executable, "-c", f"import sys\n{program}", str(model), *map(str, EXAMPLES)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("found")]
    assert [float(score) for score, _, _ in found] == expected.anomaly_score.tolist()
    assert [anomalous == "True" for _, anomalous, _ in found] == expected.is_anomalous.tolist()
    assert [float(p_value) for _, _, p_value in found] == expected.p_value.tolist()


def test_the_card_of_the_demo_tells_what_it_is_and_what_it_reaches(published, monkeypatch, tmp_path):
    published.adopt_client(monkeypatch, tmp_path / "home", token=None)
    files = published.files(REPO)
    card = files["README.md"].decode()
    header = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)[1])
    assert header["license"] == "mit" and {"diffusionad", "demo-part"} <= set(header["tags"])
    recorded = json.loads((MODEL / "evaluation.json").read_text())
    assert f"| image AUROC | {recorded['image_auroc']:.3f} |" in card
    assert "[TRAINING.md](TRAINING.md)" in card and files["TRAINING.md"] == (MODEL / "TRAINING.md").read_bytes()
    assert re.findall(r"!\[.*\]\((.*)\)", card) == ["previews/example_1.png", "previews/example_2.png"]
    assert {"previews/example_1.png", "previews/example_2.png"} <= set(files)
    (model,) = list_models("org")
    assert (model["category"], model["image_auroc"]) == ("demo-part", recorded["image_auroc"])
    assert HfApi().model_info(REPO).pipeline_tag == "image-segmentation"
