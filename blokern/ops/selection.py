"""Selections: which entries of a score are kept, as bool masks.

Scores are float64, float32, bfloat16 or float16, of any strides; the values rank as given, so pass |w| for magnitudes.
Of equal scores the one with the lower index is kept, in the order of the list and then row-major, whatever the strides;
−0 equals +0, infinities and denormals rank as numbers. NaN is a ValueError; on CUDA, which the host does not wait for,
it is an assertion on the device, which the next call that waits raises. Masks are new, row-major, the same whatever
the number of threads, and carry no gradient: scores may require grad, and no derivative comes back.

Every function raises ValueError for a value, shape, device or name that does not fit and TypeError for a type that
does not, naming the argument.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from blokern._names import unknown_name
from blokern.ops.types import Scope

__all__ = ["channel_mask", "filter_mask", "nm_mask", "topk_mask"]

_SCOPES = ("global", "layer")
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@overload
def topk_mask(scores: Tensor, density: float, *, scope: Scope = "global") -> Tensor: ...
@overload
def topk_mask(scores: Sequence[Tensor], density: float, *, scope: Scope = "global") -> list[Tensor]: ...
def topk_mask(
    scores: Tensor | Sequence[Tensor], density: float, *, scope: Scope = "global"
) -> Tensor | list[Tensor]:
    """The largest scores: a mask for a tensor, a list of masks for a list of tensors.

    Keeps exactly round(density * n) of n entries, as Python rounds; that may be none. density is in (0, 1]. scope
    "global" selects among all tensors of the list together, "layer" in each by itself. Dtypes may differ: values are
    compared exactly. A few passes over the scores, without a sort or a copy of them all. Scores are of any shape,
    float64, float32, bfloat16 or float16, masks bool of the same. Raises ValueError for NaN (on CUDA an assertion on
    the device), an empty list, several devices, a density out of range or another scope, TypeError for another type.

    >>> topk_mask([torch.tensor([3.0, 1.0]), torch.tensor([[2.0], [2.0]])], 0.5)
    [tensor([ True, False]), tensor([[ True],
            [False]])]
    """
    layers = [scores] if isinstance(scores, Tensor) else scores
    if not isinstance(layers, list | tuple):
        raise TypeError(f"scores must be a Tensor or a list of Tensors, got {type(scores).__name__}")
    if not layers:
        raise ValueError("scores must hold at least one tensor, got an empty list")
    for i, layer in enumerate(layers):
        if not isinstance(layer, Tensor):
            raise TypeError(f"scores[{i}] must be a Tensor, got {type(layer).__name__}")
        # Here, not in the op: the dispatcher takes one device's op before that can look.
        if layer.device != layers[0].device:
            raise ValueError(
                f"scores must be on one device, got {layers[0].device} and, for scores[{i}], {layer.device}"
            )
    if not isinstance(density, float | int):
        raise TypeError(f"density must be a float, got {type(density).__name__}")
    if scope not in _SCOPES:
        raise unknown_name("scope", scope, _SCOPES)
    masks: list[Tensor] = torch.ops.blokern.topk_mask(layers, density, scope == "layer")
    return masks[0] if isinstance(scores, Tensor) else masks


def nm_mask(scores: Tensor, n: int, m: int, dim: int = -1) -> Tensor:
    """The n largest of every m consecutive entries along `dim`, whose size is a multiple of m; 1 ≤ n ≤ m.

    Each entry is compared with the others of its group: fast for the m in use, slower than torch.topk past a thousand.
    Types and errors as in :func:`topk_mask`; ValueError for n, m or dim that do not fit.

    >>> nm_mask(torch.tensor([3.0, 1.0, 2.0, 2.0]), 2, 4)
    tensor([ True, False,  True, False])
    """
    _check_tensor(scores)
    for name, value in (("n", n), ("m", m), ("dim", dim)):
        if not isinstance(value, int):
            raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    mask: Tensor = torch.ops.blokern.nm_mask(scores, n, m, dim)
    return mask


def filter_mask(scores: Tensor, density: float) -> Tensor:
    """Whole filters (dim 0: output channels or features) of scores [out, in, ...], those of the largest L2 norms.

    Keeps exactly round(density * out) of them, as Python rounds. Norms are summed in float64. Types and errors as in
    :func:`topk_mask`; a NaN's message counts filters.

    >>> filter_mask(torch.tensor([[1.0, 1.0], [0.0, 2.0]]), 0.5)
    tensor([[False, False],
            [ True,  True]])
    """
    return _group_mask(scores, density, 0)


def channel_mask(scores: Tensor, density: float) -> Tensor:
    """:func:`filter_mask` for dim 1: input channels, or features.

    >>> channel_mask(torch.tensor([[1.0, 1.0], [0.0, 2.0]]), 0.5)
    tensor([[False,  True],
            [False,  True]])
    """
    return _group_mask(scores, density, 1)


def _group_mask(scores: Tensor, density: float, dim: int) -> Tensor:
    _check_tensor(scores)
    if scores.dim() < 2:
        raise ValueError(
            f"scores must have at least two dimensions, [out, in, ...], got shape {tuple(scores.shape)}"
        )
    if scores.dtype not in _DTYPES:
        raise TypeError(f"scores must be float64, float32, bfloat16 or float16, got {scores.dtype}")
    # Row by row, all summed in the same order: equal groups then have equal norms, and tie.
    with torch.no_grad():
        groups = scores.transpose(0, dim).flatten(1).contiguous()
        norms = torch.linalg.vector_norm(groups, dim=1, dtype=torch.float64)
    kept = topk_mask(norms, density)
    shape = [1] * scores.dim()
    shape[dim] = -1
    mask: Tensor = kept.view(shape).expand(scores.shape)
    return mask.contiguous()


def _check_tensor(scores: object) -> None:
    if not isinstance(scores, Tensor):
        raise TypeError(f"scores must be a Tensor, got {type(scores).__name__}")


# ---- Fakes


def _fake_topk_mask(scores: list[Tensor], density: float, per_layer: bool) -> list[Tensor]:
    return [layer.new_empty(layer.shape, dtype=torch.bool) for layer in scores]


def _fake_nm_mask(scores: Tensor, n: int, m: int, dim: int) -> Tensor:
    return scores.new_empty(scores.shape, dtype=torch.bool)


torch.library.register_fake("blokern::topk_mask", _fake_topk_mask)
torch.library.register_fake("blokern::nm_mask", _fake_nm_mask)
