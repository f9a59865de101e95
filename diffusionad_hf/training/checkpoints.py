"""Checkpoints: written whole or not at all, a limited number of them, resumed only into the training they came
from."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ..files import shorten
from .dataset import NormalImages, TableImages
from .optimization import STEADY_SCHEDULES
from .plan import Plan
from .processes import together

logger = logging.getLogger("training")

_STATE_FILE = "training_state.json"
# What may differ between a run and its continuation, as it does not change the weights. So may the number of steps if
# the learning rates do not depend on it.
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
    """Writes `checkpoint-<step>`; the former ones stay untouched until it is whole, and the last `limit` are kept."""
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
        # Torch, safetensors and the system each raise their own error if the disk is full.
        except Exception as error:
            shutil.rmtree(partial, ignore_errors=True)
            former = _checkpoints(output_dir)
            kept = f"{former[-1]} is whole; resume from it" if former else "there is no earlier one"
            raise OSError(f"{final}: the checkpoint could not be written ({error}); {kept}.") from error

    def put_in_place() -> None:
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in _checkpoints(output_dir)[:-limit]:
            # Renamed first, so that a half-deleted folder is not taken for a checkpoint.
            old.rename(_hidden(old))
            shutil.rmtree(_hidden(old))

    together(clear, main_only=True)
    together(write)
    together(put_in_place, main_only=True)
    return final


def find_checkpoint(output_dir: Path, name: str) -> Path | None:
    """The checkpoint named by `resume_from_checkpoint`; `None` for "latest" if there is none yet."""
    if name == "latest":
        return next(reversed(_checkpoints(output_dir)), None)
    for folder in (Path(name), output_dir / name):
        if (folder / _STATE_FILE).is_file():
            return folder
    there = ", ".join(c.name for c in _checkpoints(output_dir)) or "none"
    raise FileNotFoundError(f"`resume_from_checkpoint` {name}: no checkpoint there; {output_dir} holds {there}.")


def former_plan(folder: Path) -> tuple[Plan, int]:
    """How the training that a checkpoint is of computed its steps, and how many it had done."""
    state = json.loads((folder / _STATE_FILE).read_text(encoding="utf-8"))
    if "plan" in state:
        return Plan(**state["plan"]), state["step"]
    names = ("mixed_precision", "train_batch_size", "gradient_accumulation_steps")
    return Plan(**{name: state["arguments"][name] for name in names}), state["step"]


def load_checkpoint(accelerator: Accelerator, folder: Path, arguments: dict[str, Any]) -> dict[str, Any]:
    """Restores the accelerator's objects and returns the state saved with them."""
    state = json.loads((folder / _STATE_FILE).read_text(encoding="utf-8"))
    check_same_training(state["arguments"], arguments, f"`resume_from_checkpoint` {folder}")
    accelerator.load_state(str(folder))
    return state


def check_same_training(then: dict[str, Any], now: dict[str, Any], where: str) -> None:
    """Raises `ValueError` naming the first argument that differs and changes the weights."""
    # Trainings older than these predicted the noise, and saw zeros beyond the border.
    then = {"prediction_type": "epsilon", "padding_mode": "zeros"} | then
    if "resolution" in then:  # of former versions, which squashed every photo
        then["image_size"] = f"{then['resolution']}x{then['resolution']}"
    free = _FREE_ARGUMENTS | ({"max_train_steps"} if now.get("lr_schedule") in STEADY_SCHEDULES else set())
    for name, value in now.items():
        if name in then and name not in free and then[name] != value:
            raise ValueError(
                f"{where}: that training had `{name}` {then[name]}, this one has {value}; give the same, or start "
                "afresh in another `output_dir`."
            )


def describe_data(held_out: NormalImages, textures: str | None, given_masks: bool) -> dict[str, Any]:
    """What a training learns from: name and digest of every image, in order; which are held out; digests of the
    textures and of masks that were given."""
    subset: Any = held_out.images
    images: TableImages = subset.dataset
    masks: Any = held_out.foregrounds
    names = ("/".join(Path(str(name)).parts[-2:]) for name in images.names)
    return {
        "images": [[name, digest] for name, digest in zip(names, images.digests(), strict=True)],
        "held_out": list(subset.indices),
        "textures": textures,
        "foregrounds": masks.dataset.digest() if given_masks else None,
    }


def check_same_data(folder: Path, now: dict[str, Any]) -> None:
    """
    Raises `ValueError` if the training that a checkpoint is of had other data: images that it was trained on could be
    among those that it would be calibrated on, whose scores promise nothing.
    """
    then = json.loads((folder / _STATE_FILE).read_text(encoding="utf-8")).get("data")
    if then is None:
        logger.warning(f"{folder}: an earlier version did not note its images; go on with the same ones only.")
        return
    before, after = ({digest: name for name, digest in data["images"]} for data in (then, now))
    new, missing = ([named[d] for d in named if d not in other] for named, other in ((after, before), (before, after)))
    differences = [
        f"{len(names)} {what} ({shorten(names)})" for what, names in (("new", new), ("missing", missing)) if names
    ]
    if differences:
        raise ValueError(
            f"{folder}: that training had other images: {' and '.join(differences)}; give the same, or start afresh "
            "in another `output_dir`."
        )
    if [digest for _, digest in then["images"]] != [digest for _, digest in now["images"]]:
        raise ValueError(f"{folder}: the images have other names, and so another order; give those of that training.")
    if len(then["held_out"]) != len(now["held_out"]):  # others of them come from another seed, which is refused later
        raise ValueError(
            f"{folder}: that training held out {len(then['held_out'])} images, this one would hold out "
            f"{len(now['held_out'])}; give its `false_alarm_rate`."
        )
    for name in ("textures", "foregrounds"):
        if then[name] != now[name]:
            raise ValueError(f"{folder}: that training had other {name}; give the same, or start afresh.")


def _hidden(checkpoint: Path) -> Path:
    return checkpoint.with_name(f".{checkpoint.name}.partial")


def _checkpoints(output_dir: Path) -> list[Path]:
    steps = {f: f.name.removeprefix("checkpoint-") for f in output_dir.glob("checkpoint-*")}
    whole = [f for f, step in steps.items() if step.isdigit() and (f / _STATE_FILE).is_file()]
    return sorted(whole, key=lambda f: int(steps[f]))
