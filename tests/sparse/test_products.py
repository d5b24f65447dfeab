"""spmm, sddmm and masked_linear against dense products in float64, and what they promise to torch and to callers."""

from __future__ import annotations

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

# Rows, columns, samples: around the widths of vectors, panels and blocks, and empty ones.
SIZES = [
    (1, 1, 1),
    (5, 7, 3),
    (64, 128, 128),
    (33, 1000, 40),
    (130, 300, 65),
    (70, 65, 17),
    (40, 300, 2),  # as rows, few samples end, and panels begin
    (40, 300, 4),
    (40, 300, 5),
    (3, 2, 200),
    (0, 4, 3),
    (4, 0, 3),
    (4, 3, 0),
]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}


def factors(
    rows: int, cols: int, samples: int, density: float = 0.3, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """weight, mask and x [samples, cols]."""
    generator = torch.Generator().manual_seed(rows + 10 * cols + 100 * samples)
    weight = torch.randn(rows, cols, generator=generator, dtype=torch.float64)
    mask = torch.rand(rows, cols, generator=generator) < density
    x = torch.randn(samples, cols, generator=generator, dtype=torch.float64)
    return weight.to(dtype), mask, x.to(dtype)


def assert_close(actual: Tensor, exact: Tensor, terms: Tensor) -> None:
    """Within the dtype's rounding of the sum of its terms' magnitudes."""
    assert actual.shape == exact.shape
    numbers = torch.finfo(actual.dtype)
    bound = TOLERANCE[actual.dtype] * (terms + 1e-30) + numbers.tiny * numbers.eps  # a float16's least number
    assert ((actual.double() - exact).abs() <= bound).all()


def check_spmm(y: Tensor, weight: Tensor, mask: Tensor, x: Tensor, bias: Tensor | None = None) -> None:
    factors = [weight.double(), mask, x.double(), *([] if bias is None else [bias.double()])]
    assert_close(
        y, reference.spmm(*factors), reference.spmm(*(t.abs() if t is not mask else t for t in factors))
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("density", [0.0, 0.05, 0.5, 1.0])
def test_products_are_the_dense_ones(size: tuple[int, int, int], density: float, dtype: torch.dtype) -> None:
    weight, mask, x = factors(*size, density, dtype)
    bias = torch.randn(size[0], generator=torch.Generator().manual_seed(1)).to(dtype)
    check_spmm(ops.spmm(weight, mask, x.t()), weight, mask, x.t())
    check_spmm(ops.spmm(weight, SparseMask(mask), x.t().contiguous(), bias), weight, mask, x.t(), bias)
    check_spmm(ops.masked_linear(x, weight, mask, bias).t(), weight, mask, x.t(), bias)

    a = torch.randn(size[0], size[2], generator=torch.Generator().manual_seed(2)).to(dtype)
    b = x.t()
    exact, terms = (
        reference.sddmm(of(a.double()), of(b.double()), mask) for of in (torch.positive, torch.abs)
    )
    assert_close(ops.sddmm(a, b, mask), exact, terms)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("samples", [1, 4, 7, 16, 17, 40])
@pytest.mark.parametrize("density", [0.02, 0.2, 0.9])
def test_every_way_of_multiplying(density: float, samples: int, dtype: torch.dtype) -> None:
    """Few samples read all of the weight, of many torch makes the product where most is kept: same results, no masked
    weight read, x's layout, and no autocast."""
    weight, mask, x = factors(187, 390, samples, density, dtype)
    sparse, poisoned = SparseMask(mask), torch.where(mask, weight, torch.nan)
    bias = torch.randn(187, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        rows_first = ops.spmm(poisoned, sparse, x.t().contiguous(), bias)
    check_spmm(rows_first, weight, mask, x.t(), bias)
    assert rows_first.is_contiguous()
    leaves = x.requires_grad_(), poisoned.requires_grad_()
    y = ops.masked_linear(*leaves, sparse, bias)
    assert y.is_contiguous()
    check_spmm(y.detach().t(), weight, mask, x.t(), bias)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    by_x, by_weight = torch.autograd.grad(y, leaves, grad)
    check_spmm(by_x.t(), weight.t(), mask.t(), grad.t())
    exact, terms = grad.double().t() @ x.double(), grad.double().abs().t() @ x.double().abs()
    assert_close(by_weight, torch.where(mask, exact, 0.0), torch.where(mask, terms, 0.0))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows innermost": lambda t: t.t().contiguous().t(),
    "every second": lambda t: torch.stack([t, t], dim=2)[:, :, 0],
    "misaligned": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
    "of a wider matrix": lambda t: torch.cat([t, t], dim=1)[:, : t.shape[1]],
    "reversed twice": lambda t: t.flip(0).flip(1).flip(0).flip(1),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("size", [(70, 65, 17), (64, 128, 130)])
def test_any_layout(layout: Callable[[Tensor], Tensor], size: tuple[int, int, int]) -> None:
    weight, mask, x = factors(*size)
    check_spmm(ops.spmm(layout(weight), layout(mask), layout(x.t())), weight, mask, x.t())
    a = torch.randn(size[0], size[2], dtype=torch.float64)
    assert torch.equal(ops.sddmm(layout(a), layout(x.t()), mask), ops.sddmm(a, x.t(), mask))


def test_masked_linear_takes_any_batch() -> None:
    weight, mask, x = factors(6, 8, 12)
    y = ops.masked_linear(x.view(3, 4, 8), weight, mask)
    assert y.shape == (3, 4, 6)
    torch.testing.assert_close(y, reference.masked_linear(x.view(3, 4, 8), weight, mask))
    torch.testing.assert_close(
        ops.masked_linear(x[0], weight, mask), reference.masked_linear(x[0], weight, mask)
    )
    assert ops.masked_linear(x, weight, mask).is_contiguous()


@pytest.mark.parametrize("size", [(70, 65, 17), (64, 128, 130)])
def test_a_masked_weight_is_never_read(size: tuple[int, int, int]) -> None:
    weight, mask, x = factors(*size)
    poisoned = torch.where(mask, weight, torch.nan).requires_grad_()
    x.requires_grad_()
    y = ops.masked_linear(x, poisoned, mask)
    check_spmm(y.detach().t(), weight, mask, x.detach().t())
    grads = torch.autograd.grad(y.sum(), (x, poisoned))
    exact = torch.autograd.grad(reference.masked_linear(x, poisoned, mask).sum(), (x, poisoned))
    assert (grads[1][~mask] == 0).all()
    for got, want in zip(grads, exact, strict=True):
        torch.testing.assert_close(got, want)


def test_infinities_and_nans_stay_in_their_sample() -> None:
    weight, mask, x = factors(20, 30, 70, density=1.0)
    x[3, 4], x[5, 6] = torch.nan, torch.inf
    y = ops.masked_linear(x, weight, mask)
    assert y[3].isnan().all()
    assert y[5].isinf().all()
    others = [i for i in range(70) if i not in (3, 5)]
    assert y[others].isfinite().all()


@pytest.mark.parametrize("turned", [False, True])
def test_derivatives(turned: bool) -> None:
    weight, mask, x = factors(5, 70, 3, density=0.4)
    sparse, bias = SparseMask(mask), torch.randn(5, dtype=torch.float64, requires_grad=True)
    inputs = (weight.requires_grad_(), (x if turned else x.t().contiguous()).requires_grad_(), bias)

    def product(weight: Tensor, x: Tensor, bias: Tensor) -> Tensor:
        return ops.spmm(weight, sparse, x.t() if turned else x, bias)

    # The derivative at a masked weight is zero by contract, and by differences too.
    assert torch.autograd.gradcheck(product, inputs)
    assert torch.autograd.gradgradcheck(product, inputs)
    a = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    b = torch.randn(70, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: ops.sddmm(a, b, sparse), (a, b))
    assert torch.autograd.gradgradcheck(lambda a, b: ops.sddmm(a, b, sparse), (a, b))


@pytest.mark.parametrize("module", [ops, reference], ids=["op", "oracle"])
def test_dense_gradients_are_those_by_the_product(module: Any) -> None:
    """First and second derivatives, as if w = weight ⊙ mask were the leaf; masked weights still unread."""
    weight, mask, x = factors(5, 70, 3, density=0.4)
    u, v = torch.randn(5, 70, dtype=torch.float64), torch.randn(3, 70, dtype=torch.float64)

    def derivatives(leaf: Tensor, linear: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        leaves = [leaf.requires_grad_(), x.clone().requires_grad_()]
        grads = torch.autograd.grad(linear(leaves[1], leaves[0]).sin().sum(), leaves, create_graph=True)
        return [*grads, *torch.autograd.grad((grads[0] * u).sum() + (grads[1] * v).sum(), leaves)]

    sparse = SparseMask(mask)
    ours = derivatives(
        torch.where(mask, weight, torch.nan), lambda x, w: module.masked_linear(x, w, sparse, dense_grad=True)
    )
    for got, want in zip(ours, derivatives(weight * mask, torch.nn.functional.linear), strict=True):
        torch.testing.assert_close(got, want)
    assert (ours[0][~mask] != 0).all()


def test_dense_gradients_pass_differences() -> None:
    """With a full mask by all, else by x and the output's gradient: a masked weight does not move the output."""
    weight, mask, x = factors(3, 6, 2, density=0.5)
    x.requires_grad_()

    def linear(mask: SparseMask) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x, weight: ops.masked_linear(x, weight, mask, dense_grad=True)

    full = linear(SparseMask(torch.ones_like(mask)))
    leaves = (x, weight.clone().requires_grad_())
    assert torch.autograd.gradcheck(full, leaves)
    assert torch.autograd.gradgradcheck(full, leaves)
    assert torch.autograd.gradgradcheck(linear(SparseMask(mask)), (x, weight))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_same_bits_for_any_number_of_threads(dtype: torch.dtype) -> None:
    weight, mask, x = factors(150, 300, 130, 0.2, dtype)
    mask[:40] = False  # parts of unequal rows
    a = torch.randn(150, 130, generator=torch.Generator().manual_seed(3)).to(dtype)
    check_threads(lambda: (ops.masked_linear(x, weight, mask), ops.sddmm(a, x.t(), mask)))


EVERYWHERE = """
import test_products as t
for size in t.SIZES:
    for dtype in t.TOLERANCE:
        t.test_products_are_the_dense_ones(size, 0.3, dtype)
t.test_a_masked_weight_is_never_read((70, 65, 17))
"""


def test_every_instruction_set() -> None:
    check_everywhere(EVERYWHERE, Path(__file__).parent)


def test_opcheck() -> None:
    weight, mask, x = factors(5, 70, 3)
    sparse = SparseMask(mask)
    streams = *sparse.stream(), *sparse.stream(transposed=True)
    bias = torch.randn(5, dtype=torch.float64)
    blokern = torch.ops.blokern
    for turned in (x.t(), x.t().contiguous()):
        args = (weight.clone().requires_grad_(), turned.detach().requires_grad_(), bias.requires_grad_())
        opcheck(blokern.spmm.default, (*args, *streams))
        opcheck(blokern.spmm.default, (*args, *streams, True))
    a, b = torch.randn(5, 3, requires_grad=True), torch.randn(70, 3, requires_grad=True)
    opcheck(blokern.sddmm.default, (a, b, *streams))
    # Of masks: their outputs' sizes are data, and there is nothing to differentiate.
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    opcheck(blokern.mask_words.default, (mask,), test_utils=tests)
    opcheck(blokern.words_mask.default, (sparse.words, 70), test_utils=tests)
    opcheck(blokern.transpose_words.default, (sparse.words, 70), test_utils=tests)
    opcheck(blokern.mask_stream.default, (sparse.words, 70, 64), test_utils=tests)
    opcheck(blokern.clear_masked_.default, (weight.clone(), sparse.words), test_utils=tests)


@pytest.mark.parametrize("dense_grad", [False, True])
def test_compiled_equals_eager(dense_grad: bool) -> None:
    torch._dynamo.reset()
    weight, mask, x = factors(5, 70, 3)
    sparse = SparseMask(mask)
    sparse.stream(), sparse.stream(transposed=True)  # made once, outside of the graph
    leaves = [weight.requires_grad_(), x.requires_grad_()]

    def loss(weight: Tensor, x: Tensor) -> Tensor:
        return ops.masked_linear(x.sin(), weight, sparse, dense_grad=dense_grad).cos().sum()

    eager = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*leaves), leaves)
    assert all(map(torch.allclose, eager, compiled))


def test_wrong_calls_name_the_argument() -> None:
    weight, mask, x = factors(5, 7, 3)
    with pytest.raises(ValueError, match=r"mask must have the shape of weight, \(5, 7\), got \(5, 6\)"):
        ops.spmm(weight, mask[:, :6], x.t())
    with pytest.raises(TypeError, match=r"mask must be torch\.bool, got torch\.float64"):
        ops.spmm(weight, mask.double(), x.t())
    with pytest.raises(TypeError, match="mask must be a bool Tensor or a SparseMask, got list"):
        ops.spmm(weight, mask.tolist(), x.t())
    with pytest.raises(ValueError, match="x must have 7 features, one a column of weight, got 3"):
        ops.spmm(weight, mask, x)
    with pytest.raises(TypeError, match="x must have the dtype of weight, Double, got Float"):
        ops.spmm(weight, mask, x.t().float())
    with pytest.raises(TypeError, match="weight must be float64, float32, bfloat16 or float16, got Long"):
        ops.spmm(weight.long(), mask, x.t().long())
    with pytest.raises(ValueError, match=r"bias must have shape \[5\], got \[4\]"):
        ops.spmm(weight, mask, x.t(), torch.zeros(4, dtype=torch.float64))
    with pytest.raises(ValueError, match="b must have the samples of a, 3, got 2"):
        ops.sddmm(torch.ones(5, 3), torch.ones(7, 2), mask)
    with pytest.raises(ValueError, match=r"mask must have shape \(5, 6\) to fit a and b, got \(5, 7\)"):
        ops.sddmm(torch.ones(5, 3), torch.ones(6, 3), mask)
    with pytest.raises(ValueError, match="x must have a dimension of features"):
        ops.masked_linear(torch.tensor(1.0), weight, mask)
    with pytest.raises(ValueError, match=r"the mask's stream is not that of a \[5, 7\] matrix"):
        torch.ops.blokern.spmm(weight, x.t(), None, *SparseMask(mask[:4]).stream(), None, None, 0, None)
