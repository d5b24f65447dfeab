"""Arbitrary arguments. A `random.Random` decides all: one that hypothesis controls, which then shrinks what fails, or a
seeded one, for long runs."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
#: Sizes around those at which kernels change their ways: vectors, lanes, words, blocks.
SIZES = (0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 100, 129, 200)


class Draw:
    def __init__(self, source: random.Random) -> None:
        self.source = source
        self.generator = torch.Generator().manual_seed(source.getrandbits(32))

    def one_of(self, values: Sequence[T]) -> T:
        return values[self.source.randrange(len(values))]

    def chance(self, probability: float) -> bool:
        return self.source.random() < probability

    def size(self, most: int = 200, least: int = 0) -> int:
        return self.one_of([n for n in SIZES if least <= n <= most])

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * self.source.random()

    def shape(self, least: int, most: int, elements: int = 3000) -> tuple[int, ...]:
        """From `least` to `most` dimensions, with no more elements than that."""
        shape: list[int] = []
        for _ in range(self.source.randint(least, most)):
            shape.append(self.size(max(1, min(200, elements))))
            elements //= max(1, shape[-1])
        return tuple(shape)

    def values(self, shape: Sequence[int], dtype: torch.dtype = torch.float64) -> Tensor:
        """Around 1 in size, some of them zeros or equal to others."""
        t = torch.randn(tuple(shape), generator=self.generator, dtype=torch.float64)
        kind = self.source.randrange(4)
        if kind == 0:
            t = t.round()
        elif kind == 1:
            t[self.mask(shape, 0.3)] = 0
        return t.to(dtype)

    def specials(self, shape: Sequence[int], dtype: torch.dtype = torch.float64) -> Tensor:
        """NaN, infinities, denormals, the largest and the smallest, and zeros of both signs."""
        info = torch.finfo(dtype)
        kinds = [
            float("nan"),
            float("inf"),
            float("-inf"),
            0.0,
            -0.0,
            info.max,
            info.min,
            info.tiny,
            info.tiny / 8,
        ]
        index = torch.randint(len(kinds), tuple(shape), generator=self.generator)
        return torch.tensor(kinds, dtype=torch.float64)[index].to(dtype)

    def mask(self, shape: Sequence[int], density: float | None = None) -> Tensor:
        if density is None:
            density = self.one_of((0.0, 0.02, 0.1, 0.5, 0.9, 1.0))
        return torch.rand(tuple(shape), generator=self.generator) < density

    def laid_out(self, t: Tensor) -> Tensor:
        """The same values, lying otherwise."""
        kind = self.source.randrange(6)
        if kind == 0 and t.dim() > 1:  # in another order
            order = self.source.sample(range(t.dim()), t.dim())
            back = [order.index(d) for d in range(t.dim())]
            return t.permute(order).contiguous().permute(back)
        if kind == 1:  # a slice, with steps
            steps = [self.one_of((1, 1, 2, 3)) for _ in t.shape]
            starts = [self.source.randrange(3) for _ in t.shape]
            buffer = t.new_zeros([a + n * s for a, n, s in zip(starts, t.shape, steps, strict=True)])
            view = buffer[
                tuple(slice(a, a + n * s, s) for a, n, s in zip(starts, t.shape, steps, strict=True))
            ]
            return view.copy_(t)
        if kind == 2:  # off every vector's boundary
            return t.new_zeros(t.numel() + 1)[1:].view(t.shape).copy_(t)
        if kind == 3 and t.dim() == 4:
            return t.contiguous(memory_format=torch.channels_last)
        return t.clone(memory_format=torch.contiguous_format)

    def input(self, t: Tensor) -> Tensor:
        """An argument that is only read: also an expanded one, whose values then repeat, or windows that overlap."""
        if t.dim() and self.chance(0.1):
            dim = self.source.randrange(t.dim())
            return t.narrow(dim, 0, min(1, t.shape[dim])).expand(t.shape) if t.shape[dim] else t
        if t.dim() == 2 and t.numel() and self.chance(0.05):
            return t.flatten()[: t.shape[0] + t.shape[1] - 1].unfold(0, t.shape[1], 1)
        return self.laid_out(t)
