"""Linear systems in curvature operators."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from blokern import ops
from blokern._names import unknown_name
from blokern.curvature.batches import Batches, BatchSize
from blokern.curvature.linearization import LossFn
from blokern.curvature.operators import GGNOperator, HessianOperator
from blokern.curvature.space import Operator, Space, normalized, power_of_two, scaled

__all__ = ["Operator", "Solution", "cg_solve", "inverse_hvp", "neumann_solve"]


@dataclass(frozen=True)
class Solution:
    """Of A x = b for one b, or for each of a stack of K, as :func:`cg_solve` returns it.

    For a stack, flags and residuals are [K], else scalar tensors.
    x: like b. residual: ‖b − A x‖ / ‖b‖; if converged, of x itself, by a product, else as the iteration carries it.
    converged: residual ≤ tol. indefinite: a direction p with pᵀAp ≤ 0 was met, where a system's iteration stops: A is
    not positive definite, and x is the last iterate. steps: products taken, but for those that look at what converged.
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
    dicts or stacks like b, which it may write to. A system stops where its residual is `tol` of ‖b‖, where A shows to
    be indefinite, which is a warning, or after max_steps. What seems to have converged is looked at by one product
    more, and goes on where that is larger than a product's rounding errors, as long as it helps: in float32, a residual
    of 1e-5 may be out of reach from a condition of some 1000 on. Entries of b and A may be of any size. In half
    precision the iteration is in float32.

    Raises ValueError for a b or x0 that does not fit, or is not finite, and for a preconditioner that is not positive
    definite; FloatingPointError if products or x are not finite.

    Hestenes and Stiefel, "Methods of Conjugate Gradients for Solving Linear Systems", 1952; van der Vorst and Ye,
    "Residual Replacement Strategies for Krylov Subspace Iterative Methods", 2000.

    >>> ggn = GGNOperator(model, F.cross_entropy, loader, damping=1e-2)
    >>> solution = cg_solve(ggn, gradient)
    >>> bool(solution.converged), bool(solution.indefinite)
    (True, False)
    """
    space, budget = Space(operator, b), _Budget(tol, max_steps, "CG", progress)

    solution = _solve(
        space, b, x0, budget, lambda start: _conjugate_gradients(space, start, budget, preconditioner)
    )
    if solution.indefinite.any():
        warnings.warn(
            "cg_solve: operator is not positive definite, and x no solution where `indefinite` is true: add damping",
            stacklevel=2,
        )
    return solution


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

    scale: s, below 2 / λ for A's largest eigenvalue λ, else the series diverges: a system stops where its residual is a
    thousand times ‖b‖, with a warning. Residuals, flags (`indefinite` is not looked for), what happens at convergence
    and errors as in :func:`cg_solve`.

    >>> solution = neumann_solve(GGNOperator(model, F.cross_entropy, loader, damping=0.1), gradient, scale=0.05)
    """
    if not 0 < scale < math.inf:
        raise ValueError(f"scale must be positive, got {scale}")
    space, budget = Space(operator, b), _Budget(tol, max_steps, "Neumann", progress)
    solution = _solve(space, b, None, budget, lambda start: _neumann_series(space, start, budget, scale))
    diverged = solution.indefinite
    if diverged.any():
        warnings.warn(
            f"neumann_solve: the series diverges at scale={scale}, and x is no solution where it does: scale must be "
            "below 2 / the largest eigenvalue",
            stacklevel=2,
        )
    return replace(solution, indefinite=torch.zeros_like(diverged))


def inverse_hvp(
    model: nn.Module,
    loss_fn: LossFn,
    loader: Batches,
    b: Mapping[str, Tensor],
    *,
    damping: float,
    curvature: Literal["hessian", "ggn"] = "hessian",
    method: Literal["cg", "neumann"] = "cg",
    parameters: Iterable[str] | Callable[[str], bool] | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    batch_size: BatchSize | None = None,
    check_deterministic: bool = True,
    **options: Any,
) -> Solution:
    """(C + damping · I)⁻¹ b for the Hessian or the Gauss-Newton matrix C of a loss over data.

    model, loss_fn, loader, parameters, reduction, batch_size, check_deterministic: as in :class:`HessianOperator`, each
    batch linearised once; options go to :func:`cg_solve` or :func:`neumann_solve`. Look at the result's flags: an
    indefinite C + damping · I has no such solution by CG. Raises ValueError for another curvature or method, and as
    they do.

    >>> solution = inverse_hvp(model, F.cross_entropy, [(x, y)], gradient, damping=1e-2, curvature="ggn")
    """
    operators = {"hessian": HessianOperator, "ggn": GGNOperator}
    solvers: dict[str, Callable[..., Solution]] = {"cg": cg_solve, "neumann": neumann_solve}
    if curvature not in operators:
        raise unknown_name("curvature", curvature, operators)
    if method not in solvers:
        raise unknown_name("method", method, solvers)
    operator = operators[curvature](
        model,
        loss_fn,
        loader,
        damping=damping,
        parameters=parameters,
        reduction=reduction,
        batch_size=batch_size,
        keep=True,
        check_deterministic=check_deterministic,
    )
    return solvers[method](operator, b, **options)


class _Start(NamedTuple):
    """Where a cycle of an iteration starts: at x = 0, for the columns that are still wanted.

    r: each over a power of two, the cycle's to write to. length, goal: what its norm is, and should be.
    """

    r: list[Tensor]
    length: Tensor
    goal: Tensor
    wanted: Tensor


class _End(NamedTuple):
    """Where it ends. length: of the r that it carried; reached: whether that is the goal; failed: it cannot be.
    largest: an estimate of A's largest eigenvalue."""

    x: list[Tensor]
    length: Tensor
    reached: Tensor
    failed: Tensor
    largest: Tensor


class _Budget:
    """How many steps an iteration has left, and the bar that shows them."""

    def __init__(self, tol: float, max_steps: int, name: str, progress: bool) -> None:
        if not 0 <= tol < math.inf:
            raise ValueError(f"tol must be at least 0, got {tol}")
        if max_steps < 0:
            raise ValueError(f"max_steps must be at least 0, got {max_steps}")
        self.tol, self.left, self.taken = tol, max_steps, 0
        self._bar = tqdm(total=max_steps, desc=name, disable=not progress, leave=False)

    def steps(self, going: Tensor) -> Iterator[None]:
        """Steps, while one is left and a column is going: one read from the device each."""
        while self.left > 0 and going.any():
            self.left -= 1
            self.taken += 1
            self._bar.update()
            yield

    def close(self) -> None:
        self._bar.close()


def _solve(
    space: Space,
    b: Mapping[str, Tensor],
    x0: Mapping[str, Tensor] | None,
    budget: _Budget,
    cycle: Callable[[_Start], _End],
) -> Solution:
    """x by cycles of an iteration, of which the residual of what it gave is the next one's right-hand side.

    The residual that an iteration carries is that of its x in exact arithmetic only. `indefinite` is whatever failed.
    """
    right = space.finite(b, "b")
    r, by, size = normalized(right)
    x, residual = [torch.zeros_like(t) for t in right], size
    if x0 is not None:
        x = scaled(space.finite(x0, "x0"), (size > 0).double())  # for b = 0, x = 0
        r, by, residual = normalized(_residual(space, right, x))
        budget.taken += 1
    failed, best = torch.zeros_like(size, dtype=torch.bool), torch.full_like(size, math.inf)
    rounding = torch.zeros_like(size)
    while True:
        converged = residual <= budget.tol * size
        wanted = ~(converged | failed) & (residual < best / 2) & (residual > rounding)
        if budget.left == 0 or not wanted.any():
            break
        best = torch.where(wanted, residual, best)
        end = cycle(_Start(r, residual / by, budget.tol * size / by, wanted))
        for t, step in zip(x, scaled(end.x, by), strict=True):
            t.add_(step)
        if not all(t.isfinite().all() for t in x):
            raise FloatingPointError("x is not finite: it is too large for its dtype")
        failed |= end.failed
        residual = torch.where(wanted, end.length * by, residual)
        if not end.reached.any():
            break
        r, by, residual = normalized(_residual(space, right, x))
        rounding = space.eps * end.largest * normalized(x)[2]
    budget.close()
    flags = torch.where(size > 0, residual / size, 0.0), converged, failed
    if space.stack is None:
        flags = (flags[0][0], flags[1][0], flags[2][0])
    return Solution(space.vectors(x), *flags, budget.taken)


def _residual(space: Space, b: list[Tensor], x: list[Tensor]) -> list[Tensor]:
    """b − A x of the x that is given away."""
    r = space.residual(b, space.rounded(x))
    if not all(t.isfinite().all() for t in r):
        raise FloatingPointError("operator @ v must be finite")
    return r


def _conjugate_gradients(
    space: Space,
    start: _Start,
    budget: _Budget,
    preconditioner: Callable[[dict[str, Tensor]], Mapping[str, Tensor]] | None,
) -> _End:
    r, length = start.r, start.length
    # Beyond, a carried residual says nothing; and where it grows so much, A is singular to rounding.
    goal, most = torch.maximum(start.goal, space.eps * length), length / space.eps
    x, one = [torch.zeros_like(t) for t in r], torch.ones_like(length)
    going = start.wanted.clone()
    reached, indefinite, broken, unfit = (torch.zeros_like(going) for _ in range(4))
    largest = torch.zeros_like(length)
    by: Tensor | None = None

    def precondition(r: list[Tensor]) -> list[Tensor]:
        nonlocal by
        if preconditioner is None:
            return r
        given = space.vectors([t.clone() for t in r])
        z = space.listed(preconditioner(given), "preconditioner(b)")
        by = power_of_two(z) if by is None else by  # CG does not ask for its size
        return scaled(z, 1 / by)

    z = precondition(r)
    p = [t.clone() for t in z]
    rz = length.square() if z is r else ops.multi_tensor_dot(r, z)
    unfit |= going & ~((rz > 0) & rz.isfinite())
    going &= ~unfit
    for _ in budget.steps(going):
        ap = space.multiply(p)
        curvature = ops.multi_tensor_dot(p, ap)
        broken |= going & ~curvature.isfinite()
        indefinite |= going & (curvature <= 0)
        going &= ~(broken | indefinite)
        of = rz if z is r else ops.multi_tensor_dot(p, p)  # of p = r + …, by rᵀr, 1 / α is no larger than A
        largest = torch.where(going, torch.maximum(largest, curvature / of), largest)
        squares = ops.cg_update_(x, r, p, ap, torch.where(going, rz / curvature, 0.0))
        length = squares.sqrt()
        indefinite |= going & ~(length <= most)
        reached |= going & (length <= goal)
        z = precondition(r)
        rz, before = squares if z is r else ops.multi_tensor_dot(r, z), rz
        ops.multi_tensor_axpby_(p, z, one, torch.where(going, rz / before, 0.0))
        going &= ~(reached | indefinite)
        unfit |= going & ~((rz > 0) & rz.isfinite())
        going &= ~unfit
    if broken.any():
        raise FloatingPointError("operator @ v must be finite, and vᵀAv within the range of its dtype")
    if preconditioner is not None and unfit.any():
        raise ValueError("preconditioner must be positive definite: rᵀ preconditioner(r) is not positive")
    return _End(x, length, reached, indefinite, largest)


def _neumann_series(space: Space, start: _Start, budget: _Budget, scale: float) -> _End:
    r, length = start.r, start.length
    goal, most = torch.maximum(start.goal, space.eps * length), 1e3 * length
    x, image = [torch.zeros_like(t) for t in r], r
    going = start.wanted.clone()
    reached, diverged = torch.zeros_like(going), torch.zeros_like(going)
    for _ in budget.steps(going):
        # The residual of x is the series' next term over s. r is written to: an operator may have given that back.
        image = [_apart(t, from_) for t, from_ in zip(space.multiply(r), r, strict=True)]
        length = ops.cg_update_(x, r, r, image, scale * going.double()).sqrt()
        reached |= going & (length <= goal)
        diverged |= going & ~(length < most)
        going &= ~(reached | diverged)
    if not length.isfinite().all() and not all(t.isfinite().all() for t in image):
        raise FloatingPointError("operator @ v must be finite")
    return _End(x, length, reached, diverged, torch.full_like(length, 1 / scale))


def _apart(t: Tensor, from_: Tensor) -> Tensor:
    same = t.untyped_storage()._cdata == from_.untyped_storage()._cdata
    return t.clone() if same else t
