"""Eigenvalues, traces and spectral densities of curvature operators."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor
from tqdm import tqdm

from blokern import ops
from blokern.curvature.op import wide
from blokern.curvature.space import Operator, check_operator, multiply, power_of_two
from blokern.curvature.vectors import check_vector, flatten, unflatten

__all__ = [
    "RitzValues",
    "SpectralDensity",
    "TraceEstimate",
    "hutchinson_trace",
    "lanczos",
    "spectral_density",
]


@dataclass(frozen=True)
class RitzValues:
    """What m Lanczos steps know of a spectrum, as :func:`lanczos` returns it; all [m], float64, on the CPU.

    values: ascending; those at the ends are eigenvalues first. residuals: each value is within this of an
    eigenvalue, a rounding error of the largest included. weights: of the start in each direction, summing to 1:
    Σ weights · f(values) estimates the mean of f over the spectrum, if the start was random (stochastic Lanczos
    quadrature). vectors: a stack, or None.
    """

    values: Tensor
    residuals: Tensor
    weights: Tensor
    vectors: dict[str, Tensor] | None


def lanczos(
    operator: Operator,
    steps: int = 30,
    *,
    start: Mapping[str, Tensor] | None = None,
    vectors: bool = False,
    reorthogonalize: bool = True,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> RitzValues:
    """Ritz values of a symmetric operator by at most `steps` products.

    start: the first direction, None for a random one. Without reorthogonalize the memory is that of three vectors and
    not of steps + 1, but values that have converged come again as ghosts; vectors need it. Ends early where the
    directions span an invariant subspace. Entries may be of any size; in half precision, all but the products is
    float32. ValueError for a start that is zero or not finite, fewer than one step, and an operator that is not
    symmetric; FloatingPointError if products are not finite.

    Lanczos 1950; Ubaru, Chen and Saad, "Fast Estimation of tr(f(A)) via Stochastic Lanczos Quadrature", 2017.

    >>> top = lanczos(HessianOperator(model, F.cross_entropy, loader), 20).values[-1]
    """
    _check_steps(steps)
    check_operator(operator)
    if vectors and not reorthogonalize:
        raise ValueError("vectors needs reorthogonalize")
    like = operator.parameters
    if start is None:
        q = _normal(like, generator)
    else:
        if check_vector(start, like, "start") is not None:
            raise ValueError("start must be a single vector, got a stack")
        q = flatten(start, like).detach()
        q = wide(q)
    with _bar(steps, "Lanczos", progress) as bar:
        runs = _Runs(operator, q[None], steps, reorthogonalize, bar)
    values, residuals, rotation = runs.ritz(0)
    ritz = None
    if vectors:
        assert runs.basis is not None
        ritz = unflatten(rotation.T.to(q) @ runs.basis[: len(values), 0], like)
    return RitzValues(values, residuals, rotation[0].square(), ritz)


@dataclass(frozen=True)
class SpectralDensity:
    """A spectrum's distribution as masses at values, both [m], float64, on the CPU; values ascend, masses sum to 1.

    Called, the same with each mass widened to a Gaussian of standard deviation `width`, at points of any shape.

    >>> density = spectral_density(HessianOperator(model, F.cross_entropy, loader))
    >>> points = torch.linspace(-1, 10, 500, dtype=torch.float64)
    >>> height = density(points, width=0.05)
    """

    values: Tensor
    weights: Tensor

    def __call__(self, points: Tensor, width: float) -> Tensor:
        if not width > 0:
            raise ValueError(f"width must be positive, got {width}")
        distance = (points.double().cpu()[..., None] - self.values) / width
        return torch.exp(-distance.square() / 2) @ self.weights / (width * math.sqrt(2 * math.pi))


def spectral_density(
    operator: Operator,
    steps: int = 30,
    samples: int = 8,
    *,
    at_once: int = 1,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> SpectralDensity:
    """How the eigenvalues of a symmetric operator are distributed, by stochastic Lanczos quadrature.

    The mean over `samples` random starts of what `steps` products find from each, `at_once` of them side by side, in
    the memory of three vectors each: the masses are right without reorthogonalisation, a ghost shares its value's.
    Moments of degree below 2 · steps are exact for a start, and vary between starts by 1 / √n. ValueError for
    numbers below one and an operator that is not symmetric; FloatingPointError if products are not finite.

    Lin, Saad and Yang, "Approximating Spectral Densities of Large Matrices", SIAM Review 2016; Ghorbani, Krishnan and
    Xiao, "An Investigation into Neural Net Optimization via Hessian Eigenvalue Density", ICML 2019.

    >>> density = spectral_density(HessianOperator(model, F.cross_entropy, loader), 20, 2, at_once=2)
    """
    _check_steps(steps)
    _check_samples(samples, at_once)
    check_operator(operator)
    values, weights = list[Tensor](), list[Tensor]()
    with _bar(steps * math.ceil(samples / at_once), "density", progress) as bar:
        for done in range(0, samples, at_once):
            count = min(at_once, samples - done)
            starts = torch.stack([_normal(operator.parameters, generator) for _ in range(count)])
            runs = _Runs(operator, starts, steps, False, bar)
            for run in range(count):
                found, _, rotation = runs.ritz(run)
                values.append(found)
                weights.append(rotation[0].square() / samples)
    ascending, order = torch.cat(values).sort()
    return SpectralDensity(ascending, torch.cat(weights)[order])


@dataclass(frozen=True)
class TraceEstimate:
    """The mean over samples and its standard error (NaN for one sample), as :func:`hutchinson_trace` returns it."""

    value: float
    standard_error: float


def hutchinson_trace(
    operator: Operator,
    samples: int = 16,
    *,
    at_once: int = 1,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> TraceEstimate:
    """The trace as the mean of vᵀAv over random signs v; `at_once` products at a time.

    ValueError for fewer than one sample; FloatingPointError if products are not finite. Hutchinson, "A Stochastic
    Estimator of the Trace of the Influence Matrix for Laplacian Smoothing Splines", 1990.

    >>> trace = hutchinson_trace(HessianOperator(model, F.cross_entropy, loader), 32, at_once=8)
    """
    _check_samples(samples, at_once)
    check_operator(operator)
    like = operator.parameters
    found: list[Tensor] = []
    with _bar(samples, "trace", progress) as bar:
        while len(found) < samples:
            count = min(at_once, samples - len(found))
            signs = torch.stack([_signs(like, generator) for _ in range(count)])
            products = _products(operator, signs)
            found += ops.multi_tensor_dot([signs], [products]).cpu().unbind()
            bar.update(count)
    values = torch.stack(found)
    if not values.isfinite().all():
        raise FloatingPointError("the operator's products are not finite")
    error = values.std().item() / samples**0.5 if samples > 1 else math.nan
    return TraceEstimate(values.mean().item(), error)


class _Runs:
    """Lanczos from K starts [K, n] side by side, each until its directions span an invariant subspace.

    basis: the directions, [steps, K, n], where they are kept to orthogonalise by.
    """

    def __init__(
        self, operator: Operator, starts: Tensor, steps: int, reorthogonalize: bool, bar: tqdm[None]
    ) -> None:
        count, n = starts.shape
        steps = min(steps, n)
        length = starts.double().norm(dim=1, keepdim=True)
        if not ((length > 0) & length.isfinite()).all():
            raise ValueError(f"start must have a positive norm, got {length.min().item()}")
        before, q = torch.zeros_like(starts), (starts / length).to(starts)
        self.basis = starts.new_empty(steps, count, n) if reorthogonalize else None
        # Of the tridiagonal matrices, over `self._by`; what lies beyond a run's end stays zero.
        self._diagonal = starts.new_zeros(count, steps, dtype=torch.float64)
        self._beside = torch.zeros_like(self._diagonal)
        self._steps = starts.new_zeros(count, dtype=torch.int64)
        self._eps = max(torch.finfo(p.dtype).eps for p in operator.parameters.values())
        active = torch.ones_like(self._steps, dtype=torch.bool)
        scale = beyond = torch.zeros_like(length[:, 0])
        one = torch.ones_like(scale)
        for step in range(steps):
            w = _products(operator, q)
            bar.update()
            if step == 0:
                self._by = power_of_two([w])  # float32 does not have the squares of all that it has
            w *= (1 / self._by).to(w)[:, None]
            along = ops.multi_tensor_dot([q], [w])
            # What q has of the step before is what that step had beyond, if A is symmetric.
            back = ops.multi_tensor_dot([before], [w]) if step == 1 else beyond
            if self.basis is None:
                ops.multi_tensor_axpby_([w], [q], -along, one)
                ops.multi_tensor_axpby_([w], [before], -beyond, one)
            else:
                self.basis[step] = q
                rows = self.basis[: step + 1].transpose(0, 1)
                for _ in range(2):  # twice is enough (Kahan and Parlett)
                    w = w - (rows.mT @ (rows @ w[..., None]))[..., 0]
            skew = (back - beyond).abs()
            beyond = ops.multi_tensor_dot([w], [w]).sqrt()
            scale = torch.maximum(scale, along.abs() + beyond)
            if step == 1 and (active & (skew > self._eps**0.5 * scale)).any():
                raise ValueError("operator must be symmetric: Lanczos' values would be of another matrix")
            self._diagonal[:, step], self._beside[:, step] = along, beyond
            self._steps += active
            active = active & (beyond > 10 * self._eps * scale)  # a NaN ends it too
            if not active.any():
                break
            beyond = torch.where(active, beyond, 0.0)
            before, q = q, w * torch.where(active, 1 / beyond, 0.0)[:, None].to(w)

    def ritz(self, run: int) -> tuple[Tensor, Tensor, Tensor]:
        """The values of one run, how far each may be from an eigenvalue, and the tridiagonal matrix's eigenvectors."""
        m = int(self._steps[run])
        diagonal, beside = self._diagonal[run, :m].cpu(), self._beside[run, :m].cpu()
        matrix = torch.diag(diagonal) + torch.diag(beside[:-1], 1) + torch.diag(beside[:-1], -1)
        if not matrix.isfinite().all():
            raise FloatingPointError("the operator's products are not finite")
        values, rotation = torch.linalg.eigh(matrix)
        by, rounding = self._by[run].cpu(), self._eps * values.abs().max()
        return by * values, by * (beside[-1] * rotation[-1].abs() + rounding), rotation


def _products(operator: Operator, v: Tensor) -> Tensor:
    """Of a stack [K, n] of vectors in a row, in its dtype and in memory of its own."""
    like = operator.parameters
    return flatten(multiply(operator, unflatten(v, like), len(v)), like).detach().to(v)


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")


def _check_samples(samples: int, at_once: int) -> None:
    if samples < 1 or at_once < 1:
        raise ValueError(f"samples and at_once must be at least 1, got {samples} and {at_once}")


def _bar(total: int, name: str, progress: bool) -> tqdm[None]:
    return tqdm(total=total, desc=name, disable=not progress, leave=False)


def _normal(like: Mapping[str, Tensor], generator: torch.Generator | None) -> Tensor:
    """Drawn on the CPU, so that a seed means the same on every device."""
    n, first = _size(like)
    return torch.randn(n, generator=generator, dtype=torch.float64).to(first)


def _signs(like: Mapping[str, Tensor], generator: torch.Generator | None) -> Tensor:
    n, first = _size(like)
    return 2 * torch.randint(2, (n,), generator=generator).to(first) - 1


def _size(like: Mapping[str, Tensor]) -> tuple[int, Tensor]:
    """How many entries, and a tensor of the device and dtype that they are reckoned with in."""
    first = next(iter(like.values()))
    dtype = reduce(torch.promote_types, (p.dtype for p in like.values()), torch.float32)
    return sum(p.numel() for p in like.values()), first.new_empty(0, dtype=dtype)
