"""Ops called by two Python threads at once, by forked processes and by a DataLoader's workers; and nothing leaks."""

from __future__ import annotations

import multiprocessing
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import every_op
import leaks
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from blokern import ops


@pytest.mark.parametrize("intra_op_threads", [1, 2])
def test_two_threads_call_all_ops_at_once(intra_op_threads: int) -> None:
    """Each gets the bits that it would get alone."""
    calls = every_op.calls()
    expected = {name: every_op.run(call) for name, call in calls.items()}

    def work(seed: int) -> None:
        for name in random.Random(seed).sample([*calls] * 3, 3 * len(calls)):
            assert every_op.same(every_op.run(calls[name]), expected[name]), name

    torch.set_num_threads(intra_op_threads)
    try:
        with ThreadPoolExecutor(2) as pool:
            for done in [pool.submit(work, seed) for seed in (1, 2)]:
                done.result()
    finally:
        torch.set_num_threads(1)


def step(x: Tensor) -> tuple[Tensor, ...]:
    """Ops that use memory of their thread, large enough that threads would share the work."""
    weight = torch.linspace(-1, 1, 256 * 300).view(256, 300)
    mask = ops.topk_mask([weight.sin()], 0.1)[0]
    images = torch.linspace(0, 1, x.numel()).view_as(x)
    start = ops.random_start(images, 0.1, generator=torch.Generator().manual_seed(2))
    return start, ops.pgd_step(start, images, x, 0.1, 0.1, norm="l1"), ops.masked_linear(x, weight, mask)


def batch() -> Tensor:
    return torch.linspace(-1, 1, 64 * 300).view(64, 300).cos()


def test_two_threads_share_a_mask() -> None:
    mask, x = ops.SparseMask(torch.rand(200, 300) < 0.1), batch()
    weight = torch.randn(200, 300)
    expected = ops.masked_linear(x, weight, ops.SparseMask(mask.to_dense()))

    def work() -> Tensor:
        fresh = ops.SparseMask.of_words(mask.words, mask.shape)
        both = [ops.masked_linear(x, weight, m) for m in (mask, fresh)]
        assert torch.equal(*both)
        return both[0]

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(work) for _ in range(20)]:
            assert torch.equal(done.result(), expected)


class Steps(Dataset[Any]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return step(batch() * (index + 1))


def test_workers_of_a_loader() -> None:
    """They are forked after this process used its threads; a worker has one."""
    here = [Steps()[i] for i in range(4)]
    torch.set_num_threads(2)
    try:
        step(batch())
        loader = DataLoader(
            Steps(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60
        )
        for mine, theirs in zip(here, loader, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    finally:
        torch.set_num_threads(1)


def forked(run: Callable[[], bool], queue: Any) -> None:
    torch.set_num_threads(1)
    queue.put(run())


def test_a_forked_process() -> None:
    expected = step(batch())
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(
        target=forked,
        args=(lambda: all(torch.equal(a, b) for a, b in zip(step(batch()), expected, strict=True)), queue),
    )
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert queue.get()


@pytest.mark.skipif(not leaks.CAN_COUNT, reason="only glibc 2.33 and later tell")
def test_no_call_leaks() -> None:
    """Less than what malloc gives out least; `make fuzz` has the long form."""
    grown = {name: min(leaks.growth(call, 100) for _ in range(3)) for name, call in every_op.calls().items()}
    assert {name: size for name, size in grown.items() if size >= 16 * 100} == {}
