"""Teaching in the web demo: seconds from photos to the first verdict, and what another visitor waits for meanwhile.

    python -m benchmarks teach --data mvtec_ad/bottle

The photos of DIR/train/good are sent as a zip, as a person would drop them. Another visitor inspects a photo every two
seconds with the embedded model, before the training and during it. The product that is downloaded is then scored on
DIR/test.
"""

import io
import json
import statistics
import tempfile
import threading
import time
import zipfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe, report
from benchmarks.visitors import Visitor, _photo, serving
from diffusionad_hf import DiffusionADPipeline
from diffusionad_hf.data import load_category
from diffusionad_hf.evaluation.evaluator import evaluate_pipeline
from diffusionad_hf.flags import DashedParser

_PAUSE = 2.0  # seconds between two photos of the other visitor


def _answer(visitor: Visitor, endpoint: str, *data: Any) -> list[Any]:
    *_, last = visitor.call(endpoint, *data).decode().strip().split("\n")
    return json.loads(last.removeprefix("data: "))


def _inspections(visitor: Visitor, end: threading.Event) -> list[float]:
    """Seconds of each, until the end."""
    waited = []
    while not end.wait(_PAUSE):
        waited.append(visitor.inspect(_photo()))
    return waited


def main(argv: list[str] | None = None) -> None:
    """Runs the measurement."""
    parser = DashedParser(prog="python -m benchmarks teach", description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="a category in the layout of MVTec AD")
    parser.add_argument("--photos", type=int, default=40, metavar="N", help="at most; default: %(default)s")
    parser.add_argument("--alone", type=float, default=60, metavar="S", help="seconds before; default: %(default)g")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything here")
    args = parser.parse_args(argv)
    photos = sorted((args.data / "train" / "good").iterdir())[: args.photos]
    test = load_category(str(args.data), None)["test"]
    result: dict[str, Any] = {"machine": describe(torch.device("cpu")), "photos": len(photos), "rows": []}
    with serving() as (url, category, _), tempfile.TemporaryDirectory() as folder:
        teacher, other = Visitor(url, 1, category), Visitor(url, 2, category)
        over = threading.Event()
        threading.Timer(args.alone, over.set).start()
        alone = _inspections(other, over)
        meanwhile: list[float] = []
        over = threading.Event()
        watcher = threading.Thread(target=lambda: meanwhile.extend(_inspections(other, over)))
        watcher.start()
        began = time.perf_counter()
        dropped = io.BytesIO()
        with zipfile.ZipFile(dropped, "w") as bundle:
            for photo in photos:
                bundle.write(photo, photo.name)
        [status] = _answer(teacher, "train", [teacher.upload("photos.zip", dropped.getvalue())], args.data.name)
        while status["state"] in ("waiting", "running"):
            time.sleep(1)
            [status] = _answer(teacher, "training_status", status["id"], False)
        taught = time.perf_counter() - began
        over.set()
        watcher.join()
        first = next(row for row in test if row["label"])["image"]
        buffer = io.BytesIO()
        first.save(buffer, "PNG")
        photo = teacher.upload("photo.png", buffer.getvalue())
        record, _ = _answer(teacher, "inspect", photo, category, None, None, 1, status["id"])
        result |= {"state": status["state"], "taught_s": taught, "first_verdict_s": time.perf_counter() - began}
        result |= {"verdict": record["verdict"], "notes": status["notes"]}
        _, product = _answer(teacher, "training_result", status["id"])
        with zipfile.ZipFile(io.BytesIO(teacher.request(f"file={product['path']}"))) as bundle:
            bundle.extractall(folder)
        [model] = Path(folder).iterdir()
        pipe = DiffusionADPipeline.from_pretrained(model)
        pipe.set_progress_bar_config(disable=True)
        result["image_auroc"] = evaluate_pipeline(pipe, test).metrics["image_auroc"]
    for name, waited in (("alone", alone), ("while teaching", meanwhile)):
        row = {"inspections": name, "number": len(waited), "median_s": statistics.median(waited)}
        result["rows"].append(row | {"p95_s": statistics.quantiles(waited, n=20)[-1]})
    report(result, args.json)


if __name__ == "__main__":
    main()
