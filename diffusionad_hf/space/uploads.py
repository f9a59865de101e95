"""What visitors send: files and zip archives, none of which is trusted.

Names from outside are only ever shown, never used as paths: an unpacked file is stored under its number. So a name
such as `../../etc/passwd` in an archive can do nothing, and a link is refused rather than followed.
"""

import re
import stat
import unicodedata
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError

from .. import InvalidImageError
from ..pipeline_diffusionad import load_image

MB = 1024 * 1024
MAX_IMAGE_BYTES = 50 * MB
MAX_PIXELS = 50_000_000
MAX_FILES = 500
MAX_UPLOAD_BYTES = 250 * MB
MAX_UNPACKED_BYTES = 500 * MB
# Litter of the systems that make archives, which no one wants a row for.
_LITTER = re.compile(r"(^|/)(__MACOSX/|\.DS_Store$|Thumbs\.db$|desktop\.ini$|\._)", re.IGNORECASE)


class UploadError(ValueError):
    """An upload that cannot be used at all; one line that says why and what to do."""


@dataclass(frozen=True)
class Upload:
    """One file of a batch: its name as shown, and where it is stored, or why it cannot be used."""

    name: str
    path: Path | None = None
    error: str = ""


def shown_name(name: str) -> str:
    """A file name that is safe to show: no folders, no control or direction signs, at most 120 characters."""
    name = name.replace("\\", "/").rstrip("/").rpartition("/")[2]
    name = "".join(sign for sign in name if unicodedata.category(sign)[0] != "C").strip()
    return name if len(name) <= 120 else f"{name[:80]}…{name[-39:]}"


def read_image(path: Path, name: str) -> torch.Tensor:
    """Reads an image after checking that it is not too large to be decoded.

    Args:
        path: Where it is stored.
        name: What the visitor calls it.

    Returns:
        (3, H, W) as `load_image` gives it.

    Raises:
        UploadError: If it cannot be inspected; the message names it and holds no path of the server.
    """
    try:
        if path.stat().st_size > MAX_IMAGE_BYTES:
            raise UploadError(f"{name}: larger than {MAX_IMAGE_BYTES // MB} MB. Shrink it first.")
        try:
            with Image.open(path) as image:
                width, height = image.size
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError):
            width = height = 0  # load_image says what is wrong with it
        if width * height > MAX_PIXELS:
            raise UploadError(
                f"{name}: {width} x {height} pixels, more than {MAX_PIXELS // 1_000_000} million. Shrink it first."
            )
        return load_image(path)
    except Image.DecompressionBombError as error:
        raise UploadError(f"{name}: declares too many pixels. Shrink or crop it first.") from error
    except (InvalidImageError, FileNotFoundError) as error:
        raise UploadError(str(error).replace(str(path), name)) from error


def collect(files: Sequence[tuple[Path, str]], folder: Path) -> list[Upload]:
    """Lists the images of an upload, archives unpacked.

    Args:
        files: Where each file is stored, and its name.
        folder: An empty folder to unpack into.

    Returns:
        One entry a file, with equal names told apart by a number. What cannot be used is an entry that says why.

    Raises:
        UploadError: If there is nothing in it, or too much.
    """
    if not files:
        raise UploadError("Choose images or a zip archive first.")
    uploads: list[Upload] = []
    for path, name in files:
        name = shown_name(name) or "unnamed"
        if zipfile.is_zipfile(path) and not _is_image(path):
            uploads += _unpack(path, name, folder, len(uploads))
        else:
            uploads.append(Upload(name, path))
        _check_count(len(uploads))
    if not uploads:
        raise UploadError(f"{shown_name(files[0][1])}: the archive holds no files.")
    return _told_apart(uploads)


def _is_image(path: Path) -> bool:
    # A picture with an archive appended is still a picture.
    try:
        with Image.open(path):
            return True
    except Exception:
        return False


def _check_count(count: int) -> None:
    if count > MAX_FILES:
        raise UploadError(f"More than {MAX_FILES} files; inspect them in several batches.")


def _unpack(path: Path, archive: str, folder: Path, offset: int) -> list[Upload]:
    try:
        with zipfile.ZipFile(path) as bundle:
            members = [m for m in bundle.infolist() if not m.is_dir() and not _LITTER.search(m.filename)]
            _check_count(offset + len(members))
            total = sum(member.file_size for member in members)
            if total > MAX_UNPACKED_BYTES:
                raise UploadError(
                    f"{archive}: unpacks to {total // MB:,} MB; at most {MAX_UNPACKED_BYTES // MB} MB are accepted."
                )
            return [_extract(bundle, m, folder / f"{offset + i:04d}") for i, m in enumerate(members)]
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        raise UploadError(f"{archive}: the archive is damaged.") from error


def _extract(bundle: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path) -> Upload:
    name = shown_name(member.filename) or "unnamed"
    if stat.S_ISLNK(member.external_attr >> 16):
        return Upload(name, error=f"{name}: a link, which is not followed.")
    if member.flag_bits & 0x1:
        return Upload(name, error=f"{name}: encrypted. Pack it without a password.")
    if member.file_size > MAX_IMAGE_BYTES:
        return Upload(name, error=f"{name}: larger than {MAX_IMAGE_BYTES // MB} MB. Shrink it first.")
    try:
        # Only so much is read, whatever size the archive declares.
        with bundle.open(member) as source, target.open("wb") as sink:
            left = MAX_IMAGE_BYTES
            while left > 0 and (block := source.read(min(MB, left))):
                sink.write(block)
                left -= len(block)
    except Exception:  # zlib, lzma, zipfile and NotImplementedError all come up here, each with its own reasons
        target.unlink(missing_ok=True)
        return Upload(name, error=f"{name}: damaged inside the archive.")
    if zipfile.is_zipfile(target) and not _is_image(target):
        target.unlink()
        return Upload(name, error=f"{name}: an archive inside the archive. Unpack it first.")
    return Upload(name, target)


def _told_apart(uploads: list[Upload]) -> list[Upload]:
    seen: set[str] = set()
    result = []
    for upload in uploads:
        name, number = upload.name, 1
        while name.lower() in seen:
            number += 1
            stem, dot, suffix = upload.name.rpartition(".")
            name = f"{stem} ({number}){dot}{suffix}" if dot else f"{upload.name} ({number})"
        seen.add(name.lower())
        result.append(Upload(name, upload.path, upload.error))
    return result
