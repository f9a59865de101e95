"""Whether calibrations keep what they promise: false alarms on normal images, over many random calibrations.

    python -m benchmarks promises                                      # the demo part
    python -m benchmarks promises --model runs/bottle --images DIR     # a product of yours

Normal images that the model was not trained on are inspected once. Each split calibrates on n of them, drawn at
random, and counts the false alarms among the others. The promise is one of their mean over calibrations: that of a
single one varies, as `a tenth` and `nine tenths` show.
"""

import tempfile
from pathlib import Path

import numpy as np

from benchmarks.machine import CPU, describe, make_parser, report
from benchmarks.recorded import BENCHMARKS, read_rows
from demo_part.generate import generate
from diffusionad_hf import DiffusionADPipeline
from diffusionad_hf.calibration import promised_rate
from diffusionad_hf.files import bundled
from diffusionad_hf.inspection.inspection import find_images
from diffusionad_hf.verdicts_diffusionad import conformal_threshold

SEED = 77  # of the rendered parts, used for nothing else


def measure(scores: np.ndarray, count: int, rate: float, splits: int, seed: int = 0) -> dict[str, float]:
    """False alarms of `splits` calibrations on `count` of the scores at a rate, or the lowest that so many promise."""
    rng, promised = np.random.default_rng(seed), promised_rate(count, rate)
    alarms = []
    for _ in range(splits):
        shuffled = rng.permutation(scores)
        alarms.append((shuffled[count:] > conformal_threshold(shuffled[:count].tolist(), promised)).mean())
    low, high = np.quantile(alarms, (0.1, 0.9))
    return {"n": count, "promised": promised, "mean": np.mean(alarms), "a tenth": low, "nine tenths": high}


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", default=str(bundled("space") / "checkpoints/demo-part"), help="folder or Hub id")
    parser.add_argument(
        "--images", type=Path, help="folder of normal images that it did not learn from (default: 300 rendered parts)"
    )
    parser.add_argument("--rate", type=float, default=0.05, help="false-alarm rate (default: %(default)s)")
    parser.add_argument("--counts", type=int, nargs="+", default=[5, 10, 19, 39, 99], help="images of a calibration")
    parser.add_argument("--splits", type=int, default=200, help="calibrations a row (default: %(default)s)")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        images = args.images or generate(Path(folder), SEED, train=1, test_good=300, test_defective=0) / "test/good"
        files, _ = find_images([images])
        scores = DiffusionADPipeline.from_pretrained(args.model)([str(file) for file in files]).anomaly_score
    model = {"model": Path(args.model).name}
    rows = [{**model, **measure(scores, n, args.rate, args.splits)} for n in args.counts if n < len(scores)]
    result = {"machine": describe(CPU), "images": len(scores), "splits": args.splits, "rows": rows}
    report(result, args.json, recorded=read_rows(BENCHMARKS, "What calibrations promise"), keys=["model", "n"])


if __name__ == "__main__":
    main()
