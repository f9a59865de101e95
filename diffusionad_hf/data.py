"""Anomaly-detection data sets in the layouts they come in, as `datasets.Dataset`s that hold paths instead of pixels.

Every layout becomes a `DatasetDict` with the splits "train" (normal images only, which is all that training may see)
and "test", and the columns

    image        `datasets.Image`, decoded when a row is read
    mask         `datasets.Image` or None; non-zero on defects, see `binary_mask`
    label        0 normal / 1 anomalous
    defect_type  "good" for normal images, else the name of the defect
    split        "train" / "test", as the split is called, so that it survives concatenation

A `DatasetDict` rather than one table, because no caller wants the two splits mixed and `data["train"]` says which one
it took.

Layouts, recognised by themselves or named by `layout=`:

    mvtec    <category>/train/good, test/<good or defect>, ground_truth/<defect>. MVTec AD, MPDD, BTAD (`ok`, `ko`)
             and VisA converted to it. Masks carry the image's name, with or without `_mask`, in any image format
    visa     split_csv/1cls.csv and the files that it lists: VisA as downloaded
    dagm     Class<N>/Train and Test, each with a Label folder: DAGM 2007. Defective training images are left out
    folder   good/ and one folder a defect, if any (ground_truth/<defect> for masks), or normal images alone
    hub      the id of a dataset on the Hugging Face Hub
"""

from __future__ import annotations

import csv
import importlib
import io
import logging
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from .pipeline_diffusionad import load_image

logger = logging.getLogger(__name__)

NORMAL = "good"
"""`defect_type` of normal images in every data set, whatever the data set itself calls them."""

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"})

_NORMAL_NAMES = frozenset({"good", "ok", "normal"})
_MASK_FOLDERS = ("ground_truth", "masks")
_TEST_SHARE = 0.2  # of the normal images, where a data set has defects but no split of its own
_UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what PIL raises on broken files


class Sample(NamedTuple):
    """One image of a data set, by its path."""

    image: Path
    mask: Path | None
    defect_type: str
    split: str


def require(module: str) -> ModuleType:
    """Import a package that only model makers need.

    Raises:
        ImportError: it is not installed; the message says how to get it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(f'this needs {error.name}: pip install "diffusionad-hf[train]"') from None


def binary_mask(mask: Image.Image | np.ndarray) -> np.ndarray:
    """Defect pixels of a mask as a boolean (H, W) array.

    Masks come as 0 / 255 (MVTec AD), as small class numbers (VisA) and as JPEGs with noise around 0: a pixel is a
    defect above half of 255 if any pixel reaches that, and where it is not 0 otherwise. Palettes are read as class
    numbers.
    """
    if isinstance(mask, Image.Image) and mask.mode in ("RGBA", "LA"):
        mask = mask.convert("RGB" if mask.mode == "RGBA" else "L")  # opaque everywhere: alpha would read as a defect
    values = np.asarray(mask)
    if values.ndim == 3:
        values = values.max(axis=2)
    return values > 127 if values.max(initial=0) > 127 else values > 0


# -- Files ----------------------------------------------------------------------------------------------------------


def _images(folder: Path) -> list[Path]:
    """Image files directly in `folder`, sorted; none if it does not exist. Hidden files (macOS leaves `._x.png`) are
    not images."""
    if not folder.is_dir():
        return []
    return sorted(f for f in folder.iterdir() if f.suffix.lower() in IMAGE_SUFFIXES and not f.name.startswith("."))


def _subfolders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(f for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))


def _is_normal(name: str) -> bool:
    return name.lower() in _NORMAL_NAMES


def _normal_images(folder: Path) -> list[Path]:
    return [image for sub in _subfolders(folder) if _is_normal(sub.name) for image in _images(sub)]


def _shorten(names: Iterable[Any], most: int = 5) -> str:
    names = [str(name) for name in names]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _pair(images: list[Path], masks: list[Path], defective: list[Path]) -> dict[Path, Path]:
    """Masks by image. `images` may own a mask, `defective` ones must.

    Raises:
        ValueError: a mask has no image, or a defective image has no mask; names them.
    """
    by_stem = {image.stem: image for image in images}
    pairs, orphans = {}, []
    for mask in masks:
        image = by_stem.get(mask.stem) or by_stem.get(re.sub(r"_(mask|label)$", "", mask.stem, flags=re.IGNORECASE))
        if image is None:
            orphans.append(mask)
        else:
            pairs[image] = mask
    if orphans:
        raise ValueError(
            f"{len(orphans)} mask(s) without an image: {_shorten(orphans)}. Add the image or remove the mask."
        )
    _refuse_unmasked(image for image in defective if image not in pairs)
    return pairs


def _refuse_unmasked(images: Iterable[Path]) -> None:
    images = list(images)
    if images:
        raise ValueError(
            f"{len(images)} defective image(s) without a mask: {_shorten(images)}. Add the masks, or remove all masks "
            "of the category to go without pixel metrics."
        )


def _defect_samples(folders: Sequence[Path], masks_root: Path | None) -> list[Sample]:
    """Test samples of one folder a defect type, with masks from `masks_root`/<type> where there are any masks at
    all."""
    defects = {folder.name: _images(folder) for folder in folders}
    masks = (
        {} if masks_root is None else {f.name: _images(f) for f in _subfolders(masks_root) if not _is_normal(f.name)}
    )
    any_mask = any(masks.values())
    samples = []
    for name in sorted(defects.keys() | masks.keys()):
        images = defects.get(name, [])
        pairs = _pair(images, masks.get(name, []), images if any_mask else [])
        samples += [Sample(image, pairs.get(image), name, "test") for image in images]
    return samples


def _mask_root(folder: Path) -> Path | None:
    return next((folder / name for name in _MASK_FOLDERS if (folder / name).is_dir()), None)


# -- One pair of functions a layout: which categories are there, and the samples of one -----------------------------


def _mvtec_categories(root: Path) -> dict[str, Path]:
    return {f.name: f for f in _self_or_subfolders(root, lambda f: (f / "train").is_dir())}


def _read_mvtec(folder: Path, category: str) -> list[Sample]:
    train = [Sample(image, None, NORMAL, "train") for image in _normal_images(folder / "train")]
    normal = [Sample(image, None, NORMAL, "test") for image in _normal_images(folder / "test")]
    defects = [sub for sub in _subfolders(folder / "test") if not _is_normal(sub.name)]
    return train + normal + _defect_samples(defects, _mask_root(folder))


def _visa_rows(root: Path) -> list[dict[str, str]]:
    table = root / "split_csv" / "1cls.csv"
    if not table.is_file():
        return []
    with table.open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    columns = {"object", "split", "label", "image", "mask"}
    if rows and not columns <= rows[0].keys():
        raise ValueError(
            f"{table} lacks the column(s) {_shorten(sorted(columns - rows[0].keys()))}: is it VisA's own?"
        )
    return rows


def _visa_categories(root: Path) -> dict[str, Path]:
    return dict.fromkeys(sorted({row["object"] for row in _visa_rows(root)}), root)


def _read_visa(root: Path, category: str) -> list[Sample]:
    samples = []
    for row in _visa_rows(root):
        if row["object"] != category:
            continue
        normal = _is_normal(row["label"])
        if row["split"] == "train" and not normal:
            continue
        mask = root / row["mask"] if row["mask"] and not normal else None
        samples.append(Sample(root / row["image"], mask, NORMAL if normal else row["label"], row["split"]))
    _refuse_unmasked(s.image for s in samples if s.defect_type != NORMAL and (s.mask is None or not s.mask.is_file()))
    missing = [s.image for s in samples if not s.image.is_file()]
    if missing:
        raise ValueError(f"{len(missing)} image(s) listed in split_csv/1cls.csv do not exist: {_shorten(missing)}.")
    return samples


def _dagm_categories(root: Path) -> dict[str, Path]:
    has_labels = lambda f: any((f / split / "Label").is_dir() for split in ("Train", "Test"))  # noqa: E731
    return {f.name: f for f in _self_or_subfolders(root, has_labels)}


def _read_dagm(folder: Path, category: str) -> list[Sample]:
    samples = []
    for split in ("Train", "Test"):
        images, labels = _images(folder / split), folder / split / "Label"
        # Labels.txt names the label file of each defective image, so an image that lost it cannot pass for normal.
        table = labels / "Labels.txt"
        named = re.findall(r"(\S+)_label\.\w+", table.read_text(), re.IGNORECASE) if table.is_file() else []
        pairs = _pair(images, _images(labels), [image for image in images if image.stem in set(named)])
        samples += [
            Sample(image, pairs.get(image), "defect" if image in pairs else NORMAL, split.lower())
            for image in images
            if split == "Test" or image not in pairs
        ]
    return samples


def _folder_categories(root: Path) -> dict[str, Path]:
    def has_normal(folder: Path) -> bool:
        return any(_is_normal(sub.name) for sub in _subfolders(folder))

    if _images(root):
        return {root.name: root}
    return {f.name: f for f in _self_or_subfolders(root, has_normal)}


def _read_folder(folder: Path, category: str) -> list[Sample]:
    flat, subfolders = _images(folder), _subfolders(folder)
    if flat and any(_images(sub) for sub in subfolders):
        raise ValueError(
            f"{folder} holds images next to folders of images: move the normal ones to {folder / 'good'}."
        )
    normal = flat or _normal_images(folder)
    defects = _defect_samples(
        [sub for sub in subfolders if not _is_normal(sub.name) and sub.name not in _MASK_FOLDERS], _mask_root(folder)
    )
    held_out = set()
    if defects:
        # By a hash of the name: the choice does not follow the order of shooting and does not depend on the machine.
        by_hash = sorted(normal, key=lambda image: zlib.crc32(image.name.encode()))
        held_out = set(by_hash[: round(_TEST_SHARE * len(normal))])
    return [Sample(image, None, NORMAL, "test" if image in held_out else "train") for image in normal] + defects


def _self_or_subfolders(root: Path, is_category: Callable[[Path], bool]) -> list[Path]:
    return [root] if is_category(root) else [f for f in _subfolders(root) if is_category(f)]


@dataclass(frozen=True)
class _Layout:
    looks_like: str
    categories: Callable[[Path], dict[str, Path]]
    read: Callable[[Path, str], list[Sample]]


# In the order in which they are tried: the most particular first.
_LAYOUTS = {
    "visa": _Layout("split_csv/1cls.csv", _visa_categories, _read_visa),
    "dagm": _Layout("Class1/Train/Label", _dagm_categories, _read_dagm),
    "mvtec": _Layout("<category>/train/good", _mvtec_categories, _read_mvtec),
    "folder": _Layout("good/, or images alone", _folder_categories, _read_folder),
}
LAYOUTS = (*_LAYOUTS, "hub")
"""Names that `layout=` takes, next to "auto"."""


# -- Loading --------------------------------------------------------------------------------------------------------


def _recognise(source: str | Path, layout: str) -> tuple[str, dict[str, Path]]:
    """The layout's name and its categories; ("hub", {}) for a dataset on the Hub."""
    if layout not in ("auto", *LAYOUTS):
        raise ValueError(f"unknown layout {layout!r}: choose auto, {', '.join(LAYOUTS)}.")
    root = Path(source).expanduser()
    if layout == "hub" or (layout == "auto" and not root.exists() and re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(source))):
        return "hub", {}
    if not root.is_dir():
        raise FileNotFoundError(
            f"there is no folder {source}: give the folder of the data set, or owner/name on the Hub."
        )
    root = root.resolve()  # so that "." has a name
    candidates = _LAYOUTS if layout == "auto" else {layout: _LAYOUTS[layout]}
    for name, candidate in candidates.items():
        categories = candidate.categories(root)
        if categories:
            return name, categories
    expected = "; ".join(f"{name}: {candidate.looks_like}" for name, candidate in candidates.items())
    found = _shorten(sorted(f.name for f in root.iterdir())) or "nothing"
    raise ValueError(f"the layout of {root} is not recognised (it holds {found}). Expected {expected}.")


def _choose(category: str | None, categories: Sequence[str], source: str | Path) -> str:
    if category is None and len(categories) == 1:
        return categories[0]
    if category not in categories:
        problem = "name a category of" if category is None else f"unknown category {category!r} in"
        raise ValueError(f"{problem} {source}: it has {_shorten(categories, most=40)}.")
    return category


def list_categories(source: str | Path, layout: str = "auto") -> list[str]:
    """Names of the categories in a folder or a Hub dataset, sorted.

    On the Hub these are the configurations, or the values of a category column, for which the dataset is downloaded.

    Raises:
        FileNotFoundError: the folder or the Hub dataset does not exist.
        ValueError: the layout is not recognised.
    """
    layout, categories = _recognise(source, layout)
    return _hub_categories(str(source)) if layout == "hub" else sorted(categories)


def load_category(source: str | Path, category: str | None = None, *, layout: str = "auto") -> Any:
    """Load one category as a `datasets.DatasetDict` with the splits "train" (normal images) and "test".

    Args:
        source: folder of the data set or of one category of it, or a dataset id on the Hub (`owner/name`).
        category: which one; not needed where there is only one.
        layout: "auto" or one of `LAYOUTS`; the module's docstring describes them.

    Returns:
        The data set. Only paths are in memory; images are decoded row by row.

    Raises:
        FileNotFoundError: the folder or the Hub dataset does not exist.
        ValueError: the layout is not recognised; the category is not there; it has no normal training image; a mask
            has no image, a defective image no mask, or a mask another size than its image.
        ImportError: `datasets` is not installed.
    """
    datasets = require("datasets")
    layout, categories = _recognise(source, layout)
    if layout == "hub":
        return _load_hub(str(source), category)
    category = _choose(category, sorted(categories), source)
    folder = categories[category]
    samples = _LAYOUTS[layout].read(folder, category)
    if not any(sample.split == "train" for sample in samples):
        raise ValueError(f"category {category!r} in {folder} has no normal images to train on (layout {layout}).")
    _check_mask_sizes(samples)
    features = _features(datasets)
    splits = {}
    for split in ("train", "test"):
        rows = [sample for sample in samples if sample.split == split]
        columns = {
            "image": [str(row.image) for row in rows],
            "mask": [None if row.mask is None else str(row.mask) for row in rows],
            "label": [int(row.defect_type != NORMAL) for row in rows],
            "defect_type": [row.defect_type for row in rows],
            "split": [split] * len(rows),
        }
        splits[split] = datasets.Dataset.from_dict(columns, features=features, split=split)
    return datasets.DatasetDict(splits)


def _features(datasets: ModuleType) -> Any:
    text = datasets.Value("string")
    return datasets.Features(
        image=datasets.Image(), mask=datasets.Image(), label=datasets.Value("int64"), defect_type=text, split=text
    )


def _check_mask_sizes(samples: Iterable[Sample]) -> None:
    """Compare sizes from the file headers; an unreadable file is `check_images`' business."""
    for sample in samples:
        if sample.mask is None:
            continue
        try:
            size, mask_size = _shown_size(sample.image), _shown_size(sample.mask)
        except _UNREADABLE:
            continue
        if size != mask_size:
            raise ValueError(
                f"{sample.mask} is {mask_size[0]} x {mask_size[1]} pixels but its image {sample.image} is "
                f"{size[0]} x {size[1]}: make a mask of the image's size."
            )


def _shown_size(path: Path) -> tuple[int, int]:
    """(width, height) after the EXIF rotation that `datasets` applies when it decodes."""
    with Image.open(path) as image:
        turned = image.getexif().get(0x0112, 1) >= 5
        return image.size[::-1] if turned else image.size


# -- The Hub --------------------------------------------------------------------------------------------------------

_HUB_COLUMNS = {
    "image": ("image", "img"),
    "mask": ("mask", "ground_truth", "segmentation_mask", "segmentation", "gt"),
    "label": ("label", "labels", "is_anomalous", "anomaly", "target"),
    "defect_type": ("defect_type", "anomaly_type", "defect"),
    "category": ("category", "object", "product"),
}
_HUB_NORMAL = _NORMAL_NAMES | {"0", "false"}


def _ask_hub(function: Callable[..., Any], repo_id: str, *args: Any) -> Any:
    try:
        return function(repo_id, *args)
    except FileNotFoundError as error:  # what `datasets` raises for a dataset that is missing, gated, private or empty
        reason = str(error).splitlines()[0].rstrip(".")
        raise FileNotFoundError(
            f"dataset {repo_id} cannot be read from the Hub ({reason}). Check its name; a private or gated one needs "
            "`hf auth login`."
        ) from None


def _hub_configs(repo_id: str) -> list[str]:
    return sorted(_ask_hub(require("datasets").get_dataset_config_names, repo_id))


def _names(table: Any, column: str) -> np.ndarray:
    """A column's values as strings, class numbers replaced by their class's name."""
    feature, values = table.features[column], table.select_columns(column)[:][column]
    if hasattr(feature, "int2str"):
        values = [None if value is None else feature.int2str(value) for value in values]
    return np.array(["" if value is None else str(value) for value in values], dtype=object)


def _hub_table(repo_id: str, config: str) -> tuple[Any, np.ndarray, dict[str, str | None]]:
    """All splits of a configuration in one table, the split that each row comes from, and our roles' columns."""
    datasets = require("datasets")
    raw = _ask_hub(datasets.load_dataset, repo_id, config)
    table = datasets.concatenate_datasets(list(raw.values()))
    origin = np.repeat(list(raw), [len(part) for part in raw.values()])
    columns = {role: next((c for c in names if c in table.features), None) for role, names in _HUB_COLUMNS.items()}
    for role in ("image", "mask"):
        if columns[role] is not None and not isinstance(table.features[columns[role]], datasets.Image):
            columns[role] = None
    if columns["image"] is None:
        raise ValueError(f"dataset {repo_id} has no image column: it has {_shorten(table.column_names)}.")
    return table, origin, columns


def _hub_row_categories(repo_id: str, table: Any, columns: dict[str, str | None]) -> np.ndarray:
    """Each row's category: what a category column says, else all are one, called as the repository is."""
    if columns["category"] is not None:
        return _names(table, columns["category"])
    return np.full(len(table), repo_id.rstrip("/").rpartition("/")[2], dtype=object)


def _hub_categories(repo_id: str) -> list[str]:
    configs = _hub_configs(repo_id)
    if len(configs) > 1:
        return configs
    table, _, columns = _hub_table(repo_id, configs[0])
    return sorted(set(_hub_row_categories(repo_id, table, columns)))


def _load_hub(repo_id: str, category: str | None) -> Any:
    """One category of a Hub dataset: a configuration, or the rows that a category column names.

    Without a test split every fifth normal image is held out for it; with one, defective images of the train split
    are dropped.
    """
    datasets = require("datasets")
    configs = _hub_configs(repo_id)
    config = _choose(category, configs, repo_id) if len(configs) > 1 else configs[0]
    table, origin, columns = _hub_table(repo_id, config)
    wanted = np.ones(len(table), dtype=bool)
    if len(configs) == 1:
        row_categories = _hub_row_categories(repo_id, table, columns)
        wanted = row_categories == _choose(category, sorted(set(row_categories)), repo_id)

    types = _hub_defect_types(table, columns, repo_id)
    normal = types == NORMAL
    test_name = next((name for name in ("test", "validation") if name in origin), None)
    split = np.full(len(table), "", dtype=object)
    if "train" in origin and test_name is not None:
        split[wanted & normal & (origin == "train")] = "train"
        split[wanted & (origin == test_name)] = "test"
        if dropped := np.sum(wanted & ~normal & (origin == "train")):
            logger.warning("%s: %d defective images of the train split are left out", repo_id, dropped)
    else:
        split[wanted] = np.where(normal[wanted], "train", "test")
        if not normal[wanted].all():
            split[np.flatnonzero(wanted & normal)[4::5]] = "test"
    if not (split == "train").any():
        raise ValueError(
            f"dataset {repo_id} has no normal images to train on: its labels are {_shorten(sorted(set(types)))}."
        )

    features = _features(datasets)
    ours = {"label": (~normal).astype(int).tolist(), "defect_type": types.tolist(), "split": split.tolist()}
    if columns["mask"] is None:
        ours["mask"] = [None] * len(table)
    ours = datasets.Dataset.from_dict(ours, features=datasets.Features({name: features[name] for name in ours}))
    pictures = {columns[role]: role for role in ("image", "mask") if columns[role] is not None}
    table = table.select_columns(list(pictures)).rename_columns(pictures)
    # Side by side and then selected: neither step copies or decodes an image.
    table = datasets.concatenate_datasets([table, ours], axis=1).select_columns(list(features))
    return datasets.DatasetDict({name: table.select(np.flatnonzero(split == name)) for name in ("train", "test")})


def _hub_defect_types(table: Any, columns: dict[str, str | None], repo_id: str) -> np.ndarray:
    """Defect type of every row, from a label and a type column, from either, or from the masks; all normal without
    any."""
    label, kind = columns["label"], columns["defect_type"]
    if label is None and kind is None:
        if columns["mask"] is None:
            return np.full(len(table), NORMAL, dtype=object)
        masks = table.select_columns(columns["mask"])
        defective = [row[columns["mask"]] is not None and binary_mask(row[columns["mask"]]).any() for row in masks]
        return np.where(defective, "defect", NORMAL).astype(object)
    labels, kinds = (None if column is None else _names(table, column) for column in (label, kind))
    values = kinds if labels is None else labels
    normal = np.array([value.lower() in _HUB_NORMAL for value in values])
    if not normal.any():
        raise ValueError(
            f"column {label or kind!r} of dataset {repo_id} marks no image as normal: its values are "
            f"{_shorten(sorted(set(values)))}, and normal ones are called good, ok, normal, 0 or false."
        )
    named = kinds if kinds is not None else labels
    named = np.array(["defect" if value.lower() in ("", "1", "true") else value for value in named], dtype=object)
    return np.where(normal, NORMAL, named)


# -- Checking -------------------------------------------------------------------------------------------------------


def check_images(dataset: Any, *, max_corrupt: float = 0.05) -> tuple[Any, list[str]]:
    """Read every image and mask once, as the pipeline would, and leave out the rows that it could not use.

    One image a thread is in memory at a time.

    Args:
        dataset: a `datasets.Dataset` with the columns of this module.
        max_corrupt: the largest share of unusable rows to go on with.

    Returns:
        The dataset without them, and one line for each, `file: reason`, which is also logged as a warning.

    Raises:
        ValueError: more than `max_corrupt` of the rows are unusable; names the first of them.
    """
    datasets = require("datasets")
    encoded = dataset.select_columns(["image", "mask"])
    for column in ("image", "mask"):
        encoded = encoded.cast_column(column, datasets.Image(decode=False))

    def problem(row: int) -> str | None:
        for column, file in encoded[row].items():
            if file is None:
                continue
            name = file["path"] or f"{column} of row {row}"
            try:
                if file["bytes"] is None:
                    load_image(name)
                else:
                    with Image.open(io.BytesIO(file["bytes"])) as image:
                        load_image(image, name)
            except _UNREADABLE as error:
                return str(error) if name in str(error) else f"{name}: {error}"
        return None

    with ThreadPoolExecutor() as pool:
        found = list(pool.map(problem, range(len(encoded))))
    problems = [line for line in found if line is not None]
    if len(problems) > max_corrupt * len(found):
        raise ValueError(
            f"{len(problems)} of {len(found)} images are unusable, more than {max_corrupt:.0%}: {_shorten(problems)}. "
            "Is the copy or the download complete?"
        )
    if problems:
        logger.warning("%d of %d images are left out: %s", len(problems), len(found), "; ".join(problems))
    return dataset.select([row for row, line in enumerate(found) if line is None]), problems
