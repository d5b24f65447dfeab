"""Masked layers under torch.compile and torch.export: one graph, whatever becomes of the masks."""

from __future__ import annotations

import copy
import gc
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck
from torch.nn import functional as F

from blokern import ops
from blokern.ops import SparseMask, traced
from blokern.ops.convolution import Geometry
from blokern.sparse import compact, masks_of, pack, samples_innermost, sparsify, to_dense

Change = Callable[[nn.Module], object]


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 6, 3, stride=2, padding="valid", bias=False)
        self.pool = nn.MaxPool2d(2)
        self.linear1, self.linear2 = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.conv2(F.relu(self.norm(self.conv1(x)))))
        return self.linear2(F.relu(self.linear1(x.flatten(1))))


def random_masks(model: nn.Module) -> dict[str, Tensor]:
    weights = {name: p for name, p in model.named_parameters() if p.dim() > 1}
    return {name: torch.rand(p.shape) < 0.4 for name, p in weights.items()}


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    model = Net().to(dtype)
    return sparsify(model, random_masks(model))


def images(n: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(n, 2, 7, 7, dtype=dtype)


def as_it_is(model: nn.Module) -> nn.Module:
    return model


def update(model: nn.Module) -> None:
    for mask in masks_of(model).values():
        mask.update_(torch.rand(mask.shape) < torch.rand(()))


def load(model: nn.Module) -> None:
    other = copy.deepcopy(model)
    update(other)
    model.load_state_dict(other.state_dict())


def overwrite(model: nn.Module) -> None:
    """As `update`, behind the masks' backs."""
    for module in model.modules():
        if hasattr(module, "mask_words"):
            module.mask_words.copy_(SparseMask(torch.rand(module.weight.shape) < 0.3).words)


@pytest.mark.parametrize("layout", [as_it_is, samples_innermost])
@pytest.mark.parametrize("dense_grad", [False, True])
def test_one_graph_for_all_masks(dense_grad: bool, layout: Change) -> None:
    model = network()
    layout(model)
    for name in masks_of(model):
        model.get_submodule(name.removesuffix(".weight")).dense_grad = dense_grad
    twin = copy.deepcopy(model)
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9) for net in (model, twin)]
    seen = []
    changes: list[Change] = [update, load, overwrite, update]
    for change in changes:
        x, y = images().requires_grad_(), torch.tensor([0, 1, 2])
        gradients = []
        for net, optimizer in zip((compiled, twin), optimizers, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            gradients.append([x.grad, *(p.grad for p in net.parameters())])
            x.grad = None
        seen.append(graphs.frame_count)
        torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-10, atol=1e-12)
        for optimizer in optimizers:
            optimizer.step()
        change(model)
        twin.load_state_dict(model.state_dict())
    assert seen == [1 if layout is as_it_is else 2] * 4  # a hook on the whole model is a graph by itself


def test_any_batch_size() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(100, 3))
    sparsify(model, random_masks(model))
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=graphs)
    for n in (3, 5):
        x = images(n, torch.float32)
        torch.testing.assert_close(compiled(x), model(x))
        update(model)
    assert graphs.frame_count == 1


def test_what_is_walked_is_made_once_a_mask_and_goes_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def of_words(words: Tensor, shape: torch.Size) -> SparseMask:
        made.append(shape)
        return SparseMask.of_words(words, shape)

    monkeypatch.setattr(traced, "SparseMask", type("", (SparseMask,), {"of_words": staticmethod(of_words)}))
    gc.collect()
    before = len(traced._MASKS)
    model = network()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for calls in (4, 8):
        for _ in range(3):
            compiled(images()).sum().backward()
        assert len(made) == calls
        assert len(traced._MASKS) == before + 4
        update(model)
    del model, compiled
    torch._dynamo.reset()
    gc.collect()
    assert len(traced._MASKS) == before


def test_first_use_in_inference_mode_does_not_spoil_training() -> None:
    model, x = network().eval(), images()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        torch.testing.assert_close(compiled(x), model(x))
    grads = [torch.autograd.grad(net(x).sum(), [*model.parameters()]) for net in (compiled, model)]
    torch.testing.assert_close(*grads)
    update(model)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("inference", [False, True])
def test_bool_masks_are_arguments_like_others(inference: bool) -> None:
    def run(x: Tensor, weight: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        y = ops.masked_linear(x, weight, mask)
        return y, ops.spmm(weight, mask, x.t()), ops.sddmm(y.t(), x.t(), mask)

    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run, fullgraph=True, backend=graphs)
    weight, x = torch.randn(5, 7), torch.randn(4, 7)
    with torch.inference_mode(inference):
        for _ in range(3):
            mask = torch.rand(5, 7) < 0.4
            torch.testing.assert_close(compiled(x, weight, mask), run(x, weight, mask))
    assert graphs.frame_count == 1


@pytest.mark.parametrize("dense_grad", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_products_keep_the_rules(transposed: bool, dense_grad: bool) -> None:
    shape = (7, 5) if transposed else (5, 7)
    words = SparseMask(torch.rand(shape) < 0.4).words
    weight, bias = (torch.randn(*size, dtype=torch.float64, requires_grad=True) for size in ((5, 7), (5,)))
    x, grad = (torch.randn(*size, dtype=torch.float64, requires_grad=True) for size in ((7, 3), (5, 3)))
    opcheck(traced._spmm, (weight, x, bias, words, transposed, dense_grad))
    opcheck(traced._sddmm, (grad, x, words, transposed))
    assert torch.autograd.gradcheck(lambda a, b: traced._sddmm(a, b, words, transposed), (grad, x))
    if not dense_grad:  # which is no derivative of what it computes
        assert torch.autograd.gradgradcheck(
            lambda w, x, b: traced._spmm(w, x, b, words, transposed, False), (weight, x, bias)
        )


@pytest.mark.parametrize("dense_grad", [False, True])
def test_convolutions_keep_the_rules(dense_grad: bool) -> None:
    x, weight = torch.randn(2, 4, 6, 5, requires_grad=True), torch.randn(6, 2, 3, 2, requires_grad=True)
    shape = Geometry.of(x, weight, (2, 1), 1, 1, 2)
    assert Geometry.of_numbers(shape.numbers) == shape
    words = SparseMask(torch.rand(weight.shape) < 0.4).words
    bias = torch.randn(6, requires_grad=True)
    opcheck(traced._conv2d, (x, weight, bias, words, shape.numbers, dense_grad))
    grad = torch.randn(2, 6, *shape.out)
    opcheck(traced._conv2d_input, (grad, weight.detach(), words, shape.numbers, dense_grad))
    opcheck(traced._conv2d_weight, (grad, x.detach(), words, shape.numbers, dense_grad))


def exported(model: nn.Module, x: Tensor, strict: bool) -> nn.Module:
    """The model after export, with any number of images, to a file and back."""
    dynamic = ({0: torch.export.Dim("batch")},)
    file = io.BytesIO()
    torch.export.save(torch.export.export(model, (x,), dynamic_shapes=dynamic, strict=strict), file)
    file.seek(0)
    return torch.export.load(file).module()


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("form", [as_it_is, samples_innermost, pack, to_dense])
@torch.no_grad()
def test_pruned_networks_are_exported(form: Change, strict: bool) -> None:
    if form is samples_innermost and not strict and torch.__version__ < (2, 13):
        pytest.skip("it wants a guard on the batch's size; strict=True does not")
    model = network().eval()
    form(model)
    want = copy.deepcopy(model)
    program = exported(model, images(), strict)
    for n in (3, 1, 8):
        x = images(n)
        torch.testing.assert_close(program(x), want(x))
        torch.testing.assert_close(model(x), want(x))  # as it was before


@torch.no_grad()
def test_compacted_networks_are_exported() -> None:
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 3, 3), nn.Flatten()).double().eval()
    keep = torch.zeros(6, 2, 3, 3, dtype=torch.bool)
    keep[::2] = True
    small = to_dense(compact(sparsify(model, {"0.weight": keep})))
    assert small[0].out_channels == 3
    x = images()
    torch.testing.assert_close(exported(small, x, False)(x), model(x))
