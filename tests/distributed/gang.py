"""A few processes on gloo that call functions together, again and again: starting them costs more than most tests."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from blokern.distributed import Processes

#: Seconds that a call may take.
PATIENCE = 120


class Gang:
    """Calls work(processes, *args), a test module's function, in each of `size` processes; returns all results."""

    def __init__(self, size: int) -> None:
        self._folder = tempfile.TemporaryDirectory()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["blokern.bilevel", "torch.distributed.fsdp"])
        self._pipes, self.processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            store = str(Path(self._folder.name, "store"))
            process = context.Process(target=_serve, args=(theirs, store, rank, size), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self.processes.append(process)

    def __call__(self, work: Callable[..., Any], *args: Any) -> list[Any]:
        outcomes = self.outcomes(work, *args)
        errors = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(outcomes) if error]
        assert not errors, "\n".join(errors)
        return [result for result, _ in outcomes]

    def outcomes(self, work: Callable[..., Any], *args: Any) -> list[tuple[Any, str | None]]:
        """Of each process what the work returned, and the traceback of what it raised."""
        for pipe in self._pipes:
            pipe.send_bytes(pickle.dumps((work, args)))
        return [self._answer(pipe) for pipe in self._pipes]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self._folder.cleanup()

    @staticmethod
    def _answer(pipe: Connection) -> tuple[Any, str | None]:
        assert pipe.poll(PATIENCE), "a process hangs"
        try:
            answer: tuple[Any, str | None] = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return None, "died"
        return answer


def _serve(pipe: Connection, store: str, rank: int, size: int) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    processes = Processes(dist.group.WORLD)
    while True:
        try:
            work, args = pickle.loads(pipe.recv_bytes())
        except EOFError:
            os._exit(0)  # the tests are over
        try:
            answer = work(processes, *args), None
        except BaseException:
            answer = None, traceback.format_exc()
        pipe.send_bytes(pickle.dumps(answer))
