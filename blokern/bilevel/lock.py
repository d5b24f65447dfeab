"""One process at a time in a run's folder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

__all__ = ["locked"]


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of ``folder``, which one process at a time can; the system frees it when that one dies.

    The file stays behind: were it deleted, two processes could each lock a ``.lock`` of their own.
    """
    with (folder / ".lock").open("w") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(f"another process trains in {folder}: wait for it, or stop it") from None
        except (ImportError, OSError):
            pass  # Windows has no flock, nor do some network file systems: better to train unguarded there
        yield
