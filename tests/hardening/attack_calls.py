"""Random calls of the attack ops."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from arbitrary import FLOATS, Draw
from comparison import Unchanged, check_close, double
from torch import Tensor

from blokern import ops
from blokern.ops import reference

NORMS = ("linf", "l2", "l1")


def images(draw: Draw, dtype: torch.dtype) -> dict[str, Any]:
    shape = draw.shape(1, 4)
    per_sample = draw.chance(0.4)

    def size(high: float) -> Any:
        if per_sample:
            return torch.rand(shape[0], generator=draw.generator, dtype=torch.float64) * high
        return draw.one_of((0.0, draw.between(0, high)))

    grads = [dtype, *(FLOATS[2:] if dtype == torch.float32 else ())]
    clip_min = draw.between(-1, 1)
    narrowest = 0.02 if dtype in FLOATS[2:] else 0.0  # a box that has none of the type's numbers is refused
    return {
        "x_adv": draw.laid_out(draw.values(shape, dtype)),
        "x": draw.input(draw.values(shape, dtype)),
        "grad": draw.input(draw.values(shape, draw.one_of(grads))),
        "step_size": size(2.0),
        "eps": size(1.5),
        "clip_min": clip_min,
        "clip_max": clip_min + draw.between(narrowest, 2),
        "active": draw.input(draw.mask(shape[:1])) if draw.chance(0.3) else None,
    }


def poisoned(draw: Draw, case: dict[str, Any], names: list[str]) -> tuple[dict[str, Any], Tensor]:
    """The case with some samples' values replaced by special ones, and which samples were left."""
    n = case["x"].shape[0]
    bad = draw.mask((n,), 0.4)
    case = dict(case)
    for name in names:
        t = case[name].clone()
        t[bad] = draw.specials(t.shape, t.dtype)[bad]
        case[name] = draw.laid_out(t)
    return case, ~bad


def attack(
    draw: Draw, op: str, names: tuple[str, ...], written: tuple[str, ...], norm: str | None = None
) -> None:
    dtype = draw.one_of(FLOATS)
    case = images(draw, dtype) | ({} if norm is None else {"norm": norm})
    case = {name: case[name] for name in names if name in case}
    case.update(
        {name: draw.laid_out(draw.values(case["x"].shape, dtype)) for name in names if name not in case}
    )
    if op == "apgd_step_":
        case["momentum"] = 0.75
        if norm == "l1" and draw.chance(0.7):
            case["keep"] = draw.one_of((1, 2, 1000))

    def run(module: Any, arguments: dict[str, Any]) -> tuple[Tensor, ...]:
        arguments = dict(arguments)
        for name in written:  # in their layout
            arguments[name] = torch.empty_strided(
                arguments[name].shape, arguments[name].stride(), dtype=arguments[name].dtype
            ).copy_(arguments[name])
        out = getattr(module, op)(**arguments)
        return tuple(arguments[name] for name in written) or (out if isinstance(out, tuple) else (out,))

    unchanged = Unchanged(*(case[name] for name in ("x", "grad") if name in case))
    actual = run(ops, case)
    unchanged.check()
    expected = run(reference, {name: double(value) for name, value in case.items()})
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        if a.dtype == torch.bool:
            continue  # `free`, which turns where a rounding does: the properties' tests have it
        check_close(a, e, dtype, f"{op}[{i}]")
    bad_case, good = poisoned(draw, case, [name for name in ("x_adv", "z", "x", "grad") if name in case])
    for a, b in zip(actual, run(ops, bad_case), strict=True):
        check_close(b[good], a[good], dtype, f"{op} beside samples of NaN")


_SIZES = ("eps", "clip_min", "clip_max")
_BALL = (*_SIZES, "norm", "active")


def random_start(draw: Draw, norm: str) -> None:
    case = images(draw, draw.one_of(FLOATS))
    case = {name: case[name] for name in ("x", *_SIZES)} | {"norm": norm}
    case["first"] = draw.source.randrange(100)
    seed = draw.source.getrandbits(30)
    one, two = (ops.random_start(**case, generator=torch.Generator().manual_seed(seed)) for _ in range(2))
    assert torch.equal(one, two)
    dtype = one.dtype
    low, high = (torch.tensor(case[name], dtype=torch.float64).to(dtype) for name in ("clip_min", "clip_max"))
    assert ((one >= low) & (one <= high)).all()
    inside = ops.project(
        one.double(), case["x"].double(), **{k: v for k, v in case.items() if k not in ("x", "first")}
    )
    box_meets_ball = (case["x"].double() >= case["clip_min"]) & (case["x"].double() <= case["clip_max"])
    if box_meets_ball.all():
        check_close(one, inside, dtype, "random_start's ball")


#: The op's arguments, and those of them that it writes.
_OPS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "pgd_step": (("x_adv", "x", "grad", "step_size", *_BALL), ()),
    "pgd_step_": (("x_adv", "x", "grad", "step_size", *_BALL), ("x_adv",)),
    "project": (("x_adv", "x", *_BALL), ()),
    "project_": (("x_adv", "x", *_BALL), ("x_adv",)),
    "apgd_step_": (("x_adv", "x_prev", "x", "grad", "step_size", *_BALL), ("x_adv", "x_prev")),
}
CASES: dict[str, Callable[[Draw], None]] = {
    f"{op} {norm}": partial(attack, op=op, names=names, written=written, norm=norm)
    for op, (names, written) in _OPS.items()
    for norm in NORMS
}
CASES |= {f"random_start {norm}": partial(random_start, norm=norm) for norm in NORMS}
CASES["fast_bat_step"] = partial(
    attack, op="fast_bat_step", names=("z", "x", "grad", "step_size", *_SIZES), written=()
)
