"""Export to OpenVINO and ONNX Runtime: the same answers, in the same commands, and clear words where it cannot be."""

import json
import logging
import re
import shutil
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image

from diffusionad_hf import (
    AnomalySegmenter,
    DiffusionADPipeline,
    ExportedDiffusionADPipeline,
    NormGuidedScheduler,
    NormGuidedUNet2DModel,
    load_model,
)
from diffusionad_hf.cli.main import main
from diffusionad_hf.pipeline_diffusionad import conformal_threshold
from tests.dataset_factory import make_mvtec

REASON = 'the runtimes are not installed: pip install -c constraints.txt -e ".[openvino]"'
for runtime in ("openvino", "nncf", "onnx", "onnxruntime"):
    pytest.importorskip(runtime, reason=REASON)

from diffusionad_hf.export.exporting import ORIGINAL, _compare, _InspectionGraph, _probe, export_pipeline  # noqa: E402


@pytest.fixture(scope="module")
def images(photo):
    """Five images of different sizes and contents."""
    rng = np.random.default_rng(0)
    noisy = rng.integers(0, 256, (40, 56, 3), dtype=np.uint8)
    return [photo, photo[::-1], noisy, photo[:32, :32], np.full((64, 32, 3), 200, np.uint8)]


def make_pipeline(patch_size: int = 1, prediction_type: str = "epsilon", **layout) -> DiffusionADPipeline:
    """With every kind of block, and as few as that takes: each one costs time to trace."""
    layout = {
        "block_out_channels": (16, 32),
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    } | layout
    torch.manual_seed(0)
    unet = NormGuidedUNet2DModel(
        sample_size=32, layers_per_block=1, norm_num_groups=8, patch_size=patch_size, **layout
    )
    scheduler = NormGuidedScheduler(prediction_type=prediction_type)
    pipe = DiffusionADPipeline(unet, AnomalySegmenter(base_channels=4), scheduler)
    with torch.no_grad():
        # Fresh networks would give zeros.
        for parameter in [*pipe.unet.parameters(), *pipe.segmenter.parameters()]:
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return quiet(pipe)


@pytest.fixture(scope="module")
def pipe():
    """Not calibrated; do not change it."""
    return make_pipeline()


@pytest.fixture(scope="module")
def model_dir(calibrated, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "pipeline"
    calibrated.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def calibrated():
    """A pipeline with a calibrated threshold; do not change it."""
    pipe = make_pipeline()
    pipe.register_to_config(calibration_scores=[0.1, 0.2, 0.3], false_alarm_rate=0.5)
    return pipe


@pytest.fixture(scope="module")
def exports(calibrated, tmp_path_factory):
    """Float32 in both formats; do not change them."""
    root = tmp_path_factory.mktemp("exports")
    for kind in ("openvino", "onnx"):
        export_pipeline(calibrated, root / kind, format=kind)
    return root


@pytest.mark.parametrize("runtime", ["openvino", "onnx", "torch"])
def test_threads_that_share_a_model_get_the_answers_of_one(runtime, exports, model_dir, images):
    pipe = quiet(load_model(model_dir if runtime == "torch" else exports / runtime))
    expected = [pipe(image).anomaly_map[0] for image in images]
    started = threading.Barrier(4)

    def inspect(first):
        started.wait()
        order = [(first + i) % len(images) for i in range(4 * len(images))]
        return [(i, pipe(images[i]).anomaly_map[0]) for i in order]

    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(inspect, range(4)):
            for i, anomaly_map in found:
                np.testing.assert_array_equal(anomaly_map, expected[i])


def test_an_exported_pipeline_made_from_another_is_exported_too(exports, images):
    pipe = quiet(load_model(exports / "openvino"))
    for cls in (DiffusionADPipeline, ExportedDiffusionADPipeline):
        other = quiet(cls.from_pipe(pipe, threshold=0.3))
        assert type(other) is ExportedDiffusionADPipeline and other.threshold == 0.3 != pipe.threshold
        np.testing.assert_array_equal(other(images[0]).anomaly_map[0], pipe(images[0]).anomaly_map[0])


@pytest.fixture
def onnx_dir(exports, tmp_path):
    """A copy to damage."""
    return Path(shutil.copytree(exports / "onnx", tmp_path / "exported"))


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


# ---- the same answers


@pytest.mark.parametrize("kind", ["openvino", "onnx"])
def test_scores_maps_and_verdicts_are_the_pipelines(kind, exports, calibrated, images):
    exported = quiet(load_model(exports / kind))
    assert isinstance(exported, ExportedDiffusionADPipeline)
    for options in ({"batch_size": 3}, {"batch_size": 1, "num_noises": 2}):
        ours, theirs = exported(images, **options), calibrated(images, **options)
        np.testing.assert_allclose(ours.anomaly_score, theirs.anomaly_score, atol=1e-4)
        for name in ("anomaly_map", "reconstruction"):
            for a, b in zip(ours[name], theirs[name], strict=True):
                assert a.shape == b.shape and a.dtype == b.dtype
                np.testing.assert_allclose(a, b, atol=1e-3)
        assert ours.is_anomalous.tolist() == theirs.is_anomalous.tolist()
        # Averages over draws are scores of another kind than those that were calibrated on.
        assert (ours.p_value is None) == (theirs.p_value is None) == ("num_noises" in options)
        assert ours.p_value is None or ours.p_value.tolist() == theirs.p_value.tolist()
    assert exported.threshold == calibrated.threshold


@pytest.mark.parametrize(
    ("kind", "precision", "tolerance"), [("openvino", "fp16", 5e-3), ("onnx", "fp16", 5e-3), ("onnx", "fp32", 1e-4)]
)
def test_a_unet_of_patches_that_predicts_images(kind, precision, tolerance, images, tmp_path):
    """The other kind of UNet; OpenVINO's float32 is left to the first kind, for each conversion takes seconds."""
    pipe = make_pipeline(patch_size=2, prediction_type="sample", padding_mode="replicate")
    exported = quiet(export_pipeline(pipe, tmp_path / kind, format=kind, precision=precision))
    np.testing.assert_allclose(exported(images).anomaly_score, pipe(images).anomaly_score, atol=tolerance)
    weights = sum(p.numel() for network in (pipe.unet, pipe.segmenter) for p in network.parameters())
    size = sum(f.stat().st_size for f in (tmp_path / kind).glob("model.[bo]*"))
    assert (size / weights < 3) == (precision == "fp16")
    assert exported.record["calibrated_with"] == ORIGINAL


@pytest.mark.parametrize("kind", ["openvino", "onnx"])
def test_the_graph_alone_gives_the_score(kind, exports, calibrated):
    """For those who run it from another language: image and noise in, score out."""
    torch.manual_seed(1)
    pixels, noise = torch.rand(3, 3, 32, 32), torch.randn(2, 3, 3, 32, 32)
    outputs = load_model(exports / kind).unet.run(pixels, noise)
    expected = calibrated(list(pixels), noise=noise).anomaly_score
    np.testing.assert_allclose(outputs["anomaly_score"].numpy(), expected, atol=1e-4)


def test_a_top_k_beyond_the_images_pixels_is_the_mean_of_all():
    pipe = make_pipeline()
    pipe.register_to_config(top_k=32 * 32 + 1)
    torch.manual_seed(1)
    pixels, noise = torch.rand(2, 3, 32, 32), torch.randn(2, 2, 3, 32, 32)
    with torch.no_grad():
        *_, scores = _InspectionGraph(pipe, half=False)(pixels, noise)
    np.testing.assert_allclose(scores, pipe(list(pixels), noise=noise).anomaly_score, atol=1e-4)


@pytest.mark.parametrize("tile_size", [None, 32], ids=["in one", "in tiles"])
def test_an_image_that_is_not_square(tile_size, images, tmp_path):
    pipe = make_pipeline()
    pipe.register_to_config(image_size=[32, 96], tile_size=tile_size)
    exported = quiet(export_pipeline(pipe, tmp_path / "onnx", format="onnx"))
    ours, theirs = exported(images[:2]), pipe(images[:2])
    np.testing.assert_allclose(ours.anomaly_score, theirs.anomaly_score, atol=1e-4)
    for a, b, image in zip(ours.anomaly_map, theirs.anomaly_map, images, strict=False):
        assert a.shape == image.shape[:2]
        np.testing.assert_allclose(a, b, atol=1e-3)
    assert load_model(tmp_path / "onnx").tile == pipe.tile == ((32, 32) if tile_size else (32, 96))


@pytest.mark.parametrize("kind", ["openvino", "onnx"])
def test_int8_is_close_and_spares_the_segmenter(kind, images, tmp_path):
    """With one block, for quantising takes long; what a trained model loses is for `python -m benchmarks.runtimes`."""
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    pipe = make_pipeline(block_out_channels=(16,), add_attention=False, **blocks)
    levels = [handler.level for handler in logging.root.handlers]
    options = {"format": kind, "precision": "int8", "calibration_images": images[:2]}
    exported = quiet(export_pipeline(pipe, tmp_path / kind, **options))
    differences = np.abs(exported(images).anomaly_score - pipe(images).anomaly_score)
    assert 0 < differences.mean() < 0.01
    assert exported.record["score_difference"]["largest"] > 0
    assert [handler.level for handler in logging.root.handlers] == levels, "the logs of others are left alone"
    quantised = quantised_names(tmp_path / kind)
    assert any("resnets" in name for name in quantised)
    assert not [name for name in quantised if "segmenter" in name]


def quantised_names(folder):
    """Names of the operations that round to int8 in a graph."""
    if (folder / "model.xml").exists():
        return re.findall(r'name="([^"]*)" type="FakeQuantize"', (folder / "model.xml").read_text())
    graph = pytest.importorskip("onnx").load(folder / "model.onnx").graph
    return [name for node in graph.node if node.op_type == "QuantizeLinear" for name in [node.name, *node.input]]


_REPLACED = """
import signal, sys
from diffusionad_hf import load_model

pipe = load_model(sys.argv[1])
for _ in range(2):
    pipe = load_model(sys.argv[1])
del pipe
caught = []
signal.signal(signal.SIGTERM, lambda number, frame: caught.append(number))
signal.raise_signal(signal.SIGTERM)
assert caught == [signal.SIGTERM]
"""


def test_signals_are_handled_after_models_came_and_went(exports):
    done = subprocess.run([sys.executable, "-c", _REPLACED, exports / "openvino"], capture_output=True, text=True)
    assert done.returncode == 0, (done.returncode, done.stderr)


# ---- what travels with it


def test_an_export_of_before_there_were_tiles_loads(onnx_dir, photo):
    file = onnx_dir / "exported_model.json"
    record = json.loads(file.read_text())
    del record["tile_size"]
    file.write_text(json.dumps(record))
    assert quiet(load_model(onnx_dir))(photo).anomaly_score.shape == (1,)


def test_noise_seed_and_top_k_are_kept(exports, calibrated):
    config = load_model(exports / "onnx").config
    for name in ("image_size", "top_k", "seed", "false_alarm_rate", "calibration_scores"):
        assert config[name] == calibrated.config[name]
    assert stat.S_IMODE((exports / "onnx").stat().st_mode) == 0o755, "others may read it"
    record = json.loads((exports / "onnx" / "exported_model.json").read_text())
    assert record["precision"] == "fp32" and {"torch", "onnxruntime", "diffusionad-hf"} <= set(record["versions"])


def test_threshold_is_calibrated_anew_where_images_suffice(calibrated, images, tmp_path):
    """A rate of 50 % takes one image."""
    exported = quiet(export_pipeline(calibrated, tmp_path / "a", format="onnx", calibration_images=images))
    scores = exported(images).anomaly_score
    assert exported.config.calibration_scores == pytest.approx(sorted(scores), abs=1e-6)
    assert exported.threshold == pytest.approx(conformal_threshold(scores, 0.5), abs=1e-6)
    assert exported.record["calibrated_with"] == "onnx fp32 with f32"


def test_other_images_than_the_quantisations_set_the_threshold():
    from diffusionad_hf.export.exporting import _split

    numbers = list(range(30))
    assert _split(numbers, "int8", 15) == (numbers[:15], numbers[15:])
    assert _split(numbers, "int8", 16) == (numbers, [])
    assert _split(numbers, "fp32", 30) == ([], numbers)


def test_a_threshold_of_other_scores_decides_nothing_and_is_said_on_loading(onnx_dir, caplog):
    pipe = load_model(onnx_dir)
    assert not caplog.messages  # float32 scores are the original's
    rewritten(onnx_dir, precision="int8")
    pipe = load_model(onnx_dir)
    assert len(caplog.messages) == 1 and str(onnx_dir) in caplog.text
    assert "calibrated on scores of the original model" in caplog.text
    image = np.full((32, 32, 3), 200, np.uint8)
    assert quiet(pipe)(image).verdict[0].reason == "settings_changed" and pipe(image).p_value is None
    pipe.register_to_config(threshold=0.1)
    assert "not calibrated with these settings" in pipe(image).verdict[0].sentence
    pipe.register_to_config(calibration_scores=[0.2, 0.4], threshold=None)
    assert pipe(image).verdict[0].reason == "calibrated"
    pipe.save_config(onnx_dir)
    assert quiet(load_model(onnx_dir))(image).verdict[0].reason == "calibrated"
    rewritten(onnx_dir, calibration_scores=None, calibrated_with="another", threshold=None)
    assert load_model(onnx_dir).threshold is None
    assert len(caplog.messages) == 1


def test_saved_elsewhere_it_is_whole(exports, tmp_path, photo):
    pipe = load_model(exports / "onnx", threshold=0.123)
    pipe.save_pretrained(tmp_path / "copy")
    again = load_model(tmp_path / "copy")
    assert again.threshold == 0.123
    assert again(photo).anomaly_score == pipe(photo).anomaly_score
    assert torch.equal(again.unet.digest, pipe.unet.digest)


# ---- the commands


def test_the_commands_take_an_exported_model(tmp_path, images, model_dir, capsys):
    photos, out, report = tmp_path / "photos", tmp_path / "exported", tmp_path / "report.json"
    photos.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(photos / f"{i}.png")
    assert main(["export", "--model", model_dir, "--format", "onnx", str(out)]) == 0
    said = capsys.readouterr().out
    assert "onnx fp32, 32 px" in said and "is the original's" in said

    for model in (model_dir, str(out)):
        assert main(["inspect", str(photos), "--model", model, "--json", str(report)]) == 1
        found = json.loads(report.read_text())["images"]
        if model == model_dir:
            expected = found
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["score"] == pytest.approx(theirs["score"], abs=1e-4) and ours["verdict"] == theirs["verdict"]

    rate = ["--false-alarm-rate", "0.4"]
    assert main(["calibrate", str(photos), "--model", str(out), "--output-dir", str(tmp_path / "new"), *rate]) == 0
    assert main(["calibrate", str(photos), "--model", str(out), *rate]) == 0
    assert load_model(out).threshold == load_model(tmp_path / "new").threshold
    assert len(load_model(out).config.calibration_scores) == len(images)

    pytest.importorskip("datasets", reason="evaluation reads data sets with it")
    data, metrics = make_mvtec(tmp_path / "data"), tmp_path / "evaluation.json"
    assert main(["evaluate", "--model", str(out), "--data-dir", str(data), "--json", str(metrics)]) == 0
    assert json.loads(metrics.read_text())["num_images"] == 8


def test_exporting_says_which_images_were_left_out(tmp_path, model_dir, photo, capsys):
    (tmp_path / "broken.png").write_bytes(b"no image")
    Image.fromarray(photo).save(tmp_path / "good.png")
    arguments = ["--calibration-images", str(tmp_path / "*.png"), "--format", "onnx", str(tmp_path / "out")]
    assert main(["export", "--model", model_dir, *arguments[-3:], *arguments[:2]]) == 2
    assert "broken.png" in capsys.readouterr().err
    assert load_model(tmp_path / "out").threshold is not None


# ---- what cannot be


@pytest.mark.parametrize("name", ["unet", "segmenter", "scheduler"])
def test_swapped_components_are_named(name, tmp_path):
    swapped = make_pipeline()
    other = {"segmenter": swapped.unet, "unet": AnomalySegmenter(base_channels=16), "scheduler": DDPMScheduler()}
    swapped.register_modules(**{name: other[name]})
    with pytest.raises(ValueError, match=f"^{name}: is a .*; only .* can be exported"):
        export_pipeline(swapped, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_graph_that_gives_other_scores_is_not_kept(pipe, tmp_path):
    """Such as where a class of one's own computes something else than the graph does."""

    class Inverted(DiffusionADPipeline):
        def _inspect(self, *arguments):
            step = super()._inspect(*arguments)
            return {**step, "probability": 1 - step["probability"]}

    inverted = quiet(Inverted(pipe.unet, pipe.segmenter, pipe.scheduler))
    with pytest.raises(ValueError, match="scores differ from the pipeline's"):
        export_pipeline(inverted, tmp_path / "out", format="onnx")
    assert not list(tmp_path.iterdir())


def test_a_graph_whose_scores_are_no_numbers_is_refused(calibrated):
    class Broken:
        record = {"precision": "int8"}

        def __call__(self, images, **options):
            return SimpleNamespace(anomaly_score=np.full(len(images), np.nan))

    with pytest.raises(ValueError, match="scores differ from the pipeline's"):
        _compare(calibrated, Broken(), [_probe((32, 32))], torch.randn(2, 1, 3, 32, 32))


@pytest.mark.parametrize(
    "format, precision, missing",
    [("openvino", "fp32", "openvino"), ("onnx", "fp32", "onnxruntime"), ("openvino", "int8", "nncf")],
)
def test_a_runtime_that_is_not_installed_names_the_extra(
    format, precision, missing, pipe, photo, exports, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, missing, None)
    words = rf'{missing} is not installed.*pip install "diffusionad-hf\[openvino\]"'
    with pytest.raises(ImportError, match=words):
        export_pipeline(pipe, tmp_path / "out", format=format, precision=precision, calibration_images=[photo])
    if missing != "nncf":
        with pytest.raises(ImportError, match=words):
            load_model(exports / format)
        Image.fromarray(photo).save(tmp_path / "photo.png")
        assert main(["inspect", str(tmp_path / "photo.png"), "--model", str(exports / format)]) == 2
        assert "diffusionad-hf[openvino]" in capsys.readouterr().err


def rewritten(folder, **changes):
    """Changes values of the record; an ellipsis takes one out."""
    file = folder / "exported_model.json"
    record = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({name: value for name, value in record.items() if value is not ...}))


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda d: (d / "exported_model.json").unlink(), "no exported_model.json"),
        (lambda d: (d / "exported_model.json").write_text("{"), "exported_model.json: damaged"),
        (lambda d: (d / "model.onnx").unlink(), "model.onnx is missing"),
        (lambda d: (d / "model.onnx").write_bytes((d / "model.onnx").read_bytes()[:5000]), "cannot read this graph"),
        (lambda d: rewritten(d, _diffusionad_export=99), "newer version"),
        (lambda d: rewritten(d, scheduler=...), "damaged ('scheduler')"),
        (lambda d: rewritten(d, format="tflite"), "damaged ('tflite')"),
    ],
    ids=["no config", "damaged config", "no graph", "truncated graph", "newer", "no timesteps", "unknown format"],
)
def test_a_folder_that_is_not_whole_says_what_is_missing(damage, words, onnx_dir, photo, tmp_path, capsys):
    damage(onnx_dir)
    with pytest.raises(OSError, match=re.escape(words)):
        load_model(onnx_dir)
    Image.fromarray(photo).save(tmp_path / "photo.png")
    assert main(["inspect", str(tmp_path / "photo.png"), "--model", str(onnx_dir)]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert str(onnx_dir) in said and words in said


def test_the_wrong_kind_of_folder_is_said(exports, model_dir, tmp_path):
    with pytest.raises(OSError, match="no exported_model.json"):
        ExportedDiffusionADPipeline.from_pretrained(model_dir)
    with pytest.raises(OSError, match="no model_index.json"):
        DiffusionADPipeline.from_pretrained(exports / "onnx")
    with pytest.raises(OSError, match="give the whole folder"):
        load_model(exports / "onnx" / "model.onnx")
    with pytest.raises(ValueError, match="is an exported model already"):
        export_pipeline(load_model(exports / "onnx"), tmp_path / "out")


@pytest.mark.parametrize("occupied", ["file", "folder", "below a file"])
def test_an_unwritable_target_is_said_and_left_alone(occupied, pipe, tmp_path):
    target = tmp_path / "out"
    if occupied == "folder":
        target.mkdir()
        kept = target / "thesis.txt"
    else:
        kept = target
        target = target / "deeper" if occupied == "below a file" else target
    kept.write_text("three years of work")
    with pytest.raises(OSError, match=str(target)):
        export_pipeline(pipe, target, format="onnx")
    assert kept.read_text() == "three years of work" and len(list(tmp_path.iterdir())) == 1


def test_a_failed_export_leaves_the_earlier_one(onnx_dir, tmp_path, photo):
    (tmp_path / "broken.png").write_bytes(b"no image")
    before = {f.name: f.read_bytes() for f in onnx_dir.iterdir()}
    with pytest.raises(ValueError, match="broken.png"):
        export_pipeline(make_pipeline(), onnx_dir, format="onnx", calibration_images=[tmp_path / "broken.png"])
    assert {f.name: f.read_bytes() for f in onnx_dir.iterdir()} == before


def test_int8_needs_images(pipe, model_dir, tmp_path, capsys):
    with pytest.raises(ValueError, match="int8: needs normal images"):
        export_pipeline(pipe, tmp_path / "out", precision="int8")
    assert main(["export", "--model", model_dir, "--precision", "int8", str(tmp_path / "out")]) == 2
    assert "int8: needs normal images" in capsys.readouterr().err
    arguments = ["--precision", "int8", str(tmp_path / "out"), "--calibration-images", str(tmp_path / "nothing")]
    assert main(["export", "--model", model_dir, *arguments]) == 2
    assert "nothing: no such file or folder" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "value"), [("format", "tflite"), ("precision", "int4")])
def test_unknown_choices_are_named(name, value, pipe, tmp_path):
    with pytest.raises(ValueError, match=f'{name}="{value}": must be one of'):
        export_pipeline(pipe, tmp_path / "out", **{name: value})


@pytest.mark.parametrize(("name", "value"), [("small_timestep", 100), ("big_timestep", 500), ("guidance_weight", 0.5)])
def test_what_is_fixed_in_the_graph_cannot_be_changed(name, value, exports, photo):
    exported = load_model(exports / "onnx")
    with pytest.raises(ValueError, match=f"{name}={value}: this model was exported with"):
        exported(photo, **{name: value})
    # What it was exported with may be said.
    exported(photo, small_timestep=200, big_timestep=400, guidance_weight=1.0)


def test_size_device_precision_and_variant_are_fixed(exports, photo, tmp_path, capsys):
    exported = load_model(exports / "onnx")
    assert exported.to("cpu", torch.float32) is exported
    for ask in (
        lambda: exported.to("cuda"),
        lambda: exported.to(torch.device("cuda:1")),
        lambda: exported.to(torch.float16),
        lambda: exported.to("cpu", torch.float16),
        lambda: exported.to(device="cuda"),
        lambda: exported.to(dtype=torch.float16),
        lambda: load_model(exports / "onnx", device="cuda"),
    ):
        with pytest.raises(ValueError, match="runs on the CPU"):
            ask()
    exported.register_to_config(tile_size=16)
    with pytest.raises(ValueError, match="tile_size=16: this model was exported for None px"):
        exported(photo)
    exported.register_to_config(image_size=64, tile_size=None)
    with pytest.raises(ValueError, match="image_size=64: this model was exported for 32 px"):
        exported(photo)
    Image.fromarray(photo).save(tmp_path / "photo.png")
    for option in ("variant", "revision"):
        arguments = [str(tmp_path / "photo.png"), "--model", str(exports / "onnx"), f"--{option}", "fp16"]
        assert main(["inspect", *arguments]) == 2
        assert f"{option}: an exported model has no such option" in capsys.readouterr().err
