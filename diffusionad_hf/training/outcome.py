"""What a training leaves: the curve, the best weights so far, and in the end the calibrated pipeline."""

import copy
import csv
import io
import logging
import math
import shlex
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.stats import mannwhitneyu, wilcoxon

from ..calibration import calibrate
from ..data import check_images
from ..evaluation.evaluator import evaluate_pipeline
from ..evaluation.intervals import show
from ..evaluation.metrics import image_metrics, pixel_metrics
from ..evaluation.plots import plot_worst
from ..familiarity_diffusionad import MOST_IMAGES, Familiarity, describe, pixel_digest
from ..files import replace_file, replace_folder, write_json
from ..hub.publishing import EXAMPLES
from ..images_diffusionad import to_uint8
from ..pipeline_diffusionad import DiffusionADPipeline
from ..verdicts_diffusionad import ANOMALOUS, NORMAL, UNDECIDED
from ..visualization import overlay, save_image, side_by_side
from .arguments import TrainingConfig
from .dataset import NormalImages, spread
from .feedback import Feedback
from .look import Photos
from .losses import DiffusionADObjective
from .progress import Progress
from .report import write_training_report
from .synthesis import AnomalySynthesizer

logger = logging.getLogger("training")

# Written last: its presence means that the training is finished.
ARGUMENTS_FILE = "training_arguments.json"
EVALUATION_FILE = "evaluation.json"
PICTURE_FILE = "progress.png"
CURVE_FILE = "training_curve.csv"
REPORT_FILE = "report.html"
# Local paths, which do not belong in a published model.
_PATHS = {"data_dir", "texture_dir", "foreground_dir", "output_dir", "init_from", "resume_from_checkpoint", "feedback"}
# Beyond every epoch of a training, so that no training anomaly is used for validation.
_VALIDATION_EPOCH = 2**31
_MOST_IMAGES = 64
# The chance at which a model that learnt nothing passes as one that did.
_CHANCE = 0.01
# Held-out images that it takes to pass: if all of n scores rise, the p-value of the rise is 2 ** -n.
FEWEST_HELD_OUT = math.ceil(-math.log2(_CHANCE))


class Validation:
    """A fixed set of at most 64 held-out images, as they are and, up to 64 times in all, with a synthetic defect."""

    def __init__(self, held_out: NormalImages, synthesizer: AnomalySynthesizer):
        rows = range(min(len(held_out), _MOST_IMAGES))
        self.size, self.count = held_out.size, len(rows)
        images = torch.stack([held_out.read(row) for row in rows])
        masks = held_out.foregrounds
        foregrounds = None if masks is None else torch.stack([masks[row] for row in rows])
        # The fewer the images, the more defects on each: one is too few to tell good weights from better ones.
        draws = range(max(1, _MOST_IMAGES // len(rows)))
        drawn = [synthesizer(images, rows, _VALIDATION_EPOCH + draw, foregrounds) for draw in draws]
        self.images = torch.cat([images, *(made.images for made in drawn)])
        self.masks = torch.cat([torch.zeros_like(drawn[0].masks), *(made.masks for made in drawn)])
        self.labels = torch.cat([torch.zeros_like(drawn[0].labels), *(made.labels for made in drawn)])

    def __call__(self, pipe: DiffusionADPipeline) -> dict[str, float]:
        """Image AUROC, pixel AUROC, pixel AP, AUPRO, and `score`, by which models are chosen.

        The score is the mean of image AUROC, which saturates early, and pixel AP, which tells good from better.
        """
        output = pipe(self.images)
        metrics: dict[str, float] = image_metrics(output.anomaly_score, self.labels.numpy())
        metrics.update(pixel_metrics(output.anomaly_map, list(self.masks[:, 0].numpy())))
        names = ("image_auroc", "pixel_auroc", "pixel_ap", "aupro_30")
        chosen = {name: metrics[name] for name in names if name in metrics}
        # If no defect could be synthesised on the held-out images, both are absent.
        chosen["score"] = (chosen.get("image_auroc", 0.0) + chosen.get("pixel_ap", 0.0)) / 2
        return chosen

    def snapshot(self, source: DiffusionADObjective) -> DiffusionADPipeline:
        """The weights as they are, as a pipeline that gives no verdicts: nothing says yet that it has learnt."""
        networks = copy.deepcopy(source.unet), copy.deepcopy(source.segmenter)
        pipe = DiffusionADPipeline(*networks, source.scheduler, self.size, has_learnt=False)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def picture(self, pipe: DiffusionADPipeline) -> Image.Image:
        """A held-out image with a synthetic defect, its reconstruction and its anomaly map, side by side."""
        row = int(self.masks.flatten(1).mean(1).argmax())
        output = pipe(self.images[row : row + 1])
        photo, reconstruction = (
            Image.fromarray(to_uint8(torch.as_tensor(pixels)).numpy())
            for pixels in (self.images[row].permute(1, 2, 0), output.reconstruction[0])
        )
        return side_by_side([photo, reconstruction, overlay(photo, output.anomaly_map[0])])

    def is_passed_by(self, pipe: DiffusionADPipeline) -> bool:
        """
        Whether a defect clearly raises the pipeline's score of an image.

        Chance must be ruled out at 1 % (one-sided Wilcoxon signed-rank test: the mean score of each image with its
        defects against that without, which takes 7 held-out images or more), not at 5 %, since the best of several
        validations was kept. And the AUROC must be at least 0.65: on many images a rise can be certain and of no use.
        The defects are subtle: 0.73 on 12 held-out photos went with 0.95 on real defects.
        """
        scores, labels = np.asarray(pipe(self.images).anomaly_score, float), self.labels.numpy().astype(bool)
        alone, changed = scores[: self.count], scores[self.count :].reshape(-1, self.count)
        is_defective = labels[self.count :].reshape(changed.shape)
        drawn = is_defective.sum(axis=0)
        rise = ((changed * is_defective).sum(axis=0) - drawn * alone)[drawn > 0] / drawn[drawn > 0]
        if not rise.any():
            return False
        auroc = mannwhitneyu(changed[is_defective], alone).statistic / (is_defective.sum() * self.count)
        return bool(wilcoxon(rise, alternative="greater").pvalue <= _CHANCE and auroc >= 0.65)


def observe(
    source: DiffusionADObjective,
    validation: Validation,
    output_dir: Path,
    state: dict[str, Any],
    progress: Progress,
    validates: bool,
) -> dict[str, float] | None:
    """Draws what the weights make of a held-out image and, if asked to, measures them and keeps the best so far as the
    pipeline folder `best`."""
    pipe, metrics = validation.snapshot(source), None
    if validates:
        metrics = validation(pipe)
        progress.update(validation={"step": state["step"], **metrics})
        if is_better(metrics, state["best"]):
            state["best"] = {"step": state["step"], **metrics}
            replace_folder(output_dir / "best", pipe.save_pretrained)
    save_image(validation.picture(pipe), output_dir / PICTURE_FILE)
    progress.update(picture=PICTURE_FILE, picture_step=state["step"])
    return metrics


def is_better(metrics: dict[str, float], best: dict[str, float] | None) -> bool:
    return best is None or metrics["score"] > best["score"]


def finish(
    args: TrainingConfig,
    arguments: dict[str, Any],
    train_set: NormalImages,
    held_out: NormalImages,
    validation: Validation,
    trained: DiffusionADPipeline,
    weights: Path,
    complete: bool,
) -> DiffusionADPipeline:
    """
    Writes the best weights into the output folder, as a pipeline calibrated on held-out normal images that knows
    what it was trained on, what normal images look like, and whether it has learnt to tell defects.

    Args:
        trained: The pipeline that was trained, for where it computes and what it had been trained on before.
        weights: The pipeline folder that they are in.
        complete: Whether nothing is left to train.
    """
    output_dir = Path(args.output_dir)
    dtype = getattr(torch, args.save_dtype)
    DiffusionADPipeline.from_pretrained(weights, dtype=dtype).save_pretrained(output_dir)
    # Calibrated as it will be used: with the weights as they were saved, computing in float32.
    pipe = DiffusionADPipeline.from_pretrained(output_dir, dtype=torch.float32).to(trained.device)
    pipe.set_progress_bar_config(desc="calibrating")
    pipe.register_to_config(value_range=args.value_range)
    # At the model's size, as maps and reconstructions of large photos would fill the memory.
    images = [held_out.read(i) for i in range(len(held_out))]
    calibrate(pipe, images, false_alarm_rate=args.false_alarm_rate)
    # What does not learn from images may also look at those that were trained on.
    some = [describe(image) for image in images[:MOST_IMAGES]]
    some += [describe(train_set.pixels(i)) for i in spread(len(train_set), MOST_IMAGES - len(some))]
    familiarity = Familiarity.of(some)
    pipe.register_to_config(
        familiarity=None if familiarity is None else familiarity.to_json(),
        training_digests=(trained.config.training_digests or "")
        + "".join(pixel_digest(train_set.pixels(i)) for i in range(len(train_set))),
        has_learnt=validation.is_passed_by(pipe),
    )
    pipe.save_config(output_dir)
    save_examples(validation, output_dir)
    if complete:
        write_json(output_dir / ARGUMENTS_FILE, {name: arguments[name] for name in arguments if name not in _PATHS})
    logger.info(
        f"Wrote {output_dir}: threshold {pipe.threshold:.4f} at a false-alarm rate of "
        f"{pipe.config.false_alarm_rate:.1%}, calibrated on {len(images)} held-out normal images."
    )
    if not pipe.config.has_learnt:
        logger.warning(
            "This model has not learnt to tell defects: on held-out images it does not clearly beat chance, so all "
            "its verdicts are undecided. Train for more steps, or on more images."
        )
    return pipe


def save_examples(validation: Validation, output_dir: Path) -> None:
    """Saves photos to try the model on, at its size: two held-out ones, and two with a synthetic defect."""
    defective = [row for row, label in enumerate(validation.labels) if label]
    for name, rows in (("good", range(validation.count)), ("synthetic-defect", defective)):
        for number, row in enumerate(rows[:2], 1):
            pixels = to_uint8(validation.images[row]).permute(1, 2, 0).contiguous().numpy()
            suffix = f"-{number}" if number > 1 else ""
            save_image(Image.fromarray(pixels), output_dir / EXAMPLES / f"{name}{suffix}.png")


def finish_so_far(
    ending: Callable[..., DiffusionADPipeline],
    source: DiffusionADObjective,
    validation: Validation,
    output_dir: Path,
    state: dict[str, Any],
) -> DiffusionADPipeline:
    """As [`finish`], of a stopped training, with its weights now if they are the best; the training that goes on knows
    nothing of it."""
    pipe, folder = validation.snapshot(source), output_dir / "so_far"
    if not is_better(validation(pipe), state["best"]):
        return ending(output_dir / "best", complete=False)
    try:
        replace_folder(folder, pipe.save_pretrained)
        return ending(folder, complete=False)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def conclude(
    pipe: DiffusionADPipeline,
    args: TrainingConfig,
    photos: Photos,
    validation: Validation,
    progress: Progress,
    stopped: bool,
) -> None:
    """Measures the model where something is known of the truth, writes the report, and says what to do next."""
    output_dir, notes, worst = Path(args.output_dir), list(progress.notes), None
    if line := _measure_feedback(pipe, photos.feedback):
        print(line, flush=True)
        notes.append(line)
    if len(photos.test) and not stopped:
        progress.update(phase="evaluating", notes=notes)
        line, worst = _evaluate(pipe, photos.test, output_dir)
        print(line, flush=True)
        notes.append(line)
    # Each held-out image as it is and with its first defect.
    shown = slice(2 * validation.count)
    write_training_report(
        output_dir / REPORT_FILE,
        pipe,
        validation.images[shown],
        validation.labels[shown],
        plan=progress.plan,
        notes=notes,
        curve=output_dir / CURVE_FILE,
        preview=None if progress.preview is None else output_dir / progress.preview,
        worst=worst,
    )
    print(f"Report: {output_dir / REPORT_FILE}")
    print(next_steps(args), flush=True)
    progress.update(phase="stopped" if stopped else "done", seconds_left=0.0, notes=notes)


def next_steps(args: TrainingConfig) -> str:
    """The commands to type next."""
    model, folder = Path(args.output_dir), Path(args.data_dir).expanduser()
    lines = [f"In the browser:  diffusionad serve --model {shlex.quote(str(model))}"]
    own = folder / (args.category or "")
    for photos in (own / "test", folder / "test", own, folder):
        if photos.is_dir():
            command = ["diffusionad", "inspect", str(photos), "--model", str(model), "--output-dir"]
            lines.append(f"Inspect photos:  {shlex.join([*command, str(Path('outputs', model.name))])}")
            break
    return "\n".join(lines)


def _measure_feedback(pipe: DiffusionADPipeline, feedback: Feedback) -> str:
    parts = []
    for words, files, wanted in (
        ("confirmed as fine are normal", feedback.fine, NORMAL),
        ("marked as defects are anomalous", feedback.defects, ANOMALOUS),
    ):
        if files:
            found = [pipe(file).verdict[0].word for file in files]
            undecided = found.count(UNDECIDED)
            parts.append(
                f"{found.count(wanted)} of {len(files)} {words} now"
                + (f", {undecided} undecided" if undecided else "")
            )
    return f"Feedback: {'; '.join(parts)}." if parts else ""


def _evaluate(pipe: DiffusionADPipeline, test: Any, output_dir: Path) -> tuple[str, Any]:
    """Writes `evaluation.json`; returns its main numbers, or why there are none, and a figure of the worst cases."""
    try:
        usable, _ = check_images(test, pipe.config.value_range)
        result = evaluate_pipeline(pipe, usable)
    except ValueError as error:
        return f"Not evaluated on the test images: {error}", None
    result.save_json(output_dir / EVALUATION_FILE)
    names = {"image_auroc": "image AUROC", "false_alarm_rate": "false alarms", "miss_rate": "misses"}
    found = [f"{name} {show(result.metrics, key)}" for key, name in names.items() if key in result.metrics]
    line = f"On {len(usable)} test images (95 % intervals): {', '.join(found)}; all in {output_dir / EVALUATION_FILE}."
    return line, plot_worst(result, usable)


class Curve:
    """The losses and validation metrics as a CSV file; a resumed training drops the rows after its step."""

    def __init__(self, path: Path, step: int):
        self.path = path
        self.rows: list[dict[str, Any]] = []
        if step and path.is_file():
            with path.open(newline="", encoding="utf-8") as file:
                self.rows = [row for row in csv.DictReader(file) if int(row["step"]) <= step]
        self.started = time.monotonic() - (float(self.rows[-1]["seconds"]) if self.rows else 0)

    def write(self, step: int, losses: dict[str, float], metrics: dict[str, float]) -> None:
        row: dict[str, Any] = {"step": step, "seconds": round(time.monotonic() - self.started, 1)}
        row |= {name: f"{value:.6f}" for name, value in losses.items()}
        row |= {f"validation_{name}": f"{value:.6f}" for name, value in metrics.items()}
        self.rows.append(row)
        text = io.StringIO(newline="")
        # Some rows have fewer metrics, see `Validation`.
        writer = csv.DictWriter(text, fieldnames=list(dict.fromkeys(name for row in self.rows for name in row)))
        writer.writeheader()
        writer.writerows(self.rows)
        replace_file(self.path, text.getvalue())
