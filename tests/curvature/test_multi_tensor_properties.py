"""Properties of the ops on lists of tensors. The cases that also serve other devices need no hypothesis."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_multi_tensor import coefficients, lists, run

from blokern import ops


@settings(max_examples=30, deadline=None)
@given(
    columns=st.integers(1, 4),
    shapes=st.lists(st.lists(st.integers(0, 70), max_size=2).map(tuple), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
)
def test_a_column_does_not_depend_on_the_others(
    columns: int, shapes: list[tuple[int, ...]], seed: int
) -> None:
    on, (a, b) = lists(columns, torch.float32, shapes, seed), coefficients(columns)
    each = [
        run(
            ops,
            {name: [t[k : k + 1].clone() for t in tensors] for name, tensors in on.items()},
            a[k : k + 1],
            b[k : k + 1],
        )
        for k in range(columns)
    ]
    for whole, *parts in zip(run(ops, on, a, b), *each, strict=True):
        assert torch.equal(whole, torch.cat(parts))
