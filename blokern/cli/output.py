"""Where a command may write: never over what it reads, over a checkpoint, or over what is not its own."""

from __future__ import annotations

import errno
import json
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = [
    "ANY_PICTURE",
    "EXPORT",
    "JSON",
    "PAGE",
    "PICTURE",
    "Kind",
    "check_files",
    "check_run_folder",
    "check_study_folder",
    "write_json",
]

#: How much of a file is looked at, from its start and from its end.
_LOOK = 1 << 16


@dataclass(frozen=True)
class Kind:
    """What a command writes, and how that is known again from the first and the last bytes of a file."""

    name: str
    is_own: Callable[[bytes, bytes], bool]


JSON = Kind("result", lambda head, tail: head.startswith(b'{\n  "checkpoint": '))
PAGE = Kind("report", lambda head, tail: b"written by blokern" in head)
PICTURE = Kind("picture of a spectrum", lambda head, tail: b"blokern spectrum" in head[:512])
#: At a place that no other program writes a picture to.
ANY_PICTURE = Kind("picture", lambda head, tail: head.startswith(b"\x89PNG"))
EXPORT = Kind("export", lambda head, tail: tail.endswith(b"blokern export\n") or b"blokern sparse" in head)


def check_files(
    outputs: Iterable[tuple[str, str | Path | None, Kind]], sources: Collection[Path] = ()
) -> None:
    """Raise unless each output, given with its option and its kind, may be written, before any work is put in.

    A file that is there already is replaced only if it is one of the same kind, which blokern has written.

    Raises:
        ValueError: it is a source, a checkpoint, something else than such an output, or another output.
        OSError: it cannot be written.
    """
    taken: dict[Path, str] = {}
    for option, name, kind in outputs:
        if name is None:
            continue
        path = Path(name)
        _check_file(option, path, kind, sources)
        if (other := taken.setdefault(path.absolute(), option)) != option:
            raise ValueError(f"{option}: {path} is what {other} is to write: name another file")


def _check_file(option: str, path: Path, kind: Kind, sources: Collection[Path]) -> None:
    from blokern.bilevel.checkpoint import is_checkpoint

    if path.is_dir():
        raise ValueError(f"{option}: {path} is a folder: name a file in it")
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "cannot write: there is no such folder", str(path))
    if path.exists():
        if not path.is_file():
            raise ValueError(f"{option}: {path} is no regular file: name another one")
        if any(source.exists() and path.samefile(source) for source in sources):
            raise ValueError(f"{option}: {path} is what this command reads: name another file to write")
        if is_checkpoint(path):
            raise ValueError(
                f"{option}: {path} is a checkpoint, which nothing is written over: name another file"
            )
        if path.stat().st_size and not kind.is_own(*_ends(path)):
            raise ValueError(f"{option}: {path} is there and is no {kind.name} of blokern: name another file")
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise OSError(error.errno, f"cannot write: {error.strerror}", str(path)) from error


def _ends(path: Path) -> tuple[bytes, bytes]:
    with path.open("rb") as file:
        head = file.read(_LOOK)
        file.seek(max(0, path.stat().st_size - _LOOK))
        return head, file.read()


# --- Folders ------------------------------------------------------------------------------------------------


def check_run_folder(folder: Path) -> None:
    """Raise ValueError where a run would be written among the results of a study."""
    if (folder / "results.json").exists():
        raise ValueError(f"out: {folder} holds the results of a study: choose another folder for a run")


def check_study_folder(
    folder: Path, planned: Collection[str], earlier: Callable[[Mapping[str, Any]], Collection[str]]
) -> None:
    """Raise ValueError where the tables of a study would replace what they do not have.

    planned: the runs that the tables will have, in words. earlier: those of a results.json, a KeyError, TypeError or
    AttributeError for one of another command.
    """
    for name in ("last.pt", "best.pt", "metrics.jsonl"):
        if (folder / name).exists():
            raise ValueError(f"out: {folder} holds a run ({name}): choose another folder for a study")
    results = folder / "results.json"
    if not results.exists():
        if (folder / "results.md").exists():
            raise ValueError(
                f"out: {folder} holds a results.md that is not this command's: choose another folder"
            )
        return
    try:
        there = set(earlier(json.loads(results.read_text(encoding="utf-8"))))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"out: {folder} holds other results (results.json): choose another folder"
        ) from error
    if lost := sorted(there - set(planned)):
        some = "; ".join(lost[:3]) + (f"; and {len(lost) - 3} more" if len(lost) > 3 else "")
        raise ValueError(
            f"out: {folder} holds results that this command does not name, and would leave out of its tables ({some}): "
            "name them too, they are not computed again, or choose another folder"
        )


def write_json(path: str | Path, value: Any) -> None:
    """Write plain values for programs and people to read; what is no number is null."""
    from blokern.bilevel.checkpoint import write_atomically

    write_atomically(path, f"{json.dumps(_finite(value), indent=2, allow_nan=False)}\n".encode())


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    if isinstance(value, float) and value != value:
        return None
    return value if not isinstance(value, float) or abs(value) != float("inf") else str(value)
