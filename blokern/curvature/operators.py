"""Curvature matrices over data, as operators that are never formed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from tqdm import tqdm

from blokern._names import unknown_name
from blokern.curvature.linearization import Linearization, LossFn, record
from blokern.curvature.vectors import check_vector, flatten, row, unflatten

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

__all__ = ["Batches", "CurvatureOperator", "GGNOperator", "HessianOperator"]

Batches = Iterable[tuple[Any, Any]]


class CurvatureOperator:
    """A symmetric matrix C + damping · I in the space of parameters, C summed up over batches.

    Made as :class:`HessianOperator` or :class:`GGNOperator`.

    Args:
        model, loss_fn: as in `linearize`; loss_fn(model(x), y) is a scalar. The model is left as it was: buffers,
            random state and mode.
        loader: batches (x, y) that can be gone through again and again: a list or a DataLoader. Tensors are moved to
            the parameters' device.
        damping: added to the diagonal.
        parameters: which, by name or by a function of the name, that then is true; None: all that require a gradient.
            The rest are constants, so that this is a submatrix.
        reduction: "mean" if the loss is one over a batch's samples, and then that over all samples is meant; "sum" if
            batches add up.
        keep: linearise every batch once, at the first product, and keep that: a quarter less work a product, for the
            memory of all activations. RuntimeError from a product if parameters change in between.
        progress: show a bar over the batches of each product.

    Vectors are dicts by parameter name; with one leading dimension more, several at once. For code that is written
    for SciPy or curvlinops, they may also be of n entries in a row, or lists of tensors: see `@`. Wrong ones, an empty
    loader and one that is used up after a pass are ValueErrors.
    """

    _name: str

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        loader: Batches,
        *,
        damping: float = 0.0,
        parameters: Collection[str] | Callable[[str], bool] | None = None,
        reduction: Literal["mean", "sum"] = "mean",
        keep: bool = False,
        progress: bool = False,
    ) -> None:
        if reduction not in ("mean", "sum"):
            raise unknown_name("reduction", reduction, ("mean", "sum"))
        if iter(loader) is loader:
            raise ValueError(
                "loader must be a list, a DataLoader or the like, got an iterator: good for one product"
            )
        self.model, self.loss_fn, self.loader = model, loss_fn, loader
        self.damping, self.reduction, self.progress = damping, reduction, progress
        self.parameters = _selected(model, parameters)
        self._kept: list[tuple[Linearization, int]] | None = [] if keep else None
        self._random_state = torch.random.get_rng_state()

    @property
    def shape(self) -> tuple[int, int]:
        """(n, n) for n parameters."""
        n = sum(p.numel() for p in self.parameters.values())
        return n, n

    @property
    def dtype(self) -> torch.dtype:
        """Of products in a row: the first parameter's."""
        return next(iter(self.parameters.values())).dtype

    @property
    def device(self) -> torch.device:
        """The parameters'."""
        return next(iter(self.parameters.values())).device

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

    def _of_stacks(self, v: Mapping[str, Tensor]) -> dict[str, Tensor]:
        check_vector(v, self.parameters)
        total: dict[str, Tensor] | None = None
        samples = 0
        for at_batch, count in self._linearizations():
            product = getattr(at_batch, self._name)(v, retain_graph=self._kept is not None)
            weight = count if self.reduction == "mean" else 1
            samples += count
            if total is None:
                total = {name: t * weight for name, t in product.items()}
            else:
                for name, t in product.items():
                    total[name].add_(t, alpha=weight)
        if total is None:
            raise ValueError("loader gave no batch")
        scale = 1.0 / samples if self.reduction == "mean" else 1.0
        return {name: t.mul_(scale).add_(v[name], alpha=self.damping) for name, t in total.items()}

    def to_scipy(self, dtype: Any = None) -> LinearOperator:
        """The same matrix for vectors of all parameters in a row, in their order; for SciPy's solvers.

        dtype: NumPy's, of what comes out; None for the operator's own, float32 for bfloat16. Products are computed in
        the parameters' dtype.

        >>> from scipy.sparse.linalg import eigsh
        >>> values = eigsh(HessianOperator(model, F.cross_entropy, [(x, y)]).to_scipy(), k=3)[0]
        """
        from scipy.sparse.linalg import LinearOperator

        like = row(self.parameters)
        known = torch.float32 if self.dtype == torch.bfloat16 else self.dtype  # to NumPy
        given = np.dtype(str(known).removeprefix("torch.") if dtype is None else dtype)

        def multiply(columns: Any) -> Any:
            product = self @ torch.as_tensor(columns).to(like)
            return product.to(known).cpu().numpy().astype(given, copy=False)

        return LinearOperator(
            self.shape, matvec=multiply, rmatvec=multiply, matmat=multiply, rmatmat=multiply, dtype=given
        )

    def _linearizations(self) -> Iterator[tuple[Linearization, int]]:
        """Every batch linearised, and how many samples it has."""
        if self._kept:
            yield from self._kept
            return
        buffers = {name: b.clone() for name, b in self.model.named_buffers()}
        with torch.random.fork_rng():
            torch.random.set_rng_state(self._random_state)
            try:
                for x, y in tqdm(
                    self.loader, desc=type(self).__name__, disable=not self.progress, leave=False
                ):
                    at_batch = self._linearize(x, y), _count(x)
                    if self._kept is not None:
                        self._kept.append(at_batch)
                    yield at_batch
            finally:
                with torch.no_grad():
                    for name, b in self.model.named_buffers():
                        b.copy_(buffers[name])

    def _linearize(self, x: Any, y: Any) -> Linearization:
        x, y = tree_map(lambda t: t.to(self.device) if isinstance(t, Tensor) else t, (x, y))
        return record(self.model, self.loss_fn, x, y, input_gradient=False, parameters=self.parameters)


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


def _selected(model: nn.Module, which: Collection[str] | Callable[[str], bool] | None) -> dict[str, Tensor]:
    trainable: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if which is None:
        chosen = trainable
    elif callable(which):
        chosen = {name: p for name, p in trainable.items() if which(name)}
    else:
        unknown = sorted(set(which) - trainable.keys())
        if unknown:
            raise ValueError(f"parameters: {', '.join(unknown)} are no parameters that require a gradient")
        chosen = {name: p for name, p in trainable.items() if name in which}
    if not chosen:
        raise ValueError("the model has no parameter that requires a gradient and is chosen")
    return chosen


def _count(x: Any) -> int:
    """A batch's samples: the first dimension of its first tensor."""
    first = next((t for t in tree_leaves(x) if isinstance(t, Tensor) and t.dim() > 0), None)
    return 1 if first is None else len(first)
