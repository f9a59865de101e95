"""Anomaly-detection datasets as `datasets.DatasetDict`s that hold paths instead of pixels.

The splits are "train" (normal images only, all that training may see) and "test", with the columns

    image        `datasets.Image`, decoded when a row is read
    mask         `datasets.Image` or None; non-zero on defects, see `binary_mask`
    label        0 normal / 1 anomalous
    defect_type  "good" for normal images, else the name of the defect
    split        "train" / "test", so that it survives concatenation

The layout is recognised:

    mvtec    <category>/train/good, test/<good or defect>, ground_truth/<defect>. MVTec AD, AD 2 (test_public; its
             test_private has no labels and is left out) and LOCO, MPDD, BTAD (`ok`, `ko`) and VisA converted to it.
             Images may lie in folders below these, or alone in train; normal ones in validation are for training.
             Masks have the image's name, also with `_mask`, `-gt`, `_label` or `_seg` behind or before it, in any
             image format; several of one image, in a folder of its name, count together. To evaluate, test (and
             ground_truth) are enough
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
import io
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
from PIL import Image

from .files import escaped, files_below, is_litter, require, shorten
from .images_diffusionad import IMAGE_SUFFIXES, load_image
from .masks import binary_mask, read_mask, undecorated
from .visualization import is_own_picture

logger = logging.getLogger(__name__)

NORMAL = "good"
"""`defect_type` of normal images in every dataset, whatever the dataset itself calls them."""

_MASK_FOLDERS = ("ground_truth", "masks", "mask", "gt", "annotations", "annotation", "segmentations", "segmentation")
_TEST_FOLDERS = ("test", "test_public")
_TEST_SHARE = 0.2  # of the normal images, if a dataset has defects but no split of its own
_READERS = 4  # threads that decode, each of which may hold a large photo
_MOST_UNUSABLE = 0.05  # share of broken images to go on with
_MOST_DEFECTIVE = 0.5  # share of an image beyond which its mask may be inverted


class _Sample(NamedTuple):
    image: Path
    masks: tuple[Path, ...]
    defect_type: str
    split: str


# -- Files ----------------------------------------------------------------------------------------------------------


def looks_like_image(file: Path) -> bool:
    """Whether a file's name is that of a picture; also of those that are not read, which are then named."""
    return file.suffix.lower() in IMAGE_SUFFIXES or (guess_type(file.name, strict=False)[0] or "").startswith("image/")


def _images(folder: Path, below: bool = False) -> list[Path]:
    """Image files directly in `folder`, or also below it, sorted, without pictures of inspections and evaluations."""
    files = files_below(folder) if below and folder.is_dir() else _visible(folder)
    # A link that leads nowhere is named as an image that cannot be read, rather than passed over.
    return [
        file
        for file in files
        if looks_like_image(file) and (file.is_file() or not file.exists()) and not is_own_picture(file)
    ]


def _subfolders(folder: Path) -> list[Path]:
    return [file for file in _visible(folder) if file.is_dir()]


def _visible(folder: Path) -> list[Path]:
    """What is in a folder, if it exists, apart from litter."""
    return sorted(f for f in folder.iterdir() if not is_litter(f.name)) if folder.is_dir() else []


def _is_normal(name: str) -> bool:
    return name.lower() in (NORMAL, "ok", "normal")


def _is_mask_folder(name: str) -> bool:
    return re.sub(r"[ _-]", "", name.lower()) in {name.replace("_", "") for name in _MASK_FOLDERS}


def _normal_images(folder: Path) -> list[Path]:
    """Images in and below good; what lies in a folder of masks there says nothing."""
    good = [(sub, image) for sub in _subfolders(folder) if _is_normal(sub.name) for image in _images(sub, below=True)]
    return [image for sub, image in good if not any(map(_is_mask_folder, image.relative_to(sub).parts[:-1]))]


def _pair(images: dict[Path, str], masks: dict[Path, str], defective: Iterable[Path]) -> dict[Path, list[Path]]:
    """
    Masks by image. Any of `images` may have masks, the `defective` ones must.

    Both come with their places, such as `crack/day1/000`: a mask belongs to the image in its place, or whose place its
    folder is; else to the only one of its name in its type's folder, or anywhere if it lies in none. Its name may be
    decorated, such as `000_mask` or `gt-000`.
    """
    places: dict[str, list[Path]] = {}
    for image, place in images.items():
        kind, _, rest = place.rpartition("/")
        for name in {image.stem, image.name}:
            for key in (f"{kind}/{name}", f"{place.partition('/')[0]}//{name}" if kind else "", f"//{name}"):
                places.setdefault(key, []).append(image)
    pairs: dict[Path, list[Path]] = {}
    orphans = []
    for mask, place in masks.items():
        folder, _, stem = place.rpartition("/")
        kind, name = folder.partition("/")[0], undecorated(stem)
        above, _, last = folder.rpartition("/")
        keys = [f"{folder}/{stem}", f"{folder}/{name}", f"{above}/{last}", f"{kind}//{stem}", f"{kind}//{name}"]
        found = next((places[key] for key in keys if len(set(places.get(key, []))) == 1), None)
        if found is None:
            orphans.append(mask)
        else:
            pairs.setdefault(found[0], []).append(mask)
    if orphans:
        raise ValueError(
            f"{len(orphans)} mask(s) without an image: {shorten(orphans)}. A mask has the name of one image, also "
            f"with _mask, _gt, _label or _seg, and lies in {_MASK_FOLDERS[0]}/<defect> as the image does in <defect>; "
            "several of one image lie in a folder of its name. Rename, add or remove files."
        )
    _refuse_unmasked([image for image in defective if image not in pairs])
    return pairs


def _refuse_masks_among(images: Iterable[Path], also_twins: bool) -> None:
    """Refuses masks beside their images; of equal names that differ in their suffix one may be the other's mask."""
    seen: dict[Path, Path] = {}
    for image in images:
        seen.setdefault(image.with_suffix(""), image)
    masks = [
        image
        for image in images
        if (image.with_name(name) in seen if (name := undecorated(image.stem)) != image.stem else False)
        or (also_twins and seen[image.with_suffix("")] != image)
    ]
    if masks:
        raise ValueError(
            f"{len(masks)} file(s) beside images of the same name, which would count as images: {shorten(masks)}. If "
            f"they are masks, move them to {_MASK_FOLDERS[0]}/<defect>; if they are copies, remove them."
        )


def _refuse_unmasked(images: list[Path]) -> None:
    if images:
        raise ValueError(
            f"{len(images)} defective image(s) without a mask: {shorten(images)}. Add the masks, or remove all masks "
            "of the category to go without pixel metrics."
        )


def _place(file: Path, root: Path) -> str:
    """Where a file lies, without its suffix and without folders of masks."""
    inside = file.relative_to(root)
    return "/".join([*(part for part in inside.parts[:-1] if not _is_mask_folder(part)), inside.stem])


def _defect_samples(root: Path, test: Path) -> list[_Sample]:
    """Test samples from `test`, with a folder per type of defect, and masks from the folders of masks in either."""
    images: dict[Path, str] = {}
    masks: dict[Path, str] = {}
    unread: list[Path] = []
    for sub in _subfolders(test):
        if not _is_normal(sub.name) and not _is_mask_folder(sub.name):
            for file in _images(sub, below=True):
                is_mask = any(map(_is_mask_folder, file.relative_to(sub).parts[:-1]))
                (masks if is_mask else images)[file] = _place(file, test)
    for folder in dict.fromkeys((*_subfolders(root), *_subfolders(test))):
        if _is_mask_folder(folder.name):
            found = {file: _place(file, folder) for file in _images(folder, below=True)}
            masks |= {file: place for file, place in found.items() if not _is_normal(place.partition("/")[0])}
            unread += [] if found else files_below(folder)
    if images and unread and not masks:
        raise ValueError(
            f"{len(unread)} file(s) in folders of masks are no pictures: {shorten(unread, 2)}. Save masks as PNG, "
            "white on the defect, or remove the folder."
        )
    _refuse_masks_among(images, also_twins=True)
    pairs = _pair(images, masks, images if masks else ())
    return [_Sample(image, tuple(pairs.get(image, ())), images[image].partition("/")[0], "test") for image in images]


def _refuse_left_over(samples: list[_Sample], folder: Path) -> None:
    """Refuses a dataset if a picture anywhere below a folder does not count; masks of normal images need not."""
    used = {path for sample in samples for path in (sample.image, *sample.masks)}
    left = [
        file
        for file in _images(folder, below=True)
        if file not in used
        and not any(map(_is_mask_folder, file.relative_to(folder).parts[:-1]))  # of a normal image, or paired
    ]
    if left:
        raise ValueError(
            f"{len(left)} picture(s) would not count: {shorten(left)}. Images belong into good or the folder of a "
            f"defect, and masks into {_MASK_FOLDERS[0]}/<defect>: move or remove these."
        )


# -- The images of a category, by layout ----------------------------------------------------------------------------


def _test_folder(folder: Path) -> Path:
    return next((folder / name for name in _TEST_FOLDERS if (folder / name).is_dir()), folder / _TEST_FOLDERS[0])


def _read_mvtec(folder: Path) -> list[_Sample]:
    train = []
    for part in (folder / "train", folder / "validation"):
        flat, good = _images(part), _normal_images(part)
        defective = [sub for sub in _subfolders(part) if not _is_normal(sub.name) and _images(sub, below=True)]
        if flat and (good or defective):
            raise ValueError(
                f"{part} holds images next to folders of images: move the normal ones to {part / NORMAL}."
            )
        if defective:
            logger.warning("%s: training takes normal images alone, not these: %s", part, shorten(defective))
        train += flat or good
    test = _test_folder(folder)
    normal = _normal_images(test)
    _refuse_masks_among([*train, *normal], also_twins=False)
    samples = [_Sample(image, (), NORMAL, "train") for image in train]
    samples += [_Sample(image, (), NORMAL, "test") for image in normal] + _defect_samples(folder, test)
    _refuse_left_over(samples, test)
    return samples


def _visa_rows(root: Path) -> list[dict[str, str]]:
    table = root / "split_csv" / "1cls.csv"
    if not table.is_file():
        return []
    with table.open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    if rows and (missing := {"object", "split", "label", "image", "mask"} - rows[0].keys()):
        raise ValueError(f"{table} lacks the column(s) {shorten(sorted(missing))}: is it VisA's?")
    return rows


def _read_visa(root: Path, category: str) -> list[_Sample]:
    samples = []
    for row in _visa_rows(root):
        normal = _is_normal(row["label"])
        if row["object"] == category and (normal or row["split"] == "test"):
            masks = () if normal else (root / row["mask"],)
            samples.append(_Sample(root / row["image"], masks, NORMAL if normal else row["label"], row["split"]))
    _refuse_unmasked([sample.image for sample in samples if not all(mask.is_file() for mask in sample.masks)])
    missing = [sample.image for sample in samples if not sample.image.is_file()]
    if missing:
        raise ValueError(f"{len(missing)} image(s) listed in split_csv/1cls.csv do not exist: {shorten(missing)}.")
    return samples


def _read_dagm(folder: Path) -> list[_Sample]:
    samples = []
    for split in ("Train", "Test"):
        images, labels = _images(folder / split), folder / split / "Label"
        # Labels.txt names the label file of each defective image, so an image that lost it cannot pass for normal.
        table = labels / "Labels.txt"
        named = re.findall(r"(\S+)_label\.\w+", table.read_text(), re.IGNORECASE) if table.is_file() else []
        masks = {mask: mask.stem for mask in _images(labels)}
        defective = [image for image in images if image.stem in set(named)]
        pairs = _pair({image: image.stem for image in images}, masks, defective)
        samples += [
            _Sample(image, tuple(pairs.get(image, ())), "defect" if image in pairs else NORMAL, split.lower())
            for image in images
            if split == "Test" or image not in pairs
        ]
    return samples


def _read_folder(folder: Path, hold_out: bool) -> list[_Sample]:
    flat = _images(folder)
    if flat and any(_images(sub, below=True) for sub in _subfolders(folder)):
        raise ValueError(f"{folder} holds images next to folders of images: move the normal ones to a folder good.")
    normal = flat or _normal_images(folder)
    _refuse_masks_among(normal, also_twins=False)
    defects = [] if flat else _defect_samples(folder, folder)
    _refuse_left_over([_Sample(image, (), NORMAL, "test") for image in normal] + defects, folder)
    held_out = set(normal)
    if hold_out:
        # By a hash of the name: independent of the order in which photos were taken, and of the machine.
        by_hash = sorted(normal, key=lambda image: zlib.crc32(os.fsencode(image.name)))
        held_out = set(by_hash[: round(_TEST_SHARE * len(normal))] if defects else [])
    return [_Sample(image, (), NORMAL, "test" if image in held_out else "train") for image in normal] + defects


# -- Loading --------------------------------------------------------------------------------------------------------


def _is_hub_id(source: str | Path) -> bool:
    return not Path(source).expanduser().exists() and bool(re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(source)))


def _is_mvtec(folder: Path) -> bool:
    return (folder / "train").is_dir() or any(_images(sub, below=True) for sub in _subfolders(_test_folder(folder)))


def _recognise(source: str | Path, hold_out: bool = True) -> dict[str, Callable[[], list[_Sample]]]:
    """The categories in a folder, sorted, with the functions that read them."""
    root = Path(source).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {source}: give a dataset's folder, or owner/name on the Hub.")
    root = root.resolve()  # so that "." has a name
    if root.name in _TEST_FOLDERS and any((root.parent / name).is_dir() for name in _MASK_FOLDERS):
        root = root.parent  # where its masks are
    read_folder = partial(_read_folder, hold_out=hold_out)
    if rows := _visa_rows(root):
        return {name: partial(_read_visa, root, name) for name in sorted({row["object"] for row in rows})}
    # Those that others would match as well come last.
    layouts: list[tuple[Callable[[Path], bool], Callable[[Path], list[_Sample]]]] = [
        (lambda folder: any((folder / split / "Label").is_dir() for split in ("Train", "Test")), _read_dagm),
        (_is_mvtec, _read_mvtec),
        (lambda folder: any(_is_normal(sub.name) for sub in _subfolders(folder)), read_folder),
    ]
    for matches, read in layouts:
        if folders := [root] if matches(root) else [folder for folder in _subfolders(root) if matches(folder)]:
            return {escaped(folder.name): partial(read, folder) for folder in folders}
    if _images(root):
        return {escaped(root.name): partial(read_folder, root)}
    found = shorten(sorted(f.name for f in root.iterdir())) or "nothing"
    raise ValueError(
        f"the layout of {root} is not recognised (it holds {found}). Expected split_csv/1cls.csv (VisA), "
        "Class1/Train/Label (DAGM), <category>/train/good (MVTec AD), good/, or images alone."
    )


def _choose(category: str | None, categories: Sequence[str], source: str | Path) -> str:
    if category is None and len(categories) == 1:
        return categories[0]
    if category is None or category not in categories:
        problem = "name a category of" if category is None else f"unknown category {category!r} in"
        raise ValueError(f"{problem} {source}: it has {shorten(categories, most=40)}.")
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
        missing = "normal images to train on: they belong into train/good, good, or alone into train or the folder"
        missing = missing if hold_out else "test images: they belong into test/good and test/<defect>"
        raise ValueError(f"category {category!r} in {source} has no {missing}.")
    splits = {}
    for split in ("train", "test"):
        rows = [sample for sample in samples if sample.split == split]
        columns = {
            "image": [_stored(row.image) for row in rows],
            "mask": [_stored_mask(row.masks) for row in rows],
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


def _stored_mask(masks: Sequence[Path]) -> dict[str, Any] | None:
    """One mask as it is, several as one."""
    if len(masks) < 2:
        return _stored(masks[0]) if masks else None
    try:
        found = [read_mask(mask, str(mask)) for mask in masks]
    except ValueError:
        return _stored(masks[-1])  # damaged, or beside one that is: reading it again says so
    if len({mask.shape for mask in found}) > 1:
        raise ValueError(f"the masks of one image differ in size: {shorten(masks)}.")
    content = io.BytesIO()
    Image.fromarray(np.logical_or.reduce(found)).save(content, "PNG")
    return {"path": escaped(masks[0].parent), "bytes": content.getvalue()}


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
            f"dataset {repo_id} has the columns {shorten(features, most=40)}; expected are image (an Image) and, if "
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
        found = shorten(sorted(set(types[origin != ""])))
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
        The dataset without them, and one line for each, `file: reason`, which is also logged as a warning. Masks that
        mark most of their image, as inverted ones do, stay and are named in a warning.

    Raises:
        ValueError: If more than 5 % of the rows are unusable, and more than one; names the first of them.
    """
    datasets = require("datasets", "train")
    encoded = dataset.select_columns(["image", "mask"])
    for column in ("image", "mask"):
        encoded = encoded.cast_column(column, datasets.Image(decode=False))
    inverted: list[str] = []

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
                    mask = read_mask(source, name)
                    height, width = mask.shape
                    if mask.mean() > _MOST_DEFECTIVE:
                        inverted.append(name)
            except (ValueError, OSError) as error:
                return str(error) if name in str(error) else f"{name}: {error}"
            sizes.append(f"{width} x {height}")
        return f"{name}: is {sizes[1]} pixels, but its image is {sizes[0]}" if len(set(sizes)) > 1 else None

    with ThreadPoolExecutor(_READERS) as pool:
        found = list(pool.map(problem, range(len(encoded))))
    problems = [line for line in found if line is not None]
    if len(problems) > max(1, _MOST_UNUSABLE * len(found)) or len(problems) == len(found) > 0:
        raise ValueError(
            f"{len(problems)} of {len(found)} images are unusable, more than {_MOST_UNUSABLE:.0%}: "
            f"{shorten(problems)}. Is the copy or the download complete?"
        )
    if inverted:
        logger.warning(
            "%d mask(s) mark more than half of their image as defect: %s. If white, or what is opaque, is the "
            "background there, invert them.",
            len(inverted),
            shorten(sorted(inverted)),
        )
    if problems:
        logger.warning("%d of %d images are left out: %s", len(problems), len(found), "; ".join(problems))
    return dataset.select([row for row, line in enumerate(found) if line is None]), problems
