"""A loss linearised at one batch, and the products read off it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Set
from copy import deepcopy
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from blokern.curvature.double_backward import DoubleBackward, outputs_of
from blokern.curvature.outputs import check_split, tensors_in
from blokern.curvature.recorder import Recorder
from blokern.curvature.sweeps import TapeProducts
from blokern.curvature.vectors import check_input_vector, check_vector
from blokern.curvature.watch import as_in_forward

__all__ = ["Linearization", "LossFn", "ggnvp", "hvp", "linearize", "mixed_hvp", "record"]

#: (model output, target) -> scalar loss.
LossFn = Callable[[Tensor, Tensor], Tensor]
Vector = Mapping[str, Tensor]


class Linearization:
    """A loss and its input gradient at one batch, kept so that products can be taken, as :func:`linearize` returns it.

    loss: scalar, detached. grad_input: ∇ₓℓ, detached, shape and dtype of x.

    Vectors v and results are dicts keyed like `model.named_parameters()`, with the parameters that required a gradient
    in `linearize`, of their shapes, dtypes and devices; u is like x. All may have one leading dimension more, for
    several vectors at once. Where the loss does not depend on a parameter, or on x, products have zeros.

    What the forward pass left in memory stays until this object goes, or `release` is called, so that products can be
    taken again and again. A last product with `retain_graph=False` frees it on its way, which takes less memory at the
    peak; a wrong call frees nothing.

    Every product raises ValueError or TypeError for a vector that does not fit, and RuntimeError if the graph was
    freed, if something that the forward pass read was changed in place since `linearize` (a parameter, labels), or if
    second derivatives go through a custom autograd.Function whose backward cannot be differentiated.
    """

    def __init__(
        self,
        products: TapeProducts | DoubleBackward,
        loss: Tensor,
        parameters: dict[str, Tensor],
        x: Tensor | None,
        opaque: Set[str] = frozenset(),
    ) -> None:
        self.loss = loss
        self._parameters = parameters
        self._x = x
        self._products: TapeProducts | DoubleBackward | None = products
        self._freed_by = ""
        # Types of objects in the model's output that were not looked into, and whether a Gauss-Newton product can be.
        self._opaque, self._is_split = opaque, False

    @cached_property
    def grad_input(self) -> Tensor:
        """∇ₓℓ, found once and then a help to every product."""
        assert self._x is not None
        grad = self._run(self._kept("grad_input").input_gradient)
        return torch.zeros_like(self._x) if grad is None else grad

    def release(self) -> None:
        """Free what the forward pass left in memory; `loss` and `grad_input` stay, later products are RuntimeErrors.

        >>> at_x = linearize(model, torch.nn.functional.cross_entropy, x, y)
        >>> at_x.release()
        """
        self._products, self._freed_by = None, "release()"

    def hvp(self, v: Vector, *, retain_graph: bool = True) -> dict[str, Tensor]:
        """∇²_θ ℓ · v. Six sweeps.

        Pearlmutter, "Fast Exact Multiplication by the Hessian", Neural Computation 1994.

        >>> at_x = linearize(model, torch.nn.functional.cross_entropy, x, y)
        >>> products = at_x.hvp({name: torch.randn_like(p) for name, p in model.named_parameters()})
        """
        return self._by_parameters("hvp", v, retain_graph)

    def ggnvp(self, v: Vector, *, retain_graph: bool = True) -> dict[str, Tensor]:
        """Jᵀ ∇²ℓ J v, the generalised Gauss-Newton product: J the derivative of model(x) by θ. Four sweeps.

        The outputs are all tensors in what the model returns: tuples, lists, mappings and dataclasses are looked into.
        ValueError if loss_fn reads parameters past them, or is linear in a scalar that the model returns: a loss of its
        own, of which this product would be zero. Schraudolph, "Fast Curvature Matrix-Vector Products for
        Second-Order Gradient Descent", Neural Computation 2002.

        >>> at_x = linearize(model, torch.nn.functional.cross_entropy, x, y)
        >>> products = at_x.ggnvp({name: torch.randn_like(p) for name, p in model.named_parameters()})
        """
        products = self._kept("ggnvp")
        if not self._is_split:
            self._run(lambda: check_split(products, self._opaque))
            self._is_split = True
        return self._by_parameters("ggnvp", v, retain_graph)

    def mixed_hvp(self, u: Tensor, *, retain_graph: bool = True) -> dict[str, Tensor]:
        """∇_θ⟨∇ₓℓ, u⟩, the adjoint of the mixed second derivative ∇²_{xθ}ℓ applied to u. Four sweeps.

        >>> at_x = linearize(model, torch.nn.functional.cross_entropy, x, y)
        >>> products = at_x.mixed_hvp(torch.ones_like(x))
        """
        assert self._x is not None
        size = check_input_vector(u, self._x)
        return self._filled(self._take("mixed_hvp", u, size, retain_graph), size)

    def mixed_hvp_transpose(self, v: Vector, *, retain_graph: bool = True) -> Tensor:
        """∇ₓ⟨∇_θℓ, v⟩, the transpose of `mixed_hvp`: ⟨mixed_hvp(u), v⟩ = ⟨u, mixed_hvp_transpose(v)⟩. Four sweeps.

        >>> at_x = linearize(model, torch.nn.functional.cross_entropy, x, y)
        >>> v = {name: torch.ones_like(p) for name, p in model.named_parameters()}
        >>> at_x.mixed_hvp_transpose(v).shape == x.shape
        True
        """
        assert self._x is not None
        size = check_vector(v, self._parameters)
        product: Tensor | None = self._take("mixed_hvp_transpose", v, size, retain_graph)
        if product is None:
            return self._x.new_zeros(self._x.shape if size is None else (size, *self._x.shape))
        return product

    def _by_parameters(self, name: str, v: Vector, retain_graph: bool) -> dict[str, Tensor]:
        size = check_vector(v, self._parameters)
        return self._filled(self._take(name, v, size, retain_graph), size)

    def _take(self, name: str, along: Any, size: int | None, retain_graph: bool) -> Any:
        products = self._kept(name)
        product = self._run(lambda: getattr(products, name)(along, retain_graph, size is not None))
        if not retain_graph:
            self._products, self._freed_by = None, f"{name}(…, retain_graph=False)"
        return product

    def _kept(self, name: str) -> TapeProducts | DoubleBackward:
        if self._products is None:
            raise RuntimeError(
                f"{name}: {self._freed_by} has freed what the forward pass left: linearize again"
            )
        return self._products

    def _run(self, sweep: Callable[[], Any]) -> Any:
        products = self._products
        if isinstance(products, TapeProducts):
            products.tape.check_unchanged()
        with torch.no_grad(), torch.autocast(self.loss.device.type, enabled=False):
            return sweep()

    def _filled(self, products: dict[str, Tensor], size: int | None) -> dict[str, Tensor]:
        """A product for every parameter, in their order."""
        return {
            name: products[name]
            if name in products
            else p.new_zeros(p.shape if size is None else (size, *p.shape))
            for name, p in self._parameters.items()
        }


def linearize(model: nn.Module, loss_fn: LossFn, x: Tensor, y: Tensor) -> Linearization:
    """ℓ = loss_fn(model(x), y) and ∇ₓℓ, ready for products. Two sweeps, no weight gradient among them.

    x: floating point, [N, ...]; y: whatever loss_fn takes; loss_fn returns a scalar. The model runs once, in
    its own mode (in train mode BatchNorm moves its running statistics) and under the caller's autocast;
    backward sweeps run outside of autocast, as torch advises. Modules under `torch.compile` run eagerly here,
    and attention in its elementary form. Do not change the parameters in place before the last product.

    The products come from the R-operator on a tape of the forward pass. Where that has no rules for something
    (an op, a custom autograd.Function, a hook on a gradient), a warning says so once and they come from
    autograd's double backward: as exact, slower.

    Raises TypeError if x is not floating point; ValueError if the loss is not a scalar; FloatingPointError if it is
    not finite, naming the module where that starts.

    >>> at_x = linearize(model, torch.nn.functional.cross_entropy, x, y)
    >>> loss, gradient, products = at_x.loss, at_x.grad_input, at_x.mixed_hvp(u)
    """
    at_x = _record_with_input(model, loss_fn, x, y)
    _ = at_x.grad_input
    return at_x


def _record_with_input(model: nn.Module, loss_fn: LossFn, x: Tensor, y: Tensor) -> Linearization:
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a Tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"x must be floating-point, got {x.dtype}")
    return record(model, loss_fn, x, y, input_gradient=True)


def hvp(model: nn.Module, loss_fn: LossFn, x: Any, y: Any, v: Vector) -> dict[str, Tensor]:
    """∇²_θ ℓ · v at one batch for one v: as `linearize(model, loss_fn, x, y).hvp(v)`, in eight sweeps and less memory.

    x: whatever the model takes, integers too.

    >>> v = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    >>> products = hvp(model, torch.nn.functional.cross_entropy, x, y, v)
    """
    return record(model, loss_fn, x, y, input_gradient=False).hvp(v, retain_graph=False)


def ggnvp(model: nn.Module, loss_fn: LossFn, x: Any, y: Any, v: Vector) -> dict[str, Tensor]:
    """Jᵀ ∇²ℓ J v at one batch for one v: as `linearize(model, loss_fn, x, y).ggnvp(v)`, in five sweeps.

    x: whatever the model takes, integers too.

    >>> v = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    >>> products = ggnvp(model, torch.nn.functional.cross_entropy, x, y, v)
    """
    return record(model, loss_fn, x, y, input_gradient=False).ggnvp(v, retain_graph=False)


def mixed_hvp(model: nn.Module, loss_fn: LossFn, x: Tensor, y: Tensor, u: Tensor) -> dict[str, Tensor]:
    """∇_θ⟨∇ₓℓ, u⟩ at one batch for one u: as `linearize(model, loss_fn, x, y).mixed_hvp(u)`. Six sweeps.

    Arguments, result and errors are those of `linearize` and `Linearization.mixed_hvp`.

    >>> products = mixed_hvp(model, torch.nn.functional.cross_entropy, x, y, u)
    >>> products["fc.weight"].shape == model.fc.weight.shape
    True
    """
    return _record_with_input(model, loss_fn, x, y).mixed_hvp(u, retain_graph=False)


def record(
    model: nn.Module,
    loss_fn: LossFn,
    x: Any,
    y: Any,
    *,
    input_gradient: bool,
    parameters: dict[str, Tensor] | None = None,
) -> Linearization:
    """`linearize`, or without input_gradient the same for products by parameters alone, and for any x.

    parameters: those that are not constants, None for all that require a gradient.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be a function of (model output, target), got {type(loss_fn).__name__}")
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "torch.inference_mode records nothing that could be differentiated: leave it first"
        )
    at = x.detach().requires_grad_() if input_gradient else x
    if parameters is None:
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    _check_parameters(parameters)
    recorder = Recorder(parameters, at if input_gradient else None)
    # What autocast keeps of an earlier pass belongs to that pass's graph.
    torch.clear_autocast_cache()
    with torch.enable_grad(), as_in_forward(recorder), recorder:
        output = model(at)
        split = recorder.mark()
        tensors, opaque = tensors_in(output)
        with torch._C.DisableTorchFunction():  # before loss_fn may change them in place
            values, outputs = [recorder.value(t) for t in tensors], outputs_of(tensors)
        loss = loss_fn(output, y)
    _check_recorded(loss, parameters)
    if not math.isfinite(loss.item()):
        raise FloatingPointError(f"the loss is {loss.item()}: {_first_non_finite(model, x)}")
    tape = recorder.finish(split, loss, values)
    products: TapeProducts | DoubleBackward
    if tape is not None:
        products = TapeProducts(tape)
    else:
        _warn_once(recorder.refusal)
        products = DoubleBackward(loss, outputs, parameters, at if input_gradient else None)
    return Linearization(products, loss.detach(), parameters, at.detach() if input_gradient else None, opaque)


def _check_parameters(parameters: Mapping[str, Tensor]) -> None:
    if names := [name for name, p in parameters.items() if is_lazy(p)]:
        raise ValueError(
            f"parameters must have shapes, got lazy {', '.join(names)}: run the model once before"
        )
    if names := [name for name, p in parameters.items() if p.is_complex()]:
        raise TypeError(
            f"parameters must be real, got complex {', '.join(names)}: keep the real and the imaginary part as two"
        )
    if names := [name for name, p in parameters.items() if p.is_inference()]:
        raise ValueError(
            f"parameters must not be made in torch.inference_mode, which autograd does not follow, got "
            f"{', '.join(names)}: clone them outside of it"
        )


def _check_recorded(loss: Any, parameters: Mapping[str, Tensor]) -> None:
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss_fn must return a scalar, got {got}")
    if not loss.is_floating_point():
        raise TypeError(f"loss_fn must return a floating-point scalar, got {loss.dtype}")
    if names := [name for name, p in parameters.items() if not p.requires_grad]:
        raise ValueError(
            f"{', '.join(names)} stopped requiring a gradient during the forward pass: freeze parameters before"
        )


_warned: set[str] = set()


def _warn_once(refusal: str | None) -> None:
    if refusal is not None and refusal not in _warned:
        _warned.add(refusal)
        warnings.warn(f"no R-operator rule for {refusal}: products by double backward", stacklevel=4)


def _first_non_finite(model: nn.Module, x: Any) -> str:
    """Where a copy of the model, run again, first gives a value that is not finite."""
    found: list[str] = []
    # Activations that modules keep would not let themselves be copied.
    kept = [t for module in model.modules() for t in tensors_in(vars(module)).tensors if not t.is_leaf]
    try:
        twin = deepcopy(model, {id(t): t.detach() for t in kept})
    except Exception as error:
        return f"where that starts is not known, as the model cannot be copied to look ({error})"

    def look(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if any(not t.isfinite().all() for t in tensors_in(output).tensors if t.is_floating_point()):
                found.append(name)

        return hook

    for name, module in twin.named_modules():
        module.register_forward_hook(look(name))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        twin(x)
    if not found:
        return "the model's output is finite, loss_fn's result is not"
    where = f"module {found[0]!r}" if found[0] else "the model itself"
    return f"the output of {where} is the first that is not finite"
