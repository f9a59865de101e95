"""Inspection of many images by several processes: killed, continued, and equal to what one process finds."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

pq = pytest.importorskip("pyarrow.parquet", reason="results in Parquet need pip install -e .[train]")
datasets = pytest.importorskip("datasets")

from accelerate.state import AcceleratorState  # noqa: E402

from diffusionad_hf import DiffusionADPipeline  # noqa: E402
from diffusionad_hf.cli.main import main  # noqa: E402
from diffusionad_hf.inspection import sharded as sharded_inspection  # noqa: E402
from diffusionad_hf.inspection.inputs import DatasetInputs  # noqa: E402
from diffusionad_hf.inspection.inspection import Item, _read_ahead, inspect_files  # noqa: E402
from diffusionad_hf.inspection.sharded import (  # noqa: E402
    Run,
    Shard,
    _write_shard,
    describe_run,
    inspect_share,
    merge_shards,
    plan_share,
)
from tests.conftest import make_pipeline  # noqa: E402

BATCH = 2
# What `accelerate launch ... -m diffusionad_hf inspect` runs.
TWO_PROCESSES = [
    *(sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes", "2"),
    *("--main_process_port", "0", "-m", "diffusionad_hf", "inspect"),
]


@pytest.fixture(autouse=True)
def alone():
    """Accelerate remembers for all of a process how it was started."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Nineteen images of several sizes, one of which is damaged; do not change it."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(19):
        blocks = rng.integers(0, 256, (4 + i % 3, 5, 3), dtype=np.uint8)
        Image.fromarray(np.kron(blocks, np.ones((9, 9, 1), np.uint8))).save(folder / f"{i:02d}.png")
    (folder / "13.png").write_bytes((folder / "12.png").read_bytes()[:200])
    return folder


@pytest.fixture(scope="module")
def data(photos, tmp_path_factory):
    """The same as a data set of two Parquet files with 12 and 7 rows, the images in them; do not change it."""
    folder = tmp_path_factory.mktemp("data")
    files = sorted(photos.iterdir())
    features = datasets.Features(image=datasets.Image(), number=datasets.Value("int64"))
    for name, part in (("train-0", files[:12]), ("train-1", files[12:])):
        rows = {"image": [{"path": f.name, "bytes": f.read_bytes()} for f in part], "number": list(range(len(part)))}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{name}.parquet")
    return folder


def run(*arguments):
    return main(["inspect", *(str(a) for a in arguments), "--batch-size", str(BATCH)])


@pytest.fixture(scope="module")
def whole(photos, model_dir, tmp_path_factory):
    """The result of one process that nobody interrupts."""
    target = tmp_path_factory.mktemp("whole") / "results.parquet"
    assert run(photos, "--model", model_dir, "--parquet", target) == 0
    return pq.read_table(target)


def shards(folder):
    """When each shard was written, and what is in it."""
    return {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in folder.glob("part-*.parquet")}


def drop_some(folder):
    """What a kill leaves: the first shard and one from the middle, and half of another under way."""
    files = sorted(folder.glob("part-*.parquet"))
    for file in (*files[1:2], *files[3:]):
        file.unlink()
    (folder / f".{files[1].name}.partial").write_bytes(b"PAR1 and no more")
    return shards(folder)


# ---- what is written ------------------------------------------------------------------------------------------------


def test_rows_are_what_the_pipeline_finds_in_order(whole, photos, model_dir):
    pipe = DiffusionADPipeline.from_pretrained(model_dir)
    pipe.set_progress_bar_config(disable=True)
    files = sorted(photos.iterdir())
    rows = whole.to_pylist()
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


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="tells the processes apart by /proc")
def test_two_processes_one_of_them_killed_and_continued_by_one(whole, photos, model_dir, tmp_path, capfd):
    target, folder = tmp_path / "results.parquet", tmp_path / "results.parquet.shards"
    arguments = f"{photos} --model {model_dir} --parquet {target} --batch-size {BATCH}"
    with subprocess.Popen([*TWO_PROCESSES, *arguments.split()]) as launched:
        while len(shards(folder)) < 2:
            assert launched.poll() is None
            time.sleep(0.02)
        second = next(pid for pid in children(launched.pid) if b"\0RANK=1\0" in environment(pid))
        os.kill(second, signal.SIGKILL)
        assert launched.wait() != 0
    kept = shards(folder)
    assert not target.exists() and 2 <= len(kept) < 9

    capfd.readouterr()
    assert run(photos, "--model", model_dir, "--parquet", target) == 0
    rows = sum(pq.read_metadata(file).num_rows for file in kept)
    assert f"goes on after {rows} images that are done" in capfd.readouterr().err
    assert shards(folder).items() >= kept.items(), "a row was inspected again"
    assert pq.read_table(target).equals(whole)


def children(pid):
    return [int(child) for child in open(f"/proc/{pid}/task/{pid}/children").read().split()]


def environment(pid):
    return open(f"/proc/{pid}/environ", "rb").read()


def test_what_a_kill_leaves_is_completed_and_what_is_complete_is_not_done_again(
    whole, photos, model_dir, tmp_path, monkeypatch
):
    target, folder = tmp_path / "results.parquet", tmp_path / "results.parquet.shards"
    run(photos, "--model", model_dir, "--parquet", target)
    kept = drop_some(folder)
    assert run(photos, "--model", model_dir, "--parquet", target) == 0
    assert shards(folder).items() >= kept.items() and pq.read_table(target).equals(whole)
    assert not list(tmp_path.rglob("*.partial"))

    before = shards(folder)
    target.unlink()
    monkeypatch.setattr(DiffusionADPipeline, "_inspect", None)  # no image can be inspected any more
    assert run(photos, "--model", model_dir, "--parquet", target) == 0
    assert shards(folder) == before and pq.read_table(target).equals(whole)


def test_an_error_on_the_way_keeps_what_was_done(whole, photos, model_dir, tmp_path, capsys):
    target, out = tmp_path / "results.parquet", tmp_path / "out"
    (out / "05_mask.png").mkdir(parents=True)  # where a picture has to be
    assert run(photos, "--model", model_dir, "--parquet", target, "--output-dir", out) == 2
    assert "05_mask.png" in capsys.readouterr().err
    kept = shards(tmp_path / "results.parquet.shards")
    assert sum(pq.read_metadata(file).num_rows for file in kept) == 4 and not target.exists()
    (out / "05_mask.png").rmdir()
    assert run(photos, "--model", model_dir, "--parquet", target, "--output-dir", out) == 0
    assert shards(tmp_path / "results.parquet.shards").items() >= kept.items() and pq.read_table(target).equals(whole)


def test_a_process_that_is_told_to_stop_writes_what_it_has(whole, photos, model_dir, tmp_path, monkeypatch, capsys):
    target, inspect, calls = tmp_path / "results.parquet", DiffusionADPipeline._inspect, []

    def terminated(pipe, *arguments):
        calls.append(None)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return inspect(pipe, *arguments)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(DiffusionADPipeline, "_inspect", terminated)
        assert run(photos, "--model", model_dir, "--parquet", target) == 130
    assert signal.getsignal(signal.SIGTERM) == before and "interrupted" in capsys.readouterr().err
    # Three batches were done, of which the first two made a shard already.
    kept = shards(tmp_path / "results.parquet.shards")
    assert sorted(file.name for file in kept) == [Shard(0, 0, 4, False).file_name, Shard(0, 4, 6, False).file_name]
    assert run(photos, "--model", model_dir, "--parquet", target) == 0
    assert shards(tmp_path / "results.parquet.shards").items() >= kept.items() and pq.read_table(target).equals(whole)


def test_a_slow_model_has_its_rows_written_after_a_while(whole, photos, model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(sharded_inspection, "_SECONDS_PER_SHARD", 0)
    files = [photos / f"{i:02d}.png" for i in range(6)]
    assert run(*files, "--model", model_dir, "--parquet", tmp_path / "r.parquet") == 0
    names = sorted(file.name for file in (tmp_path / "r.parquet.shards").glob("part-*"))
    assert names == [Shard(0, i, i + 2, i == 4).file_name for i in (0, 2, 4)]
    assert pq.read_table(tmp_path / "r.parquet").equals(whole.slice(0, 6))


# ---- who does what --------------------------------------------------------------------------------------------------


class Rows:
    """Inputs with parts of these lengths."""

    num_rows = None

    def __init__(self, *lengths):
        self.lengths, self.num_parts, self.read = lengths, len(lengths), []

    def rows(self, part):
        self.read.append(part)
        return (Item(f"{part}/{i}", b"") for i in range(self.lengths[part]))


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
@pytest.mark.parametrize("lengths", [(37,), (10, 0, 7), (4, 4), (1, 30), (0,)])
@pytest.mark.parametrize("done", ["nothing", "the beginning", "holes"])
def test_every_row_is_dealt_to_one_process_and_none_that_is_done(tmp_path, processes, lengths, done):
    finished = []
    for part, length in enumerate(lengths):
        cuts = [(0, 6)] if done == "the beginning" else [(3, 6), (12, 21), (36, 39)] if done == "holes" else []
        finished += [Shard(part, a, min(b, length), b >= length) for a, b in cuts if a < length]
    run = Run(tmp_path, 3, 6, tuple(finished))
    dealt = [list(plan_share(run, Rows(*lengths), process, processes)) for process in range(processes)]
    names = [item.name for share in dealt for batch in share for item in batch]
    wanted = {
        f"{part}/{row}"
        for part, length in enumerate(lengths)
        for row in range(length)
        if not any(s.part == part and s.start <= row < s.stop for s in finished)
    }
    assert len(names) == len(wanted) and set(names) == wanted
    for batch in (batch for share in dealt for batch in share):
        assert batch.shard.start % 3 == 0 and batch.shard.stop - batch.shard.start == len(batch) <= 3
        assert [item.name for item in batch] == [
            f"{batch.shard.part}/{batch.shard.start + i}" for i in range(len(batch))
        ]
    ends = {b.shard.part for share in dealt for b in share if b.shard.end} | {s.part for s in finished if s.end}
    assert ends == set(range(len(lengths)))


def test_processes_share_the_rows_evenly_and_read_no_part_twice(tmp_path):
    run = Run(tmp_path, 2, 4)
    one_part = [sum(map(len, plan_share(run, Rows(96), p, 4))) for p in range(4)]
    assert one_part == [24] * 4
    parts = [Rows(*[10] * 8) for _ in range(4)]
    assert [sum(map(len, plan_share(run, inputs, p, 4))) for p, inputs in enumerate(parts)] == [20] * 4
    assert sorted(part for inputs in parts for part in inputs.read) == list(range(8))


def test_rows_before_and_after_finished_ones_of_a_shard_are_merged_with_them(tmp_path, model_dir):
    pipe = DiffusionADPipeline.from_pretrained(model_dir)
    # As a process leaves it that was stopped within a shard of eight rows, of which others did the beginning.
    done = Shard(0, 2, 4, False)
    _write_shard(tmp_path, done, [{"file": "0/2"}, {"file": "0/3"}])
    alone = SimpleNamespace(process_index=0, num_processes=1)
    assert sum(inspect_share(pipe, Rows(10), Run(tmp_path, 2, 8, (done,)), alone)) == 8
    assert merge_shards(tmp_path, tmp_path / "r.parquet", 1).images == 10
    assert pq.read_table(tmp_path / "r.parquet")["file"].to_pylist() == [f"0/{i}" for i in range(10)]


def test_a_part_of_which_there_is_no_shard_is_named(tmp_path):
    _write_shard(tmp_path, Shard(0, 0, 1, True), [{"file": "a"}])
    with pytest.raises(ValueError, match="the shards of part 1 do not follow each other to its end"):
        merge_shards(tmp_path, tmp_path / "r.parquet", 2)
    assert not (tmp_path / "r.parquet").exists()


def test_images_are_read_while_the_model_works_and_only_so_many():
    made, read = [], threading.Event()

    def batches():
        for i in range(20):
            made.append(i)
            if i == 2:
                read.set()
            yield [Item("x", b"")]

    reading = _read_ahead(batches())
    next(reading)
    # The consumer holds the first batch; those that follow are read meanwhile, and no more than the queue takes.
    assert read.wait(timeout=30)
    time.sleep(0.3)
    assert len(made) <= 5
    assert len(list(reading)) == 19


def test_a_source_that_fails_stops_the_run_and_is_no_row():
    def batches():
        yield [Item("a", b"")]
        raise OSError("the connection broke")

    reading = _read_ahead(batches())
    next(reading)
    with pytest.raises(OSError, match="the connection broke"):
        next(reading)


# ---- inputs ---------------------------------------------------------------------------------------------------------


def test_a_file_list(photos, whole, model_dir, tmp_path, capsys):
    files = [photos / "03.png", photos / "missing.png", photos / "01.png"]
    (tmp_path / "list.txt").write_text("\n".join(map(str, [*files, files[0], ""])))
    arguments = ("--file-list", tmp_path / "list.txt", "--model", model_dir)
    assert run(*arguments, "--parquet", tmp_path / "r.parquet") == 0
    rows = pq.read_table(tmp_path / "r.parquet").to_pylist()
    assert [row["file"] for row in rows] == [str(file) for file in files]
    assert "missing.png: no such" in rows[1]["error"] and "missing.png: no such" in capsys.readouterr().err
    assert rows[0]["score"] == pytest.approx(whole["score"][3].as_py(), abs=1e-6)
    # And without Parquet.
    assert run(*arguments, "--json", tmp_path / "r.json") == 2
    report = json.loads((tmp_path / "r.json").read_text())
    assert [image["file"] for image in report["images"]] == [str(files[0]), str(files[2])]


@pytest.mark.parametrize("kind", ["images in a folder", "saved to disk", "one file", "paths"])
def test_local_data_sets_of_every_kind(kind, data, photos, tmp_path):
    source, saved = tmp_path / "data", datasets.load_dataset(str(data), split="train", cache_dir=str(tmp_path / "c"))
    if kind == "images in a folder":
        shutil.copytree(photos, source)
    elif kind == "saved to disk":
        datasets.DatasetDict(train=saved).save_to_disk(source)
    elif kind == "one file":
        source = data / "train-0.parquet"
    else:
        rows = {"image": [str(file) for file in sorted(photos.iterdir())]}
        features = datasets.Features(image=datasets.Image())
        datasets.Dataset.from_dict(rows, features=features).save_to_disk(source)
    inputs = DatasetInputs(str(source))
    items = [item for part in range(inputs.num_parts) for item in inputs.rows(part)]
    contents = [item.source if isinstance(item.source, bytes) else item.source.read_bytes() for item in items]
    files = sorted(photos.iterdir())[: 12 if kind == "one file" else None]
    assert contents == [file.read_bytes() for file in files]


def test_two_processes_stream_a_data_set_from_the_hub_at_one_commit(hub, whole, data, model_dir, tmp_path):
    files = {f"data/{file.name}": file.read_bytes() for file in data.iterdir()}
    hub.add_repo("org/photos", files, repo_type="dataset")
    target, out = tmp_path / "results.parquet", tmp_path / "out"
    arguments = f"--dataset org/photos --model {model_dir} --parquet {target} --batch-size {BATCH} --output-dir {out}"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    running = []
    for rank in ("0", "1"):
        # As launchers start them, and what a launcher on each of two machines would.
        environment = {**hub.environment(tmp_path / "home"), **address, "RANK": rank, "LOCAL_RANK": rank}
        command = [sys.executable, "-m", "diffusionad_hf", "inspect", *arguments.split()]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        running.append(subprocess.Popen(command, env={**environment, "WORLD_SIZE": "2"}, **pipes))
    said = [process.communicate(timeout=400) for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    # The main process speaks, the other is silent.
    assert "19 images" in said[0][0] and "inspecting (process 1 of 2)" in said[0][1]
    assert said[1][0] == "" and "inspecting" not in said[1][1]
    found = pq.read_table(target)
    columns = ["row", "score", "threshold", "verdict", "p_value", "regions"]
    assert found.select(columns).equals(whole.select(columns))
    assert found["file"].to_pylist() == [f"{i:02d}.png" for i in range(19)]
    assert len(list(out.rglob("*_overlay.png"))) == 18
    # Each process read one of the two files, whole.
    assert sorted(file.name for file in (tmp_path / "results.parquet.shards").glob("part-*")) == [
        "part-00000-rows-000000000-000000012-end.parquet",
        "part-00001-rows-000000000-000000007-end.parquet",
    ]
    record = json.loads((tmp_path / "results.parquet.shards/run.json").read_text())
    assert record["inputs"].endswith(hub.repo("org/photos", "dataset").branches["main"].oid)


# ---- refused --------------------------------------------------------------------------------------------------------


def test_a_run_is_not_continued_with_anything_else(photos, model_dir, tmp_path, capsys):
    target = tmp_path / "r.parquet"
    few = [photos / f"{i:02d}.png" for i in range(4)]
    assert run(*few, "--model", model_dir, "--parquet", target, "--threshold", 0.25) == 0
    before = shards(tmp_path / "r.parquet.shards")
    other = DiffusionADPipeline.from_pretrained(model_dir)
    other.segmenter.state_dict()[next(iter(other.segmenter.state_dict()))].add_(1)
    other.save_pretrained(tmp_path / "other")
    again = (*few, "--model", model_dir, "--parquet", target)
    for arguments, then, now in [
        ((*again, "--threshold", 0.5), "threshold 0.25 there", "0.5 now"),
        ((*few[:3], *again[4:], "--threshold", 0.25), "inputs 4 files", "3 files"),
        ((*again, "--threshold", 0.25, "--batch-size", 4), "batch size 2 there", "4 now"),
        (
            (*few, "--model", tmp_path / "other", "--parquet", target, "--threshold", 0.25),
            f"of {model_dir} there",
            f"of {tmp_path / 'other'} now",
        ),
    ]:
        capsys.readouterr()
        assert main(["inspect", "--batch-size", str(BATCH), *map(str, arguments)]) == 2
        error = capsys.readouterr().err
        assert then in error and now in error and "delete the folder" in error and error.count("\n") == 1, error
        assert shards(tmp_path / "r.parquet.shards") == before


OTHERWISE = {
    "unet": lambda pipe: next(pipe.unet.parameters()).data.add_(1),
    "seed": lambda pipe: pipe.register_to_config(seed=pipe.config.seed + 1),
    "top_k": lambda pipe: pipe.register_to_config(top_k=pipe.config.top_k + 1),
    "scheduler": lambda pipe: pipe.scheduler.register_to_config(guidance_weight=0.5),
}


@pytest.mark.parametrize("what", OTHERWISE)
def test_whatever_changes_the_results_makes_it_another_run(what):
    pipe, inputs = make_pipeline(), SimpleNamespace(description="4 files")
    before = describe_run(pipe, inputs, "model", BATCH)
    assert describe_run(make_pipeline(), inputs, "model", BATCH) == before
    OTHERWISE[what](pipe)
    assert describe_run(pipe, inputs, "model", BATCH) != before


def test_a_damaged_shard_is_named(photos, model_dir, tmp_path, capsys):
    target = tmp_path / "r.parquet"
    arguments = (photos / "00.png", photos / "01.png", "--model", model_dir, "--parquet", target)
    run(*arguments)
    (shard,) = (tmp_path / "r.parquet.shards").glob("part-*")
    content = shard.read_bytes()
    shard.write_bytes(content[:-100])
    assert run(*arguments) == 2
    assert f"{shard}: damaged" in capsys.readouterr().err
    shard.unlink()
    assert run(*arguments) == 0 and shard.read_bytes() == content


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
def test_a_full_disk_at_the_end_costs_nothing_but_the_merge(photos, model_dir, tmp_path, capsys):
    target = tmp_path / "r.parquet"
    arguments = (photos / "00.png", photos / "01.png", "--model", model_dir, "--parquet", target)
    (tmp_path / ".r.parquet.partial").symlink_to("/dev/full")
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert f"{target}: cannot be written" in error and "No space left" in error and "run the same again" in error
    kept = shards(tmp_path / "r.parquet.shards")
    assert kept and not target.exists()
    assert run(*arguments) == 0
    assert shards(tmp_path / "r.parquet.shards") == kept and pq.read_metadata(target).num_rows == 2


def test_a_run_that_is_under_way_is_left_alone(photos, model_dir, tmp_path, capsys):
    from filelock import FileLock

    (tmp_path / "r.parquet.shards").mkdir()
    with FileLock(tmp_path / "r.parquet.shards/.lock"):
        assert run(photos, "--model", model_dir, "--parquet", tmp_path / "r.parquet") == 2
    assert "a run is under way" in capsys.readouterr().err


REFUSED = {
    "no input": ([], "give either INPUTs, --file-list or --dataset"),
    "two inputs": (["{photos}", "--dataset", "org/x"], "give either INPUTs, --file-list or --dataset"),
    "an input that is not there": (["{photos}", "nowhere.png"], "nowhere.png: no such file"),
    "a list that is not there": (["--file-list", "nowhere.txt"], "nowhere.txt: no such file"),
    "a list that is none": (["--file-list", "{photos}/00.png"], "00.png: not UTF-8 text"),
    "an empty list": (["--file-list", "empty.txt"], "empty.txt: names no file"),
    "no such data set": (["--dataset", "./nowhere"], "./nowhere: no such data set"),
    "no such split": (["--dataset", "{data}", "--split", "test"], "--split: there is no test; {data} has the splits"),
    "no such column": (["--dataset", "{data}", "--image-column", "x"], "{data} has the image columns image"),
    "a column of numbers": (["--dataset", "{data}", "--image-column", "number"], "number: holds no images"),
    "a folder for the result": (["{photos}", "--parquet", "."], "--parquet .: is a folder"),
    "JSON too": (["{photos}", "--json", "r.json"], "--json and --csv hold all results in memory"),
    "a GPU that is not there": (["{photos}", "--device", "cuda:7"], "--device cuda:7"),
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
    assert not list(tmp_path.rglob("part-*"))


def test_data_sets_and_several_processes_need_parquet(photos, data, model_dir, monkeypatch, capsys):
    assert run("--dataset", data, "--model", model_dir) == 2
    assert "--dataset: give --parquet FILE" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(photos, "--model", model_dir) == 2
    assert "only with --parquet FILE" in capsys.readouterr().err
