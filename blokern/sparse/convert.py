"""To and from the forms that torch has for pruned weights: torch.nn.utils.prune, and sparse CSR tensors."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from blokern.ops.mask import SparseMask, as_mask, check_mask
from blokern.sparse.layers import Masked
from blokern.sparse.maskable import parameter_owners, why_layer_not_maskable, why_shared
from blokern.sparse.modules import check_droppable, drop_mask, masks_of, sparsify

__all__ = ["from_csr", "from_torch_prune", "to_csr", "to_torch_prune"]

ModelT = TypeVar("ModelT", bound=nn.Module)


def from_torch_prune(model: ModelT) -> ModelT:
    """Make masked layers of what torch.nn.utils.prune has pruned, in place; the outputs stay.

    A layer's weight_orig becomes its weight again, the same parameter, zero where its weight_mask was, which becomes
    the mask. Returns the model. Raises ValueError, before anything is changed, if something else is pruned than the
    weight of an nn.Linear or nn.Conv2d that :func:`sparsify` takes, or a mask is not of zeros and ones.

    >>> layer = prune.l1_unstructured(nn.Linear(8, 4), "weight", 0.5)
    >>> from_torch_prune(nn.Sequential(layer))[0].mask.kept
    16
    """
    masks: dict[str, Tensor] = {}
    owners = parameter_owners(model)
    for path, module in model.named_modules():
        for hook in module._forward_pre_hooks.values():
            if not isinstance(hook, prune.BasePruningMethod):
                continue
            leaf = hook._tensor_name
            name = f"{path}.{leaf}".lstrip(".")
            if leaf != "weight" or type(module) not in (nn.Linear, nn.Conv2d):
                raise ValueError(
                    f"model: {name!r} is pruned, and must be the weight of an nn.Linear or nn.Conv2d"
                )
            original = module.get_parameter("weight_orig")
            reason = why_layer_not_maskable(module, original) or why_shared(owners[id(original)])
            if reason is not None:
                raise ValueError(f"model: {name!r} is pruned, and {reason}")
            mask = module.get_buffer("weight_mask")
            masks[name] = mask != 0
            if not torch.equal(mask, masks[name].to(mask.dtype)):
                raise ValueError(f"model: the mask of {name!r} must be of zeros and ones")
    for name in masks:
        module = model.get_submodule(name.rpartition(".")[0])
        prune.remove(module, "weight")  # type: ignore[no-untyped-call]  # zeroes what is pruned
    return sparsify(model, masks)


def to_torch_prune(model: ModelT) -> ModelT:
    """The reverse of :func:`from_torch_prune`: dense layers with the hooks of torch.nn.utils.prune, in place.

    Returns the model. Raises as :func:`to_dense`, before anything is changed.

    >>> model = to_torch_prune(sparsify(nn.Sequential(nn.Linear(8, 4)), {"0.weight": torch.rand(4, 8) < 0.5}))
    >>> prune.is_pruned(model)
    True
    """
    check_droppable(model)
    for name, mask in masks_of(model).items():
        module = model.get_submodule(name.rpartition(".")[0])
        assert isinstance(module, Masked)
        kept = mask.to_dense()
        drop_mask(module)
        prune.custom_from_mask(module, "weight", kept)  # type: ignore[no-untyped-call]
    return model


def to_csr(weight: Tensor, mask: Tensor | SparseMask) -> Tensor:
    """The kept entries of a weight [out, ...] as a sparse CSR tensor [out, the rest]; those that are 0 too.

    Raises TypeError or ValueError for a mask that does not fit.

    >>> to_csr(torch.eye(2), torch.tensor([[True, True], [False, False]])).values()
    tensor([1., 0.])
    """
    mask = as_mask(mask)
    check_mask(mask, weight, "weight")
    kept = mask.to_dense().view(mask.rows, mask.cols)
    start = torch.zeros(mask.rows + 1, dtype=torch.int64, device=kept.device)
    torch.cumsum(kept.sum(1), 0, out=start[1:])
    column = kept.nonzero()[:, 1]
    values = weight.reshape(mask.rows, mask.cols)[kept]
    size = (mask.rows, mask.cols)
    return torch.sparse_csr_tensor(
        start, column, values, size=size, check_invariants=False
    )  # by construction


def from_csr(csr: Tensor, shape: torch.Size | None = None) -> tuple[Tensor, SparseMask]:
    """The weight that a sparse CSR tensor [out, the rest] stands for, and a mask that keeps its entries, 0 or not.

    shape: of both, such as [out, in, 3, 3] for a convolution; the tensor's if not given. Raises TypeError for another
    kind of tensor, ValueError for a shape of another size or an entry that is there twice.

    >>> weight, mask = from_csr(torch.eye(2).to_sparse_csr())
    >>> mask.kept, weight.sum()
    (2, tensor(2.))
    """
    if csr.layout != torch.sparse_csr or csr.dim() != 2:
        raise TypeError(
            f"csr must be a sparse CSR tensor [out, in], got {csr.layout}, {csr.dim()}-dimensional"
        )
    start, column, values = csr.crow_indices(), csr.col_indices(), csr.values()
    shape = csr.shape if shape is None else torch.Size(shape)
    if not shape or shape[0] != csr.shape[0] or shape.numel() != csr.shape.numel():
        raise ValueError(
            f"shape must have the rows and the size of csr, {tuple(csr.shape)}, got {tuple(shape)}"
        )
    row = torch.repeat_interleave(torch.arange(csr.shape[0], device=csr.device), start.diff())
    kept = torch.zeros(csr.shape, dtype=torch.bool, device=csr.device)
    kept[row, column] = True
    if int(kept.sum()) != len(values):
        raise ValueError(f"csr must have each entry once, got {len(values)} for {int(kept.sum())} places")
    weight = torch.zeros(csr.shape, dtype=values.dtype, device=csr.device).index_put((row, column), values)
    return weight.view(shape), SparseMask(kept.view(shape))
