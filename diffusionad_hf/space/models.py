"""The categories on offer: a model each, with its calibration and what it says of itself."""

import copy
import hashlib
import json
import logging
import math
import re
import threading
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
import yaml
from huggingface_hub import ModelCard, ModelCardData, hf_hub_download

from .. import verdicts_diffusionad as verdicts
from ..calibration import fingerprint
from ..export.exported_pipeline import ExportedDiffusionADPipeline
from ..familiarity_diffusionad import Familiarity, describe
from ..hub.publishing import list_models
from ..images_diffusionad import resize_image, to_uint8
from ..loading import load_model
from ..pipeline_diffusionad import DiffusionADPipeline, check_calibration
from .intake import LIMITS, Refusal, Settings, Upload, read_card, shown_name

try:
    from spaces import GPU
except ImportError:  # not on Hugging Face's ZeroGPU

    def GPU(function):  # noqa: N802
        return function


logger = logging.getLogger("space")
MOST_LOADED = 3  # at a time; the published size is 0.6 GB


class ModelError(Refusal):
    """A model that cannot be used; the message names it and says what to do."""


@dataclass(frozen=True)
class Calibration(verdicts.Calibration):
    """What verdicts of a model rest on: its own calibration, or a visitor's."""

    familiarity: Familiarity | None = None
    yours: bool = False

    @property
    def shown_threshold(self) -> float:
        """Where the control stands: at 0.5 without a calibration, at 1, beyond all scores, if it promises nothing."""
        return 0.5 if self.threshold is None else min(self.threshold, 1.0)

    @property
    def shown_rate(self) -> float:
        """In percent, within what the control offers."""
        return min(max(round(100 * self.false_alarm_rate, 2), 0.1), 50)

    def moved(self, threshold: float | None, rate: float | None = None) -> "Calibration":
        """With the controls as they are; where the page itself put them, nothing changes."""
        found = self
        if rate is not None and abs(self.shown_rate - rate) > 0.051:  # half a step
            found = replace(self, false_alarm_rate=rate / 100, own_threshold=None)
        if threshold is None or abs(found.shown_threshold - threshold) < 0.00051:
            return found
        return replace(found, own_threshold=threshold)

    def to_json(self, model: "Model") -> dict:
        data = {
            "format": "diffusionad-calibration",
            "category": model.name,
            "model": fingerprint(model.load()),
            "false_alarm_rate": self.false_alarm_rate,
            "scores": list(self.scores),
            "familiarity": self.familiarity.to_json() if self.familiarity else None,
        }
        return {**data, "digest": _digest(data)}

    @classmethod
    def read(cls, file: Upload, model: "Model") -> "Calibration":
        """Reads a calibration file, unless it is something else, damaged, edited, or another model's."""
        try:
            if file.path.stat().st_size > LIMITS.calibration_bytes:
                raise ValueError("too large")
            data = json.loads(file.path.read_text(encoding="utf-8"))
            if data["format"] != "diffusionad-calibration" or data.pop("digest", None) != _digest(data):
                raise ValueError("another format, or edited")
            owner, rate, scores = str(data["category"]), data["false_alarm_rate"], data["scores"]
            if isinstance(scores, list) and len(scores) > LIMITS.calibration_scores:
                raise ValueError("too many scores")
            check_calibration(scores, rate)
            familiarity = Familiarity.from_json(data["familiarity"]) if data.get("familiarity") else None
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise Refusal("This is not a calibration file of this page, or it is damaged or edited.") from error
        if owner != model.name:
            raise Refusal(f"This file belongs to {shown_name(owner)}. Choose that category first.")
        if data.get("model") != fingerprint(model.load()):
            raise Refusal("This category's model has changed since this file was made. Calibrate again.")
        return cls(
            tuple(sorted(map(float, scores))),
            rate,
            has_learnt=model.calibration.has_learnt,
            familiarity=familiarity,
            yours=True,
        )


def _digest(data: dict) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Raw:
    """
    What a model says of one image: score, map (S, S) float32 in [0, 1], reconstruction (S, S, 3) uint8, and the grid
    by which it is compared with normal images.
    """

    score: float
    anomaly_map: np.ndarray
    reconstruction: np.ndarray
    grid: np.ndarray


class Model:
    """One category's model: loaded when first used."""

    def __init__(self, name: str, source: str):
        self.name = name
        self.source = source
        self.pipe: DiffusionADPipeline | None = None
        self.calibration = Calibration()
        self._loading = threading.Lock()
        self._running = threading.Lock()  # of exported models, whose runtimes compute one call at a time

    def load(self) -> DiffusionADPipeline:
        """The pipeline; a ModelError if it cannot be loaded."""
        pipe = self.pipe
        if pipe is not None:
            return pipe
        with self._loading:
            if self.pipe is not None:
                return self.pipe
            try:
                pipe = load_model(self.source)
                config = pipe.config
                familiarity = None if config.familiarity is None else Familiarity.from_json(config.familiarity)
                self.calibration = Calibration(**vars(pipe.calibration), familiarity=familiarity)
            except (OSError, ValueError, ImportError) as error:
                logger.warning("%s: %s", self.name, error)
                raise ModelError(f"{self.name}: this model could not be loaded. Choose another category.") from error
            pipe.set_progress_bar_config(disable=True)
            self.pipe = pipe
            return pipe

    def trained_on(self, image: torch.Tensor) -> bool:
        """Whether an image, (3, H, W), is known to be one of those the model was trained on."""
        pipe = self.load()
        return pipe.trained_on(resize_image(image, pipe.config.image_size))

    def file(self, name: str) -> Path | None:
        """A file that lies beside the weights, None if there is none."""
        folder = Path(self.source)
        if folder.is_dir():
            return folder / name if (folder / name).is_file() else None
        try:
            return Path(hf_hub_download(self.source, name))
        except OSError:  # the Hub's errors are OSErrors
            return None

    def run(self, images: Sequence[torch.Tensor], settings: Settings = Settings()) -> list[Raw]:  # noqa: B008
        """Inspects images of any sizes, (3, H, W) each."""
        loaded = self.load()
        _check(settings, loaded)
        pipe = copy.copy(loaded)  # with settings of its own
        pipe.register_to_config(
            image_size=loaded.config.image_size if settings.resolution is None else _size(settings, loaded),
            seed=loaded.config.seed if settings.seed is None else settings.seed,
        )
        began = time.perf_counter()
        try:
            small = [resize_image(image, pipe.size) for image in images]
            with self._running if isinstance(pipe, ExportedDiffusionADPipeline) else nullcontext():
                output = _call(pipe, small, settings)
        except Exception as error:
            logger.exception("%s failed", self.name)
            reason = "the model failed on this image. Try another, or other settings."
            raise ModelError(f"{self.name}: {reason}") from error
        took = 1000 * (time.perf_counter() - began)
        logger.info("ran %s on %d image(s) in %.0f ms", self.name, len(images), took)
        usual = loaded.config.image_size
        grids = [describe(resize_image(image, usual)) for image in images]
        found = zip(output.anomaly_score, output.anomaly_map, output.reconstruction, grids, strict=True)
        return [Raw(float(score), anomaly_map, to_uint8(normal), grid) for score, anomaly_map, normal, grid in found]


def _size(settings: Settings, pipe: DiffusionADPipeline) -> list[int]:
    """Height and width in px: the model's, or in its shape about as many px as a square of the chosen side has."""
    scale = settings.resolution / math.sqrt(math.prod(pipe.size)) if settings.resolution else 1
    return [max(32, round(side * scale / 32) * 32) for side in pipe.size]


def _check(settings: Settings, pipe: DiffusionADPipeline) -> None:
    chosen = (settings.small_timestep, settings.big_timestep, settings.resolution)
    if isinstance(pipe, ExportedDiffusionADPipeline) and any(value is not None for value in chosen):
        raise Refusal("Timesteps and resolution are fixed in this category's model: leave them empty.")
    height, width = _size(settings, pipe)
    draws = max(LIMITS.run_pixels // (height * width), 1)
    if settings.num_noises > draws:
        raise Refusal(
            f"{settings.num_noises} noise draws at {width} x {height} px take too long: at most {draws} at that size."
        )
    config = pipe.scheduler.config
    small = config.small_timestep if settings.small_timestep is None else settings.small_timestep
    big = config.big_timestep if settings.big_timestep is None else settings.big_timestep
    end = config.num_train_timesteps
    if not small < big < end:
        raise Refusal(f"Timesteps: the small one ({small}) must be below the big one ({big}), and that below {end}.")


@GPU
def _call(pipe: DiffusionADPipeline, images: list[torch.Tensor], settings: Settings):
    return pipe(
        images,
        num_noises=settings.num_noises,
        small_timestep=settings.small_timestep,
        big_timestep=settings.big_timestep,
    )


class Models:
    """The categories on offer.

    Args:
        sources: Comma-separated folders (of one model, or of several), Hub ids (`org/name`) and Hub organisations.
    """

    def __init__(self, sources: str):
        self.models: dict[str, Model] = {}
        for source in filter(None, (part.strip() for part in sources.split(","))):
            for found in _find(source):
                name = Path(found).name if Path(found).is_dir() else found
                self.models.setdefault(name, Model(name, found))
        self.names = list(self.models)
        self._used: list[str] = []  # those loaded, the last used one last
        self._lock = threading.Lock()

    def get(self, name: str | None) -> Model:
        """A category's model, loaded; a ModelError if there is no such category or it cannot be loaded."""
        if name not in self.models:
            known = ", ".join(self.models) or "none"
            raise ModelError(f"There is no category {str(name)[:80]!r}. There are: {known}.")
        self.models[name].load()
        with self._lock:
            self._used = [*(used for used in self._used if used != name), name]
            while len(self._used) > MOST_LOADED:
                self.models[self._used.pop(0)].pipe = None  # a call that runs holds its own reference
        return self.models[name]


def _is_model(folder: Path) -> bool:
    """Whether a pipeline or an exported model lies there."""
    names = (DiffusionADPipeline.config_name, ExportedDiffusionADPipeline.config_name)
    return any((folder / name).is_file() for name in names)


def _find(source: str) -> list[str]:
    folder = Path(source)
    if folder.is_dir():
        folders = [folder] if _is_model(folder) else sorted(filter(_is_model, folder.iterdir()))
        return [str(found.resolve()) for found in folders]
    if source.count("/") == 1 and not source.startswith((".", "/", "~")):
        return [source]
    try:
        ids = [] if "/" in source else [model["id"] for model in list_models(source)]
    except OSError as error:
        logger.warning("%s", error)
        return []
    if not ids:
        logger.warning("%s: no such folder, and no models of that organisation on the Hub", source)
    return ids


def _cell(value: object) -> str:
    """A value of a card's table; what is neither number nor text may be of any size."""
    if isinstance(value, float):
        return f"{value:.3f}"
    return str(value)[:200] if isinstance(value, (str, int)) else "?"


def about(models: Models, name: str) -> str:
    """Markdown on a model from its card: size and calibration, metrics, limits. Never fails."""
    try:
        model = models.get(name)
    except ModelError as error:
        return f"### {name}\n\n{error}"
    calibration, (height, width) = model.calibration, model.load().size
    known = f"Inspects at {width} × {height} px."
    if calibration.has_learnt is False:
        known += " This model has not learnt to tell defects: it gives no verdicts."
    if calibration.scores:
        known += f" Calibrated on {len(calibration.scores)} normal images."
    else:
        known += " Not calibrated: give it your own normal images before you rely on a verdict."
    if calibration.familiarity is None:
        known += " It cannot tell photos of something else from photos of its part."
    lines = [f"### {model.name}", "", known]
    file = model.file("README.md")
    if file is None:
        return "\n".join([*lines, "", "It comes without a card: nothing is known of its accuracy."])
    try:
        card = ModelCard(read_card(file), ignore_metadata_errors=True)
        results = cast(ModelCardData, card.data).eval_results or []
        rows = [
            (result.metric_name or result.metric_type, result.metric_value, result.dataset_name) for result in results
        ]
    except (ValueError, OSError, yaml.YAMLError, RecursionError, TypeError, AttributeError):
        return "\n".join([*lines, "", "Its card cannot be read."])
    if rows:
        lines += ["", "| metric | value | measured on |", "| --- | --- | --- |"]
        lines += [f"| {' | '.join(map(_cell, row))} |" for row in rows]
    limits = re.search(r"^#.*\blimit.*((?:\n(?!#).*)*)", card.text, re.IGNORECASE | re.MULTILINE)
    if limits and limits[1].strip():
        lines += ["", "#### Limits", "", limits[1].strip()]
    return "\n".join(lines)
