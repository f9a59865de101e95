"""Export to other runtimes: the whole computation as one graph, in float32, float16 or int8."""

import copy
import json
import logging
import math
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..calibration import calibrate, check_new, images_needed
from ..files import replace_folder, require
from ..images_diffusionad import ImageInput, load_image, resize_image
from ..pipeline_diffusionad import DiffusionADPipeline
from .exported_pipeline import (
    CONFIG_NAME,
    EXPORT_FORMAT,
    GRAPH_FILES,
    SETTINGS,
    ExportedDiffusionADPipeline,
)

PRECISIONS = ("fp32", "fp16", "int8")
ORIGINAL = "the original model"

_OUTPUTS = ("probability", "reconstruction", "anomaly_score")
# The newest that the tracing exporter of every supported torch writes.
_ONNX_OPSET = 18
# Largest accepted difference between a graph's scores and the pipeline's; int8 only has to give numbers.
_TOLERANCE = {"fp32": 1e-3, "fp16": 2e-2, "int8": 1.0}
# More images hardly change the ranges of the activations.
_MOST_QUANTISATION_IMAGES = 64
# Operations that int8 leaves in float, by their names in OpenVINO and in ONNX: the segmenter and the arithmetic before
# it (a defect is often a few steps of 1/255 between image and reconstruction: an int8 segmenter moved the demo model's
# scores by 0.023 on average and 0.11 at most, an int8 UNet by 0.002 and 0.019, and saved 4 % more), the UNet's first
# and last convolution, and the time embedding, which costs nothing.
_KEPT_IN_FLOAT = (
    r".*segmenter.*",
    r"(aten|prim)::.*",
    r"/[A-Z][A-Za-z]*(_\d+)?",
    r".*unet[./]conv_(in|out)/.*",
    r".*unet[./]time_embedding.*",
    r".*time_emb_proj.*",
)


def export_pipeline(
    pipe: DiffusionADPipeline,
    output_dir: str | os.PathLike,
    *,
    format: str = "openvino",
    precision: str = "fp32",
    calibration_images: Sequence[ImageInput] = (),
) -> ExportedDiffusionADPipeline:
    """
    Exports a pipeline to a folder of its own that [`ExportedDiffusionADPipeline`] loads.

    The graph takes `pixels`, `(B, 3, H, W)` in [0, 1], and `noise`, `(2, B, 3, H, W)`, small scale first, both float32
    and for any B, and gives `probability`, `(B, 1, H, W)`, `reconstruction`, `(B, 3, H, W)`, and `anomaly_score`,
    `(B,)`. H and W are the pipeline's, or its tiles'. Timesteps, guidance weight and top-k are constants in it.

    If there are enough calibration images for the false-alarm rate (with int8: apart from those used to quantise),
    threshold and p-values are calibrated anew on the exported model's scores. Otherwise those of the pipeline are
    kept, and `record["calibrated_with"]` says so: with fp16 and int8, verdicts are then undecided.

    Args:
        pipe: The pipeline; not changed.
        output_dir: The folder to write: new, empty, or an earlier export, which is replaced once the new one is whole.
        format: `"openvino"` or `"onnx"`.
        precision: `"fp32"`, `"fp16"` (of the networks) or `"int8"` (of weights and activations of the UNet, by NNCF's
            post-training quantisation). With the last two OpenVINO computes the rest in bfloat16 if the processor
            can, so that scores differ a little between processors.
        calibration_images: Normal images that the model was not trained on; needed for int8.

    Raises:
        ValueError: If an argument is none of the above, a component is of a class that cannot be exported, the graph
            does not give the pipeline's scores, or a calibration image is there twice or was trained on.
        ImportError: If the runtime is not installed; the message names the extra.
        OSError: If the folder cannot be written or holds something else.
        InvalidImageError: If a calibration image cannot be read.
    """
    for name, value, known in (("format", format, tuple(GRAPH_FILES)), ("precision", precision, PRECISIONS)):
        if value not in known:
            raise ValueError(f'{name}="{value}": must be one of {", ".join(known)}.')
    if precision == "int8" and not len(calibration_images):
        raise ValueError("int8: needs normal images to measure the ranges of activations; give calibration images.")
    for module in _modules(format, precision):
        require(module, "openvino")
    _check_components(pipe)
    # Absolute: the staging folder goes beside the target, and the parent of `.` is `.` itself.
    target = Path(output_dir).resolve()
    with _staging(target) as staging:
        images = [
            resize_image(load_image(image, value_range=pipe.config.value_range), pipe.size)
            for image in calibration_images
        ]
        seen: dict[str, int] = {}
        for i, image in enumerate(images):
            check_new(pipe, image, i, seen)
        quantised_on, rest = _split(images, precision, images_needed(pipe.config.false_alarm_rate))
        noise = pipe._seeded_noise(1)[0].unsqueeze(1)  # (2, 1, 3, H, W)
        height, width = pipe.tile
        # Of an image in tiles, the first one is enough to measure ranges.
        tiles = [image[None, :, :height, :width].contiguous() for image in quantised_on]
        samples = [{"pixels": tile.numpy(), "noise": noise.numpy()} for tile in tiles]
        write = {"openvino": _write_openvino, "onnx": _write_onnx}[format]
        graph = _InspectionGraph(pipe, half=(format, precision) == ("onnx", "fp16"))
        with warnings.catch_warnings(), torch.no_grad():
            # The tracer warns about every size check in the networks; sizes are constants here.
            warnings.simplefilter("ignore")
            write(graph, pipe.tile, precision, samples, staging)
        record = {
            "_class_name": ExportedDiffusionADPipeline.__name__,
            "_diffusionad_export": EXPORT_FORMAT,
            "format": format,
            "precision": precision,
            "versions": {name: version(name) for name in ("diffusionad-hf", "torch", *_modules(format, precision))},
            "scheduler": {k: v for k, v in pipe.scheduler.config.items() if not k.startswith("_")},
            "calibrated_with": ORIGINAL,
            **{name: pipe.config[name] for name in SETTINGS},
        }
        (staging / CONFIG_NAME).write_text(json.dumps(record), encoding="utf-8")
        exported = ExportedDiffusionADPipeline.from_pretrained(staging)
        exported.set_progress_bar_config(disable=True)
        _compare(pipe, exported, images or [_probe(pipe.size)], noise)
        if rest:
            calibrate(exported, rest)
        exported.save_config(staging)
    exported.folder = target
    return exported


def _modules(format: str, precision: str) -> tuple[str, ...]:
    runtime = ("openvino",) if format == "openvino" else ("onnx", "onnxruntime")
    return (*runtime, "nncf") if precision == "int8" else runtime


def _check_components(pipe: DiffusionADPipeline) -> None:
    if isinstance(pipe, ExportedDiffusionADPipeline):
        raise ValueError(f"{pipe.folder}: is an exported model already; give the original model.")
    segmenters = {"AnomalySegmenter", "PerceptualSegmenter"}
    wanted = {"unet": {"UNet2DModel"}, "segmenter": segmenters, "scheduler": {"NormGuidedScheduler"}}
    for name, known in wanted.items():
        # By name: a class that was loaded as a repo's own code is another object than the installed one.
        classes = [cls.__name__ for cls in type(getattr(pipe, name)).__mro__]
        if known.isdisjoint(classes):
            raise ValueError(f"{name}: is a {classes[0]}; only {' or '.join(sorted(known))} can be exported.")


def _split(images: list[torch.Tensor], precision: str, needed: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Images for the quantisation, and others for the threshold: `needed` or more, or none, to keep the old one."""
    first = min(len(images) // 2, _MOST_QUANTISATION_IMAGES) if precision == "int8" else 0
    if len(images) - first >= needed:
        return images[:first], images[first:]
    return images[:_MOST_QUANTISATION_IMAGES], []


def _probe(size: tuple[int, int]) -> torch.Tensor:
    """An image to compare on if none is given: smooth colours with a bright square."""
    height, width = size
    y, x = torch.meshgrid(torch.linspace(1, 0, height), torch.linspace(0, 1, width), indexing="ij")
    image = torch.stack([x, y, torch.full(size, 0.5)])
    image[:, height // 4 : height // 3, width // 4 : width // 3] = 1
    return image


def _compare(
    pipe: DiffusionADPipeline, exported: ExportedDiffusionADPipeline, images: list[torch.Tensor], noise: torch.Tensor
) -> None:
    """Records by how much scores differ from the pipeline's on a few images; float scores must hardly differ."""
    some = images[:4]
    draws = noise.expand(-1, len(some), -1, -1, -1)
    ours, theirs = (model(some, noise=draws, batch_size=4).anomaly_score for model in (exported, pipe))
    differences, precision = np.abs(ours - theirs), exported.record["precision"]
    mean, largest = float(differences.mean()), float(differences.max())
    exported.record["score_difference"] = {"images": len(some), "mean": mean, "largest": largest}
    if not largest <= _TOLERANCE[precision]:  # NaN neither
        raise ValueError(
            f"the {precision} graph's scores differ from the pipeline's by up to {largest:.4f}; nothing was "
            "written. Load the pipeline in float32 with the components it was saved with, and export again."
        )


class _InspectionGraph(nn.Module):
    """All of [`DiffusionADPipeline._inspect`] and the score with constant timesteps, in operations that trace well."""

    def __init__(self, pipe: DiffusionADPipeline, half: bool):
        super().__init__()
        # Copies on the CPU: the pipeline stays as it is.
        networks = [copy.deepcopy(network).cpu().eval() for network in (pipe.unet, pipe.segmenter)]
        self.unet, self.segmenter = (network.half() if half else network.float() for network in networks)
        # Runtimes fuse these too, but under names that no longer say which module a convolution belongs to.
        for block in [block for block in self.segmenter.modules() if isinstance(block, nn.Sequential)]:
            for i, norm in enumerate(block):
                if isinstance(norm, nn.BatchNorm2d):
                    block[i - 1], block[i] = fuse_conv_bn_eval(cast(nn.Conv2d, block[i - 1]), norm), nn.Identity()
        self.scheduler = copy.deepcopy(pipe.scheduler)
        self.top_k = min(pipe.config.top_k, math.prod(pipe.tile))

    def forward(self, pixels: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        def predict(noised: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
            return self.unet(noised.to(self.unet.dtype), timesteps).sample.float()

        config = self.scheduler.config
        reconstruction = self.scheduler.reconstruct(
            predict, pixels, noise, config.small_timestep, config.big_timestep
        ).reconstruction
        pair = torch.cat([pixels, reconstruction], dim=1).to(self.segmenter.dtype)
        probability = self.segmenter(pair).float().sigmoid()
        score = probability.flatten(1).topk(self.top_k, dim=1).values.mean(dim=1)
        return probability, reconstruction, score


def _examples(size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    # Two images: tracing with a batch of one may bake the one in.
    return torch.rand(2, 3, *size), torch.randn(2, 2, 3, *size)


def _write_openvino(
    graph: _InspectionGraph, size: tuple[int, int], precision: str, samples: list[dict[str, np.ndarray]], folder: Path
) -> None:
    openvino = require("openvino", "openvino")
    shapes = [openvino.PartialShape([-1, 3, *size]), openvino.PartialShape([2, -1, 3, *size])]
    # Traced here, as OpenVINO would trace it three times to compare; `_compare` does that with the finished model.
    with torch.no_grad():
        traced = torch.jit.trace(graph, _examples(size), check_trace=False)
    model = openvino.convert_model(traced, input=shapes)
    for port, name in zip((*model.inputs, *model.outputs), ("pixels", "noise", *_OUTPUTS), strict=True):
        port.get_tensor().set_names({name})
    if precision == "int8":
        model = _quantised(model, samples)
    openvino.save_model(model, folder / GRAPH_FILES["openvino"][0], compress_to_fp16=precision == "fp16")


def _write_onnx(
    graph: _InspectionGraph, size: tuple[int, int], precision: str, samples: list[dict[str, np.ndarray]], folder: Path
) -> None:
    onnx = require("onnx", "openvino")
    file = folder / GRAPH_FILES["onnx"][0]
    axes = {name: {0: "batch"} for name in ("pixels", *_OUTPUTS)} | {"noise": {1: "batch"}}
    torch.onnx.export(
        graph,
        _examples(size),
        str(file),
        # The newer exporter takes a minute for the same graph; this one takes two seconds.
        dynamo=False,
        opset_version=_ONNX_OPSET,
        input_names=["pixels", "noise"],
        output_names=list(_OUTPUTS),
        dynamic_axes=axes,
    )
    if precision == "int8":
        onnx.save(_quantised(onnx.load(file), samples), file)


def _quantised(model: Any, samples: list[dict[str, np.ndarray]]) -> Any:
    """An OpenVINO or ONNX model with int8 convolutions and matrix products."""
    nncf = require("nncf", "openvino")
    # Its own function for this would also silence the handlers of other loggers.
    logging.getLogger("nncf").setLevel(logging.ERROR)
    return nncf.quantize(
        model,
        nncf.Dataset(samples),
        subset_size=len(samples),
        ignored_scope=nncf.IgnoredScope(patterns=list(_KEPT_IN_FLOAT), validate=False),
    )


@contextmanager
def _staging(target: Path) -> Iterator[Path]:
    """Yields a folder beside the target that replaces it once the body has succeeded."""
    if target.exists() and not (target.is_dir() and ((target / CONFIG_NAME).is_file() or not any(target.iterdir()))):
        raise OSError(f"{target}: is no exported model; give a new or an empty folder.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent)
    except OSError as error:
        raise OSError(f"{target}: cannot write there ({error.strerror}); choose another folder.") from error
    with temporary:
        # Unlike the temporary folder, others may read this one.
        staging = Path(temporary.name, "model")
        staging.mkdir()
        yield staging
        replace_folder(target, staging.rename)
