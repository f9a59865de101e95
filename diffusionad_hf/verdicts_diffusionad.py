"""Verdicts: what a score means, and when it means nothing."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np

# Travels to the Hub beside the pipeline's file, as images_diffusionad.py does: imports nothing of this package, and
# names are added here and never taken away.
__all__ = ["ANOMALOUS", "NORMAL", "UNDECIDED", "Calibration", "Verdict", "conformal_p_value", "conformal_threshold"]

NORMAL, ANOMALOUS, UNDECIDED = "normal", "anomalous", "undecided"

_UNDECIDED = {
    "not_learnt": "This model has not learnt to tell defects.",
    "no_difference": "Nothing can stand out: the normal images calibrated on all score alike, or the highest of all.",
    "unfamiliar": "Unlike any normal image the model knows. Another object, position, distance, light or focus?",
    "settings_changed": "Other settings than the model was calibrated with: nothing is known of false alarms.",
    "not_calibrated": "The model is not calibrated: nothing is known of false alarms.",
    "partly_seen": "Normal where it was looked at, which is only a part of the image.",
}


@dataclass(frozen=True)
class Verdict:
    """
    What is said of an image.

    Args:
        word: `"normal"`, `"anomalous"` or `"undecided"`.
        reason: A code. Decided: `calibrated`, or `own_threshold` if it was set by hand. Undecided: `not_learnt`,
            `no_difference` (between calibration scores, or to the highest possible), `unfamiliar`, `settings_changed`,
            `not_calibrated`, `rate_not_promised` (by so few calibration images), or `partly_seen`.
        sentence: The reason in plain words.
    """

    word: str
    reason: str
    sentence: str

    def __str__(self) -> str:
        return self.word

    @property
    def is_anomalous(self) -> bool | None:
        """`None` if undecided."""
        return None if self.word == UNDECIDED else self.word == ANOMALOUS


@dataclass(frozen=True)
class Calibration:
    """
    What verdicts of a model rest on.

    Args:
        scores: Those of held-out normal images; empty if it is not calibrated.
        false_alarm_rate: Share of normal images that may be called anomalous.
        own_threshold: Decides instead of the calibrated threshold.
        has_learnt: Whether the model passed the test after its training; `None` if there was none.
        settings_changed: Whether the model has other settings now than those that the scores were computed with.
    """

    scores: tuple[float, ...] = ()
    false_alarm_rate: float = 0.05
    own_threshold: float | None = None
    has_learnt: bool | None = None
    settings_changed: bool = False

    @property
    def calibrated_threshold(self) -> float | None:
        """Infinite if so few images cannot promise the rate; `None` without any."""
        return conformal_threshold(self.scores, self.false_alarm_rate) if self.scores else None

    @property
    def threshold(self) -> float | None:
        """Scores above it are anomalous: the one set by hand, else the calibrated one."""
        return self.calibrated_threshold if self.own_threshold is None else self.own_threshold

    @property
    def tells_apart(self) -> bool:
        """Whether some score could be anomalous: not if all scores are equal, nor if the threshold is the highest."""
        threshold = self.calibrated_threshold
        if threshold is None or math.isinf(threshold):
            return True  # which is another reason to be undecided
        return threshold < 1 - 1e-6 and (len(self.scores) == 1 or min(self.scores) < max(self.scores))

    def p_value(self, score: float) -> float | None:
        """`None` if no scores of the model as it is now are known."""
        return float(conformal_p_value(self.scores, score)) if self.scores and not self.settings_changed else None

    def verdict(
        self,
        score: float,
        *,
        is_familiar: bool | None = None,
        settings_changed: bool = False,
        is_whole: bool = True,
    ) -> Verdict:
        """
        Decides on a score, if something supports a decision.

        Args:
            score: The anomaly score.
            is_familiar: Whether the image looks like the normal ones; `None` if that is unknown.
            settings_changed: Whether it was computed with other settings than the calibration's scores.
            is_whole: Whether all of the image was looked at; if not, it may be anomalous, but not normal.
        """
        calibrated, threshold = self.calibrated_threshold, self.threshold
        settings_changed = settings_changed or self.settings_changed
        own = self.own_threshold is not None
        count, rate = len(self.scores), self.false_alarm_rate
        limits = f"{count} normal images cannot promise a false-alarm rate of {percent(rate)}"
        reason = sentence = ""
        if self.has_learnt is False:
            reason = "not_learnt"
        elif not settings_changed and not self.tells_apart:
            reason = "no_difference"
        elif is_familiar is False:
            reason = "unfamiliar"
        elif own:
            if calibrated is None or settings_changed:
                known = "not calibrated" if calibrated is None else "not calibrated with these settings"
            else:
                known = limits if math.isinf(calibrated) else f"calibrated: {calibrated:.4g}"
            reason, sentence = "own_threshold", f"At your threshold {threshold:.4g}; {known}."
        elif settings_changed:
            reason = "settings_changed"
        elif calibrated is None:
            reason = "not_calibrated"
        elif math.isinf(calibrated):
            reason, sentence = "rate_not_promised", f"{limits}; that takes {images_needed(rate)}."
        else:
            reason = "calibrated"
            sentence = f"Calibrated on {count} normal images for a false-alarm rate of {percent(rate)}."
        if reason not in ("own_threshold", "calibrated") or threshold is None:
            return Verdict(UNDECIDED, reason, sentence or _UNDECIDED[reason])
        if not score <= threshold:  # so that NaN is never normal
            return Verdict(ANOMALOUS, reason, sentence)
        return (
            Verdict(NORMAL, reason, sentence)
            if is_whole
            else Verdict(UNDECIDED, "partly_seen", _UNDECIDED["partly_seen"])
        )


def percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def images_needed(false_alarm_rate: float) -> int:
    """The fewest normal images that can promise a false-alarm rate: `1 / rate - 1`."""
    return math.ceil(1 / false_alarm_rate - 1 - 1e-9)


def conformal_p_value(calibration_scores: Sequence[float], score: np.ndarray | float) -> np.ndarray:
    """
    Probability that a normal image scores at least as high (split conformal prediction): `(1 + #{scores >= s}) / (n +
    1)` for n scores of held-out normal images. Takes one score or an array of them.
    """
    ordered = np.sort(np.asarray(calibration_scores, dtype=np.float64))
    at_least = len(ordered) - np.searchsorted(ordered, np.asarray(score, dtype=np.float64), side="left")
    return (1 + at_least) / (len(ordered) + 1)


def conformal_threshold(calibration_scores: Sequence[float], false_alarm_rate: float) -> float:
    """
    The lowest threshold that keeps the false-alarm rate: `score > threshold` if and only if the p-value is at most the
    rate. It is the k-th largest of the n scores, k = floor(rate (n + 1)), or infinity if n is too small for the rate.
    """
    ordered = np.sort(np.asarray(calibration_scores, dtype=np.float64))
    # Tolerates rounding: (1 / 49) * 49 may be just below 1.
    k = int(np.floor(false_alarm_rate * (len(ordered) + 1) + 1e-9))
    return float(ordered[-k]) if k else float("inf")


def check_calibration(calibration_scores: Any, false_alarm_rate: Any, threshold: Any = None) -> None:
    """
    Checks what a verdict depends on, before anything is computed with it.

    Raises:
        ValueError: If the scores are neither `None` nor one or more numbers from 0 to 1, the rate is no number between
            0 and 1, or the threshold neither `None` nor a finite number; the message names the field.
    """
    if calibration_scores is not None:
        # A mean of probabilities may be rounded beyond 1.
        listed = isinstance(calibration_scores, (list, tuple)) and 0 < len(calibration_scores) <= 1_000_000
        if not listed or not all(_is_number(score) and -1e-3 <= score <= 1.001 for score in calibration_scores):
            raise ValueError("calibration_scores: must be one or more numbers from 0 to 1.")
    if not _is_number(false_alarm_rate) or not 0 < false_alarm_rate < 1:
        raise ValueError(f"false_alarm_rate={false_alarm_rate!r:.80}: must be a number between 0 and 1, such as 0.05.")
    if threshold is not None and not _is_number(threshold):
        raise ValueError(f"threshold={threshold!r:.80}: must be a finite number.")


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
