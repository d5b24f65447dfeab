"""Curvature matrices over data, as operators that are never formed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import reduce
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, SupportsFloat, overload

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from blokern._names import unknown_name
from blokern.curvature.batches import Batches, BatchSize
from blokern.curvature.linearization import Linearization, LossFn, record
from blokern.curvature.op import wide
from blokern.curvature.passes import NO_BATCH, Kept, Passes
from blokern.curvature.preservation import Held, ModelState
from blokern.curvature.vectors import check_vector, flatten, unflatten

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

__all__ = ["BatchSize", "Batches", "CurvatureOperator", "GGNOperator", "HessianOperator"]


class CurvatureOperator:
    """A symmetric matrix C + damping · I in the space of parameters, C summed up over batches.

    Made as :class:`HessianOperator` or :class:`GGNOperator`.

    Args:
        model, loss_fn: as in `linearize`; loss_fn(model(x), y) is a scalar. Every batch is seen by the model as it is:
            what a pass changes in it, buffers and other attributes, is put back (not hooks, nor what lies deeper than
            a list or dict of a module), and so are torch's random numbers, which are the same in every product.
        loader: batches (x, y) that can be gone through again and again: a list or a DataLoader. x and y are tensors, or
            tensors in tuples, lists, dataclasses and mappings of any type, and are moved to the model's device.
        damping: added to the diagonal; finite, of any sign. It may be assigned to later.
        parameters: which, by name or by a function of the name, that then is true; None: all that require a gradient.
            The rest are constants, so that this is a submatrix.
        reduction: "mean" if the loss is one over a batch's samples, and then that over all samples is meant; "sum" if
            batches add up.
        batch_size: what a batch weighs in the mean, as a function of x, or of x and y: its samples, the tokens that
            are no padding, the sum of its class weights. None: the first dimension of x; where that may be something
            else, batches that differ are a ValueError (`SampleCount`).
        keep: linearise every batch once, at the first product, and keep that: a quarter less work a product, for the
            memory of all activations. RuntimeError from a product if parameters, buffers or modes change in between.
        check_deterministic: see whether two passes over the loader agree, in what they give and in the loss: two
            forward passes more, at once. Lists and tuples are taken to be what they are.
        progress: show a bar over the batches of each product.

    Vectors are dicts by parameter name; with one leading dimension more, several at once. For code that is written
    for SciPy or curvlinops, they may also be of n entries in a row, or lists of tensors: see `@`.

    Raises ValueError for wrong vectors, an empty loader, one that is used up after a pass or gives other batches in
    the next, and for parameters that are not there; TypeError for batches that are no pairs and for parameters that are
    complex. RuntimeError from a product if a parameter has been replaced, or no longer requires a gradient.
    """

    _name: str

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        loader: Batches,
        *,
        damping: float = 0.0,
        parameters: Iterable[str] | Callable[[str], bool] | None = None,
        reduction: Literal["mean", "sum"] = "mean",
        batch_size: BatchSize | None = None,
        keep: bool = False,
        check_deterministic: bool = True,
        progress: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
        if not callable(loss_fn):
            raise TypeError(
                f"loss_fn must be a function of (model output, target), got {type(loss_fn).__name__}"
            )
        if reduction not in ("mean", "sum"):
            raise unknown_name("reduction", reduction, ("mean", "sum"))
        self.damping, self.progress = damping, progress
        self._parameters = _selected(model, parameters)
        self._path = _path(model, self._parameters)
        self._passes = Passes(model, loss_fn, loader, reduction, batch_size)
        self._keep = keep
        self._kept: Kept | None = None
        if check_deterministic and not isinstance(loader, list | tuple):
            self._passes.check_deterministic(1e3 * torch.finfo(self.dtype).eps)

    @property
    def model(self) -> nn.Module:
        """The model, which products are of as it is when they are taken."""
        return self._passes.model

    @property
    def loss_fn(self) -> LossFn:
        """The loss."""
        return self._passes.loss_fn

    @property
    def loader(self) -> Batches:
        """The batches."""
        return self._passes.loader

    @property
    def reduction(self) -> str:
        """What the loss is of a batch: "mean" or "sum"."""
        return self._passes.reduction

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """The chosen parameters by name, in the model's order."""
        return MappingProxyType(self._parameters)

    @property
    def damping(self) -> float:
        """What is added to the diagonal."""
        return self._damping

    @damping.setter
    def damping(self, damping: float) -> None:
        if not isinstance(damping, SupportsFloat):
            raise TypeError(f"damping must be a number, got {type(damping).__name__}")
        if not math.isfinite(damping):
            raise ValueError(f"damping must be finite, got {damping}")
        self._damping = float(damping)

    @property
    def shape(self) -> tuple[int, int]:
        """(n, n) for n parameters."""
        n = sum(p.numel() for p in self.parameters.values())
        return n, n

    @property
    def dtype(self) -> torch.dtype:
        """Of products in a row: the parameters', or what holds them all."""
        return reduce(torch.promote_types, (p.dtype for p in self._parameters.values()))

    @property
    def device(self) -> torch.device:
        """The model's, which batches are moved to: its first parameter's."""
        return self._passes.device

    def adjoint(self) -> CurvatureOperator:
        """The operator itself, which is symmetric."""
        return self

    @overload
    def __matmul__(self, v: Mapping[str, Tensor]) -> dict[str, Tensor]: ...
    @overload
    def __matmul__(self, v: Tensor) -> Tensor: ...
    @overload
    def __matmul__(self, v: list[Tensor]) -> list[Tensor]: ...

    def __matmul__(
        self, v: Mapping[str, Tensor] | Tensor | list[Tensor]
    ) -> dict[str, Tensor] | Tensor | list[Tensor]:
        """The product with v, or with each of several, in the form of v.

        v: a dict by parameter name, of each parameter's shape, or stacks with one leading dimension more; or, as
        curvlinops has them, a tensor [n] or [n, k] of all parameters in a row, or a list of tensors like
        `parameters`, for k vectors with one *trailing* dimension more. Raises ValueError or TypeError for others.

        >>> hessian = HessianOperator(model, F.cross_entropy, [(x, y)])
        >>> product = hessian @ {name: torch.randn_like(p) for name, p in hessian.parameters.items()}
        >>> (hessian @ torch.randn(hessian.shape[0], 2)).shape
        torch.Size([18, 2])
        """
        if isinstance(v, Tensor):
            return self._of_rows(v)
        if isinstance(v, list):
            return self._of_list(v)
        return self._of_stacks(v)

    def _of_rows(self, v: Tensor) -> Tensor:
        n = self.shape[0]
        if v.dim() not in (1, 2) or len(v) != n:
            raise ValueError(f"v must have shape [{n}] or [{n}, k], got {tuple(v.shape)}")
        if v.dtype != self.dtype:
            raise TypeError(f"v must have the dtype of the parameters, {self.dtype}, got {v.dtype}")
        product = self._of_stacks(unflatten(v.T if v.dim() == 2 else v, self.parameters))
        rows = flatten(product, self.parameters).to(self.dtype)
        return rows.T if v.dim() == 2 else rows

    def _of_list(self, v: list[Tensor]) -> list[Tensor]:
        if len(v) != len(self.parameters):
            raise ValueError(f"v must have {len(self.parameters)} tensors, one a parameter, got {len(v)}")
        if strangers := {type(part).__name__ for part in v if not isinstance(part, Tensor)}:
            raise TypeError(f"v must be a list of Tensors, got one with {', '.join(sorted(strangers))}")
        stacked = {
            name: part.movedim(-1, 0) if part.dim() > p.dim() else part
            for part, (name, p) in zip(v, self.parameters.items(), strict=True)
        }
        product = self._of_stacks(stacked)
        return [
            product[name].movedim(0, -1) if part.dim() > p.dim() else product[name]
            for part, (name, p) in zip(v, self.parameters.items(), strict=True)
        ]

    @torch.no_grad()
    def _of_stacks(self, v: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self._check_parameters()
        if check_vector(v, self._parameters) == 0:
            return {name: torch.empty_like(v[name]) for name in self._parameters}
        total = _Total(self.reduction)
        if self._keep:
            self._add_kept(total, v)
        else:
            self._passes.visit(
                lambda x, y, weight: total.add(self._product(self._linearize(x, y), v), weight), self._bar
            )
        return {
            name: t.add_(v[name], alpha=self.damping).to(v[name].dtype) for name, t in total.value.items()
        }

    def _add_kept(self, total: _Total, v: Mapping[str, Tensor]) -> None:
        if self._kept is None or not self._kept.batches:
            self._kept = self._passes.linearized(self._linearize, self._bar)
        kept = self._kept
        kept.check()
        with ExitStack() as stack:
            if kept.runs_model:
                stack.enter_context(ModelState(self.model).kept())
                stack.enter_context(self._passes.random.replayed())
            for at_batch, weight in kept.batches:
                total.add(self._product(at_batch, v), weight)

    def _product(self, at_batch: Linearization, v: Mapping[str, Tensor]) -> dict[str, Tensor]:
        product: dict[str, Tensor] = getattr(at_batch, self._name)(v, retain_graph=self._keep)
        return product

    def _linearize(self, x: Any, y: Any) -> Linearization:
        return record(self.model, self.loss_fn, x, y, input_gradient=False, parameters=dict(self._parameters))

    def _check_parameters(self) -> None:
        """RuntimeError if the parameters are not what they were: products by them would be zeros."""
        for held in self._path:
            if not held.there:
                raise RuntimeError(
                    f"model: {held.name!r} has been replaced since the operator was made; make a new one"
                )
        for name, p in self._parameters.items():
            if not p.requires_grad:
                raise RuntimeError(
                    f"model: {name!r} no longer requires a gradient; make a new operator without it"
                )

    @property
    def _bar(self) -> str | None:
        return type(self).__name__ if self.progress else None

    def to_scipy(self, dtype: Any = None) -> LinearOperator:
        """The same matrix for vectors of all parameters in a row, in their order; for SciPy's solvers.

        dtype: NumPy's, of what comes out; None for the operator's own, float32 for bfloat16. Products are computed in
        the parameters' dtype.

        >>> from scipy.sparse.linalg import eigsh
        >>> values = eigsh(HessianOperator(model, F.cross_entropy, [(x, y)]).to_scipy(), k=3)[0]
        """
        from scipy.sparse.linalg import LinearOperator

        known = torch.float32 if self.dtype == torch.bfloat16 else self.dtype  # to NumPy
        given = np.dtype(str(known).removeprefix("torch.") if dtype is None else dtype)

        def multiply(columns: Any) -> Any:
            if np.iscomplexobj(columns):
                return multiply(columns.real) + 1j * multiply(columns.imag)
            product = self @ torch.as_tensor(columns, dtype=self.dtype, device=self.device)
            return product.to(known).cpu().numpy().astype(given, copy=False)

        return LinearOperator(
            self.shape, matvec=multiply, rmatvec=multiply, matmat=multiply, rmatmat=multiply, dtype=given
        )


class HessianOperator(CurvatureOperator):
    """The Hessian of the loss by the parameters; `CurvatureOperator` has the arguments.

    >>> hessian = HessianOperator(model, F.cross_entropy, loader, damping=1e-3)
    >>> product = hessian @ v
    """

    _name = "hvp"


class GGNOperator(CurvatureOperator):
    """The generalised Gauss-Newton matrix JᵀHJ; `CurvatureOperator` has the arguments.

    J is the outputs' derivative, H the loss's Hessian by the outputs: positive semi-definite where the loss is
    convex in them.

    >>> ggn = GGNOperator(model, F.cross_entropy, loader, damping=1e-3)
    >>> product = ggn @ v
    """

    _name = "ggnvp"


class _Total:
    """Products added up, or their mean by weight; at least in float32."""

    def __init__(self, reduction: str) -> None:
        self._mean, self._weight = reduction == "mean", 0.0
        self._value: dict[str, Tensor] | None = None

    def add(self, product: Mapping[str, Tensor], weight: float) -> None:
        self._weight += weight
        if self._value is None:
            # A product may be v itself, where the Hessian is the identity.
            self._value = {name: wide(t).clone() for name, t in product.items()}
            return
        for name, t in product.items():
            mean = self._value[name]
            # A running one: in half precision, sums over many samples would overflow.
            mean.lerp_(t.to(mean.dtype), weight / self._weight) if self._mean else mean.add_(t)

    @property
    def value(self) -> dict[str, Tensor]:
        if self._value is None:
            raise ValueError(NO_BATCH)
        return self._value


def _path(model: nn.Module, parameters: Iterable[str]) -> list[Held]:
    """Where the model holds the parameters, and the modules on the way to them."""
    found: dict[tuple[int, str], Held] = {}
    for name in parameters:
        *modules, leaf = name.split(".")
        module = model
        for part in modules:
            found[id(module), part] = Held(module._modules, part, module._modules[part])
            module = module._modules[part]  # type: ignore[assignment]
        found[id(module), leaf] = Held(module._parameters, leaf, module._parameters[leaf])
    return [*found.values()]


def _selected(model: nn.Module, which: Iterable[str] | Callable[[str], bool] | None) -> dict[str, Tensor]:
    if isinstance(which, str) or not (which is None or callable(which) or isinstance(which, Iterable)):
        raise TypeError(
            "parameters must be a list of names or a function of a name, got the "
            f"{type(which).__name__} {which!r}"
        )
    if lazy := [name for name, p in model.named_parameters() if is_lazy(p)]:
        raise ValueError(f"model: {', '.join(lazy)} have no values yet: run the model once first")
    trainable: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if which is None:
        chosen = trainable
    elif callable(which):
        chosen = {name: p for name, p in trainable.items() if which(name)}
    else:
        names = {*which}
        unknown = sorted(map(str, names - trainable.keys()))
        if unknown:
            raise ValueError(f"parameters: {', '.join(unknown)} are no parameters that require a gradient")
        chosen = {name: p for name, p in trainable.items() if name in names}
    if not chosen:
        raise ValueError("the model has no parameter that requires a gradient and is chosen")
    for name, p in chosen.items():
        if not p.is_floating_point():
            raise TypeError(f"parameters: {name!r} must be real, got {p.dtype}")
    return chosen
