"""Properties of the sparse ops, of any sizes and values. The cases that also serve other devices need no hypothesis."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from test_products import check_spmm, factors
from test_pruning import RATES, buffers_for, draw

from blokern import ops
from blokern.ops import reference


@given(st.integers(1, 80), st.integers(1, 300), st.integers(1, 140), st.floats(0.0, 1.0))
def test_products_of_any_size(rows: int, cols: int, samples: int, density: float) -> None:
    weight, mask, x = factors(rows, cols, samples, density)
    check_spmm(ops.spmm(weight, mask, x.t()), weight, mask, x.t())
    product = ops.sddmm(weight @ x.t(), x.t(), mask)
    exact = reference.sddmm(weight @ x.t(), x.t(), mask)
    torch.testing.assert_close(product, exact, rtol=1e-9, atol=1e-9)


@given(st.lists(st.lists(st.integers(-3, 3), max_size=40), min_size=1, max_size=6), st.floats(1e-6, 1.0))
def test_counts_are_exact_and_a_list_is_its_concatenation(values: list[list[int]], density: float) -> None:
    scores = [torch.tensor(v, dtype=torch.float32) for v in values]
    masks = ops.topk_mask(scores, density)
    together = torch.cat(scores)
    assert torch.equal(torch.cat(masks), ops.topk_mask(together, density))
    assert torch.equal(torch.cat(masks), reference.topk_mask(together, density))
    assert int(torch.cat(masks).sum()) == round(density * len(together))
    for layer, mask in zip(scores, ops.topk_mask(scores, density, scope="layer"), strict=True):
        assert torch.equal(mask, ops.topk_mask(layer, density))
        assert int(mask.sum()) == round(density * len(layer))


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=60), st.floats(1e-6, 1.0))
def test_any_float_has_its_place(values: list[float], density: float) -> None:
    for dtype in (torch.float32, torch.float64):
        scores = torch.tensor(values, dtype=dtype)
        assert torch.equal(ops.topk_mask(scores, density), reference.topk_mask(scores, density))


@given(st.integers(1, 9), st.integers(1, 150), st.integers(0, 2**31), st.sampled_from(RATES))
def test_steps_of_any_size(rows: int, cols: int, seed: int, rates: dict[str, float]) -> None:
    weights, grads = ([t] for t in draw([(rows, cols)] * 2, seed))
    masks = [draw([(rows, cols)], seed + 1)[0] > 0]
    scores, want = [weights[0].cos()], [weights[0].cos()]
    ops.bip_score_step_(scores, weights, grads, masks, **rates, **buffers_for(scores, rates))
    reference.bip_score_step_(want, weights, grads, masks, **rates)
    torch.testing.assert_close(scores[0], want[0], rtol=1e-12, atol=1e-12)
