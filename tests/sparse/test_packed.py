"""Packed weights against dense products in float64, and what they promise."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from instruction_sets import check_everywhere
from test_products import SIZES, check_spmm, factors
from threads import check_threads
from torch import nn
from torch.library import opcheck

from blokern import ops
from blokern.sparse import MaskedLinear, PackedLinear, pack, sparsify
from blokern.sparse import packed as packed_module

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def check_every_size(dtype: torch.dtype) -> None:
    for rows, cols, samples in SIZES:
        for density in (0.02, 0.1, 0.6):
            weight, mask, x = factors(rows, cols, samples, density, dtype)
            weight = weight.masked_fill(~mask, float("nan"))  # read by nobody
            bias = torch.linspace(-1, 1, rows).to(dtype)
            packed = ops.pack_weight(weight, mask)
            kept = weight.masked_fill(~mask, 0.0)
            check_spmm(ops.packed_linear(x, packed).t(), kept, mask, x.t())
            check_spmm(ops.packed_linear(x, packed, bias).t(), kept, mask, x.t(), bias)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_dense_product(dtype: torch.dtype) -> None:
    check_every_size(dtype)


def test_every_instruction_set_computes_the_same() -> None:
    check_everywhere(
        "import torch, test_packed; [test_packed.check_every_size(d) for d in test_packed.DTYPES]",
        Path(__file__).parent,
    )


@pytest.mark.parametrize("samples", [1, 2, 3, 4, 5])
def test_many_columns_in_blocks(samples: int) -> None:
    weight, mask, x = factors(30, 3000, samples, 0.05)
    packed = ops.pack_weight(weight, mask)
    assert 1 < packed.cols / packed.block < 4
    check_spmm(ops.packed_linear(x, packed).t(), weight, mask, x.t())


@pytest.mark.parametrize("samples", [1, 3, 17])
def test_features_that_nobody_reads_may_be_anything(samples: int) -> None:
    weight, mask, x = factors(9, 300, samples, 0.1, torch.float32)
    mask[:, 0], mask[:, -1] = False, False
    x[:, 0], x[:, -1] = float("nan"), float("inf")
    assert ops.packed_linear(x, ops.pack_weight(weight, mask)).isfinite().all()


@pytest.mark.parametrize("shape", [(7,), (2, 3, 7), (0, 7), (4, 14)])
def test_any_shape_and_strides_of_x(shape: tuple[int, ...]) -> None:
    weight, mask, _ = factors(5, 7, 1)
    x = torch.randn(shape, dtype=torch.float64)
    if shape == (4, 14):
        x = x[:, ::2]
    got = ops.packed_linear(x, ops.pack_weight(weight, mask))
    torch.testing.assert_close(got, x @ (weight * mask).t())


def test_same_bits_for_any_number_of_threads() -> None:
    weight, mask, x = factors(300, 2000, 70, 0.1, torch.float32)
    check_threads(lambda: ops.packed_linear(x, ops.pack_weight(weight, mask)))


def test_it_is_a_copy() -> None:
    weight, mask, x = factors(5, 7, 3)
    kept = ops.SparseMask(mask)
    packed = ops.pack_weight(weight, kept)
    before = ops.packed_linear(x, packed)
    weight.zero_()
    kept.update_(~mask)
    assert torch.equal(ops.packed_linear(x, packed), before)


def test_wrong_arguments_are_named() -> None:
    weight, mask, x = factors(5, 7, 3, dtype=torch.float32)
    packed = ops.pack_weight(weight, mask)
    with pytest.raises(ValueError, match=r"mask must have the shape of weight"):
        ops.pack_weight(weight, mask.t())
    with pytest.raises(TypeError, match="weight must be float64, float32, bfloat16 or float16"):
        ops.pack_weight(weight.int(), mask)
    with pytest.raises(ValueError, match=r"x must have shape \[\.\.\., 7\], got \(3, 6\)"):
        ops.packed_linear(x[:, :6], packed)
    with pytest.raises(TypeError, match="x must have the weight's dtype"):
        ops.packed_linear(x.double(), packed)
    with pytest.raises(ValueError, match=r"bias must have shape \[5\]"):
        ops.packed_linear(x, packed, torch.zeros(4))
    with pytest.raises(TypeError, match="bias must have the dtype of x"):
        ops.packed_linear(x, packed, torch.zeros(5, dtype=torch.float64))
    for given in ({"x": x.requires_grad_()}, {"x": x.detach(), "bias": torch.zeros(5, requires_grad=True)}):
        with pytest.raises(ValueError, match="must not require a gradient: packed weights are for inference"):
            ops.packed_linear(weight=packed, **given)
    with torch.no_grad():
        ops.packed_linear(x, packed)


def test_the_ops_own_checks() -> None:
    weight, mask, x = factors(5, 7, 3, dtype=torch.float32)
    packed = ops.pack_weight(weight, mask)
    entries = (packed.start, packed.column, packed.block)
    opcheck(torch.ops.blokern.packed_values.default, (weight, *entries))
    for samples in (x.t(), x.t().contiguous()):
        opcheck(torch.ops.blokern.packed_spmm.default, (packed.values, samples, None, *entries, 5))
    with pytest.raises(ValueError, match="values must have"):
        torch.ops.blokern.packed_spmm(packed.values[1:], x.t(), None, *entries, 5)
    with pytest.raises(ValueError, match="the mask's stream is not that of"):
        torch.ops.blokern.packed_spmm(packed.values, x.t(), None, *entries, 6)


def pruned(density: float) -> nn.Module:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(30, 20, bias=False))
    model = nn.Sequential(nn.Linear(40, 30), nn.ReLU(), inner, nn.Linear(20, 3))
    masks = {
        name: torch.rand_like(model.get_parameter(name)) < density for name in ("0.weight", "2.0.weight")
    }
    return sparsify(model, masks).eval()


@torch.no_grad()
def test_a_packed_network_predicts_the_same() -> None:
    model, x = pruned(0.1), torch.randn(9, 40)
    want = model(x)
    assert pack(model) is model
    assert [type(m) for m in (model[0], model[2][0], model[3])] == [PackedLinear, PackedLinear, nn.Linear]
    torch.testing.assert_close(model(x), want)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))
    torch.testing.assert_close(model.double()(x.double()).float(), want)
    assert [*model.state_dict()] == ["3.weight", "3.bias"]


@torch.no_grad()
@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("new", DTYPES)
def test_a_packed_layer_takes_another_dtype(dtype: torch.dtype, new: torch.dtype) -> None:
    weight, mask, x = factors(6, 9, 4, 0.3, dtype)
    bias = torch.linspace(-1, 1, 6).to(dtype)
    layer, x = PackedLinear(weight, mask, bias).to(new), x.to(new)
    want = torch.nn.functional.linear(x.double(), (weight * mask).to(new).double(), bias.to(new).double())
    assert layer(x).dtype == new
    torch.testing.assert_close(layer(x), want.to(new))


def test_layers_that_keep_much_become_dense() -> None:
    model, x = pruned(0.5), torch.randn(9, 40)
    want = model(x)
    pack(model)
    assert not any(isinstance(module, MaskedLinear | PackedLinear) for module in model.modules())
    torch.testing.assert_close(model(x), want)
    assert any(isinstance(m, PackedLinear) for m in pack(pruned(0.5), max_density=0.6).modules())


@torch.no_grad()
def test_a_layer_by_itself_and_its_hooks() -> None:
    layer, x = MaskedLinear(8, 4, mask=torch.eye(8)[:4] > 0), torch.randn(2, 8)
    layer.register_forward_hook(lambda module, args, output: output + 1)
    want = layer(x)
    assert type(pack(layer)) is PackedLinear
    torch.testing.assert_close(layer(x), want)


@torch.no_grad()
def test_compiles_in_one_graph() -> None:
    model, x = pack(pruned(0.1)), torch.randn(9, 40)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), model(x))


@pytest.mark.parametrize(
    ("fits", "change"),
    [
        (True, {}),
        (False, {"rows": 33}),
        (False, {"cols": 96}),
        (False, {"m": 8}),
        (False, {"dtype": torch.float32}),
        (False, {"least": 2**12 + 1}),
        (False, {"device": "cuda"}),
    ],
)
@torch.no_grad()
def test_two_of_four_are_left_to_tensor_cores(
    fits: bool, change: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which layers are; the product itself is torch's, on CUDA alone (tests/cuda)."""
    how = {"rows": 64, "cols": 64, "m": 4, "dtype": torch.bfloat16, "least": 2**12, "device": "cpu"} | change
    monkeypatch.setattr(packed_module, "_SEMI_STRUCTURED_DEVICE", how["device"])
    monkeypatch.setattr(packed_module, "_SEMI_STRUCTURED_LEAST", how["least"])
    given: list[torch.Tensor] = []
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda t: given.append(t) or t.clone())
    weight = torch.randn(how["rows"], how["cols"])
    mask = ops.nm_mask(weight, how["m"] // 2, how["m"])
    layer = MaskedLinear(how["cols"], how["rows"], mask=mask, dtype=how["dtype"])
    nn.init.uniform_(layer.weight, 0.5, 1.0)  # no zeros of its own
    x, bias = torch.randn(3, how["cols"], dtype=how["dtype"]), layer.bias
    want = layer(x)
    pack(layer)
    assert (type(layer), layer.bias, len(given)) == (nn.Linear, bias, fits)
    assert not fits or torch.equal(given[0] != 0, mask)
    torch.testing.assert_close(layer(x), want, rtol=0.02, atol=0.02)
