"""What no caller means to do, op by op: refused in words, before anything is read or written out of bounds."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from blokern import ops
from blokern.ops.convolution import Geometry, plan_of

native = torch.ops.blokern


def overlapping() -> Tensor:
    """[3, 3], rows that begin one element after one another."""
    return torch.arange(5.0).unfold(0, 3, 1)


# ---- Memory that is shared


@pytest.mark.parametrize(
    "written", [overlapping(), torch.zeros(1, 3).expand(3, 3), torch.zeros(3, 1).expand(3, 3)]
)
def test_a_tensor_that_overlaps_itself_is_not_written(written: Tensor) -> None:
    x, mask = torch.zeros(3, 3), torch.ones(3, 3, dtype=torch.bool)
    for call in (
        lambda: ops.pgd_step_(written, x, x, 0.1, 0.1),
        lambda: ops.project_(written, x, 0.1, norm="l1"),
        lambda: ops.apgd_step_(x.clone(), written, x, x, 0.1, 0.1),
        lambda: ops.masked_sgd_step_([written], [x], [mask], lr=0.1),
        lambda: ops.masked_sgd_step_(
            [x.clone()], [x], [mask], lr=0.1, momentum=0.9, momentum_buffers=[written]
        ),
    ):
        with pytest.raises(
            ValueError, match="is written in place, and some of its elements may share memory"
        ):
            call()


def test_columns_that_cross_are_refused_and_columns_apart_are_taken() -> None:
    buffer = torch.rand(4, 12)
    with pytest.raises(ValueError, match="x_adv is written in place and shares part of its memory with x"):
        ops.project_(buffer[:, 0:4], buffer[:, 2:6], 0.1)
    with pytest.raises(ValueError, match="shares part of its memory with grad"):
        ops.pgd_step_(buffer[1:], torch.zeros(3, 12), buffer[:3], 0.1, 0.1)
    for left, right in ((slice(0, 4), slice(4, 8)), (slice(0, 12, 2), slice(1, 12, 2))):
        expected = ops.project(buffer[:, left].clone(), buffer[:, right].clone(), 0.1)
        assert torch.equal(ops.project_(buffer[:, left], buffer[:, right], 0.1), expected)


def test_two_tensors_on_one_numpy_array_are_seen_to_overlap() -> None:
    """Each has a storage of its own."""
    array = torch.rand(5, 3).numpy()
    with pytest.raises(ValueError, match="shares part of its memory with x"):
        ops.project_(torch.from_numpy(array[:4]), torch.from_numpy(array[1:]), 0.1)


def places(t: Tensor) -> list[int]:
    """Of its elements, in its storage."""
    steps = [range(n) for n in t.shape]
    return [
        t.storage_offset() + sum(i * s for i, s in zip(index, t.stride(), strict=True))
        for index in itertools.product(*steps)
    ]


@settings(max_examples=150, deadline=None)
@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    strides=st.lists(st.integers(0, 13), min_size=6, max_size=6),
    offsets=st.tuples(st.integers(0, 9), st.integers(0, 9)),
)
def test_views_are_refused_just_where_they_meet(
    shape: list[int], strides: list[int], offsets: tuple[int, int]
) -> None:
    memory = torch.rand(200)
    x_adv, x = (
        memory.as_strided(shape, strides[3 * i :][: len(shape)], offset) for i, offset in enumerate(offsets)
    )
    expected = ops.project(x_adv.clone(), x.clone(), 0.1)
    is_itself = places(x_adv) == places(x)
    try:
        assert torch.equal(ops.project_(x_adv, x, 0.1), expected)
    except ValueError as error:
        if "some of its elements may share" not in str(error):
            assert set(places(x_adv)) & set(places(x))
    else:
        assert len(set(places(x_adv))) == x_adv.numel()
        assert is_itself or not set(places(x_adv)) & set(places(x))


def test_buffers_are_apart_from_all_else() -> None:
    mask = torch.ones(2, 2, dtype=torch.bool)
    w, g, s = torch.rand(3, 2, 2).unbind()
    with pytest.raises(
        ValueError, match=r"momentum_buffers\[0\] is written in place and shares memory with grads"
    ):
        ops.masked_sgd_step_([w], [g], [mask], lr=0.1, momentum=0.9, momentum_buffers=[g])
    with pytest.raises(ValueError, match=r"momentum_buffers\[0\] .* shares memory with weights"):
        ops.bip_score_step_([s], [w], [g], [mask], lr=0.1, momentum=0.9, momentum_buffers=[w])


# ---- Sizes of nothing


def test_normalisation_by_no_kind_of_weights_is_refused() -> None:
    x, statistics, weight = torch.rand(2, 3), torch.ones(2), torch.rand(0, 3)
    with pytest.raises(ValueError, match="at least one row"):
        ops.layer_norm_tangent(x, x, statistics, statistics, weight)


def test_stacks_of_no_vectors_are_refused() -> None:
    x, none = torch.rand(2, 3), torch.rand(0, 2, 3)
    with pytest.raises(ValueError, match="x_dot must be a stack of at least one vector"):
        ops.activation_adjoint_tangent("silu", x, none, x, none, adjoint=True)


@pytest.mark.parametrize("shape", [(0, 2, 3, 3), (2, 0, 1, 1)])
def test_convolutions_of_no_channels(shape: tuple[int, ...]) -> None:
    weight, mask = torch.rand(shape).requires_grad_(), torch.ones(shape, dtype=torch.bool)
    x = torch.rand(2, shape[1], 4, 4, requires_grad=True)
    y = ops.masked_conv2d(x, weight, mask)
    assert y.shape[:2] == (2, shape[0])
    assert not y.any()
    for t, grad in zip((x, weight), torch.autograd.grad(y.sum(), (x, weight)), strict=True):
        assert grad.shape == t.shape
        assert not grad.any()


# ---- Masks, streams and plans of other weights, or of none


def test_bits_beyond_a_masks_end_are_refused() -> None:
    mask = ops.SparseMask(torch.ones(3, 70, dtype=torch.bool))
    mask.words[1, 1] |= 1 << 6  # column 70
    for call in (
        lambda: ops.masked_linear(torch.rand(2, 70), torch.rand(3, 70), mask),
        mask.to_dense,
        lambda: native.transpose_words(mask.words, 70),
        lambda: native.conv2d_entries(mask.words, [3, 70, 1], 1, [0], 1, 64, False),
    ):
        with pytest.raises(ValueError, match="no bit beyond the 70 columns of the mask, and has in row 1"):
            call()


def streams(rows: int = 20, cols: int = 70) -> tuple[Tensor, list[Any], list[Any]]:
    mask = ops.SparseMask(torch.rand(rows, cols) < 0.2)
    return torch.rand(rows, cols), [*mask.stream()], [*mask.stream(transposed=True)]


def changed(t: Tensor, index: int, value: int) -> Tensor:
    t = t.clone()
    t[index] = value
    return t


@pytest.mark.parametrize(
    ("index", "value"), [(0, 1), (3, 10_000), (3, -1), (-1, 5)], ids=["first", "up", "down", "last"]
)
def test_a_streams_starts_are_checked(index: int, value: int) -> None:
    weight, stream, _ = streams()
    stream[0] = changed(stream[0], index, value)
    with pytest.raises(ValueError, match="stream is not that of"):
        native.spmm(weight, torch.rand(70, 40), None, *stream, None, None, 0, None)


@pytest.mark.parametrize("value", [70, -1, 2**31 - 1])
def test_a_streams_columns_are_checked(value: int) -> None:
    weight, stream, turned = streams()
    stream[1] = changed(stream[1], 5, value)
    with pytest.raises(ValueError, match=r"stream's columns must be in \[0, 70\)"):
        native.spmm(weight, torch.rand(70, 40), None, *stream, None, None, 0, None)
    with pytest.raises(ValueError, match=r"stream's columns must be in \[0, 70\)"):
        native.sddmm(torch.rand(20, 40), torch.rand(70, 40), *stream, *turned)


def test_the_transpose_of_another_mask_is_refused() -> None:
    weight, stream, turned = streams()
    arguments = torch.rand(70, 40), None, *stream
    short = [changed(turned[0], 0, 0), turned[1][:-1], *turned[2:]]
    with pytest.raises(ValueError, match="transposed mask's stream must have the mask's"):
        native.spmm(weight.t().contiguous().t(), *arguments, *short)
    turned[1] = changed(turned[1], 0, 20)
    with pytest.raises(ValueError, match=r"transposed columns must be in \[0, 20\)"):
        native.spmm(weight.t().contiguous().t(), *arguments, *turned)


def test_words_of_more_rows_than_the_weight_has_are_refused() -> None:
    weight, stream, _ = streams()
    stream[3] = torch.zeros(100, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="words must have 20 rows"):
        native.spmm(weight, torch.rand(70, 2), None, *stream, None, None, 0, None)


def plan() -> tuple[Tensor, Tensor, list[Any]]:
    x, weight = torch.rand(3, 2, 6, 6), torch.rand(4, 2, 3, 3)
    shape = Geometry.of(x, weight, 1, 1, 1, 1)
    return x, weight, [*plan_of(ops.SparseMask(torch.rand(4, 2, 3, 3) < 0.5), shape)]


@pytest.mark.parametrize("index", range(18))
@pytest.mark.parametrize("value", [-1, 2**31, 2**62])
def test_every_number_of_a_plan_is_checked(index: int, value: int) -> None:
    x, weight, arguments = plan()
    arguments[2] = [*arguments[2][:index], value, *arguments[2][index + 1 :]]
    with pytest.raises(ValueError, match=r"must|geometry|stream"):
        native.masked_conv2d(x, weight, None, *arguments, False)


def test_plans_that_are_cut_short_are_refused() -> None:
    x, weight, arguments = plan()
    for i in (0, 2, 4):
        cut = [*arguments]
        cut[i] = cut[i][:-1]
        with pytest.raises(ValueError, match=r"must have|must be"):
            native.masked_conv2d(x, weight, None, *cut, False)


def test_offsets_and_places_of_a_plan_are_checked() -> None:
    x, weight, arguments = plan()
    for i, name in ((1, "places in the weight"), (2, "offsets")):
        bad = [*arguments[0]]
        bad[i] = changed(bad[i], 0, 10_000)
        with pytest.raises(ValueError, match=f"the stream's {name} must be in"):
            native.masked_conv2d(x, weight, None, bad, *arguments[1:], False)


def test_gradients_of_other_batches_are_refused() -> None:
    x, _, arguments = plan()
    for shape in ((2, 4, 6, 6), (3, 4, 5, 6)):
        with pytest.raises(ValueError, match="grad must be"):
            native.masked_conv2d_weight(torch.rand(shape), x, *arguments, [4, 2, 3, 3])
    for weight_shape in ([4, 2, 5, 5], [4, 3, 3, 3], [5, 2, 3, 3]):
        with pytest.raises(ValueError, match="is not that of the plan"):
            native.masked_conv2d_weight(torch.rand(3, 4, 6, 6), x, *arguments, weight_shape)


def test_no_scores_are_refused() -> None:
    """The public op in its own words; a raw call has no tensor that says which device it is for, as torch tells."""
    with pytest.raises(ValueError, match="scores"):
        ops.topk_mask([], 0.5)
    with pytest.raises(NotImplementedError, match="no tensor arguments"):  # torch's dispatcher's
        native.topk_mask([], 0.5, False)


def test_layers_are_apart_from_one_another() -> None:
    """Of a list, also those at other places; parameters side by side in one buffer are taken."""
    flat, grads = torch.rand(2, 24), [torch.rand(2, 8) for _ in range(3)]
    masks = [torch.ones(2, 8, dtype=torch.bool)] * 3
    columns = [flat[:, 8 * i : 8 * i + 8] for i in range(3)]
    expected = [w - 0.1 * g for w, g in zip(columns, grads, strict=True)]
    ops.masked_sgd_step_(columns, grads, masks, lr=0.1)
    torch.testing.assert_close(columns, expected)
    with pytest.raises(ValueError, match=r"weights\[\d\] is written in place and shares memory with weights"):
        ops.masked_sgd_step_([columns[0], columns[1], flat[:, 7:15]], grads, masks, lr=0.1)
    with pytest.raises(
        ValueError, match=r"weights\[0\] is written in place and shares memory with grads\[2\]"
    ):
        ops.masked_sgd_step_(columns, [*grads[:2], columns[0]], masks, lr=0.1)


def test_coefficients_may_lie_in_what_is_written() -> None:
    y, x = torch.rand(3, 4, dtype=torch.float64), torch.rand(3, 4, dtype=torch.float64)
    a, b = y[:, 0], y[:, 1]
    expected = a[:, None] * x + b[:, None] * y
    ops.multi_tensor_axpby_([y], [x], a, b)
    torch.testing.assert_close(y, expected)


def test_lists_of_nothing_are_refused() -> None:
    one = torch.ones(1, dtype=torch.float64)
    with pytest.raises(ValueError, match="y must have at least one tensor"):
        native.multi_tensor_axpby_([], [], one, one)
