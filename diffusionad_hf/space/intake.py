"""The one door for everything that visitors send: files, archives, JSON and numbers, none of which is trusted.

Names from outside are only ever shown, never used as paths: an unpacked file is stored under its number. So a name
such as `../../etc/passwd` in an archive can do nothing, and a link is refused rather than followed.
"""

import re
import secrets
import shutil
import stat
import unicodedata
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image

from ..images_diffusionad import InvalidImageError, load_image

if TYPE_CHECKING:
    import gradio as gr

MB = 1024 * 1024


@dataclass(frozen=True)
class Limits:
    """How much a visitor may send."""

    upload_bytes: int = 250 * MB
    image_bytes: int = 50 * MB
    image_pixels: int = 50_000_000
    files: int = 500  # of one batch, archives unpacked
    unpacked_bytes: int = 500 * MB  # of one archive
    calibration_bytes: int = 5 * MB
    waiting: int = 60  # callers in the queue


LIMITS = Limits()
_TOO_LARGE = f"larger than {LIMITS.image_bytes // MB} MB. Shrink it first."
# Litter of the systems that make archives, which no one wants a row for.
_LITTER = re.compile(r"(^|/)(__MACOSX/|\.DS_Store$|Thumbs\.db$|desktop\.ini$|\._)", re.IGNORECASE)


class Refusal(Exception):
    """Something that cannot be done; one line for the visitor that says why and what to do, without server paths."""


def owner_of(request: "gr.Request") -> str:
    """Who asks. A caller without a session gets results that no later call can open."""
    return request.session_hash or secrets.token_hex(16)


def number(value: object, name: str, low: float, high: float) -> float:
    if isinstance(value, (int, float)) and low <= value <= high:
        return float(value)
    raise Refusal(f"{name} must be a number from {low:g} to {high:g}.")


def _whole(value: object, name: str, low: int, high: int) -> int | None:
    text = "" if value is None else str(value).strip()
    if not text:
        return None
    if not re.fullmatch(r"[0-9]{1,10}(\.0)?", text) or not low <= float(text) <= high:
        raise Refusal(f"{name} must be a whole number from {low} to {high}.")
    return int(float(text))


@dataclass(frozen=True)
class Settings:
    """How to run a model; None is what it was calibrated with."""

    seed: int | None = None
    num_noises: int = 1
    small_timestep: int | None = None
    big_timestep: int | None = None
    resolution: int | None = None

    @classmethod
    def read(cls, seed=None, draws=1, small=None, big=None, resolution=None) -> "Settings":
        """Checks what a visitor entered: text, numbers, or nothing."""
        settings = cls(
            _whole(seed, "The seed", 0, 2**31),
            _whole(draws, "Noise draws", 1, 16) or 1,
            _whole(small, "The small timestep", 0, 999),
            _whole(big, "The big timestep", 0, 999),
            _whole(resolution, "The resolution", 64, 512),
        )
        if (settings.resolution or 0) % 32:
            raise Refusal("The resolution must be a multiple of 32.")
        return settings


@dataclass(frozen=True)
class Upload:
    """A file that was sent: its name as shown, and where it is stored, or why it cannot be used."""

    name: str
    path: Path | None = None
    error: str = ""

    def image(self) -> torch.Tensor:
        """Decodes it, unless it is too large for that; a refusal begins with its name."""
        if self.error:
            raise Refusal(f"{self.name}: {self.error}")
        try:
            if self.path.stat().st_size > LIMITS.image_bytes:
                raise Refusal(f"{self.name}: {_TOO_LARGE}")
            width, height = _image_size(self.path) or (0, 0)  # load_image says what is wrong with it
            if width * height > LIMITS.image_pixels:
                most = f"{LIMITS.image_pixels // 1_000_000} million"
                raise Refusal(f"{self.name}: {width} x {height} pixels, more than {most}. Shrink it first.")
            return load_image(self.path)
        except (InvalidImageError, FileNotFoundError) as error:
            raise Refusal(str(error).replace(str(self.path), self.name)) from error


def _image_size(path: Path) -> tuple[int, int] | None:
    """Width and height as the file states them; None if it is no image."""
    try:
        with Image.open(path) as image:
            return image.size
    except Exception:  # decoders raise whatever they stumble over
        return None


def upload_of(value: dict | None) -> Upload:
    """The file that a component of gradio's holds."""
    if not value or not value.get("path"):
        raise Refusal("Choose an image first.")
    path = Path(value["path"])
    return Upload(shown_name(value.get("orig_name") or path.name), path)


def uploads_of(values: list[dict] | None) -> list[Upload]:
    return [upload_of(value) for value in values or []]


def shown_name(name: str) -> str:
    """A file name that is safe to show: no folders, no control or direction signs, at most 120 characters."""
    name = name.replace("\\", "/").rstrip("/").rpartition("/")[2]
    name = "".join(sign for sign in name if unicodedata.category(sign)[0] != "C").strip() or "unnamed"
    return name if len(name) <= 120 else f"{name[:80]}…{name[-39:]}"


def collect(files: Sequence[Upload], folder: Path) -> list[Upload]:
    """Lists the images of a batch, archives unpacked into an empty folder, and equal names told apart by a number.

    What cannot be used is an entry that says why; only an empty batch, or one that is too large, is refused.
    """
    if not files:
        raise Refusal("Choose images or a zip archive first.")
    uploads: list[Upload] = []
    for file in files:
        uploads += _unpack(file, folder, len(uploads)) if _is_archive(file.path) else [file]
        _check_count(len(uploads))
    if not uploads:
        raise Refusal(f"{files[0].name}: the archive holds no files.")
    return _told_apart(uploads)


def _is_archive(path: Path) -> bool:
    # A picture with an archive appended is still a picture.
    return zipfile.is_zipfile(path) and _image_size(path) is None


def _check_count(count: int) -> None:
    if count > LIMITS.files:
        raise Refusal(f"More than {LIMITS.files} files; inspect them in several batches.")


def _unpack(archive: Upload, folder: Path, offset: int) -> list[Upload]:
    try:
        with zipfile.ZipFile(archive.path) as bundle:
            members = [m for m in bundle.infolist() if not m.is_dir() and not _LITTER.search(m.filename)]
            _check_count(offset + len(members))
            total, most = sum(member.file_size for member in members), LIMITS.unpacked_bytes
            if total > most:
                raise Refusal(f"{archive.name}: unpacks to {total // MB:,} MB; at most {most // MB} MB are accepted.")
            return [_extract(bundle, m, folder / f"{offset + i:04d}") for i, m in enumerate(members)]
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        raise Refusal(f"{archive.name}: the archive is damaged.") from error


def _extract(bundle: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path) -> Upload:
    name = shown_name(member.filename)
    if stat.S_ISLNK(member.external_attr >> 16):
        return Upload(name, error="a link, which is not followed.")
    if member.flag_bits & 0x1:
        return Upload(name, error="encrypted. Pack it without a password.")
    if member.file_size > LIMITS.image_bytes:
        return Upload(name, error=_TOO_LARGE)
    try:
        with bundle.open(member) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink)  # zipfile stops at the declared size
    except Exception:  # zlib, lzma, zipfile and NotImplementedError all come up here, each with its own reasons
        target.unlink(missing_ok=True)
        return Upload(name, error="damaged inside the archive.")
    if _is_archive(target):
        target.unlink()
        return Upload(name, error="an archive inside the archive. Unpack it first.")
    return Upload(name, target)


def _told_apart(uploads: list[Upload]) -> list[Upload]:
    named: dict[str, Upload] = {}
    for upload in uploads:
        path, name, count = Path(upload.name), upload.name, 1
        while name.lower() in named:
            count += 1
            name = f"{path.stem} ({count}){path.suffix}"
        named[name.lower()] = replace(upload, name=name)
    return list(named.values())
