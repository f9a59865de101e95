"""Trainings that are stopped, killed or out of disk go on as if nothing had happened; several processes as one."""

import csv
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

from diffusionad_hf import DiffusionADPipeline
from diffusionad_hf.training import loop as train

from .runs import WEIGHTS, arguments, losses, run, same, start, weights

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "training/accelerate"


@pytest.fixture
def no_more_disk():
    """A function after which no file of this process grows beyond 100 kB: writes fail half way, as on a full disk."""
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, former[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, former)


def wait_for(condition, process, log):
    while not condition():
        assert process.is_alive(), log.read_text()
        time.sleep(0.005)


def ended(process, log, expected):
    process.join(180)
    assert process.exitcode == expected, log.read_text()


def test_killed_at_any_point_and_resumed_it_ends_with_the_weights_of_one_never_interrupted(data, tmp_path, trained):
    output = tmp_path / "model"
    resume = {"resume_from_checkpoint": "latest"}

    # Before anything was kept: while the first of the best weights take their place.
    ended(*start(data, output, die_at=("os.rename", ".best.partial")), -signal.SIGKILL)
    assert not (output / "best").exists()

    # In the middle of writing the first checkpoint.
    largest = (trained / "checkpoint-4/model.safetensors").stat().st_size + 100_000
    ended(*start(data, output, largest_file=largest, **resume), -signal.SIGXFSZ)
    half = output / ".checkpoint-2.partial/optimizer.bin"
    assert 0 < half.stat().st_size <= largest < (trained / "checkpoint-4/optimizer.bin").stat().st_size

    # When all of it is written and nothing of it is in its place.
    ended(*start(data, output, die_at=("os.rename", ".checkpoint-4.partial"), **resume), -signal.SIGKILL)
    assert [folder.name for folder in output.glob("checkpoint-*")] == ["checkpoint-2"]

    # While the old checkpoint is deleted.
    dying = {"die_at": ("shutil.rmtree", ".checkpoint-2.partial"), "checkpoints_total_limit": 1}
    ended(*start(data, output, **dying, **resume), -signal.SIGKILL)
    assert [folder.name for folder in output.glob("checkpoint-*")] == ["checkpoint-4"]

    # While the outcome is written.
    ended(*start(data, output, die_at=("os.rename", "training_arguments.json"), **resume), -signal.SIGKILL)
    (output / "unet" / WEIGHTS).write_bytes(b"half")

    assert run(data, output, **resume) == 0
    assert same(weights(output), weights(trained))
    for file in ("model_index.json", "training_arguments.json"):
        ours, theirs = (json.loads((folder / file).read_text()) for folder in (output, trained))
        different = {name for name in ours if ours[name] != theirs[name]}
        assert different <= {"report_to", "checkpoints_total_limit"}
    curves = [list(csv.DictReader((folder / "training_curve.csv").open())) for folder in (output, trained)]
    for row in (*curves[0], *curves[1]):
        row.pop("seconds")
    assert curves[0] == curves[1]


def test_the_second_interrupt_stops_at_once():
    with train.Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)


def test_asked_to_stop_it_leaves_a_whole_checkpoint_to_go_on_from(data, tmp_path, trained):
    output = tmp_path / "model"
    process, log = start(data, output, checkpointing_steps=1000)
    wait_for(lambda: "loss=" in log.read_text(), process, log)  # the first step is done
    os.kill(process.pid, signal.SIGTERM)
    ended(process, log, train.INTERRUPTED)
    assert "the same command goes on from there" in log.read_text()
    assert json.loads((output / "progress.json").read_text())["phase"] == "stopped"
    (checkpoint,) = output.glob("checkpoint-*")
    assert checkpoint.name in ("checkpoint-1", "checkpoint-2", "checkpoint-3") and not list(output.glob(".*.partial"))
    assert not (output / "model_index.json").exists()
    assert run(data, output, checkpointing_steps=1000) == 0
    assert same(weights(output), weights(trained))


def test_stopped_by_hand_it_leaves_a_calibrated_model_too_and_goes_on_as_if_it_had_not(data, tmp_path, trained):
    output = tmp_path / "model"
    process, log = start(data, output, validation_steps=4, checkpointing_steps=1000)
    wait_for(lambda: "loss=" in log.read_text(), process, log)
    os.kill(process.pid, signal.SIGINT)
    ended(process, log, train.INTERRUPTED)
    assert DiffusionADPipeline.from_pretrained(output).threshold is not None
    assert not list(output.glob("*so_far*")) and not (output / "training_arguments.json").exists()
    assert run(data, output, validation_steps=4, checkpointing_steps=1000) == 0
    assert losses(output) == losses(trained)


def test_a_full_disk_ends_the_training_in_one_line_and_it_resumes(
    data, tmp_path, trained, no_more_disk, monkeypatch, capsys
):
    save = train.save_checkpoint

    def save_the_second_to_a_full_disk(accelerator, output_dir, state, limit):
        if state["step"] == 4:
            no_more_disk()
        return save(accelerator, output_dir, state, limit)

    monkeypatch.setattr(train, "save_checkpoint", save_the_second_to_a_full_disk)
    assert run(data, tmp_path) == 2
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    error = capsys.readouterr().err.splitlines()[-1]
    assert "checkpoint-4: the checkpoint could not be written" in error and "checkpoint-2 is whole" in error
    monkeypatch.undo()
    assert run(data, tmp_path, resume_from_checkpoint="latest") == 0
    assert same(weights(tmp_path), weights(trained))


def test_two_processes_train_as_one_that_accumulates_does(data, tmp_path, monkeypatch):
    """Whose categories are trained one after another, so that the second shows that the first left nothing behind."""
    both = tmp_path / "both"
    for name in ("one", "two"):
        shutil.copytree(data / "demo-part", both / name)
    shutil.rmtree(both / "one/ground_truth")
    (both / "one/train").rename(both / "one/other")
    (both / "one/train/good").mkdir(parents=True)
    options = {"max_train_steps": 2, "texture_dir": data.parent / "textures", "save_dtype": "float32"}
    together = arguments(both, tmp_path / "together", category="all", **options)
    launch = [str(Path(sys.executable).with_name("accelerate")), "launch", "--config_file", str(CONFIGS / "cpu.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, str(ROOT / "training/train.py"), *together], env=environment, capture_output=True, text=True
    )
    # Each process said by itself what it could not do, and the other category had its turn.
    assert done.returncode != 0 and done.stderr.count("one failed: category 'one'") == 1, done.stderr
    assert "has no normal images" in done.stderr

    # The program above knows nothing of narrower networks.
    monkeypatch.undo()
    assert train.main(arguments(data, tmp_path / "alone", gradient_accumulation_steps=2, **options)) == 0
    folders = tmp_path / "together/two", tmp_path / "alone"
    assert losses(folders[0]) == pytest.approx(losses(folders[1]), rel=1e-3)
    first, second = (
        torch.load(folder / "checkpoint-2/optimizer.bin", weights_only=True)["state"] for folder in folders
    )
    assert len(first) == len(second)
    for number in first:
        # Adam's averages of the gradients: the weights themselves move by the gradients' signs, rounding and all.
        torch.testing.assert_close(first[number]["exp_avg"], second[number]["exp_avg"], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize(
    "name, processes, machines, precision",
    [
        ("one_gpu", 1, 1, "bf16"),
        ("several_gpus", 4, 1, "bf16"),
        ("several_machines", 16, 2, "bf16"),
        ("cpu", 2, 1, "no"),
    ],
)
def test_accelerate_reads_the_configurations(name, processes, machines, precision):
    file = str(CONFIGS / f"{name}.yaml")
    assert load_config_from_file(file).to_dict()["num_processes"] == processes
    parsed = launch_command_parser().parse_args(["--config_file", file, "train.py"])
    args, *_ = _validate_launch_command(parsed)
    assert (args.num_processes, args.num_machines, args.mixed_precision) == (processes, machines, precision)
    assert bool(args.multi_gpu) == (processes > 1)


def test_every_configuration_is_tested():
    assert {path.stem for path in CONFIGS.iterdir()} == {"one_gpu", "several_gpus", "several_machines", "cpu"}
