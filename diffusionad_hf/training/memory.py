"""Memory allocation of CPU training."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> bool:
    """Keeps glibc from returning freed memory to the system at every step: half of a step's time on 2 cores.

    Returns whether the allocator took the settings; False elsewhere than on Linux with glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    settings = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1, _M_TOP_PAD: 2**30}
    # Every one, also when an earlier one was refused.
    results = [mallopt(option, value) for option, value in settings.items()]
    return all(results)
