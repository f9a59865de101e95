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
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, hf_hub_download, snapshot_download

from .. import verdicts_diffusionad as verdicts
from ..calibration import fingerprint
from ..evaluation.intervals import show
from ..export.exported_pipeline import ExportedDiffusionADPipeline
from ..familiarity_diffusionad import Familiarity, describe
from ..hub.publishing import EXAMPLES, list_models
from ..images_diffusionad import resize_image, to_uint8
from ..loading import load_model
from ..pipeline_diffusionad import DiffusionADPipeline, check_calibration
from . import gpu
from .computing import infer
from .decoding import stated_size
from .intake import LIMITS, Refusal, Settings, Upload, read_card, shown_name

logger = logging.getLogger("space")
_HUB_SECONDS = 8
_MOST_EXAMPLES = 12
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
    by which it is compared with normal images; unless it `is_whole`, `note` says what of the image the model saw.
    """

    score: float
    anomaly_map: np.ndarray
    reconstruction: np.ndarray
    grid: np.ndarray
    note: str = ""
    is_whole: bool = True


class Model:
    """One category's model: loaded when first used. Its key is its name, unless a visitor taught it."""

    def __init__(self, name: str, source: str, key: str | None = None):
        self.name = name
        self.key = key or name
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
                pipe = load_model(self.source, device="cpu" if gpu.IS_ZERO else None)
                config = pipe.config
                familiarity = None if config.familiarity is None else Familiarity.from_json(config.familiarity)
                self.calibration = Calibration(**vars(pipe.calibration), familiarity=familiarity)
            except (OSError, ValueError, ImportError) as error:
                logger.warning("%s: %s", self.name, error)
                raise ModelError(f"{self.name}: this model could not be loaded. Choose another category.") from error
            pipe.set_progress_bar_config(disable=True)
            self.pipe = pipe
            return pipe

    @property
    def value_range(self) -> float | None:
        """What is white in images of more than 8 bits; None if their type says it."""
        return self.load().config.value_range

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

    def card(self) -> ModelCard | None:
        """
        What the model's maker says of it; None if there is no card.

        Raises:
            ValueError: If it cannot be read.
        """
        file = self.file("README.md")
        try:
            return None if file is None else ModelCard(read_card(file), ignore_metadata_errors=True)
        except (ValueError, OSError, yaml.YAMLError, RecursionError, TypeError, AttributeError) as error:
            raise ValueError("Its card cannot be read.") from error

    def evaluation(self) -> dict:
        """What was measured of it, by the file beside its card; empty if there is none that can be read."""
        file = self.file("evaluation.json")
        try:
            if file is not None and file.stat().st_size <= LIMITS.calibration_bytes:
                return dict(json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, OSError, TypeError, RecursionError) as error:
            logger.warning("%s: its evaluation cannot be read: %s", self.name, error)
        return {}

    def examples(self) -> list["Example"]:
        """Its photos to try it on: good ones first, at most 12; those that are no images are left out."""
        folder = Path(self.source)
        if not folder.is_dir():
            try:
                patterns = [f"{EXAMPLES}/*.png", f"{EXAMPLES}/*.jpg"]
                folder = Path(snapshot_download(self.source, allow_patterns=patterns, etag_timeout=5))
            except (OSError, ValueError):
                return []
        files = [file for file in (folder / EXAMPLES).glob("*") if file.suffix in (".png", ".jpg")]
        found = [Example(file) for file in files if stated_size(file)]
        return sorted(found, key=lambda example: (not example.is_good, example.path.name))[:_MOST_EXAMPLES]

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
            cuts = [_cut(image, loaded, self.calibration.familiarity) for image in images]
            small = [resize_image(image[cut], pipe.size) for image, cut in zip(images, cuts, strict=True)]
            with self._running if isinstance(pipe, ExportedDiffusionADPipeline) else nullcontext():
                output = _call(pipe, small, settings)
        except Exception as error:
            logger.exception("%s failed", self.name)
            reason = "the model failed on this image. Try another, or other settings."
            raise ModelError(f"{self.name}: {reason}") from error
        took = 1000 * (time.perf_counter() - began)
        logger.info("ran %s on %d image(s) in %.0f ms", self.name, len(images), took)
        found = zip(images, cuts, output.anomaly_score, output.anomaly_map, output.reconstruction, strict=True)
        return [_raw(image, cut, loaded, *values) for image, cut, *values in found]


_Cut = tuple[slice, slice, slice]
_FAR_TOO_LONG = 4  # most of such a photo would not be seen
_SAME_SHAPE = 1.15  # how far shapes may differ: those of models are rounded to multiples of 32 px


def _cut(image: torch.Tensor, pipe: DiffusionADPipeline, familiarity: Familiarity | None) -> _Cut:
    """
    The part of an image that a model looks at.

    Models have the shape of the photos that they were trained on, and squeeze others into it. Of a photo of another
    shape it is the middle, unless the model knows photos that were squeezed as this one would be.
    """
    (height, width), (h, w) = image.shape[1:], pipe.size
    everything = (slice(None), slice(0, height), slice(0, width))
    wider = (width / height) / (w / h)
    other_shape = _SAME_SHAPE < max(wider, 1 / wider) < _FAR_TOO_LONG
    if not other_shape or familiarity is None or pipe.tile != pipe.size:
        return everything
    inner_h, inner_w = (height, round(height * w / h)) if wider > 1 else (round(width * h / w), width)
    top, left = (height - inner_h) // 2, (width - inner_w) // 2
    middle = (slice(None), slice(top, top + inner_h), slice(left, left + inner_w))
    return min(everything, middle, key=lambda cut: familiarity.strangeness(resize_image(image[cut], pipe.size)))


def _raw(
    image: torch.Tensor,
    cut: _Cut,
    pipe: DiffusionADPipeline,
    score: np.ndarray,
    anomaly_map: np.ndarray,
    normal: np.ndarray,
) -> Raw:
    """A model's answer on a part of an image, as one on all of it: the rest is not anomalous, and stays as it is."""
    grid, normal = describe(resize_image(image[cut], pipe.config.image_size)), to_uint8(normal)
    rows, columns = cut[1:]
    (height, width), (h, w) = image.shape[1:], (rows.stop - rows.start, columns.stop - columns.start)
    if (h, w) == (height, width):
        return Raw(float(score), anomaly_map, normal, grid)
    inner_h, inner_w = anomaly_map.shape
    size = (round(inner_h * height / h), round(inner_w * width / w))
    top, left = round(inner_h * rows.start / h), round(inner_w * columns.start / w)
    inner = np.s_[top : top + inner_h, left : left + inner_w]
    whole, surroundings = np.zeros(size, np.float32), to_uint8(resize_image(image, size))
    photo = np.ascontiguousarray(surroundings.permute(1, 2, 0).numpy())
    whole[inner], photo[inner] = anomaly_map, normal
    shape = "wider" if width > w else "higher"
    note = f"It is {shape} than photos the model knows: only the middle, {w} × {h} px, was inspected."
    return Raw(float(score), whole, photo, grid, note, is_whole=False)


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


def _call(pipe: DiffusionADPipeline, images: list[torch.Tensor], settings: Settings):
    return infer(
        pipe,
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
        self._used: list[Model] = []  # those loaded, the last used one last
        self._lock = threading.Lock()

    def teach(self, key: str, name: str, folder: Path) -> None:
        """Adds a visitor's own product, which whoever has its key can use and nobody else sees."""
        self.models[key] = Model(name, str(folder), key)

    def forget(self, key: str) -> None:
        """Removes a visitor's own product."""
        self.models.pop(key, None)

    def known(self, name: str | None) -> Model:
        """The model of a category, or of a visitor's own product by its key; a ModelError if there is none."""
        model = self.models.get(name or "")
        if model is None:
            there = ", ".join(self.names) or "none"
            raise ModelError(f"There is no category {str(name)[:80]!r}. There are: {there}.")
        return model

    def get(self, name: str | None) -> Model:
        """As [`known`], loaded; a ModelError if it cannot be loaded."""
        model = self.known(name)
        model.load()
        with self._lock:
            self._used = [*(used for used in self._used if used is not model), model]
            while len(self._used) > MOST_LOADED:
                self._used.pop(0).pipe = None  # a call that runs holds its own reference
        return model


def _is_model(folder: Path) -> bool:
    """Whether a pipeline or an exported model lies there."""
    names = (DiffusionADPipeline.config_name, ExportedDiffusionADPipeline.config_name)
    return any((folder / name).is_file() for name in names)


def _find(source: str) -> list[str]:
    folder = Path(source)
    if folder.is_dir():
        folders = [folder] if _is_model(folder) else sorted(filter(_is_model, folder.iterdir()))
        if not folders:
            logger.warning("%s: holds no model, nor folders of models", source)
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


@dataclass(frozen=True)
class Example:
    """A photo to try a model on."""

    path: Path

    @property
    def is_good(self) -> bool:
        return self.path.stem.startswith("good")

    @property
    def label(self) -> str:
        """What it shows, as its file's name says: "good", or the kind of defect."""
        return re.sub(r"-\d+$", "", self.path.stem).replace("-", " ")[:40]


@dataclass(frozen=True)
class Product:
    """What is known of a model without loading it: its photos, and what its card says."""

    name: str
    title: str
    facts: str = "no card"
    source: str = ""  # of its photos
    examples: tuple[Example, ...] = ()

    @classmethod
    def of(cls, model: Model) -> "Product":
        """Never fails."""
        examples = tuple(model.examples())
        title = model.name.rpartition("/")[2]
        try:
            card = model.card()
            if card is None:
                return cls(model.name, title, examples=examples)
            data = cast(ModelCardData, card.data)
            auroc = next((r for r in data.eval_results or [] if r.metric_type == "image_auroc"), None)
            is_known = auroc is not None and isinstance(auroc.metric_value, float)
            measured = f"image AUROC {_measured(auroc, model.evaluation())}" if is_known else "accuracy not measured"
            origin = {"rendered": "rendered images", "photographed": "real photos"}.get(data.get("data_origin"), "")
            licence = _licence(str(data.get("data_license") or "")[:40])
            author = str(data.get("data_attribution") or "")[:120]
            facts = " · ".join(filter(None, (measured, ", ".join(filter(None, (origin, licence))))))
            source = author and ", ".join(filter(None, (author, licence)))
            return cls(model.name, str(data.get("category") or title)[:60], facts, source, examples)
        except (ValueError, TypeError, AttributeError):
            return cls(model.name, title, "its card cannot be read", examples=examples)


def products(models: Models) -> list[Product]:
    """What is known of all models. The Hub is asked for all at once, and not waited for where it does not answer."""
    pool = ThreadPoolExecutor(8)
    asked = {model.name: pool.submit(Product.of, model) for model in models.models.values()}
    wait(asked.values(), timeout=_HUB_SECONDS)
    pool.shutdown(wait=False)
    return [
        found.result() if found.done() else Product(name, name.rpartition("/")[2], "the Hub did not answer")
        for name, found in asked.items()
    ]


def _licence(identifier: str) -> str:
    """The Hub's identifier as people write it: "CC BY-SA 4.0"."""
    return re.sub(r"^CC-(.+)-(\d)", r"CC \1 \2", identifier.upper())


def _cell(value: object) -> str:
    """A value of a card's table; what is neither number nor text may be of any size."""
    if isinstance(value, float):
        return f"{value:.3f}"
    return str(value)[:200] if isinstance(value, (str, int)) else "?"


def _measured(result: EvalResult, evaluation: dict) -> str:
    """A value of a card with its 95 % interval, if the evaluation is that of the card."""
    with suppress(KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError):
        if math.isclose(evaluation[result.metric_type], result.metric_value, abs_tol=1e-6):
            return show(evaluation, result.metric_type)[:60]
    return _cell(result.metric_value)


def about(models: Models, name: str) -> str:
    """Markdown on a model from its card: size and calibration, metrics, limits. Never fails."""
    try:
        model = models.get(name)
    except ModelError as error:
        return f"## {name}\n\n{error}"
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
    lines = [f"## {model.name}", "", known]
    try:
        card = model.card()
        if card is None:
            return "\n".join([*lines, "", "It comes without a card: nothing is known of its accuracy."])
        results, evaluation = cast(ModelCardData, card.data).eval_results or [], model.evaluation()
        rows = [
            (result.metric_name or result.metric_type, _measured(result, evaluation), result.dataset_name)
            for result in results
        ]
    except (ValueError, TypeError, AttributeError):
        return "\n".join([*lines, "", "Its card cannot be read."])
    if rows:
        lines += ["", "| metric | value [95 % interval] | measured on |", "| --- | --- | --- |"]
        lines += [f"| {' | '.join(map(_cell, row))} |" for row in rows]
    limits = re.search(r"^#.*\blimit.*((?:\n(?!#).*)*)", card.text, re.IGNORECASE | re.MULTILINE)
    if limits and limits[1].strip():
        lines += ["", "### Limits", "", limits[1].strip()]
    return "\n".join(lines)
