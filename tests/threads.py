"""The promise of every op: the same bits, whatever the number of threads."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def check_threads(run: Callable[[], Iterable[Tensor]]) -> None:
    """Call `run` with 1, 2 and 3 threads; fails unless the tensors that it returns are the same, bit for bit."""
    before = torch.get_num_threads()
    outputs = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            outputs.append([*run()])
    finally:
        torch.set_num_threads(before)
    for others in outputs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(outputs[0], others, strict=True))
