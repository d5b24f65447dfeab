"""Linear systems in curvature operators."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from blokern import ops
from blokern._names import unknown_name
from blokern.curvature.linearization import LossFn
from blokern.curvature.operators import Batches, GGNOperator, HessianOperator
from blokern.curvature.vectors import check_vector

__all__ = ["Operator", "Solution", "cg_solve", "inverse_hvp", "neumann_solve"]


class Operator(Protocol):
    """A symmetric matrix in the space of `parameters`: `HessianOperator`, `GGNOperator`, or one's own.

    `operator @ v` takes and gives dicts by parameter name, and stacks of them.

    >>> class Twice:
    ...     parameters = {"p": torch.zeros(2)}
    ...     def __matmul__(self, v):
    ...         return {"p": 2 * v["p"]}
    >>> cg_solve(Twice(), {"p": torch.ones(2)}).x
    {'p': tensor([0.5000, 0.5000])}
    """

    @property
    def parameters(self) -> Mapping[str, Tensor]: ...

    def __matmul__(self, v: Mapping[str, Tensor]) -> Mapping[str, Tensor]: ...


@dataclass(frozen=True)
class Solution:
    """Of A x = b for one b, or for each of a stack of K, as :func:`cg_solve` returns it.

    For a stack, flags and residuals are [K], else scalar tensors.
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
    >>> bool(solution.converged), bool(solution.indefinite)
    (True, False)
    """
    space = _Space(operator, b)
    r = [t.clone() for t in space.stacks(b, "b")]
    size = ops.multi_tensor_dot(r, r).sqrt()
    one = torch.ones_like(size)
    if x0 is None:
        x = [torch.zeros_like(t) for t in r]
    else:
        x = [t.clone() for t in space.stacks(x0, "x0")]
        ops.multi_tensor_axpby_(r, space.multiply(x), -one, one)

    def precondition(r: list[Tensor]) -> list[Tensor]:
        if preconditioner is None:
            return r
        return space.listed(preconditioner(space.vectors(r)), "preconditioner(b)")

    z = precondition(r)
    p, rz = [t.clone() for t in z], ops.multi_tensor_dot(r, z)
    residual = ops.multi_tensor_dot(r, r).sqrt()
    converged = residual <= tol * size
    indefinite = torch.zeros_like(converged)
    steps = 0 if x0 is None else 1
    for _ in tqdm(range(max_steps), desc="CG", disable=not progress, leave=False):
        active = ~(converged | indefinite)
        if not active.any():
            break
        ap = space.multiply(p)
        steps += 1
        curvature = ops.multi_tensor_dot(p, ap)
        indefinite |= active & ~(curvature > 0)  # a NaN too
        active &= ~indefinite
        squares = ops.cg_update_(x, r, p, ap, torch.where(active, rz / curvature, 0.0))
        residual = squares.sqrt()
        converged |= active & (residual <= tol * size)
        z = precondition(r)
        rz, before = squares if z is r else ops.multi_tensor_dot(r, z), rz
        ops.multi_tensor_axpby_(p, z, one, torch.where(active, rz / before, 0.0))
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
    space = _Space(operator, b)
    r = [t.clone() for t in space.stacks(b, "b")]
    x = [torch.zeros_like(t) for t in r]
    residual = size = ops.multi_tensor_dot(r, r).sqrt()
    converged = residual <= tol * size
    steps = 0
    for _ in tqdm(range(max_steps), desc="Neumann", disable=not progress, leave=False):
        active = ~converged & (residual < 1e3 * size)
        if not active.any():
            break
        # The residual of x is the series' next term over s.
        residual = ops.cg_update_(x, r, r, space.multiply(r), scale * active.double()).sqrt()
        steps += 1
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
    Raises ValueError for another curvature or method, and as they do.

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
    """Vectors as lists of stacks, one tensor a parameter and one row a system, and back: what an iteration works on."""

    def __init__(self, operator: Operator, b: Mapping[str, Tensor]) -> None:
        self.operator, self.like = operator, operator.parameters
        self.stack = check_vector(b, self.like, "b")

    def stacks(self, v: Mapping[str, Tensor], name: str) -> list[Tensor]:
        stacks = self.listed(v, name)
        if not all(t.isfinite().all() for t in stacks):
            raise ValueError(f"{name} must be finite")
        return stacks

    def listed(self, v: Mapping[str, Tensor], name: str) -> list[Tensor]:
        if check_vector(v, self.like, name) != self.stack:
            raise ValueError(f"{name} must be a stack like b")
        return [v[key].detach()[None] if self.stack is None else v[key].detach() for key in self.like]

    def vectors(self, stacks: list[Tensor]) -> dict[str, Tensor]:
        single = self.stack is None
        return {name: t[0] if single else t for name, t in zip(self.like, stacks, strict=True)}

    def multiply(self, stacks: list[Tensor]) -> list[Tensor]:
        return self.listed(self.operator @ self.vectors(stacks), "operator @ b")

    def solution(
        self, x: list[Tensor], residual: Tensor, converged: Tensor, indefinite: Tensor, steps: int
    ) -> Solution:
        if self.stack is None:
            residual, converged, indefinite = residual[0], converged[0], indefinite[0]
        return Solution(self.vectors(x), residual, converged, indefinite, steps)
