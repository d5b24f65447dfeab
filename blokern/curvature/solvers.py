"""Linear systems in curvature operators."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from blokern._names import unknown_name
from blokern.curvature.linearization import LossFn
from blokern.curvature.operators import Batches, GGNOperator, HessianOperator
from blokern.curvature.vectors import check_vector, flatten, unflatten

__all__ = ["Operator", "Solution", "cg_solve", "inverse_hvp", "neumann_solve"]


class Operator(Protocol):
    """A symmetric matrix in the space of `parameters`: `HessianOperator`, `GGNOperator`, or one's own.

    `operator @ v` takes and gives dicts by parameter name, and stacks of them.
    """

    @property
    def parameters(self) -> Mapping[str, Tensor]: ...

    def __matmul__(self, v: Mapping[str, Tensor]) -> Mapping[str, Tensor]: ...


@dataclass(frozen=True)
class Solution:
    """Of A x = b for one b, or for each of a stack of K; flags and residuals are then [K], else scalar tensors.

    x: like b. residual: ‖b − A x‖ / ‖b‖, as the iteration carries it. converged: residual ≤ tol. indefinite: a
    direction p with pᵀAp ≤ 0 was met, where a system's iteration stops: A is not positive definite, and x is
    the last iterate. steps: products taken.
    """

    x: dict[str, Tensor]
    residual: Tensor
    converged: Tensor
    indefinite: Tensor
    steps: int


def cg_solve(
    operator: Operator,
    b: Mapping[str, Tensor],
    *,
    x0: Mapping[str, Tensor] | None = None,
    preconditioner: Callable[[dict[str, Tensor]], Mapping[str, Tensor]] | None = None,
    tol: float = 1e-5,
    max_steps: int = 100,
    progress: bool = False,
) -> Solution:
    """Solve A x = b for a positive definite A by conjugate gradients, for a stack of b's side by side.

    x0: where to start, None for zero. preconditioner: an approximate inverse of A, symmetric and positive definite, of
    dicts or stacks like b. A system stops where its residual is `tol` of ‖b‖, where A shows to be indefinite, or
    after max_steps. ValueError for a b or x0 that does not fit, or is not finite.

    Hestenes and Stiefel, "Methods of Conjugate Gradients for Solving Linear Systems", 1952.

    >>> ggn = GGNOperator(model, F.cross_entropy, loader, damping=1e-3)
    >>> solution = cg_solve(ggn, gradient)
    """
    space = _Space(operator, b, "b")
    rhs = space.flat(b)
    x = torch.zeros_like(rhs) if x0 is None else space.flat(x0, "x0").clone()
    r = rhs - space.multiply(x) if x0 is not None else rhs.clone()
    size = _dot(rhs, rhs).sqrt()

    def precondition(r: Tensor) -> Tensor:
        return r if preconditioner is None else space.flat(preconditioner(space.vectors(r)))

    z = precondition(r)
    p, rz = z, _dot(r, z)
    residual = _dot(r, r).sqrt()
    converged = residual <= tol * size
    indefinite = torch.zeros_like(converged)
    steps = 0 if x0 is None else 1
    for _ in tqdm(range(max_steps), desc="CG", disable=not progress, leave=False):
        active = ~(converged | indefinite)
        if not active.any():
            break
        ap = space.multiply(p)
        steps += 1
        curvature = _dot(p, ap)
        indefinite |= active & ~(curvature > 0)  # a NaN too
        active &= ~indefinite
        alpha = torch.where(active, rz / curvature, 0.0)[:, None].to(x.dtype)
        x = x + alpha * torch.where(active[:, None], p, 0.0)
        r = r - alpha * torch.where(active[:, None], ap, 0.0)
        residual = _dot(r, r).sqrt()
        converged = converged | (active & (residual <= tol * size))
        z = precondition(r)
        rz, before = _dot(r, z), rz
        p = z + torch.where(active, rz / before, 0.0)[:, None].to(x.dtype) * p
    return space.solution(x, torch.where(size > 0, residual / size, 0.0), converged, indefinite, steps)


def neumann_solve(
    operator: Operator,
    b: Mapping[str, Tensor],
    *,
    scale: float,
    tol: float = 1e-5,
    max_steps: int = 100,
    progress: bool = False,
) -> Solution:
    """Solve A x = b by the truncated series x = s Σ (I − s A)ⁱ b, i < max_steps, for a stack of b's side by side.

    scale: s, below 2 / λ for A's largest eigenvalue λ, else the series diverges, and a system stops where its residual
    is a thousand times ‖b‖. Residuals, flags (`indefinite` is not looked for) and errors as in :func:`cg_solve`.

    >>> solution = neumann_solve(GGNOperator(model, F.cross_entropy, loader, damping=0.1), gradient, scale=0.05)
    """
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
    space = _Space(operator, b, "b")
    rhs = space.flat(b)
    size = _dot(rhs, rhs).sqrt()
    x, r = torch.zeros_like(rhs), rhs.clone()  # the residual of x is the series' next term over s
    residual = size
    converged = residual <= tol * size
    steps = 0
    for _ in tqdm(range(max_steps), desc="Neumann", disable=not progress, leave=False):
        active = ~converged & (residual < 1e3 * size)
        if not active.any():
            break
        x = x + torch.where(active[:, None], scale * r, 0.0)
        r = r - torch.where(active[:, None], scale * space.multiply(r), 0.0)
        steps += 1
        residual = _dot(r, r).sqrt()
        converged = residual <= tol * size
    indefinite = torch.zeros_like(converged)
    return space.solution(x, torch.where(size > 0, residual / size, 0.0), converged, indefinite, steps)


def inverse_hvp(
    model: nn.Module,
    loss_fn: LossFn,
    loader: Batches,
    b: Mapping[str, Tensor],
    *,
    damping: float,
    curvature: Literal["hessian", "ggn"] = "hessian",
    method: Literal["cg", "neumann"] = "cg",
    **options: Any,
) -> Solution:
    """(C + damping · I)⁻¹ b for the Hessian or the Gauss-Newton matrix C of a loss over data.

    model, loss_fn, loader: as in :class:`HessianOperator`, each batch linearised once; options go to :func:`cg_solve`
    or :func:`neumann_solve`. Look at the result's flags: an indefinite C + damping · I has no such solution by CG.

    >>> solution = inverse_hvp(model, F.cross_entropy, [(x, y)], gradient, damping=1e-2, curvature="ggn")
    """
    operators = {"hessian": HessianOperator, "ggn": GGNOperator}
    solvers: dict[str, Callable[..., Solution]] = {"cg": cg_solve, "neumann": neumann_solve}
    if curvature not in operators:
        raise unknown_name("curvature", curvature, operators)
    if method not in solvers:
        raise unknown_name("method", method, solvers)
    operator = operators[curvature](model, loss_fn, loader, damping=damping, keep=True)
    return solvers[method](operator, b, **options)


class _Space:
    """Vectors as rows of one matrix [K, n], and back: what an iteration works on."""

    def __init__(self, operator: Operator, b: Mapping[str, Tensor], name: str) -> None:
        self.operator, self.like = operator, operator.parameters
        self.stack = check_vector(b, self.like, name)

    def flat(self, v: Mapping[str, Tensor], name: str = "b") -> Tensor:
        if check_vector(v, self.like, name) != self.stack:
            raise ValueError(f"{name} must be a stack like b")
        rows = flatten(v, self.like)
        if not rows.isfinite().all():
            raise ValueError(f"{name} must be finite")
        return rows if self.stack is not None else rows[None]

    def vectors(self, rows: Tensor) -> dict[str, Tensor]:
        return unflatten(rows if self.stack is not None else rows[0], self.like)

    def multiply(self, rows: Tensor) -> Tensor:
        product = flatten(self.operator @ self.vectors(rows), self.like)
        return product if self.stack is not None else product[None]

    def solution(
        self, x: Tensor, residual: Tensor, converged: Tensor, indefinite: Tensor, steps: int
    ) -> Solution:
        if self.stack is None:
            residual, converged, indefinite = residual[0], converged[0], indefinite[0]
        return Solution(self.vectors(x), residual, converged, indefinite, steps)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Row by row, in float64."""
    products: Tensor = torch.linalg.vecdot(a.double(), b.double())
    return products
