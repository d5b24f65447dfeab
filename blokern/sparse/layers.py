"""Layers whose weight has a mask.

What anybody sees of such a layer is the masked weight: its values are zero where the mask is 0, and so is its gradient.
The parameter in `_parameters` holds these zeros, and the layer's own products, which read kept entries alone, take it
from there. Everybody else comes by the property `weight`, which makes sure of both: something may have been written
since, such as an optimizer's step with old momentum.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blokern import ops
from blokern.ops.mask import SparseMask, as_mask, check_mask, check_of, is_jit_traced
from blokern.ops.masked_weight import GradientMask, clear_masked_, masked_weight
from blokern.sparse.maskable import why_not_maskable
from blokern.sparse.nodes import node_of

__all__ = ["Masked", "MaskedConv2d", "MaskedLinear", "under_autocast"]

_WORDS, _CHECK = "mask_words", "mask_check"


class Masked(nn.Module):
    """What masked layers share: the mask, whose bits are a buffer and so part of the state_dict; and the weight."""

    #: Whether weight's gradient is that by weight ⊙ mask everywhere, not only where the mask is 1.
    dense_grad: bool = False
    mask_words: Tensor
    mask_check: Tensor

    @property
    def weight(self) -> Tensor:
        """The parameter, with zeros where the mask is 0 and a gradient that is zero there too.

        Where another tensor stands in for it, as under torch.func.functional_call, in a replica or in a graph that is
        being traced, that tensor ⊙ mask.
        """
        weight = self._weight_now()
        if _WORDS not in self._buffers:  # the layer is being built
            return weight
        is_own: bool = weight is self.__dict__["_own_weight"]
        if not is_own or _is_traced():
            return masked_weight(weight, self.mask, dense_grad=self.dense_grad)
        self.clear_weight()
        self._hook_gradient(weight)
        return weight

    @weight.setter
    def weight(self, value: Tensor) -> None:
        # No parameter, which nn.Module would have taken: a replica's, or what torch.nn.utils.prune computes.
        self.__dict__["weight"] = value

    @weight.deleter
    def weight(self) -> None:
        del self.__dict__["weight"]

    def __delattr__(self, name: str) -> None:
        if name == "weight" and name in self._parameters and _WORDS in self._buffers:
            raise ValueError(
                "the weight of a masked layer cannot be deleted, nor parametrized: call blokern.sparse.to_dense(layer) "
                "first, or assign another parameter"
            )
        super().__delattr__(name)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name == "weight" and param is not None and _WORDS in self._buffers:
            self._check_new_weight(param)
            super().register_parameter(name, param)
            self._own()
            if not torch.equal(masked := masked_weight(param.detach(), self.mask), param.detach()):
                param.data = masked  # who else has the old memory keeps it as it is
        else:
            super().register_parameter(name, param)

    def _check_new_weight(self, weight: nn.Parameter) -> None:
        check_mask(self.mask, weight, "weight")
        for hook in (weight._backward_hooks or {}).values():
            other = hook.owner if isinstance(hook, GradientMask) else None
            if isinstance(other, Masked) and other is not self and other.mask != self.mask:
                raise ValueError("weight is that of a layer with another mask: give both the same mask first")

    @property
    def stored_weight(self) -> nn.Parameter:
        """The parameter as it lies, for whoever knows of the mask."""
        weight = self._parameters["weight"]
        assert weight is not None
        return weight

    def _weight_now(self) -> Tensor:
        weight = self._parameters.get("weight")
        if weight is not None:
            return weight
        if "weight" not in self.__dict__:
            raise AttributeError("weight")  # nn.Module tells, or knows that it is None
        computed: Tensor = self.__dict__["weight"]
        return computed

    def clear_weight(self, mask: SparseMask | None = None) -> None:
        """Zeros where the mask is 0."""
        weight = self.__dict__["_own_weight"]
        if weight is not None:
            clear_masked_(weight, self.mask if mask is None else mask)

    def gradient_mask(self) -> SparseMask | None:
        """What masks the gradient of the weight."""
        return None if self.dense_grad else self.mask

    def _hook_gradient(self, weight: Tensor) -> None:
        """Copies of a parameter lose its hooks: so they are looked for whenever somebody reads it."""
        if weight.requires_grad and not any(True for _ in self._hooks_of(weight)):
            hook = GradientMask(weakref.WeakMethod(self.gradient_mask))
            weight.register_hook(hook)  # type: ignore[no-untyped-call]

    def _hooks_of(self, weight: Tensor) -> list[int]:
        hooks = weight._backward_hooks or {}
        return [key for key, h in hooks.items() if isinstance(h, GradientMask) and h.owner is self]

    # ---- The mask

    @property
    def mask(self) -> SparseMask:
        """The mask in use; `mask.update_` changes it."""
        if torch.compiler.is_compiling():
            return SparseMask.of_words(self.mask_words, self._weight_now().shape, self.mask_check)
        words, check = self._buffers[_WORDS], self._buffers[_CHECK]
        mask: SparseMask | None = self.__dict__.get("_mask")
        if mask is not None and mask.words is words and mask._check is check:
            return mask
        # The module was moved or copied, a state_dict assigned, or stand-ins are in use.
        assert words is not None
        mask = SparseMask.of_words(words, self._weight_now().shape, check)
        self.__dict__["_mask"] = mask
        mask.on_change = weakref.WeakMethod(self.clear_weight)
        return mask

    def take(self, mask: SparseMask) -> None:
        """Have this mask, a copy of it, from now on. Raises ValueError for one of another shape."""
        weight = self._parameters["weight"]
        assert weight is not None
        check_mask(mask, weight, "weight")
        with torch.inference_mode(False):  # inference tensors have no version
            words = mask.words.detach().to(weight.device, copy=True)
            self.register_buffer(_WORDS, words)
            self.register_buffer(_CHECK, mask.check.detach().to(weight.device, copy=True))
        self._own()
        self.clear_weight()

    def drop(self) -> None:
        """Have no mask any more: zeros stay where it was 0."""
        self.clear_weight()
        weight = self._parameters["weight"]
        if weight is not None and weight._backward_hooks:
            for key in self._hooks_of(weight):
                del weight._backward_hooks[key]
        del self.mask_words, self.mask_check
        for name in ("_mask", "_own_weight", "dense_grad"):
            self.__dict__.pop(name, None)

    # ---- Copies, moves, state_dicts

    def _own(self) -> None:
        """The parameter is this layer's to keep zeros in: not what stands in for it for the time of a call."""
        self.__dict__["_own_weight"] = self._parameters.get("weight")

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._own()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_mask"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if _CHECK not in self._buffers:
            self.register_buffer(_CHECK, check_of(self.mask_words))
        self._own()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if not self.mask.is_damaged():  # whoever loads it is told
            self.clear_weight()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Mapping[str, Any], *args: Any
    ) -> None:
        """A dense state_dict fits too, and what is loaded counts where the mask is 1."""
        words, check = (state_dict.get(prefix + name) for name in (_WORDS, _CHECK))
        errors: list[str] = args[3]
        if words is None:
            state_dict[prefix + _WORDS], state_dict[prefix + _CHECK] = self.mask_words, self.mask_check
        elif words.shape == self.mask_words.shape:
            try:
                state_dict[prefix + _CHECK] = SparseMask.of_words(words, self.mask.shape, check).valid().check
            except ValueError as error:
                errors.append(f"{prefix}{_WORDS}: {error}")
                return
        elif check is None:
            state_dict[prefix + _CHECK] = self.mask_check  # the words' shape is told
        words = state_dict[prefix + _WORDS]
        fits = words.shape == self.mask_words.shape
        if fits and local_metadata.get("assign_to_params_buffers", False):
            # Before the weight, which is masked when it is assigned.
            self._buffers[_WORDS], self._buffers[_CHECK] = words, state_dict[prefix + _CHECK]
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        if fits:
            self.clear_weight()

    # ---- Products

    def _by_torch(self, weight: Tensor) -> bool:
        """Whether torch multiplies: tensors without values, and under torch.jit.trace, which would keep of the kernels'
        arguments what they are for this input and this mask."""
        return weight.is_meta or is_jit_traced()


def _is_traced() -> bool:
    return torch.compiler.is_compiling() or is_jit_traced()


def under_autocast(x: Tensor, *parameters: Tensor | None) -> Any:
    """The factors of a layer, in the dtype that its nn twin computes in under the caller's autocast. float64 stays."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return x, *parameters
    dtype = torch.get_autocast_dtype(device)
    return (*(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in (x, *parameters)),)


class MaskedLinear(Masked, nn.Linear):
    """nn.Linear that computes with the kept entries of its weight only, forward and backward.

    Arguments of nn.Linear, and mask: bool or SparseMask [out, in], copied; None keeps all. weight is zero where the
    mask is 0, and its gradient too. The state_dict has two keys more, mask_words and mask_check, which need not be
    there when it is loaded. Under autocast it computes in autocast's dtype. Raises ValueError or TypeError
    for a mask that does not fit.

    >>> layer = MaskedLinear(8, 4, mask=torch.rand(4, 8) < 0.1)
    >>> layer(torch.randn(2, 8)).shape
    torch.Size([2, 4])
    """

    def __init__(self, *args: Any, mask: Tensor | SparseMask | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.take(_mask_or_all(mask, self.weight))

    def forward(self, input: Tensor) -> Tensor:
        if not isinstance(input, Tensor):
            return node_of(self, input)
        stored = self._parameters.get("weight")
        weight = self.weight if stored is None else stored
        if self._by_torch(weight):
            masked = masked_weight(weight, self.mask, dense_grad=self.dense_grad)
            return F.linear(input, masked, self.bias)
        x, weight, bias = under_autocast(input, weight, self.bias)
        return ops.masked_linear(x, weight, self.mask, bias, dense_grad=self.dense_grad)


class MaskedConv2d(Masked, nn.Conv2d):
    """nn.Conv2d that computes with the kept entries of its weight only; padding with zeros. As :class:`MaskedLinear`.

    >>> layer = MaskedConv2d(3, 4, 3, padding=1, mask=torch.rand(4, 3, 3, 3) < 0.1)
    >>> layer(torch.randn(2, 3, 8, 8)).shape
    torch.Size([2, 4, 8, 8])
    """

    def __init__(self, *args: Any, mask: Tensor | SparseMask | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if (reason := why_not_maskable(self)) is not None:
            raise ValueError(f"padding_mode {reason}")
        self.take(_mask_or_all(mask, self.weight))

    def forward(self, input: Tensor) -> Tensor:
        if not isinstance(input, Tensor):
            return node_of(self, input)
        stored = self._parameters.get("weight")
        weight = self.weight if stored is None else stored
        if self._by_torch(weight):
            masked = masked_weight(weight, self.mask, dense_grad=self.dense_grad)
            product: Tensor = self._conv_forward(input, masked, self.bias)
            return product
        how = (self.stride, self.padding, self.dilation, self.groups)
        x, weight, bias = under_autocast(input, weight, self.bias)
        return ops.masked_conv2d(
            *(x, weight, self.mask, bias),
            *how,  # type: ignore[arg-type]
            dense_grad=self.dense_grad,
        )


def _mask_or_all(mask: Tensor | SparseMask | None, weight: Tensor) -> SparseMask:
    return as_mask(torch.ones_like(weight, dtype=torch.bool) if mask is None else mask)
