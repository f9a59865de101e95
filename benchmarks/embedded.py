"""The embedded models on their test photos, and how far that is from the evaluation beside each model.

    python -m benchmarks embedded                # demo-part alone
    python -m benchmarks embedded --data DIR     # the others too, on DIR/cookie and DIR/mvtec_ad/bottle

The pictures of demo-part are rendered for it, from the seed of the recorded evaluation.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.machine import CPU, describe, make_parser, report
from demo_part.generate import generate
from diffusionad_hf import DiffusionADPipeline
from diffusionad_hf.data import load_category
from diffusionad_hf.evaluation.evaluator import evaluate_pipeline
from diffusionad_hf.files import bundled

SEED = 20270117  # of the rendered pictures, used for nothing else
METRICS = ("image_auroc", "aupro_30", "pixel_auroc", "pixel_ap", "false_alarm_rate", "miss_rate")


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder with cookie and mvtec_ad/bottle")
    parser.add_argument("--images", type=int, default=100, metavar="N", help="of each kind (default: %(default)s)")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        parts = generate(Path(folder), SEED, train=1, test_good=args.images, test_defective=args.images)
        where = {"demo-part": parts}
        if args.data:
            where |= {"cookie": args.data / "cookie", "mvtec-bottle": args.data / "mvtec_ad/bottle"}
        rows = [_evaluate(name, test) for name, test in where.items()]
    before = [
        {"model": name, **json.loads((_model(name) / "evaluation.json").read_text(encoding="utf-8"))} for name in where
    ]
    table = [{"model": row["model"], **{name: _cell(row, name) for name in METRICS}} for row in rows]
    report({"machine": describe(CPU), "rows": rows}, args.json, table, before, ["model"])


def _model(name: str) -> Path:
    return bundled("space") / "checkpoints" / name


def _evaluate(name: str, folder: Path) -> dict[str, Any]:
    pipe = DiffusionADPipeline.from_pretrained(_model(name))
    pipe.set_progress_bar_config(disable=True)
    test = load_category(str(folder.parent), folder.name)["test"]
    return {"model": name, **evaluate_pipeline(pipe, test, progress=False).metrics}


def _cell(row: dict[str, Any], name: str) -> str:
    low, high = row["intervals"][name]
    return f"{row[name]:.4f} [{low:.4f}, {high:.4f}]"


if __name__ == "__main__":
    main()
