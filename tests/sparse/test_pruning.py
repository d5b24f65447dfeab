"""bip_score_step_, bip_released_step_, masked_sgd_step_: against their oracles, and what they promise to callers."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from instruction_sets import check_everywhere
from threads import check_threads
from torch import Tensor
from torch.library import opcheck

from blokern import ops
from blokern.ops import SparseMask, reference

# Around the widths of lanes and of a mask's words.
SHAPES = [(1, 1), (3, 64), (5, 65), (7, 31), (2, 200), (4, 3, 3, 3), (0, 4), (4, 0)]
RATES: list[dict[str, float]] = [
    {"lr": 0.1},
    {"lr": 0.3, "momentum": 0.9},
    {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.02},
    {"lr": 0.0, "weight_decay": 1.0},
]


def draw(shapes: list[tuple[int, ...]], seed: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def masks_for(layers: list[Tensor]) -> list[Tensor]:
    return [draw([tuple(t.shape)], 9 + i)[0] > 0.3 for i, t in enumerate(layers)]


def cases(layers: list[Tensor]) -> dict[str, tuple[list[Any], dict[str, float]]]:
    """Each op's lists, of which the first is written, and what it takes besides SGD's rates."""
    shapes, dtype = [tuple(t.shape) for t in layers], layers[0].dtype
    weights, grads, masks = draw(shapes, 1, dtype), draw(shapes, 2, dtype), masks_for(layers)
    return {
        "bip_score_step_": ([layers, weights, grads, masks], {"gamma": 0.7}),
        "bip_released_step_": ([layers, grads], {"gamma": 3.0}),
        "masked_sgd_step_": ([layers, grads, masks], {}),
    }


OPS = [*cases([torch.ones(1, 1)])]


def buffers_for(layers: list[Tensor], rates: dict[str, float]) -> dict[str, Any]:
    buffered = rates.get("momentum", 0) != 0
    return {"momentum_buffers": [torch.zeros_like(t) for t in layers]} if buffered else {}


def run(
    module: Any, name: str, shapes: list[tuple[int, ...]], rates: dict[str, float], dtype: torch.dtype
) -> Any:
    """Three steps: the layers and the momentum's buffers."""
    layers = draw(shapes, 0, dtype)
    lists, options = cases(layers)[name]
    buffers = buffers_for(layers, rates)
    for _ in range(3):
        getattr(module, name)(*lists, **options, **rates, **buffers)
    return layers + buffers.get("momentum_buffers", [])


@pytest.mark.parametrize("rates", RATES)
@pytest.mark.parametrize("name", OPS)
def test_equals_the_oracle(name: str, rates: dict[str, float]) -> None:
    want = run(reference, name, SHAPES, rates, torch.float64)
    for got, exact in zip(run(ops, name, SHAPES, rates, torch.float64), want, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-12)
    for got, exact in zip(run(ops, name, SHAPES, rates, torch.float32), want, strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rates", RATES)
def test_masked_sgd_is_torchs(rates: dict[str, float]) -> None:
    layers = [torch.nn.Parameter(t) for t in draw(SHAPES, 0)]
    optimizer = torch.optim.SGD(layers, **rates)
    ours, masks = draw(SHAPES, 0), masks_for(layers)
    buffers = buffers_for(ours, rates)
    for seed in range(4):
        grads = draw(SHAPES, seed)
        for layer, grad, mask in zip(layers, grads, masks, strict=True):
            layer.grad = grad * mask
        optimizer.step()
        ops.masked_sgd_step_(ours, grads, [SparseMask(m) for m in masks], **rates, **buffers)
    for got, want in zip(ours, layers, strict=True):
        torch.testing.assert_close(got, want.detach(), rtol=1e-13, atol=1e-13)


def test_no_implicit_term() -> None:
    scores, weights, grads = ([t] for t in draw([(5, 70)] * 3, 0))
    want = scores[0] - 0.1 * weights[0] * grads[0]
    ops.bip_score_step_(scores, weights, grads, masks_for(scores), lr=0.1, gamma=math.inf)
    torch.testing.assert_close(scores[0], want, rtol=1e-14, atol=1e-14)


def test_a_masked_gradient_is_never_used() -> None:
    weights, grads = ([t] for t in draw([(5, 70)] * 2, 0))
    (mask,) = masks_for(weights)
    poisoned = [torch.where(mask, grads[0], math.nan)]
    before = weights[0].clone()
    ops.masked_sgd_step_(weights, poisoned, [mask], lr=0.1)
    torch.testing.assert_close(weights[0], before - 0.1 * grads[0] * mask)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels last": lambda t: t.to(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "every second": lambda t: torch.stack([t, t], dim=-1)[..., 0],
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("name", OPS)
def test_any_layout_in_place(name: str, layout: Callable[[Tensor], Tensor]) -> None:
    plain, laid = draw([(6, 8, 3, 5)], 0), [layout(t) for t in draw([(6, 8, 3, 5)], 0)]
    outputs = []
    for layers, lay in ((plain, lambda t: t), (laid, layout)):
        lists, options = cases(layers)[name]
        lists = [layers, *([lay(t) for t in others] for others in lists[1:])]
        buffers = [lay(torch.ones_like(t, memory_format=torch.contiguous_format)) for t in layers]
        strides = layers[0].stride()
        getattr(ops, name)(*lists, lr=0.1, momentum=0.5, momentum_buffers=buffers, **options)
        assert layers[0].stride() == strides
        outputs.append([*layers, *buffers])
    assert all(map(torch.equal, *outputs))


@pytest.mark.parametrize("name", OPS)
def test_writes_are_counted(name: str) -> None:
    layers = draw(SHAPES[:3], 0)
    lists, options = cases(layers)[name]
    buffers = [torch.zeros_like(t) for t in layers]
    getattr(ops, name)(*lists, lr=0.1, momentum=0.5, momentum_buffers=buffers, **options)
    assert all(t._version == 1 for t in layers)
    assert all(t._version == 1 for t in buffers)
    assert all(t._version == 0 for others in lists[1:] for t in others)


@pytest.mark.parametrize("name", OPS)
def test_same_bits_for_any_number_of_threads(name: str) -> None:
    shapes = [(3, 5), (300, 700), (1, 40_000)]
    check_threads(lambda: run(ops, name, shapes, RATES[2], torch.float32))


DIGEST = """
import hashlib, pathlib, torch, test_pruning as t
digest = hashlib.sha256()
for name in t.OPS:
    for dtype in (torch.float64, torch.float32):
        for rates in t.RATES:
            for out in t.run(t.ops, name, t.SHAPES, rates, dtype):
                digest.update(out.numpy().tobytes())
with pathlib.Path({path!r}).open("a") as file:
    print(digest.hexdigest(), file=file)
"""


def test_same_bits_on_every_instruction_set(tmp_path: Path) -> None:
    check_everywhere(DIGEST.format(path=str(tmp_path / "digests")), Path(__file__).parent)
    assert len(set((tmp_path / "digests").read_text().split())) == 1


def test_opcheck() -> None:
    blokern = torch.ops.blokern
    layers, weights, grads = (draw([(3, 70), (4, 3, 3, 3)], seed) for seed in range(3))
    words = [SparseMask(m).words for m in masks_for(layers)]
    buffers = [torch.ones_like(t) for t in layers]
    opcheck(blokern.bip_score_step_.default, (layers, weights, grads, words, buffers, 0.1, 1.0, 0.9, 0.1))
    opcheck(blokern.bip_score_step_.default, (layers, weights, grads, words, [], 0.1, 1.0, 0.0, 0.1))
    opcheck(blokern.bip_released_step_.default, (layers, grads, buffers, 0.1, 1.0, 0.9, 0.1))
    opcheck(blokern.masked_sgd_step_.default, (layers, grads, words, buffers, 0.1, 0.9, 0.1))


@pytest.mark.parametrize("name", OPS)
def test_compiles_in_one_graph_to_the_same_bits(name: str) -> None:
    torch._dynamo.reset()
    layers = draw(SHAPES[:3], 0)
    lists, options = cases(layers)[name]
    want = run(ops, name, SHAPES[:3], {"lr": 0.1}, torch.float64)

    def step(lists: list[list[Tensor]]) -> None:
        getattr(ops, name)(*lists, lr=0.1, **options)

    compiled = torch.compile(step, fullgraph=True)
    for _ in range(3):
        compiled(lists)
    assert all(map(torch.equal, layers, want))


def scored(t: Tensor, **changes: Any) -> None:
    call: dict[str, Any] = {name: [t.clone()] for name in ("scores", "weights", "grads")}
    call |= {"masks": [t > 0], "lr": 0.1} | changes
    ops.bip_score_step_(**call)


WRONG: list[tuple[type[Exception], str, Callable[[Tensor], object]]] = [
    (TypeError, "scores must be a list, got Tensor", lambda t: scored(t, scores=t)),
    (ValueError, "grads must hold at least one layer, got an empty list", lambda t: scored(t, grads=[])),
    (TypeError, r"weights\[0\] must be a Tensor, got float", lambda t: scored(t, weights=[0.5])),
    (TypeError, r"masks\[0\] must be a Tensor or SparseMask, got NoneType", lambda t: scored(t, masks=[None])),
    (ValueError, "weights must have as many tensors as scores, 1, got 2", lambda t: scored(t, weights=[t, t])),
    (ValueError, "grads must have as many tensors as scores, 1, got 2", lambda t: scored(t, grads=[t, t])),
    (ValueError, "masks must have as many masks as scores, 1, got 2", lambda t: scored(t, masks=[t > 0] * 2)),
    (TypeError, r"mask must be torch\.bool, got torch\.float64", lambda t: scored(t, masks=[t])),
    (ValueError, r"mask must have the shape of scores\[0\], \(4, 6\), got \(6, 4\)",
     lambda t: scored(t, masks=[t.t() > 0])),
    (ValueError, r"grads\[0\] must have the shape of scores\[0\], \[4, 6\], got \[3, 6\]",
     lambda t: scored(t, grads=[t[:3]])),
    (ValueError, r"weights\[0\] must have the shape of scores\[0\]", lambda t: scored(t, weights=[t[:3]])),
    (TypeError, r"grads\[0\] must have the dtype of scores\[0\], Double, got Float",
     lambda t: scored(t, grads=[t.float()])),
    (TypeError, r"scores\[0\] must be float64 or float32, got BFloat16",
     lambda t: scored(t.bfloat16(), masks=[t > 0])),
    (ValueError, r"weights\[0\] must have at least two dimensions",
     lambda t: ops.bip_released_step_([t[0]], [t[0]], lr=0.1)),
    (ValueError, "momentum_buffers must have as many tensors as scores, 1, got 0",
     lambda t: scored(t, momentum=0.9)),
    (ValueError, r"momentum_buffers\[0\] must have the shape of scores\[0\]",
     lambda t: scored(t, momentum_buffers=[t[:3]])),
    (ValueError, "lr must be finite and at least 0, got -0.1", lambda t: scored(t, lr=-0.1)),
    (ValueError, "momentum must be finite and at least 0, got nan", lambda t: scored(t, momentum=math.nan)),
    (ValueError, "weight_decay must be finite and at least 0, got inf",
     lambda t: scored(t, weight_decay=math.inf)),
    (ValueError, "gamma must be positive, or inf for no implicit term, got 0", lambda t: scored(t, gamma=0.0)),
    (ValueError, r"scores\[0\] requires grad, and this op has no derivative",
     lambda t: scored(t, scores=[t.clone().requires_grad_()])),
    (ValueError, r"scores\[0\] is written in place, and some of its elements may share memory",
     lambda t: scored(t, scores=[t[:1].expand(4, 6)])),
    (ValueError, r"scores\[0\] is written in place and shares memory with weights\[0\]: clone one of them first",
     lambda t: scored(t, scores=[t], weights=[t])),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "message", "call"), WRONG, ids=[f"{i}-{m[:40]}" for i, (_, m, _) in enumerate(WRONG)]
)
def test_a_wrong_call_says_what_is_wrong_and_writes_nothing(
    kind: type[Exception], message: str, call: Callable[[Tensor], object]
) -> None:
    (t,) = draw([(4, 6)], 0)
    before = t.clone()
    with pytest.raises(kind, match=message):
        call(t)
    assert torch.equal(t, before)
