"""What must hold for every input: the projections' geometry."""

from __future__ import annotations

import hypothesis.extra.numpy as arrays
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from blokern import ops

ORDER = {"linf": float("inf"), "l2": 2.0, "l1": 1.0}

norms = st.sampled_from(list(ORDER))
rows = st.integers(1, 70).flatmap(
    lambda d: st.tuples(
        arrays.arrays("float64", (2, d), elements=st.floats(-3, 4, width=32)),
        arrays.arrays("float64", (2, d), elements=st.floats(0, 1, width=32)),
    )
)
radii = st.floats(0, 5)


def sizes(t: Tensor, norm: str) -> Tensor:
    return torch.linalg.vector_norm(t, ORDER[norm], dim=1)


@settings(max_examples=200, deadline=None)
@given(rows, radii, norms)
def test_projection_is_inside_idempotent_and_leaves_inner_points(data: tuple, eps: float, norm: str) -> None:
    x_adv, x = map(torch.from_numpy, data)
    p = ops.project(x_adv, x, eps, norm=norm)
    assert ((p >= 0) & (p <= 1)).all()
    assert (sizes(p - x, norm) <= eps * (1 + 1e-12) + 1e-13).all()
    torch.testing.assert_close(ops.project(p, x, eps, norm=norm), p, rtol=0, atol=1e-12)
    inner = (sizes(x_adv - x, norm) <= eps * (1 - 1e-12)) & ((x_adv >= 0) & (x_adv <= 1)).all(dim=1)
    torch.testing.assert_close(p[inner], x_adv[inner], rtol=0, atol=1e-14)


@settings(max_examples=200, deadline=None)
@given(rows, radii, norms)
def test_projection_is_non_expansive(data: tuple, eps: float, norm: str) -> None:
    x_adv, x = map(torch.from_numpy, data)
    center = x[:1].expand_as(x)
    p = ops.project(x_adv, center, eps, norm=norm)
    assert (p[0] - p[1]).norm() <= (x_adv[0] - x_adv[1]).norm() * (1 + 1e-12) + 1e-12


@settings(max_examples=200, deadline=None)
@given(rows, st.floats(1e-3, 5), st.integers(0, 2**31))
def test_l1_projection_is_the_nearest_point(data: tuple, eps: float, seed: int) -> None:
    """⟨u − p, q − p⟩ ≤ 0 for every q of the set: what makes p the Euclidean projection of u."""
    x_adv, x = map(torch.from_numpy, data)
    p = ops.project(x_adv, x, eps, norm="l1")
    generator = torch.Generator().manual_seed(seed)
    for _ in range(5):
        q = ops.random_start(x, eps, norm="l1", generator=generator)
        assert (((x_adv - p) * (q - p)).sum(dim=1) <= 1e-10).all()


@settings(max_examples=100, deadline=None)
@given(rows, radii, norms, st.floats(-2, 2), st.integers(0, 2**31))
def test_a_step_stays_in_the_set(data: tuple, eps: float, norm: str, step: float, seed: int) -> None:
    start, x = map(torch.from_numpy, data)
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x_adv = ops.pgd_step(start, x, grad, step, eps, norm=norm)
    assert ((x_adv >= 0) & (x_adv <= 1)).all()
    assert (sizes(x_adv - x, norm) <= eps * (1 + 1e-9) + 1e-12).all()


@settings(max_examples=100, deadline=None)
@given(rows, st.floats(0, 2), st.floats(0, 10), st.integers(0, 2**31))
def test_fast_bat_step_minimises_its_lower_level(data: tuple, eps: float, step: float, seed: int) -> None:
    """δ* minimises ⟨g, δ − z⟩ + ‖δ − z‖² / (2 step) over C: no feasible coordinate does better."""
    z, x = map(torch.from_numpy, data)
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    delta, free = ops.fast_bat_step(z, x, grad, step, eps)
    lower, upper = torch.clamp(0 - x, min=-eps), torch.clamp(1 - x, max=eps)
    assert ((delta >= lower) & (delta <= upper)).all()

    def objective(d: Tensor) -> Tensor:
        return step * grad * (d - z) + 0.5 * (d - z) ** 2

    for other in (lower, upper, torch.zeros_like(z), 0.5 * (lower + upper)):
        assert (objective(delta) <= objective(other) + 1e-12).all()
    assert torch.equal(delta[free], (z - step * grad)[free])
