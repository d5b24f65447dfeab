"""Convolutions and matrix products."""

from __future__ import annotations

import torch
from torch import Tensor

from blokern.sparse.compaction.channels import Axis, Product
from blokern.sparse.compaction.record import Call, Rule, Value

__all__ = ["RULES"]


def convolution(call: Call) -> Value:
    """With groups, whole groups go, inputs and outputs; otherwise inputs and outputs go for themselves."""
    source, weight, bias = call.value("input"), call.value("weight"), call.value("bias")
    assert source is not None
    assert weight is not None
    if not weight.known:
        call.pin_all()
        return Value([None] * call.result.dim())
    groups, transposed, taps = call["groups"], call["transposed"], call["weight"].dim() - 2
    channel = len(source.axes) - taps - 1
    for axis in (*source.axes[channel + 1 :], *weight.axes[2:]):
        call.channels.pin(axis)
    if groups > 1:
        inputs, outputs = _grouped(call, source.axes[channel], weight)
    else:
        inner, outer = (weight.axes[0], weight.axes[1]) if transposed else (weight.axes[1], weight.axes[0])
        inputs, outputs = call.channels.same(source.axes[channel], inner), outer
    if bias is not None:
        outputs = call.channels.same(outputs, bias.axes[0])
    product = Product(
        outputs,
        inputs,
        groups,
        _matrix(call["weight"], groups, transposed),
        None if weight.kept is None else _matrix(weight.kept, groups, transposed),
        source.along(channel, call.operands[0].shape[channel]),
        transposed or any(call["padding"]),
        weight.name,
        None if bias is None else bias.name,
    )
    axes = [*source.axes[:channel], outputs, *[None] * taps]
    return Value(axes, channel, _result(call, product, call["bias"]), call.known)


def _grouped(call: Call, inputs: Axis, weight: Value) -> tuple[Axis, Axis]:
    """The axes of inputs and outputs. The weight has one of them whole, and of the other a group's."""
    groups, whole, part = call["groups"], weight.axes[0], weight.axes[1]
    call.channels.pin(part)
    outputs = whole
    if call["transposed"]:
        inputs = call.channels.same(inputs, whole)
        outputs = call.channels.new(call["weight"].shape[1] * groups)
    if inputs is None or outputs is None:
        call.channels.pin(inputs)
        call.channels.pin(outputs)
        return None, None
    lead = outputs.view(groups, -1)[:, :1]
    for axis in (inputs, outputs):
        rows = axis.view(groups, -1)
        call.channels.same(lead.expand_as(rows).flatten(), axis)
    return inputs, outputs


def _matrix(weight: Tensor, groups: int, transposed: bool) -> Tensor:
    """[out, in / groups, taps]"""
    matrix = weight.flatten(2)
    if not transposed:
        return matrix
    rows, columns, taps = matrix.shape
    parts = matrix.view(groups, rows // groups, columns, taps).transpose(1, 2)
    return parts.reshape(groups * columns, rows // groups, taps)


def _result(call: Call, product: Product, bias: Tensor | None) -> Tensor | None:
    """Note the product; what is constant of its outputs."""
    call.note(product)
    constant = product.outputs_constant()
    if bias is not None:
        constant = constant + bias.detach().to("cpu", torch.float64)
    return None if constant.isnan().all() else constant


def matrix_product(call: Call) -> Value:
    """mm and addmm: of features and a known weight, or of a known weight and features."""
    left, right = call.value("mat1") or call.value("self"), call.value("mat2")
    assert left is not None
    assert right is not None
    plain = call.get("beta", 1) == 1 and call.get("alpha", 1) == 1
    bias = call.value("self") if call.name.startswith("addmm") else None
    if left.known == right.known or not plain:
        return _summed(call, left, right, bias)
    weight, features = (right, left) if right.known else (left, right)
    inner, outer = (0, 1) if right.known else (1, 0)  # of the weight
    outputs = weight.axes[outer]
    inputs = call.channels.same(features.axes[1 - inner], weight.axes[inner])
    axes = [left.axes[0], outputs] if right.known else [outputs, right.axes[1]]
    where = 1 if right.known else 0
    movable = False
    addend: Tensor | None = None
    if bias is not None:
        movable = (
            right.known
            and bias.known
            and len(bias.axes) == 1
            and call["self"].shape[0] == call.result.shape[1]
        )
        for place, axis in zip(range(-len(bias.axes), 0), bias.axes, strict=True):
            if call["self"].shape[place] == call.result.shape[place]:
                axes[place] = call.channels.same(axes[place], axis)
            else:
                call.channels.pin(axis)
        outputs = axes[where]
        addend = call["self"] if movable else None
    tensor = call["mat2"] if right.known else call.get("mat1", call.get("self"))
    matrices = [
        None if t is None else (t if outer == 0 else t.t()).unsqueeze(2) for t in (tensor, weight.kept)
    ]
    assert matrices[0] is not None
    product = Product(
        outputs,
        inputs,
        1,
        matrices[0],
        matrices[1],
        features.along(1 - inner, tensor.shape[inner]),
        False,
        weight.name,
        bias.name if bias is not None and movable else None,
    )
    constant = _result(call, product, addend)
    return Value(axes, where, None if bias is not None and not movable else constant)


def _summed(call: Call, left: Value, right: Value, bias: Value | None) -> Value:
    """What is summed over stays, all of it."""
    for axis in (left.axes[-1], right.axes[-2], *(bias.axes if bias else ())):
        call.channels.pin(axis)
    batch = [call.channels.same(a, b) for a, b in zip(left.axes[:-2], right.axes[:-2], strict=True)]
    axes = [*batch, left.axes[-2], right.axes[-1]]
    if bias is not None:
        for axis in axes:
            call.channels.pin(axis)
    return Value(axes, known=call.known)


def batched_product(call: Call) -> Value:
    """bmm and baddbmm."""
    left, right = call.value("batch1") or call.value("self"), call.value("batch2") or call.value("mat2")
    assert left is not None
    assert right is not None
    return _summed(call, left, right, call.value("self") if call.name.startswith("badd") else None)


RULES: dict[str, Rule] = {
    **dict.fromkeys(("convolution", "_convolution"), convolution),
    **dict.fromkeys(("mm", "addmm", "addmm_"), matrix_product),
    **dict.fromkeys(("bmm", "baddbmm", "baddbmm_"), batched_product),
}
