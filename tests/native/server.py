"""A program of emulated CUDA kernels (server.h), as the tests speak to it."""

from __future__ import annotations

import itertools
import struct
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

SCHEDULES = ("forward", "reverse", "shuffled")


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
        tensors: Mapping[str, Tensor | None],
    ) -> dict[str, Tensor]:
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
            stride = t.stride(0) if t.dim() > 0 and len(t) > 1 else 0
            message += _text(name) + struct.pack("QqQ", t.data_ptr() % 16, stride, len(spans[name]))
            message += spans[name]
        reply = self._exchange(message, sum(len(span) for span in spans.values()))
        results, at = {}, 0
        for name, t in given.items():
            size = len(spans[name])
            memory = (
                torch.frombuffer(bytearray(reply[at : at + size]), dtype=t.dtype) if size else t.flatten()
            )
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


def _span(t: Tensor) -> bytes:
    """The memory from t's first element to its last."""
    if t.numel() == 0:
        return b""
    length = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) + 1
    flat = t.as_strided((length,), (1,))
    return flat.contiguous().view(torch.uint8).numpy().tobytes()
