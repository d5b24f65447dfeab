"""A run's checkpoints: written beside the training, more than one of them kept, and found again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from blokern.bilevel import checkpoint

__all__ = ["BEST", "LAST", "Saver", "latest", "whole_beside"]

#: Where to continue. The ones before it are last-1.pt, last-2.pt, …
LAST = "last.pt"
#: The epoch of the highest accuracy.
BEST = "best.pt"
#: The most of last.pt that may be kept: each is a name more to move at every save.
_MOST_KEPT = 1000
#: Files on their way to the disk: an epoch's best.pt and last.pt, and so no more than two copies in memory.
_UNDER_WAY = 2


class Saver:
    """Writes the files of a folder in a thread, in order; what they hold is fixed at the call.

    An error of the thread is raised by the next call, and nothing is written after it. The thread ends with
    :meth:`close`.

    Args:
        folder: of the run.
        keep_last: how many last.pt are kept, the newest included.

    >>> saver = Saver(Path("runs/a"), keep_last=2)
    >>> saver.save("last.pt", {"model": model.state_dict()})
    >>> saver.close()
    """

    def __init__(self, folder: Path, keep_last: int = 1) -> None:
        if not isinstance(keep_last, int) or keep_last < 1:
            raise ValueError(f"keep_last must be a number >= 1, got {keep_last!r}")
        if keep_last > _MOST_KEPT:
            raise ValueError(f"keep_last must be at most {_MOST_KEPT}, got {keep_last}")
        self.folder = folder
        self.keep_last = keep_last
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._under_way: list[Future[None]] = []

    def save(self, name: str, payload: Mapping[str, Any]) -> None:
        """Have a checkpoint written. Raises OSError for what could not be written before."""
        data = checkpoint.packed(payload)
        self._submit(lambda: self._write(name, data), _UNDER_WAY)

    def write(self, name: str, data: bytes) -> None:
        """Have another file written, after the checkpoints before it. Raises as :meth:`save`."""
        self._submit(lambda: checkpoint.write_atomically(self.folder / name, data), _UNDER_WAY + 1)

    def flush(self) -> None:
        """Wait until all is on the disk. Raises OSError if it could not be written."""
        self._wait(0)

    def close(self) -> None:
        """Finish what is under way, whatever comes of it, and end the thread."""
        self._thread.shutdown()

    def _submit(self, work: Callable[[], None], limit: int) -> None:
        self._wait(limit - 1)
        before = self._under_way[-1] if self._under_way else None

        def after() -> None:
            if before is not None:
                before.result()  # done, as there is one thread; if it failed, so do all after it
            work()

        self._under_way.append(self._thread.submit(after))

    def _wait(self, limit: int) -> None:
        while self._under_way and (len(self._under_way) > limit or self._under_way[0].done()):
            self._under_way[0].result()
            del self._under_way[0]

    def _write(self, name: str, data: bytes) -> None:
        if name == LAST:
            there = 0
            while there < self.keep_last - 1 and (self.folder / _previous(there)).exists():
                there += 1
            for age in range(there, 0, -1):
                _link(self.folder / _previous(age - 1), self.folder / _previous(age))
        checkpoint.write_sealed(self.folder / name, data)


def latest(folder: Path, warn: Callable[[str], None]) -> tuple[dict[str, Any], Path] | None:
    """The newest good checkpoint to continue from, and its file; None where there is no checkpoint.

    warn: is told of a damaged one. Raises CheckpointError if all are damaged, OSError for one that cannot be read.
    """
    paths = _last_ones(folder)
    damaged: list[checkpoint.CheckpointError] = []
    for path in paths:
        try:
            found = checkpoint.load(path), path
        except FileNotFoundError:
            continue
        except checkpoint.CheckpointError as error:
            damaged.append(error)
            continue
        for bad in damaged:
            warn(f"{bad}; continuing from {path}")
        return found
    if damaged:
        whole = whole_beside(paths[0])
        hint = (
            ""
            if whole is None
            else f"; {whole} is whole: copy it to {paths[0].name} to continue from its epoch"
        )
        raise checkpoint.CheckpointError(f"{damaged[0]}{hint}")
    return None


def whole_beside(path: Path) -> Path | None:
    """Another checkpoint of the same run that can be read: its best.pt, or the newest last one; None without any.

    >>> whole_beside(Path("runs/a/last.pt"))
    PosixPath('runs/a/best.pt')
    """
    for other in [path.with_name(BEST), *_last_ones(path.parent)]:
        if other.name != path.name and other.exists():
            with contextlib.suppress(OSError, checkpoint.CheckpointError):
                checkpoint.load(other)
                return other
    return None


def _last_ones(folder: Path) -> list[Path]:
    """Where to continue, the newest first."""
    numbered = (path for path in folder.glob("last-*.pt") if path.stem[5:].isdecimal())
    return [folder / LAST, *sorted(numbered, key=lambda path: int(path.stem[5:]))]


def _previous(age: int) -> str:
    return LAST if age == 0 else f"last-{age}.pt"


def _link(source: Path, target: Path) -> None:
    """Give a file a second name, in the place of what had it: there is no moment without the file."""
    temporary = target.with_name(f".{target.name}.tmp")
    with contextlib.suppress(FileNotFoundError):
        temporary.unlink(missing_ok=True)
        temporary.hardlink_to(source)
        temporary.replace(target)
        temporary.unlink(missing_ok=True)  # it stays where both were the same file already
