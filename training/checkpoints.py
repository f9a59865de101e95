"""Checkpoints: written whole or not at all, a limited number of them, resumed only into the training they came
from."""

import json
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator

__all__ = ["find_checkpoint", "load_checkpoint", "save_checkpoint"]

_STATE_FILE = "training_state.json"
# What may differ between a run and its continuation: where it writes, how long it goes on, how it reports.
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
    partial = output_dir / f".checkpoint-{state['step']}.partial"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
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
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in _checkpoints(output_dir)[:-limit]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return final


def find_checkpoint(output_dir: Path, name: str) -> Path | None:
    """
    The checkpoint that `--resume_from_checkpoint` names.

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
    raise FileNotFoundError(f"--resume_from_checkpoint {name}: no checkpoint there; {output_dir} holds {there}.")


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
    for name, now in arguments.items():
        then = state["arguments"].get(name)
        if name not in _FREE_ARGUMENTS and then != now:
            raise ValueError(
                f"--resume_from_checkpoint {folder}: that training had --{name} {then}, this one has {now}; "
                "give the same, or start afresh in another --output_dir."
            )
    accelerator.load_state(str(folder))
    return state


def _checkpoints(output_dir: Path) -> list[Path]:
    folders = [
        f for f in output_dir.glob("checkpoint-*") if f.name.split("-")[1].isdigit() and (f / _STATE_FILE).is_file()
    ]
    return sorted(folders, key=lambda f: int(f.name.split("-")[1]))
