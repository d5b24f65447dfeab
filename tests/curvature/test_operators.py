"""Curvature over data, and what is solved and estimated with it, against dense matrices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from scipy.sparse.linalg import eigsh
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from blokern.curvature import (
    CurvatureOperator,
    GGNOperator,
    HessianOperator,
    SpectralDensity,
    cg_solve,
    hutchinson_trace,
    inverse_hvp,
    lanczos,
    neumann_solve,
    spectral_density,
)
from blokern.curvature.vectors import flatten, unflatten

Batch = tuple[Tensor, Tensor]


def small_net(norm: bool = False) -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)]
    if norm:
        layers[1:1] = [nn.BatchNorm1d(5), nn.Dropout(0.3)]
    return nn.Sequential(*layers).double()


def data(*sizes: int) -> list[Batch]:
    gen = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(n, 4, generator=gen, dtype=torch.float64),
            torch.randint(3, (n,), generator=gen),
        )
        for n in sizes
    ]


def dense(operator: CurvatureOperator) -> Tensor:
    """The matrix, from products with all unit vectors at once."""
    columns = unflatten(torch.eye(operator.shape[0], dtype=torch.float64), operator.parameters)
    return flatten(operator @ columns, operator.parameters)


def hessian_of(model: nn.Module, batches: list[Batch], reduction: str = "mean") -> Tensor:
    parameters = oracles.trainable(model)
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))

    def loss(row: Tensor) -> Tensor:
        out = torch.func.functional_call(model, unflatten(row, parameters), x)
        return F.cross_entropy(out, y, reduction=reduction)

    return torch.autograd.functional.hessian(loss, flatten(parameters, parameters).detach())


class Matrix:
    """An operator of one parameter that is a given matrix, and counts its products."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.parameters = {"p": torch.zeros(len(matrix), dtype=matrix.dtype)}
        self.products = 0

    def __matmul__(self, v: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self.products += 1
        return {"p": v["p"] @ self.matrix}


def spd(n: int = 12, condition: float = 100.0) -> Tensor:
    torch.manual_seed(2)
    q = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q
    return q @ torch.diag(torch.logspace(0, np.log10(condition), n, dtype=torch.float64)) @ q.T


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_hessian_over_batches_of_any_size(reduction: str, keep: bool) -> None:
    model, batches = small_net(), data(6, 3, 5)

    def loss_fn(out: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(out, y, reduction=reduction)

    operator = HessianOperator(model, loss_fn, batches, damping=0.5, reduction=reduction, keep=keep)
    expected = hessian_of(model, batches, reduction) + 0.5 * torch.eye(43, dtype=torch.float64)
    assert operator.shape == (43, 43)
    for _ in range(2):
        oracles.assert_close(dense(operator), expected)
    v = oracles.random_vector(model)
    oracles.assert_close(flatten(operator @ v, v), expected @ flatten(v, v))


def test_gauss_newton_is_positive_semidefinite_over_a_loader() -> None:
    model, batches = small_net(), data(7)
    loader = DataLoader(TensorDataset(*batches[0]), batch_size=3)
    operator = GGNOperator(model, F.cross_entropy, loader)
    matrix = dense(operator)
    oracles.assert_close(matrix, matrix.T)
    assert torch.linalg.eigvalsh(matrix).min() > -1e-12
    v = oracles.random_vector(model)
    oracles.assert_close(operator @ v, oracles.ggnvp(model, F.cross_entropy, *batches[0], v))


@pytest.mark.parametrize("which", [["0.weight", "2.bias"], lambda name: name in ("0.weight", "2.bias")])
def test_a_choice_of_parameters_is_a_submatrix(which: Any) -> None:
    model, batches = small_net(), data(6)
    operator = HessianOperator(model, F.cross_entropy, batches, parameters=which)
    assert list(operator.parameters) == ["0.weight", "2.bias"]
    rows = [*range(20), *range(40, 43)]
    oracles.assert_close(dense(operator), hessian_of(model, batches)[rows][:, rows])
    assert all(p.requires_grad for p in model.parameters())


def test_an_operator_is_one_matrix_and_leaves_the_model_as_it_was() -> None:
    model, batches = small_net(norm=True), data(6, 6)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    state = torch.random.get_rng_state()
    operator = HessianOperator(model, F.cross_entropy, batches)
    v = oracles.random_vector(model)
    torch.random.set_rng_state(state)
    first, second = operator @ v, operator @ v
    assert all(torch.equal(first[name], second[name]) for name in first)
    matrix = dense(operator)  # with the same units dropped in every product
    oracles.assert_close(matrix, matrix.T)
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, t in model.state_dict().items():
        assert torch.equal(t, before[name])


def test_scipy_finds_the_same_eigenvalues() -> None:
    model, batches = small_net(), data(6, 4)
    operator = HessianOperator(model, F.cross_entropy, batches, keep=True)
    linear = operator.to_scipy()
    matrix = dense(operator).numpy()
    assert linear.dtype == np.float64
    np.testing.assert_allclose(linear @ np.eye(43), matrix, atol=1e-12)
    np.testing.assert_allclose(linear @ np.ones(43), matrix.sum(1), atol=1e-12)
    values = eigsh(linear, k=3, which="LA", return_eigenvectors=False)
    np.testing.assert_allclose(np.sort(values), np.linalg.eigvalsh(matrix)[-3:], atol=1e-9)


@pytest.mark.parametrize("kind", [HessianOperator, GGNOperator])
def test_rows_and_lists_are_the_same_vectors(kind: type[CurvatureOperator]) -> None:
    model, batches = small_net(), data(6, 4)
    operator = kind(model, F.cross_entropy, batches, damping=0.1, keep=True)
    matrix, like = dense(operator), operator.parameters
    assert (operator.dtype, operator.device) == (torch.float64, torch.device("cpu"))
    assert operator.adjoint() is operator
    for columns in (torch.randn(43, dtype=torch.float64), torch.randn(43, 3, dtype=torch.float64)):
        oracles.assert_close(operator @ columns, matrix @ columns)
        parts = [
            part.reshape(*p.shape, *columns.shape[1:])
            for part, p in zip(columns.split([p.numel() for p in like.values()]), like.values(), strict=True)
        ]
        product = operator @ parts
        assert [t.shape for t in product] == [t.shape for t in parts]
        rows = torch.cat([t.reshape(p.numel(), -1) for t, p in zip(product, like.values(), strict=True)])
        oracles.assert_close(rows.reshape(columns.shape), matrix @ columns)


def test_kept_batches_notice_what_is_written_through_data() -> None:
    model = small_net()
    operator, v = HessianOperator(model, F.cross_entropy, data(6), keep=True), oracles.random_vector(model)
    operator @ v
    model[0].weight.data.add_(1.0)
    with pytest.raises(
        RuntimeError, match=r"^model: '0\.weight' has changed since its batches were linearised"
    ):
        operator @ v


def test_rows_of_parameters_that_are_numbers() -> None:
    class Scaled(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 3, dtype=torch.float64)
            self.temperature = nn.Parameter(torch.tensor(0.7).double())

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.temperature[None].exp()

    model, (batch,) = Scaled(), data(6)
    operator = HessianOperator(model, F.cross_entropy, [batch])
    v = oracles.random_vector(model)
    expected = oracles.hvp(model, F.cross_entropy, *batch, v)
    rows = operator @ torch.cat([v[name].flatten() for name in operator.parameters])
    oracles.assert_close(rows, torch.cat([expected[name].flatten() for name in operator.parameters]))


def test_wrong_rows_and_lists() -> None:
    operator = HessianOperator(small_net(), F.cross_entropy, data(6))
    parts = [torch.zeros_like(p) for p in operator.parameters.values()]
    with pytest.raises(ValueError, match=r"v must have shape \[43\] or \[43, k\], got \(3, 43\)"):
        operator @ torch.zeros(3, 43, dtype=torch.float64)
    with pytest.raises(
        TypeError, match=r"v must have the dtype of the parameters, torch\.float64, got torch\.float32"
    ):
        operator @ torch.zeros(43)
    with pytest.raises(ValueError, match="v must have 4 tensors, one a parameter, got 3"):
        operator @ parts[:3]
    with pytest.raises(TypeError, match="v must be a list of Tensors, got one with float"):
        operator @ [*parts[:3], 1.0]  # type: ignore[list-item]
    with pytest.raises(
        ValueError, match=r"v must be one vector, or stacks of one size, got 2 in '0\.weight', one in"
    ):
        operator @ [torch.zeros(5, 4, 2, dtype=torch.float64), *parts[1:]]
    with pytest.raises(TypeError, match="v must be a dict of tensors by parameter name, got int"):
        operator @ 3  # type: ignore[operator]


def test_curvlinops_takes_an_operator_for_one_of_its_own() -> None:
    peers = pytest.importorskip("curvlinops")
    model, batches = small_net(), data(6, 4)
    ours = GGNOperator(model, F.cross_entropy, batches, keep=True)
    theirs = peers.GGNLinearOperator(model, nn.CrossEntropyLoss(), [*model.parameters()], batches)
    assert (ours.shape, ours.dtype, ours.device) == (theirs.shape, theirs.dtype, theirs.device)
    matrix = torch.randn(43, 4, dtype=torch.float64)
    oracles.assert_close(ours @ matrix, theirs @ matrix)
    columns = [torch.randn(*p.shape, 2, dtype=torch.float64) for p in model.parameters()]
    oracles.assert_close(dict(enumerate(ours @ columns)), dict(enumerate(theirs @ columns)))
    for estimate in (peers.hutchinson_trace, peers.hutchpp_trace, peers.xtrace, peers.xdiag):
        torch.manual_seed(0)
        want = estimate(theirs, 12)
        torch.manual_seed(0)
        torch.testing.assert_close(estimate(ours, 12), want)
    part = peers.SubmatrixLinearOperator(ours, [0, 5, 7], [1, 5])
    eye = torch.eye(2, dtype=torch.float64)
    oracles.assert_close(part @ eye, dense(ours)[[0, 5, 7]][:, [1, 5]])
    np.testing.assert_allclose(
        ours.to_scipy() @ matrix.numpy(), theirs.to_scipy() @ matrix.numpy(), atol=1e-12
    )


def test_scipy_gets_the_dtype_it_asks_for() -> None:
    model, batches = small_net().float(), [(x.float(), y) for x, y in data(6)]
    operator = HessianOperator(model, F.cross_entropy, batches)
    assert operator.to_scipy().dtype == np.float32
    linear = operator.to_scipy(np.float64)
    assert linear.dtype == np.float64
    assert (linear @ np.ones(43)).dtype == np.float64
    narrow = HessianOperator(model.bfloat16(), F.cross_entropy, [(x.bfloat16(), y) for x, y in batches])
    assert (narrow.to_scipy() @ np.ones(43)).dtype == np.float32


@pytest.mark.parametrize("keep", [False, True])
def test_products_of_vectors_that_require_a_gradient_are_constants(keep: bool) -> None:
    model = small_net()
    operator = HessianOperator(model, F.cross_entropy, data(4, 1), damping=0.5, keep=keep)
    v = oracles.random_vector(model)
    product = operator @ {name: t.clone().requires_grad_() for name, t in v.items()}
    assert not any(
        t.requires_grad for t in product.values()
    )  # its gradient by v would be the damping's alone
    oracles.assert_close(product, operator @ v)


def test_wrong_operators() -> None:
    model, batches = small_net(), data(6)
    v = oracles.random_vector(model)
    with pytest.raises(ValueError, match="loader gave no batch"):
        HessianOperator(model, F.cross_entropy, []) @ v
    with pytest.raises(ValueError, match="good for one product"):
        HessianOperator(model, F.cross_entropy, iter(batches))
    with pytest.raises(ValueError, match="reduction must be one of 'mean', 'sum', got 'max'"):
        HessianOperator(model, F.cross_entropy, batches, reduction="max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"parameters: nonsense are no parameters"):
        HessianOperator(model, F.cross_entropy, batches, parameters=["nonsense", "0.bias"])
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        HessianOperator(nn.Sequential(nn.Tanh()), F.cross_entropy, batches)
    with pytest.raises(
        TypeError, match="parameters must be a list of names or a function of a name, got the int 3"
    ):
        HessianOperator(model, F.cross_entropy, batches, parameters=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="damping must be a number, got str"):
        HessianOperator(model, F.cross_entropy, batches, damping="1e-3")  # type: ignore[arg-type]
    with pytest.raises(
        TypeError, match=r"loss_fn must be a function of \(model output, target\), got NoneType"
    ):
        HessianOperator(model, None, batches)  # type: ignore[arg-type]
    operator = HessianOperator(model, F.cross_entropy, batches)
    with pytest.raises(ValueError, match=r"missing: 0\.bias"):
        operator @ {name: t for name, t in v.items() if name != "0.bias"}


def test_conjugate_gradients_solve_a_stack() -> None:
    a = spd()
    b = torch.randn(3, 12, dtype=torch.float64)
    b[1] = 0.0
    solution = cg_solve(Matrix(a), {"p": b}, tol=1e-10)
    oracles.assert_close(solution.x["p"], torch.linalg.solve(a, b.T).T, atol=1e-8)
    assert solution.converged.tolist() == [True] * 3
    assert not solution.indefinite.any()
    assert solution.steps <= 14
    single = cg_solve(Matrix(a), {"p": b[0]}, tol=1e-10)
    oracles.assert_close(single.x["p"], solution.x["p"][0], atol=1e-8)
    assert single.converged.shape == ()
    again = cg_solve(Matrix(a), {"p": b}, x0=solution.x, tol=1e-8)
    assert again.steps == 1


def test_a_preconditioner_saves_steps() -> None:
    a = spd() + torch.diag(torch.logspace(0, 5, 12, dtype=torch.float64))
    b = {"p": torch.randn(12, dtype=torch.float64)}
    plain, jacobi = Matrix(a), Matrix(a)
    cg_solve(plain, b, tol=1e-8, max_steps=200)
    solution = cg_solve(
        jacobi, b, tol=1e-8, max_steps=200, preconditioner=lambda r: {"p": r["p"] / a.diagonal()}
    )
    assert solution.converged
    oracles.assert_close(solution.x["p"], torch.linalg.solve(a, b["p"]), rtol=1e-5, atol=1e-7)
    assert jacobi.products < plain.products


def test_indefinite_operators_are_reported_column_by_column() -> None:
    a = torch.diag(torch.tensor([1.0, 2.0, -3.0, 4.0], dtype=torch.float64))
    b = torch.eye(4, dtype=torch.float64)[[0, 2, 3]]
    operator = Matrix(a)
    with pytest.warns(UserWarning, match="not positive definite"):
        solution = cg_solve(operator, {"p": b})
    assert solution.indefinite.tolist() == [False, True, False]
    assert solution.converged.tolist() == [True, False, True]
    assert operator.products <= 2
    assert solution.x["p"].isfinite().all()
    with pytest.warns(UserWarning, match="not positive definite"):
        late = cg_solve(Matrix(a), {"p": torch.ones(4, dtype=torch.float64)})
    assert late.indefinite
    assert late.x["p"].isfinite().all()


def test_steps_end() -> None:
    solution = cg_solve(Matrix(spd(condition=1e8)), {"p": torch.ones(12, dtype=torch.float64)}, max_steps=3)
    assert solution.steps == 3
    assert not solution.converged
    assert solution.residual > 1e-5


class Reads(TorchDispatchMode):
    """Counts what is read back from tensors: on a GPU, the times that Python waits."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "run",
    [
        lambda a, steps: cg_solve(a, {"p": torch.ones(2, 12).double()}, tol=0.0, max_steps=steps),
        lambda a, steps: neumann_solve(a, {"p": torch.ones(12).double()}, scale=1e-3, max_steps=steps),
        lambda a, steps: lanczos(a, steps, generator=seeded()),
    ],
    ids=["cg", "neumann", "lanczos"],
)
def test_an_iteration_reads_one_flag(run: Any) -> None:
    counts = []
    for steps in (3, 8):
        operator = Matrix(spd())
        with Reads() as reads:
            run(operator, steps)
        assert operator.products == steps
        counts.append(reads.count)
    assert counts[1] - counts[0] == 5


def test_neumann_series() -> None:
    a, b = spd(condition=10.0), torch.randn(2, 12, dtype=torch.float64)
    solution = neumann_solve(Matrix(a), {"p": b}, scale=0.15, tol=1e-8, max_steps=500)
    assert solution.converged.all()
    oracles.assert_close(solution.x["p"], torch.linalg.solve(a, b.T).T, atol=1e-6)
    with pytest.warns(UserWarning, match="the series diverges at scale=0.5"):
        diverging = neumann_solve(Matrix(a), {"p": b}, scale=0.5, max_steps=500)
    assert not diverging.converged.any()
    assert diverging.steps < 30
    with pytest.raises(ValueError, match="scale must be positive, got 0"):
        neumann_solve(Matrix(a), {"p": b}, scale=0)


@pytest.mark.parametrize("solve", [cg_solve, lambda *args: neumann_solve(*args, scale=0.1)])
def test_right_hand_sides_that_do_not_fit(solve: Any) -> None:
    with pytest.raises(ValueError, match="b must be finite"):
        solve(Matrix(spd()), {"p": torch.full((12,), torch.nan, dtype=torch.float64)})
    with pytest.raises(ValueError, match=r"b\['p'\] must have the shape of the parameter"):
        solve(Matrix(spd()), {"p": torch.ones(5, dtype=torch.float64)})
    ones = torch.ones(2, 12, dtype=torch.float64)
    with pytest.raises(ValueError, match="x0 must be a stack like b"):
        cg_solve(Matrix(spd()), {"p": ones[0]}, x0={"p": ones})


@pytest.mark.parametrize("method", ["cg", "neumann"])
def test_inverse_hvp(method: Any) -> None:
    model, batches = small_net(), data(8)
    b = oracles.random_vector(model)
    options = {"tol": 1e-9, "max_steps": 3000} | ({"scale": 0.4} if method == "neumann" else {})
    solution = inverse_hvp(
        model, F.cross_entropy, batches, b, damping=0.2, curvature="ggn", method=method, **options
    )
    matrix = dense(GGNOperator(model, F.cross_entropy, batches, damping=0.2))
    assert solution.converged
    oracles.assert_close(flatten(solution.x, b), torch.linalg.solve(matrix, flatten(b, b)), atol=1e-7)
    with pytest.raises(ValueError, match="method must be one of"):
        inverse_hvp(model, F.cross_entropy, batches, b, damping=0.1, method="lu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="curvature must be one of"):
        inverse_hvp(model, F.cross_entropy, batches, b, damping=0.1, curvature="fisher")  # type: ignore[arg-type]


def test_lanczos_finds_the_spectrum() -> None:
    model, batches = small_net(), data(9)
    operator = HessianOperator(model, F.cross_entropy, batches, keep=True)
    exact, gen = torch.linalg.eigvalsh(dense(operator)), torch.Generator().manual_seed(0)
    ritz = lanczos(operator, 25, vectors=True, generator=gen)
    oracles.assert_close(ritz.values[-4:], exact[-4:], atol=1e-8)
    distance = (ritz.values[:, None] - exact).abs().min(1).values
    assert (distance <= ritz.residuals + 1e-10).all()
    assert ritz.weights.sum().item() == pytest.approx(1.0)
    assert ritz.vectors is not None
    top = oracles.element(ritz.vectors, -1)
    product = flatten(operator @ top, top)
    oracles.assert_close(product, ritz.values[-1] * flatten(top, top), atol=1e-7)
    plain = lanczos(operator, 25, reorthogonalize=False, generator=gen)
    assert plain.values[-1].item() == pytest.approx(exact[-1].item(), abs=1e-8)


def test_lanczos_ends_in_an_invariant_subspace() -> None:
    a = torch.diag(torch.tensor([1.0, 1.0, 2.0, 5.0], dtype=torch.float64))
    ritz = lanczos(Matrix(a), 10, start={"p": torch.tensor([1.0, 1.0, 1.0, 0.0]).double()})
    oracles.assert_close(ritz.values, torch.tensor([1.0, 2.0]).double())
    oracles.assert_close(ritz.weights, torch.tensor([2.0, 1.0]).double() / 3.0)
    with pytest.raises(ValueError, match="start must have a positive norm"):
        lanczos(Matrix(a), start={"p": torch.zeros(4).double()})
    with pytest.raises(ValueError, match="steps must be at least 1"):
        lanczos(Matrix(a), 0)
    with pytest.raises(ValueError, match="start must be a single vector"):
        lanczos(Matrix(a), start={"p": torch.ones(2, 4).double()})


def test_lanczos_refuses_products_that_are_not_finite() -> None:
    with pytest.raises(FloatingPointError, match="products are not finite"):
        lanczos(Matrix(spd() * torch.nan), 3)
    with pytest.raises(FloatingPointError, match="products are not finite"):
        spectral_density(Matrix(spd() * torch.inf), 3, 2)


@pytest.mark.parametrize("at_once", [1, 3, 8])
def test_the_density_has_its_starts_moments(at_once: int) -> None:
    """Gauss quadrature: of each start, all moments of a degree below 2 · steps."""
    a, steps, samples = spd(30), 4, 7
    density = spectral_density(Matrix(a), steps, samples, at_once=at_once, generator=seeded())
    gen = seeded()
    starts = torch.stack([torch.randn(30, generator=gen, dtype=torch.float64) for _ in range(samples)])
    starts /= starts.norm(dim=1, keepdim=True)
    assert len(density.values) == steps * samples
    assert (density.values.diff() >= 0).all()
    power = starts
    for degree in range(2 * steps):
        moment = (starts * power).sum(1).mean()
        assert (density.weights * density.values**degree).sum().item() == pytest.approx(moment.item(), 1e-9)
        power = power @ a


def test_the_density_is_that_of_a_known_spectrum() -> None:
    values = torch.cat([torch.zeros(150), torch.linspace(-1, 2, 150), torch.tensor([9.0])]).double()
    operator = Matrix(torch.diag(values))
    density = spectral_density(operator, 40, 30, at_once=10, generator=seeded())
    assert operator.products == 3 * 40
    assert density.weights.sum().item() == pytest.approx(1.0)
    assert density.values[-1].item() == pytest.approx(9.0)
    for point in (-0.5, -0.1, 0.1, 0.5, 1.5, 5.0):
        below = density.weights[density.values <= point].sum().item()
        assert below == pytest.approx((values <= point).double().mean().item(), abs=0.02)
    width = 0.3
    points = torch.linspace(-4, 12, 2000, dtype=torch.float64)
    exact = torch.distributions.Normal(values, width).log_prob(points[:, None]).exp().mean(1)
    assert torch.trapezoid(density(points, width), points).item() == pytest.approx(1.0, abs=1e-6)
    assert (density(points, width) - exact).abs().max() < 0.03 * exact.max()


def test_a_density_of_few_values_ends_early() -> None:
    a = torch.diag(torch.tensor([1.0, 1.0, 1.0, 4.0], dtype=torch.float64))
    density = spectral_density(Matrix(a), 30, 3, at_once=2, generator=seeded())
    oracles.assert_close(density.values, torch.tensor([1.0, 1.0, 1.0, 4.0, 4.0, 4.0]).double())
    identity = spectral_density(Matrix(torch.eye(3).double()), 2, 1)
    oracles.assert_close(identity.weights, torch.ones(1).double())
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        spectral_density(Matrix(a), 0)
    with pytest.raises(ValueError, match="samples and at_once must be at least 1, got 0 and 1"):
        spectral_density(Matrix(a), samples=0)
    with pytest.raises(ValueError, match="width must be positive, got 0"):
        density(torch.zeros(2), 0)


def test_a_widened_mass_is_a_gaussian() -> None:
    density = SpectralDensity(torch.tensor([2.0]).double(), torch.ones(1).double())
    points = torch.tensor([[1.0, 2.0], [2.5, 9.0]])
    expected = torch.exp(-2 * (points.double() - 2.0).square()) * (2 / torch.pi) ** 0.5
    oracles.assert_close(density(points, 0.5), expected)


@pytest.mark.parametrize("at_once", [1, 7])
def test_trace(at_once: int) -> None:
    a = spd()
    estimate = hutchinson_trace(Matrix(a), 400, at_once=at_once, generator=torch.Generator().manual_seed(0))
    exact = a.trace().item()
    assert abs(estimate.value - exact) < 4 * estimate.standard_error
    assert estimate.standard_error < 0.1 * exact
    diagonal = hutchinson_trace(Matrix(torch.diag(a.diagonal())), 1)
    assert diagonal.value == pytest.approx(exact)  # signs square to one
    with pytest.raises(ValueError, match="samples and at_once must be at least 1"):
        hutchinson_trace(Matrix(a), 0)


def test_progress_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    model, batches = small_net(), data(6)
    operator = HessianOperator(model, F.cross_entropy, batches, progress=True)
    lanczos(operator, 2, progress=True)
    shown = capsys.readouterr().err
    assert "HessianOperator" in shown
    assert "Lanczos" in shown
