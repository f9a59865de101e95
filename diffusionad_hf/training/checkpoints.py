"""Checkpoints: written whole or not at all, a limited number of them, resumed only into the training they came
from."""

import json
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from .optimization import STEADY_SCHEDULES
from .processes import together

_STATE_FILE = "training_state.json"
# What may differ between a run and its continuation: where it writes and how it reports. So may the number of steps
# where the learning rates do not depend on it.
_FREE_ARGUMENTS = {
    "output_dir",
    "resume_from_checkpoint",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "report_to",
    "dataloader_num_workers",
    "save_dtype",
    "data_dir",
    "texture_dir",
    "foreground_dir",
    "false_alarm_rate",
    "preset",
    "push_to_hub",
    "hub_model_prefix",
    "hub_private_repo",
    "dataset_name",
}


def save_checkpoint(accelerator: Accelerator, output_dir: Path, state: dict[str, Any], limit: int) -> Path:
    """
    Writes `checkpoint-<step>` into the output folder; the former checkpoints stay untouched until it is whole.

    Args:
        accelerator: Whose prepared and registered objects are saved.
        output_dir: The training's output folder.
        state: JSON values; `step` and `arguments` among them.
        limit: How many checkpoints to keep.

    Raises:
        OSError: If it cannot be written, such as on a full disk; the former checkpoints are whole.
    """
    final = output_dir / f"checkpoint-{state['step']}"
    partial = _hidden(final)

    def clear() -> None:
        for left in output_dir.glob(".checkpoint-*.partial"):
            shutil.rmtree(left, ignore_errors=True)

    def write() -> None:
        try:
            accelerator.save_state(str(partial))
            if accelerator.is_main_process:
                (partial / _STATE_FILE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        # Torch, safetensors and the system each have their own error for a disk that is full.
        except Exception as error:
            shutil.rmtree(partial, ignore_errors=True)
            former = _checkpoints(output_dir)
            kept = f"{former[-1]} is whole; resume from it" if former else "there is no earlier one"
            raise OSError(f"{final}: the checkpoint could not be written ({error}); {kept}.") from error

    def put_in_place() -> None:
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in _checkpoints(output_dir)[:-limit]:
            # Renamed first, so that a half-deleted one is no checkpoint.
            old.rename(_hidden(old))
            shutil.rmtree(_hidden(old))

    together(clear, main_only=True)
    together(write)
    together(put_in_place, main_only=True)
    return final


def find_checkpoint(output_dir: Path, name: str) -> Path | None:
    """
    The checkpoint that `resume_from_checkpoint` names.

    Args:
        output_dir: The training's output folder.
        name: `"latest"`, a folder, or a folder's name inside the output folder.

    Returns:
        Its folder; `None` for `"latest"` where there is none yet.

    Raises:
        FileNotFoundError: If a named checkpoint does not exist or is none.
    """
    if name == "latest":
        return next(reversed(_checkpoints(output_dir)), None)
    for folder in (Path(name), output_dir / name):
        if (folder / _STATE_FILE).is_file():
            return folder
    there = ", ".join(c.name for c in _checkpoints(output_dir)) or "none"
    raise FileNotFoundError(f"`resume_from_checkpoint` {name}: no checkpoint there; {output_dir} holds {there}.")


def load_checkpoint(accelerator: Accelerator, folder: Path, arguments: dict[str, Any]) -> dict[str, Any]:
    """
    Restores the accelerator's objects from a checkpoint.

    Args:
        accelerator: With the objects prepared and registered as when it was saved.
        folder: A folder of [`find_checkpoint`].
        arguments: This training's arguments.

    Returns:
        `dict`: The state that was saved with it.

    Raises:
        ValueError: If it comes from a training with other arguments; names the first and both values.
    """
    state = json.loads((folder / _STATE_FILE).read_text(encoding="utf-8"))
    check_same_training(state["arguments"], arguments, f"`resume_from_checkpoint` {folder}")
    accelerator.load_state(str(folder))
    return state


def check_same_training(then: dict[str, Any], now: dict[str, Any], where: str) -> None:
    """
    Compares the arguments of two trainings, as far as they change the weights.

    Args:
        then: As recorded; options that did not exist at that time are absent.
        now: Of this training.
        where: What the error begins with.

    Raises:
        ValueError: If they differ; names the first argument that does, and both values.
    """
    # Trainings from before there was this option learnt the noise, which their weights do not tell.
    then = {"prediction_type": "epsilon"} | then
    free = _FREE_ARGUMENTS | ({"max_train_steps"} if now.get("lr_schedule") in STEADY_SCHEDULES else set())
    for name, value in now.items():
        if name in then and name not in free and then[name] != value:
            raise ValueError(
                f"{where}: that training had `{name}` {then[name]}, this one has {value}; give the same, or start "
                "afresh in another `output_dir`."
            )


def refuse_former_training(output_dir: Path) -> None:
    """
    Keeps a training from starting over where another one left its work.

    Raises:
        ValueError: If the folder holds checkpoints.
    """
    former = _checkpoints(output_dir)
    if former:
        raise ValueError(
            f"`output_dir` {output_dir}: holds {former[-1].name} of a former training; go on from it with "
            "`resume_from_checkpoint` latest, or give another folder."
        )


def _hidden(checkpoint: Path) -> Path:
    return checkpoint.with_name(f".{checkpoint.name}.partial")


def _checkpoints(output_dir: Path) -> list[Path]:
    folders = [
        f for f in output_dir.glob("checkpoint-*") if f.name.split("-")[1].isdigit() and (f / _STATE_FILE).is_file()
    ]
    return sorted(folders, key=lambda f: int(f.name.split("-")[1]))
