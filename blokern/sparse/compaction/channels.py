"""Which channels of a network are the same ones, which must stay, and who reads them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

__all__ = ["Axis", "Channels", "Product"]

#: A number for each channel of a dimension, int64 [size]; None: the dimension stays as it is.
Axis: TypeAlias = Tensor | None


@dataclass(eq=False)
class Product:
    """A weight that mixes channels, as a matrix for each tap of its kernel.

    weight: [out, in / groups, taps]. kept: bool, the same; None: all of it. constant: float64 [in], NaN where an input
    varies. pads: zeros lie around the input, so that only a constant of zero is one to the outputs. weight_name,
    bias_name: those of the parameters that they are as they stand, or None. movable: whether constants may move into
    the bias, which nothing else reads.
    """

    outputs: Axis
    inputs: Axis
    groups: int
    weight: Tensor
    kept: Tensor | None
    constant: Tensor
    pads: bool
    weight_name: str | None
    bias_name: str | None
    movable: bool = False

    def __post_init__(self) -> None:
        self._reads = None if self.kept is None else self.kept.any(2).cpu()  # [out, in / groups]

    def outputs_constant(self) -> Tensor:
        """What constant inputs make of the outputs, the bias left out: float64 [out], NaN where one varies."""
        uniform = self._uniform()
        sums = self._sums(self.constant.where(uniform, 0.0))
        return sums.masked_fill(self._reading(~uniform), torch.nan)

    def needs(self, live: Tensor) -> Tensor:
        """The inputs' numbers that live outputs read and no bias can replace; live: bool, by number."""
        if self.inputs is None:
            return torch.empty(0, dtype=torch.int64)
        rows = len(self.weight)
        outputs = torch.ones(rows, dtype=torch.bool) if self.outputs is None else live[self.outputs]
        outputs = outputs.view(self.groups, -1)
        if self._reads is None:
            read = outputs.any(1, keepdim=True).expand(self.groups, self.weight.shape[1])
        else:
            read = (self._reads.view(*outputs.shape, -1) & outputs.unsqueeze(2)).any(1)
        replaceable = self._uniform() if self.movable else self.constant == 0
        return self.inputs[read.flatten() & ~replaceable]

    def moved(self, live: Tensor) -> Tensor:
        """What the inputs that go add to each output: float64 [out]."""
        if self.inputs is None:
            return torch.zeros(len(self.weight), dtype=torch.float64)
        return self._sums(self.constant.nan_to_num(0.0).masked_fill(live[self.inputs], 0.0))

    def _uniform(self) -> Tensor:
        """Which inputs are, to the outputs, a number."""
        return (self.constant == 0) | (~self.constant.isnan() & (not self.pads))

    def _reading(self, inputs: Tensor) -> Tensor:
        """bool [out]: which outputs read some of these inputs, bool [in]."""
        inputs = inputs.view(self.groups, 1, -1)
        if self._reads is None:
            read = inputs.any(2).expand(self.groups, len(self.weight) // self.groups)
        else:
            read = (self._reads.view(self.groups, -1, inputs.shape[2]) & inputs).any(2)
        return read.flatten()

    def _sums(self, inputs: Tensor) -> Tensor:
        """The kept weights' sums with inputs that are the same at all taps: float64 [out]; inputs: [in]."""
        inputs = inputs.view(self.groups, 1, -1)
        columns = inputs.any(0).any(0).nonzero().flatten()  # few are not 0
        if len(columns) == 0:
            return torch.zeros(len(self.weight), dtype=torch.float64)
        part = self.weight.detach()[:, columns].to("cpu", torch.float64)
        if self.kept is not None:
            part = part.where(self.kept[:, columns].cpu(), 0.0)
        part = part.sum(2).view(self.groups, -1, len(columns))
        return (part * inputs[:, :, columns]).sum(2).flatten()


class Channels:
    """Numbers for channels, and what is said of them."""

    def __init__(self) -> None:
        self.count = 0
        self.products: list[Product] = []
        self._same: list[tuple[Tensor, Tensor]] = []
        self._pinned: list[Tensor] = []
        self._axes: dict[int, Tensor] = {}  # no dimension may lose all of its channels

    def new(self, size: int) -> Tensor:
        self.count += size
        return torch.arange(self.count - size, self.count)

    def same(self, axis: Axis, other: Axis) -> Axis:
        """Say that two dimensions have the same channels, place by place; returns one for both."""
        if axis is None or other is None:
            self.pin(axis)
            self.pin(other)
            return None
        if axis is not other:
            self._same.append((axis, other))
        return axis

    def pin(self, axis: Axis) -> None:
        """Say that channels stay."""
        if axis is not None:
            self._pinned.append(axis)

    def note(self, axes: Iterable[Axis]) -> None:
        """Say that tensors have these dimensions."""
        self._axes.update((id(axis), axis) for axis in axes if axis is not None and len(axis))

    def roots(self) -> Tensor:
        """By number, the least number of the same channel."""
        root = torch.arange(self.count)
        if not self._same:
            return root
        left, right = (torch.cat(side) for side in zip(*self._same, strict=True))
        while True:
            a, b = root[left], root[right]
            least = torch.minimum(a, b)
            if least.equal(a) and least.equal(b):
                return root
            root.scatter_reduce_(0, a, least, "amin").scatter_reduce_(0, b, least, "amin")
            while not (further := root[root]).equal(root):
                root = further

    def live(self) -> Tensor:
        """bool, by number: the channels that stay, because outputs need them or the rules do not know better."""
        root = self.roots()
        live = torch.zeros(self.count, dtype=torch.bool)  # by root
        for axis in self._pinned:
            live[root[axis]] = True
        axes = [root[axis] for axis in self._axes.values()]
        while True:
            before = live.clone()
            for product in reversed(self.products):
                live[root[product.needs(live[root])]] = True
            if before.equal(live):
                for axis in axes:  # torch has no layers without channels
                    if not live[axis].any():
                        live[axis[:1]] = True
                if before.equal(live):
                    return live[root]
