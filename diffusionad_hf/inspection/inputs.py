"""What a large inspection runs over: rows in a fixed order, in one or more parts that can be read on their own."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from huggingface_hub import HfApi

from ..data import require
from ..files import one_line
from ..loading import explained
from .inspection import Item, picture_names

__all__ = ["DatasetInputs", "FileInputs", "Inputs"]


class Inputs(Protocol):
    """
    Rows in order: those of part 0, then those of part 1, and so on.

    Attributes:
        description: What the rows are, so that an interrupted run is continued with the same ones.
        num_parts: Parts that can be read one without the other.
        num_rows: Rows of all parts; `None` where that is not known before they are read.
    """

    description: str
    num_parts: int
    num_rows: int | None

    def rows(self, part: int) -> Iterator[Item]:
        """The rows of a part, nothing of them decoded."""


class FileInputs:
    """
    Image files, in one part: to pass over a file costs nothing.

    Args:
        files: Their paths, each once.
    """

    num_parts = 1

    def __init__(self, files: Sequence[Path]):
        self.files = files
        self.num_rows = len(files)
        self.description = f"{len(files)} files ({_digest(str(file) for file in files)})"

    def rows(self, part: int) -> Iterator[Item]:
        names = picture_names(self.files)
        return (Item(str(file), file, names[file]) for file in self.files)


class DatasetInputs:
    """
    A column of a `datasets` data set, streamed; a part is a file of it.

    Args:
        source: Id on the Hub, a folder or file that `load_dataset` reads, or one that `save_to_disk` wrote.
        config: Configuration of the data set, where it has several.
        split: May be left out where there is but one.
        column: The column of images; may be left out where there is but one.
        revision: Of a data set on the Hub: branch, tag or commit.

    Raises:
        OSError: If the data set is not there or cannot be reached.
        ValueError: If it cannot be read, or the split or column is not there or not clear.
        ImportError: If `datasets` is not installed.
    """

    num_rows = None

    def __init__(
        self,
        source: str,
        config: str | None = None,
        split: str | None = None,
        column: str | None = None,
        revision: str | None = None,
    ):
        datasets = require("datasets")
        self._source = source
        path = Path(source)
        if path.exists():
            files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
            state = _digest(f"{file} {file.stat().st_size}" for file in files)
        elif source.count("/") > 1 or source.startswith((".", "~", "/")):
            raise FileNotFoundError(
                f"{source}: no such data set; give a folder or a file, or a Hub id such as org/name."
            )
        else:
            with explained(source):
                # Named by its commit from here on: a run that is continued tomorrow reads the same rows.
                revision = state = HfApi().dataset_info(source, revision=revision).sha
        data = _open(datasets, source, config, revision)
        self._split, data = _choose("--split", "splits", split, dict(data), source)
        features = data.features or data._resolve_features().features
        images = {name: name for name, feature in features.items() if isinstance(feature, datasets.Image)}
        if column is not None and column in features and column not in images:
            raise ValueError(f"--image-column {column}: holds no images; {source} has {_listed(images)}.")
        self._column, _ = _choose("--image-column", "image columns", column, images, source)
        self._data = data.select_columns([self._column]).cast_column(self._column, datasets.Image(decode=False))
        self.num_parts = self._data.num_shards
        name = f"{source} ({config})" if config else source
        self.description = f"{name}, split {self._split}, column {self._column}, at {state}"

    def rows(self, part: int) -> Iterator[Item]:
        for index, row in enumerate(self._data.shard(self.num_parts, part)):
            picture = f"{part:05d}/{index:09d}"
            image = row[self._column] or {}
            name = image.get("path") or f"{self._source}/{self._split}/{picture}"
            if image.get("bytes") is not None:
                yield Item(name, image["bytes"], picture)
            elif image.get("path") is None:
                yield Item(name, b"", picture)
            else:
                yield Item(name, name if "://" in name else Path(name), picture)


def _open(datasets: Any, source: str, config: str | None, revision: str | None) -> Any:
    """All splits of a data set, as streams."""
    try:
        if (Path(source) / "state.json").is_file() or (Path(source) / "dataset_dict.json").is_file():
            saved = datasets.load_from_disk(source)
            saved = saved if isinstance(saved, datasets.DatasetDict) else {str(saved.split or "train"): saved}
            return {name: data.to_iterable_dataset(max(1, len(data.cache_files))) for name, data in saved.items()}
        if Path(source).is_file():
            return datasets.load_dataset(str(Path(source).parent), data_files=Path(source).name, streaming=True)
        with explained(source):
            return datasets.load_dataset(source, config, revision=revision, streaming=True)
    except (ValueError, OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        said = one_line(error)
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(said if source in said else f"{source}: not a data set that can be read ({said}).") from error


def _choose(option: str, what: str, asked: str | None, there: dict[str, Any], source: str) -> tuple[str, Any]:
    if asked is None and len(there) == 1:
        asked = next(iter(there))
    if asked not in there:
        problem = "choose one" if asked is None else f"there is no {asked}"
        raise ValueError(f"{option}: {problem}; {source} has the {what} {_listed(there)}.")
    return asked, there[asked]


def _listed(names: Any) -> str:
    return ", ".join(map(str, names)) or "none"


def _digest(lines: Any) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode("utf-8", "surrogateescape") + b"\n")
    return digest.hexdigest()[:16]
