"""
Inspection of more images than anyone waits for: by many processes, written as it goes, continued where it stopped.

Rows are inspected in batches that begin at multiples of the batch size, whoever inspects them and whenever: a score
depends on its batch in the last bits of a float, so equal batches make the result equal to the bit, with any number of
processes and after any interruption. A process is dealt shards (ranges of whole batches), which go to files that are
whole or not there, and whose names say what they hold:

    part-00000-rows-000000256-000000512.parquet         rows 256 to 511 of part 0
    part-00000-rows-000000512-000000600-end.parquet     and its last ones
"""

import hashlib
import json
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from filelock import FileLock, Timeout

from ..files import replace_file, replacing, require
from ..pipeline_diffusionad import DiffusionADPipeline
from .inputs import Inputs
from .inspection import Failure, Inspection, Item, inspect_batches

__all__ = ["Batch", "Run", "Summary", "describe_run", "inspect_share", "merge_shards", "open_run", "plan_share"]

# A shard is written after so many rows, and at the latest after so many seconds: what a killed process loses.
_ROWS_PER_SHARD = 256
_SECONDS_PER_SHARD = 30.0
# Of few rows, every process gets so many shards to do: small ones, so that all end at about the same time.
_SHARDS_PER_PROCESS = 4
_NAME = re.compile(r"part-(\d+)-rows-(\d+)-(\d+)(-end)?\.parquet")
_RUN_FILE = "run.json"


class Shard(NamedTuple):
    """Rows `start` to `stop` (half open) of a part; `end` if it has no more."""

    part: int
    start: int
    stop: int
    end: bool

    @property
    def file_name(self) -> str:
        return f"part-{self.part:05d}-rows-{self.start:09d}-{self.stop:09d}{'-end' if self.end else ''}.parquet"


class Batch(tuple):
    """The items of one pass, with the rows that they are."""

    shard: Shard

    def __new__(cls, items: Sequence[Item], shard: Shard) -> "Batch":
        batch = super().__new__(cls, items)
        batch.shard = shard
        return batch


@dataclass(frozen=True)
class Run:
    """
    What is to be done, the same in every process.

    Args:
        folder: Where the shards are written.
        batch_size: Images per pass.
        shard_size: Rows per shard, a multiple of the batch size.
        done: Shards that were there when the run began.
    """

    folder: Path
    batch_size: int
    shard_size: int
    done: tuple[Shard, ...] = ()

    @property
    def rows_done(self) -> int:
        return sum(shard.stop - shard.start for shard in self.done)


@dataclass
class Summary:
    """What a merged table holds: numbers of rows, and the first few errors."""

    images: int = 0
    anomalous: int = 0
    failed: int = 0
    errors: list[str] = field(default_factory=list)


# ---- beginning and continuing ----


def describe_run(pipe: DiffusionADPipeline, inputs: Inputs, model: str, batch_size: int) -> dict[str, Any]:
    """All that the results depend on, in words that tell one run from another; `model` is for people only."""
    digest = hashlib.sha256()
    for network in (pipe.unet, pipe.segmenter):
        for name, tensor in sorted(network.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    settings = {
        name: pipe.config[name] for name in ("image_size", "top_k", "seed", "calibration_scores", "false_alarm_rate")
    }
    scheduler = {name: value for name, value in pipe.scheduler.config.items() if not name.startswith("_")}
    settings = json.dumps([settings, scheduler], sort_keys=True, default=str)
    return {
        "model": model,
        "weights": digest.hexdigest()[:16],
        "settings": hashlib.sha256(settings.encode()).hexdigest()[:16],
        "threshold": str(pipe.threshold),
        "inputs": inputs.description,
        "batch size": batch_size,
    }


@contextmanager
def open_run(
    folder: Path, description: dict[str, Any], batch_size: int, num_rows: int | None, num_processes: int
) -> Iterator[Run]:
    """
    Begins a run in a folder, or continues the one that is there. For one process; the others are given the result.

    Args:
        folder: Where the shards are, or will be.
        description: As [`describe_run`] returns it.
        batch_size: Images per pass.
        num_rows: Of all inputs, where that is known.
        num_processes: That share the work.

    Raises:
        ValueError: If the folder holds another run; the message says in what they differ.
        OSError: If the folder cannot be written, or a run is under way in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            record, done = folder / _RUN_FILE, _list_shards(folder)
            if record.is_file():
                _check_same_run(record, description)
            elif done:
                raise ValueError(f"{folder}: holds shards and no {_RUN_FILE} to say of what; delete it to start anew.")
            else:
                _write(record, json.dumps(description, indent=2) + "\n")
            for partial in folder.glob(".*.partial"):
                partial.unlink()
            size = _ROWS_PER_SHARD
            if num_rows is not None:
                left = num_rows - sum(shard.stop - shard.start for shard in done)
                size = min(size, left // (_SHARDS_PER_PROCESS * num_processes))
            yield Run(folder, batch_size, max(1, -(-size // batch_size)) * batch_size, tuple(done))
    except Timeout as error:
        raise OSError(f"{folder}: a run is under way in it; wait for its end, or stop it.") from error


def _check_same_run(record: Path, description: dict[str, Any]) -> None:
    try:
        recorded = dict(json.loads(record.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{record}: damaged ({error}); delete its folder to start anew.") from error
    differences = []
    for name, value in description.items():
        then, now = recorded.get(name), value
        if name == "model" or then == now:
            continue
        if name in ("weights", "settings"):
            then, now = f"{then} of {recorded.get('model')}", f"{now} of {description['model']}"
        differences.append(f"{name} {then} there, {now} now")
    if differences:
        raise ValueError(
            f"{record.parent}: holds the results of another run ({'; '.join(differences)}); go on as it was begun, "
            "give another file, or delete the folder to start anew."
        )


def _by_part(shards: Iterable[Shard]) -> dict[int, list[Shard]]:
    parts: dict[int, list[Shard]] = {}
    for shard in shards:
        parts.setdefault(shard.part, []).append(shard)
    return parts


def _list_shards(folder: Path) -> list[Shard]:
    """The shards in a folder, in the order of their rows."""
    found = [match for file in folder.iterdir() if (match := _NAME.fullmatch(file.name))]
    return sorted(Shard(*(int(match[i]) for i in (1, 2, 3)), bool(match[4])) for match in found)


# ---- one process's share ----


def plan_share(run: Run, inputs: Inputs, process: int, num_processes: int) -> Iterator[Batch]:
    """
    The batches that a process has to inspect, in order.

    Where there are as many unfinished parts as processes, each reads whole parts, so that no byte is read twice.
    Where there are fewer, all read all of them and every process takes its turn at the shards.
    """
    done = _by_part(run.done)
    unfinished = [part for part in range(inputs.num_parts) if not _is_whole(done.get(part, []))]
    whole_parts = len(unfinished) >= num_processes
    turn = -1
    for number, part in enumerate(unfinished):
        if whole_parts and number % num_processes != process:
            continue
        starts = {row for shard in done.get(part, []) for row in range(shard.start, shard.stop, run.batch_size)}
        dealt = None
        for batch in _batches(part, inputs.rows(part), run.batch_size):
            if batch.shard.start in starts:
                continue
            if batch.shard.start // run.shard_size != dealt:
                dealt = batch.shard.start // run.shard_size
                turn += 1
            if whole_parts or turn % num_processes == process:
                yield batch


def _is_whole(shards: Sequence[Shard]) -> bool:
    """Whether these shards of one part are all of it."""
    reached = 0
    for shard in shards:
        if shard.start != reached:
            return False
        reached = shard.stop
    return bool(shards) and shards[-1].end


def _batches(part: int, rows: Iterator[Item], size: int) -> Iterator[Batch]:
    """A part's rows in batches, the last of which knows that it is; one empty batch where there are no rows."""
    start, items = 0, []
    for item in rows:
        if len(items) == size:
            yield Batch(items, Shard(part, start, start + size, False))
            start, items = start + size, []
        items.append(item)
    yield Batch(items, Shard(part, start, start + len(items), True))


def inspect_share(
    pipe: DiffusionADPipeline, inputs: Inputs, run: Run, state: PartialState, output_dir: Path | None = None
) -> Iterator[int]:
    """
    Inspects what falls to this process and writes it in shards as it goes.

    However it ends, what was inspected is written, but for the batch that was under way; a process that is killed
    loses what it had not written yet, half a minute's work at most.

    Args:
        pipe: The pipeline.
        inputs: What to inspect.
        run: As [`open_run`] returned it.
        state: Which of how many processes this is.
        output_dir: As for [`inspect_files`].

    Yields:
        `int`: Number of rows, after each batch.

    Raises:
        OSError: If a shard or picture cannot be written, or an input cannot be reached.
    """
    rows: list[dict[str, Any]] = []
    shard: Shard | None = None
    written = time.monotonic()

    def write() -> None:
        nonlocal shard, rows, written
        if shard is not None:
            _write_shard(run.folder, shard, rows)
        shard, rows, written = None, [], time.monotonic()

    batches = plan_share(run, inputs, state.process_index, state.num_processes)
    try:
        for batch, results in inspect_batches(pipe, batches, output_dir):
            found = [_row(result) for result in results]
            now = batch.shard
            if shard is not None and (shard.part, shard.stop) != (now.part, now.start):
                write()
            shard = now if shard is None else shard._replace(stop=now.stop, end=now.end)
            rows += found
            if now.end or now.stop % run.shard_size == 0 or time.monotonic() - written > _SECONDS_PER_SHARD:
                write()
            yield len(found)
    finally:
        write()


def _row(result: Inspection | Failure) -> dict[str, Any]:
    # Times are left out: they are no property of the image, and no two runs agree on them.
    if isinstance(result, Failure):
        return {"file": result.file, "error": result.error}
    row = {key: value for key, value in vars(result).items() if key not in ("seconds", "pictures")}
    return row | {"regions": [{**region, "box": list(region["box"])} for region in result.regions]}


def _schema() -> Any:
    pa = require("pyarrow", "train")
    region = {
        "box": pa.list_(pa.int32()),
        "area_px": pa.int64(),
        "area_fraction": pa.float64(),
        "peak": pa.float64(),
        "peak_xy": pa.list_(pa.int32()),
        "mean": pa.float64(),
    }
    return pa.schema(
        {
            "file": pa.string(),
            "score": pa.float64(),
            "threshold": pa.float64(),
            "verdict": pa.string(),
            "p_value": pa.float64(),
            "where": pa.list_(pa.string()),
            "regions": pa.list_(pa.struct(region)),
            "error": pa.string(),
        }
    )


def _write_shard(folder: Path, shard: Shard, rows: list[dict[str, Any]]) -> None:
    pa, parquet = require("pyarrow", "train"), require("pyarrow.parquet", "train")
    sink = pa.BufferOutputStream()
    parquet.write_table(pa.Table.from_pylist(rows, schema=_schema()), sink)
    _write(folder / shard.file_name, sink.getvalue())


def _write(path: Path, content: Any) -> None:
    try:
        replace_file(path, content)
    except OSError as error:
        raise OSError(
            f"{path}: cannot be written ({error.strerror}); what is there is kept: run the same again to go on."
        ) from error


# ---- merging ----


def merge_shards(folder: Path, target: Path, num_parts: int) -> Summary:
    """
    Writes the rows of all shards to one Parquet file, in order and numbered (`row`); a shard is in memory at a time.

    Raises:
        ValueError: If a row is missing, twice there, or cannot be read.
        OSError: If the file cannot be written.
    """
    pa, parquet = require("pyarrow", "train"), require("pyarrow.parquet", "train")
    shards = _list_shards(folder)
    parts = _by_part(shards)
    for part in range(num_parts):
        if not _is_whole(parts.get(part, [])):
            raise ValueError(
                f"{folder}: the shards of part {part} do not follow each other to its end; run the same again, or "
                "delete the folder to start anew."
            )
    summary = Summary()
    schema = pa.schema([pa.field("row", pa.int64()), *_schema()])
    try:
        with replacing(target) as partial, parquet.ParquetWriter(partial, schema) as writer:
            for shard in shards:
                table = _read_shard(folder, shard)
                numbers = pa.array(range(summary.images, summary.images + len(table)), pa.int64())
                writer.write_table(table.add_column(0, "row", numbers))
                errors = table["error"].drop_null().to_pylist()
                summary.images += len(table)
                summary.anomalous += table["verdict"].to_pylist().count("anomalous")
                summary.failed += len(errors)
                summary.errors += errors[: 10 - len(summary.errors)]
    except OSError as error:
        raise OSError(f"{target}: cannot be written ({error}); the shards are kept: run the same again.") from error
    return summary


def _read_shard(folder: Path, shard: Shard) -> Any:
    file = folder / shard.file_name
    try:
        table = require("pyarrow.parquet", "train").read_table(file, schema=_schema())
        if len(table) != shard.stop - shard.start:
            raise ValueError(f"it holds {len(table)} rows")
    except (ValueError, OSError) as error:
        raise ValueError(f"{file}: damaged ({error}); delete it and run the same again.") from error
    return table
