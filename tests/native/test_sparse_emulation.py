"""The sparse family's CUDA kernels under emulation, below the Python layer that the CPU's ops have: through the CPU
tests and their oracles."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import test_mask
import test_packed
import test_products
import test_pruning
import test_selection
import torch
from server import SCHEDULES
from sparse_emulated import EmulatedSparse
from test_selection import DTYPES, draw, special
from torch import Tensor

from blokern import ops
from blokern.ops import SparseMask, reference

# Barriers and exchanges are what schedules are for: all run each kernel, one the many cases of values and layouts.
one_schedule = pytest.mark.parametrize("emulated", ["shuffled"], indirect=True)


@pytest.fixture(scope="module")
def started() -> Iterator[dict[str, EmulatedSparse]]:
    by_schedule: dict[str, EmulatedSparse] = {}
    yield by_schedule
    for kernels in by_schedule.values():
        kernels.close()


@pytest.fixture(params=SCHEDULES)
def emulated(
    request: pytest.FixtureRequest, started: dict[str, EmulatedSparse], monkeypatch: pytest.MonkeyPatch
) -> EmulatedSparse:
    """torch.ops.blokern then speaks of the emulated kernels."""
    if request.param not in started:
        started[request.param] = EmulatedSparse(request.param)
    kernels = started[request.param]
    for name in EmulatedSparse.OPS:
        monkeypatch.setattr(torch.ops.blokern, name, getattr(kernels, name))
    monkeypatch.setattr(kernels, "by_entries", True)
    return kernels


with_emulated = pytest.mark.usefixtures("emulated")

# ---- Masks


@with_emulated
@pytest.mark.parametrize("density", [0.02, 0.5, 1.0])
def test_bits_and_streams_are_the_mask(density: float) -> None:
    for shape in [(5, 65), (70, 200), (0, 4), (4, 0), (33, 2100)]:
        test_mask.test_bits_and_streams_are_the_mask(shape, density)


@one_schedule
@with_emulated
def test_masks_of_the_cpu_tests() -> None:
    test_mask.test_bits_beyond_the_last_column_are_zero()
    test_mask.test_any_strides()
    test_mask.test_a_change_is_seen_and_counted()


@one_schedule
@with_emulated
def test_misaligned_masks() -> None:
    for shift in (1, 3, 8):
        dense = test_mask.masks((7, 193)).flatten()[shift:][: 5 * 193 - 64 * 5].view(5, 129)
        assert SparseMask(dense).to_dense().equal(dense)


# ---- Selections

FEW = [0.1, 0.9]


@with_emulated
@pytest.mark.parametrize("name", ["odd", "few values", "all equal", "special"])
def test_topk_keeps_what_a_stable_sort_puts_first(name: str) -> None:
    """Many blocks; ties within one and across all of them; nothing, and everything."""
    scores = test_selection.SCORES[name](torch.float32)
    for density in FEW:
        assert torch.equal(ops.topk_mask(scores, density), reference.topk_mask(scores, density))


@one_schedule
@with_emulated
@pytest.mark.parametrize("dtype", DTYPES)
def test_topk_of_every_dtype(dtype: torch.dtype) -> None:
    for name in ("none", "one", "a scalar", "odd", "special"):
        for density in test_selection.DENSITIES:
            scores = test_selection.SCORES[name](dtype)
            assert torch.equal(ops.topk_mask(scores, density), reference.topk_mask(scores, density))
    misaligned = draw(9001, dtype=dtype)[1:]
    assert torch.equal(ops.topk_mask(misaligned, 0.3), reference.topk_mask(misaligned, 0.3))
    infinity = torch.full((3,), -math.inf, dtype=dtype)
    assert ops.topk_mask(infinity, 1.0).all()


@with_emulated
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_topk_over_lists(scope: str) -> None:
    """More layers than a launch takes, empty ones among them, and of mixed dtypes."""
    for dtypes in ((torch.float32,), DTYPES):
        scores = [draw(i % 5, 40, seed=i, dtype=dtypes[i % len(dtypes)]).round() for i in range(70)]
        got, want = (module.topk_mask(scores, 0.3, scope=scope) for module in (ops, reference))
        assert all(map(torch.equal, got, want))


@one_schedule
@with_emulated
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_is_seen(dtype: torch.dtype) -> None:
    for nan in (math.nan, -math.nan):
        spoilt = special(dtype)
        spoilt[[3, -1]] = nan
        for density in (1e-9, 0.5, 1.0):
            with pytest.raises(ValueError, match="no NaN, got 2 in 90 values"):
                ops.topk_mask([draw(5000, dtype=dtype), spoilt], density)
        for n, m in ((1, 2), (2, 6)):
            with pytest.raises(ValueError, match="no NaN, got 2 in 90 values"):
                ops.nm_mask(spoilt, n, m)


@with_emulated
def test_nm_in_every_schedule() -> None:
    for n, m in ((2, 4), (3, 5)):
        test_selection.test_nm_keeps_the_largest_of_each_group(n, m, 0, torch.float32)
        test_selection.test_nm_keeps_the_largest_of_each_group(n, m, -1, torch.float32)


@one_schedule
@with_emulated
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 2), (2, 4), (1, 8), (5, 12)])
def test_nm_keeps_the_largest_of_each_group(n: int, m: int, dtype: torch.dtype) -> None:
    for dim in (0, -1):
        test_selection.test_nm_keeps_the_largest_of_each_group(n, m, dim, dtype)
    test_selection.test_nm_ranks_special_values(dtype)


@one_schedule
@with_emulated
def test_selections_of_the_cpu_tests() -> None:
    test_selection.test_nm_of_nothing_and_of_a_single_group()
    test_selection.test_equal_groups_tie_to_the_lower_index()
    for layout in test_selection.LAYOUTS.values():
        test_selection.test_ties_follow_logical_order_whatever_the_strides(layout)


# ---- Steps


@with_emulated
@pytest.mark.parametrize("name", test_pruning.OPS)
def test_steps_equal_the_oracle(name: str) -> None:
    test_pruning.test_equals_the_oracle(name, test_pruning.RATES[2])


@one_schedule
@with_emulated
@pytest.mark.parametrize("name", test_pruning.OPS)
def test_steps_have_the_bits_of_the_cpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of layers that blocks share, and of more than a launch takes."""
    shapes = [(3, 17), (40, 131), (2, 3, 3, 3)] * 20
    got = [test_pruning.run(ops, name, shapes, rates, torch.float32) for rates in test_pruning.RATES]
    monkeypatch.undo()  # the native ops again
    want = [test_pruning.run(ops, name, shapes, rates, torch.float32) for rates in test_pruning.RATES]
    assert all(all(map(torch.equal, *pair)) for pair in zip(got, want, strict=True))


@one_schedule
@with_emulated
@pytest.mark.parametrize("name", test_pruning.OPS)
def test_steps_at_any_alignment(name: str) -> None:
    def shifted(t: Tensor, by: int) -> Tensor:
        return t.new_zeros(t.numel() + by)[by:].view(t.shape).copy_(t)

    for dtype in (torch.float32, torch.float64):
        outputs = []
        for shifts in ((0, 0), (1, 1), (3, 0), (0, 1)):
            layers = [shifted(t, shifts[0]) for t in draw_layers(dtype)]
            (_, *others), options = test_pruning.cases(layers)[name]
            others = [[t if t.dtype == torch.bool else shifted(t, shifts[1]) for t in of] for of in others]
            buffers = [shifted(torch.ones_like(t), shifts[0]) for t in layers]
            getattr(ops, name)(layers, *others, **options, lr=0.1, momentum=0.5, momentum_buffers=buffers)
            outputs.append([*layers, *buffers])
        assert all(all(map(torch.equal, one, outputs[0])) for one in outputs[1:])


def draw_layers(dtype: torch.dtype) -> list[Tensor]:
    return test_pruning.draw([(5, 77), (64, 70)], 0, dtype)


@one_schedule
@with_emulated
def test_steps_of_the_cpu_tests() -> None:
    test_pruning.test_no_implicit_term()
    test_pruning.test_a_masked_gradient_is_never_used()
    for name in test_pruning.OPS:
        for layout in test_pruning.LAYOUTS.values():
            test_pruning.test_any_layout_in_place(name, layout)


# ---- Products


@with_emulated
@pytest.mark.parametrize("by_entries", [True, False])
def test_products_are_the_dense_ones(emulated: EmulatedSparse, by_entries: bool) -> None:
    emulated.by_entries = by_entries
    for size in [(5, 7, 3), (33, 200, 40), (70, 65, 17), (4, 0, 3)]:
        test_products.test_products_are_the_dense_ones(size, 0.3, torch.float32)


@one_schedule
@pytest.mark.parametrize("dtype", test_products.TOLERANCE)
@pytest.mark.parametrize("by_entries", [True, False])
def test_products_of_every_size(emulated: EmulatedSparse, by_entries: bool, dtype: torch.dtype) -> None:
    emulated.by_entries = by_entries
    for size in test_products.SIZES:
        for density in (0.05, 1.0):
            test_products.test_products_are_the_dense_ones(size, density, dtype)


@one_schedule
@pytest.mark.parametrize("layout", test_products.LAYOUTS.values(), ids=test_products.LAYOUTS)
@pytest.mark.parametrize("by_entries", [True, False])
def test_products_of_any_layout(
    emulated: EmulatedSparse, by_entries: bool, layout: Callable[[Tensor], Tensor]
) -> None:
    emulated.by_entries = by_entries
    for size in ((70, 65, 17), (20, 65, 5)):
        test_products.test_any_layout(layout, size)


@one_schedule
@pytest.mark.parametrize("by_entries", [True, False])
@pytest.mark.parametrize("samples", [1, 3, 16, 17])
def test_a_masked_weight_is_never_used(emulated: EmulatedSparse, by_entries: bool, samples: int) -> None:
    emulated.by_entries = by_entries
    for dtype in test_products.TOLERANCE:
        weight, mask, x = test_products.factors(37, 90, samples, 0.3, dtype)
        poisoned = torch.where(mask, weight, math.nan)
        test_products.check_spmm(ops.spmm(poisoned, mask, x.t()), weight, mask, x.t())
        a = torch.full((37, samples), math.nan, dtype=dtype)
        assert torch.equal(ops.sddmm(a, x.t(), mask).isnan(), mask)


# ---- Packed weights


@with_emulated
@pytest.mark.parametrize("samples", [1, 2, 3, 9, 16, 33, 129])
def test_packed_products(samples: int) -> None:
    """Rows of no entry, of a part of a warp's, and of several rounds; every way that lanes share samples."""
    for dtype in test_packed.DTYPES if samples <= 2 else [torch.float32]:
        weight, mask, x = test_products.factors(5, 700, samples, 0.5, dtype)
        mask[1], mask[2, 3:] = False, False
        weight = weight.masked_fill(~mask, math.nan)
        got = ops.packed_linear(x, ops.pack_weight(weight, mask))
        test_products.check_spmm(got.t(), weight.masked_fill(~mask, 0.0), mask, x.t())


@one_schedule
@pytest.mark.parametrize("by_entries", [True, False])
def test_packed_products_of_every_dtype(
    emulated: EmulatedSparse, by_entries: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulated.by_entries = by_entries
    monkeypatch.setattr(test_packed, "SIZES", [(5, 7, 3), (33, 130, 17), (4, 0, 3), (0, 4, 2)])
    for dtype in test_packed.DTYPES:
        test_packed.check_every_size(dtype)


@one_schedule
@with_emulated
def test_packed_products_of_the_cpu_tests() -> None:
    for samples in (1, 5):
        test_packed.test_many_columns_in_blocks(samples)  # as packed on the CPU
    for shape in ((7,), (2, 3, 7), (0, 7), (4, 14)):
        test_packed.test_any_shape_and_strides_of_x(shape)


@one_schedule
@with_emulated
def test_a_sample_that_is_not_finite_stays_where_it_is() -> None:
    """Lanes without an entry of the row touch no sample."""
    weight, mask, x = test_products.factors(9, 300, 3, 0.1, torch.float32)
    mask[:, 0], mask[:, -1] = False, False
    x[:, 0], x[1, -1] = math.nan, math.inf
    assert ops.packed_linear(x, ops.pack_weight(weight, mask)).isfinite().all()
