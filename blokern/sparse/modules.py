"""Masks for layers of whole networks, and networks without them again."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TypeVar

from torch import Tensor, nn

from blokern.ops.mask import SparseMask, as_mask, check_mask
from blokern.sparse.layers import Masked, MaskedConv2d, MaskedLinear
from blokern.sparse.layout import drop_layout
from blokern.sparse.maskable import maskable, parameter_owners, why_not_maskable, why_shared

__all__ = [
    "MaskedConv2d",
    "MaskedLinear",
    "check_droppable",
    "checked_masks",
    "drop_mask",
    "give_mask",
    "maskable",
    "masks_of",
    "parameter_owners",
    "sparsify",
    "to_dense",
    "why_not_maskable",
]

ModelT = TypeVar("ModelT", bound=nn.Module)

_MASKED: dict[type[nn.Module], type[Masked]] = {nn.Linear: MaskedLinear, nn.Conv2d: MaskedConv2d}
_DENSE: dict[type[nn.Module], type[nn.Module]] = {masked: dense for dense, masked in _MASKED.items()}


def sparsify(model: ModelT, masks: Mapping[str, Tensor | SparseMask]) -> ModelT:
    """Give layers of the model masks, in place: nn.Linear becomes MaskedLinear, nn.Conv2d MaskedConv2d.

    masks: by parameter name, as in `model.named_parameters()`, such as "layer1.0.conv1.weight"; a layer that has a
    mask takes the new one. They are copied, and may serve other models. Parameters, hooks and names stay the same
    objects; weights become zero where their mask is 0, and stay so (:class:`MaskedLinear`). Returns the model. A mask
    that keeps nothing is allowed, with a warning: the layer's output is its bias. Raises ValueError, and leaves the
    model as it was, if a mask does not fit, or a name is no weight that can have one; :func:`maskable` tells which can.

    >>> model = sparsify(nn.Sequential(nn.Linear(8, 4)), {"0.weight": torch.rand(4, 8) < 0.5})
    >>> model[0].mask.shape
    torch.Size([4, 8])
    """
    for module, mask in checked_masks(model, masks):
        if isinstance(module, Masked):
            module.mask.update_(mask)
        else:
            give_mask(module, mask)
    return model


def checked_masks(
    model: nn.Module, masks: Mapping[str, Tensor | SparseMask]
) -> list[tuple[nn.Module, SparseMask]]:
    """The layers and their masks, as :func:`sparsify` takes them, with its errors and warning."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if not isinstance(masks, Mapping) or not all(isinstance(name, str) for name in masks):
        raise TypeError(f"masks must be a mapping of masks by parameter name, got {type(masks).__name__}")
    modules = dict(model.named_modules())
    owners = parameter_owners(model)
    found: list[tuple[nn.Module, SparseMask]] = []
    for name, given in masks.items():
        path, _, leaf = name.rpartition(".")
        module = modules.get(path)
        if module is None or leaf != "weight":
            got = "no such module" if module is None else type(module).__name__
            raise ValueError(f"masks: {name!r} must be the weight of an nn.Linear or nn.Conv2d, got {got}")
        reason = why_not_maskable(module) or why_shared(owners[id(module._parameters["weight"])])
        if reason is not None:
            raise ValueError(f"masks: {name!r} {reason}")
        try:
            mask = as_mask(given)
        except (TypeError, ValueError) as error:
            raise type(error)(f"masks: {name!r}: {error}") from error
        weight = module._parameters["weight"]
        assert weight is not None
        if mask.words.is_meta and not weight.is_meta:
            raise ValueError(f"masks: {name!r} is on the meta device, without values")
        check_mask(mask, weight, name)
        if not mask.words.is_meta and mask.kept == 0:
            warnings.warn(f"masks: {name!r} keeps no weight: the layer's output is its bias", stacklevel=3)
        found.append((module, mask))
    return found


def give_mask(module: nn.Module, mask: SparseMask) -> None:
    """Make a layer a masked one, or put another mask in the place of its own, which need not fit its weight."""
    module.__class__ = _MASKED.get(type(module), type(module))
    assert isinstance(module, Masked)
    module.take(mask)


def masks_of(model: nn.Module) -> dict[str, SparseMask]:
    """The masks of the model's layers, by parameter name, as :func:`sparsify` takes them.

    >>> list(masks_of(nn.Sequential(MaskedLinear(8, 4))))
    ['0.weight']
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, Masked)}
    return {f"{name}.weight" if name else "weight": module.mask for name, module in found.items()}


def to_dense(model: ModelT) -> ModelT:
    """Undo :func:`sparsify` and :func:`samples_innermost`, in place: dense layers, whose masked weights are zeros.

    Returns the model. Raises ValueError, and leaves the model as it was, if something else has come to compute the
    weight of a masked layer, such as weight_norm.

    >>> type(to_dense(nn.Sequential(MaskedLinear(8, 4)))[0]).__name__
    'Linear'
    """
    check_droppable(model)
    for module in model.modules():
        if isinstance(module, Masked):
            drop_mask(module)
    drop_layout(model)
    return model


def check_droppable(model: nn.Module) -> None:
    """Raises ValueError if a masked layer cannot become a dense one."""
    for name, module in model.named_modules():
        if isinstance(module, Masked) and (reason := why_not_maskable(module)) is not None:
            raise ValueError(f"model: {f'{name}.weight'.lstrip('.')!r} {reason}")


def drop_mask(module: Masked) -> None:
    """Make a masked layer a dense one, with zeros for its masked weights."""
    module.drop()
    module.__class__ = _DENSE[type(module)]  # type: ignore[assignment]
