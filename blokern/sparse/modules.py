"""Layers whose weight has a mask, and whole networks of them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from blokern import ops
from blokern.ops.mask import SparseMask, as_mask, check_mask
from blokern.sparse.layout import drop_layout

__all__ = [
    "MaskedConv2d",
    "MaskedLinear",
    "drop_mask",
    "masks_of",
    "parameter_owners",
    "sparsify",
    "to_dense",
]

ModelT = TypeVar("ModelT", bound=nn.Module)


class _Masked(nn.Module):
    """What masked layers share: the mask, whose bits are a buffer and so part of the state_dict."""

    #: Whether weight's gradient is that by weight ⊙ mask everywhere, not only where the mask is 1.
    dense_grad: bool = False
    weight: Tensor
    mask_words: Tensor
    _mask: SparseMask

    def _take(self, mask: SparseMask) -> None:
        check_mask(mask, self.weight, "weight")
        self.register_buffer("mask_words", mask.words)
        self._mask = mask

    @property
    def mask(self) -> SparseMask:
        """The mask in use; `mask.update_` changes it."""
        if self._mask.words is self.mask_words:
            return self._mask
        # The module was moved, a state_dict assigned, or a graph is being traced with stand-ins.
        mask = SparseMask.of_words(self.mask_words, self.weight.shape)
        if not torch.compiler.is_compiling():
            self._mask = mask
        return mask


def under_autocast(x: Tensor, *parameters: Tensor | None) -> Any:
    """The factors of a layer, in the dtype that its nn twin computes in under the caller's autocast. float64 stays."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return x, *parameters
    dtype = torch.get_autocast_dtype(device)
    return (*(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in (x, *parameters)),)


class MaskedLinear(_Masked, nn.Linear):
    """nn.Linear that computes with the kept entries of its weight only, forward and backward.

    Arguments of nn.Linear, and mask: bool or SparseMask [out, in]; None keeps all. The state_dict has one key more,
    mask_words. Under autocast it computes in bfloat16 (under float16's, in float32). Raises ValueError or TypeError for
    a mask that does not fit.

    >>> layer = MaskedLinear(8, 4, mask=torch.rand(4, 8) < 0.1)
    >>> layer(torch.randn(2, 8)).shape
    torch.Size([2, 4])
    """

    def __init__(self, *args: Any, mask: Tensor | SparseMask | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._take(_mask_or_all(mask, self.weight))

    def forward(self, input: Tensor) -> Tensor:
        x, weight, bias = under_autocast(input, self.weight, self.bias)
        return ops.masked_linear(x, weight, self.mask, bias, dense_grad=self.dense_grad)


class MaskedConv2d(_Masked, nn.Conv2d):
    """nn.Conv2d that computes with the kept entries of its weight only; padding with zeros. As :class:`MaskedLinear`.

    >>> layer = MaskedConv2d(3, 4, 3, padding=1, mask=torch.rand(4, 3, 3, 3) < 0.1)
    >>> layer(torch.randn(2, 3, 8, 8)).shape
    torch.Size([2, 4, 8, 8])
    """

    def __init__(self, *args: Any, mask: Tensor | SparseMask | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _check_zeros(self, "padding_mode")
        self._take(_mask_or_all(mask, self.weight))

    def forward(self, input: Tensor) -> Tensor:
        how = (self.stride, self.padding, self.dilation, self.groups)
        x, weight, bias = under_autocast(input, self.weight, self.bias)
        return ops.masked_conv2d(
            *(x, weight, self.mask, bias),
            *how,  # type: ignore[arg-type]
            dense_grad=self.dense_grad,
        )


_MASKED: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: MaskedLinear, nn.Conv2d: MaskedConv2d}
_DENSE = {masked: dense for dense, masked in _MASKED.items()}


def sparsify(model: ModelT, masks: Mapping[str, Tensor | SparseMask]) -> ModelT:
    """Give layers of the model masks, in place: nn.Linear becomes MaskedLinear, nn.Conv2d MaskedConv2d.

    masks: by parameter name, as in `model.named_parameters()`, such as "layer1.0.conv1.weight"; a layer that has a
    mask takes the new one. Parameters, hooks and names stay the same objects. Returns the model. A mask that keeps
    nothing is allowed, with a warning: the layer's output is its bias. Raises ValueError, and leaves the model as it
    was, if a name is no weight of such a layer, a mask does not fit, or a weight is shared between modules.

    >>> model = sparsify(nn.Sequential(nn.Linear(8, 4)), {"0.weight": torch.rand(4, 8) < 0.5})
    >>> model[0].mask.shape
    torch.Size([4, 8])
    """
    for module, mask in checked_masks(model, masks):
        give_mask(module, mask)
    return model


def checked_masks(
    model: nn.Module, masks: Mapping[str, Tensor | SparseMask]
) -> list[tuple[nn.Module, SparseMask]]:
    """The layers and their masks, as :func:`sparsify` takes them, with its errors and warning."""
    modules = dict(model.named_modules())
    owners = parameter_owners(model)
    found: list[tuple[nn.Module, SparseMask]] = []
    for name, given in masks.items():
        path, _, leaf = name.rpartition(".")
        module = modules.get(path)
        if leaf != "weight" or module is None or type(module) not in {*_MASKED, *_DENSE}:
            got = "no such module" if module is None else type(module).__name__
            raise ValueError(f"masks: {name!r} must be the weight of an nn.Linear or nn.Conv2d, got {got}")
        if len(shared := owners[id(module.weight)]) > 1:
            raise ValueError(
                f"masks: {name!r} is shared between {' and '.join(map(repr, shared))}; untie it first"
            )
        _check_zeros(module, f"masks: {name!r}")
        mask = as_mask(given)
        check_mask(mask, module.weight, name)
        if mask.kept == 0:
            warnings.warn(f"masks: {name!r} keeps no weight: the layer's output is its bias", stacklevel=3)
        found.append((module, mask))
    return found


def give_mask(module: nn.Module, mask: SparseMask) -> None:
    """Make a layer a masked one, or change its mask for another."""
    module.__class__ = _MASKED.get(type(module), type(module))
    assert isinstance(module, _Masked)
    module._take(mask)


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


def masks_of(model: nn.Module) -> dict[str, SparseMask]:
    """The masks of the model's layers, by parameter name, as :func:`sparsify` takes them.

    >>> list(masks_of(nn.Sequential(MaskedLinear(8, 4))))
    ['0.weight']
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, _Masked)}
    return {f"{name}.weight" if name else "weight": module.mask for name, module in found.items()}


def to_dense(model: ModelT) -> ModelT:
    """Undo :func:`sparsify` and :func:`samples_innermost`, in place: dense layers, whose masked weights are zeros.

    Returns the model.

    >>> type(to_dense(nn.Sequential(MaskedLinear(8, 4)))[0]).__name__
    'Linear'
    """
    for module in model.modules():
        if type(module) in _DENSE:
            drop_mask(module)
    drop_layout(model)
    return model


def drop_mask(module: Any) -> None:
    """Make a masked layer a dense one, with zeros for its masked weights."""
    if module.mask.kept < module.weight.numel():
        with torch.no_grad():
            module.weight.masked_fill_(~module.mask.to_dense(), 0.0)
    del module.mask_words, module._mask
    module.__dict__.pop("dense_grad", None)
    module.__class__ = _DENSE[type(module)]


def _mask_or_all(mask: Tensor | SparseMask | None, weight: Tensor) -> SparseMask:
    return as_mask(torch.ones_like(weight, dtype=torch.bool) if mask is None else mask)


def _check_zeros(module: nn.Module, what: str) -> None:
    mode = getattr(module, "padding_mode", "zeros")
    if mode != "zeros":
        raise ValueError(f"{what} must be a layer that pads with zeros, got {mode!r}")
