"""Every public op under torch.func, forward mode and vmap, as `blokern.ops.functorch.SUPPORT` says: the oracle's value
in float64, or a ValueError with the reason. Nothing else, and never a silent zero."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap

from blokern import ops
from blokern.ops import curvature, reference
from blokern.ops.functorch import SUPPORT

REFUSAL = (
    "has no derivative|has no vmap rule|requires grad|must not require a gradient|has no derivative or vmap rule"
    "|must be the same for all that torch.vmap maps"
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1


class Case(NamedTuple):
    """call(ops or their oracles, *tensors) → a tensor; the tensors."""

    call: Callable[..., Any]
    tensors: tuple[Tensor, ...]


MASK = torch.rand(4, 5, generator=torch.Generator().manual_seed(1)) < 0.5
IMAGES = (random(3, 6), random(3, 6, seed=1), random(3, 6, seed=2) - 0.5)
ROWS = (random(3, 4), random(3, 4, seed=1), random(3, 4, seed=2), random(3, 4, seed=3))
STATISTICS = (random(4, seed=4), random(4, seed=5))
LISTS = (random(2, 6), random(2, 6, seed=1))
HALVES = random(2)


def step(name: str) -> Callable[..., Any]:
    return lambda m, a, x, g: getattr(m, name)(a.clone(), x, g, 0.1, 0.2)


WEIGHT = random(4, 5, seed=3)
PACKED = ops.pack_weight(WEIGHT, MASK)


def packed(m: Any, x: Tensor) -> Tensor:
    return ops.packed_linear(x, PACKED) if m is ops else reference.masked_linear(x, WEIGHT, MASK)


CASES: dict[str, Case] = {
    "masked_linear": Case(
        lambda m, x, w, b: m.masked_linear(x, w, MASK, b), (random(3, 5), random(4, 5), random(4))
    ),
    "masked_conv2d": Case(
        lambda m, x, w, b: m.masked_conv2d(
            x, w, MASK.view(4, 5, 1, 1).expand(4, 5, 2, 2).contiguous(), b, 1, 1
        ),
        (random(2, 5, 3, 3), random(4, 5, 2, 2), random(4)),
    ),
    "spmm": Case(lambda m, w, x: m.spmm(w, MASK, x), (random(4, 5), random(5, 3))),
    "sddmm": Case(lambda m, a, b: m.sddmm(a, b, MASK), (random(4, 3), random(5, 3))),
    "packed_linear": Case(packed, (random(3, 5),)),
    "pack_weight": Case(lambda m, w: m.pack_weight(w, MASK).values, (random(4, 5),)),
    "pgd_step": Case(step("pgd_step"), IMAGES),
    "pgd_step_": Case(step("pgd_step_"), IMAGES),
    "project": Case(lambda m, a, x: m.project(a, x, 0.2, norm="l2"), IMAGES[:2]),
    "project_": Case(lambda m, a, x: m.project_(a.clone(), x, 0.2), IMAGES[:2]),
    "apgd_step_": Case(lambda m, a, x, g: m.apgd_step_(a.clone(), x.clone(), x, g, 0.1, 0.2), IMAGES),
    "random_start": Case(lambda m, x: m.random_start(x, 0.1), IMAGES[:1]),
    "fast_bat_step": Case(lambda m, z, x, g: m.fast_bat_step(z, x, g, 0.1, 0.2)[0], IMAGES),
    "topk_mask": Case(lambda m, s: m.topk_mask(s, 0.5), (random(4, 6),)),
    "nm_mask": Case(lambda m, s: m.nm_mask(s, 1, 2), (random(4, 6),)),
    "filter_mask": Case(lambda m, s: m.filter_mask(s, 0.5), (random(4, 6),)),
    "channel_mask": Case(lambda m, s: m.channel_mask(s, 0.5), (random(4, 6),)),
    "bip_score_step_": Case(
        lambda m, s, w, g: m.bip_score_step_([s.clone()], [w], [g], [MASK], lr=0.1), (random(4, 5),) * 3
    ),
    "bip_released_step_": Case(
        lambda m, w, g: m.bip_released_step_([w.clone()], [g], lr=0.1), (random(4, 5),) * 2
    ),
    "masked_sgd_step_": Case(
        lambda m, w, g: m.masked_sgd_step_([w.clone()], [g], [MASK], lr=0.1), (random(4, 5),) * 2
    ),
    "multi_tensor_dot": Case(lambda m, a, b: m.multi_tensor_dot([a], [b]), LISTS),
    "multi_tensor_axpby_": Case(
        lambda m, y, x: m.multi_tensor_axpby_([y.clone()], [x], HALVES, HALVES), LISTS
    ),
    "cg_update_": Case(lambda m, x, p: m.cg_update_([x.clone()], [x.clone()], [p], [p], HALVES), LISTS),
    "activation_adjoint_tangent": Case(
        lambda m, *t: m.activation_adjoint_tangent("silu", *t, adjoint=True)[1], ROWS
    ),
    "softmax_cross_entropy_hvp": Case(
        lambda m, x, v: m.softmax_cross_entropy_hvp(x, v, torch.tensor([0, 1, 3]))[2], ROWS[:2]
    ),
    "batch_norm_tangent": Case(lambda m, x, v: m.batch_norm_tangent(x, v, *STATISTICS), ROWS[:2]),
    "batch_norm_adjoint": Case(lambda m, g, x: m.batch_norm_adjoint(g, x, *STATISTICS)[0], ROWS[:2]),
    "batch_norm_adjoint_tangent": Case(lambda m, *t: m.batch_norm_adjoint_tangent(*t, *STATISTICS)[1], ROWS),
    "layer_norm_tangent": Case(
        lambda m, x, v: m.layer_norm_tangent(x, v, STATISTICS[0][:3], STATISTICS[1][:3]), ROWS[:2]
    ),
    "layer_norm_adjoint_tangent": Case(
        lambda m, *t: m.layer_norm_adjoint_tangent(*t, STATISTICS[0][:3], STATISTICS[1][:3])[1], ROWS
    ),
}

every_op = pytest.mark.parametrize("name", sorted(CASES))


def test_every_op_has_an_entry_and_a_case() -> None:
    functions = {name for name in ops.__all__ if inspect.isfunction(getattr(ops, name))}
    assert set(SUPPORT) == functions
    assert set(CASES) == functions


def check(supported: bool, run: Callable[[Any], Any]) -> None:
    """run(ops) is run(the oracles), or refused."""
    if supported:
        torch.testing.assert_close(run(ops), run(reference))
    else:
        with pytest.raises(ValueError, match=REFUSAL):
            run(ops)


@every_op
def test_jvp(name: str) -> None:
    call, tensors = CASES[name]
    check(SUPPORT[name].jvp, lambda m: jvp(lambda *t: call(m, *t), tensors, tensors))


@every_op
@pytest.mark.parametrize("no_grad", [False, True])
def test_dual_tensors_of_each_argument(name: str, no_grad: bool) -> None:
    call, tensors = CASES[name]
    for i in range(len(tensors)):

        def run(m: Any, i: int = i) -> Any:
            with torch.set_grad_enabled(not no_grad), forward_ad.dual_level():
                given = list(tensors)
                given[i] = forward_ad.make_dual(given[i], given[i] + 1)
                return tuple(forward_ad.unpack_dual(call(m, *given)))

        check(SUPPORT[name].jvp, run)


@every_op
def test_vmap(name: str) -> None:
    call, tensors = CASES[name]
    stacked = tuple(torch.stack([t, t.flip(0)], dim=1) for t in tensors)
    check(SUPPORT[name].vmap, lambda m: vmap(lambda *t: call(m, *t), in_dims=1)(*stacked))


def scalar(out: Tensor) -> Tensor:
    return out.double().square().sum()


@every_op
def test_gradients_to_the_second_order(name: str) -> None:
    call, tensors = CASES[name]
    if SUPPORT[name].grad and not SUPPORT[name].jvp:  # masks: constants, as comparisons are
        x = tensors[0]
        found = grad(lambda s: (call(ops, s) * s).sum())(x)
        torch.testing.assert_close(found, call(reference, x).to(x.dtype))
        return

    def first(m: Any) -> Any:
        return grad(lambda *t: scalar(call(m, *t)), tuple(range(len(tensors))))(*tensors)

    def second(m: Any) -> Any:
        return grad(lambda *t: sum(scalar(g) for g in grad(lambda *s: scalar(call(m, *s)).square())(*t)[:1]))(
            *tensors
        )

    check(SUPPORT[name].grad, first)
    check(SUPPORT[name].grad, second)


@every_op
def test_reverse_mode(name: str) -> None:
    """By torch.autograd; what has no gradient says so at the call."""
    call, tensors = CASES[name]
    if not (SUPPORT[name].grad and SUPPORT[name].jvp):
        return

    def run(m: Any) -> Any:
        given = tuple(t.clone().requires_grad_() for t in tensors)
        return torch.autograd.grad(scalar(call(m, *given)), given)

    torch.testing.assert_close(run(ops), run(reference))


def test_the_size_of_a_step_may_not_require_grad() -> None:
    x = random(2, 3)
    for sizes in (
        (torch.full((2,), 0.1, requires_grad=True), 0.1),
        (0.1, torch.full((2,), 0.1, requires_grad=True)),
    ):
        with pytest.raises(ValueError, match=r"(step_size|eps) requires grad, and this op has no derivative"):
            ops.pgd_step(x, x, x, *sizes)


def test_activations_of_every_kind_refuse() -> None:
    for activation, parameters in curvature.ACTIVATIONS.items():
        numbers = (1.0,) * len(parameters)
        with pytest.raises(ValueError, match="x_dot has a tangent of forward mode"):
            jvp(
                lambda v, a=activation, n=numbers: ops.activation_adjoint_tangent(
                    a, ROWS[0], ROWS[0], ROWS[0], v, *n
                )[1],
                ROWS[:1],
                ROWS[:1],
            )
