"""Standard output and error that no reader can end a run by: closed, broken off, or without the field's letters."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

__all__ = ["heard", "plain_warnings"]

#: What a terminal without these letters is told instead.
_PLAIN = str.maketrans(
    {
        "−": "-",
        "–": "-",
        "±": "+-",
        "×": "x",
        "·": "*",
        "→": "->",
        "…": "...",
        "λ": "lambda",
        "γ": "gamma",
        "β": "beta",
        "ε": "eps",
        "δ": "delta",
        "∞": "inf",
        "≤": "<=",
    }
)
#: The reader is gone: of a pipe, of a terminal, of a socket.
_GONE = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ECONNRESET)


@contextlib.contextmanager
def heard() -> Iterator[None]:
    """Within it, what is written to stdout and stderr when nobody reads any more is lost, and nothing else is."""
    before = sys.stdout, sys.stderr
    if None in before:  # no file that is opened from here on may be taken for one of them
        while (nowhere := os.open(os.devnull, os.O_RDWR)) <= 2:
            pass
        os.close(nowhere)
    sys.stdout, sys.stderr = _Stream(sys.stdout), _Stream(sys.stderr)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        sys.stdout, sys.stderr = before


@contextlib.contextmanager
def plain_warnings() -> Iterator[None]:
    """Within it, a warning is a line, without the place in blokern's sources."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"blokern: warning: {message}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before


class _Stream:
    """A text stream that outlives its reader; None, a stream that was closed at the start, swallows all."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        if self._stream is not None:
            encoding = getattr(self._stream, "encoding", None) or "utf-8"
            if not _fits(text, encoding):
                text = text.translate(_PLAIN).encode(encoding, "replace").decode(encoding)
            self._tried("write", text)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        if self._stream is not None:
            self._tried("flush")

    def isatty(self) -> bool:
        return self._stream is not None and bool(self._stream.isatty())

    def _tried(self, name: str, *args: str) -> None:
        try:
            getattr(self._stream, name)(*args)
        except OSError as error:
            if error.errno not in _GONE:
                raise
            # Its descriptor now leads nowhere, also for what is still in its buffer and for libraries in C.
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        if self._stream is None:
            raise AttributeError(name)
        return getattr(self._stream, name)


def _fits(text: str, encoding: str) -> bool:
    try:
        text.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True
