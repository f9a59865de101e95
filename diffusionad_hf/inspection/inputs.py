"""What a large inspection runs over: images in a fixed order, read from any position."""

import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, Protocol

from huggingface_hub import HfApi

from ..files import one_line, require
from ..loading import explained
from .inspection import Item, picture_names

# Pictures of a dataset's rows go to folders of so many.
_ROWS_PER_FOLDER = 10_000


class Inputs(Protocol):
    """
    Images in order; can be pickled.

    Attributes:
        description: What the images are, so that an interrupted run continues with the same ones.
    """

    description: str

    def __len__(self) -> int:
        """Number of images."""

    def read(self, start: int, stop: int) -> Iterator[Item]:
        """Images `start` to `stop` (half open), not decoded."""


class FileInputs:
    """
    Image files.

    Args:
        files: Their paths, each once.
    """

    def __init__(self, files: Sequence[Path]):
        self.files = files
        self.description = f"{len(files)} files ({_digest(map(str, files))})"

    @cached_property
    def _names(self) -> dict[Path, str]:
        return picture_names(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def read(self, start: int, stop: int) -> Iterator[Item]:
        return (Item(str(file), file, self._names[file]) for file in self.files[start:stop])


class DatasetInputs:
    """
    A column of a dataset of the library `datasets`: in place if it was saved to disk, else streamed.

    A stream is read from the beginning of the shard that an image lies in; the shards of Parquet files, whose rows are
    counted without reading them, are their row groups. Streams of other formats are read through once to be counted.

    Args:
        source: Id on the Hub, a folder or file that `load_dataset` reads, or one that `save_to_disk` wrote.
        config: Configuration of the dataset, if it has several.
        split: May be left out if there is only one.
        column: The column of images; may be left out if there is only one.
        revision: Branch, tag or commit of a dataset on the Hub.

    Raises:
        OSError: If the dataset is not there or cannot be reached.
        ValueError: If it cannot be read, or if the split or column does not exist or is not clear.
        ImportError: If `datasets` is not installed.
    """

    def __init__(
        self,
        source: str,
        config: str | None = None,
        split: str | None = None,
        column: str | None = None,
        revision: str | None = None,
    ):
        datasets = require("datasets", "train")
        self._source = source
        path = Path(source)
        if path.exists():
            files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
            state = _digest(f"{file} {file.stat().st_size}" for file in files)
        elif source.count("/") > 1 or source.startswith((".", "~", "/")):
            raise FileNotFoundError(f"{source}: no such dataset; give a folder, a file or a Hub id such as org/name.")
        else:
            with explained(source):
                # Named by its commit from here on: a run that is continued tomorrow reads the same rows.
                revision = state = HfApi().dataset_info(source, revision=revision).sha
        splits, parquet_files = _open(datasets, source, config, revision)
        self._split, data = _choose("split", "splits", split, splits, source)
        features = data.features or data._resolve_features().features
        images = {name: name for name, feature in features.items() if isinstance(feature, datasets.Image)}
        if column is not None and column in features and column not in images:
            raise ValueError(f"column {column}: holds no images; {source} has {_listed(images)}.")
        self._column, _ = _choose("column", "image columns", column, images, source)
        self._data = data.select_columns([self._column]).cast_column(self._column, datasets.Image(decode=False))
        self._is_stream = isinstance(data, datasets.IterableDataset)
        # Where the stream was left, and the rest of it.
        self._open_at: tuple[int, Iterator[dict[str, Any]]] | None = None
        if self._is_stream:
            if hasattr(self._data, "reshard"):
                self._data = self._data.reshard()
            with explained(source):
                self._starts = [0, *accumulate(self._count_rows(parquet_files.get(self._split, ())))]
        name = f"{source} ({config})" if config else source
        self.description = f"{name}, split {self._split}, column {self._column}, at {state}"

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_open_at": None}

    def __len__(self) -> int:
        return self._starts[-1] if self._is_stream else len(self._data)

    def read(self, start: int, stop: int) -> Iterator[Item]:
        rows = self._seek(start) if self._is_stream else iter(self._data.select(range(start, stop)))
        # In this order, or a row too many would be taken from the stream.
        for number, row in zip(range(start, stop), rows, strict=False):
            if self._is_stream:
                self._open_at = number + 1, rows
            yield self._item(number, row[self._column] or {})

    def _item(self, number: int, image: dict[str, Any]) -> Item:
        picture = f"{number // _ROWS_PER_FOLDER:05d}/{number:09d}"
        name = image.get("path") or f"{self._source}/{self._split}/{picture}"
        if image.get("bytes") is not None:
            return Item(name, image["bytes"], picture)
        if image.get("path") is None:
            return Item(name, b"", picture)
        return Item(name, name if "://" in name else Path(name), picture)

    def _seek(self, start: int) -> Iterator[dict[str, Any]]:
        """The stream's rows from `start` on: goes on reading if that is ahead in the same shard."""
        shard = bisect_right(self._starts, start) - 1
        position, rows = self._open_at or (-1, iter(()))
        if not max(position, self._starts[shard]) <= position <= start:
            shards = range(shard, self._data.num_shards)
            position = self._starts[shard]
            rows = (row for i in shards for row in self._data.shard(self._data.num_shards, i))
        next(islice(rows, start - position, start - position), None)
        return rows

    def _count_rows(self, parquet_files: Sequence[str]) -> list[int]:
        """Rows of every shard."""
        count = self._data.num_shards
        if parquet_files:
            fsspec, parquet = require("fsspec", "train"), require("pyarrow.parquet", "train")
            groups = []
            for name in parquet_files:
                with fsspec.open(name, "rb") as file:
                    metadata = parquet.read_metadata(file)
                groups.append([metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)])
            flat = [rows for group in groups for rows in group]
            # Which of them it is depends on the version of `datasets`.
            if count in (len(flat), len(groups)):
                return flat if count == len(flat) else [sum(group) for group in groups]
        return [sum(1 for _ in self._data.shard(count, i)) for i in range(count)]


def _open(datasets: Any, source: str, config: str | None, revision: str | None) -> tuple[dict[str, Any], dict]:
    """All splits of a dataset, and the files of each if they are Parquet."""
    try:
        if (Path(source) / "state.json").is_file() or (Path(source) / "dataset_dict.json").is_file():
            saved = datasets.load_from_disk(source)
            return dict(saved) if isinstance(saved, datasets.DatasetDict) else {str(saved.split or "train"): saved}, {}
        with explained(source):
            if Path(source).is_file():
                builder = datasets.load_dataset_builder(str(Path(source).parent), data_files=Path(source).name)
            else:
                builder = datasets.load_dataset_builder(source, config, revision=revision)
            splits = builder.as_streaming_dataset()
            files = builder.config.data_files if isinstance(builder.config, _parquet_config()) else None
            return dict(splits), {str(split): list(names) for split, names in (files or {}).items()}
    except (ValueError, OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        said = one_line(error)
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(said if source in said else f"{source}: not a dataset that can be read ({said}).") from error


def _parquet_config() -> type:
    return require("datasets.packaged_modules.parquet.parquet", "train").ParquetConfig


def _choose(argument: str, what: str, asked: str | None, there: dict[str, Any], source: str) -> tuple[str, Any]:
    if asked is None and len(there) == 1:
        asked = next(iter(there))
    if asked not in there:
        problem = "choose one" if asked is None else f"there is no {asked}"
        raise ValueError(f"{argument}: {problem}; {source} has the {what} {_listed(there)}.")
    return asked, there[asked]


def _listed(names: Iterable[Any]) -> str:
    return ", ".join(map(str, names)) or "none"


def _digest(lines: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode("utf-8", "surrogateescape") + b"\n")
    return digest.hexdigest()[:16]
