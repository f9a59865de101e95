"""
Inspection of many images in fixed blocks, continued where it stopped.

Block `i` is the images `i * block_size` to `(i + 1) * block_size` of the inputs; what is found on them goes to
`block-00000i.parquet`, which is whole or not there. So anyone may inspect a block, at any time, and even twice. Blocks
consist of whole batches, since a score depends on its batch in the last bits of a float: whoever does the work, the
merged table is the same to the bit.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from ..calibration import fingerprint
from ..files import replace_file, replacing
from ..pipeline_diffusionad import DiffusionADPipeline
from .inputs import Inputs
from .inspection import Pictures, batched, inspect_batches
from .records import Failure, Inspection

_BATCHES_PER_BLOCK = 16
_ROWS_PER_GROUP = 10_000
_RUN_FILE = "run.json"
_SETTINGS = ("calibration_scores", "false_alarm_rate", "calibrated_settings", "familiarity", "has_learnt")
_REGION = {
    "box": pa.list_(pa.int32()),
    "area_px": pa.int64(),
    "area_fraction": pa.float64(),
    "peak": pa.float64(),
    "peak_xy": pa.list_(pa.int32()),
    "mean": pa.float64(),
}
_SCHEMA = pa.schema(
    {
        "file": pa.string(),
        "score": pa.float64(),
        "threshold": pa.float64(),
        "verdict": pa.string(),
        "reason": pa.string(),
        "p_value": pa.float64(),
        "is_familiar": pa.bool_(),
        "strangeness": pa.float64(),
        "where": pa.list_(pa.string()),
        "regions": pa.list_(pa.struct(_REGION)),
        "error": pa.string(),
    }
)


@dataclass(frozen=True)
class Run:
    """What is to be done; `block_size` is a multiple of the batch size."""

    folder: Path
    num_images: int
    batch_size: int
    block_size: int

    @property
    def blocks(self) -> range:
        return range(-(-self.num_images // self.block_size))

    def path(self, block: int) -> Path:
        return self.folder / f"block-{block:06d}.parquet"

    def span(self, block: int) -> tuple[int, int]:
        """The images of a block, half open."""
        start = block * self.block_size
        return start, min(start + self.block_size, self.num_images)

    def count(self, blocks: Sequence[int]) -> int:
        """Number of images in some blocks."""
        return sum(stop - start for start, stop in map(self.span, blocks))

    def missing(self) -> list[int]:
        """The blocks that are not there yet."""
        there = set(os.listdir(self.folder))
        return [block for block in self.blocks if self.path(block).name not in there]


def describe_model(pipe: DiffusionADPipeline) -> dict[str, str]:
    """All in a pipeline that the results depend on."""
    verdicts = {name: pipe.config[name] for name in _SETTINGS}
    return {"model": fingerprint(pipe, verdicts), "threshold": str(pipe.threshold)}


@contextmanager
def open_run(folder: Path, inputs: Inputs, description: dict[str, Any], batch_size: int) -> Iterator[Run]:
    """
    Begins a run in a folder, or continues the one that is there; for one process, which tells the others.

    Raises:
        ValueError: If the folder holds another run; the message says how they differ.
        OSError: If the folder cannot be written, or a run is under way in it.
    """
    run = Run(folder, len(inputs), batch_size, batch_size * _BATCHES_PER_BLOCK)
    description = {
        **description,
        "inputs": inputs.description,
        "images": run.num_images,
        "batch size": batch_size,
        "block size": run.block_size,
    }
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            record = folder / _RUN_FILE
            if record.is_file():
                _check_same_run(record, description)
            elif len(run.missing()) < len(run.blocks):
                raise ValueError(f"{folder}: holds blocks and no {_RUN_FILE} to say of what; delete it to start anew.")
            else:
                replace_file(record, json.dumps(description, indent=2) + "\n")
            for partial in folder.glob(".*.partial"):
                partial.unlink()
            yield run
    except Timeout as error:
        raise OSError(f"{folder}: a run is under way in it; wait for its end, or stop it.") from error


def _check_same_run(record: Path, description: dict[str, Any]) -> None:
    try:
        recorded = dict(json.loads(record.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{record}: damaged ({error}); delete its folder to start anew.") from error
    differences = [
        f"{name} {recorded.get(name)} there, {value} now"
        for name, value in description.items()
        if recorded.get(name) != value
    ]
    if differences:
        raise ValueError(
            f"{record.parent}: holds the results of another run ({'; '.join(differences)}); go on as it was begun, "
            "give another file, or delete the folder to start anew."
        )


def inspect_blocks(
    pipe: DiffusionADPipeline, inputs: Inputs, run: Run, blocks: Sequence[int], pictures: Pictures | None = None
) -> Iterator[int]:
    """
    Inspects blocks and writes each when it is done; images of the next are read meanwhile. Yields 1 for every image.

    Raises:
        OSError: If a block or picture cannot be written, or an input cannot be reached.
        ValueError: If there are fewer images than were counted.
    """
    batches = (batch for block in blocks for batch in batched(inputs.read(*run.span(block)), run.batch_size))
    results = inspect_batches(pipe, batches, pictures)
    for block in blocks:
        rows = []
        for result in islice(results, run.count([block])):
            rows.append(_row(result))
            yield 1
        _write_block(run, block, rows)


def _row(result: Inspection | Failure) -> dict[str, Any]:
    # Times are left out: they say nothing of the image, and differ from run to run.
    row = {key: value for key, value in vars(result).items() if key not in ("seconds", "pictures", "sentence")}
    if isinstance(result, Inspection):
        row["regions"] = [{**region, "box": list(region["box"])} for region in result.regions]
    return row


def _write_block(run: Run, block: int, rows: list[dict[str, Any]]) -> None:
    path, counted = run.path(block), run.count([block])
    if len(rows) != counted:
        raise ValueError(f"{path}: {len(rows)} images where {counted} were counted; the inputs have changed.")
    try:
        with replacing(path) as partial, partial.open("wb") as file:
            pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), file)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(f"{path}: cannot be written ({error}); finished blocks are kept: run the same again.") from error


def merge_blocks(run: Run, target: Path) -> pa.Table:
    """
    Writes all rows to one Parquet file, in order and numbered (`row`), and returns them.

    Raises:
        ValueError: If a block is missing or cannot be read.
        OSError: If the file cannot be written.
    """
    table = pa.concat_tables([_SCHEMA.empty_table(), *(_read_block(run, block) for block in run.blocks)])
    table = table.add_column(0, "row", pa.array(range(run.num_images), pa.int64()))
    try:
        with replacing(target) as partial:
            pq.write_table(table, partial, row_group_size=_ROWS_PER_GROUP)
    except OSError as error:
        raise OSError(f"{target}: cannot be written ({error}); the blocks are kept: run the same again.") from error
    return table


def _read_block(run: Run, block: int) -> pa.Table:
    path = run.path(block)
    try:
        # Six times as fast as `read_table`, which looks for folders of files.
        table = pq.ParquetFile(path).read()
        if len(table) != run.count([block]) or table.schema != _SCHEMA:
            raise ValueError(f"it holds {len(table)} rows of {', '.join(table.column_names)}")
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: damaged or missing ({error}); delete it and run the same again.") from error
    return table
