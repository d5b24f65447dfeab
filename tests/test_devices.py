"""Tensors of two devices in one call: refused by the checks that all devices' ops share. A tensor on "meta" stands for
one on another device, the CPU's op being called past the dispatcher, which would send it to the fakes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from blokern.ops import SparseMask
from blokern.ops.convolution import Geometry, plan_of

LINF, L1, L2 = 0, 1, 2
CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


def images(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape)))


def attack_calls() -> Iterator[tuple[str, tuple[Any, ...]]]:
    x, flags, counts = images(3, 2, 5), torch.tensor([True, False, True]), torch.tensor([1, 2, 3])
    for each in (None, torch.full((3,), 0.1).double()):
        sizes = 0.1, 0.2, each, each
        kind = "" if each is None else ", a value a sample"
        for norm in (LINF, L1, L2):
            for out in ("", "_"):
                yield f"pgd_step{out}.{norm}{kind}", (x.clone(), x, x, *sizes, norm, 0.0, 1.0, flags)
                yield f"project{out}.{norm}{kind}", (x.clone(), x, 0.1, each, norm, 0.0, 1.0, flags)
            keep = counts if norm == L1 else None
            arguments = (x.clone(), x.clone(), x, x, *sizes, 0.75, norm, 0.0, 1.0, keep, flags)
            yield f"apgd_step_.{norm}{kind}", arguments
            if each is not None:
                yield f"random_start.{norm}{kind}", (x, 0.1, each, norm, 0.0, 1.0, 0, None)
        yield f"fast_bat_step.{kind}", (x, x, x, *sizes, 0.0, 1.0)


def sparse_calls() -> Iterator[tuple[str, tuple[Any, ...]]]:
    mask = SparseMask(torch.eye(4, 70) > 0)
    forth, back = mask.stream(), mask.stream(transposed=True)
    weight, x = images(4, 70), images(70, 5)
    yield "spmm", (weight, x, images(4), *forth, *back, False)
    yield "sddmm", (images(4, 5), x, *forth, *back)
    values = torch.ops.blokern.packed_values(weight, *forth[:3])
    yield "packed_values", (weight, *forth[:3])
    yield "packed_spmm", (values, x, images(4), *forth[:3], 4)
    yield "mask_fingerprint", (mask.words, mask.check)
    yield "clear_masked_", (weight.clone(), mask.words)
    rates = 0.1, 0.5, 0.0
    lists = [weight.clone()], [weight], [mask.words], [weight.clone()]
    yield "masked_sgd_step_", (*lists, *rates)
    yield "bip_score_step_", (lists[0], [weight.clone()], *lists[1:], 0.1, 1.0, 0.5, 0.0)
    yield "bip_released_step_", (lists[0], lists[1], lists[3], 0.1, 1.0, 0.5, 0.0)
    yield "topk_mask", ([weight, images(3)], 0.5, False)


def convolution_calls() -> Iterator[tuple[str, tuple[Any, ...]]]:
    x, weight, grad = images(2, 3, 6, 6), images(4, 3, 3, 3), images(2, 4, 4, 4)
    shape = Geometry.of(x, weight, 1, 0, 1, 1)
    plan = plan_of(SparseMask(weight > 0.8), shape)
    yield "masked_conv2d", (x, weight, images(4), *plan, False)
    yield "masked_conv2d_input", (grad, weight, *plan, False)
    yield "masked_conv2d_weight", (grad, x, *plan, [4, 3, 3, 3])
    yield "conv2d_weight", (grad, x, plan.geometry, [4, 3, 3, 3], plan.numbers)


def curvature_calls() -> Iterator[tuple[str, tuple[Any, ...]]]:
    logits, channel, row = images(4, 6), torch.ones(6).double(), torch.ones(4).double()
    labels, wide = torch.tensor([0, 1, 2, 3]), channel[None]
    yield "softmax_cross_entropy_hvp", (logits, logits, labels, images(6), -100, True, 0.0)
    yield "silu_adjoint_tangent", (logits, logits, logits, logits, True)
    statistics = channel, channel, channel
    yield "batch_norm_tangent", (logits, logits, *statistics, channel, channel, logits, True)
    yield "batch_norm_adjoint", (logits, logits, *statistics, logits, True)
    four = (logits, logits, logits, logits)
    yield "batch_norm_adjoint_tangent", (*four, *statistics, channel, logits, True, True)
    yield "layer_norm_tangent", (logits, logits, row, row, wide, wide, wide)
    yield "layer_norm_adjoint_tangent", (*four, row, row, wide, wide, True)
    stack, one = [images(1, 3), images(1, 2)], torch.ones(1).double()
    copies = [[t.clone() for t in stack] for _ in range(4)]
    yield "multi_tensor_dot", (copies[0], copies[1])
    yield "multi_tensor_axpby_", (copies[0], copies[1], one, one)
    yield "cg_update_", (*copies, one)


#: That take one tensor, or are as others that are here.
OTHERS = {
    *(
        "mask_words",
        "words_mask",
        "transpose_words",
        "mask_stream",
        "count_words",
        "nm_mask",
        "conv2d_entries",
        "mask_check",
    ),
    *(f"{name}_adjoint_tangent" for name in ("tanh", "sigmoid", "gelu", "gelu_tanh", "softplus", "elu")),
}
CALLS = dict([*attack_calls(), *sparse_calls(), *convolution_calls(), *curvature_calls()])


def moved(arguments: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """The arguments with one tensor after the other on another device, those in lists too."""
    for i, value in enumerate(arguments):
        if isinstance(value, Tensor):
            yield *arguments[:i], value.to("meta"), *arguments[i + 1 :]
        elif isinstance(value, list) and isinstance(value[0], Tensor):
            for k, t in enumerate(value):
                yield *arguments[:i], [*value[:k], t.to("meta"), *value[k + 1 :]], *arguments[i + 1 :]


def call(name: str, arguments: tuple[Any, ...]) -> Any:
    op, _, _ = name.partition(".")
    return getattr(torch.ops.blokern, op).default.redispatch(CPU, *arguments)


@pytest.mark.parametrize("name", CALLS)
def test_tensors_of_two_devices_are_refused(name: str) -> None:
    call(name, CALLS[name])
    tried = 0
    for arguments in moved(CALLS[name]):
        with pytest.raises(ValueError, match="device"):
            call(name, arguments)
        tried += 1
    assert tried > 1


def test_every_op_is_here() -> None:
    every = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("blokern::")}
    traced = {
        name for name in every if name.startswith("blokern::traced_")
    }  # which call those without the word
    assert {f"blokern::{name.partition('.')[0]}" for name in (*CALLS, *OTHERS)} == every - traced
