"""Stopping a run by a signal without losing it."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

__all__ = ["Interrupted", "StopRequest"]

#: Ctrl-C, the system that shuts down, and a terminal that is closed; Windows has no hangup.
_STOPS = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]


class Interrupted(KeyboardInterrupt):
    """The run was stopped by a signal, and saved where it stopped. Like Ctrl-C, it is no ``Exception``.

    signum: the signal; ``128 + signum`` is the customary exit code.
    """

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum


class StopRequest:
    """Within it, the first SIGINT, SIGTERM or SIGHUP is noted in ``signum``, and a second one acts as it did before.

    Only the main thread may set handlers; in another one nothing changes. An ignored signal stays ignored.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for signum in _STOPS:
                if signal.getsignal(signum) is not signal.SIG_IGN:
                    self._previous[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._put_back()

    def _put_back(self) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)  # None: set outside Python

    def _note(self, signum: int, _: FrameType | None) -> None:
        if self.signum is not None:
            self._put_back()
            signal.raise_signal(signum)
        self.signum = signum
