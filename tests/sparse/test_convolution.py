"""masked_conv2d against F.conv2d in float64, and what it promises to torch and to callers."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from instruction_sets import check_everywhere
from threads import check_threads
from torch import Tensor
from torch.library import opcheck
from torch.nn import functional as F

from blokern import ops
from blokern.ops import SparseMask, reference


class Case(NamedTuple):
    """x [n, groups · c, h, w], weight [groups · o, c, kh, kw]."""

    n: int
    c: int
    o: int
    size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def tensors(self, dtype: torch.dtype = torch.float64, density: float = 0.4) -> tuple[Tensor, ...]:
        """x, weight, mask, bias."""
        g = torch.Generator().manual_seed(sum(self[:3]))
        shapes = ((self.n, self.groups * self.c, *self.size), (self.groups * self.o, self.c, *self.kernel))
        x, weight = (torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes)
        bias = torch.randn(len(weight), generator=g, dtype=torch.float64).to(dtype)
        return x, weight, torch.rand(weight.shape, generator=g) < density, bias

    @property
    def how(self) -> tuple[Any, ...]:
        return self.stride, self.padding, self.dilation, self.groups


# Around the widths of vectors and panels; every kind of stride, border and group.
CASES = [
    Case(3, 4, 6, (7, 9), (3, 3), padding=(1, 1)),
    Case(5, 2, 3, (8, 8), (3, 3), (2, 2), (1, 1), groups=2),
    Case(2, 6, 4, (5, 5), (1, 1)),
    Case(2, 3, 5, (27, 23), (1, 1), groups=2),
    Case(19, 2, 3, (25, 23), (1, 1)),
    Case(2, 3, 2, (5, 6), (1, 1), (2, 2), groups=2),
    Case(70, 3, 5, (6, 6), (3, 3), padding=(1, 1)),
    Case(4, 1, 1, (11, 9), (3, 3), (2, 2), (2, 2), (2, 2), groups=4),
    Case(1, 3, 4, (14, 14), (7, 7), (2, 2), (3, 3)),
    Case(2, 2, 3, (3, 2), (3, 3), (3, 3), (1, 1)),
    Case(130, 2, 2, (4, 4), (3, 3), padding=(1, 1)),
    Case(3, 2, 2, (9, 9), (2, 2), (3, 3), (0, 0), (2, 2)),
    Case(2, 3, 140, (6, 5), (3, 2), (1, 2), (0, 1), (2, 1)),
    Case(2, 80, 3, (3, 3), (3, 3), padding=(2, 2)),
    Case(1, 5, 9, (11, 37), (3, 5), padding=(1, 2), dilation=(2, 1)),
    Case(0, 2, 3, (4, 4), (3, 3)),
]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "samples innermost": lambda t: t.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "every second": lambda t: torch.stack([t, t], dim=4)[..., 0],
    "rows apart": lambda t: torch.cat([t, t], dim=3)[..., : t.shape[3]],
}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}


def check(case: Case, dtype: torch.dtype, layout: Callable[[Tensor], Tensor], density: float = 0.4) -> None:
    """Output and gradients within the dtype's rounding of the sum of their terms' magnitudes."""
    x, weight, mask, bias = case.tensors(dtype, density)
    inputs = [t.requires_grad_() for t in (layout(x), torch.where(mask, weight, torch.nan), bias)]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    sizes = [t.detach().abs().requires_grad_() for t in exact]

    y = ops.masked_conv2d(inputs[0], inputs[1], mask, inputs[2], *case.how)
    z, terms = (reference.masked_conv2d(*of[:2], mask, of[2], *case.how) for of in (exact, sizes))
    assert y.is_contiguous() or y.stride(0) == 1
    grad = torch.randn(z.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    grads = torch.autograd.grad(y, inputs, layout(grad))
    wanted = torch.autograd.grad(z, exact, grad.double())
    bounds = torch.autograd.grad(terms, sizes, grad.double().abs())
    assert (grads[1][~mask] == 0).all()
    for got, want, bound in zip([y, *grads[:2]], [z, *wanted[:2]], [terms, *bounds[:2]], strict=True):
        assert got.shape == want.shape
        least = torch.finfo(dtype).tiny * torch.finfo(dtype).eps  # float16 has few below it
        assert ((got.double() - want).abs() <= TOLERANCE[dtype] * (bound + 1e-30) + least).all()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype, LAYOUTS["contiguous"])
    check(case, dtype, LAYOUTS["samples innermost"])


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("case", CASES[:7])
def test_any_layout(case: Case, layout: Callable[[Tensor], Tensor]) -> None:
    check(case, torch.float64, layout)


@pytest.mark.parametrize("density", [0.0, 0.02, 1.0])
@pytest.mark.parametrize("case", CASES[:7])
def test_any_density(case: Case, density: float) -> None:
    check(case, torch.float64, LAYOUTS["contiguous"], density)


@given(st.data())
def test_any_shape(data: st.DataObject) -> None:
    def pair(least: int, most: int) -> tuple[int, int]:
        return data.draw(st.tuples(st.integers(least, most), st.integers(least, most)))

    case = Case(
        data.draw(st.integers(1, 20)),
        data.draw(st.integers(1, 3)),
        data.draw(st.integers(1, 3)),
        pair(1, 9),
        pair(1, 3),
        pair(1, 3),
        pair(0, 3),
        pair(1, 2),
        data.draw(st.integers(1, 3)),
    )
    room = zip(case.size, case.padding, case.dilation, case.kernel, strict=True)
    assume(all(n + 2 * p > d * (k - 1) for n, p, d, k in room))
    check(case, torch.float64, LAYOUTS[data.draw(st.sampled_from([*LAYOUTS]))])


def test_padding_in_words_and_single_images() -> None:
    x, weight, mask, bias = Case(3, 4, 5, (7, 6), (3, 4)).tensors()
    for padding in ("same", "valid"):
        got = ops.masked_conv2d(x, weight, mask, bias, padding=padding)
        torch.testing.assert_close(got, reference.masked_conv2d(x, weight, mask, bias, padding=padding))
    got = ops.masked_conv2d(x[0], weight, SparseMask(mask), None, 1, 1)
    torch.testing.assert_close(got, reference.masked_conv2d(x[0], weight, mask, None, 1, 1))


def test_samples_innermost_stays_so() -> None:
    x, weight, mask, _ = Case(3, 4, 5, (7, 6), (3, 3)).tensors()
    assert ops.masked_conv2d(x, weight, mask).is_contiguous()
    y = ops.masked_conv2d(LAYOUTS["samples innermost"](x), weight, mask)
    assert y.permute(1, 2, 3, 0).is_contiguous()


@pytest.mark.parametrize("stride", [1, 2])
def test_derivatives(stride: int) -> None:
    x, weight, mask, bias = Case(2, 2, 2, (5, 4), (3, 3), groups=2).tensors()
    sparse = SparseMask(mask)
    inputs = [t.requires_grad_() for t in (x, weight, bias)]

    def conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ops.masked_conv2d(x, weight, sparse, bias, stride, 1, 1, 2)

    assert torch.autograd.gradcheck(conv, inputs)
    assert torch.autograd.gradgradcheck(conv, inputs)


def dense_derivatives(
    x: Tensor, weight: Tensor, conv: Callable[[Tensor, Tensor], Tensor], seed: int = 0
) -> list[Tensor]:
    """First and second derivatives by x and weight, these contracted with random tensors."""
    generator = torch.Generator().manual_seed(seed)
    leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    grads = torch.autograd.grad(conv(*leaves).sin().sum(), leaves, create_graph=True)
    random = [torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in leaves]
    product = sum((g * r).sum() for g, r in zip(grads, random, strict=True))
    return [*grads, *torch.autograd.grad(product, leaves)]


@pytest.mark.parametrize("layout", ["contiguous", "samples innermost", "channels last"])
@pytest.mark.parametrize("case", CASES[:-1])
def test_dense_gradients_are_those_by_the_product(case: Case, layout: str) -> None:
    x, weight, mask, _ = case.tensors()
    sparse, x = SparseMask(mask), LAYOUTS[layout](x)
    poisoned = torch.where(mask, weight, torch.nan)
    ours = dense_derivatives(
        x, poisoned, lambda x, w: ops.masked_conv2d(x, w, sparse, None, *case.how, dense_grad=True)
    )
    want = dense_derivatives(x, weight * mask, lambda x, w: F.conv2d(x, w, None, *case.how))
    for got, exact in zip(ours, want, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("layout", ["contiguous", "samples innermost"])
@pytest.mark.parametrize("kernel", [(2, 4), (3, 3), (4, 3)])
def test_dense_gradients_of_padding_to_the_same_size(kernel: tuple[int, int], layout: str) -> None:
    x, weight, mask, _ = Case(3, 4, 5, (7, 6), kernel).tensors()
    how, x = {"padding": "same", "dilation": (1, 2)}, LAYOUTS[layout](x)
    ours = dense_derivatives(x, weight, lambda x, w: ops.masked_conv2d(x, w, mask, **how, dense_grad=True))
    for got, exact in zip(
        ours, dense_derivatives(x, weight * mask, lambda x, w: F.conv2d(x, w, **how)), strict=True
    ):
        torch.testing.assert_close(got, exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("layout", ["contiguous", "samples innermost"])
def test_dense_gradients_pass_differences(layout: str) -> None:
    """With a full mask by all, else by x and the output's gradient: a masked weight does not move the output."""
    x, weight, mask, _ = Case(2, 2, 2, (4, 3), (3, 2), groups=2).tensors()
    x = LAYOUTS[layout](x)

    def conv(mask: SparseMask) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x, weight: ops.masked_conv2d(x, weight, mask, None, 2, 1, 1, 2, dense_grad=True)

    full, x = conv(SparseMask(torch.ones_like(mask))), x.requires_grad_()
    leaves = (x, weight.clone().requires_grad_())
    assert torch.autograd.gradcheck(full, leaves)
    assert torch.autograd.gradgradcheck(full, leaves)
    assert torch.autograd.gradgradcheck(conv(SparseMask(mask)), (x, weight))


@pytest.mark.parametrize("case", [CASES[0], CASES[3], CASES[4]])
def test_gradients_in_another_layout_than_the_input(case: Case) -> None:
    x, weight, mask, _ = case.tensors()
    leaf = weight.requires_grad_()
    want = F.conv2d(x, leaf * mask, None, *case.how)
    grad = torch.randn(want.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (exact,) = torch.autograd.grad(want, leaf, grad)
    for of_x, of_grad in itertools.permutations(LAYOUTS.values(), 2):
        y = ops.masked_conv2d(of_x(x), leaf, mask, None, *case.how)
        (got,) = torch.autograd.grad(y, leaf, of_grad(grad))
        torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-11)


def test_a_changed_mask_is_seen() -> None:
    x, weight, mask, _ = CASES[0].tensors()
    sparse = SparseMask(mask)
    ops.masked_conv2d(x, weight, sparse, None, *CASES[0].how)
    sparse.update_(~mask)
    got = ops.masked_conv2d(x, weight, sparse, None, *CASES[0].how)
    torch.testing.assert_close(got, reference.masked_conv2d(x, weight, ~mask, None, *CASES[0].how))


@pytest.mark.parametrize(
    "case",
    [
        Case(70, 20, 30, (9, 9), (3, 3), (2, 2), (1, 1)),
        Case(1, 60, 90, (9, 19), (3, 3), (1, 1), (1, 1)),
        Case(40, 60, 90, (5, 19), (1, 1)),
    ],
)
def test_same_bits_for_any_number_of_threads(case: Case) -> None:
    x, weight, mask, _ = case.tensors(torch.float32, 0.05)  # of more, torch makes some products
    mask[:10] = False
    inputs = [x.requires_grad_(), weight.requires_grad_()]
    inner = LAYOUTS["samples innermost"](x.detach())

    def run() -> list[Tensor]:
        y = ops.masked_conv2d(*inputs, mask, None, *case.how)
        by_inner = ops.masked_conv2d(inner, weight, mask, None, *case.how, dense_grad=True)
        return [
            y,
            *torch.autograd.grad(y.square().sum(), inputs),
            *torch.autograd.grad(by_inner.square().sum(), [weight]),
        ]

    check_threads(run)


EVERYWHERE = """
import test_convolution as t
for case in t.CASES:
    for dtype in t.TOLERANCE:
        t.check(case, dtype, t.LAYOUTS["contiguous"])
"""


def test_every_instruction_set() -> None:
    check_everywhere(EVERYWHERE, Path(__file__).parent)


def test_opcheck() -> None:
    from blokern.ops.convolution import Geometry, plan_of

    x, weight, mask, bias = CASES[1].tensors()
    plan = plan_of(SparseMask(mask), Geometry.of(x, weight, *CASES[1].how))
    grad = F.conv2d(x, weight, bias, *CASES[1].how)
    blokern = torch.ops.blokern
    leaves = [t.clone().requires_grad_() for t in (x, weight, grad)]
    for layout in (LAYOUTS["contiguous"], LAYOUTS["samples innermost"]):
        x, weight, grad = layout(leaves[0].detach()).requires_grad_(), leaves[1], leaves[2]
        opcheck(blokern.masked_conv2d.default, (x, weight, bias, *plan, False))
        opcheck(blokern.masked_conv2d.default, (x, weight, bias, *plan, True))
        by_x = (layout(grad.detach()).requires_grad_(), weight, *plan)
        opcheck(blokern.masked_conv2d_input.default, (*by_x, False))
        opcheck(blokern.masked_conv2d_input.default, (*by_x, True))
        opcheck(blokern.masked_conv2d_weight.default, (grad, x, *plan, list(weight.shape)))
        opcheck(blokern.conv2d_weight.default, (grad, x, plan.geometry, list(weight.shape), plan.numbers))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_dense_weight_gradients_of_samples_innermost(case: Case, dtype: torch.dtype) -> None:
    x, weight, mask, _ = case.tensors(dtype)
    leaf = weight.clone().requires_grad_()
    y = ops.masked_conv2d(LAYOUTS["samples innermost"](x), leaf, mask, None, *case.how, dense_grad=True)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    (got,) = torch.autograd.grad(y, leaf, grad)
    exact = weight.double().requires_grad_()
    (want,) = torch.autograd.grad(F.conv2d(x.double(), exact, None, *case.how), exact, grad.double())
    scale = want.abs().max().item() if want.numel() else 1.0
    torch.testing.assert_close(got.double(), want, rtol=0, atol=TOLERANCE[dtype] * scale)


@pytest.mark.parametrize("dense_grad", [False, True])
def test_compiled_equals_eager(dense_grad: bool) -> None:
    torch._dynamo.reset()
    x, weight, mask, _ = CASES[1].tensors()
    sparse = SparseMask(mask)
    leaves = [x.requires_grad_(), weight.requires_grad_()]

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        y = ops.masked_conv2d(x.sin(), weight, sparse, None, *CASES[1].how, dense_grad=dense_grad)
        return y.cos().sum()

    eager = torch.autograd.grad(loss(*leaves), leaves)  # and so the mask's plan is made outside of the graph
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*leaves), leaves)
    assert all(map(torch.allclose, eager, compiled))


def test_wrong_calls_name_the_argument() -> None:
    x, weight, mask, bias = Case(2, 4, 6, (5, 5), (3, 3)).tensors()
    for message, args in {
        r"mask must have the shape of weight, \(6, 4, 3, 3\), got \(5, 4, 3, 3\)": (x, weight, mask[:5]),
        r"weight must be \[out, in/groups, kh, kw\], got shape \(6, 4\)": (x, weight[:, :, 0, 0], mask),
        r"x must be \[N, in, H, W\] or \[in, H, W\], got shape \(5, 5\)": (x[0, 0], weight, mask),
        r"x must have 4 channels, weight's 4 · 1 groups, got 3": (x[:, :3], weight, mask),
        "groups must divide the 6 output channels, got 4": (x, weight, mask, bias, 1, 0, 1, 4),
        "stride must be one or two integers >= 1, got 0": (x, weight, mask, bias, 0),
        r"padding must be one or two integers >= 0, got \(1, 2, 3\)": (x, weight, mask, bias, 1, (1, 2, 3)),
        "dilation must be one or two integers >= 1, got 1.5": (x, weight, mask, bias, 1, 0, 1.5),
        r'padding="same" needs stride 1, got \(2, 2\)': (x, weight, mask, bias, 2, "same"),
        "padding must be .* got 'full'": (x, weight, mask, bias, 1, "full"),
        r"x is too small: \(2, 4, 2, 5\) for a kernel of \(3, 3\)": (x[:, :, :2], weight, mask),
        r"x is too large: 4 channels of 6 · 134217728": (
            x[:1, :, :1, :1].expand(1, 4, 6, 2**27),
            weight,
            mask,
        ),
        r"bias must have shape \[6\], got \[5\]": (x, weight, mask, bias[:5]),
    }.items():
        with pytest.raises(ValueError, match=message):
            ops.masked_conv2d(*args)
    with pytest.raises(TypeError, match="weight must have the dtype of x, Float, got Double"):
        ops.masked_conv2d(x.float(), weight, mask)
    with pytest.raises(TypeError, match="x must be float64, float32, bfloat16 or float16, got ComplexFloat"):
        ops.masked_conv2d(x.cfloat(), weight.cfloat(), mask)


@pytest.mark.parametrize("layout", ["contiguous", "samples innermost"])
@pytest.mark.parametrize("kept", [0.9, 0.2])
@pytest.mark.parametrize(
    "case",
    [Case(20, 16, 24, (11, 9), (3, 3), (2, 1), (1, 1), groups=2), Case(20, 32, 48, (7, 7), (1, 1), (2, 2))],
)
def test_large_products_of_every_density(case: Case, kept: float, layout: str) -> None:
    """Where much is kept, torch multiplies: same results, same layout, no masked weight read."""
    check(case, torch.float32, LAYOUTS[layout], kept)
    x, weight, mask, _ = case.tensors(torch.float32, kept)
    y = ops.masked_conv2d(LAYOUTS[layout](x), weight, mask, None, *case.how)
    assert (y.permute(1, 2, 3, 0) if layout == "samples innermost" else y).is_contiguous()
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.masked_conv2d(x, weight, mask, None, *case.how).dtype == torch.float32
    same = {"padding": "same", "dilation": 2}
    even = torch.randn(24, 16, 2, 4), torch.rand(24, 16, 2, 4) < kept
    leaves = [torch.randn(20, 16, 11, 9).requires_grad_(), even[0].requires_grad_()]
    got = ops.masked_conv2d(*leaves, even[1], **same)
    want = F.conv2d(leaves[0], leaves[1] * even[1], **same)
    grad = torch.randn(got.shape)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(
        torch.autograd.grad(got, leaves, grad), torch.autograd.grad(want, leaves, grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)
