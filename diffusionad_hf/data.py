"""Anomaly-detection datasets in the layouts they come in, as `datasets.Dataset`s that hold paths instead of pixels.

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
    hub      the id of a dataset on the Hugging Face Hub with these columns, of which only `image` is needed:

                 image        an `Image`
                 mask         an `Image`, non-zero on defects
                 label        0 normal / 1 anomalous, or class names: good, ok or normal, and anything else for defects
                 defect_type  text
                 category     text; several configurations are categories as well

             Splits "train" and "test"; without a test split every fifth normal image is held out. Without a label and
             a type, images with a mask are defective
"""

from __future__ import annotations

import csv
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

from .files import require
from .images_diffusionad import IMAGE_SUFFIXES, load_image

logger = logging.getLogger(__name__)

NORMAL = "good"
"""`defect_type` of normal images in every dataset, whatever the dataset itself calls them."""

_NORMAL_NAMES = frozenset({"good", "ok", "normal"})
_MASK_FOLDERS = ("ground_truth", "masks")
_TEST_SHARE = 0.2  # of the normal images, where a dataset has defects but no split of its own
_UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what PIL raises on broken files


class Sample(NamedTuple):
    """One image of a dataset, by its path."""

    image: Path
    mask: Path | None
    defect_type: str
    split: str


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
        ValueError: If a mask has no image, or a defective image has no mask; names them.
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
            f"there is no folder {source}: give the folder of the dataset, or owner/name on the Hub."
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
    if category is None or category not in categories:
        problem = "name a category of" if category is None else f"unknown category {category!r} in"
        raise ValueError(f"{problem} {source}: it has {_shorten(categories, most=40)}.")
    return category


def list_categories(source: str | Path, layout: str = "auto") -> list[str]:
    """Names of the categories in a folder or a Hub dataset, sorted.

    On the Hub these are the configurations, or else the values of `category`, for which the dataset is downloaded.

    Raises:
        FileNotFoundError: If the folder or the Hub dataset does not exist.
        ValueError: If the layout is not recognised.
    """
    layout, categories = _recognise(source, layout)
    return _hub_categories(str(source)) if layout == "hub" else sorted(categories)


def load_category(source: str | Path, category: str | None = None, *, layout: str = "auto") -> Any:
    """Load one category as a `datasets.DatasetDict` with the splits "train" (normal images) and "test".

    Args:
        source: folder of the dataset or of one category of it, or a dataset id on the Hub (`owner/name`).
        category: which one; not needed where there is only one.
        layout: "auto" or one of `LAYOUTS`; the module's docstring describes them.

    Returns:
        The dataset. Only paths are in memory; images are decoded row by row.

    Raises:
        FileNotFoundError: If the folder or the Hub dataset does not exist.
        ValueError: If the layout is not recognised; the category is not there; it has no normal training image; a mask
            has no image, a defective image no mask, or a mask another size than its image.
        ImportError: If `datasets` is not installed.
    """
    datasets = require("datasets", "train")
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

_HUB_SCHEMA = (
    "image (an Image) and, if there are any, mask (an Image), label (0 and 1, or class names like good and scratch), "
    "defect_type and category (text)"
)


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
    return sorted(_ask_hub(require("datasets", "train").get_dataset_config_names, repo_id))


def _hub_table(repo_id: str, config: str) -> tuple[Any, np.ndarray]:
    """All splits of a configuration in one table, and the split that each row comes from."""
    datasets = require("datasets", "train")
    raw = _ask_hub(datasets.load_dataset, repo_id, config)
    table = datasets.concatenate_datasets(list(raw.values()))
    features = table.features
    # A dataset with defects that nothing marks, under a column name of its own, would be trained on as normal.
    unknown = set(features) - {*_features(datasets), "category"}
    pictures = [features.get("image"), features.get("mask", datasets.Image())]
    unmarked = unknown and not {"mask", "label", "defect_type"} & set(features)
    if unmarked or not all(isinstance(feature, datasets.Image) for feature in pictures):
        raise ValueError(
            f"dataset {repo_id} has the columns {_shorten(table.column_names, most=40)}; expected are {_HUB_SCHEMA}. "
            "Rename those that have other names with `dataset.rename_column` and push the result."
        )
    return table, np.repeat(list(raw), [len(part) for part in raw.values()])


def _hub_values(table: Any, column: str) -> np.ndarray:
    """A column as strings, with class numbers replaced by their names."""
    feature, values = table.features[column], table.select_columns(column)[:][column]
    if hasattr(feature, "int2str"):
        values = [None if value is None else feature.int2str(value) for value in values]
    return np.array(["" if value is None else str(value) for value in values], dtype=object)


def _hub_row_categories(repo_id: str, table: Any) -> np.ndarray:
    """Each row's category; without such a column all rows are one, named after the repository."""
    if "category" in table.features:
        return _hub_values(table, "category")
    return np.full(len(table), repo_id.rstrip("/").rpartition("/")[2], dtype=object)


def _hub_categories(repo_id: str) -> list[str]:
    configs = _hub_configs(repo_id)
    if len(configs) > 1:
        return configs
    return sorted(set(_hub_row_categories(repo_id, _hub_table(repo_id, configs[0])[0])))


def _load_hub(repo_id: str, category: str | None) -> Any:
    """One category of a Hub dataset: a configuration, or the rows of that `category`.

    Defective images of a train split are dropped. Without a test split every fifth normal image is held out.
    """
    datasets = require("datasets", "train")
    configs = _hub_configs(repo_id)
    config = _choose(category, configs, repo_id) if len(configs) > 1 else configs[0]
    table, origin = _hub_table(repo_id, config)
    if len(configs) == 1:
        row_categories = _hub_row_categories(repo_id, table)
        category = _choose(category, sorted(set(row_categories)), repo_id)
        origin = np.where(row_categories == category, origin, "")

    types = _hub_defect_types(table)
    normal = types == NORMAL
    if "train" in origin and "test" in origin:
        dropped = ~normal & (origin == "train")
        split = np.where(dropped, "", origin)
        if dropped.any():
            logger.warning("%s: %d defective images of the train split are left out", repo_id, dropped.sum())
    else:
        split = np.where(origin == "", "", np.where(normal, "train", "test"))
        if "test" in split:
            split[np.flatnonzero(split == "train")[4::5]] = "test"
    if "train" not in split:
        found = _shorten(sorted(set(types[origin != ""])))
        raise ValueError(f"dataset {repo_id} has no normal images to train on: it has {found}.")

    features = _features(datasets)
    ours = {"label": (~normal).astype(int).tolist(), "defect_type": types.tolist(), "split": split.tolist()}
    if "mask" not in table.features:
        ours["mask"] = [None] * len(table)
    ours = datasets.Dataset.from_dict(ours, features=datasets.Features({name: features[name] for name in ours}))
    pictures = table.select_columns([name for name in ("image", "mask") if name in table.features])
    # Side by side and then selected: neither step copies or decodes an image.
    table = datasets.concatenate_datasets([pictures, ours], axis=1).select_columns(list(features))
    return datasets.DatasetDict({name: table.select(np.flatnonzero(split == name)) for name in ("train", "test")})


def _hub_defect_types(table: Any) -> np.ndarray:
    """Defect type of every row, from `label` and `defect_type`, or from the masks; all normal without any of them."""
    columns = [name for name in ("label", "defect_type", "mask") if name in table.features]
    if not columns:
        return np.full(len(table), NORMAL, dtype=object)
    if columns == ["mask"]:
        masks = (row["mask"] for row in table.select_columns("mask"))
        defective = [mask is not None and binary_mask(mask).any() for mask in masks]
        return np.where(np.array(defective), "defect", NORMAL).astype(object)
    columns = [name for name in columns if name != "mask"]
    labels, kinds = _hub_values(table, columns[0]), _hub_values(table, columns[-1])
    normal = np.array([_is_normal(label) or label.lower() in ("0", "false") for label in labels])
    named = [kind if kind.lower() not in ("", "1", "true") else "defect" for kind in kinds]
    return np.where(normal, NORMAL, np.array(named, dtype=object))


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
        ValueError: If more than `max_corrupt` of the rows are unusable; names the first of them.
    """
    datasets = require("datasets", "train")
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
