"""A masked weight without its masked entries, for inference: nothing is left to look up in the dense weight."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from blokern.ops.definitions import is_transformed, with_definition
from blokern.ops.mask import SparseMask, as_mask, block_of, check_mask

__all__ = ["PackedWeight", "pack_weight", "packed_linear"]

#: Columns a block where few weights are kept: longer runs of entries; measured for 1 to 128 samples.
_SPARSE_BLOCK = 1024


@dataclass(frozen=True)
class PackedWeight:
    """The kept entries of a weight [rows, cols], in the order in which products walk them; made by `pack_weight`.

    values: the weights (float32 for half weights); start and column: where they are, block by block of columns.

    >>> packed = pack_weight(torch.randn(4, 8), torch.rand(4, 8) < 0.5)
    >>> packed.rows, packed.cols
    (4, 8)
    """

    values: Tensor
    start: Tensor
    column: Tensor
    block: int
    rows: int
    cols: int


def pack_weight(weight: Tensor, mask: Tensor | SparseMask) -> PackedWeight:
    """The kept entries of weight [rows, cols] as they are now; weight and mask may go or change afterwards.

    float64, float32, bfloat16 or float16. It is packed for the device that it lies on. No derivative leads back to
    the weight, so that within a torch.func transform, or with a tangent, it is a ValueError. mask and errors else as
    in :func:`spmm`.

    >>> pack_weight(torch.eye(2), torch.eye(2) > 0).values
    tensor([1., 1.])
    """
    mask = as_mask(mask)
    check_mask(mask, weight, "weight")
    if is_transformed():
        raise ValueError(
            "pack_weight has no derivative or vmap rule: pack weight outside torch.func and forward-mode transforms"
        )
    rows, cols = mask.rows, mask.cols
    block = block_of(cols, mask.density if mask.device.type == "cpu" else 0.0)
    if mask.density < 0.15:
        block = min(max(block, _SPARSE_BLOCK), block_of(cols, 0.0))
    start, column = torch.ops.blokern.mask_stream(mask.words, cols, block)
    with torch.no_grad():
        values = torch.ops.blokern.packed_values(weight, start, column, block)
    return PackedWeight(values, start, column, block, rows, cols)


def packed_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """F.linear(x, weight, bias) of the packed weight; no derivatives but forward mode's.

    x: [..., cols], of the dtype that the weight had; bias: [rows]. Raises ValueError or TypeError, naming the argument,
    for shapes or dtypes that do not fit, and for an x or bias whose gradient is wanted.

    >>> packed_linear(torch.ones(1, 2), pack_weight(torch.eye(2), torch.eye(2) > 0))
    tensor([[1., 1.]])
    """
    for name, t in (("x", x), ("bias", bias)):
        if t is not None and t.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name} must not require a gradient: packed weights are for inference, under torch.no_grad()"
            )
    if x.dim() == 0 or x.shape[-1] != weight.cols:
        raise ValueError(f"x must have shape [..., {weight.cols}], got {tuple(x.shape)}")
    samples = x.reshape(math.prod(x.shape[:-1]), weight.cols).t()
    entries = (weight.start, weight.column, weight.block, weight.rows)
    y = _packed_spmm_op(weight.values, samples, bias, *entries).t()
    return y.reshape(*x.shape[:-1], weight.rows)


def _fake_values(weight: Tensor, start: Tensor, column: Tensor, block: int) -> Tensor:
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return weight.new_empty(column.shape, dtype=dtype)


def _fake_spmm(
    values: Tensor, x: Tensor, bias: Tensor | None, start: Tensor, column: Tensor, block: int, rows: int
) -> Tensor:
    samples = x.shape[1]
    if x.stride(0) == 1 and x.stride(1) != 1:
        return x.new_empty(samples, rows).t()
    return x.new_empty(rows, samples)


torch.library.register_fake("blokern::packed_values", _fake_values)
torch.library.register_fake("blokern::packed_spmm", _fake_spmm)


def _packed_spmm_defined(
    values: Tensor, x: Tensor, bias: Tensor | None, start: Tensor, column: Tensor, block: int, rows: int
) -> Tensor:
    part = torch.repeat_interleave(start.diff(), output_size=len(column))  # block by block, row by row
    weight = x.new_zeros(rows, x.shape[0]).index_put((part % max(rows, 1), column), values.to(x.dtype))
    y = weight @ x
    return y if bias is None else y + bias.unsqueeze(1)


_packed_spmm_op = with_definition("packed_spmm", _packed_spmm_defined)
