"""Pruned networks that only predict."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from blokern import ops
from blokern.ops.mask import SparseMask
from blokern.sparse.layers import MaskedLinear, under_autocast
from blokern.sparse.modules import check_droppable, drop_mask
from blokern.sparse.nodes import node_of

__all__ = ["PackedLinear", "pack"]

ModelT = TypeVar("ModelT", bound=nn.Module)

# Where tensor cores take 2:4 weights, of what sizes, and from how many weights on: an estimate, for smaller ones are
# read in a microsecond or two, masked or not.
_SEMI_STRUCTURED_DEVICE, _SEMI_STRUCTURED_TILE, _SEMI_STRUCTURED_LEAST = "cuda", (32, 64), 2**22


class PackedLinear(nn.Module):
    """A linear layer of a weight's kept entries alone, for inference; see `pack`.

    weight: [out, in]; mask: bool or SparseMask of that shape; bias: [out] or None. All are copied. They are in no
    state_dict: save the masked network.

    >>> layer = PackedLinear(torch.randn(4, 8), torch.rand(4, 8) < 0.1)
    >>> layer(torch.randn(2, 8)).shape
    torch.Size([2, 4])
    """

    values: Tensor
    start: Tensor
    column: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, mask: Tensor | SparseMask, bias: Tensor | None = None) -> None:
        super().__init__()
        self._take(ops.pack_weight(_packable(weight), mask), None if bias is None else bias.detach().clone())

    def _take(self, packed: ops.PackedWeight, bias: Tensor | None) -> None:
        self.block, self.out_features, self.in_features = packed.block, packed.rows, packed.cols
        for name in ("values", "start", "column"):
            self.register_buffer(name, getattr(packed, name), persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.values.dtype.itemsize < 4:  # the kernels take those of half weights in float32
            self.values = self.values.float()
        return self

    @property
    def weight(self) -> ops.PackedWeight:
        """As :func:`ops.packed_linear` takes it."""
        shape = (self.block, self.out_features, self.in_features)
        return ops.PackedWeight(self.values, self.start, self.column, *shape)

    def forward(self, input: Tensor) -> Tensor:
        if not isinstance(input, Tensor):
            return node_of(self, input)
        x, bias = under_autocast(input, self.bias)
        if x.dtype == torch.float16:  # no kernels: in float32
            bias = None if bias is None else bias.float()
            return ops.packed_linear(x.float(), self.weight, bias).half()
        return ops.packed_linear(x, self.weight, bias)

    def extra_repr(self) -> str:
        density = len(self.values) / max(1, self.out_features * self.in_features)
        return f"in_features={self.in_features}, out_features={self.out_features}, density={density:.4g}"


def pack(model: ModelT, max_density: float = 0.2) -> ModelT:
    """Make the masked linear layers of a model what is fastest when it only predicts, in place.

    Those that keep at most max_density of their weights become PackedLinear, the others dense, with zeros for their
    masked weights; of these, large bfloat16 ones on CUDA that keep at most 2 of each 4 neighbours take the form of
    torch.sparse.to_sparse_semi_structured, which tensor cores multiply at twice the rate. Move the model to its device
    first. At 2048 × 2048 and two threads, packing pays at any density up to 0.5 for 128 samples, up to 0.2 for one
    (docs/design.md). Masked convolutions stay what they are. Returns the model, which has no derivatives through packed
    layers and does not save them.

    >>> pack(nn.Sequential(MaskedLinear(8, 4, mask=torch.zeros(4, 8, dtype=torch.bool))))
    Sequential(
      (0): PackedLinear(in_features=8, out_features=4, density=0)
    )
    """
    check_droppable(model)
    for module in model.modules():
        if type(module) is MaskedLinear:
            if module.mask.density <= max_density:
                _pack_layer(module)
                continue
            semi_structured = _suits_tensor_cores(module.weight, module.mask)
            drop_mask(module)
            if semi_structured:
                weight = torch.sparse.to_sparse_semi_structured(module.weight.detach().contiguous())
                module.weight = nn.Parameter(weight, requires_grad=False)
    return model


def _suits_tensor_cores(weight: Tensor, mask: SparseMask) -> bool:
    tile = _SEMI_STRUCTURED_TILE
    return (
        weight.device.type == _SEMI_STRUCTURED_DEVICE
        and weight.dtype == torch.bfloat16
        and weight.numel() >= _SEMI_STRUCTURED_LEAST
        and all(size % unit == 0 for size, unit in zip(weight.shape, tile, strict=True))
        and bool((mask.to_dense().view(-1, 4).sum(1) <= 2).all())
    )


def _packable(weight: Tensor) -> Tensor:
    return weight.float() if weight.dtype == torch.float16 else weight


def _pack_layer(module: Any) -> None:
    packed = ops.pack_weight(_packable(module.weight), module.mask)
    bias = None if module.bias is None else module.bias.detach()
    drop_mask(module)
    del module.weight, module.bias
    module.__class__ = PackedLinear
    module._take(packed, bias)
