"""95 % intervals that cover at small n and at 0 and 1, and that always hold the estimate.

All are exact binomial intervals for an effective number of images: as many yes-or-no answers as would leave the same
uncertainty (Korn & Graubard, Survey Methodology 24, 1998). How often they cover: `python -m benchmarks intervals`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy.stats import beta, norm, t


def exact_interval(share: float, n: float) -> list[float]:
    """Clopper & Pearson's (Biometrika 26, 1934) for a share of `n` observations, which need not be a whole number."""
    found = share * n
    low = float(beta.ppf(0.025, found, n - found + 1)) if found > 0 else 0.0
    high = float(beta.ppf(0.975, found + 1, n - found)) if found < n else 1.0
    return [min(low, share), max(high, share)]


def effective_interval(value: float, n: float, images: int) -> list[float]:
    """`exact_interval` for an effective number of images `n` that was estimated from `images` independent ones.

    `n` is lowered by the square of the ratio of a normal to a Student quantile (Korn & Graubard). A single image tells
    nothing of how images differ: [0, 1].
    """
    if images < 2:
        return [0.0, 1.0]
    return exact_interval(value, n * float(norm.ppf(0.975) / t.ppf(0.975, images - 1)) ** 2)


def auroc_interval(auroc: float, normal: np.ndarray, anomalous: np.ndarray) -> list[float]:
    """For the AUROC of the scores of the `normal` and the `anomalous` images.

    The variance is the greater of Hanley & McNeil's (Radiology 143, 1982, with Newcombe's mean of both sample sizes:
    Statistics in Medicine 25, 2006, method 5), which holds at 0 and 1 too, and DeLong's (Biometrics 44, 1988), which
    sees a kind of defect that is missed altogether.
    """
    m, n = len(normal), len(anomalous)
    if min(m, n) < 2:
        return [0.0, 1.0]
    # Both divided by auroc (1 - auroc), the variance of one yes-or-no answer.
    inverse = (1 + ((m + n) / 2 - 1) * ((1 - auroc) / (2 - auroc) + auroc / (1 + auroc))) / (m * n)
    if 0 < auroc < 1:
        delong = 0.0
        for scores, others in ((normal, np.sort(anomalous)), (anomalous, np.sort(normal))):
            beaten = (np.searchsorted(others, scores) + np.searchsorted(others, scores, side="right")) / 2
            delong += np.var(beaten / len(others), ddof=1) / len(scores)
        inverse = max(inverse, delong / (auroc * (1 - auroc)))
    return effective_interval(auroc, 1 / inverse, min(m, n))


def image_intervals(metrics: dict[str, float], scores: np.ndarray, labels: np.ndarray) -> dict[str, list[float]]:
    """For the values of `image_metrics`: `auroc_interval`; AP and F1-max as shares of the anomalous images.

    So Boyd, Eng & Page (ECML 2013) for AP. For F1-max, which has no customary interval, simulations speak.
    """
    normal, anomalous = scores[labels == 0], scores[labels == 1]
    return {
        name: auroc_interval(value, normal, anomalous)
        if name == "image_auroc"
        else exact_interval(value, len(anomalous))
        for name, value in metrics.items()
    }


def bootstrap_interval(value: float, samples: np.ndarray, images: int) -> list[float]:
    """From the variance of bootstrap `samples` of a metric in [0, 1] over `images` independent images.

    The effective number of images is at most three times theirs: without a bound, a test set that happens to lack a
    rare kind of defect would promise that there is none.
    """
    variance, bound = float(np.var(samples)), 3.0 * images
    if variance > 0 and 0 < value < 1:
        bound = min(bound, value * (1 - value) / variance)
    return effective_interval(value, bound, images)


def show_parts(results: dict[str, Any], key: str) -> list[str]:
    """A metric or rate of an evaluation and the ends of its interval, if any, with the decimals that this supports.

    These are 2 for a width of 0.1 and more, and 4 at most (of rates: two fewer, in per cent).
    """
    interval = results.get("intervals", {}).get(key) or []
    width = interval[1] - interval[0] if interval else 0.0
    decimals = min(max(1 - math.floor(math.log10(width)), 2), 4) if width > 0 else 3
    values = [results[key], *interval]
    if key.endswith("_rate"):
        return [f"{100 * value:.{decimals - 2}f} %" for value in values]
    return [f"{value:.{decimals}f}" for value in values]


def show(results: dict[str, Any], key: str) -> str:
    """`show_parts` as text: "0.98 [0.91, 1.00]"."""
    value, *bounds = show_parts(results, key)
    return f"{value} [{', '.join(bounds)}]" if bounds else value
