"""The one door for everything that visitors send: values, files, archives, JSON and numbers, none of which is trusted.

`admit` looks at every value of a call before anything else does. Names from outside are only ever shown, never used as
paths: an unpacked file is stored under its number. So a name such as `../../etc/passwd` in an archive can do nothing,
and a link is refused rather than followed.
"""

import hashlib
import os
import re
import secrets
import shutil
import stat
import struct
import unicodedata
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..files import is_litter
from ..images_diffusionad import InvalidImageError
from ..visualization import is_own_picture
from .decoding import decode

if TYPE_CHECKING:
    import gradio as gr

MB = 1024 * 1024


@dataclass(frozen=True)
class Limits:
    """How much a visitor may send and ask for. An address is an IP address; a session is one open page or client."""

    # of files
    upload_bytes: int = 250 * MB  # of one file
    request_bytes: int = 2048 * MB  # of all files that a page sends at once
    image_bytes: int = 50 * MB
    image_pixels: int = 50_000_000
    files: int = 500  # of one batch, archives unpacked
    archives: int = 20  # of one batch
    addresses: int = 8  # of one batch, which are fetched
    unpacked_bytes: int = 500 * MB  # of one batch, all archives together
    calibration_bytes: int = 5 * MB
    calibration_scores: int = 5000
    card_bytes: int = 200_000
    # of a call
    call_bytes: int = 2 * MB  # its JSON; photos are uploaded before
    tool_bytes: int = 70 * MB  # the JSON of an assistant's call, which holds photos
    text: int = 1000  # characters of a value that is no file
    run_pixels: int = 16 * 256 * 256  # of one image, times the noise draws
    batch_seconds: int = 900
    # of teaching
    fewest_photos: int = 20
    kept_pixels: int = 1_000_000  # of each photo
    teaching_seconds: int = 1800
    teaching_gpu_seconds: int = 240  # asked of ZeroGPU for a training
    gpu_seconds: int = 20  # and for an inspection
    teaching_bytes: int = 4 * 1024 * MB  # of memory
    preview_seconds: int = 300
    marks_seconds: int = 120  # in which marked photos are decoded
    lessons: int = 8  # that wait or run
    lessons_per_address: int = 2
    kept_per_address: int = 6  # lessons that are over
    taught_bytes: int = 8 * 1024 * MB  # photos of all lessons
    # of images fetched from an address
    fetch_seconds: int = 10
    redirects: int = 3
    # of traffic
    sessions: int = 1000  # that are remembered
    waiting: int = 200  # calls in the queue
    waiting_per_address: int = 20
    waiting_per_session: int = 8
    light_seconds: float = 4  # of the processor; addresses that took more in the last minutes take turns
    calls_per_second: int = 20  # of an address, on average over 15 s
    open_per_address: int = 48  # connections
    uploading_per_address: int = 4
    upload_seconds: int = 600
    stored_bytes: int = 8 * 1024 * MB  # uploads of all visitors that are kept at a time
    spared_bytes: int = 2 * 1024 * MB  # of these, for addresses that sent less than half as much in the last hour


LIMITS = Limits()
_TOO_LARGE = f"larger than {LIMITS.image_bytes // MB} MB. Shrink it first."


class Refusal(Exception):
    """Something that cannot be done; one line for the visitor that says why and what to do, without server paths."""


def owner_of(request: "gr.Request") -> str:
    """Who asks, as a hash. A caller without a session gets results that no later call can open."""
    session = request.session_hash
    return hashlib.sha256(str(session).encode(errors="replace")).hexdigest() if session else secrets.token_hex(32)


def read_card(file: Path) -> str:
    """
    A model card that is safe to search: its parser's time grows with the square of a run of line ends.

    Raises:
        ValueError: If it is too large or no text.
    """
    if file.stat().st_size > LIMITS.card_bytes:
        raise ValueError(f"larger than {LIMITS.card_bytes // 1000} kB")
    return re.sub(r"\n{3,}", "\n\n", file.read_text(encoding="utf-8").replace("\r", "\n"))


# ---- values of a call ----

_IS_UTF_8 = 0x800  # a flag of a file in an archive
_NOT_HERE = "This file is not among your uploads. Upload it again."


def admit(value: object, uploads: Path, is_file: bool) -> object:
    """
    Checks a value of a call, as its JSON gives it.

    Args:
        value: The value.
        uploads: The folder in which uploads lie; files elsewhere are refused, whether they exist or not.
        is_file: Whether the value is for a component that takes files.

    Returns:
        The value, of which a file keeps nothing but its path, its name, and what marks it as a file.

    Raises:
        Refusal: If it is anything else than None, a boolean, a number, a short text, or files where files belong; or
            litter, which is left out among several files.
    """
    if value is None or (not is_file and isinstance(value, (bool, int, float))):
        return value
    if not is_file:
        if isinstance(value, str) and len(value) <= LIMITS.text and value.isprintable():
            return value
        raise Refusal(f"A value must be a number or a text of at most {LIMITS.text} characters.")
    if isinstance(value, list):
        if len(value) > LIMITS.files:
            raise Refusal(f"More than {LIMITS.files} files; inspect them in several batches.")
        files = [_admit_file(item, uploads) for item in value]
        return [file for file in files if not _is_hidden(file)]
    if _is_hidden(file := _admit_file(value, uploads)):
        # Gradio takes none from below the folder that the server was started in, and would not say so.
        raise Refusal("A hidden file, as systems leave them beside photos. If it is a photo, give it another name.")
    return file


def _is_hidden(file: dict) -> bool:
    return is_litter(os.path.basename(file["path"]))


def _admit_file(value: object, uploads: Path) -> dict:
    if not isinstance(value, dict) or not isinstance(path := value.get("path"), str):
        raise Refusal("A file must be given as an upload or an address.")
    name = value.get("orig_name")
    return {
        "path": str(uploaded(path, uploads)),
        "orig_name": name[: LIMITS.text] if isinstance(name, str) else None,
        "meta": {"_type": "gradio.FileData"},
    }


def uploaded(path: str, uploads: Path) -> Path:
    """The path of an upload, a regular file in `uploads / <64 hexadecimal digits>`; all else is refused alike."""
    found = Path(path)
    try:
        # Only the name that was given out, not another way to the file: `/proc/self/fd/7` leads to one as well.
        if found.parent.parent != uploads or not re.fullmatch(r"[0-9a-f]{64}", found.parent.name):
            raise Refusal(_NOT_HERE)
        if os.path.realpath(found, strict=True) != str(found) or not stat.S_ISREG(os.lstat(found).st_mode):
            raise Refusal(_NOT_HERE)
    except (OSError, ValueError) as error:  # absent, too long, or with a null character
        raise Refusal(_NOT_HERE) from error
    return found


def number(value: object, name: str, low: float, high: float) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high:
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

    def image(self, value_range: float | None = None) -> tuple[torch.Tensor, str]:
        """Decodes it as [`load_image`] does, unless it is too large: the pixels, and a note on them; a refusal begins
        with its name."""
        if self.error:
            raise Refusal(f"{self.name}: {self.error}")
        try:
            if self.path.stat().st_size > LIMITS.image_bytes:
                raise Refusal(f"{self.name}: {_TOO_LARGE}")
            return decode(self.path, LIMITS.image_pixels, Path(self.name).suffix, value_range)
        except InvalidImageError as error:
            raise Refusal(f"{self.name}: {error}") from error
        except OSError as error:
            raise Refusal(f"{self.name}: no longer kept. Upload it again.") from error


def upload_of(value: dict | None) -> Upload:
    """The file that a component of gradio's holds."""
    if not isinstance(value, dict) or not value.get("path"):
        raise Refusal("Choose an image first.")
    path = Path(value["path"])
    return Upload(shown_name(value.get("orig_name") or path.name), path)


def uploads_of(values: list[dict] | dict | None) -> list[Upload]:
    values = values or []
    return [upload_of(value) for value in (values if isinstance(values, list) else [values])]


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
    _check_count(len(files))
    if sum(_is_archive(file.path) for file in files if file.path) > LIMITS.archives:
        raise Refusal(f"More than {LIMITS.archives} archives; inspect them in several batches.")
    budget = _Budget(LIMITS.unpacked_bytes)
    for file in files:
        try:
            uploads += _unpack(file, folder, len(uploads), budget) if _is_archive(file.path) else [file]
        except _BadArchive as error:
            if len(files) == 1:
                raise Refusal(f"{file.name}: {error}") from error
            uploads.append(Upload(file.name, error=str(error)))
        _check_count(len(uploads))
    if not uploads:
        raise Refusal(f"{files[0].name}: the archive holds no files, or only hidden ones and pictures of inspections.")
    return _told_apart(uploads)


@dataclass
class _Budget:
    """How many bytes the archives of a batch may still write, kept or not."""

    left: int


def _is_archive(path: Path) -> bool:
    # A picture with an archive appended is still a picture.
    try:
        with path.open("rb") as file:
            return file.read(4) in (b"PK\x03\x04", b"PK\x05\x06")
    except OSError:  # swept meanwhile, which reading it as an image tells
        return False


class _BadArchive(Refusal):
    """An archive that cannot be unpacked; others beside it can."""


def _check_list(path: Path) -> None:
    """Refuses an archive whose list of members is too long to be read at once."""
    with path.open("rb") as file:
        # zipfile's own reading of the last record: another one might find another record in a forged file.
        end = zipfile._EndRecData(file)  # type: ignore[attr-defined]
    if end and end[zipfile._ECD_SIZE] > MB:  # type: ignore[attr-defined]
        raise _BadArchive(f"lists far more than {LIMITS.files} files; inspect them in several batches.")


def _check_count(count: int) -> None:
    if count > LIMITS.files:
        raise Refusal(f"More than {LIMITS.files} files; inspect them in several batches.")


def _unpack(archive: Upload, folder: Path, offset: int, budget: _Budget) -> list[Upload]:
    try:
        _check_list(archive.path)
        with zipfile.ZipFile(archive.path) as bundle:
            members = [m for m in bundle.infolist() if not m.filename.endswith("/")]
            # No one wants a row for litter of the systems that make archives.
            members = [m for m in members if not any(map(is_litter, re.split(r"[/\\]", m.filename)))]
            _check_count(offset + len(members))
            found = [_extract(bundle, m, folder / f"{i:04d}", budget) for i, m in enumerate(members, offset)]
            # A folder of photos may hold the pictures of its inspection.
            return [upload for upload in found if not (upload.path and is_own_picture(upload.path, upload.name))]
    # zipfile raises whatever it stumbles over in a damaged list of members
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, IndexError, NotImplementedError, struct.error) as error:
        raise _BadArchive("the archive is damaged.") from error


def _member_name(member: zipfile.ZipInfo) -> str:
    """The name of a file in an archive: macOS and Linux write UTF-8, which few of their programs say."""
    if member.flag_bits & _IS_UTF_8:
        return member.filename
    try:
        return member.filename.encode("cp437").decode()
    except UnicodeError:
        return member.filename


def _extract(bundle: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path, budget: _Budget) -> Upload:
    name = shown_name(_member_name(member))
    if stat.S_ISLNK(member.external_attr >> 16):
        return Upload(name, error="a link, which is not followed.")
    if member.flag_bits & 0x1:
        return Upload(name, error="encrypted. Pack it without a password.")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others unpack without a limit
        return Upload(name, error="packed in an unusual way. Make an ordinary zip archive.")
    if member.file_size > LIMITS.image_bytes:
        return Upload(name, error=_TOO_LARGE)
    if member.file_size > budget.left:
        most = LIMITS.unpacked_bytes // MB
        return Upload(name, error=f"beyond the {most} MB that a batch may unpack to. Send it in another batch.")
    try:
        with bundle.open(member) as source, target.open("wb") as sink:
            try:
                shutil.copyfileobj(source, sink)  # zipfile stops at the declared size
            finally:
                budget.left -= sink.tell()
    except Exception:  # zlib, zipfile and NotImplementedError all come up here, each with its own reasons
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
