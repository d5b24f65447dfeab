"""A program of emulated CUDA kernels (server.h), as the tests speak to it."""

from __future__ import annotations

import itertools
import struct
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SCHEDULES = ("forward", "reverse", "shuffled")


@dataclass
class Vast:
    """A tensor too large to send: zeros but for its windows, values by where they begin. Of a launch with vast tensors,
    the first two blocks and the last two run."""

    numel: int
    windows: dict[int, Tensor]
    stride: int = 0  # from row to row

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.windows.values())).dtype


class Server:
    """Starts the program with the first call; an error in a kernel is an AssertionError that says where."""

    def __init__(self, program: Path, schedule: str) -> None:
        self.program, self.schedule = program, SCHEDULES.index(schedule)
        self._process: subprocess.Popen[bytes] | None = None
        self._seeds = itertools.count()

    def close(self) -> None:
        if self._process is not None:
            self._process.stdin.close()
            self._process.stdout.close()
            self._process.stderr.close()
            self._process.wait()
            self._process = None

    def call(
        self,
        op: str,
        dtypes: Sequence[torch.dtype],
        numbers: Mapping[str, float],
        tensors: Mapping[str, Tensor | Vast | None],
    ) -> dict[str, Any]:
        """All tensors as the kernel leaves them. They lie there as they do here, misaligned or with gaps."""
        given = {name: t for name, t in tensors.items() if t is not None}
        spans = {name: _span(t) for name, t in given.items()}
        message = struct.pack("iI", self.schedule, next(self._seeds)) + _text(op)
        message += struct.pack("I", len(dtypes))
        message += b"".join(_text(str(dtype).removeprefix("torch.")) for dtype in dtypes)
        message += struct.pack("I", len(numbers))
        for name, number in numbers.items():
            message += _text(name) + struct.pack("d", number)
        message += struct.pack("I", len(given))
        for name, t in given.items():
            message += _text(name)
            if isinstance(t, Vast):
                size = t.dtype.itemsize
                message += struct.pack("QqQI", 0, t.stride, t.numel * size, len(t.windows))
                for start, window in t.windows.items():
                    message += struct.pack("QQ", start * size, window.numel() * size)
            else:
                stride = t.stride(0) if t.dim() > 0 and len(t) > 1 else 0
                message += struct.pack("QqQI", t.data_ptr() % 16, stride, len(spans[name]), 0)
            message += spans[name]
        reply = self._exchange(message, sum(len(span) for span in spans.values()))
        results, at = {}, 0
        for name, t in given.items():
            size = len(spans[name])
            if size == 0:
                results[name] = t.clone()
                continue
            memory = torch.frombuffer(bytearray(reply[at : at + size]), dtype=t.dtype)
            if isinstance(t, Vast):
                parts = memory.split([window.numel() for window in t.windows.values()])
                results[name] = dict(zip(t.windows, parts, strict=True))
            else:
                results[name] = memory.as_strided(t.shape, t.stride()).clone()
            at += size
        return results

    def _exchange(self, message: bytes, reply_size: int) -> bytes:
        if self._process is None:
            pipe = subprocess.PIPE
            self._process = subprocess.Popen([self.program], stdin=pipe, stdout=pipe, stderr=pipe)
        process = self._process
        try:
            process.stdin.write(message)
            process.stdin.flush()
        except BrokenPipeError:
            pass
        reply = process.stdout.read(reply_size)
        if len(reply) != reply_size or process.poll() is not None:
            told = process.stderr.read().decode()
            self.close()
            raise AssertionError(told)
        return reply


def _text(text: str) -> bytes:
    return struct.pack("I", len(text)) + text.encode()


def _span(t: Tensor | Vast) -> bytes:
    """The memory from t's first element to its last, or of its windows."""
    if isinstance(t, Vast):
        return b"".join(map(_span, t.windows.values()))
    if t.numel() == 0:
        return b""
    length = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) + 1
    flat = t.as_strided((length,), (1,))
    return flat.contiguous().view(torch.uint8).numpy().tobytes()
