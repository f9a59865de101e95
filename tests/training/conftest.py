"""Data sets to train on, and nothing left behind by a training."""

import signal

import pytest
from PIL import Image

from demo_part import generate as demo_parts
from diffusionad_hf.presets import PRESETS

from .runs import NARROW, forget_accelerator, run


@pytest.fixture(scope="package")
def data(tmp_path_factory):
    """Rendered parts of 64 px: 12 normal images to train on, and textures beside them."""
    folder = tmp_path_factory.mktemp("data")
    demo_parts.generate(folder / "set", seed=3, train=12, test_good=1, test_defective=6, size=64)
    (folder / "textures").mkdir()
    for i, color in enumerate(("orange", "navy", "white")):
        Image.radial_gradient("L").resize((64, 64)).convert("RGB").point(lambda v, i=i: (v * (i + 1)) % 256).save(
            folder / "textures" / f"{color}.png"
        )
    return folder / "set"


@pytest.fixture(scope="package")
def trained(data, tmp_path_factory):
    """A training of four steps that nothing interrupted."""
    output = tmp_path_factory.mktemp("trained") / "model"
    assert run(data, output, report_to="tensorboard", checkpoints_total_limit=1) == 0
    return output


@pytest.fixture(scope="package")
def two_steps(data, tmp_path_factory):
    """A training of two steps, to compare others with."""
    output = tmp_path_factory.mktemp("two_steps") / "model"
    assert run(data, output, max_train_steps=2) == 0
    return output


@pytest.fixture(autouse=True)
def narrow_networks(monkeypatch):
    for name, sizes in NARROW.items():
        monkeypatch.setitem(PRESETS, name, sizes)


@pytest.fixture(autouse=True)
def fresh_accelerator():
    yield
    forget_accelerator()
    signal.signal(signal.SIGINT, signal.default_int_handler)
