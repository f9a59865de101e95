"""Model cards, written from the files of a model: what it is, what was measured, and what is not known."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import safe_open

from ..calibration import images_needed
from ..evaluation.intervals import show, show_parts
from ..evaluation.metrics import METRIC_NAMES
from ..files import one_line, slug
from ..pipeline_diffusionad import DiffusionADPipeline

TEMPLATE = Path(__file__).with_name("model_card.md")
TRAINING_NOTES = "TRAINING.md"
"""The maker's notes on how a model was trained; the card links to them."""

# Error rates of the verdicts, shown in per cent below the metrics.
_RATES = {"false_alarm_rate": "false alarms (normal images rejected)", "miss_rate": "misses (anomalous images passed)"}
# The columns of the table by kind of defect; all metrics would not fit on a page.
_TYPE_COLUMNS = ("image_auroc", "pixel_auroc", "aupro_30", "miss_rate")
# Kinds of defect with a higher miss rate are listed among the model's limits.
_MOSTLY_MISSED = 0.5
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_NON_COMMERCIAL = re.compile(r"(^|[-_ ])nc([-_ ]|$)", re.IGNORECASE)


@dataclass(frozen=True)
class DataSource:
    """A dataset: its name, the Hub's identifier of its licence if known, home page and how images were made."""

    name: str
    license: str | None = None
    url: str | None = None
    origin: str = "photographed"

    @property
    def slug(self) -> str:
        """The name as a tag: `"mvtec-ad"` for `"MVTec AD"`."""
        return slug(self.name)


DATASETS = (
    DataSource("MVTec AD", "cc-by-nc-sa-4.0", "https://www.mvtec.com/company/research/datasets/mvtec-ad"),
    DataSource("VisA", "cc-by-4.0", "https://github.com/amazon-science/spot-diff"),
    DataSource(
        "Amazon Lookout for Vision samples", "cc-by-sa-4.0", "https://github.com/aws-samples/amazon-lookout-for-vision"
    ),
    DataSource("Demo part", "mit", origin="rendered"),
)
"""Datasets whose licence is known."""


def find_data_source(name: str) -> DataSource:
    """
    Finds a dataset in any spelling: `"mvtec"`, `"MVTec-AD"` and `"mvtec_ad"` are the same. Other names are allowed.

    Raises:
        ValueError: If the name has no letter or digit.
    """
    asked = DataSource(name.strip())
    if not asked.slug:
        raise ValueError(f'`dataset` "{name}": give a name such as "MVTec AD".')
    for known in DATASETS:
        if asked.slug == known.slug or asked.slug == known.slug.removesuffix("-ad"):
            return known
    return asked


def read_evaluation(path: Path, pipe: DiffusionADPipeline) -> dict[str, Any]:
    """
    Reads a result of `diffusionad evaluate`.

    Raises:
        ValueError: If it is no such file, or was measured at another resolution or threshold than those of `pipe`.
    """
    try:
        evaluation = json.loads(path.read_text(encoding="utf-8"))
        counts = [evaluation[name] for name in ("num_images", "num_normal", "num_anomalous")]
        if not all(isinstance(count, int) for count in counts):
            raise TypeError("the numbers of images are missing")
        for results in (evaluation, *evaluation.get("defect_types", {}).values()):
            for name in METRIC_NAMES.keys() & results.keys():
                results[name] = float(results[name])
                if not 0 <= results[name] <= 1:
                    raise ValueError(f"{name} is {results[name]}")
    except (ValueError, TypeError, KeyError, AttributeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path}: not a result of `diffusionad evaluate` ({one_line(error)}); evaluate again."
        ) from error
    resolution, threshold = evaluation.get("resolution"), evaluation.get("threshold")
    if resolution is not None and resolution != pipe.config.image_size:
        raise ValueError(
            f"{path}: measured at {resolution} px, but the model looks at {pipe.config.image_size} px; evaluate again."
        )
    now = pipe.threshold
    if "false_alarm_rate" in evaluation or "miss_rate" in evaluation:
        # The file omits an infinite threshold.
        then = math.inf if threshold is None else threshold
        if now is None or not (now == then or math.isclose(now, then, rel_tol=1e-6)):
            raise ValueError(
                f"{path}: its rates were measured at the threshold {then:g}, but the model's is {now}; evaluate again."
            )
    return evaluation


def read_training(path: Path) -> dict[str, Any]:
    """Reads the options that the trainer recorded, if any; raises `ValueError` if the file is damaged."""
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: damaged ({error}); delete it or train again.") from error


def build_card(
    pipe: DiffusionADPipeline,
    repo_id: str,
    *,
    evaluation: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
    data: DataSource | None = None,
    category: str | None = None,
    license: str | None = None,
    previews: Sequence[str] = (),
    folder: Path | None = None,
) -> ModelCard:
    """
    Writes the card of a model; its `validate` asks the Hub to check it.

    Args:
        pipe: The model.
        repo_id: The repo that will hold it.
        evaluation: From [`read_evaluation`]; without it, the card says that nothing was measured.
        training: From [`read_training`].
        data: Dataset that it was trained and evaluated on.
        category: Category of the dataset.
        license: Identifier of the weights' licence; by default that of the data.
        previews: File names of the pictures in the folder `previews`.
        folder: The saved model, to describe its files.
    """
    license = license or (data.license if data else None)
    origin: dict[str, Any] = (
        {"data_origin": data.origin, "data_license": data.license} if data in DATASETS and data else {}
    )
    metadata = ModelCardData(
        library_name="diffusers",
        # The Hub has no task for anomaly detection.
        pipeline_tag="image-segmentation",
        license=license,
        tags=["anomaly-detection", "diffusionad"]
        + [tag for tag in (data.slug if data else "", slug(category or "")) if tag],
        model_name=repo_id.split("/")[-1],
        eval_results=_eval_results(evaluation, data, category) if evaluation else None,
        # Not a field of the Hub's; `diffusionad list` shows it.
        category=category,
        # Nor these; the web demo shows them.
        **origin,
    )
    verdict = pipe.calibration.verdict(0)
    return ModelCard.from_template(
        metadata,
        template_path=str(TEMPLATE),
        repo_id=repo_id,
        category=category,
        data=data and {**vars(data), "non_commercial": bool(data.license and _NON_COMMERCIAL.search(data.license))},
        previews=list(previews),
        weights=_weights_sentence(folder) if folder else "",
        has_modules=bool(folder and (folder / "pipeline_diffusionad.py").is_file()),
        has_training_notes=bool(folder and (folder / TRAINING_NOTES).is_file()),
        threshold=pipe.threshold,
        calibration=_calibration(pipe),
        has_learnt=pipe.config.has_learnt,
        unsupported=verdict.sentence if verdict.reason in ("settings_changed", "no_difference") else "",
        is_familiar_known=pipe.config.familiarity is not None,
        evaluation=evaluation,
        metrics=_metric_rows(evaluation) if evaluation else [],
        defect_types=_defect_types(evaluation or {}),
        training=training or {},
        parameters=sum(p.numel() for model in (pipe.unet, pipe.segmenter) for p in model.parameters()),
        height=pipe.size[0],
        width=pipe.size[1],
        tiles=f"{pipe.tile[1]} x {pipe.tile[0]}" if pipe.tile != pipe.size else None,
        has_encoder=bool(pipe.segmenter.config.get("encoder")),
    )


def _eval_results(evaluation: dict[str, Any], data: DataSource | None, category: str | None) -> list[EvalResult]:
    data = data or DataSource("unnamed dataset")
    return [
        EvalResult(
            task_type="image-segmentation",
            task_name="Anomaly detection",
            dataset_type=data.slug,
            dataset_name=f"{data.name} ({category})" if category else data.name,
            dataset_config=category,
            dataset_split="test",
            metric_type=key,
            metric_name=name,
            metric_value=evaluation[key],
        )
        for key, name in METRIC_NAMES.items()
        if key in evaluation
    ]


def _calibration(pipe: DiffusionADPipeline) -> dict[str, Any] | None:
    if pipe.config.calibration_scores is None:
        return None
    images, rate = len(pipe.config.calibration_scores), pipe.config.false_alarm_rate
    return {
        "images": images,
        "rate": rate,
        "needed": images_needed(rate),
        "spread": math.sqrt(rate * (1 - rate) / images),
        "overridden": pipe.config.threshold is not None,
    }


def _metric_rows(evaluation: dict[str, Any]) -> list[dict[str, str]]:
    shown = {key: show_parts(evaluation, key) for key in (METRIC_NAMES | _RATES) if key in evaluation}
    return [
        {"name": (METRIC_NAMES | _RATES)[key], "value": value, "interval": " to ".join(interval)}
        for key, (value, *interval) in shown.items()
    ]


def _defect_types(evaluation: dict[str, Any]) -> dict[str, list]:
    """The table by kind of defect, with the columns that at least one kind has a value for."""
    types = evaluation.get("defect_types", {})
    columns = [key for key in _TYPE_COLUMNS if any(key in results for results in types.values())]
    rows = [
        {
            "name": name,
            "images": results.get("num_anomalous", ""),
            "cells": [show(results, key) if key in results else "" for key in columns],
        }
        for name, results in types.items()
    ]
    missed = [
        {"name": name, "rate": show_parts(results, "miss_rate")[0]}
        for name, results in types.items()
        if results.get("miss_rate", 0) > _MOSTLY_MISSED
    ]
    names = ["misses" if key == "miss_rate" else METRIC_NAMES[key] for key in columns]
    return {"columns": names, "rows": rows, "missed": missed}


def _weights_sentence(folder: Path) -> str:
    """The types of the saved weights, by variant."""
    dtypes: dict[str, str] = {}
    for file in sorted((folder / "unet").glob("*.safetensors")):
        variant = file.name.removesuffix(".safetensors").partition(".")[2]
        with safe_open(file, framework="np") as weights:
            dtype = weights.get_slice(next(iter(weights.keys()))).get_dtype()
        dtypes.setdefault(variant, _DTYPES.get(dtype, dtype))
    stored = dtypes.pop("", None)
    if stored is None:
        return ""
    sentence = f"The weights are {stored}" + ("" if stored == "float32" else " and compute in float32")
    for name, dtype in dtypes.items():
        sentence += f'; `variant="{name}"` loads them as {dtype}' if dtype != stored else ""
    return sentence + "."
