"""Fixtures that every test may use."""

import os

# Before anything imports huggingface_hub: no test reaches for the real Hub.
os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "0")
# For the programs that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

from diffusionad_hf import DiffusionADPipeline, build_pipeline  # noqa: E402
from tests import loopback_hub  # noqa: E402

hub = loopback_hub.hub

# The tests run in two processes; more threads than cores would wait for each other most of the time.
torch.set_num_threads(1)


# What starts servers, browsers and trainings; of these the first are the longest.
_LONG = """test_browser test_blocks test_wheel test_interruption test_exporting test_spaces test_api test_train
test_train_options test_hub test_pipeline_loading test_fuzz test_hostile test_categories test_actions""".split()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first, so that no process is left alone with one at the end."""
    items.sort(key=lambda item: _LONG.index(item.path.stem) if item.path.stem in _LONG else len(_LONG))


def make_pipeline(resolution: int = 32) -> DiffusionADPipeline:
    """A small pipeline whose output depends on its input: fresh networks would give zeros."""
    torch.manual_seed(0)
    pipe = build_pipeline("tiny", resolution)
    with torch.no_grad():
        for parameter in [*pipe.unet.parameters(), *pipe.segmenter.parameters()]:
            parameter.add_(torch.randn_like(parameter) * 0.05)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def pipe() -> DiffusionADPipeline:
    """Not calibrated; do not change its configuration."""
    return make_pipeline()


@pytest.fixture(scope="session")
def photo() -> np.ndarray:
    """`(48, 40, 3)` uint8, smooth enough to survive resizing."""
    y, x = np.mgrid[:48, :40]
    channels = [np.sin(x / 7) + np.cos(y / 9), np.sin((x + y) / 11), np.cos(x / 5 - y / 13)]
    image = np.stack(channels, axis=-1)
    return ((image - image.min()) / np.ptp(image) * 255).round().astype(np.uint8)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory) -> str:
    """A saved, calibrated pipeline with both float32 weights and the fp16 variant; do not change it."""
    folder = tmp_path_factory.mktemp("model") / "pipeline"
    pipe = make_pipeline()
    scores = pipe([np.full((32, 32, 3), value, np.uint8) for value in range(0, 250, 10)]).anomaly_score
    pipe.register_to_config(calibration_scores=[float(s) for s in scores])
    pipe.save_pretrained(folder)
    pipe.to(dtype=torch.float16).save_pretrained(folder, variant="fp16")
    return str(folder)
