"""The linearised loss against torch.func, central differences and the algebra that it must obey."""

import oracles
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from blokern.curvature import HessianOperator, ggnvp, hvp, linearize, mixed_hvp


def smooth_net(norm: bool = True) -> nn.Module:
    """Batch statistics only, since functional calls cannot move running ones."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 3, stride=2), nn.Softplus()]
    if norm:
        layers.insert(1, nn.BatchNorm2d(4, track_running_stats=False))
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(3)).double()


def problem(norm: bool = True) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    model = smooth_net(norm)
    x, u = torch.rand(2, 4, 2, 6, 6, dtype=torch.float64)
    model(x)
    return model, x, torch.tensor([0, 1, 2, 1]), u


def flat(products: dict[str, Tensor]) -> Tensor:
    return torch.cat([p.flatten() for p in products.values()])


@pytest.mark.parametrize("norm", [False, True])
def test_product_equals_the_contracted_jacobian(norm: bool) -> None:
    model, x, y, u = problem(norm)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, p, x), y)

    at_x = linearize(model, F.cross_entropy, x, y)
    torch.testing.assert_close(at_x.loss, loss(parameters, x), rtol=1e-12, atol=0.0)
    torch.testing.assert_close(at_x.grad_input, grad(loss, argnums=1)(parameters, x), rtol=1e-10, atol=1e-14)

    jacobian = jacrev(grad(loss, argnums=1))(parameters, x)
    expected = {name: torch.tensordot(u, j, dims=u.dim()) for name, j in jacobian.items()}
    products = at_x.mixed_hvp(u)
    assert list(products) == list(expected)
    torch.testing.assert_close(products, expected, rtol=1e-9, atol=1e-12)


def test_product_is_the_derivative_of_the_gradient_along_u() -> None:
    model, x, y, u = problem()
    h = 1e-5

    def weight_gradient(x: Tensor) -> Tensor:
        gradients = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
        return torch.cat([g.flatten() for g in gradients])

    difference = (weight_gradient(x + h * u) - weight_gradient(x - h * u)) / (2 * h)
    product = flat(mixed_hvp(model, F.cross_entropy, x, y, u))
    torch.testing.assert_close(product, difference, rtol=1e-6, atol=1e-8)


def test_product_is_adjoint_to_the_input_gradients_derivative_along_parameters() -> None:
    model, x, y, u = problem()
    product = flat(mixed_hvp(model, F.cross_entropy, x, y, u))
    direction, h = torch.randn_like(product), 1e-5
    theta = nn.utils.parameters_to_vector(model.parameters()).detach()

    def input_gradient(theta: Tensor) -> Tensor:
        nn.utils.vector_to_parameters(theta, model.parameters())
        return linearize(model, F.cross_entropy, x, y).grad_input

    difference = (input_gradient(theta + h * direction) - input_gradient(theta - h * direction)) / (2 * h)
    torch.testing.assert_close((difference * u).sum(), product @ direction, rtol=1e-6, atol=1e-9)


def test_product_is_linear_and_the_graph_serves_several() -> None:
    model, x, y, u = problem()
    w = torch.randn_like(u)
    at_x = linearize(model, F.cross_entropy, x, y)
    first, second = flat(at_x.mixed_hvp(u)), flat(at_x.mixed_hvp(w))
    both = flat(at_x.mixed_hvp(2.0 * u - 3.0 * w, retain_graph=False))
    torch.testing.assert_close(both, 2.0 * first - 3.0 * second, rtol=1e-10, atol=1e-13)
    with pytest.raises(RuntimeError, match="retain_graph=False"):
        at_x.mixed_hvp(u)


def test_linearize_leaves_no_trace() -> None:
    model, x, y, u = problem()
    model[0].bias.requires_grad_(False)
    with torch.no_grad():
        at_x = linearize(model, F.cross_entropy, x, y)
        products = at_x.mixed_hvp(u)
    assert not x.requires_grad
    assert not at_x.loss.requires_grad
    assert not at_x.grad_input.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert list(products) == [name for name, p in model.named_parameters() if p.requires_grad]
    assert not any(p.requires_grad for p in products.values())


def test_unused_parameters_get_zeros() -> None:
    model, x, y, u = problem()
    model.register_parameter("unused", nn.Parameter(torch.ones(3)))
    assert torch.equal(mixed_hvp(model, F.cross_entropy, x, y, u)["unused"], torch.zeros(3))

    linear = nn.Conv2d(2, 1, 1).double()
    products = mixed_hvp(linear, lambda out, _: out.sum(), x, y, u)
    torch.testing.assert_close(products["weight"].flatten(), u.sum(dim=(0, 2, 3)))
    assert torch.equal(products["bias"], torch.zeros(1, dtype=torch.float64))

    blind = mixed_hvp(linear, lambda out, _: linear.weight.square().sum(), x, y, u)  # x is the unused one
    assert not any(p.any() for p in blind.values())


def test_first_backward_computes_no_weight_gradient() -> None:
    class Masks(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[list[bool]] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func is torch.ops.aten.convolution_backward.default:
                self.seen.append(args[-1])
            return func(*args, **(kwargs or {}))

    model, x, y, _ = problem()
    with Masks() as masks:
        linearize(model, F.cross_entropy, x, y)
    assert masks.seen == [[True, False, False]] * 2


def test_compiled_modules_run_eagerly() -> None:
    model, x, y, u = problem()
    expected = flat(mixed_hvp(model, F.cross_entropy, x, y, u))
    model = torch.compile(model, backend="aot_eager")
    model(x)  # compiled by now
    torch.testing.assert_close(flat(mixed_hvp(model, F.cross_entropy, x, y, u)), expected)


def test_bfloat16_autocast_reaches_the_forward_only() -> None:
    model, x, y, u = problem()
    model, x, u = model.float(), x.float().requires_grad_(), u.float()
    head = torch.randn(3, 3)

    def loss_fn(out: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):  # a float32 product, whose backward must be one too
            return F.cross_entropy(out.float() @ head, y)

    expected = flat(mixed_hvp(model, loss_fn, x, y, u))
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_fn(model(x), y)
        at_x = linearize(model, loss_fn, x, y)
        inside = flat(at_x.mixed_hvp(u, retain_graph=True))
    assert torch.equal(at_x.grad_input, torch.autograd.grad(loss, x)[0])
    assert torch.equal(flat(at_x.mixed_hvp(u)), inside)
    assert at_x.grad_input.dtype == inside.dtype == torch.float32
    assert not torch.equal(inside, expected)
    assert F.cosine_similarity(inside, expected, dim=0) > 0.99


def test_wrong_calls_name_the_argument() -> None:
    model, x, y, u = problem()
    at_x = linearize(model, F.cross_entropy, x, y)
    with pytest.raises(ValueError, match=r"^u must have the shape of x, \(4, 2, 6, 6\), got \(2, 2, 6, 6\)"):
        at_x.mixed_hvp(u[:2])
    with pytest.raises(TypeError, match=r"^u must have the dtype of x, torch.float64, got torch.float32"):
        at_x.mixed_hvp(u.float())
    at_x.mixed_hvp(u)  # a wrong call frees nothing
    with pytest.raises(TypeError, match=r"^x must be floating-point, got torch.int64"):
        linearize(model, F.cross_entropy, y, y)
    with pytest.raises(TypeError, match=r"^model must be an nn.Module, got method"):
        linearize(model.forward, F.cross_entropy, x, y)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^loss_fn must be a function of \(model output, target\), got str"):
        linearize(model, "cross_entropy", x, y)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^loss_fn must return a scalar, got shape \(4,\)"):
        linearize(model, lambda out, y: F.cross_entropy(out, y, reduction="none"), x, y)


def test_parameters_that_autograd_does_not_follow_are_refused() -> None:
    with torch.inference_mode():
        model = nn.Linear(3, 4)
    x, y = torch.randn(5, 3), torch.tensor([0, 1, 2, 3, 0])
    with pytest.raises(ValueError, match=r"torch\.inference_mode, .*, got weight, bias: clone them"):
        hvp(model, F.cross_entropy, x, y, {name: torch.ones(p.shape) for name, p in model.named_parameters()})


def test_products_by_a_table_with_sparse_gradients_are_dense() -> None:
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Flatten(), nn.Linear(6, 4)).double()
    x, y = torch.tensor([[0, 1], [1, 4], [2, 2]]), torch.tensor([0, 1, 3])
    v, stack = oracles.random_vector(model), oracles.random_vector(model, 2)
    twin = nn.Sequential(nn.Embedding(5, 3), *model[1:]).double()
    twin.load_state_dict(model.state_dict())
    with pytest.warns(UserWarning, match="no R-operator rule for aten.embedding"):
        product = hvp(model, F.cross_entropy, x, y, v)
    assert all(t.layout == torch.strided for t in product.values())
    oracles.assert_close(product, oracles.hvp(twin, F.cross_entropy, x, y, v))
    oracles.assert_close(
        ggnvp(model, F.cross_entropy, x, y, v), oracles.ggnvp(twin, F.cross_entropy, x, y, v)
    )
    stacked = hvp(model, F.cross_entropy, x, y, stack)
    for i in range(2):
        one = oracles.element(stack, i)
        oracles.assert_close(oracles.element(stacked, i), oracles.hvp(twin, F.cross_entropy, x, y, one))
    operator = HessianOperator(model, F.cross_entropy, [(x, y)], damping=0.5)
    oracles.assert_close(operator @ v, {name: t + 0.5 * v[name] for name, t in product.items()})
