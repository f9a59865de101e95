"""What a large inspection runs over: images in a fixed order, read from any position."""

import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.parquet as pq
from huggingface_hub import HfApi

from ..files import escaped, one_line, require
from ..loading import explained
from .inspection import Item, picture_names

# Pictures of a dataset's rows go to folders of so many.
_ROWS_PER_FOLDER = 10_000


class FileInputs:
    """Image files, each once, in this order. A run continues only with inputs of the same `description`."""

    def __init__(self, files: Sequence[Path]):
        self.files = files
        self.description = f"{len(files)} files ({_digest(map(str, files))})"

    @cached_property
    def _names(self) -> dict[Path, str]:
        return picture_names(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def read(self, start: int, stop: int) -> Iterator[Item]:
        """Images `start` to `stop` (half open), not decoded."""
        return (Item(escaped(file), file, self._names[file]) for file in self.files[start:stop])


class DatasetInputs:
    """
    The images in a column of a dataset on the Hub, in a folder or file, or in a folder that `save_to_disk` wrote.

    Parquet files are read where they are, one row group at a time. All else is brought into the cache of `datasets`
    first, unless `save_to_disk` wrote it. Configuration, split and column may be left out if there is only one.

    Raises:
        OSError: If the dataset is not there or cannot be reached.
        ValueError: If it cannot be read, or if the split or column does not exist or is not clear.
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
                revision = HfApi().dataset_info(source, revision=revision).sha
                state = str(revision)
        splits, parquet_files = _open(datasets, source, config, revision)
        self._split = _choose("split", "splits", split, list(splits), source)
        data = splits[self._split]
        features = data.features or data._resolve_features().features
        images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
        if column in features and column not in images:
            raise ValueError(f"column {column}: holds no images; {source} has {', '.join(images) or 'none'}.")
        self._column = _choose("column", "image columns", column, images, source)
        if parquet_files:
            with explained(source):
                self._rows: Any = _ParquetRows(parquet_files[self._split], self._column)
        else:
            self._rows = data.select_columns([self._column]).cast_column(self._column, datasets.Image(decode=False))
        name = f"{source} ({config})" if config else source
        self.description = f"{name}, split {self._split}, column {self._column}, at {state}"

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, start: int, stop: int) -> Iterator[Item]:
        for number, row in enumerate(self._rows.select(range(start, stop)), start):
            yield self._item(number, row[self._column] or {})

    def _item(self, number: int, image: dict[str, Any]) -> Item:
        picture = f"{number // _ROWS_PER_FOLDER:05d}/{number:09d}"
        name, content = image.get("path"), image.get("bytes")
        if name is None or content is not None:
            return Item(name or f"{self._source}/{self._split}/{picture}", content or b"", picture)
        return Item(name, name if "://" in name else Path(name), picture)


class _ParquetRows:
    """A column of Parquet files, here or anywhere that `fsspec` reads."""

    def __init__(self, files: Sequence[str], column: str):
        self._column = column
        self._groups: list[tuple[str, int]] = []
        self._starts = [0]
        for file in files:
            with fsspec.open(file, "rb") as content:
                metadata = pq.read_metadata(content)
            for i in range(metadata.num_row_groups):
                self._groups.append((file, i))
                self._starts.append(self._starts[-1] + metadata.row_group(i).num_rows)
        # The group that was read last: blocks are smaller than groups.
        self._last: tuple[int, Any] = (-1, None)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_last": (-1, None)}

    def __len__(self) -> int:
        return self._starts[-1]

    def select(self, rows: range) -> Iterator[dict[str, Any]]:
        for row in rows:
            group = bisect_right(self._starts, row) - 1
            if self._last[0] != group:
                file, number = self._groups[group]
                with fsspec.open(file, "rb") as content:
                    self._last = group, pq.ParquetFile(content).read_row_group(number, [self._column])
            yield self._last[1].slice(row - self._starts[group], 1).to_pylist()[0]


def _open(datasets: Any, source: str, config: str | None, revision: str | None) -> tuple[dict, dict[str, list[str]]]:
    """All splits of a dataset, and the files of each if they are Parquet."""
    path = Path(source)
    try:
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            saved = datasets.load_from_disk(source)
            return dict(saved) if isinstance(saved, datasets.DatasetDict) else {str(saved.split or "train"): saved}, {}
        one_file = path.is_file()
        name = str(path.parent) if one_file else source
        options = {"data_files": path.name} if one_file else {"name": config, "revision": revision}
        with explained(source):
            builder = datasets.load_dataset_builder(name, **options)
            if isinstance(builder.config, require("datasets.packaged_modules.parquet.parquet", "train").ParquetConfig):
                files = {str(split): list(names) for split, names in builder.config.data_files.items()}
                return dict(builder.as_streaming_dataset()), files
            return dict(datasets.load_dataset(name, **options)), {}
    except (ValueError, OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        said = one_line(error)
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(said if source in said else f"{source}: not a dataset that can be read ({said}).") from error


def _choose(argument: str, what: str, asked: str | None, there: Sequence[str], source: str) -> str:
    if asked is None and len(there) == 1:
        return there[0]
    if asked is None or asked not in there:
        problem = "choose one" if asked is None else f"there is no {asked}"
        raise ValueError(f"{argument}: {problem}; {source} has the {what} {', '.join(map(str, there)) or 'none'}.")
    return asked


def _digest(lines: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode("utf-8", "surrogateescape") + b"\n")
    return digest.hexdigest()[:16]


Inputs = FileInputs | DatasetInputs
