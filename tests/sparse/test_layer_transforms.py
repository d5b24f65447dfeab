"""Masked layers and products under torch.func, forward mode and vmap: the values of weight · mask in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from blokern import ops
from blokern.ops import reference
from blokern.sparse import MaskedConv2d, MaskedLinear, sparsify

Loss = Callable[..., Tensor]
close = torch.testing.assert_close


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_mask(*shape: int, density: float = 0.4) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(9)) < density


LINEAR, CONV, GROUPED = "linear", "conv", "strided and grouped"


def product(
    kind: str, module: object, dense_grad: bool = False
) -> tuple[Loss, tuple[Tensor, Tensor, Tensor]]:
    """f(x, weight, bias) of ops or of its oracle, and arguments."""
    if kind == LINEAR:
        mask = random_mask(5, 7)
        masked = ops.SparseMask(mask) if module is ops else mask
        return (
            lambda x, w, b: module.masked_linear(x, w, masked, b, dense_grad=dense_grad),
            (random(4, 7), random(5, 7, seed=1), random(5, seed=2)),
        )
    groups, stride, padding = (1, 1, "same") if kind == CONV else (2, 2, 1)
    mask = random_mask(6, 4 // groups, 2, 3)
    masked = ops.SparseMask(mask) if module is ops else mask
    how = (stride, padding, 1, groups)
    return (
        lambda x, w, b: module.masked_conv2d(x, w, masked, b, *how, dense_grad=dense_grad),
        (random(3, 4, 6, 5), random(*mask.shape, seed=1), random(6, seed=2)),
    )


every_product = pytest.mark.parametrize("kind", [LINEAR, CONV, GROUPED])
both_gradients = pytest.mark.parametrize("dense_grad", [False, True])


@every_product
@both_gradients
@pytest.mark.parametrize("which", [(0,), (1,), (2,), (0, 1, 2)], ids=str)
def test_jvp_along_some_arguments(kind: str, dense_grad: bool, which: tuple[int, ...]) -> None:
    results = []
    for module in (ops, reference):
        f, args = product(kind, module, dense_grad)
        tangents = [random(*t.shape, seed=5) for t in args]

        def along(*chosen: Tensor, f: Loss = f, args: tuple[Tensor, ...] = args) -> Tensor:
            given = list(args)
            for i, t in zip(which, chosen, strict=True):
                given[i] = t
            return f(*given)

        results.append(jvp(along, tuple(args[i] for i in which), tuple(tangents[i] for i in which)))
    close(*results)
    assert results[0][1].abs().max() > 0.1


@every_product
@pytest.mark.parametrize("no_grad", [False, True])
def test_dual_tensors(kind: str, no_grad: bool) -> None:
    """torch.autograd.forward_ad, also under no_grad, and with parameters that require grad."""
    found = []
    for module in (ops, reference):
        f, (x, w, b) = product(kind, module)
        w.requires_grad_()
        with torch.set_grad_enabled(not no_grad), forward_ad.dual_level():
            dual = forward_ad.make_dual(x, random(*x.shape, seed=5))
            found.append(forward_ad.unpack_dual(f(dual, w, b)).tangent)
    close(found[0], found[1])


@every_product
def test_a_backward_pass_of_before_meets_tangents(kind: str) -> None:
    """The graph is recorded outside the level; its cotangents have tangents."""
    found = []
    for module in (ops, reference):
        f, args = product(kind, module)
        args = tuple(t.requires_grad_() for t in args)
        y = f(*args)
        with forward_ad.dual_level():
            cotangent = forward_ad.make_dual(random(*y.shape, seed=6), random(*y.shape, seed=7))
            grads = torch.autograd.grad(y, args, cotangent)
            found.append([forward_ad.unpack_dual(g).tangent for g in grads])
    close(found[0], found[1])
    assert all(t is not None for t in found[0])


@every_product
@both_gradients
def test_jacobians_and_hessians(kind: str, dense_grad: bool) -> None:
    found = []
    for module in (ops, reference):
        f, args = product(kind, module, dense_grad)

        def loss(x: Tensor, w: Tensor, b: Tensor, f: Loss = f) -> Tensor:
            return f(x, w, b).tanh().square().sum()

        tangents = tuple(random(*t.shape, seed=5) for t in args)
        found.append(
            (
                jacfwd(f, 1)(*args),
                jacrev(f, 1)(*args),
                hessian(loss, (0, 1))(*args),
                jvp(grad(loss, (0, 1, 2)), args, tangents),
                grad(lambda *a: jvp(loss, a, tangents)[1], (0, 1, 2))(*args),  # noqa: B023
                vjp(grad(loss, 1), *args)[1](random(*args[1].shape, seed=8)),
            )
        )
    close(found[0], found[1])


@every_product
@both_gradients
def test_vmap_over_any_arguments(kind: str, dense_grad: bool) -> None:
    for in_dims in ((0, None, None), (None, 0, None), (1, 1, None), (0, 0, 0), (None, None, 0)):
        found = []
        for module in (ops, reference):
            f, args = product(kind, module, dense_grad)
            args = tuple(
                t if d is None else torch.stack([t, 2 * t, t - 1], d)
                for t, d in zip(args, in_dims, strict=True)
            )
            found.append(vmap(f, in_dims)(*args))
        close(found[0], found[1])


@every_product
@both_gradients
def test_batches_of_gradients(kind: str, dense_grad: bool) -> None:
    """What torch's older vmap asks for, of first and second derivatives."""
    results = []
    for module in (ops, reference):
        f, given = product(kind, module, dense_grad)
        args = tuple(t.clone().requires_grad_() for t in given)
        y = f(*args)
        first = torch.autograd.grad(y, args, random(2, *y.shape), is_grads_batched=True, create_graph=True)
        loss = sum(g[0].square().sum() + g[0].sum() * g[1].sum() for g in first[:2])
        along = torch.eye(2, dtype=torch.float64)[:, 0]
        second = torch.autograd.grad(loss, args[:2], along, is_grads_batched=True)
        whole = torch.autograd.functional.hessian(
            lambda x, f=f, args=args: f(x, *args[1:]).pow(3).sum(), given[0][:1], vectorize=True
        )
        results.append((*first, *second, whole))
    close(*results)


def test_spmm_and_sddmm() -> None:
    mask = random_mask(5, 7)
    w, x, a, b = random(5, 7), random(7, 3, seed=1), random(5, 3, seed=2), random(7, 3, seed=3)
    for name, args in (("spmm", (w, x)), ("sddmm", (a, b))):
        found = []
        for module in (ops, reference):
            function = getattr(module, name)

            def f(s: Tensor, t: Tensor, function: Loss = function, name: str = name) -> Tensor:
                return function(s, mask, t) if name == "spmm" else function(s, t, mask)

            tangents = tuple(random(*t.shape, seed=5) for t in args)
            doubled = tuple(torch.stack([t, t.flip(0)]) for t in args)
            found.append(
                (
                    jvp(f, args, tangents),
                    jacfwd(f, (0, 1))(*args),
                    jacrev(f, (0, 1))(*args),
                    vmap(f)(*doubled),
                )
            )
        close(found[0], found[1])


def networks() -> tuple[nn.Module, nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    dense = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 25, 3)
    ).double()
    masks = {name: torch.rand_like(w) < 0.4 for name, w in dense.named_parameters() if w.dim() > 1}
    return sparsify(copy.deepcopy(dense), masks), dense, masks


def losses(dense_grad: bool = False) -> tuple[Loss, Loss, dict[str, Tensor], Tensor, Tensor]:
    """(params, x, y) → loss of a masked network and of its dense twin; parameters, images, labels."""
    masked, dense, masks = networks()
    for layer in (masked[0], masked[3]):
        layer.dense_grad = dense_grad

    def ours(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(functional_call(masked, params, (x,)), y)

    def theirs(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        kept = {n: reference._kept(p, masks[n], dense_grad) if n in masks else p for n, p in params.items()}
        return nn.functional.cross_entropy(functional_call(dense, kept, (x,)), y)

    params = {name: p.detach() for name, p in dense.named_parameters()}
    return ours, theirs, params, random(6, 2, 5, 5, seed=3), torch.tensor([0, 2, 1, 1, 0, 2])


@both_gradients
def test_per_sample_gradients_of_a_network(dense_grad: bool) -> None:
    ours, theirs, params, x, y = losses(dense_grad)
    found = [
        vmap(grad(lambda p, a, b, f=f: f(p, a[None], b[None])), (None, 0, 0))(params, x, y)
        for f in (ours, theirs)
    ]
    close(found[0], found[1])
    whole = grad(ours)(params, x, y)
    close({n: g.mean(0) for n, g in found[0].items()}, whole)


def test_hessian_vector_products_of_a_network() -> None:
    ours, theirs, params, x, y = losses()
    along = {name: random(*p.shape, seed=4) for name, p in params.items()}
    found = [jvp(grad(lambda p, f=f: f(p, x, y)), (params,), (along,)) for f in (ours, theirs)]
    close(found[0], found[1])


def test_an_ensemble_shares_a_mask() -> None:
    """Weights of several models, stacked; stacked masks are refused."""
    ours, theirs, params, x, y = losses()
    stacked = {name: torch.stack([p, 0.5 * p]) for name, p in params.items()}
    found = [vmap(lambda p, f=f: f(p, x, y))(stacked) for f in (ours, theirs)]
    close(found[0], found[1])
    masked = networks()[0]
    words = torch.stack([masked[3].mask_words] * 2)
    with pytest.raises(ValueError, match="words must be the same for all that"):
        vmap(lambda w: functional_call(masked, {"3.mask_words": w}, (x,)))(words)
    with pytest.raises(ValueError, match="mask must be the same for all"):
        vmap(lambda m: ops.masked_linear(x[:, 0, 0], x[:3, 0, 0], m))(torch.ones(2, 3, 5, dtype=torch.bool))


@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp"])
@pytest.mark.parametrize(
    "layer", [lambda: MaskedLinear(8, 4), lambda: MaskedConv2d(8, 4, 1)], ids=["linear", "conv"]
)
def test_nothing_of_a_transform_is_kept(transform: str, layer: Callable[[], nn.Module]) -> None:
    """Streams and plans are made in the first call, and serve calls outside; also if that call fails."""
    fresh = layer()
    x = torch.randn(3, 8) if isinstance(fresh, MaskedLinear) else torch.randn(3, 8, 2, 2)

    def failing(x: Tensor) -> Tensor:
        fresh(x if isinstance(fresh, MaskedLinear) else x[None])
        raise RuntimeError("as a model may")

    run = {
        "vmap": lambda: vmap(failing)(x),
        "grad": lambda: grad(failing)(x[0]),
        "jvp": lambda: jvp(failing, (x[0],), (x[0],)),
    }[transform]
    with pytest.raises(RuntimeError, match="as a model may"):
        run()
    again = copy.deepcopy(fresh)
    x.requires_grad_()
    close(again(x), fresh(x))
    fresh(x).sum().backward()
    assert x.grad.abs().sum() > 0


def test_masks_made_within_a_transform() -> None:
    x, w = random(4, 5), random(3, 5, seed=1)

    def loss(w: Tensor) -> Tensor:
        return ops.masked_linear(x, w, ops.SparseMask(w > 0)).square().sum()

    close(grad(loss)(w), grad(lambda w: (x @ torch.where(w > 0, w, 0.0).t()).square().sum())(w))


@every_product
def test_compiled_transforms(kind: str) -> None:
    torch._dynamo.reset()
    f, args = product(kind, ops)
    tangents = tuple(random(*t.shape, seed=5) for t in args)
    doubled = tuple(torch.stack([t, 2 * t]) for t in args)

    def transforms(args: tuple[Tensor, ...], doubled: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (
            jvp(f, args, tangents)[1],
            vmap(f)(*doubled),
            vmap(f, (0, None, None))(doubled[0], *args[1:]),
            grad(lambda w: f(args[0], w, args[2]).square().sum())(args[1]),
        )

    close(torch.compile(transforms, backend="aot_eager")(args, doubled), transforms(args, doubled))


def test_meta_tensors() -> None:
    for layer, x in (
        (MaskedLinear(8, 4, device="meta"), (3, 8)),
        (MaskedConv2d(8, 4, 3, device="meta"), (2, 8, 6, 6)),
    ):
        y = layer(torch.empty(x, device="meta", requires_grad=True))
        assert y.device.type == "meta"
        assert y.shape[1] == 4
        y.sum().backward()
        assert layer.weight.grad.shape == layer.weight.shape
        assert math.prod(layer.mask.shape) > 0
