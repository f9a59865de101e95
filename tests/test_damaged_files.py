"""Any damaged file is read or refused by name, soon and in little memory.

DIFFUSIONAD_DAMAGED says how many are tried; a few by default.
"""

import os
import random
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusionad_hf.images_diffusionad import IMAGE_SUFFIXES, InvalidImageError, load_image
from diffusionad_hf.masks import read_mask


def damaged(rng, folder):
    """A file of any suffix: bits flipped, cut, or with another format's header."""
    suffixes = sorted(IMAGE_SUFFIXES)
    suffix, other = rng.sample(suffixes, 2)
    pixels = np.random.default_rng(rng.randrange(2**32)).integers(0, 256, (rng.randrange(8, 80), 64, 3), np.uint8)
    contents = []
    for ending in (suffix, other):
        image = Image.fromarray(pixels)
        if ending in (".pfm",):
            image = image.convert("F")
        path = folder / f"whole{ending}"
        image.save(path)
        contents.append(bytearray(path.read_bytes()))
    content, kind = contents[0], rng.randrange(4)
    if kind == 0:
        for _ in range(rng.choice([1, 4, 64])):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del content[rng.randrange(len(content)) :]
    elif kind == 2:
        head = rng.choice([4, 16, 64])
        content[:head] = contents[1][:head]
    else:  # in the header, where sizes are
        for _ in range(rng.choice([1, 3])):
            content[rng.randrange(min(64, len(content)))] = rng.randrange(256)
    target = folder / f"damaged{suffix}"
    target.write_bytes(content)
    return target


def read_damaged(count, folder):
    """Reads so many damaged files; prints how many were read and refused, the longest time and the peak of memory."""
    read, refused, longest = 0, 0, 0.0
    for seed in range(count):
        path = damaged(random.Random(seed), Path(folder))
        began = time.process_time()
        print(seed, path.suffix, flush=True)
        signal.setitimer(signal.ITIMER_PROF, 5)  # what takes longer on the processor ends this one
        try:
            load_image(path)
            read += 1
        except InvalidImageError as error:
            refused += 1
            assert "\n" not in str(error) and str(path) in str(error), (seed, error)
        except BaseException:
            print(f"seed {seed}", traceback.format_exc())
            raise
        try:
            read_mask(path, str(path))
        except ValueError as error:
            assert str(path) in str(error), (seed, error)
        signal.setitimer(signal.ITIMER_PROF, 0)
        longest = max(longest, time.process_time() - began)
    # Not `ru_maxrss`, which takes over what the process that started this one had.
    peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
    print(f"{count} damaged files: {read} read, {refused} refused, {longest:.2f} s at most, {peak:.0f} MB at the peak")
    return peak


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="peaks of memory are read from /proc")
def test_damaged_files_are_read_or_refused_by_name_soon_and_in_bounded_memory(tmp_path):
    count = os.environ.get("DIFFUSIONAD_DAMAGED", "60")
    command = [sys.executable, "-m", "tests.test_damaged_files", count, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert f"{count} damaged files" in done.stdout


if __name__ == "__main__":
    sys.exit(read_damaged(int(sys.argv[1]), sys.argv[2]) > 1024)
