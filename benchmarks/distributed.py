"""A training step of two processes with a thread each over that of one process with two threads, on the same batch."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.networks import images, network
from blokern import bilevel, keep_freed_memory
from blokern._race import Case
from blokern.distributed import Processes

BATCH = 128
METHODS = ("plain", "fast-bat", "bip, 90 % sparse")


def cases() -> Iterator[Case]:
    teams = {"1 process × 2 threads": Team(1, 2), "2 processes × 1 thread": Team(2, 1)}
    try:
        for method in METHODS:
            for team in teams.values():
                team.prepare(method)
            rivals = {name: team.step for name, team in teams.items()}
            yield Case(
                f"Step of {method}, preact_resnet18, batch {BATCH}", rivals, ours="2 processes × 1 thread"
            )
    finally:
        for team in teams.values():
            team.close()


class Team:
    """Processes that take a step together whenever told to."""

    def __init__(self, size: int, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        store = Path(self._folder.name, "store").as_uri()
        self._pipes, self._processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, store, rank, size, threads), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def prepare(self, method: str) -> None:
        self._tell(method)

    def step(self) -> None:
        self._tell("")

    def _tell(self, word: str) -> None:
        for pipe in self._pipes:
            pipe.send(word)
        for pipe in self._pipes:
            pipe.recv()

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._folder.cleanup()


def _serve(pipe: Connection, store: str, rank: int, size: int, threads: int) -> None:
    torch.set_num_threads(threads)
    keep_freed_memory()
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
    processes = Processes(dist.group.WORLD)
    step: Callable[[], object] = lambda: None  # noqa: E731
    while True:
        if word := pipe.recv():
            step = _step_of(word, processes)
        step()
        pipe.send(None)


def _step_of(method: str, processes: Processes) -> Callable[[], object]:
    share = processes.part(BATCH)
    (x, y), (x2, y2) = images(BATCH), images(BATCH, seed=1)
    x, y, x2, y2 = x[share], y[share], x2[share], y2[share]
    model, optimizer = network("preact_resnet18", x)
    if method.startswith("bip"):
        settings = bilevel.BiPSettings(density=0.1)
        bip = bilevel.BiP(model, optimizer, settings, processes=processes)
        return lambda: bip.step((x, y), (x2, y2))
    rule_type, settings_type = bilevel.METHODS[method]
    rule = rule_type(model, optimizer, settings_type(), processes)
    return lambda: rule.step(x, y)
