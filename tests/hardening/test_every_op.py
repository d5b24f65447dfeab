"""What is promised of every op, whatever it computes: memory that is shared, sizes of nothing, negated views."""

from __future__ import annotations

import every_op
import pytest
import torch
from hostile import REFUSALS
from torch import Tensor

OPS = every_op.names()


@pytest.fixture(params=OPS)
def call(request: pytest.FixtureRequest) -> every_op.Call:
    assert request.param in every_op.calls(), "no case of tests/hardening calls it"
    return every_op.calls()[request.param]


def overlapping(like: Tensor) -> list[Tensor]:
    """Tensors of that shape whose elements share memory: expanded, and as windows."""
    dim = max(range(like.dim()), key=lambda d: like.shape[d])
    windows = like.new_zeros(sum(like.shape)).as_strided(like.shape, [1] * like.dim())
    return [like.narrow(dim, 0, 1).clone().expand(like.shape), *([windows] if like.dim() > 1 else [])]


def shared(t: Tensor, other: Tensor, shift: int) -> tuple[Tensor, Tensor]:
    """Of their shapes and dtype, the other `shift` elements behind the first's beginning."""
    n, m = t.numel(), other.numel()
    memory = torch.rand(n + m, generator=torch.Generator().manual_seed(1)).to(t.dtype)
    return memory[:n].view(t.shape), memory[shift : shift + m].view(other.shape)


def test_what_overlaps_itself_is_not_written(call: every_op.Call) -> None:
    for place, t in every_op.written(call):
        for bad in overlapping(t) if max(t.shape, default=0) > 1 else []:
            before = bad.clone()
            with pytest.raises(ValueError, match="is written in place, and some of its elements may share"):
                every_op.run(call, {place: bad})
            assert torch.equal(bad, before)


def test_sharing_memory_is_refused_or_of_no_effect(call: every_op.Call) -> None:
    """Of all that is written with all else that the call takes."""
    for place, t in every_op.written(call):
        for other_place, other in every_op.tensors(call):
            if other_place == place or other.dtype != t.dtype:
                continue
            for shift in (0, 1, t.numel() - 1):
                one, two = shared(t, other, shift)
                expected = every_op.run(call, {place: one.clone(), other_place: two.clone()})
                try:
                    actual = every_op.run(call, {place: one, other_place: two})
                except ValueError as error:
                    assert "memory with" in str(error)  # noqa: PT017
                else:
                    written = {p for p, _ in every_op.written(call)}
                    assert not {place, other_place} <= written, "two that are written, and share memory"
                    assert every_op.same(actual, expected), (place, other_place, shift)


def test_sizes_of_nothing_are_taken_or_refused(call: every_op.Call) -> None:
    for place, t in every_op.tensors(call):
        for dim in range(t.dim()):
            try:
                every_op.run(call, {place: t.narrow(dim, 0, 0)})
            except REFUSALS as error:
                assert "INTERNAL ASSERT" not in str(error)  # noqa: PT017


def test_a_view_whose_sign_is_yet_to_be_turned_is_its_values(call: every_op.Call) -> None:
    """Torch makes such of the imaginary parts of conjugates: a kernel must never see their memory."""
    expected, written = every_op.run(call), {place for place, _ in every_op.written(call)}
    for place, t in every_op.tensors(call):
        if not t.is_floating_point():
            continue
        turned = torch._neg_view(-t.detach())
        if place in written:
            with pytest.raises(ValueError, match="is written in place and is a negative view"):
                every_op.run(call, {place: turned})
        else:
            assert every_op.same(every_op.run(call, {place: turned}), expected)


def test_negative_strides_do_not_exist() -> None:
    """So that no op need mind them."""
    t = torch.arange(4.0)
    with pytest.raises(ValueError, match="negative"):
        torch.from_numpy(t.numpy()[::-1])
    with pytest.raises(RuntimeError, match=r"[Nn]egative"):
        t.as_strided((4,), (-1,))
