"""Inspection of many images in blocks: by every engine, killed, continued, and equal to what one process finds."""

import errno
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tarfile
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

pq = pytest.importorskip("pyarrow.parquet", reason="results in Parquet need pip install -e .[train]")
datasets = pytest.importorskip("datasets")

from accelerate.state import AcceleratorState  # noqa: E402
from filelock import FileLock  # noqa: E402

from diffusionad_hf import DiffusionADPipeline  # noqa: E402
from diffusionad_hf.cli import inspect as command  # noqa: E402
from diffusionad_hf.cli.main import main  # noqa: E402
from diffusionad_hf.inspection import blocks as blocks_module  # noqa: E402
from diffusionad_hf.inspection.blocks import Run, describe_model, inspect_blocks  # noqa: E402
from diffusionad_hf.inspection.engines import AccelerateEngine  # noqa: E402
from diffusionad_hf.inspection.inputs import DatasetInputs, FileInputs  # noqa: E402
from diffusionad_hf.inspection.inspection import inspect_files  # noqa: E402
from tests.conftest import make_pipeline  # noqa: E402

BATCH = 2
# Nineteen photos are five blocks of four.
BLOCKS = [f"block-{i:06d}.parquet" for i in range(5)]
# The command with blocks of two batches, as here; a process whose RANK is $KILLED kills itself in its second block.
LAUNCHED = """
import os, signal, sys
from diffusionad_hf import DiffusionADPipeline
from diffusionad_hf.cli.main import main
from diffusionad_hf.inspection import blocks
blocks._BATCHES_PER_BLOCK, inspect, passes = 2, DiffusionADPipeline._inspect, []
def dying(*arguments):
    passes.append(None)
    if len(passes) == 4 and os.environ["RANK"] == os.environ.get("KILLED"):
        os.kill(os.getpid(), signal.SIGKILL)
    return inspect(*arguments)
DiffusionADPipeline._inspect = dying
sys.exit(main())
"""


@pytest.fixture(scope="module", autouse=True)
def small_blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks_module, "_BATCHES_PER_BLOCK", 2)
        yield


@pytest.fixture(autouse=True)
def alone():
    """Accelerate remembers for all of a process how it was started."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Nineteen images of several sizes, one of which is damaged, which makes 2 the exit code; do not change it."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(19):
        squares = rng.integers(0, 256, (4 + i % 3, 5, 3), dtype=np.uint8)
        Image.fromarray(np.kron(squares, np.ones((9, 9, 1), np.uint8))).save(folder / f"{i:02d}.png")
    (folder / "13.png").write_bytes((folder / "12.png").read_bytes()[:200])
    return folder


@pytest.fixture(scope="module")
def data(photos, tmp_path_factory):
    """The same as a dataset of two Parquet files with 12 and 7 rows, 5 to a row group; do not change it."""
    folder = tmp_path_factory.mktemp("data")
    files = sorted(photos.iterdir())
    features = datasets.Features(image=datasets.Image(), number=datasets.Value("int64"))
    for name, part in (("train-0", files[:12]), ("train-1", files[12:])):
        rows = {"image": [{"path": f.name, "bytes": f.read_bytes()} for f in part], "number": list(range(len(part)))}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{name}.parquet", batch_size=5)
    return folder


def run(*arguments):
    return main(["inspect", "--batch-size", str(BATCH), *(str(a) for a in arguments)])


@pytest.fixture(scope="module")
def whole(photos, model_dir, tmp_path_factory):
    """The table of one process that nobody interrupts."""
    target = tmp_path_factory.mktemp("whole") / "results.parquet"
    assert run(photos, "--model", model_dir, "--parquet", target) == 2
    return target


@pytest.fixture
def target(tmp_path):
    return tmp_path / "results.parquet"


def written(target):
    """When each block was written, and what is in it."""
    folder = target.with_name(f"{target.name}.blocks")
    return {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in sorted(folder.glob("block-*"))}


def test_rows_are_what_the_pipeline_finds_in_order(target, photos, model_dir):
    # A rate at which some of these photos lie on either side of the threshold.
    assert run(photos, "--model", model_dir, "--parquet", target, "--false-alarm-rate", 0.4) == 2
    pipe = DiffusionADPipeline.from_pretrained(model_dir, false_alarm_rate=0.4)
    pipe.set_progress_bar_config(disable=True)
    files = sorted(photos.iterdir())
    rows = pq.read_table(target).to_pylist()
    assert list(written(target)) == BLOCKS
    assert [row["row"] for row in rows] == list(range(19)) and [row["file"] for row in rows] == [str(f) for f in files]
    bad = rows.pop(13)
    assert bad["error"].startswith(str(photos / "13.png")) and bad["score"] is None and bad["verdict"] is None
    found = [result for result in inspect_files(pipe, files, batch_size=BATCH) if hasattr(result, "score")]
    for row, result in zip(rows, found, strict=True):
        for name in ("file", "score", "threshold", "verdict", "p_value", "where"):
            assert row[name] == getattr(result, name), name
        assert [tuple(r["box"]) for r in row["regions"]] == [r["box"] for r in result.regions]
        assert row["error"] is None
    assert {row["verdict"] for row in rows} == {"normal", "anomalous"}


def test_a_folder_for_the_table_reads_as_the_table(whole, photos, model_dir, tmp_path):
    (tmp_path / "there").mkdir()
    for folder in ("there", "new"):
        assert run(photos, "--model", model_dir, "--parquet", tmp_path / folder) == 2
        assert pq.read_table(tmp_path / folder).equals(pq.read_table(whole))


def test_a_name_that_is_no_text_is_escaped(photos, model_dir, tmp_path, target):
    name = os.fsdecode(os.fsencode(tmp_path / "odd-") + b"\xe9.png")
    try:
        shutil.copy(photos / "00.png", name)
    except OSError:
        pytest.skip("this file system takes no such names")
    assert run(tmp_path, "--model", model_dir, "--parquet", target) == 0
    assert pq.read_table(target)["file"].to_pylist() == [str(tmp_path / "odd-\\udce9.png")]


def test_pictures_among_the_photos_do_not_make_it_another_run(photos, model_dir, tmp_path, target):
    folder = shutil.copytree(photos, tmp_path / "photos")
    arguments = (folder, "--model", model_dir, "--parquet", target, "--output-dir", folder / "report")
    assert run(*arguments) == 2
    table = target.read_bytes()
    (folder / "report/00_figure.png").unlink()
    assert run(*arguments) == 2 and target.read_bytes() == table


def test_what_is_missing_is_done_and_what_is_there_is_not_done_again(
    whole, photos, model_dir, target, monkeypatch, capfd
):
    arguments = (photos, "--model", model_dir, "--parquet", target)
    run(*arguments)
    folder = target.with_name("results.parquet.blocks")
    (folder / BLOCKS[1]).unlink()
    (folder / BLOCKS[4]).unlink()
    (folder / f".{BLOCKS[1]}.0123abcd.partial").write_bytes(b"PAR1 and no more")
    kept = written(target)
    assert run(*arguments) == 2
    assert "continues after 12 images that are done" in capfd.readouterr().err
    assert written(target).items() >= kept.items() and target.read_bytes() == whole.read_bytes()
    assert not list(folder.glob("*.partial"))

    before = written(target)
    target.unlink()
    monkeypatch.setattr(DiffusionADPipeline, "_inspect", None)  # no image can be inspected any more
    assert run(*arguments) == 2
    assert written(target) == before and target.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("reason", ["an error", "SIGTERM"])
def test_finished_blocks_are_kept_whatever_ends_a_run(
    reason, whole, photos, model_dir, tmp_path, target, monkeypatch, capsys
):
    out, inspect, passes = tmp_path / "out", DiffusionADPipeline._inspect, []
    arguments = (photos, "--model", model_dir, "--parquet", target, "--output-dir", out)

    def terminated(pipe, *pixels):
        passes.append(None)
        if len(passes) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return inspect(pipe, *pixels)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        if reason == "SIGTERM":
            patch.setattr(DiffusionADPipeline, "_inspect", terminated)
        else:
            (out / "05_figure.png").mkdir(parents=True)  # where a picture has to be
        assert run(*arguments) == (130 if reason == "SIGTERM" else 2)
    assert ("interrupted" if reason == "SIGTERM" else "05_figure.png") in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before
    kept = written(target)
    assert list(kept) == BLOCKS[:1] and not target.exists() and not list(tmp_path.rglob(".*.partial"))
    if reason == "an error":
        (out / "05_figure.png").rmdir()
    assert run(*arguments) == 2
    assert written(target).items() >= kept.items() and target.read_bytes() == whole.read_bytes()
    assert len(list(out.glob("*_figure.png"))) == 18


def launch(folder, *arguments, **environment):
    """Two processes, as `accelerate launch` starts them on GPUs or a CPU."""
    (folder / "launched.py").write_text(LAUNCHED)
    launcher = (
        "-m accelerate.commands.accelerate_cli launch --multi_gpu --num_processes 2 --main_process_port 0".split()
    )
    command = [sys.executable, *launcher, folder / "launched.py", "inspect", "--batch-size", BATCH, *arguments]
    environment = {**os.environ, **environment}
    return subprocess.run([str(part) for part in command], env=environment, capture_output=True, text=True)


def test_two_launched_processes_one_of_them_killed_and_continued_by_one(whole, photos, model_dir, tmp_path, target):
    arguments = (photos, "--model", model_dir, "--parquet", target)
    assert launch(tmp_path, *arguments, KILLED="1").returncode != 0
    kept = written(target)
    # The second process has the last three blocks to do, and was killed in its second.
    assert BLOCKS[2] in kept and BLOCKS[3] not in kept and not target.exists()
    assert run(*arguments) == 2
    assert written(target).items() >= kept.items(), "a block was inspected again"
    assert target.read_bytes() == whole.read_bytes()


def test_two_launched_processes_read_a_dataset_of_the_hub_at_one_commit(hub, whole, data, model_dir, tmp_path, target):
    hub.add_repo("org/photos", {f"data/{f.name}": f.read_bytes() for f in data.iterdir()}, repo_type="dataset")
    out, arguments = tmp_path / "out", ("--dataset", "org/photos", "--model", model_dir, "--parquet", target)
    done = launch(tmp_path, *arguments, "--output-dir", out, **hub.environment(tmp_path / "home"))
    # The launcher ends with 1 whatever a process ends with, which is 2 here for the damaged photo.
    assert done.returncode == 1 and "exitcode  : 2" in done.stderr, done.stderr
    # The main process speaks, the other is silent.
    assert done.stdout.count("19 images") == 1 and "inspecting (process 1 of 2)" in done.stderr
    assert "process 2" not in done.stderr
    found, columns = pq.read_table(target), ["row", "score", "threshold", "verdict", "p_value", "regions"]
    assert found.select(columns).equals(pq.read_table(whole).select(columns))
    assert found["file"].to_pylist() == [f"{i:02d}.png" for i in range(19)]
    assert len(list(out.rglob("*_figure.png"))) == 18
    record = json.loads((tmp_path / "results.parquet.blocks/run.json").read_text())
    assert record["inputs"].endswith(hub.repo("org/photos", "dataset").branches["main"].oid)


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
def test_every_block_falls_to_one_process(processes):
    missing = [0, 3, 4, 8, 9]
    engines = [AccelerateEngine.__new__(AccelerateEngine) for _ in range(processes)]
    for index, engine in enumerate(engines):
        engine.num_processes, engine._state = processes, SimpleNamespace(process_index=index)
    shares = [engine.share(missing) for engine in engines]
    assert sum(shares, []) == missing and max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.fixture(scope="module")
def cluster():
    ray = pytest.importorskip("ray", reason="needs pip install -e .[ray]")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def load_dying(args, device):
    """A pipeline that kills its process once, in the worker's second block, and notes in $OUT/killed who it was."""
    pipe, passes = _load_inspector(args, device), []
    inspect = pipe._inspect

    def dying(*arguments):
        passes.append(None)
        note = args.output_dir / "killed"
        if len(passes) == 4 and not note.exists():
            note.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        return inspect(*arguments)

    pipe._inspect = dying
    return pipe


_load_inspector = command._load_inspector


def test_two_ray_workers_read_a_dataset_and_one_of_them_is_killed(
    cluster, whole, data, model_dir, tmp_path, target, monkeypatch
):
    monkeypatch.setattr(command, "_load_inspector", load_dying)
    monkeypatch.chdir(tmp_path)
    arguments = ("--engine", "ray", "--model", model_dir, "--output-dir", "out", "--parquet", target.name)
    assert run("--dataset", data, *arguments) == 2
    assert (tmp_path / "out/killed").exists()
    assert pq.read_table(target).drop(["file", "error"]).equals(pq.read_table(whole).drop(["file", "error"]))
    assert list(written(target)) == BLOCKS and len(list(tmp_path.glob("out/**/*_figure.png"))) == 18


def test_ray_says_what_went_wrong_in_a_worker(cluster, photos, model_dir, target, tmp_path, capsys):
    out = target.with_name("out")
    (out / "01_figure.png").mkdir(parents=True)
    few = tmp_path / "few"  # one block, for which one worker loads the model
    few.mkdir()
    for name in ("00.png", "01.png"):
        shutil.copy(photos / name, few)
    arguments = (few, "--engine", "ray", "--model", model_dir, "--output-dir", out, "--parquet", target)
    assert run(*arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("diffusionad: error: ") and "01_figure.png" in error and "Traceback" not in error


def test_without_ray_the_extra_is_named(photos, model_dir, target, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert run(photos, "--model", model_dir, "--parquet", target, "--engine", "ray") == 2
    assert 'pip install "diffusionad-hf[ray]"' in capsys.readouterr().err


def test_a_file_list(photos, whole, model_dir, tmp_path, target, capsys):
    files = [photos / "03.png", photos / "missing.png", photos / "01.png"]
    (tmp_path / "list.txt").write_text("\n".join(map(str, [*files, files[0], ""])))
    arguments = ("--file-list", tmp_path / "list.txt", "--model", model_dir)
    assert run(*arguments, "--parquet", target) == 2
    rows = pq.read_table(target).to_pylist()
    assert [row["file"] for row in rows] == [str(file) for file in files]
    assert "missing.png: no such" in rows[1]["error"] and "missing.png: no such" in capsys.readouterr().err
    assert rows[0]["score"] == pytest.approx(pq.read_table(whole)["score"][3].as_py(), abs=1e-6)
    # And without Parquet.
    assert run(*arguments, "--json", tmp_path / "r.json") == 2
    report = json.loads((tmp_path / "r.json").read_text())
    assert [image["file"] for image in report["images"]] == [str(files[0]), str(files[2])]


@pytest.mark.parametrize("kind", ["Parquet", "one file", "images in a folder", "tar files", "saved to disk", "paths"])
def test_datasets_of_every_kind_are_read_from_any_position(kind, data, photos, tmp_path):
    source, files = tmp_path / "data", sorted(photos.iterdir())
    if kind in ("Parquet", "one file"):
        source = data / "train-0.parquet" if kind == "one file" else data
    elif kind == "images in a folder":
        source = photos
    elif kind == "tar files":
        source.mkdir()
        for name, part in (("a", files[:12]), ("b", files[12:])):
            with tarfile.open(source / f"{name}.tar", "w") as tar:
                for file in part:
                    tar.add(file, file.name)
    else:
        rows = {"image": [str(file) for file in files]}
        saved = datasets.Dataset.from_dict(rows, features=datasets.Features(image=datasets.Image()))
        if kind == "saved to disk":
            saved = datasets.DatasetDict(train=datasets.load_dataset(str(data), split="train"))
        saved.save_to_disk(source)
    inputs, contents = DatasetInputs(str(source)), [file.read_bytes() for file in files]
    contents = contents[: 12 if kind == "one file" else None]
    assert len(inputs) == len(contents)
    # On and on; ahead in the same shard and in another; back; and as another process is given it.
    for start, stop in [(0, 4), (4, 8), (9, 11), (11, len(inputs)), (2, 3), (0, len(inputs))]:
        items = [item.source for item in inputs.read(start, stop)]
        assert [i if isinstance(i, bytes) else i.read_bytes() for i in items] == contents[start:stop]
        inputs = pickle.loads(pickle.dumps(inputs)) if start == 9 else inputs


def test_a_block_reads_only_the_file_it_lies_in(data, tmp_path):
    inputs = DatasetInputs(shutil.copytree(data, tmp_path / "data").as_posix())
    (tmp_path / "data/train-0.parquet").unlink()
    assert [item.name for item in inputs.read(16, 19)] == ["16.png", "17.png", "18.png"]


def test_a_dataset_without_rows_gives_a_table_without_rows(data, model_dir, tmp_path, target):
    pq.write_table(pq.read_table(data / "train-0.parquet").slice(0, 0), tmp_path / "empty.parquet")
    assert run("--dataset", tmp_path / "empty.parquet", "--model", model_dir, "--parquet", target) == 0
    assert pq.read_metadata(target).num_rows == 0


def test_inputs_with_fewer_images_than_counted_are_an_error(pipe, photos, tmp_path):
    with pytest.raises(ValueError, match="1 images where 3 were counted"):
        list(inspect_blocks(pipe, FileInputs([photos / "00.png"]), Run(tmp_path, 3, 2, 4), [0]))
    assert not list(tmp_path.iterdir())


def test_a_run_is_not_continued_with_anything_else(photos, model_dir, tmp_path, target, capsys):
    few = [photos / f"{i:02d}.png" for i in range(4)]
    assert run(*few, "--model", model_dir, "--parquet", target, "--threshold", 0.25) == 0
    before = written(target)
    other = DiffusionADPipeline.from_pretrained(model_dir)
    other.segmenter.state_dict()[next(iter(other.segmenter.state_dict()))].add_(1)
    other.save_pretrained(tmp_path / "other")
    for images, model, threshold, batch, then, now in [
        (few, model_dir, 0.5, 2, "threshold 0.25 there", "0.5 now"),
        (few[:3], model_dir, 0.25, 2, "inputs 4 files", "3 files"),
        (few, model_dir, 0.25, 4, "batch size 2 there", "4 now"),
        (few, tmp_path / "other", 0.25, 2, "model ", " now"),
    ]:
        capsys.readouterr()
        arguments = ("--parquet", target, "--threshold", threshold, "--batch-size", batch)
        assert run(*images, "--model", model, *arguments) == 2
        error = capsys.readouterr().err
        assert then in error and now in error and error.count("\n") == 1, error
        assert written(target) == before
    record = tmp_path / "results.parquet.blocks/run.json"
    for spoil, reason in ((lambda: record.write_text("{"), "damaged"), (record.unlink, "no run.json")):
        spoil()
        assert run(*few, "--model", model_dir, "--parquet", target) == 2
        assert reason in capsys.readouterr().err


OTHERWISE = {
    "unet": lambda pipe: next(pipe.unet.parameters()).data.add_(1),
    "seed": lambda pipe: pipe.register_to_config(seed=pipe.config.seed + 1),
    "top_k": lambda pipe: pipe.register_to_config(top_k=pipe.config.top_k + 1),
    "scheduler": lambda pipe: pipe.scheduler.register_to_config(guidance_weight=0.5),
}


@pytest.mark.parametrize("what", OTHERWISE)
def test_whatever_changes_the_results_makes_it_another_model(what):
    pipe = make_pipeline()
    before = describe_model(pipe)
    assert describe_model(make_pipeline()) == before
    OTHERWISE[what](pipe)
    assert describe_model(pipe) != before


@pytest.fixture
def two(photos, model_dir, target):
    return photos / "00.png", photos / "01.png", "--model", model_dir, "--parquet", target


def test_a_damaged_block_is_named(two, target, capsys):
    run(*two)
    block = target.with_name("results.parquet.blocks") / BLOCKS[0]
    content = block.read_bytes()
    for damaged in (content[:-100], b""):
        block.write_bytes(damaged)
        assert run(*two) == 2
        assert f"{block}: damaged" in capsys.readouterr().err
    block.unlink()
    assert run(*two) == 0 and block.read_bytes() == content


@pytest.mark.parametrize("full", ["a block", "the table"])
def test_a_full_disk_costs_nothing_that_is_done(full, two, target, monkeypatch, capsys):
    if full == "the table":
        run(*two)
        target.unlink()
    kept = written(target)
    with monkeypatch.context() as patch:
        patch.setattr(pq, "write_table", Mock(side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
        assert run(*two) == 2
    error = capsys.readouterr().err
    file = target if full == "the table" else target.with_name("results.parquet.blocks") / BLOCKS[0]
    assert f"{file}: cannot be written" in error and "No space left" in error and "run the same again" in error
    assert written(target) == kept and not target.exists() and not list(file.parent.glob(".*.partial"))
    assert run(*two) == 0
    assert written(target).items() >= kept.items() and pq.read_metadata(target).num_rows == 2


def test_a_run_that_is_under_way_is_left_alone(two, tmp_path, capsys):
    (tmp_path / "results.parquet.blocks").mkdir()
    with FileLock(tmp_path / "results.parquet.blocks/.lock"):
        assert run(*two) == 2
    assert "a run is under way" in capsys.readouterr().err


REFUSED = {
    "no input": ([], "give either INPUTs, --file-list or --dataset"),
    "two inputs": (["{photos}", "--dataset", "org/x"], "give either INPUTs, --file-list or --dataset"),
    "an input that is not there": (["{photos}", "nowhere.png"], "nowhere.png: no such file"),
    "a list that is not there": (["--file-list", "nowhere.txt"], "nowhere.txt"),
    "a list that is none": (["--file-list", "{photos}/00.png"], "00.png: not a text file"),
    "an empty list": (["--file-list", "empty.txt"], "empty.txt: names no file"),
    "no such dataset": (["--dataset", "./nowhere"], "./nowhere: no such dataset"),
    "no such split": (["--dataset", "{data}", "--split", "test"], "there is no test; {data} has the splits train"),
    "no such column": (["--dataset", "{data}", "--image-column", "x"], "{data} has the image columns image"),
    "a column of numbers": (["--dataset", "{data}", "--image-column", "number"], "number: holds no images"),
    "pictures in the dataset": (["--dataset", "{data}", "--output-dir", "{data}/x"], "{data}/x: lies in the dataset"),
    "a table in the dataset": (["--dataset", "{data}", "--parquet", "{data}/r.parquet"], "--parquet {data}: lies in"),
    "JSON too": (["{photos}", "--json", "r.json"], "--json, --csv and --report hold all results in memory"),
    "a GPU that is not there": (["{photos}", "--device", "cuda:7"], "device cuda:7"),
    "one GPU for all of Ray": (["{photos}", "--device", "cuda:7", "--engine", "ray"], "device cuda:7"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_in_one_line(case, photos, data, model_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n")
    arguments, reason = REFUSED[case]
    arguments = [argument.format(photos=photos, data=data) for argument in arguments]
    assert run("--model", model_dir, "--parquet", "r.parquet", *arguments) == 2
    error = capsys.readouterr().err
    assert reason.format(data=data) in error and error.count("\n") == 1
    assert not list(tmp_path.rglob("block-*"))


@pytest.mark.parametrize(
    "processes, arguments, reason",
    [
        ("1", ["--dataset", "d"], "--dataset: give --parquet FILE"),
        ("2", ["{photos}"], "only with --parquet FILE"),
        ("2", ["{photos}", "--parquet", "r", "--engine", "ray"], "leave out `accelerate launch`"),
    ],
)
def test_datasets_and_several_processes_need_parquet(processes, arguments, reason, photos, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", processes)
    assert run(*(argument.format(photos=photos) for argument in arguments), "--model", "m") == 2
    assert reason in capsys.readouterr().err
