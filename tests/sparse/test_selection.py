"""topk_mask, nm_mask, filter_mask, channel_mask: against a stable sort, and what they promise to torch and callers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from instruction_sets import check_everywhere
from threads import check_threads
from torch import Tensor
from torch.library import opcheck

from blokern import ops
from blokern.ops import reference

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
DENSITIES = (1e-9, 0.1, 0.5, 0.9, 1.0)
LARGE = 40_001  # more than a part of one thread, and no multiple of a block


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def special(dtype: torch.dtype) -> Tensor:
    """Both zeros, infinities, the smallest and largest numbers, denormals and their neighbours, each a few times."""
    info = torch.finfo(dtype)
    denormal = info.smallest_normal * info.eps  # the smallest of all
    positive = [0.0, denormal, 2 * denormal, info.smallest_normal - denormal, info.smallest_normal]
    positive += [1.0, 1.0 + info.eps, info.max, math.inf]
    values = torch.tensor([*positive, *(-v for v in positive)], dtype=torch.float64).to(dtype).repeat(5)
    return values[torch.randperm(len(values), generator=torch.Generator().manual_seed(0))]


SCORES: dict[str, Callable[[torch.dtype], Tensor]] = {
    "none": lambda dtype: draw(0, 3, dtype=dtype),
    "one": lambda dtype: draw(1, dtype=dtype),
    "a scalar": lambda dtype: draw(dtype=dtype),
    "odd": lambda dtype: draw(3, 17, 5, dtype=dtype),
    "large": lambda dtype: draw(LARGE, dtype=dtype),
    "magnitudes": lambda dtype: draw(300, 70, dtype=dtype).abs(),
    "all equal": lambda dtype: torch.ones(LARGE, dtype=dtype),
    "few values": lambda dtype: draw(LARGE).mul(2).round().to(dtype),
    "zeros of both signs": lambda dtype: torch.where(draw(LARGE) > 0, 0.0, -0.0).to(dtype),
    "special": special,
    "of all exponents": lambda dtype: draw(LARGE, dtype=torch.float64).mul(40).exp2().to(dtype),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", SCORES.values(), ids=SCORES)
@pytest.mark.parametrize("density", DENSITIES)
def test_topk_keeps_what_a_stable_sort_puts_first(
    make: Callable[[torch.dtype], Tensor], density: float, dtype: torch.dtype
) -> None:
    scores = make(dtype)
    before = scores.clone()
    mask = ops.topk_mask(scores, density)
    assert mask.dtype == torch.bool
    assert mask.is_contiguous()
    assert torch.equal(mask, reference.topk_mask(scores, density))
    assert torch.equal(scores, before)


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("dtypes", [DTYPES, DTYPES[1:]], ids=["with float64", "without"])
def test_mixed_dtypes_compare_exactly(dtypes: tuple[torch.dtype, ...], scope: Any) -> None:
    scores = [make(dtype) for dtype in dtypes for make in (special, SCORES["few values"], SCORES["odd"])]
    # Values of which float32 sees no difference.
    scores.append(1 + torch.arange(-50, 50, dtype=dtypes[0]) * torch.finfo(dtypes[0]).eps)
    for density in DENSITIES:
        masks = ops.topk_mask(tuple(scores), density, scope=scope)
        assert isinstance(masks, list)
        assert all(map(torch.equal, masks, reference.topk_mask(scores, density, scope=scope)))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels last": lambda t: t.to(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "every second": lambda t: torch.stack([t, -t], dim=-1)[..., 0],
    "expanded": lambda t: t[:1].expand_as(t),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_ties_follow_logical_order_whatever_the_strides(layout: Callable[[Tensor], Tensor]) -> None:
    scores = layout(draw(8, 12, 5, 5).round())
    plain = scores.contiguous()
    calls: list[Callable[[Tensor], Tensor]] = [
        lambda t: ops.topk_mask(t, 0.3),
        lambda t: ops.topk_mask([t, t], 0.3)[0],
        lambda t: ops.nm_mask(t, 1, 4, dim=1),
        lambda t: ops.filter_mask(t, 0.4),
        lambda t: ops.channel_mask(t, 0.4),
    ]
    for call in calls:
        assert torch.equal(call(scores), call(plain))
        assert call(scores).is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 2), (2, 4), (4, 4), (1, 8), (5, 12), (40, 96)])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_nm_keeps_the_largest_of_each_group(n: int, m: int, dim: int, dtype: torch.dtype) -> None:
    shape = [7, 3, 5]
    shape[dim] = 2 * m
    for scores in (
        draw(*shape, dtype=dtype),
        draw(*shape, dtype=dtype).round(),
        torch.ones(shape, dtype=dtype),
    ):
        mask = ops.nm_mask(scores, n, m, dim)
        assert mask.is_contiguous()
        assert torch.equal(mask, reference.nm_mask(scores, n, m, dim))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nm_ranks_special_values(dtype: torch.dtype) -> None:
    values = special(dtype)
    assert len(values) % 6 == 0
    for n in range(1, 6):
        assert torch.equal(ops.nm_mask(values, n, 6), reference.nm_mask(values, n, 6))


def test_nm_of_nothing_and_of_a_single_group() -> None:
    assert ops.nm_mask(torch.empty(3, 0), 2, 4).shape == (3, 0)
    assert ops.nm_mask(torch.empty(0, 4), 2, 4).shape == (0, 4)
    assert ops.nm_mask(torch.tensor([1.0, 3.0, 2.0]), 1, 3).tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7, 5), (16, 9, 3, 3), (1, 4), (4, 1), (0, 3), (3, 0), (5, 4, 2)])
@pytest.mark.parametrize("density", [0.01, 0.3, 0.5, 1.0])
def test_groups_by_their_norm(shape: tuple[int, ...], density: float, dtype: torch.dtype) -> None:
    scores = draw(*shape, dtype=dtype)
    for dim, op in enumerate(("filter_mask", "channel_mask")):
        mask = getattr(ops, op)(scores, density)
        assert mask.shape == scores.shape
        assert mask.is_contiguous()
        assert torch.equal(mask, getattr(reference, op)(scores, density))
        if scores.numel():
            kept = mask.transpose(0, dim).flatten(1)
            assert int(kept[:, 0].sum()) == round(density * shape[dim])
            assert torch.equal(kept, kept[:, :1].expand_as(kept))


def test_equal_groups_tie_to_the_lower_index() -> None:
    filters = draw(1, 37).expand(50, 37)
    assert ops.filter_mask(filters, 0.5)[:, 0].tolist() == [True] * 25 + [False] * 25
    assert ops.channel_mask(filters.t(), 0.5)[0].tolist() == [True] * 25 + [False] * 25
    # In float32 the sum of squares would lose the small entries.
    near = torch.full((2, 100), 1e-5)
    near[:, 0] = 1.0
    near[1, 1] = 2e-5
    assert ops.filter_mask(near, 0.5)[:, 0].tolist() == [False, True]


def test_same_bits_for_any_number_of_threads() -> None:
    sizes = (3, 70_000, 1, 50_000, 0, 30_000)
    lists = [
        [draw(n, seed=i).round() for i, n in enumerate(sizes)],
        [draw(n, seed=i, dtype=DTYPES[i % 4]) for i, n in enumerate(sizes)],
        [torch.zeros(n) for n in sizes],
    ]

    def run() -> Iterator[Tensor]:
        for scores in lists:
            for scope in ("global", "layer"):
                yield from ops.topk_mask(scores, 0.4, scope=scope)
        yield ops.nm_mask(lists[0][1], 2, 4)
        yield ops.filter_mask(lists[0][1].view(700, 100), 0.3)

    check_threads(run)


def test_denormals_rank_in_every_mode_of_the_processor() -> None:
    calls: list[Callable[[Tensor], Tensor]] = [
        lambda t: ops.topk_mask(t, 0.5),
        lambda t: ops.topk_mask([t, torch.zeros(1, dtype=torch.float64)], 0.5)[0],
        lambda t: ops.nm_mask(t, 2, 6),
    ]
    cases = [(call, special(dtype)) for call in calls for dtype in DTYPES]
    want = [call(scores) for call, scores in cases]
    try:
        if not torch.set_flush_denormal(True):
            pytest.skip("this processor has no such mode")
        got = [call(scores) for call, scores in cases]
    finally:
        torch.set_flush_denormal(False)
    assert all(map(torch.equal, got, want))


EVERYWHERE = """
import test_selection as t
for dtype in t.DTYPES:
    for make in t.SCORES.values():
        for density in t.DENSITIES:
            t.test_topk_keeps_what_a_stable_sort_puts_first(make, density, dtype)
    t.test_nm_ranks_special_values(dtype)
    for n, m in ((2, 4), (5, 12)):
        t.test_nm_keeps_the_largest_of_each_group(n, m, 1, dtype)
t.test_mixed_dtypes_compare_exactly(t.DTYPES, "global")
t.test_denormals_rank_in_every_mode_of_the_processor()
"""


def test_every_instruction_set() -> None:
    check_everywhere(EVERYWHERE, Path(__file__).parent)


def test_opcheck() -> None:
    blokern = torch.ops.blokern
    scores = [
        draw(3, 4),
        draw(5, dtype=torch.float64),
        draw(2, 3, 4, 4).to(memory_format=torch.channels_last),
    ]
    for per_layer in (False, True):
        opcheck(blokern.topk_mask.default, (scores, 0.5, per_layer))
    opcheck(blokern.topk_mask.default, ([draw(6).requires_grad_()], 0.5, False))
    opcheck(blokern.nm_mask.default, (scores[2], 2, 4, 2))
    opcheck(blokern.nm_mask.default, (draw(8).requires_grad_(), 2, 4, -1))


def test_compiles_in_one_graph_to_the_same_bits() -> None:
    torch._dynamo.reset()

    def selections(first: Tensor, second: Tensor) -> list[Tensor]:
        scores = [first.abs(), second.abs()]
        masks = ops.topk_mask(scores, 0.3) + ops.topk_mask(scores, 0.3, scope="layer")
        masks += [ops.topk_mask(first, 0.3), ops.nm_mask(first.abs(), 2, 4, dim=1)]
        return [*masks, ops.filter_mask(second, 0.5), ops.channel_mask(second, 0.5)]

    tensors = draw(6, 8), draw(10, 4, 3, 3)
    compiled = torch.compile(selections, fullgraph=True)
    assert all(map(torch.equal, compiled(*tensors), selections(*tensors)))
    tensors[0][0, 0] = math.nan
    with pytest.raises(ValueError, match=r"scores\[0\] must have no NaN, got 1 in 48 values"):
        compiled(*tensors)


def test_scores_that_require_grad_give_plain_masks() -> None:
    scores = draw(8, 4).requires_grad_()
    for mask in (
        ops.topk_mask(scores, 0.5),
        *ops.topk_mask([scores], 0.5),
        ops.nm_mask(scores, 2, 4),
        ops.filter_mask(scores, 0.5),
        ops.channel_mask(scores, 0.5),
    ):
        assert not mask.requires_grad
        (grad,) = torch.autograd.grad((scores * mask).sum(), scores)
        assert torch.equal(grad, mask.float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nan", [math.nan, -math.nan])
def test_nan_is_refused(nan: float, dtype: torch.dtype) -> None:
    clean, spoilt = draw(LARGE, dtype=dtype), special(dtype)
    spoilt[[3, -1]] = nan
    for density in DENSITIES:
        with pytest.raises(ValueError, match="scores must have no NaN, got 2 in 90 values"):
            ops.topk_mask(spoilt, density)
        for scope in ("global", "layer"):
            with pytest.raises(ValueError, match=r"scores\[1\] must have no NaN, got 2 in 90 values"):
                ops.topk_mask([clean, spoilt, clean], density, scope=scope)
            with pytest.raises(ValueError, match=r"scores\[1\] must have no NaN"):
                ops.topk_mask([clean.double(), spoilt], density, scope=scope)
    with pytest.raises(ValueError, match="scores must have no NaN, got 2 in 90 values"):
        ops.nm_mask(spoilt, 2, 6)
    for op in (ops.filter_mask, ops.channel_mask):
        with pytest.raises(ValueError, match="scores must have no NaN, got 2 in "):
            op(spoilt.view(9, 10), 0.5)


def test_every_nan_is_seen() -> None:
    """Those of the least payload, whose bits are next to infinity's, too."""
    for dtype, bits in (
        (torch.float32, torch.int32),
        (torch.float64, torch.int64),
        (torch.float16, torch.int16),
    ):
        for sign in (1.0, -1.0):
            infinity = torch.full((1,), sign * math.inf, dtype=dtype)
            assert ops.topk_mask(infinity, 1.0).all()
            nan = (infinity.view(bits) + 1).view(dtype)
            assert nan.isnan().all()
            for call in (lambda t: ops.topk_mask(t, 1.0), lambda t: ops.nm_mask(t, 1, 1)):
                with pytest.raises(ValueError, match="must have no NaN, got 1 in 1 values"):
                    call(nan)


WRONG: list[tuple[type[Exception], str, Callable[[Tensor], object]]] = [
    (TypeError, "scores must be a Tensor or a list of Tensors, got float", lambda s: ops.topk_mask(0.5, 0.5)),
    (TypeError, r"scores\[1\] must be a Tensor, got float", lambda s: ops.topk_mask([s, 0.5], 0.5)),
    (TypeError, "scores must be float64, .* got Long", lambda s: ops.topk_mask(s.long(), 0.5)),
    (TypeError, r"scores\[1\] must be float64, .* got Bool", lambda s: ops.topk_mask([s, s > 0], 0.5)),
    (ValueError, "at least one tensor, got an empty list", lambda s: ops.topk_mask([], 0.5)),
    (TypeError, "density must be a float, got str", lambda s: ops.topk_mask(s, "0.5")),
    (ValueError, r"density must be in \(0, 1\], got 0", lambda s: ops.topk_mask(s, 0.0)),
    (ValueError, r"density must be in \(0, 1\], got 1.5", lambda s: ops.topk_mask(s, 1.5)),
    (ValueError, r"density must be in \(0, 1\], got nan", lambda s: ops.topk_mask(s, math.nan)),
    (ValueError, "scope must be one of 'global', 'layer', got 'layers'; did you mean 'layer'",
     lambda s: ops.topk_mask(s, 0.5, scope="layers")),
    (ValueError, r"scores must be on one device, got cpu and, for scores\[1\], meta",
     lambda s: ops.topk_mask([s, s.to("meta")], 0.5)),
    (TypeError, "scores must be a Tensor, got list", lambda s: ops.nm_mask([s], 2, 4)),
    (TypeError, "scores must be float64, .* got Int", lambda s: ops.nm_mask(s.int(), 2, 4)),
    (TypeError, "n must be an int, got float", lambda s: ops.nm_mask(s, 2.0, 4)),
    (TypeError, "dim must be an int, got NoneType", lambda s: ops.nm_mask(s, 2, 4, None)),
    (ValueError, "m must be at least 1, got 0", lambda s: ops.nm_mask(s, 0, 0)),
    (ValueError, r"n must be in \[1, m\], got n=5 and m=4", lambda s: ops.nm_mask(s, 5, 4)),
    (ValueError, r"n must be in \[1, m\], got n=0 and m=4", lambda s: ops.nm_mask(s, 0, 4)),
    (ValueError, r"n must be in \[1, m\], got n=-1", lambda s: ops.nm_mask(s, -1, 4)),
    (ValueError, r"a multiple of m, 3, entries along dim 1, got shape \[6, 8\]",
     lambda s: ops.nm_mask(s, 2, 3)),
    (ValueError, "dim must be a dimension of scores, which has 2, got 2", lambda s: ops.nm_mask(s, 2, 4, 2)),
    (ValueError, "dim must be a dimension of scores, which has 0", lambda s: ops.nm_mask(s.sum(), 1, 1)),
    (TypeError, "scores must be a Tensor, got list", lambda s: ops.filter_mask([s], 0.5)),
    (TypeError, "scores must be float64, .* got torch.int64", lambda s: ops.channel_mask(s.long(), 0.5)),
    (ValueError, r"scores must have at least two dimensions, \[out, in, ...\], got shape \(6,\)",
     lambda s: ops.filter_mask(s[:, 0], 0.5)),
    (ValueError, r"density must be in \(0, 1\], got 2", lambda s: ops.channel_mask(s, 2)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "message", "call"), WRONG, ids=[f"{i}-{m[:40]}" for i, (_, m, _) in enumerate(WRONG)]
)
def test_a_wrong_call_says_what_is_wrong(
    kind: type[Exception], message: str, call: Callable[[Tensor], object]
) -> None:
    with pytest.raises(kind, match=message):
        call(draw(6, 8))
