"""How this process's allocator treats large blocks: for programs to choose, never for the library."""

from __future__ import annotations

import sys

__all__ = ["keep_freed_memory"]

# mallopt(3)
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_NEVER = (1 << 31) - 1


def keep_freed_memory() -> bool:
    """Keep freed memory in the process instead of handing it back to the system after every step.

    glibc returns large freed blocks, and the kernel must zero every page of them again when the next step asks:
    on preact_resnet18, batch 128, two fifths of a sparse training step. Returns whether it took effect; True only with
    glibc.

    >>> keep_freed_memory()
    True
    """
    if not sys.platform.startswith("linux"):
        return False
    import ctypes  # takes longer than all else that a program that only imports blokern needs

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # musl
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, _NEVER))
