"""The categories on offer: a model each, with its calibration and what it says of itself."""

import copy
import json
import logging
import math
import re
import threading
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
import yaml
from huggingface_hub import ModelCard, ModelCardData, hf_hub_download

from ..export.exported_pipeline import ExportedDiffusionADPipeline
from ..familiarity import FILE_NAME as FAMILIARITY_FILE
from ..familiarity import Familiarity
from ..hub.publishing import list_models
from ..images_diffusionad import resize_image, to_uint8
from ..loading import load_model
from ..pipeline_diffusionad import DiffusionADPipeline, check_calibration, conformal_p_value, conformal_threshold
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
class Calibration:
    """Scores of normal images and the share of them that may be called defective; `scores` is empty without any."""

    scores: tuple[float, ...] = ()
    false_alarm_rate: float = 0.05
    own_threshold: float | None = None
    familiarity: Familiarity | None = None
    yours: bool = False

    @property
    def threshold(self) -> float | None:
        """Scores above it are defective; infinite if there are too few images, None if there are none."""
        if self.own_threshold is not None:
            return self.own_threshold
        return conformal_threshold(self.scores, self.false_alarm_rate) if self.scores else None

    @property
    def shown_threshold(self) -> float:
        """The one to start from: 0.5 without a calibration; 1, which no score exceeds, if it promises nothing."""
        return 0.5 if self.threshold is None else min(self.threshold, 1.0)

    def p_value(self, score: float) -> float | None:
        return float(conformal_p_value(self.scores, score)) if self.scores else None

    def to_json(self, category: str) -> dict:
        return {
            "format": "diffusionad-calibration",
            "category": category,
            "false_alarm_rate": self.false_alarm_rate,
            "scores": list(self.scores),
            "familiarity": self.familiarity.to_json() if self.familiarity else None,
        }

    @classmethod
    def read(cls, file: Upload, category: str) -> "Calibration":
        """Reads a calibration file, unless it is something else, damaged, or another category's."""
        try:
            if file.path.stat().st_size > LIMITS.calibration_bytes:
                raise ValueError("too large")
            data = json.loads(file.path.read_text(encoding="utf-8"))
            if data["format"] != "diffusionad-calibration":
                raise ValueError("another format")
            owner, rate, scores = str(data["category"]), data["false_alarm_rate"], data["scores"]
            if isinstance(scores, list) and len(scores) > LIMITS.calibration_scores:
                raise ValueError("too many scores")
            check_calibration(scores, rate)
            familiarity = Familiarity.from_json(data["familiarity"]) if data.get("familiarity") else None
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise Refusal("This is not a calibration file of this page, or it is damaged.") from error
        if owner != category:
            raise Refusal(f"This file belongs to {shown_name(owner)}. Choose that category first.")
        return cls(tuple(sorted(map(float, scores))), rate, None, familiarity, True)


@dataclass(frozen=True)
class Raw:
    """What a model says of one image: score, map (S, S) float32 in [0, 1], and reconstruction (S, S, 3) uint8."""

    score: float
    anomaly_map: np.ndarray
    reconstruction: np.ndarray


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
                scores = tuple(config.calibration_scores or ())
                familiarity = self._familiarity()
                self.calibration = Calibration(scores, config.false_alarm_rate, config.threshold, familiarity)
            except (OSError, ValueError, ImportError) as error:
                logger.warning("%s: %s", self.name, error)
                raise ModelError(f"{self.name}: this model could not be loaded. Choose another category.") from error
            pipe.set_progress_bar_config(disable=True)
            self.pipe = pipe
            return pipe

    def _familiarity(self) -> Familiarity | None:
        file = self.file(FAMILIARITY_FILE)
        try:
            return Familiarity.from_json(json.loads(file.read_text(encoding="utf-8"))) if file else None
        except (ValueError, RecursionError) as error:
            # The verdict does not depend on it; "About" says that it is missing.
            logger.warning("%s: %s: %s; write it again", self.name, FAMILIARITY_FILE, error)
            return None

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
        found = zip(output.anomaly_score, output.anomaly_map, output.reconstruction, strict=True)
        return [Raw(float(score), anomaly_map, to_uint8(normal)) for score, anomaly_map, normal in found]


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
