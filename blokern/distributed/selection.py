"""Which scores are the largest, where each process has a part of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from blokern.distributed.processes import Processes

__all__ = ["topk_mask"]

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
#: Bits of the first digit, sign and exponent mostly, and of the others: 16 KiB of counts, and 2 KiB each.
_FIRST, _NEXT = 11, 8


def topk_mask(scores: Sequence[Tensor], density: float, processes: Processes) -> list[Tensor]:
    """The largest scores of all processes together: the masks of this one's.

    scores: the same number of tensors in every process, tensor i of all of them being one tensor, put together along
    dim 0 by rank; or DTensors of one mesh, sharded along dim 0 as FSDP2 does, or replicated, whose masks are alike.

    Exact, as :func:`blokern.ops.topk_mask` with scope "global" would choose in the whole: round(density * n) of n
    entries, ties to the lower index. By radix selection: the processes add up how many scores have which next digit,
    until the threshold is known, and then deal the scores that equal it. That is 22 KiB a process for float32 and 30
    KiB for float64, besides 8 bytes a tensor and process.

    Raises ValueError, in every process, for NaN or a density outside (0, 1]; TypeError for another type.

    >>> masks = topk_mask([p.detach().abs() for p in model.parameters()], 0.1, processes)  # after fully_shard(model)
    """
    for i, score in enumerate(scores):
        if not isinstance(score, Tensor) or score.dtype not in _DTYPES:
            got = score.dtype if isinstance(score, Tensor) else type(score).__name__
            raise TypeError(f"scores[{i}] must be a float64, float32, bfloat16 or float16 Tensor, got {got}")
    if not scores:
        raise ValueError("scores must hold at least one tensor, got none")
    if not 0.0 < density <= 1.0:
        raise ValueError(f"density must be in (0, 1], got {density}")
    pieces = [_Piece.of(score, i, processes) for i, score in enumerate(scores)]
    wide = any(score.dtype == torch.float64 for score in scores)
    keys = [_keys(piece.local, wide) for piece in pieces]
    own = [key for piece, key in zip(pieces, keys, strict=True) if piece.counted]
    threshold, ties = _threshold(torch.cat(own) if own else keys[0][:0], density, processes)
    return _masks(pieces, keys, threshold, ties, processes)


@dataclass(frozen=True)
class _Piece:
    """What this process has of a tensor. counted: its entries are the process's own, not copies of another's."""

    score: Tensor
    local: Tensor
    counted: bool
    replicated: bool

    @classmethod
    def of(cls, score: Tensor, index: int, processes: Processes) -> _Piece:
        if not isinstance(score, DTensor):
            return cls(score, score.detach(), True, False)
        placements = score.placements
        if placements not in ((Shard(0),), (Replicate(),)):
            raise ValueError(
                f"scores[{index}] must be sharded along dim 0 of a one-dimensional mesh or replicated, got {placements}"
            )
        if score.device_mesh.size() != processes.size:
            raise ValueError(
                f"scores[{index}] must be on a mesh of all {processes.size} processes, got {score.device_mesh}"
            )
        replicated = placements == (Replicate(),)
        return cls(score, score.to_local().detach(), processes.leads or not replicated, replicated)

    def mask(self, local: Tensor) -> Tensor:
        if not isinstance(self.score, DTensor):
            return local
        score = self.score
        mask: Tensor = DTensor.from_local(
            local, score.device_mesh, score.placements, shape=score.shape, stride=score.stride()
        )
        return mask


def _keys(score: Tensor, wide: bool) -> Tensor:
    """Integers of the scores' order, flat: −∞ < … < −0 = +0 < … < +∞ < NaN."""
    values = score.reshape(-1).to(torch.float64 if wide else torch.float32)
    bits = values.view(torch.int64 if wide else torch.int32)
    lowest = torch.iinfo(bits.dtype).min
    keys = torch.where(bits < 0, lowest - bits, bits)
    return keys.masked_fill_(values.isnan(), torch.iinfo(bits.dtype).max)


def _digits(bits: int) -> Iterator[tuple[int, int]]:
    """Shift and width of each digit, from the highest on."""
    shift = bits - _FIRST
    yield shift, _FIRST
    while shift:
        width = min(_NEXT, shift)
        shift -= width
        yield shift, width


def _threshold(keys: Tensor, density: float, processes: Processes) -> tuple[int, int]:
    """The lowest key that is kept, and how many of those that equal it."""
    bits = torch.iinfo(keys.dtype).bits
    totals = torch.tensor([keys.numel(), (keys == torch.iinfo(keys.dtype).max).sum()], device=keys.device)
    processes.sum_([totals])
    entries, nans = totals.tolist()
    if nans:
        raise ValueError(f"scores must have no NaN, got {nans} in {entries} values")
    wanted, known = round(density * entries), 0
    for shift, width in _digits(bits):
        digit = keys >> shift  # of the first digit from −1024 on, as it has the sign
        digit = digit + (1 << width >> 1) if width == _FIRST else digit & ((1 << width) - 1)
        counts = torch.bincount(digit, minlength=1 << width)
        processes.sum_([counts])
        value = len(counts) - 1
        for count in reversed(counts.tolist()):
            if wanted <= count:
                break
            wanted, value = wanted - count, value - 1
        keys = keys[digit == value]
        known = known << width | value
    return known - (1 << (bits - 1)), wanted


def _masks(
    pieces: Sequence[_Piece], keys: Sequence[Tensor], threshold: int, ties: int, processes: Processes
) -> list[Tensor]:
    """Who is above the threshold, and the first `ties` of those that equal it: by tensor, rank and index."""
    # [tensor, rank]: of a replicated tensor the first process has all, and the others the same ones.
    table = torch.zeros(len(pieces), processes.size, dtype=torch.int64, device=keys[0].device)
    for i, piece in enumerate(pieces):
        if piece.counted:
            table[i, processes.rank] = (keys[i] == threshold).sum()
    processes.sum_([table])
    before = (table.flatten().cumsum(0) - table.flatten()).view_as(table).tolist()
    masks = []
    for i, piece in enumerate(pieces):
        left = ties - before[i][0 if piece.replicated else processes.rank]
        mask = keys[i] > threshold
        if left > 0:
            equal = keys[i] == threshold
            mask |= equal & (equal.cumsum(0) <= left)
        masks.append(piece.mask(mask.view(piece.local.shape)))
    return masks
