"""Anomaly-detection datasets as `datasets.DatasetDict`s that hold paths instead of pixels.

The splits are "train" (normal images only, all that training may see) and "test", with the columns

    image        `datasets.Image`, decoded when a row is read
    mask         `datasets.Image` or None; non-zero on defects, see `binary_mask`
    label        0 normal / 1 anomalous
    defect_type  "good" for normal images, else the name of the defect
    split        "train" / "test", so that it survives concatenation

The layout is recognised:

    mvtec    <category>/train/good, test/<good or defect>, ground_truth/<defect>. MVTec AD, MPDD, BTAD (`ok`, `ko`)
             and VisA converted to it. Masks carry the image's name, with or without `_mask`, in any image format. To
             evaluate, test (and ground_truth) are enough
    visa     split_csv/1cls.csv and the files that it lists: VisA as downloaded
    dagm     Class<N>/Train and Test, each with a Label folder: DAGM 2007. Defective training images are left out
    folder   good/ and one folder per defect, if any (ground_truth/<defect> for masks), or normal images alone
    hub      the id of a dataset on the Hugging Face Hub with these columns, of which only `image` is needed:

                 image        an `Image`
                 mask         an `Image`, non-zero on defects
                 label        0 normal / 1 anomalous, or class names: good, ok or normal, and anything else for defects
                 defect_type  text
                 category     text; several configurations are categories as well

             Splits "train" and "test". Without a label and a type, images with a mask are defective

A dataset without a split of its own (folder, and on the Hub without "test") is divided: a fifth of the normal images
is held out for testing. `hold_out=False` makes all of it the test set instead.
"""

from __future__ import annotations

import csv
import logging
import os
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from mimetypes import guess_type
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from .files import escaped, files_below, is_litter, require
from .images_diffusionad import IMAGE_SUFFIXES, load_image
from .masks import binary_mask, read_mask
from .visualization import is_own_picture

logger = logging.getLogger(__name__)

NORMAL = "good"
"""`defect_type` of normal images in every dataset, whatever the dataset itself calls them."""

_MASK_FOLDERS = ("ground_truth", "masks")
_TEST_SHARE = 0.2  # of the normal images, if a dataset has defects but no split of its own
_MOST_UNUSABLE = 0.05  # share of broken images to go on with


class _Sample(NamedTuple):
    image: Path
    mask: Path | None
    defect_type: str
    split: str


# -- Files ----------------------------------------------------------------------------------------------------------


def _images(folder: Path) -> list[Path]:
    """Image files directly in `folder`, sorted, without pictures of inspections and evaluations."""
    files = [file for file in _visible(folder) if file.suffix.lower() in IMAGE_SUFFIXES]
    return [file for file in files if not is_own_picture(file)]


def _subfolders(folder: Path) -> list[Path]:
    return [file for file in _visible(folder) if file.is_dir()]


def _visible(folder: Path) -> list[Path]:
    """What is in a folder, if it exists, apart from litter."""
    return sorted(f for f in folder.iterdir() if not is_litter(f.name)) if folder.is_dir() else []


def _is_normal(name: str) -> bool:
    return name.lower() in (NORMAL, "ok", "normal")


def _normal_images(folder: Path) -> list[Path]:
    return [image for sub in _subfolders(folder) if _is_normal(sub.name) for image in _images(sub)]


def _shorten(names: Iterable[Any], most: int = 5) -> str:
    names = [str(name) for name in names]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _pair(images: list[Path], masks: list[Path], defective: list[Path]) -> dict[Path, Path]:
    """Masks by image. Any of `images` may have a mask, the `defective` ones must."""
    by_stem = {image.stem: image for image in images}
    pairs, orphans = {}, []
    for mask in masks:
        image = by_stem.get(mask.stem) or by_stem.get(re.sub(r"_(mask|label)$", "", mask.stem, flags=re.IGNORECASE))
        if image is None:
            orphans.append(mask)
        else:
            pairs[image] = mask
    if orphans:
        raise ValueError(f"{len(orphans)} mask(s) without an image: {_shorten(orphans)}. Add or remove files.")
    _refuse_unmasked([image for image in defective if image not in pairs])
    return pairs


def _refuse_unmasked(images: list[Path]) -> None:
    if images:
        raise ValueError(
            f"{len(images)} defective image(s) without a mask: {_shorten(images)}. Add the masks, or remove all masks "
            "of the category to go without pixel metrics."
        )


def _defect_samples(folders: Sequence[Path], root: Path) -> list[_Sample]:
    """Test samples from one folder per defect type, with masks from `root`/ground_truth/<type> if there are any."""
    defects = {folder.name: _images(folder) for folder in folders}
    mask_root = next((root / name for name in _MASK_FOLDERS if (root / name).is_dir()), root / _MASK_FOLDERS[0])
    masks = {folder.name: _images(folder) for folder in _subfolders(mask_root) if not _is_normal(folder.name)}
    samples = []
    for name in sorted(defects.keys() | masks.keys()):
        images = defects.get(name, [])
        pairs = _pair(images, masks.get(name, []), images if any(masks.values()) else [])
        samples += [_Sample(image, pairs.get(image), name, "test") for image in images]
    return samples


def _refuse_left_over(samples: list[_Sample], folders: Iterable[Path]) -> None:
    """Refuses a test set if a picture anywhere below its folders does not count; masks of normal images need not."""
    used = {path for sample in samples for path in (sample.image, sample.mask)}
    left = [
        file
        for file in sorted(file for folder in folders if folder.is_dir() for file in files_below(folder))
        if file not in used
        and not is_own_picture(file)
        and (guess_type(file.name, strict=False)[0] or "").startswith("image/")
        and not (_is_normal(file.parent.name) and file.parent.parent.name in _MASK_FOLDERS)
    ]
    if left:
        raise ValueError(
            f"{len(left)} picture(s) would not count in the test set: {_shorten(left)}. Images belong directly into "
            f"good or the folder of a defect, as {_shorten(sorted(IMAGE_SUFFIXES), most=9)}, and masks into "
            f"{_MASK_FOLDERS[0]}/<defect>: move, convert or remove these."
        )


# -- The images of a category, by layout ----------------------------------------------------------------------------


def _read_mvtec(folder: Path, hold_out: bool) -> list[_Sample]:
    train = [_Sample(image, None, NORMAL, "train") for image in _normal_images(folder / "train")]
    normal = [_Sample(image, None, NORMAL, "test") for image in _normal_images(folder / "test")]
    defects = [sub for sub in _subfolders(folder / "test") if not _is_normal(sub.name)]
    samples = train + normal + _defect_samples(defects, folder)
    if not hold_out:
        _refuse_left_over(samples, [folder / name for name in ("test", *_MASK_FOLDERS)])
    return samples


def _visa_rows(root: Path) -> list[dict[str, str]]:
    table = root / "split_csv" / "1cls.csv"
    if not table.is_file():
        return []
    with table.open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    if rows and (missing := {"object", "split", "label", "image", "mask"} - rows[0].keys()):
        raise ValueError(f"{table} lacks the column(s) {_shorten(sorted(missing))}: is it VisA's?")
    return rows


def _read_visa(root: Path, category: str) -> list[_Sample]:
    samples = []
    for row in _visa_rows(root):
        normal = _is_normal(row["label"])
        if row["object"] == category and (normal or row["split"] == "test"):
            mask = None if normal else root / row["mask"]
            samples.append(_Sample(root / row["image"], mask, NORMAL if normal else row["label"], row["split"]))
    _refuse_unmasked([sample.image for sample in samples if sample.mask is not None and not sample.mask.is_file()])
    missing = [sample.image for sample in samples if not sample.image.is_file()]
    if missing:
        raise ValueError(f"{len(missing)} image(s) listed in split_csv/1cls.csv do not exist: {_shorten(missing)}.")
    return samples


def _read_dagm(folder: Path) -> list[_Sample]:
    samples = []
    for split in ("Train", "Test"):
        images, labels = _images(folder / split), folder / split / "Label"
        # Labels.txt names the label file of each defective image, so an image that lost it cannot pass for normal.
        table = labels / "Labels.txt"
        named = re.findall(r"(\S+)_label\.\w+", table.read_text(), re.IGNORECASE) if table.is_file() else []
        pairs = _pair(images, _images(labels), [image for image in images if image.stem in set(named)])
        samples += [
            _Sample(image, pairs.get(image), "defect" if image in pairs else NORMAL, split.lower())
            for image in images
            if split == "Test" or image not in pairs
        ]
    return samples


def _read_folder(folder: Path, hold_out: bool) -> list[_Sample]:
    flat, subfolders = _images(folder), _subfolders(folder)
    if flat and any(_images(sub) for sub in subfolders):
        raise ValueError(f"{folder} holds images next to folders of images: move the normal ones to a folder good.")
    normal = flat or _normal_images(folder)
    kinds = [sub for sub in subfolders if not _is_normal(sub.name) and sub.name not in _MASK_FOLDERS]
    defects = _defect_samples(kinds, folder)
    held_out = set(normal)
    if not hold_out:
        _refuse_left_over([_Sample(image, None, NORMAL, "test") for image in normal] + defects, [folder])
    else:
        # By a hash of the name: independent of the order in which photos were taken, and of the machine.
        by_hash = sorted(normal, key=lambda image: zlib.crc32(os.fsencode(image.name)))
        held_out = set(by_hash[: round(_TEST_SHARE * len(normal))] if defects else [])
    return [_Sample(image, None, NORMAL, "test" if image in held_out else "train") for image in normal] + defects


# -- Loading --------------------------------------------------------------------------------------------------------


def _is_hub_id(source: str | Path) -> bool:
    return not Path(source).expanduser().exists() and bool(re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(source)))


def _is_mvtec(folder: Path) -> bool:
    return (folder / "train").is_dir() or any(_images(sub) for sub in _subfolders(folder / "test"))


def _recognise(source: str | Path, hold_out: bool = True) -> dict[str, Callable[[], list[_Sample]]]:
    """The categories in a folder, sorted, with the functions that read them."""
    root = Path(source).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {source}: give a dataset's folder, or owner/name on the Hub.")
    root = root.resolve()  # so that "." has a name
    if root.name == "test" and any((root.parent / name).is_dir() for name in _MASK_FOLDERS):
        root = root.parent  # where its masks are
    read_mvtec, read_folder = (partial(read, hold_out=hold_out) for read in (_read_mvtec, _read_folder))
    if rows := _visa_rows(root):
        return {name: partial(_read_visa, root, name) for name in sorted({row["object"] for row in rows})}
    # Those that others would match as well come last.
    layouts: list[tuple[Callable[[Path], bool], Callable[[Path], list[_Sample]]]] = [
        (lambda folder: any((folder / split / "Label").is_dir() for split in ("Train", "Test")), _read_dagm),
        (_is_mvtec, read_mvtec),
        (lambda folder: any(_is_normal(sub.name) for sub in _subfolders(folder)), read_folder),
    ]
    for matches, read in layouts:
        if folders := [root] if matches(root) else [folder for folder in _subfolders(root) if matches(folder)]:
            return {escaped(folder.name): partial(read, folder) for folder in folders}
    if _images(root):
        return {escaped(root.name): partial(read_folder, root)}
    found = _shorten(sorted(f.name for f in root.iterdir())) or "nothing"
    raise ValueError(
        f"the layout of {root} is not recognised (it holds {found}). Expected split_csv/1cls.csv (VisA), "
        "Class1/Train/Label (DAGM), <category>/train/good (MVTec AD), good/, or images alone."
    )


def _choose(category: str | None, categories: Sequence[str], source: str | Path) -> str:
    if category is None and len(categories) == 1:
        return categories[0]
    if category is None or category not in categories:
        problem = "name a category of" if category is None else f"unknown category {category!r} in"
        raise ValueError(f"{problem} {source}: it has {_shorten(categories, most=40)}.")
    return category


def list_categories(source: str | Path) -> list[str]:
    """Names of the categories in a folder or a Hub dataset, sorted; raises as `load_category`.

    On the Hub these are the configurations, or else the values of `category`, for which the dataset is downloaded.
    """
    return _hub_categories(str(source)) if _is_hub_id(source) else list(_recognise(source))


def load_category(source: str | Path, category: str | None = None, *, hold_out: bool = True) -> Any:
    """Load one category as a `datasets.DatasetDict` with the splits "train" (normal images) and "test".

    Only paths are in memory; images are decoded row by row.

    Args:
        source: folder of the dataset or of one category of it, or a dataset id on the Hub (`owner/name`).
        category: which one; not needed if there is only one.
        hold_out: divide a dataset that has no split of its own. False is for evaluation: such a dataset is a test set
            as a whole, training images are not needed, and a picture that would not count is an error.

    Raises:
        FileNotFoundError: If the folder or the Hub dataset does not exist.
        ValueError: If layout or category are unknown, there is no normal training image (or, without `hold_out`, no
            test image), a mask has no image, or a defective image no mask.
        ImportError: If `datasets` is not installed.
    """
    datasets = require("datasets", "train")
    if _is_hub_id(source):
        return _load_hub(str(source), category, hold_out)
    categories = _recognise(source, hold_out)
    category = _choose(category and escaped(category), list(categories), source)
    samples = categories[category]()
    needed = "train" if hold_out else "test"
    if not any(sample.split == needed for sample in samples):
        missing = "normal images to train on" if hold_out else "test images"
        raise ValueError(f"category {category!r} in {source} has no {missing}.")
    splits = {}
    for split in ("train", "test"):
        rows = [sample for sample in samples if sample.split == split]
        columns = {
            "image": [_stored(row.image) for row in rows],
            "mask": [None if row.mask is None else _stored(row.mask) for row in rows],
            "label": [int(row.defect_type != NORMAL) for row in rows],
            "defect_type": [escaped(row.defect_type) for row in rows],
            "split": [split] * len(rows),
        }
        splits[split] = datasets.Dataset.from_dict(columns, features=_features(datasets), split=split)
    return datasets.DatasetDict(splits)


def add_normal(table: Any, files: Sequence[str]) -> Any:
    """The split "train" of a category with more normal images."""
    if not files:
        return table
    datasets, count = require("datasets", "train"), len(files)
    columns = {"image": [_stored(Path(file)) for file in files], "mask": [None] * count, "label": [0] * count}
    columns |= {"defect_type": [NORMAL] * count, "split": ["train"] * count}
    return datasets.concatenate_datasets([table, datasets.Dataset.from_dict(columns, features=table.features)])


def _stored(file: Path) -> dict[str, Any]:
    """A file as `datasets.Image` keeps it: by its path or, if that is no text, with its content."""
    name = escaped(file)
    return {"path": name, "bytes": None if name == str(file) else file.read_bytes()}


def _features(datasets: ModuleType) -> Any:
    text = datasets.Value("string")
    return datasets.Features(
        image=datasets.Image(), mask=datasets.Image(), label=datasets.Value("int64"), defect_type=text, split=text
    )


# -- The Hub --------------------------------------------------------------------------------------------------------


def _ask_hub(function: Callable[..., Any], repo_id: str, *args: Any) -> Any:
    try:
        return function(repo_id, *args)
    except FileNotFoundError as error:  # what `datasets` raises for a dataset that is missing, gated, private or empty
        reason = str(error).splitlines()[0].rstrip(".")
        raise FileNotFoundError(
            f"dataset {repo_id} cannot be read from the Hub ({reason}), and there is no such folder. Check the name; "
            "a private or gated dataset needs `hf auth login`."
        ) from None


def _hub_configs(repo_id: str) -> list[str]:
    return sorted(_ask_hub(require("datasets", "train").get_dataset_config_names, repo_id))


def _hub_table(repo_id: str, config: str) -> tuple[Any, np.ndarray, np.ndarray]:
    """All splits of a configuration in one table, the split that each row comes from, and its category."""
    datasets = require("datasets", "train")
    raw = _ask_hub(datasets.load_dataset, repo_id, config)
    table = datasets.concatenate_datasets(list(raw.values()))
    features = table.features
    # If defects are marked in a column of another name, they would be trained on as normal images.
    unknown = set(features) - {*_features(datasets), "category"}
    unmarked = unknown and not {"mask", "label", "defect_type"} & set(features)
    pictures = [features.get("image"), features.get("mask", datasets.Image())]
    if unmarked or not all(isinstance(feature, datasets.Image) for feature in pictures):
        raise ValueError(
            f"dataset {repo_id} has the columns {_shorten(features, most=40)}; expected are image (an Image) and, if "
            "there are any, mask (an Image), label (0 and 1, or class names like good and scratch), defect_type and "
            "category (text). Rename those that have other names with `dataset.rename_column` and push the result."
        )
    if "category" in features:
        categories = _hub_values(table, "category")
    else:
        categories = np.full(len(table), repo_id.rpartition("/")[2], dtype=object)
    return table, np.repeat(list(raw), [len(part) for part in raw.values()]), categories


def _hub_values(table: Any, column: str) -> np.ndarray:
    """A column as strings, with class numbers replaced by their names."""
    feature, values = table.features[column], table.select_columns(column)[:][column]
    if hasattr(feature, "int2str"):
        values = [None if value is None else feature.int2str(value) for value in values]
    return np.array(["" if value is None else str(value) for value in values], dtype=object)


def _hub_categories(repo_id: str) -> list[str]:
    configs = _hub_configs(repo_id)
    return configs if len(configs) > 1 else sorted(set(_hub_table(repo_id, configs[0])[2]))


def _load_hub(repo_id: str, category: str | None, hold_out: bool) -> Any:
    """One category of a Hub dataset: a configuration, or the rows of that `category`."""
    datasets = require("datasets", "train")
    configs = _hub_configs(repo_id)
    config = _choose(category, configs, repo_id) if len(configs) > 1 else configs[0]
    table, origin, categories = _hub_table(repo_id, config)
    if len(configs) == 1:
        origin[categories != _choose(category, sorted(set(categories)), repo_id)] = ""

    types = _hub_defect_types(table)
    normal, split = types == NORMAL, origin.copy()
    if "test" in origin and ("train" in origin or not hold_out):
        dropped = ~normal & (origin == "train")
        split[dropped] = ""
        if dropped.any():
            logger.warning("%s: %d defective images of the train split are left out", repo_id, dropped.sum())
    else:
        split = np.where(origin == "", "", np.where(normal & hold_out, "train", "test"))
        if hold_out and "test" in split:
            split[np.flatnonzero(split == "train")[4::5]] = "test"
    if hold_out and "train" not in split:
        found = _shorten(sorted(set(types[origin != ""])))
        raise ValueError(f"dataset {repo_id} has no normal images to train on: it has {found}.")

    columns: dict[str, list] = {"label": (~normal).astype(int).tolist(), "defect_type": types.tolist()}
    columns["split"] = split.tolist()
    if "mask" not in table.features:
        columns["mask"] = [None] * len(table)
    features = _features(datasets)
    ours = datasets.Dataset.from_dict(columns, features=datasets.Features({name: features[name] for name in columns}))
    pictures = table.select_columns([name for name in ("image", "mask") if name in table.features])
    # Side by side and then selected: neither step copies or decodes an image.
    table = datasets.concatenate_datasets([pictures, ours], axis=1).select_columns(list(features))
    return datasets.DatasetDict({name: table.select(np.flatnonzero(split == name)) for name in ("train", "test")})


def _hub_defect_types(table: Any) -> np.ndarray:
    """Defect type of every row, from `label` and `defect_type`, or from the masks; all normal without any of them."""
    columns = [name for name in ("label", "defect_type") if name in table.features]
    if columns:
        labels, kinds = _hub_values(table, columns[0]), _hub_values(table, columns[-1])
        normal = [_is_normal(label) or label.lower() in ("0", "false") for label in labels]
        types = [kind if kind.lower() not in ("", "1", "true") else "defect" for kind in kinds]
        return np.where(normal, NORMAL, np.array(types, dtype=object))
    if "mask" in table.features:
        masks = (row["mask"] for row in table.select_columns("mask"))
        defective = [mask is not None and bool(binary_mask(mask).any()) for mask in masks]
        return np.where(defective, "defect", NORMAL).astype(object)
    return np.full(len(table), NORMAL, dtype=object)


# -- Checking -------------------------------------------------------------------------------------------------------


def check_images(dataset: Any, value_range: float | None = None) -> tuple[Any, list[str]]:
    """Read every image and mask of a `datasets.Dataset` once, and leave out the rows that the pipeline could not use.

    Args:
        dataset: With the columns `image` and `mask`.
        value_range: As for [`load_image`].

    Returns:
        The dataset without them, and one line for each, `file: reason`, which is also logged as a warning.

    Raises:
        ValueError: If more than 5 % of the rows are unusable, and more than one; names the first of them.
    """
    datasets = require("datasets", "train")
    encoded = dataset.select_columns(["image", "mask"])
    for column in ("image", "mask"):
        encoded = encoded.cast_column(column, datasets.Image(decode=False))

    def problem(row: int) -> str | None:
        sizes = []
        for column, file in encoded[row].items():
            if file is None:
                continue
            name = file["path"] or f"{column} of row {row}"
            source: Any = name if file["bytes"] is None else file["bytes"]
            try:
                if column == "image":
                    width, height = load_image(source, name, value_range).shape[:0:-1]
                else:
                    height, width = read_mask(source, name).shape
            except (ValueError, OSError) as error:
                return str(error) if name in str(error) else f"{name}: {error}"
            sizes.append(f"{width} x {height}")
        return f"{name}: is {sizes[1]} pixels, but its image is {sizes[0]}" if len(set(sizes)) > 1 else None

    with ThreadPoolExecutor() as pool:
        found = list(pool.map(problem, range(len(encoded))))
    problems = [line for line in found if line is not None]
    if len(problems) > max(1, _MOST_UNUSABLE * len(found)) or len(problems) == len(found) > 0:
        raise ValueError(
            f"{len(problems)} of {len(found)} images are unusable, more than {_MOST_UNUSABLE:.0%}: "
            f"{_shorten(problems)}. Is the copy or the download complete?"
        )
    if problems:
        logger.warning("%d of %d images are left out: %s", len(problems), len(found), "; ".join(problems))
    return dataset.select([row for row, line in enumerate(found) if line is None]), problems
