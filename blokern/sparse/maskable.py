"""Which weights of a network can have a mask, and why the others cannot: the one place that knows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

__all__ = [
    "Maskable",
    "maskable",
    "parameter_owners",
    "why_layer_not_maskable",
    "why_not_maskable",
    "why_shared",
]

_DENSE = (nn.Linear, nn.Conv2d)


class Maskable(NamedTuple):
    """weights: what :func:`blokern.sparse.sparsify` takes a mask for, by parameter name; skipped: the other parameters
    of two dimensions and more, and why each is none of them."""

    weights: dict[str, nn.Parameter]
    skipped: dict[str, str]


def maskable(model: nn.Module) -> Maskable:
    """The weights of the model that can have a mask, and what is skipped with the reason, both by parameter name.

    >>> model = nn.ModuleDict({"words": nn.Embedding(9, 4), "fc": nn.Linear(4, 2)})
    >>> list(maskable(model).weights), maskable(model).skipped
    (['fc.weight'], {'words.weight': 'must be the weight of an nn.Linear or nn.Conv2d, got Embedding'})
    """
    owners = parameter_owners(model)
    found = Maskable({}, {})
    for path, module in model.named_modules():
        if isinstance(module, parametrize.ParametrizationList):  # its layer is named
            continue
        reason = why_not_maskable(module)
        if reason is None:
            reason = why_shared(owners[id(module._parameters["weight"])])
        # Of a layer whose weight is computed, the parameters have other names.
        names = (
            ["weight"]
            if isinstance(module, _DENSE)
            else [name for name, p in module._parameters.items() if p is not None and p.dim() > 1]
        )
        for name in (f"{path}.{name}".lstrip(".") for name in names):
            if reason is None:
                found.weights[name] = module._parameters["weight"]
            else:
                found.skipped[name] = reason
    return found


def why_not_maskable(module: nn.Module) -> str | None:
    """None if the module's weight can have a mask, or has one; else why not, to be read behind the weight's name.

    Of one module alone: a weight that modules share is for :func:`maskable` to find.

    >>> why_not_maskable(nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"))
    "must be a layer that pads with zeros, got 'reflect'"
    """
    from blokern.sparse.layers import MaskedConv2d, MaskedLinear

    if parametrize.is_parametrized(module):
        name, first = next(iter(module.parametrizations.items()))  # type: ignore[union-attr, operator]
        return (
            f"must be a plain parameter of its layer, whose {name} is parametrized by {type(first[0]).__name__}: call "
            f"torch.nn.utils.parametrize.remove_parametrizations(layer, {name!r}) first"
        )
    if type(module) not in (*_DENSE, MaskedLinear, MaskedConv2d):
        other_use = ", a subclass, which may use it in another way" if isinstance(module, _DENSE) else ""
        return f"must be the weight of an nn.Linear or nn.Conv2d, got {type(module).__name__}{other_use}"
    weight = module._parameters.get("weight")
    return _why_computed(module) if weight is None else why_layer_not_maskable(module, weight)


def why_layer_not_maskable(module: nn.Module, weight: Tensor) -> str | None:
    """The same of an nn.Linear or nn.Conv2d that will have this parameter for its weight.

    >>> why_layer_not_maskable(nn.Linear(2, 2), nn.Parameter(torch.eye(2).to_sparse()))
    'must be a dense tensor, got layout torch.sparse_coo'
    """
    mode = getattr(module, "padding_mode", "zeros")
    if mode != "zeros":
        return f"must be a layer that pads with zeros, got {mode!r}"
    if not weight.is_floating_point() or weight.dtype.itemsize < 2:
        return f"must be of floats of 16 bits or more, got {weight.dtype}"
    if weight.layout != torch.strided:
        return f"must be a dense tensor, got layout {weight.layout}"
    if any(size > 1 and stride == 0 for size, stride in zip(weight.shape, weight.stride(), strict=True)):
        return f"must have memory of its own for each entry, got strides {weight.stride()}"
    return None


def why_shared(owners: list[str]) -> str | None:
    """None for a parameter of one owner alone."""
    if len(owners) == 1:
        return None
    return f"is shared between {' and '.join(map(repr, owners))}; untie it first"


def parameter_owners(model: nn.Module) -> dict[int, list[str]]:
    """The names of the modules that hold each parameter, by its id; more than one for a tied weight.

    >>> list(parameter_owners(nn.Sequential(nn.Linear(8, 4, bias=False))).values())
    [['0']]
    """
    owners: dict[int, list[str]] = {}
    for owner, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(owner)
    return owners


def _why_computed(module: nn.Module) -> str:
    """Of a layer whose weight is no parameter: who makes it, as far as torch's hooks tell."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, prune.BasePruningMethod) and hook._tensor_name == "weight":
            return (
                "must be a parameter of its layer, and torch.nn.utils.prune computes it: take blokern.sparse."
                "from_torch_prune, or call torch.nn.utils.prune.remove(layer, 'weight') first"
            )
        remove = {"WeightNorm": "remove_weight_norm", "SpectralNorm": "remove_spectral_norm"}.get(
            type(hook).__name__
        )
        if remove is not None:
            return (
                f"must be a parameter of its layer, and {type(hook).__name__} computes it: call "
                f"torch.nn.utils.{remove}(layer) first"
            )
    return "must be a parameter of its layer, which has none of that name"
