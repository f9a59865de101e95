"""Models of `diffusionad export` behind the pipeline's own call."""

import functools
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from diffusers.utils import logging
from torch import nn

from ..files import one_line, replace_file, require
from ..pipeline_diffusionad import DiffusionADPipeline, DiffusionADPipelineOutput
from ..scheduling_norm_guided import NormGuidedScheduler

logger = logging.get_logger(__name__)

CONFIG_NAME = "exported_model.json"
# Incremented when older versions of this package would misread the folder.
EXPORT_FORMAT = 1
# Files of the graph by format, first the one that the runtime opens.
GRAPH_FILES = {"openvino": ("model.xml", "model.bin"), "onnx": ("model.onnx",)}
# Configuration values of the pipeline that an exported model keeps.
_FORMER_SETTINGS = ("image_size", "top_k", "seed", "calibration_scores", "false_alarm_rate", "threshold")
SETTINGS = (
    *(*_FORMER_SETTINGS, "tile_size", "familiarity"),
    *("calibrated_settings", "training_digests", "has_learnt", "value_range"),
)
# Those of them that are fixed in the graph.
_SIZES = ("image_size", "tile_size")

# Pixels `(B, 3, H, W)` and noise `(2, B, 3, H, W)`, of a tile if there are any, to the graph's outputs by name.
Run = Callable[[torch.Tensor, torch.Tensor], dict[str, torch.Tensor]]


class ExportedDiffusionADPipeline(DiffusionADPipeline):
    """
    A [`DiffusionADPipeline`] whose computation is one graph in another runtime, on the CPU: same call, same output.

    Timesteps, guidance weight and image size are part of the graph and cannot be changed; of the intermediates it
    gives `reconstruction` and `probability`. The runtime uses as many threads as torch has when the model is loaded.
    """

    config_name = CONFIG_NAME
    # Contents of `exported_model.json`; `calibrated_with` says on whose scores the threshold was calibrated.
    record: dict[str, Any]
    folder: Path

    def __call__(self, image: Any, **kwargs: Any) -> DiffusionADPipelineOutput | Any:
        """As [`DiffusionADPipeline.__call__`]; other timesteps or sizes than the export's raise a ValueError."""
        for name in ("small_timestep", "big_timestep", "guidance_weight"):
            fixed = self.scheduler.config[name]
            if kwargs.get(name) not in (None, fixed):
                raise ValueError(
                    f"{name}={kwargs[name]}: this model was exported with {fixed}; leave it out, or use the original."
                )
        for name in _SIZES:
            if self.config[name] != self.record[name]:
                raise ValueError(
                    f"{name}={self.config[name]}: this model was exported for {self.record[name]} px; export the "
                    "original again for another size."
                )
        return super().__call__(image, **kwargs)

    @property
    def _calibrated_with(self) -> str:
        """On whose scores the threshold was calibrated; on its own, if they are not those that it was loaded with."""
        own = self.config.calibration_scores != self.record["calibration_scores"]
        return self.unet.arithmetic if own else self.record["calibrated_with"]

    def _settings_changed(self, given: dict[str, Any]) -> bool:
        """Also if they are scores of another arithmetic, unless both are float32."""
        other = self.record["precision"] != "fp32" and self._calibrated_with != self.unet.arithmetic
        return other or super()._settings_changed(given)

    def _inspect(self, pixels: torch.Tensor, noise: torch.Tensor, *fixed: Any) -> dict[str, torch.Tensor]:
        outputs = self.unet.run(pixels.float(), noise.float())
        return {name: outputs[name] for name in ("reconstruction", "probability")}

    def to(self, *args: Any, **kwargs: Any) -> "ExportedDiffusionADPipeline":
        """Changes nothing; raises a ValueError if asked for another device or precision."""
        for value in (*args, *kwargs.values()):
            elsewhere = isinstance(value, (str, torch.device)) and torch.device(value).type != "cpu"
            if elsewhere or (isinstance(value, torch.dtype) and value != torch.float32):
                raise ValueError(
                    f"{value}: an exported model runs on the CPU in its own precision ({self.record['precision']}); "
                    "for anything else load the original model."
                )
        return self

    # ---- saving and loading -----------------------------------------------------------------------------------------

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Writes `exported_model.json`: the record of the export, and the settings as they are now."""
        settings = {name: self.config[name] for name in SETTINGS} | {name: self.record[name] for name in _SIZES}
        self.record = {**self.record, **settings, "calibrated_with": self._calibrated_with}
        replace_file(Path(save_directory) / self.config_name, json.dumps(self.record, indent=2, sort_keys=True) + "\n")

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Writes a folder that [`from_pretrained`] loads: the graph's files and `exported_model.json`."""
        target = Path(save_directory)
        target.mkdir(parents=True, exist_ok=True)
        if target.resolve() != self.folder.resolve():
            for name in GRAPH_FILES[self.record["format"]]:
                shutil.copyfile(self.folder / name, target / name)
        self.save_config(target)

    @classmethod
    def from_pipe(cls, pipeline: Any, **kwargs: Any) -> "ExportedDiffusionADPipeline":
        """As [`DiffusionADPipeline.from_pipe`]."""
        pipe: Any = super().from_pipe(pipeline, **kwargs)
        pipe.record, pipe.folder = pipeline.record, pipeline.folder
        return pipe

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> "ExportedDiffusionADPipeline":
        """
        Loads a folder of `diffusionad export`; `kwargs` replace settings such as `threshold` or `false_alarm_rate`.

        Raises:
            OSError: If the folder is incomplete or the runtime cannot read it.
            ImportError: If the runtime is not installed; the message names the extra.
            ValueError: If exported models have no such option.
        """
        folder = Path(pretrained_model_name_or_path)
        unknown = sorted(set(kwargs) - set(SETTINGS).difference(_SIZES))
        if unknown:
            raise ValueError(f"{unknown[0]}: an exported model has no such option; leave it out.")
        record = _read_record(folder)
        graph, scheduler = _Graph(folder, record), NormGuidedScheduler(**record["scheduler"])
        settings: dict[str, Any] = {name: record.get(name) for name in SETTINGS} | kwargs
        pipe = cls(graph, graph, scheduler, **settings)
        pipe.register_to_config(_name_or_path=str(folder))
        pipe.record, pipe.folder = record, folder
        here, there = graph.arithmetic, record["calibrated_with"]
        if record["precision"] != "fp32" and pipe.threshold is not None and there != here:
            logger.warning(
                f"{folder}: calibrated on scores of {there}, from which those of {here} differ a little: its verdicts "
                "are undecided until `diffusionad calibrate` is run on this folder."
            )
        return pipe


class _Graph(nn.Module):
    """Takes the place of both networks in the pipeline; `run` is the whole computation."""

    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self, folder: Path, record: dict[str, Any]):
        super().__init__()
        self.config = SimpleNamespace(sample_size=record["image_size"], in_channels=3)
        # Tells models apart.
        digest = hashlib.sha256()
        for name in GRAPH_FILES[record["format"]]:
            digest.update((folder / name).read_bytes())
        self.register_buffer("digest", torch.tensor(list(digest.digest()), dtype=torch.uint8))
        load = {"openvino": _load_openvino, "onnx": _load_onnx}[record["format"]]
        self.run, floats = load(folder / GRAPH_FILES[record["format"]][0], record["precision"])
        # Runtime, precision and the type it computes in on this machine.
        self.arithmetic = f"{record['format']} {record['precision']} with {floats}"


@functools.cache
def _core_of(openvino: ModuleType) -> Any:
    # One per process, never freed. Each core installs an alternate signal stack and restores the previous one when it
    # is freed: two freed in the order of their creation leave a dangling stack, and the next signal kills the process.
    return openvino.Core()


def _load_openvino(file: Path, precision: str) -> tuple[Run, str]:
    """The computation, and the type it computes in apart from int8."""
    openvino = require("openvino", "openvino")
    options: dict[str, Any] = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        # With pinning, several processes on one machine would all use the first cores.
        "ENABLE_CPU_PINNING": False,
    }
    if precision == "fp32":
        # By default OpenVINO computes in bfloat16 if the processor can, which nearly halves the time.
        options["INFERENCE_PRECISION_HINT"] = "f32"
    try:
        compiled = _core_of(openvino).compile_model(str(file), "CPU", options)
    except RuntimeError as error:
        raise _unreadable(file, error) from error

    # A model has one request, which computes on all threads that there are: others wait for it.
    free = threading.Lock()

    def run(pixels: torch.Tensor, noise: torch.Tensor) -> dict[str, torch.Tensor]:
        with free:
            outputs = compiled({"pixels": pixels.numpy(), "noise": noise.contiguous().numpy()}, share_inputs=True)
        return {port.any_name: torch.from_numpy(value) for port, value in outputs.items()}

    return run, compiled.get_property("INFERENCE_PRECISION_HINT").to_string()


def _load_onnx(file: Path, precision: str) -> tuple[Run, str]:
    """As [`_load_openvino`]."""
    onnxruntime = require("onnxruntime", "openvino")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    # Its exceptions have no common base class of their own.
    except Exception as error:
        raise _unreadable(file, error) from error
    names = [output.name for output in session.get_outputs()]

    def run(pixels: torch.Tensor, noise: torch.Tensor) -> dict[str, torch.Tensor]:
        values = session.run(names, {"pixels": pixels.numpy(), "noise": noise.contiguous().numpy()})
        return dict(zip(names, map(torch.from_numpy, values), strict=True))

    return run, "f16" if precision == "fp16" else "f32"


def _unreadable(file: Path, error: Exception) -> OSError:
    return OSError(f"{file}: cannot read this graph ({one_line(error)[:200]}); copy the folder again, or export anew.")


def _read_record(folder: Path) -> dict[str, Any]:
    """Contents of `exported_model.json`; raises if the folder is not complete."""
    file = folder / CONFIG_NAME
    if not file.is_file():
        raise OSError(f"{folder}: no {CONFIG_NAME} in it; give the whole folder that `diffusionad export` wrote.")
    try:
        record = {"tile_size": None} | json.loads(file.read_text(encoding="utf-8"))
        if record["_diffusionad_export"] > EXPORT_FORMAT:
            raise OSError(f"{file}: written by a newer version of this package: pip install --upgrade diffusionad-hf.")
        files = GRAPH_FILES[record["format"]]
        if missing := {"precision", "scheduler", "calibrated_with", *_FORMER_SETTINGS} - record.keys():
            raise KeyError(min(missing))
    except (ValueError, KeyError, TypeError) as error:
        raise OSError(f"{file}: damaged ({one_line(error)}); copy the folder again, or export once more.") from error
    for name in files:
        if not (folder / name).is_file():
            raise OSError(f"{folder}: {name} is missing; copy the whole folder of `diffusionad export`.")
    return record


def looks_exported(path: Path) -> bool:
    """Whether this is a folder of `diffusionad export`, whole or not, or a file out of one."""
    graphs = {name for names in GRAPH_FILES.values() for name in names}
    if path.is_file():
        return path.name in graphs
    found = {name for name in (CONFIG_NAME, *graphs) if (path / name).is_file()}
    return bool(found) and not (path / DiffusionADPipeline.config_name).is_file()
