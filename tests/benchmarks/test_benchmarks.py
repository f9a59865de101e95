"""Every measurement runs, at toy size, and reports what its results are judged by."""

import copy
import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import (
    blocks,
    embedded,
    familiarity,
    inference,
    intervals,
    machine,
    metrics,
    promises,
    real,
    recorded,
    runtimes,
    synthesis,
    tiles,
    training,
)
from benchmarks.machine import count_flops, find_slow_types, matmul_peak, measure_in_turns, spread
from benchmarks.visitors import _photo
from diffusionad_hf import DiffusionADPipeline, build_pipeline
from diffusionad_hf.data import load_category
from tests.dataset_factory import make_mvtec

ROOT = Path(__file__).resolve().parents[2]
SLOW_TYPES = find_slow_types(machine.CPU, ["bfloat16"])


@pytest.fixture(autouse=True)
def small_products(monkeypatch):
    """The peak of small matrix products takes less time than that of large ones, and is as good here."""
    monkeypatch.setattr(machine, "matmul_peak", partial(machine.matmul_peak, size=128))


def is_spread(row, name):
    return 0 < row[f"lowest_{name}"] <= row[f"median_{name}"] <= row[f"highest_{name}"]


def run(main, tmp_path, *options):
    file = tmp_path / "result.json"
    main([*options, "--repeats", "2", "--json", str(file)])
    result = json.loads(file.read_text())
    assert {"hardware", "torch", "python", "diffusers", "date"} <= result["machine"].keys()
    return result


# ---- the command ----------------------------------------------------------------------------------------------------


def test_help_names_every_measurement_and_imports_none():
    script = (
        "import sys; from benchmarks.__main__ import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'diffusers', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    files = {file.stem for file in (ROOT / "benchmarks").glob("*.py")}
    assert command.MEASUREMENTS.keys() == files - {"__init__", "__main__", "machine", "recorded"}
    assert all(name in done.stdout for name in command.MEASUREMENTS)


@pytest.mark.parametrize("name", command.MEASUREMENTS)
def test_every_measurement_can_be_called(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks"])
    with pytest.raises(SystemExit) as stopped:
        command.main([name, "--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert f"python -m benchmarks {name}" in printed and "--json" in printed


def test_an_unknown_measurement_names_those_there_are(capsys):
    with pytest.raises(SystemExit):
        command.main(["speed"])
    assert "inference" in capsys.readouterr().err


def test_a_gpu_that_is_not_there_is_named(capsys):
    with pytest.raises(SystemExit):
        synthesis.main(["--device", "cuda:97"])
    assert "--device: cuda:97: not available" in capsys.readouterr().err


# ---- the instruments ------------------------------------------------------------------------------------------------


def test_operations_are_counted_as_products_and_sums():
    a, b = torch.rand(3, 5), torch.rand(5, 7)
    assert count_flops(lambda: a @ b) == 2 * 3 * 5 * 7


def test_all_take_turns_after_their_warm_up():
    order = []
    seconds = measure_in_turns(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, torch.device("cpu"), repeats=2
    )
    assert "".join(order) == "ab" + "abab"
    assert {name: len(taken) for name, taken in seconds.items()} == {"a": 2, "b": 2}


def test_spread_and_peak_are_plausible():
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "lowest": 1.0, "highest": 3.0}
    assert 1e8 < matmul_peak(torch.device("cpu"), torch.float32, size=128) < 1e13


@pytest.mark.parametrize("ratio, found", [(48, True), (3, False)])
def test_a_type_that_the_processor_lacks_is_not_measured_and_said_to_be_slow(ratio, found, monkeypatch):
    def pretend(functions, device, repeats):
        a = functions["probe"]()
        return {"probe": [1e-4 * (ratio if a.dtype == torch.bfloat16 else 1)]}

    monkeypatch.setattr(machine, "measure_in_turns", pretend)
    slow = find_slow_types(machine.CPU, ["float32", "bfloat16"])
    assert slow == ({"bfloat16": "bfloat16: 48 times slower than float32 here, not measured"} if found else {})


def test_one_image_of_the_paper_sized_model_takes_1200_gflop():
    with torch.device("meta"):
        pipe = build_pipeline("paper", 256)
    # The table of the scheduler was made on no device either.
    pipe.scheduler = build_pipeline("tiny", 32).scheduler
    assert inference.count_image(pipe) / 1e9 == pytest.approx(1202, rel=0.02)


# ---- the measurements -----------------------------------------------------------------------------------------------


def test_inference(tmp_path, capsys):
    options = ["--presets", "tiny", "--resolution", "32", "--batch-sizes", "1", "2"]
    rows = run(inference.main, tmp_path, *options, "--dtypes", "float32", "bfloat16", "--device", "cpu")["rows"]
    assert [(row["way"], row["dtype"], row["batch_size"]) for row in rows] == [
        ("paper's way", "float32", 1),
        ("paper's way, no autograd", "float32", 1),
        *(("pipeline", dtype, batch) for dtype in ("float32", "bfloat16") for batch in (1, 2)),
    ]
    for row in rows:
        if row["dtype"] in SLOW_TYPES:
            assert "times slower than float32 here, not measured" in row["error"]
            continue
        assert is_spread(row, "s") and row["images_per_s"] > 0 and row["share_of_peak"] > 0
        assert row["score_difference"] < (1e-5 if row["dtype"] == "float32" else 0.05)
    printed = capsys.readouterr().out
    assert "paper's way, no autograd" in printed and "gflop_per_image" in printed


def test_the_first_call_is_the_one_that_compiles(tmp_path, monkeypatch):
    def compiled(pipe, mode):
        pipe = copy.deepcopy(pipe)

        def slow_once(*_):
            hook.remove()
            time.sleep(1)

        hook = pipe.unet.register_forward_pre_hook(slow_once)
        return pipe

    monkeypatch.setattr(inference, "_compiled", compiled)
    options = ["--presets", "tiny", "--resolution", "32", "--batch-sizes", "1", "--no-baseline", "--device", "cpu"]
    plain, slow = run(inference.main, tmp_path, *options, "--compile", "default")["rows"]
    assert slow["way"] == "pipeline, compiled (default)" and slow["score_difference"] < 1e-5
    assert plain["first_call_s"] < 1 < slow["first_call_s"]


def test_what_does_not_fit_says_so(tmp_path, monkeypatch, capsys):
    compute = DiffusionADPipeline._inspect

    def limited(self, pixels, *arguments):
        if len(pixels) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return compute(self, pixels, *arguments)

    monkeypatch.setattr(DiffusionADPipeline, "_inspect", limited)
    options = ["--presets", "tiny", "--resolution", "32", "--batch-sizes", "1", "2", "--no-baseline"]
    fits, too_large = run(inference.main, tmp_path, *options, "--device", "cpu")["rows"]
    assert is_spread(fits, "s") and "error" not in fits
    assert too_large["batch_size"] == 2 and "2 images at once do not fit" in too_large["error"]
    assert "median_s" not in too_large and "2 images at once do not fit" in capsys.readouterr().out


def test_on_a_gpu_rows_are_measured_one_after_another_with_their_memory(monkeypatch):
    """With the functions of `torch.cuda` faked, as most machines have no GPU."""
    used = iter([1e9, 4e9])
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: next(used))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 6.5e9)
    monkeypatch.setattr(machine, "matmul_peak", lambda *_: 1e9)
    order = []

    def prepare(row):
        if row["name"] == "b":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return lambda: order.append(row["name"])

    rows = [{"name": name, "dtype": "float32", "batch_size": 2} for name in "ab"]
    machine.measure_rows(rows, prepare, 1e3, torch.device("cuda"), repeats=2)
    assert order == ["a"] * 5 and rows[0]["memory_gb"] == 5.5 and is_spread(rows[0], "s")
    assert "out of memory" in rows[1]["error"] and "median_s" not in rows[1]


def test_inference_of_a_model_of_ones_own(tmp_path, model_dir):
    result = run(
        inference.main, tmp_path, "--model", model_dir, "--no-baseline", "--batch_sizes", "1", "--device", "cpu"
    )
    assert [row["way"] for row in result["rows"]] == ["pipeline"]
    assert result["rows"][0]["px"] == 32


def test_long_images_are_measured_in_tiles_and_whole():
    rows = [tiles.measure(32, 64, tile) for tile in (32, None)]
    assert [(row["px"], row["tile"]) for row in rows] == [("32 x 64", 32), ("32 x 64", "whole")]
    assert all(row["seconds"] > 0 and row["mb"] >= 0 for row in rows)


def test_the_benchmarks_random_model_tells_images_apart():
    pipe = inference.load_or_build(None, "tiny", 32)
    photos = inference.make_photos(2, 32)
    first, second = pipe(photos).anomaly_score
    assert abs(first - second) > 1e-3


@pytest.mark.parametrize("preset", ["tiny", "perceptual"])
def test_the_papers_way_gives_the_pipelines_score(preset):
    pipe = inference.load_or_build(None, preset, 64)
    (photo,) = inference.make_photos(1, 64)
    pixels = torch.from_numpy(photo).permute(2, 0, 1)[None].float() / 255
    _, score = inference.papers_way(pipe, pixels, pipe._seeded_noise(1)[0][:, None], autograd=False)
    assert score == pytest.approx(float(pipe(photo).anomaly_score[0]), abs=1e-5)


def test_training(tmp_path):
    options = ["--presets", "tiny", "--resolution", "32", "--batch_sizes", "2", "--gradient-checkpointing"]
    result = run(training.main, tmp_path, *options, "--dtypes", "bfloat16", "--device", "cpu")
    assert [row["checkpointing"] for row in result["rows"]] == [False, True]
    for row in result["rows"]:
        if SLOW_TYPES:
            assert "times slower than float32 here, not measured" in row["error"]
            continue
        assert is_spread(row, "s") and row["images_per_s"] > 0 and row["share_of_peak"] > 0


def test_synthesis(tmp_path, monkeypatch):
    monkeypatch.setattr(synthesis, "_CALLS", 1)
    (row,) = run(synthesis.main, tmp_path, "--size", "32", "--batch", "2", "--device", "cpu")["rows"]
    assert is_spread(row, "images_per_s")


def test_metrics_are_those_of_scikit_learn(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "_MEMORY_IMAGES", 8)
    result = run(metrics.main, tmp_path, "--images", "8", "--size", "64")
    assert result["largest difference to scikit-learn"] < 1e-9
    # The maps of 8 images, in float32, and no more than a few times that.
    assert 8 * 64**2 * 4e-9 < result["GB allocated for 8 maps"] < 0.05
    assert all(row["seconds"] > 0 for row in result["rows"])


def test_bookkeeping_of_blocks(tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    monkeypatch.setattr(blocks, "_FILES", 600)
    file = tmp_path / "result.json"
    blocks.main(["--json", str(file)])
    result = json.loads(file.read_text())
    assert result["blocks"] == 3 and len(result["rows"]) == 5


def test_runtimes_tell_time_and_what_exporting_does_to_the_scores(tmp_path, model_dir):
    pytest.importorskip("onnxruntime", reason="the runtimes are compared; pip install diffusionad-hf[openvino]")
    make_mvtec(tmp_path, "parts", train=1, good=1, defects={"hole": 1})
    options = ["--model", model_dir, "--data-dir", str(tmp_path / "parts"), "--threads", "1"]
    result = run(runtimes.main, tmp_path, *options, "--runtimes", "torch eager bf16", "onnx fp32")
    rows = {row["runtime"]: row for row in result["rows"]}
    assert rows.keys() == {"torch eager fp32", "torch eager bf16", "onnx fp32"}
    eager, onnx = rows["torch eager fp32"], rows["onnx fp32"]
    assert eager["ms"] > 0 and eager["times_faster"] == 1 and 0 <= onnx["image_auroc"] <= 1
    assert eager["largest_score_difference"] == 0 and 0 <= onnx["largest_score_difference"] < 1e-4
    assert ("error" in rows["torch eager bf16"]) == bool(SLOW_TYPES)


# ---- recorded figures -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page, heading", command.TABLES)
def test_what_rebuilds_a_table_is_a_command_and_the_table_is_there(page, heading, monkeypatch, capsys):
    assert recorded.read_rows(ROOT / page, heading)
    monkeypatch.setattr(sys, "argv", ["benchmarks"])
    for name, *options in map(str.split, command.TABLES[page, heading]):
        with pytest.raises(SystemExit):
            command.main([name, "--help"])
        printed = capsys.readouterr().out
        assert all(option in printed for option in options if option.startswith("--"))


def test_figures_are_compared_with_those_recorded_of_the_same_row(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# Page\n\n## Others\n\n| a | n |\n| --- | --- |\n| 1 | 2 |\n\n## Mine\n\nText.\n\n"
        "| part | N | image AUROC | false-alarm rate | AUPRO 30 | note |\n| --- | --- | --- | --- | --- | --- |\n"
        "| mpdd/a | 10 | **.950 ± .010** | 5.0 % | .900 [.800, .950] | slow |\n| mpdd/b | 10 | .5 | 1 % | | |\n"
    )
    rows = [
        {"part": "mpdd/a", "N": 10, "image_auroc": "0.940 ± 0.001", "false-alarm rate": 0.07, "aupro_30": 0.9},
        {"part": "mpdd/b", "N": 20, "image_auroc": 0.5},
    ]
    (apart,) = recorded.differences(rows, recorded.read_rows(page, "Mine"), ["part", "n"])
    assert apart == pytest.approx(
        {"part": "mpdd/a", "n": 10, "image_auroc": -0.01, "false_alarm_rate": 0.02, "aupro_30": 0}
    )
    with pytest.raises(ValueError, match='page.md: no table below a heading "Yours"'):
        recorded.read_rows(page, "Yours")


def test_the_embedded_model_is_as_it_was_recorded(tmp_path, capsys):
    file = tmp_path / "result.json"
    embedded.main(["--images", "6", "--json", str(file)])
    (apart,) = json.loads(file.read_text())["differences"]
    assert apart["model"] == "demo-part" and apart["image_auroc"] == 0
    assert 0 < abs(apart["aupro_30"]) < 0.05
    assert "minus recorded" in capsys.readouterr().out


def test_records_have_the_columns_that_measurements_print():
    reached = recorded.read_rows(recorded.TRIALS, "What the default preset reaches")
    unrecorded = {"wall_seconds", "peak_gb", "seconds_per_image"}
    assert {"category", "px", "photos", *real.COLUMNS} - unrecorded <= reached[0].keys()
    printed = {"category", "known", "normal", "defective", "other products", "blank, noise", *familiarity.ALTERED}
    rows = recorded.read_rows(recorded.BENCHMARKS, "Photos of something else")
    assert rows[0].keys() == set(map(recorded.column, printed))
    calibrated = recorded.read_rows(recorded.BENCHMARKS, "What calibrations promise")
    measured = {"model": "", **promises.measure(np.arange(9.0), 5, 0.05, 2)}
    assert calibrated[0].keys() == set(map(recorded.column, measured))


def test_the_readme_says_what_is_recorded():
    figures = ("image_auroc", "pixel_auroc", "pixel_ap", "aupro_30")
    reached = {
        row["category"].split("/")[-1]: row
        for row in recorded.read_rows(recorded.TRIALS, "What the default preset reaches")
    }
    said = recorded.read_rows(ROOT / "README.md", "Measured on real products")
    ours = {row["product"].split()[0]: row for row in said if row[""].startswith("ours")}
    assert ours.keys() == reached.keys()
    for name, row in ours.items():
        assert [row[f].strip("*").split(" [")[0].replace("**", "") for f in figures] == [
            reached[name][f] for f in figures
        ], name
    for model, column in (("cookie", "cookie"), ("mvtec-bottle", "mvtec_bottle"), ("demo-part", "demo_part")):
        evaluation = json.loads((ROOT / "space/checkpoints" / model / "evaluation.json").read_text())
        rows = recorded.read_rows(ROOT / "README.md", "What is embedded")
        cells = {recorded.column(row[""]): next(v for c, v in row.items() if c.startswith(column)) for row in rows}
        for name in set(embedded.METRICS) & cells.keys():
            low, high = evaluation["intervals"][name]
            assert cells[name].startswith(f"{evaluation[name]:.3f} [{low:.3f}, {high:.3f}]"), (model, name)
        assert cells.keys() >= {"image_auroc", "aupro_30", "pixel_auroc", "false_alarm_rate", "miss_rate"}


# ---- intervals ------------------------------------------------------------------------------------------------------


def test_intervals_cover(monkeypatch, tmp_path):
    for name, value in {"_SIZES": (10,), "_TRUE_SCORES": 100_000, "_TRUE_MAPS": 200, "_MAPS": ("strong",)}.items():
        monkeypatch.setattr(intervals, name, value)
    file = tmp_path / "result.json"
    intervals.main(["--repeats", "100", "--json", str(file)])
    result = json.loads(file.read_text())
    *scores, maps = result["rows"]
    assert len(scores) == 5 and {row["AUROC"] for row in scores} == {0.8, 0.95, 1.0}
    for row in scores:
        for name in ("image_auroc", "image_ap", "image_f1_max", "false_alarm_rate", "miss_rate"):
            assert float(row[name].split("%")[0]) >= 90, (row, name)
    assert float(maps["aupro_30"].split("%")[0]) >= 85
    assert len(result["differences"]) == 6  # rows of 10 images are recorded, and a tenth of the test sets is near them
    assert all(abs(row.get("image_auroc", row.get("aupro_30"))) < 0.1 for row in result["differences"])


def test_a_calibration_keeps_its_promise_on_average():
    for count, promised in ((5, 1 / 6), (39, 0.05)):
        row = promises.measure(np.random.default_rng(1).random(300), count, 0.05, 300)
        assert row["promised"] == pytest.approx(promised) and row["mean"] == pytest.approx(promised, abs=0.025)
        assert row["a tenth"] < row["mean"] < row["nine tenths"]


def test_a_seed_draws_the_few_photos_and_all_test_images_stay(tmp_path):
    make_mvtec(tmp_path, "parts", train=6, good=1, defects={"hole": 2})
    drawn = []
    for seed in (0, 0, 1):
        folder = real.draw_photos(tmp_path / "parts", 3, seed, tmp_path / f"draw-{len(drawn)}" / "parts")
        splits = load_category(str(folder.parent), "parts")
        assert len(splits["test"]) == 3
        drawn.append([image.tobytes() for image in splits["train"]["image"]])
    assert len(drawn[0]) == 3 and drawn[0] == drawn[1] != drawn[2]
    with pytest.raises(SystemExit, match="has 6 to learn from"):
        real.draw_photos(tmp_path / "parts", 7, 0, tmp_path / "too many")


def test_visitors_send_a_photo_that_is_there():
    assert _photo().startswith((b"\x89PNG", b"\xff\xd8"))
