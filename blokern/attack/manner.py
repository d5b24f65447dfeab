"""How a model answers: the same each time, and each sample by itself?"""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from blokern.attack.outputs import logits_of

__all__ = ["DRAWS", "Manner", "observe"]

#: Of a model that answers at random, a verdict is the mean over this many answers.
DRAWS = 10

_SAMPLES = 4  # that the model is asked about
_SAME = 1e-4  # of the largest logit: what parallel sums may differ by from one time to the next


@dataclass(frozen=True)
class Manner:
    """random: the model answers the same batch differently each time, as it draws, or changes while it computes.
    mixes: what it says of a sample depends on the other samples in the batch, as with batch statistics."""

    random: bool = False
    mixes: bool = False

    @property
    def steady(self) -> bool:
        """Whether a sample's verdict is the same in any batch, so that it may leave once it is fooled."""
        return not (self.random or self.mixes)

    def warn(self, who: str, draws: int, stacklevel: int) -> None:
        """Tells the caller who is `stacklevel` calls away what `who` does about it."""
        if self.random:
            warnings.warn(
                f"{who}: the model answers the same images differently each time (it draws at random, or changes "
                f"while it computes): nobody leaves early, and verdicts are means over {draws} answers; eot=20 has "
                "the attack follow mean gradients",
                stacklevel=stacklevel,
            )
        elif self.mixes:
            warnings.warn(
                f"{who}: what the model says of an image depends on the others in its batch (batch statistics in "
                "eval mode?): nobody leaves early, and the accuracy is that of these batches",
                stacklevel=stacklevel,
            )


def observe(model: nn.Module, x: Tensor, *, mixing: bool = True) -> Manner:
    """Asks the model, in the mode that it is in, about a few images of x [N, ...]: thrice, and once in other company.

    Four small forward passes. Buffers are as before where a part of the model is in train mode. mixing: whether to
    look for that, too, as the fourth does. A model that draws from torch's, NumPy's or Python's generator is asked more
    often, as two draws may give the same answer.
    """
    some = x[:_SAMPLES]
    with _buffers_kept(model):
        before = _generators(x.device)
        first, *others = [logits_of(model(some.clone())) for _ in range(3)]  # it may write there
        if before != _generators(x.device):
            others += [logits_of(model(some.clone())) for _ in range(DRAWS)]
        if not all(_alike(first, other) for other in others):
            return Manner(random=True)
        half = len(some) // 2
        if not mixing or half == 0:
            return Manner()
        among_others = some[
            torch.arange(len(some), device=x.device) % half
        ]  # and as many: kernels round by the size
        return Manner(mixes=not _alike(first[:half], logits_of(model(among_others))[:half]))


def _alike(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    a, b = a.double(), b.double()
    largest = a.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).abs().max()
    return torch.allclose(a, b, rtol=0.0, atol=_SAME * float(largest), equal_nan=True)


def _generators(device: torch.device) -> tuple[object, ...]:
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002  # the generator that models draw from
    drawn = (kind, np.asarray(keys).tobytes(), *rest)
    return random.getstate(), drawn, *(state.numpy().tobytes() for state in states)


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """In train mode a forward pass moves running statistics: not those of a question."""
    training = any(module.training for module in model.modules())
    kept = [(buffer, buffer.clone()) for buffer in model.buffers()] if training else []
    try:
        yield
    finally:
        for buffer, value in kept:
            buffer.copy_(value)
