"""What a case promises of an op, checked in it: values near the oracle's in float64, and arguments that are only read
unchanged."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: Of arithmetic in the dtype, or in float32 for halves, whose results are rounded.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def check_close(actual: Tensor, expected: Tensor, dtype: torch.dtype, what: str, least: float = 1e-3) -> None:
    """Relative to the largest of them, or to `least`, the size of what may have been subtracted."""
    assert actual.shape == expected.shape, f"{what}: {actual.shape}, not {expected.shape}"
    actual, expected = actual.double(), expected.double()
    size = float(expected.abs().amax()) if expected.numel() else 0.0
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(
        actual,
        expected,
        rtol=tolerance,
        atol=tolerance * max(size, least),
        msg=lambda text: f"{what}: {text}",
    )


def double(value: Any) -> Any:
    """A copy as the oracles take it, some of which cannot differentiate along an expanded tensor."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.double().clone(memory_format=torch.contiguous_format)


class Unchanged:
    """Fails if a tensor was written that is only read."""

    def __init__(self, *tensors: Tensor | None) -> None:
        self.tensors = [(t, t.clone()) for t in tensors if t is not None]

    def check(self) -> None:
        for t, before in self.tensors:
            assert torch.equal(t.nan_to_num(), before.nan_to_num()), "an input was written"
            assert torch.equal(t.isnan(), before.isnan()), "an input was written"
