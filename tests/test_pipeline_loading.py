"""Saving and loading in every mode that people use."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusionad_hf import DiffusionADPipeline, NormGuidedUNet2DModel, build_pipeline
from tests.conftest import make_pipeline

IMAGE = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(9))
REPO = "org/diffusionad-test"

# From then on this package cannot be imported.
BLOCKER = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "diffusionad_hf":
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)
sys.meta_path.insert(0, Blocker())
"""
STRANGER = f"""{BLOCKER}
import torch
from diffusers import DiffusionPipeline
image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(9))
for model, save_to, options in eval(sys.argv[1]):
    pipe = DiffusionPipeline.from_pretrained(model, trust_remote_code=True, **options)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(save_to)
    again = DiffusionPipeline.from_pretrained(save_to, trust_remote_code=True)
    print("scores", *(repr(float(p(image).anomaly_score[0])) for p in (pipe, again)))
try:
    import diffusionad_hf
except ModuleNotFoundError:
    print("the package was not there")
"""


def strangers(folder, environment, *models):
    """
    The scores that plain diffusers finds with each model, as loaded and as saved to `<folder>/<number>` and loaded.

    Args:
        models: Folder or Hub id, and options of `from_pretrained`; all of them in one process.
    """
    cases = [(str(model), str(folder / str(number)), options) for number, (model, options) in enumerate(models)]
    # Options hold no objects but torch's types, which print as they are written.
    command = [sys.executable, "-c", STRANGER, repr(cases)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "the package was not there" in done.stdout
    return [tuple(map(float, line.split()[1:])) for line in done.stdout.splitlines() if line.startswith("scores")]


def files_of(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def score(model_dir):
    return DiffusionADPipeline.from_pretrained(model_dir)(IMAGE).anomaly_score[0]


# ---- folders --------------------------------------------------------------------------------------------------------


def test_a_saved_pipeline_comes_back_whole(tmp_path):
    pipe = make_pipeline()
    pipe.scheduler.register_to_config(small_timestep=150, guidance_weight=0.5)
    pipe.register_to_config(calibration_scores=[0.25, 0.5], top_k=7, seed=3, false_alarm_rate=0.4)
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionADPipeline.from_pretrained(tmp_path)
    first, second = pipe(IMAGE), loaded(IMAGE)
    np.testing.assert_array_equal(first.anomaly_map[0], second.anomaly_map[0])
    assert first.p_value == second.p_value and pipe.threshold == loaded.threshold == 0.5
    assert type(loaded.unet) is NormGuidedUNet2DModel and type(loaded.scheduler) is type(pipe.scheduler)


def test_loading_is_silent(model_dir):
    command = f"from diffusionad_hf import DiffusionADPipeline as P; P.from_pretrained({model_dir!r}); "
    command += f"P.from_pretrained({model_dir!r}, value_range=4095, threshold=1)"
    done = subprocess.run(
        [sys.executable, "-W", "error::FutureWarning", "-c", command], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.replace("\r", "\n").splitlines() if line and "Loading pipeline" not in line]
    assert lines == []


def test_saved_files_tell_nothing_of_this_machine(tmp_path):
    make_pipeline().save_pretrained(tmp_path / "first")
    DiffusionADPipeline.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    for name, content in files_of(tmp_path / "second").items():
        assert str(tmp_path).encode() not in content, name
    assert files_of(tmp_path / "first").keys() == files_of(tmp_path / "second").keys()
    assert (tmp_path / "first/model_index.json").read_text() == (tmp_path / "second/model_index.json").read_text()


def test_weights_are_safetensors_only(model_dir):
    suffixes = {Path(name).suffix for name in files_of(model_dir)}
    assert suffixes == {".json", ".py", ".safetensors"}


def test_the_fp16_variant(model_dir, score):
    half = DiffusionADPipeline.from_pretrained(model_dir, variant="fp16", dtype=torch.float32)
    assert half(IMAGE).anomaly_score[0] == pytest.approx(score, abs=1e-2)
    weights = [
        DiffusionADPipeline.from_pretrained(model_dir, **k).unet.conv_in.weight for k in ({}, {"variant": "fp16"})
    ]
    assert not torch.equal(*(w.float() for w in weights))
    assert torch.equal(weights[0].half(), weights[1].half())


def test_dtype_is_taken(model_dir):
    pipe = DiffusionADPipeline.from_pretrained(model_dir, dtype=torch.bfloat16)
    assert pipe.unet.dtype == pipe.segmenter.dtype == torch.bfloat16


def test_half_precision_weights_compute_in_float32_by_default(tmp_path):
    pipe = make_pipeline()
    pipe.to(dtype=torch.float16).save_pretrained(tmp_path)
    assert DiffusionADPipeline.from_pretrained(tmp_path).unet.dtype == torch.float32


@pytest.fixture(scope="module")
def of_before(model_dir, tmp_path_factory):
    """A folder of before the pipeline had more than one file."""
    old = Path(shutil.copytree(model_dir, tmp_path_factory.mktemp("old") / "old"))
    siblings = [old / f"{name}_diffusionad.py" for name in ("images", "familiarity", "verdicts")]
    pipeline = old / "pipeline_diffusionad.py"
    lines = "".join(file.read_text() for file in (*siblings, pipeline)).splitlines(keepends=True)
    pipeline.write_text("".join(line for line in lines if not re.match(r"from \.\w+_diffusionad import", line)))
    for file in siblings:
        file.unlink()
    return old


def test_a_folder_of_before_loads(of_before, score):
    assert DiffusionADPipeline.from_pretrained(of_before)(IMAGE).anomaly_score[0] == score


def test_vanilla_diffusers_loads_folders_of_every_kind_and_hub_ids_without_the_package(
    repo, model_dir, of_before, score, tmp_path
):
    perceptual = build_pipeline("perceptual", 32)
    perceptual.segmenter.remember(torch.rand(4, 3, 32, 32))
    perceptual.save_pretrained(tmp_path / "perceptual")
    half = {"variant": "fp16", "dtype": torch.float32}
    models = ((model_dir, {}), (of_before, {}), (REPO, {}), (REPO, half), (tmp_path / "perceptual", {}))
    environment = {**os.environ, **repo.environment(tmp_path / "home")}
    *whole, (of_half, _), remembering = strangers(tmp_path, environment, *models)
    assert remembering == pytest.approx([perceptual(IMAGE).anomaly_score[0]] * 2, abs=1e-6)
    assert np.array(whole) == pytest.approx(score, abs=1e-6)
    assert of_half == pytest.approx(score, abs=1e-2)
    # What was saved after a remote load is again a folder for everyone.
    found = DiffusionADPipeline.from_pretrained(tmp_path / "0")(IMAGE).anomaly_score[0]
    assert found == pytest.approx(score, abs=1e-6)
    index = [(f / "model_index.json").read_text() for f in (tmp_path / "0", Path(model_dir))]
    assert index[0] == index[1]


def test_the_siblings_of_the_pipeline_are_saved_and_import_nothing_of_this_package(model_dir):
    expected = {"pipeline": ["familiarity", "images", "verdicts"], "familiarity": ["images"], "images": []}
    for name, imported in (expected | {"verdicts": []}).items():
        source = (Path(model_dir) / f"{name}_diffusionad.py").read_text()
        relative = re.findall(r"^\s*from \.(\S*) import", source, re.MULTILINE)
        # The pipeline names them all: diffusers does not look into siblings for more.
        assert relative == [f"{sibling}_diffusionad" for sibling in imported]
        assert not re.search(r"^\s*(from|import) diffusionad_hf", source, re.MULTILINE)


# ---- the Hub --------------------------------------------------------------------------------------------------------


@pytest.fixture
def repo(hub, model_dir):
    hub.add_repo(REPO, files_of(model_dir))
    return hub


def test_code_that_someone_put_into_a_repo_is_never_run(hub, model_dir, monkeypatch, tmp_path):
    proof = tmp_path / "executed"
    files = files_of(model_dir)
    for name in files:
        if name.endswith(".py"):
            files[name] = f"open({str(proof)!r}, 'w')\n".encode()
    hub.add_repo(REPO, files)
    hub.adopt_client(monkeypatch, tmp_path)
    DiffusionADPipeline.from_pretrained(REPO, cache_dir=tmp_path / "cache")(IMAGE)
    assert not proof.exists()


# ---- models that are not whole --------------------------------------------------------------------------------------


def broken(model_dir, tmp_path, kind):
    folder = tmp_path / "broken"
    if kind == "missing folder":
        return folder
    if kind == "empty folder":
        folder.mkdir()
        return folder
    shutil.copytree(model_dir, folder)
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    if kind == "no weights":
        weights.unlink()
    elif kind == "pickled weights":
        torch.save({"conv_in.weight": torch.zeros(1)}, weights.with_name("diffusion_pytorch_model.bin"))
        weights.unlink()
    elif kind == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif kind == "wrong shape":
        config = folder / "segmenter/config.json"
        config.write_text(config.read_text().replace('"base_channels": 16', '"base_channels": 8'))
    elif kind == "no component config":
        (folder / "segmenter/config.json").unlink()
    elif kind == "index is no JSON":
        (folder / "model_index.json").write_text("{")
    elif kind == "foreign component":
        index = json.loads((folder / "model_index.json").read_text())
        index["segmenter"] = ["os", "system"]
        (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize(
    ("file", "field", "value"),
    [("model_index.json", "threshold", value) for value in ("<b>", math.nan, [1], True)]
    + [("model_index.json", "false_alarm_rate", value) for value in (0, 1, "x", None)]
    + [("model_index.json", "calibration_scores", value) for value in ("abc", [], [None], [math.nan], [2], {"a": 1})]
    + [("model_index.json", "image_size", value) for value in (6000, "64", 0, 64.5, 100, True, {"a": 1})]
    + [("model_index.json", "image_size", value) for value in ([64], [64, 100], [64, "64"], [8192, 8192])]
    + [("model_index.json", "tile_size", value) for value in ("64", 0, 33, [32, None])]
    + [("model_index.json", field, value) for field, value in (("seed", "x"), ("seed", 2**70), ("top_k", 0))]
    + [("model_index.json", "unet", value) for value in (["os", 5], "x", None, {"a": 1}, [None, None])]
    + [("model_index.json", "scheduler", ["diffusers", "DDPMScheduler"])]
    + [("scheduler/scheduler_config.json", "num_train_timesteps", value) for value in (10**9, "x")]
    + [("scheduler/scheduler_config.json", "guidance_weight", "<b>")]
    + [("unet/config.json", "layers_per_block", 10**5), ("unet/config.json", "block_out_channels", [10**6])]
    + [("segmenter/config.json", "base_channels", 10**9)],
)
def test_a_config_that_makes_no_sense_is_refused_by_the_name_of_its_field(model_dir, tmp_path, file, field, value):
    shutil.copytree(model_dir, tmp_path / "model")
    path = tmp_path / "model" / file
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(OSError, match=rf"{tmp_path}/model: the model could not be loaded: .*{field}[:=]") as error:
        DiffusionADPipeline.from_pretrained(tmp_path / "model")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "kind",
    [
        "missing folder",
        "empty folder",
        "no weights",
        "pickled weights",
        "truncated weights",
        "wrong shape",
        "no component config",
        "index is no JSON",
        "foreign component",
    ],
)
def test_a_model_that_is_not_whole_is_named_in_one_line(model_dir, tmp_path, kind):
    folder = broken(model_dir, tmp_path, kind)
    with pytest.raises(OSError) as error:
        DiffusionADPipeline.from_pretrained(folder)
    message = str(error.value)
    assert str(folder) in message and "\n" not in message and len(message) < 600
