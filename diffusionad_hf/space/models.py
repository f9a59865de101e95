"""The categories on offer: a model each, with its calibration and what it says of itself."""

import json
import logging
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import ModelCard, hf_hub_download

from ..export.exported_pipeline import ExportedDiffusionADPipeline
from ..familiarity import FILE_NAME as FAMILIARITY_FILE
from ..familiarity import Familiarity
from ..hub.publishing import list_models
from ..images_diffusionad import resize_image, to_uint8
from ..loading import load_model
from ..pipeline_diffusionad import DiffusionADPipeline, conformal_p_value, conformal_threshold
from .intake import Refusal, Settings

try:
    from spaces import GPU
except ImportError:  # not on Hugging Face's ZeroGPU

    def GPU(function):  # noqa: N802
        """Stands in for the decorator that lends a GPU for a call."""
        return function


logger = logging.getLogger("space")

# Loaded models held at a time; the published size is 0.6 GB.
MOST_LOADED = 3


class ModelError(Refusal):
    """A model that cannot be used; the message names it and says what to do."""


# ---- calibration ----


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
    def from_json(cls, data: object, category: str) -> "Calibration":
        """Reads a calibration file's content.

        Raises:
            Refusal: If it is none, is damaged, or belongs to another category.
        """
        if not isinstance(data, dict) or data.get("format") != "diffusionad-calibration":
            raise Refusal("This is not a calibration file. Choose one that was downloaded from this page.")
        if data.get("category") != category:
            raise Refusal(f"This file belongs to {str(data.get('category'))[:80]}. Choose that category first.")
        scores, rate = data.get("scores"), data.get("false_alarm_rate")
        numbers = isinstance(scores, list) and all(isinstance(s, (int, float)) and 0 <= s <= 1 for s in scores)
        if not numbers or not 0 < len(scores) <= 100_000 or not isinstance(rate, (int, float)) or not 0 < rate < 1:
            raise Refusal("This calibration file is damaged.")
        try:
            familiarity = Familiarity.from_json(data["familiarity"]) if data.get("familiarity") else None
        except ValueError as error:
            raise Refusal("This calibration file is damaged.") from error
        return cls(tuple(sorted(map(float, scores))), float(rate), None, familiarity, True)


# ---- models ----


@dataclass(frozen=True)
class Raw:
    """What a model says of one image: score, map (S, S) float32 in [0, 1], and reconstruction (S, S, 3) uint8."""

    score: float
    anomaly_map: np.ndarray
    reconstruction: np.ndarray


class Model:
    """One category's model: loaded when first used, one call at a time."""

    def __init__(self, name: str, source: str):
        self.name = name
        self.source = source
        self.pipe: DiffusionADPipeline | None = None
        self.calibration = Calibration()
        self._lock = threading.RLock()

    def load(self) -> "Model":
        """Loads it unless it is.

        Raises:
            ModelError: If it cannot be loaded.
        """
        with self._lock:
            if self.pipe is None:
                began = time.perf_counter()
                try:
                    pipe = load_model(self.source)
                    config = pipe.config
                    self.calibration = Calibration(
                        tuple(config.calibration_scores or ()),
                        config.false_alarm_rate,
                        config.threshold,
                        self._familiarity(),
                    )
                except (OSError, ValueError, ImportError) as error:
                    logger.warning("%s: %s", self.name, error)
                    raise ModelError(
                        f"{self.name}: this model could not be loaded. Choose another category."
                    ) from error
                pipe.set_progress_bar_config(disable=True)
                self.pipe = pipe
                logger.info("loaded %s in %.1f s", self.name, time.perf_counter() - began)
        return self

    def _familiarity(self) -> Familiarity | None:
        file = self.file(FAMILIARITY_FILE)
        try:
            return Familiarity.from_json(json.loads(file.read_text(encoding="utf-8"))) if file else None
        except ValueError as error:
            # The verdict does not depend on it; "About" says that it is missing.
            logger.warning("%s: %s: %s; write it again", self.name, FAMILIARITY_FILE, error)
            return None

    def unload(self) -> None:
        with self._lock:
            self.pipe = None

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
        """Inspects images of any sizes, (3, H, W) each.

        Raises:
            ModelError: If the model fails; the page goes on.
            Refusal: If a setting does not go with this model.
        """
        with self._lock:
            pipe = self.load().pipe
            began = time.perf_counter()
            usual = {"image_size": pipe.config.image_size, "seed": pipe.config.seed}
            _check(settings, pipe)
            try:
                pipe.register_to_config(
                    image_size=settings.resolution or usual["image_size"],
                    seed=usual["seed"] if settings.seed is None else settings.seed,
                )
                size = pipe.config.image_size
                output = _call(pipe, [resize_image(image, size) for image in images], settings)
            except Exception as error:
                logger.exception("%s failed", self.name)
                raise ModelError(
                    f"{self.name}: the model failed on this image. Try another, or other settings."
                ) from error
            finally:
                pipe.register_to_config(**usual)
            # Read by those who want to know whether a click ran the model.
            logger.info(
                "ran %s on %d image(s) in %.0f ms", self.name, len(images), 1000 * (time.perf_counter() - began)
            )
        return [
            Raw(float(score), anomaly_map, to_uint8(normal))
            for score, anomaly_map, normal in zip(
                output.anomaly_score, output.anomaly_map, output.reconstruction, strict=True
            )
        ]


def _check(settings: Settings, pipe: DiffusionADPipeline) -> None:
    chosen = (settings.small_timestep, settings.big_timestep, settings.resolution)
    if isinstance(pipe, ExportedDiffusionADPipeline) and any(value is not None for value in chosen):
        raise Refusal("Timesteps and resolution are fixed in this category's model: leave them empty.")
    config = pipe.scheduler.config
    small = config.small_timestep if settings.small_timestep is None else settings.small_timestep
    big = config.big_timestep if settings.big_timestep is None else settings.big_timestep
    if not small < big < config.num_train_timesteps:
        raise Refusal(
            f"Timesteps: the small one ({small}) must be below the big one ({big}), and that below "
            f"{config.num_train_timesteps}."
        )


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
        self._used: OrderedDict[str, None] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def names(self) -> list[str]:
        return list(self.models)

    def warm_up(self) -> None:
        """Loads the first model, so that the first photo does not wait for it."""
        with suppress(ModelError):  # which is logged
            for name in self.names[:1]:
                self.get(name)

    def get(self, name: str | None) -> Model:
        """A category's model, loaded.

        Raises:
            ModelError: If there is no such category or it cannot be loaded.
        """
        if name not in self.models:
            known = ", ".join(self.models) or "none"
            raise ModelError(f"There is no category {str(name)[:80]!r}. There are: {known}.")
        model = self.models[name].load()
        with self._lock:
            self._used[name] = self._used.pop(name, None)
            while len(self._used) > MOST_LOADED:
                self.models[self._used.popitem(last=False)[0]].unload()
        return model


def _is_model(folder: Path) -> bool:
    """Whether a pipeline or an exported model lies there."""
    names = (DiffusionADPipeline.config_name, ExportedDiffusionADPipeline.config_name)
    return any((folder / name).is_file() for name in names)


def _find(source: str) -> list[str]:
    if Path(source).is_dir():
        folders = [Path(source)] if _is_model(Path(source)) else sorted(filter(_is_model, Path(source).iterdir()))
        return [str(folder.resolve()) for folder in folders]
    if source.count("/") == 1 and not source.startswith((".", "/", "~")):
        return [source]
    if "/" in source:
        logger.warning("%s: no such folder", source)
        return []
    try:
        found = [model["id"] for model in list_models(source)]
    except OSError as error:
        logger.warning("%s", error)
        return []
    if not found:
        logger.warning("%s: no models with the tag diffusionad on the Hub", source)
    return found


# ---- what a model says of itself ----


def about(model: Model) -> str:
    """Markdown on a model from its card: size and calibration, metrics, limits. Never fails."""
    try:
        pipe = model.load().pipe
    except ModelError as error:
        return f"### {model.name}\n\n{error}"
    calibration = model.calibration
    known = f"Inspects at {pipe.config.image_size} × {pipe.config.image_size} px."
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
        card = ModelCard.load(file, ignore_metadata_errors=True)
    except (ValueError, OSError):
        return "\n".join([*lines, "", "Its card cannot be read."])
    if card.data.eval_results:
        lines += ["", "| metric | value | measured on |", "| --- | --- | --- |"]
        for result in card.data.eval_results:
            value = f"{result.metric_value:.3f}" if isinstance(result.metric_value, float) else result.metric_value
            lines.append(f"| {result.metric_name or result.metric_type} | {value} | {result.dataset_name} |")
    if limits := _section(card.text, "limit"):
        lines += ["", "#### Limits", "", limits]
    return "\n".join(lines)


def _section(text: str, word: str) -> str:
    """What follows the first heading with a word that begins like the given one."""
    heading = re.compile(rf"#.*\b{word}", re.IGNORECASE)
    lines = iter(text.splitlines())
    if not any(heading.match(line) for line in lines):
        return ""
    rest = []
    for line in lines:
        if line.startswith("#"):
            break
        rest.append(line)
    return "\n".join(rest).strip()
