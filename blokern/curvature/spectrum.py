"""Eigenvalues and traces of curvature operators."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from blokern.curvature.solvers import Operator
from blokern.curvature.vectors import check_vector, flatten, row, unflatten

__all__ = ["RitzValues", "TraceEstimate", "hutchinson_trace", "lanczos"]


@dataclass(frozen=True)
class RitzValues:
    """What m Lanczos steps know of a spectrum; all [m], float64, on the CPU.

    values: ascending; those at the ends are eigenvalues first. residuals: each value is within this of an
    eigenvalue. weights: of the start in each direction, summing to 1: Σ weights · f(values) estimates the mean of f
    over the spectrum, if the start was random (stochastic Lanczos quadrature). vectors: a stack, or None.
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
    directions span an invariant subspace. ValueError for a zero start or fewer than one step.

    Lanczos 1950; Ubaru, Chen and Saad, "Fast Estimation of tr(f(A)) via Stochastic Lanczos Quadrature", 2017.

    >>> top = lanczos(HessianOperator(model, F.cross_entropy, loader), 20).values[-1]
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if vectors and not reorthogonalize:
        raise ValueError("vectors needs reorthogonalize")
    like = operator.parameters
    if start is None:
        q = _normal(like, generator)
    else:
        if check_vector(start, like, "start") is not None:
            raise ValueError("start must be a single vector, got a stack")
        q = flatten(start, like)
    length = q.double().norm()
    if not length > 0:
        raise ValueError(f"start must have a positive norm, got {length.item()}")
    q = q / length.to(q.dtype)
    basis, diagonal, beside = [q], list[Tensor](), list[Tensor]()
    beyond = torch.zeros((), dtype=torch.float64)
    scale = torch.zeros((), dtype=torch.float64)
    for _ in tqdm(range(min(steps, q.numel())), desc="Lanczos", disable=not progress, leave=False):
        w = flatten(operator @ unflatten(basis[-1], like), like)
        diagonal.append(_inner(basis[-1], w))
        if reorthogonalize:
            rows = torch.stack(basis)
            for _ in range(2):  # twice is enough (Kahan and Parlett)
                w = w - rows.T @ (rows @ w)
        else:
            w = w - diagonal[-1].to(w) * basis[-1]
            if len(basis) > 1:
                w = w - beside[-1].to(w) * basis[-2]
            basis = basis[-2:]
        beyond = _inner(w, w).sqrt()
        scale = max(scale, diagonal[-1].abs() + beyond)
        if beyond <= 10 * torch.finfo(w.dtype).eps * scale:
            break
        basis.append(w / beyond.to(w))
        beside.append(beyond)
    m = len(diagonal)
    matrix = torch.diag(torch.stack(diagonal))
    if m > 1:
        off = torch.stack(beside[: m - 1])
        matrix = matrix + torch.diag(off, 1) + torch.diag(off, -1)
    values, rotation = torch.linalg.eigh(matrix)
    ritz = unflatten(rotation.T.to(q) @ torch.stack(basis[:m]), like) if vectors else None
    return RitzValues(values, beyond * rotation[-1].abs(), rotation[0].square(), ritz)


@dataclass(frozen=True)
class TraceEstimate:
    """The mean over samples, and its standard error (NaN for one sample)."""

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

    ValueError for fewer than one sample. Hutchinson, "A Stochastic Estimator of the Trace of the Influence Matrix for
    Laplacian Smoothing Splines", 1990.

    >>> trace = hutchinson_trace(HessianOperator(model, F.cross_entropy, loader), 32, at_once=8)
    """
    if samples < 1 or at_once < 1:
        raise ValueError(f"samples and at_once must be at least 1, got {samples} and {at_once}")
    like = operator.parameters
    found: list[Tensor] = []
    with tqdm(total=samples, desc="trace", disable=not progress, leave=False) as bar:
        while len(found) < samples:
            count = min(at_once, samples - len(found))
            signs = torch.stack([_signs(like, generator) for _ in range(count)])
            products = flatten(operator @ unflatten(signs, like), like)
            found += torch.linalg.vecdot(signs.double(), products.double()).cpu().unbind()
            bar.update(count)
    values = torch.stack(found)
    error = values.std().item() / samples**0.5 if samples > 1 else math.nan
    return TraceEstimate(values.mean().item(), error)


def _normal(like: Mapping[str, Tensor], generator: torch.Generator | None) -> Tensor:
    """Drawn on the CPU, so that a seed means the same on every device."""
    empty = row(like)
    return torch.randn(empty.shape, generator=generator, dtype=torch.float64).to(empty)


def _signs(like: Mapping[str, Tensor], generator: torch.Generator | None) -> Tensor:
    empty = row(like)
    return 2 * torch.randint(2, empty.shape, generator=generator).to(empty) - 1


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return torch.dot(a.double(), b.double()).cpu()
