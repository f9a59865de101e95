"""Decodes visitors' images, each in a process of its own, which is ended if it takes too long or too much memory.

What comes back from such a process is a shape, a number type and bytes: nothing that a decoder under attack could use.
"""

import io
import json
import multiprocessing
import threading
import time
from contextvars import ContextVar
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch

from ..images_diffusionad import InvalidImageError, bits_of, has_more_frames, load_image, loses_bits, open_image

_SECONDS = 20  # 50 million pixels take a slow processor 8
_BYTES = 3 * 2**30  # beside what a new process has; 50 million pixels of 16 bits take 2
_TYPES = {"uint8": np.uint8, "float32": np.float32}

SECONDS: ContextVar[list[float]] = ContextVar("seconds")
"""Processor time that the running call took, piece by piece; decoders add theirs."""


def decode(
    path: Path, most_pixels: int, suffix: str = "", value_range: float | None = None
) -> tuple[torch.Tensor, str]:
    """
    Reads an image file as [`load_image`] does.

    Args:
        path: The file.
        most_pixels: Larger images are refused before they are decoded.
        suffix: Of the name that the file was sent with.
        value_range: As for [`load_image`].

    Returns:
        `(3, H, W)`, uint8 or float32; and what there is to say of it, such as that it was read as dark.

    Raises:
        InvalidImageError: If it cannot be used; the message does not name the file.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():  # Windows
        return _load(path, most_pixels, suffix, value_range)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    receiver, sender = context.Pipe(duplex=False)
    with receiver:
        process = context.Process(
            target=_work, args=(sender, str(path), most_pixels, suffix, value_range), daemon=True
        )
        began = time.monotonic()
        spent = None
        process.start()
        sender.close()
        end = threading.Timer(_SECONDS, process.kill)
        end.start()
        try:
            answer = json.loads(receiver.recv_bytes(10_000))
            spent = answer["seconds"]
            if "error" in answer:
                raise InvalidImageError(str(answer["error"]))
            dtype, (height, width) = _TYPES[answer["type"]], (int(side) for side in answer["size"])
            if not 0 < height * width <= most_pixels:
                raise ValueError(f"{height} x {width}")
            pixels = np.empty((3, height, width), dtype)
            _read_into(pixels, receiver)
            return torch.from_numpy(pixels), str(answer["note"])
        except InvalidImageError:
            raise
        except (EOFError, OSError, ValueError, KeyError, TypeError) as error:  # killed, or it answers what it must not
            raise InvalidImageError("takes too long or too much memory to decode.") from error
        finally:
            waited = time.monotonic() - began
            is_true = isinstance(spent, (int, float)) and 0 <= spent <= waited
            SECONDS.get([]).append(spent if is_true else waited)
            end.cancel()
            process.kill()
            process.join()
            process.close()


def _work(sender: Connection, path: str, most_pixels: int, suffix: str, value_range: float | None) -> None:
    import resource

    torch.set_num_threads(1)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() if _has_proc() else 0
    if now:
        resource.setrlimit(resource.RLIMIT_AS, (now + _BYTES, now + _BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (_SECONDS, _SECONDS))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    try:
        found, note = _load(Path(path), most_pixels, suffix, value_range)
        image = found.contiguous().numpy()
    except (InvalidImageError, OSError, MemoryError, RuntimeError) as error:  # the last one is torch's for no memory
        out = isinstance(error, (MemoryError, RuntimeError))
        reason = "takes too much memory to decode." if out else str(error)
        _tell(sender, error=reason[:1000])
        return
    _tell(sender, type=str(image.dtype), size=image.shape[1:], note=note)
    with open(sender.fileno(), "wb", buffering=0, closefd=False) as pipe:
        left = memoryview(image).cast("B")
        while left:
            left = left[pipe.write(left) :]


def _tell(sender: Connection, **answer: object) -> None:
    sender.send_bytes(json.dumps({**answer, "seconds": time.process_time()}).encode())


def _read_into(pixels: np.ndarray, receiver: Connection) -> None:
    """Reads as many bytes as there is room for, without a copy: other visitors' threads go on meanwhile."""
    left = memoryview(pixels).cast("B")
    with open(receiver.fileno(), "rb", buffering=0, closefd=False) as pipe:
        while left:
            count = pipe.readinto(left)
            if not count:
                raise EOFError
            left = left[count:]


def _has_proc() -> bool:
    return Path("/proc/self/statm").is_file()


def _load(path: Path, most_pixels: int, suffix: str, value_range: float | None) -> tuple[torch.Tensor, str]:
    name = f"image{suffix}"
    size = stated_size(path, suffix) or (0, 0)  # load_image says what is wrong with it
    if size[0] * size[1] > most_pixels:
        raise InvalidImageError(
            f"{size[0]} x {size[1]} pixels, more than {most_pixels // 1_000_000} million. Shrink it first."
        )
    try:
        content = path.read_bytes()
        image = load_image(content, name, value_range)
        with open_image(io.BytesIO(content), name) as file:
            more, is_reduced = has_more_frames(file), loses_bits(file)
            states_range = file.format in ("PPM", "JPEG2000") or value_range is not None
            is_wide = file.mode.startswith("I") and image.is_floating_point()
    except InvalidImageError as error:
        raise InvalidImageError(str(error).removeprefix(f"{name}: ")) from error
    note = "It holds several frames: only the first one was inspected." if more else ""
    most = int(image.max()) << 8 if is_reduced else round(float(image.max()) * 65535) if is_wide else 0
    if not states_range and (bits := bits_of(most)) < 16:
        note = f"{note} It reaches only {most} of 65535, so it was read as dark: multiply values of {bits} bits by "
        note += f"{2 ** (16 - bits)} before you upload them."
    return image, note.strip()


def stated_size(path: Path, suffix: str = "") -> tuple[int, int] | None:
    """Width and height as the file states them; None if it is no image of an accepted format."""
    try:
        with open_image(path, f"image{suffix}") as image:
            return image.size
    except Exception:  # decoders raise whatever they stumble over
        return None
