"""Second-order products of networks, and a Hessian's largest eigenvalue, by blokern, curvlinops, BackPACK, PyHessian,
hessian-eigenthings and torch.func.

A product "from scratch" has its forward pass within; "at one point" whatever can be kept from one product to the next
is made beforehand, as an eigenvalue solver would. BackPACK's and PyHessian's products are double backward.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import hessian_eigenthings as eigenthings
import torch
from backpack.hessianfree.ggnvp import ggn_vector_product
from backpack.hessianfree.hvp import hessian_vector_product
from curvlinops import GGNLinearOperator, HessianLinearOperator
from hessian_eigenthings.loss_fns import supervised_forward, supervised_loss, supervised_loss_of_output
from pyhessian import hessian as PyHessian
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp
from torch.nn import functional as F

from benchmarks.networks import images, network
from benchmarks.peers.contest import Contest, Run, close, flat
from blokern import curvature

STEPS = 12


def cases() -> Iterator[Contest]:
    x, _ = images(32)
    resnet = network("preact_resnet18", x)[0]
    for name, model, inputs in (
        ("MLP 784-512-512-10, batch 128", _mlp(), torch.rand(128, 784)),
        ("preact_resnet18, batch 32", resnet, x),
    ):
        model.eval()
        generator = torch.Generator().manual_seed(1)
        y = torch.randint(10, (len(inputs),), generator=generator)
        v = [torch.randn(p.shape, generator=generator) for p in model.parameters()]
        yield _hessian(name, model, inputs, y, v)
        yield _again(name, model, inputs, y, v)
        yield _gauss_newton(name, model, inputs, y, v)
    yield _eigenvalue()


def _mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))


def _by_name(model: nn.Module, v: list[Tensor]) -> dict[str, Tensor]:
    return dict(zip((name for name, _ in model.named_parameters()), v, strict=True))


def _compiled(model: nn.Module, x: Tensor, y: Tensor, v: list[Tensor]) -> Run:
    at = {name: p.detach() for name, p in model.named_parameters()}
    direction = _by_name(model, v)

    def product(at: dict[str, Tensor], v: dict[str, Tensor]) -> dict[str, Tensor]:
        gradient = grad(lambda p: F.cross_entropy(functional_call(model, p, (x,)), y))
        return jvp(gradient, (at,), (v,))[1]

    compiled = torch.compile(product, dynamic=False)
    return lambda: flat(compiled(at, direction))


def _curvlinops(kind: Callable[..., object], model: nn.Module, x: Tensor, y: Tensor) -> object:
    return kind(model, nn.CrossEntropyLoss(), [*model.parameters()], [(x, y)], check_deterministic=False)


def _pyhessian(model: nn.Module, x: Tensor, y: Tensor) -> PyHessian:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # backward with create_graph, and what it leaves in .grad
        made = PyHessian(model, nn.CrossEntropyLoss(), data=(x, y), cuda=False)
    model.zero_grad(set_to_none=True)
    return made


def _hessian(name: str, model: nn.Module, x: Tensor, y: Tensor, v: list[Tensor]) -> Contest:
    direction, vector, parameters = _by_name(model, v), flat(v), [*model.parameters()]
    linop = _curvlinops(HessianLinearOperator, model, x, y)
    things = eigenthings.HessianOperator(model, [(x, y)], supervised_loss(nn.CrossEntropyLoss()))
    rivals: dict[str, Run] = {
        "blokern.hvp": lambda: flat(curvature.hvp(model, F.cross_entropy, x, y, direction)),
        "BackPACK": lambda: flat(hessian_vector_product(F.cross_entropy(model(x), y), parameters, v)),
        "curvlinops": lambda: linop @ vector,
        "hessian-eigenthings": lambda: things.matvec(vector),
        "torch.func, compiled": _compiled(model, x, y, v),
    }
    return Contest(
        f"{name}: Hessian times vector, from scratch", rivals, "blokern.hvp", close("blokern.hvp", 1e-3)
    )


def _again(name: str, model: nn.Module, x: Tensor, y: Tensor, v: list[Tensor]) -> Contest:
    direction, vector = _by_name(model, v), flat(v)
    at = curvature.linearize(model, F.cross_entropy, x, y)
    linop = _curvlinops(HessianLinearOperator, model, x, y)
    graph = _pyhessian(model, x, y)
    ours = "blokern, linearized"
    rivals: dict[str, Run] = {
        ours: lambda: flat(at.hvp(direction, retain_graph=True)),
        "PyHessian": lambda: flat(
            torch.autograd.grad(graph.gradsH, graph.params, grad_outputs=v, retain_graph=True)
        ),
        "curvlinops": lambda: linop @ vector,
        "torch.func, compiled": _compiled(model, x, y, v),
    }
    return Contest(f"{name}: Hessian times vector, at one point", rivals, ours, close(ours, 1e-3))


def _gauss_newton(name: str, model: nn.Module, x: Tensor, y: Tensor, v: list[Tensor]) -> Contest:
    direction, vector = _by_name(model, v), flat(v)
    linop = _curvlinops(GGNLinearOperator, model, x, y)
    loss = supervised_loss_of_output(nn.CrossEntropyLoss())
    things = eigenthings.GGNOperator(model, [(x, y)], supervised_forward, loss)

    def backpack() -> Tensor:
        output = model(x)
        return flat(ggn_vector_product(F.cross_entropy(output, y), output, model, v))

    rivals: dict[str, Run] = {
        "blokern.ggnvp": lambda: flat(curvature.ggnvp(model, F.cross_entropy, x, y, direction)),
        "BackPACK": backpack,
        "curvlinops": lambda: linop @ vector,
        "hessian-eigenthings": lambda: things.matvec(vector),
    }
    return Contest(
        f"{name}: Gauss-Newton matrix times vector, from scratch",
        rivals,
        "blokern.ggnvp",
        close("blokern.ggnvp", 1e-3),
    )


def _eigenvalue() -> Contest:
    """Of a small network's Hessian over two batches; found by PyHessian's power iteration to a relative 10⁻³."""
    model, _ = network("small_cnn", images(1)[0])
    model.eval()
    batches = [images(64, seed=seed) for seed in range(2)]
    size = sum(p.numel() for p in model.parameters())

    def ours() -> Tensor:
        operator = curvature.HessianOperator(model, F.cross_entropy, batches, keep=True)
        values = curvature.lanczos(operator, STEPS, generator=torch.Generator().manual_seed(0)).values
        return values.max().reshape(1)

    def things() -> Tensor:
        operator = eigenthings.HessianOperator(model, batches, supervised_loss(nn.CrossEntropyLoss()))
        return eigenthings.lanczos(operator, k=1, max_iter=STEPS, which="LA", seed=0).eigenvalues[:1]

    def linop() -> Tensor:
        operator = HessianLinearOperator(
            model, nn.CrossEntropyLoss(), [*model.parameters()], batches, check_deterministic=False
        )

        def product(v: object) -> object:
            return (operator @ torch.as_tensor(v, dtype=torch.float32).flatten()).detach().numpy()

        found = eigsh(
            LinearOperator((size, size), product, dtype="float32"),
            k=1,
            which="LA",
            ncv=STEPS,
            maxiter=1,
            tol=1e-3,
            return_eigenvectors=False,
        )
        return torch.as_tensor(found)

    def power() -> Tensor:
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = PyHessian(model, nn.CrossEntropyLoss(), dataloader=batches, cuda=False)
            found = made.eigenvalues(maxIter=100, tol=1e-3)[0]
        model.zero_grad(set_to_none=True)
        return torch.tensor(found)

    rivals: dict[str, Run] = {
        f"blokern.lanczos, {STEPS} steps": ours,
        f"hessian-eigenthings, {STEPS} steps": things,
        f"curvlinops, scipy's eigsh, {STEPS} steps": linop,
        "PyHessian, power iteration": power,
    }
    first = next(iter(rivals))
    return Contest(
        "small_cnn, 128 images: the Hessian's largest eigenvalue", rivals, first, close(first, 0.02), rounds=3
    )
