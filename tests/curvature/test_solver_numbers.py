"""Solvers and estimates on numbers of any size and operators of any manners, against dense float64 ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import oracles
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blokern import ops
from blokern.curvature import (
    GGNOperator,
    HessianOperator,
    Solution,
    cg_solve,
    hutchinson_trace,
    inverse_hvp,
    lanczos,
    neumann_solve,
    spectral_density,
)
from blokern.curvature.vectors import flatten, unflatten

N = 12


class Matrix:
    """A matrix on a vector of two parameters, in a dtype."""

    def __init__(
        self, matrix: Tensor, dtype: torch.dtype = torch.float64, sizes: tuple[int, int] = (5, 7)
    ) -> None:
        self.matrix = matrix.double()
        self.parameters = {"a": torch.zeros(sizes[0], dtype=dtype), "b": torch.zeros(sizes[1], dtype=dtype)}
        self.products = 0

    def vector(self, row: Tensor) -> dict[str, Tensor]:
        return unflatten(row, self.parameters)

    def __matmul__(self, v: Mapping[str, Tensor]) -> dict[str, Tensor]:
        self.products += 1
        return self.vector(flatten(v, self.parameters).double() @ self.matrix.T)


def spd(condition: float = 10.0) -> Tensor:
    gen = torch.Generator().manual_seed(2)
    q = torch.linalg.qr(torch.randn(N, N, generator=gen, dtype=torch.float64)).Q
    values = torch.logspace(0, torch.tensor(condition).log10().item(), N, dtype=torch.float64)
    return q @ torch.diag(values) @ q.T


def right(*lead: int) -> Tensor:
    return torch.randn(*lead, N, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def assert_solves(solution: Solution, operator: Matrix, b: Mapping[str, Tensor], tol: float) -> None:
    """converged and residual say the truth about x."""
    x, row = (flatten(v, operator.parameters).double() for v in (solution.x, b))
    size = row.norm(dim=-1)
    true = (row - x @ operator.matrix.T).norm(dim=-1) / torch.where(size > 0, size, 1.0)
    assert solution.converged.all()
    assert (solution.residual <= tol).all()
    assert (true <= 1.05 * tol).all(), true


def neumann(operator: Any, b: Any, **options: Any) -> Solution:
    top = torch.linalg.eigvalsh(operator.matrix)[-1].item()
    return neumann_solve(operator, b, scale=1 / top, max_steps=500, **options)


SIZES = [1e-37, 1e-30, 1e-23, 1e-10, 1.0, 1e10, 1e19, 1e23, 1e30]


@pytest.mark.parametrize("solve", [cg_solve, neumann])
@pytest.mark.parametrize("size", SIZES)
def test_right_hand_sides_of_any_size(size: float, solve: Any) -> None:
    operator = Matrix(spd(), torch.float32)
    b = operator.vector(right(3) * torch.tensor([[size], [1.0], [0.0]]))
    solution = solve(operator, b, tol=1e-5)
    assert_solves(solution, operator, b, 1e-5)
    assert torch.equal(solution.x["a"][2], torch.zeros(5))
    alone = solve(operator, {name: t[0] for name, t in b.items()}, tol=1e-5)
    assert_solves(alone, operator, {name: t[0] for name, t in b.items()}, 1e-5)
    assert alone.steps > 2


@pytest.mark.parametrize("size", [1e-30, 1e-23, 1e23, 1e30])
def test_operators_of_any_size(size: float) -> None:
    operator = Matrix(size * spd(), torch.float32)
    b = operator.vector(right())
    assert_solves(cg_solve(operator, b), operator, b, 1e-5)
    assert_solves(neumann(operator, b), operator, b, 1e-5)
    exact = torch.linalg.eigvalsh(operator.matrix)
    ritz = lanczos(operator, N, vectors=True)
    assert len(ritz.values) == N
    torch.testing.assert_close(ritz.values, exact, rtol=1e-4, atol=1e-6 * exact[-1].item())
    assert ((ritz.values - exact).abs() <= ritz.residuals).all()
    gen = torch.Generator().manual_seed(0)
    plain = lanczos(operator, 10, reorthogonalize=False, generator=gen)
    assert plain.values[-1].item() == pytest.approx(exact[-1].item(), rel=0.05)
    density = spectral_density(operator, 10, 3, generator=gen)
    assert density.values[-1].item() == pytest.approx(exact[-1].item(), rel=0.05)
    trace = hutchinson_trace(operator, 400, at_once=50, generator=gen)
    assert abs(trace.value - exact.sum().item()) < 5 * trace.standard_error


def test_preconditioners_of_any_size() -> None:
    a = spd() + torch.diag(torch.logspace(0, 4, N, dtype=torch.float64))
    operator = Matrix(a, torch.float32)
    b, diagonal = operator.vector(right(2)), operator.vector(a.diagonal())
    steps = set()
    for size in (1e-30, 1.0, 1e30):
        solution = cg_solve(
            operator, b, preconditioner=lambda r, size=size: {k: size * r[k] / diagonal[k] for k in r}
        )
        assert_solves(solution, operator, b, 1e-5)
        steps.add(solution.steps)
    assert len(steps) == 1
    assert steps.pop() < cg_solve(operator, b).steps


def test_a_start_of_any_size() -> None:
    operator = Matrix(spd(), torch.float32)
    for size, start in ((1e-20, 1.0), (1.0, 1e-30), (1.0, 1e15)):
        b, x0 = operator.vector(right() * size), operator.vector(right().flip(0) * start)
        given = {name: t.clone() for name, t in x0.items()}
        solution = cg_solve(operator, b, x0=x0, max_steps=300)
        assert_solves(solution, operator, b, 1e-5)
        assert all(torch.equal(x0[name], given[name]) for name in x0)


def test_of_nothing_the_solution_is_nothing() -> None:
    operator = Matrix(spd())
    zero = operator.vector(torch.zeros(2, N).double())
    solution = cg_solve(operator, zero, x0=operator.vector(right(2)))
    assert solution.converged.all()
    assert solution.steps <= 1
    assert all((t == 0).all() for t in solution.x.values())
    assert (solution.residual == 0).all()


@pytest.mark.parametrize(("solve", "condition"), [(cg_solve, 1e3), (neumann, 50.0)])
def test_converged_is_the_truth(solve: Any, condition: float) -> None:
    """In float32 an ill-conditioned system's carried residual goes on falling where its own does not."""
    operator = Matrix(spd(condition), torch.float32)
    b = operator.vector(right(2))
    assert_solves(solve(operator, b, tol=5e-5), operator, b, 5e-5)
    beyond = solve(operator, b, tol=1e-10)
    assert not beyond.converged.any()
    row, x = (torch.cat([v["a"], v["b"]], 1).double() for v in (b, beyond.x))
    true = (row - x @ operator.matrix.T).norm(dim=1) / row.norm(dim=1)
    assert (beyond.residual < 1e-4).all()
    assert (true < 20 * beyond.residual + 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    operator = Matrix(spd(4.0), dtype)
    b = operator.vector(right(2))
    for solve in (cg_solve, neumann):
        solution = solve(operator, b, tol=0.02)
        assert solution.x["a"].dtype == dtype
        assert_solves(solution, operator, b, 0.02)
        hopeless = solve(operator, b, tol=1e-6)
        assert not hopeless.converged.any()
        assert (hopeless.residual > 1e-6).all()
        x = torch.cat([hopeless.x["a"], hopeless.x["b"]], 1).double()
        row = torch.cat([b["a"], b["b"]], 1).double()
        torch.testing.assert_close(x, torch.linalg.solve(operator.matrix, row.T).T, rtol=0.05, atol=0.05)
    exact = torch.linalg.eigvalsh(operator.matrix)
    ritz = lanczos(operator, N)
    torch.testing.assert_close(ritz.values[[0, -1]], exact[[0, -1]], rtol=0.02, atol=0.02)
    assert hutchinson_trace(operator, 200).value == pytest.approx(exact.sum().item(), rel=0.1)


def test_float16_sums_over_many_samples() -> None:
    """40,000 samples' products are a mean, not a sum that float16 does not have."""
    torch.manual_seed(0)
    x, y = torch.randn(40_000, 3), torch.randn(40_000, 1)
    model = nn.Linear(3, 1)
    parts = [(x[:30_000], y[:30_000]), (x[30_000:], y[30_000:])]
    v = oracles.random_vector(model)
    expected = HessianOperator(model, F.mse_loss, parts) @ v
    model.half()
    halves = [(a.half(), b.half()) for a, b in parts]
    product = HessianOperator(model, F.mse_loss, halves) @ {name: t.half() for name, t in v.items()}
    for name, t in expected.items():
        assert product[name].dtype == torch.float16
        torch.testing.assert_close(product[name].float(), t, rtol=0.02, atol=0.02)


def solvers() -> dict[str, Callable[[Any, Any], Any]]:
    return {
        "cg": lambda a, b: cg_solve(a, b),
        "cg with x0": lambda a, b: cg_solve(a, b, x0=b),
        "neumann": lambda a, b: neumann_solve(a, b, scale=0.1),
        "lanczos": lambda a, b: lanczos(a, 3),
        "trace": lambda a, b: hutchinson_trace(a, 2),
        "density": lambda a, b: spectral_density(a, 3, 2),
    }


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", solvers())
def test_products_that_are_not_finite(name: str, bad: float) -> None:
    matrix = spd()
    matrix[3, 4] = bad
    operator = Matrix(matrix)
    with pytest.raises(
        FloatingPointError, match=r"operator @ v must be finite|the operator's products are not finite"
    ):
        solvers()[name](operator, operator.vector(right()))


def test_one_system_of_a_stack_that_is_not_finite() -> None:
    class Late(Matrix):
        def __matmul__(self, v: Mapping[str, Tensor]) -> dict[str, Tensor]:
            product = super().__matmul__(v)
            if self.products == 3:
                product["a"][1] = torch.nan
            return product

    for solve in (cg_solve, neumann):
        operator = Late(spd())
        with pytest.raises(FloatingPointError, match="operator @ v must be finite"):
            solve(operator, operator.vector(right(3)))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_vectors_that_are_not_finite(bad: float) -> None:
    operator = Matrix(spd())
    wrong = operator.vector(right())
    wrong["a"][0] = bad
    for solve in (cg_solve, neumann):
        with pytest.raises(ValueError, match="b must be finite"):
            solve(operator, wrong)
    with pytest.raises(ValueError, match="x0 must be finite"):
        cg_solve(operator, operator.vector(right()), x0=wrong)
    with pytest.raises(ValueError, match="start must have a positive norm"):
        lanczos(operator, start=wrong)
    with pytest.raises(ValueError, match="preconditioner must be positive definite"):
        cg_solve(operator, operator.vector(right()), preconditioner=lambda r: wrong)


def test_x_that_no_float_holds() -> None:
    operator = Matrix(1e-30 * spd(), torch.float32)
    with pytest.raises(FloatingPointError, match="x is not finite: it is too large for its dtype"):
        cg_solve(operator, operator.vector(1e20 * right()))


class Manners(Matrix):
    """Gives back what a caller might not expect."""

    def __init__(self, matrix: Tensor, manner: str) -> None:
        super().__init__(matrix)
        self.manner = manner
        self.buffer: dict[str, Tensor] = {}

    def __matmul__(self, v: Mapping[str, Tensor]) -> dict[str, Tensor]:
        product = super().__matmul__(v)
        if self.manner == "other order":
            return dict(reversed(product.items()))
        if self.manner == "requires grad":
            return {name: t.requires_grad_() for name, t in product.items()}
        if self.manner == "same buffer":
            return {n: self.buffer.setdefault(f"{n} {len(t)}", t).copy_(t) for n, t in product.items()}
        if self.manner == "strided":
            return {name: torch.stack([t, t], -1)[..., 0] for name, t in product.items()}
        return product


@pytest.mark.parametrize("manner", ["other order", "requires grad", "same buffer", "strided"])
def test_operators_of_other_manners(manner: str) -> None:
    for solve in (cg_solve, neumann):
        operator = Manners(spd(), manner)
        b = operator.vector(right(2))
        assert_solves(solve(operator, dict(reversed(b.items()))), operator, b, 1e-5)
    assert_solves(cg_solve(operator, b, x0=b), operator, b, 1e-5)
    exact = torch.linalg.eigvalsh(operator.matrix)
    oracles.assert_close(lanczos(operator, N).values, exact, atol=1e-9)


class Swap:
    """A symmetric matrix whose products are views of its vectors: 2 · 2 entries transposed."""

    parameters: ClassVar = {"p": torch.zeros(2, 2, dtype=torch.float64)}

    def __matmul__(self, v: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"p": v["p"].mT}


class Identity(Swap):
    def __matmul__(self, v: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return v


def test_products_that_are_the_vector_itself_or_a_view() -> None:
    b = {"p": torch.tensor([[1.0, 2.0], [5.0, 7.0]]).double()}
    before = b["p"].clone()
    for solution in (
        cg_solve(Identity(), b),
        neumann_solve(Identity(), b, scale=1.0),
        cg_solve(Identity(), b, x0=b),
    ):
        assert solution.converged
        oracles.assert_close(solution.x["p"], before)
    # Its eigenvalues are 1 and -1: one step of the series is r − s rᵀ.
    step = neumann_solve(Swap(), b, scale=0.5, max_steps=2)
    oracles.assert_close(step.x["p"], 0.5 * before + 0.5 * (before - 0.5 * before.T))
    assert torch.equal(b["p"], before)
    values = lanczos(Swap(), 4, generator=torch.Generator().manual_seed(0)).values
    oracles.assert_close(values, torch.tensor([-1.0, 1.0]).double())
    assert hutchinson_trace(Swap(), 200, generator=torch.Generator().manual_seed(0)).value == pytest.approx(
        2, abs=1
    )


def test_operators_that_write_to_their_vector_are_refused() -> None:
    class Writes(Matrix):
        def __matmul__(self, v: Mapping[str, Tensor]) -> dict[str, Tensor]:
            product = super().__matmul__(v)
            v["b"].zero_()
            return product

    for name, run in solvers().items():
        operator = Writes(spd())
        with pytest.raises(ValueError, match="operator @ v must leave v as it is"):
            run(operator, operator.vector(right()))
        assert name


def test_preconditioners_that_write_in_place_or_use_one_buffer() -> None:
    a = spd() + torch.diag(torch.logspace(0, 3, N, dtype=torch.float64))
    operator = Matrix(a)
    b, diagonal = operator.vector(right(2)), operator.vector(a.diagonal())
    buffer = {name: torch.empty_like(t) for name, t in b.items()}

    def writes(r: dict[str, Tensor]) -> dict[str, Tensor]:
        for name, t in r.items():
            t.div_(diagonal[name])
        return r

    def reuses(r: dict[str, Tensor]) -> dict[str, Tensor]:
        for name, t in r.items():
            torch.div(t, diagonal[name], out=buffer[name])
        return dict(reversed(buffer.items()))

    def differentiable(r: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: (t.requires_grad_() / diagonal[name]).view_as(t) for name, t in r.items()}

    plain = cg_solve(operator, b, preconditioner=lambda r: {k: r[k] / diagonal[k] for k in r})
    for preconditioner in (writes, reuses, differentiable, lambda r: r):
        solution = cg_solve(operator, b, preconditioner=preconditioner)
        assert_solves(solution, operator, b, 1e-5)
        assert solution.steps == plain.steps or preconditioner(dict(b)) is not None


@pytest.mark.parametrize(
    ("preconditioner", "message"),
    [
        (lambda r: {k: -t for k, t in r.items()}, "preconditioner must be positive definite"),
        (lambda r: {k: 0 * t for k, t in r.items()}, "preconditioner must be positive definite"),
        (lambda r: {k: torch.nan * t for k, t in r.items()}, "preconditioner must be positive definite"),
        (
            lambda r: {k: t[0] for k, t in r.items()},
            r"preconditioner\(b\)\['a'\] must have the shape|stack like b",
        ),
        (lambda r: {"a": r["a"]}, r"preconditioner\(b\) must have an entry for each parameter .* missing: b"),
    ],
)
def test_wrong_preconditioners(preconditioner: Any, message: str) -> None:
    operator = Matrix(spd())
    with pytest.raises(ValueError, match=message):
        cg_solve(operator, operator.vector(right(2)), preconditioner=preconditioner)


def test_an_indefinite_operator_is_told() -> None:
    matrix = spd() - 5 * torch.eye(N).double()
    operator = Matrix(matrix)
    with pytest.warns(UserWarning, match="cg_solve: operator is not positive definite"):
        solution = cg_solve(operator, operator.vector(right()))
    assert solution.indefinite
    assert not solution.converged
    assert solution.residual > 1e-5
    negative = GGNOperator(
        nn.Linear(3, 2), F.cross_entropy, [(torch.randn(4, 3), torch.arange(4) % 2)], damping=-1.0
    )
    with pytest.warns(UserWarning, match="add damping"):
        assert cg_solve(negative, {k: torch.ones_like(p) for k, p in negative.parameters.items()}).indefinite


def test_a_singular_operator_and_what_it_cannot_reach() -> None:
    matrix = torch.diag(torch.tensor([1.0, 2.0] * 5 + [0.0, 0.0]).double())
    operator = Matrix(matrix)
    reached = operator.vector(torch.tensor([1.0, 3.0] * 5 + [0.0, 0.0]).double())
    assert_solves(cg_solve(operator, reached), operator, reached, 1e-5)
    with pytest.warns(UserWarning, match="not positive definite"):
        solution = cg_solve(operator, operator.vector(torch.ones(N).double()))
    assert not solution.converged


def test_operators_that_are_not_symmetric() -> None:
    matrix = torch.triu(spd()) + torch.eye(N).double()
    operator = Matrix(matrix)
    with pytest.raises(ValueError, match="operator must be symmetric"):
        lanczos(operator, 5)
    with pytest.raises(ValueError, match="operator must be symmetric"):
        spectral_density(operator, 5, 2, at_once=2)
    b = operator.vector(right())
    solution = cg_solve(operator, b, max_steps=200)  # whatever it says of convergence is true
    row, x = flatten(b, b), flatten(solution.x, b)
    true = (row - operator.matrix @ x).norm() / row.norm()
    assert bool(solution.converged) == bool(true <= 1e-5)
    assert hutchinson_trace(operator, 2000).value == pytest.approx(matrix.trace().item(), rel=0.2)
    assert lanczos(Matrix(torch.eye(N).double()), 5).values.tolist() == pytest.approx([1.0])


@pytest.mark.parametrize("stack", [0, 1, 5])
def test_stacks_of_any_size(stack: int) -> None:
    operator = Matrix(spd())
    b = operator.vector(right(stack))
    for solve in (cg_solve, neumann):
        solution = solve(operator, b)
        assert solution.x["a"].shape == (stack, 5)
        assert solution.residual.shape == solution.converged.shape == solution.indefinite.shape == (stack,)
        assert_solves(solution, operator, b, 1e-5)
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2)).double()
    data = [(torch.randn(4, 3).double(), torch.arange(4) % 2)]
    for keep in (False, True):
        hessian = HessianOperator(model, F.cross_entropy, data, damping=30.0, keep=keep)
        v = oracles.random_vector(model, stack)
        assert [t.shape for t in (hessian @ v).values()] == [t.shape for t in v.values()]
        assert (hessian @ torch.zeros(hessian.shape[0], stack).double()).shape == (hessian.shape[0], stack)
        assert cg_solve(hessian, v).converged.all()


def test_columns_that_end_at_different_times() -> None:
    matrix = torch.diag(torch.arange(1.0, N + 1).double())
    rows = torch.zeros(4, N).double()
    rows[0, 0], rows[1, :3], rows[2], rows[3, 4] = 1.0, 1.0, 1.0, 1e-30
    operator = Matrix(matrix)
    solution = cg_solve(operator, operator.vector(rows), tol=1e-10)
    assert_solves(solution, operator, operator.vector(rows), 1e-10)
    x = torch.cat([solution.x["a"], solution.x["b"]], 1)
    torch.testing.assert_close(x, rows / matrix.diagonal(), rtol=1e-8, atol=1e-40)


def test_running_out_of_steps_is_told() -> None:
    operator = Matrix(spd(1e6))
    b = operator.vector(right())
    for max_steps in (0, 1, 3):
        solution = cg_solve(operator, b, max_steps=max_steps)
        assert not solution.converged
        assert solution.steps == max_steps
        assert solution.residual > 1e-5
        assert not neumann_solve(operator, b, scale=1e-6, max_steps=max_steps).converged


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tol": -1.0}, "tol must be at least 0, got -1.0"),
        ({"tol": torch.nan}, "tol must be at least 0, got nan"),
        ({"max_steps": -1}, "max_steps must be at least 0, got -1"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    operator = Matrix(spd())
    for solve in (cg_solve, lambda *args, **k: neumann_solve(*args, scale=0.1, **k)):
        with pytest.raises(ValueError, match=message):
            solve(operator, operator.vector(right()), **options)
    with pytest.raises(ValueError, match="scale must be positive, got inf"):
        neumann_solve(operator, operator.vector(right()), scale=torch.inf)


class Of(Matrix):
    def __init__(self, parameters: Any) -> None:
        super().__init__(spd())
        self.parameters = parameters


@pytest.mark.parametrize(
    ("operator", "error", "message"),
    [
        (torch.eye(3), TypeError, "operator must have `parameters`.* got Tensor"),
        (nn.Linear(2, 2), TypeError, "operator must have `parameters`.* got Linear"),
        (Of({}), ValueError, "operator.parameters must have at least one entry"),
        (Of({"p": torch.zeros(0)}), ValueError, "operator.parameters must have at least one entry"),
        (
            Of({"p": torch.zeros(3, dtype=torch.complex64)}),
            TypeError,
            r"\['p'\] must be real floating-point, got",
        ),
        (
            Of({"p": torch.zeros(3, dtype=torch.int64)}),
            TypeError,
            r"\['p'\] must be real floating-point, got",
        ),
    ],
)
def test_what_is_no_operator(operator: Any, error: type[Exception], message: str) -> None:
    for run in solvers().values():
        with pytest.raises(error, match=message):
            run(operator, {"p": torch.zeros(3)})


def test_vectors_that_do_not_fit() -> None:
    operator = Matrix(spd())
    b = operator.vector(right())
    wrong: list[tuple[Any, type[Exception], str]] = [
        ({}, ValueError, "missing: a, b"),
        ({"a": b["a"]}, ValueError, "missing: b; unknown: none"),
        (b | {"c": b["a"]}, ValueError, "unknown: c"),
        (b | {3: b["a"], None: b["a"]}, ValueError, "unknown: 3, None"),
        (b | {"a": b["a"].long()}, TypeError, r"b\['a'\] must have the dtype of the parameter"),
        (b | {"a": b["a"].float()}, TypeError, r"b\['a'\] must have the dtype of the parameter"),
        (b | {"a": b["a"].to("meta")}, ValueError, r"b\['a'\] must be on the device of the parameter"),
        (
            b | {"a": b["a"].to_sparse()},
            TypeError,
            r"b\['a'\] must be dense, got the layout torch.sparse_coo",
        ),
        (b | {"a": b["a"].numpy()}, TypeError, r"b\['a'\] must be a Tensor, got ndarray"),
        (b | {"a": b["a"][None]}, ValueError, "must be one vector, or stacks of one size"),
        ([*b.values()], TypeError, "b must be a dict of tensors by parameter name, got list"),
    ]
    for v, error, message in wrong:
        for solve in (cg_solve, neumann):
            with pytest.raises(error, match=message):
                solve(operator, v)


def test_products_that_do_not_fit() -> None:
    class Gives(Matrix):
        def __matmul__(self, v: Mapping[str, Tensor]) -> Any:
            product = super().__matmul__(v)
            return product | {"a": product["a"].float()}

    for run in solvers().values():
        operator = Gives(spd())
        with pytest.raises(TypeError, match=r"operator @ v\['a'\] must have the dtype of the parameter"):
            run(operator, operator.vector(right()))


def test_parameters_of_several_dtypes_and_of_no_entries() -> None:
    torch.manual_seed(0)

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2).double()
            self.empty = nn.Parameter(torch.zeros(0))

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.tanh(self.first(x)).double()) + self.empty.sum()

    model, data = Mixed(), [(torch.randn(6, 3), torch.arange(6) % 2)]
    operator = GGNOperator(model, F.cross_entropy, data, damping=0.5)
    assert operator.dtype == torch.float64
    n = operator.shape[0]
    matrix = operator @ torch.eye(n, dtype=torch.float64)
    oracles.assert_close(matrix, matrix.T, rtol=1e-4, atol=1e-6)
    v = oracles.random_vector(model)
    oracles.assert_close(
        flatten(operator @ v, v).double(), matrix @ flatten(v, v).double(), rtol=1e-4, atol=1e-6
    )
    solution = cg_solve(operator, v)
    assert solution.converged
    assert solution.x["empty"].shape == (0,)
    expected = torch.linalg.solve(matrix, flatten(v, v).double())
    torch.testing.assert_close(flatten(solution.x, v).double(), expected, rtol=1e-3, atol=1e-4)
    exact = torch.linalg.eigvalsh(matrix)
    assert lanczos(operator, 8).values[-1].item() == pytest.approx(exact[-1].item(), rel=1e-4)
    assert hutchinson_trace(operator, 300).value == pytest.approx(exact.sum().item(), rel=0.1)


def test_a_hessian_that_is_the_identity_leaves_its_vector() -> None:
    """Its product may be the vector itself, to which damping must not be added."""

    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = nn.Parameter(torch.ones(3).double())

        def forward(self, x: Tensor) -> Tensor:
            return self.p.square().sum() / 2

    for keep in (False, True):
        operator = HessianOperator(
            Norm(), lambda out, y: out, [(torch.ones(1), torch.ones(1))] * 2, damping=0.5, keep=keep
        )
        v = {"p": torch.tensor([1.0, 2.0, 3.0]).double()}
        for _ in range(2):
            assert (operator @ v)["p"].tolist() == [1.5, 3.0, 4.5]
            assert v["p"].tolist() == [1.0, 2.0, 3.0]


def test_settings_are_live_or_cannot_be_set() -> None:
    model, data = nn.Linear(3, 2).double(), [(torch.randn(4, 3).double(), torch.arange(4) % 2)]
    operator = GGNOperator(model, F.cross_entropy, data, damping=1.0)
    v = oracles.random_vector(model)
    first = operator @ v
    operator.damping = -2.0
    oracles.assert_close(operator @ v, {k: t - 3 * v[k] for k, t in first.items()})
    for bad in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="damping must be finite"):
            operator.damping = bad
        with pytest.raises(ValueError, match="damping must be finite"):
            GGNOperator(model, F.cross_entropy, data, damping=bad)
    for name in ("model", "loss_fn", "loader", "reduction", "parameters", "shape", "dtype", "device"):
        with pytest.raises(AttributeError):
            setattr(operator, name, None)
    with pytest.raises(TypeError):
        operator.parameters["weight"] = torch.zeros(1)  # type: ignore[index]


def test_parameters_that_cannot_be_chosen() -> None:
    data = [(torch.randn(4, 3), torch.arange(4) % 2)]
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"got the str '0\.weight'"):
        HessianOperator(model, F.cross_entropy, data, parameters="0.weight")
    chosen = HessianOperator(model, F.cross_entropy, data, parameters=iter(["1.weight", "0.bias"]))
    assert [*chosen.parameters] == ["0.bias", "1.weight"]
    solution = inverse_hvp(
        model, F.cross_entropy, data, dict(chosen.parameters), damping=9.0, parameters=["1.weight", "0.bias"]
    )
    assert [*solution.x] == ["0.bias", "1.weight"]
    model[0].requires_grad_(False)
    assert [*HessianOperator(model, F.cross_entropy, data).parameters] == ["1.weight", "1.bias"]
    for module in (nn.Flatten(), model.requires_grad_(False)):
        with pytest.raises(ValueError, match="no parameter that requires a gradient"):
            HessianOperator(module, F.cross_entropy, data)
    with pytest.raises(ValueError, match="weight, bias have no values yet: run the model once first"):
        HessianOperator(nn.LazyLinear(2), F.cross_entropy, data)
    with pytest.raises(TypeError, match=r"parameters: 'weight' must be real, got torch\.complex64"):
        HessianOperator(nn.Linear(3, 2, dtype=torch.complex64), F.cross_entropy, data)
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got function"):
        HessianOperator(F.relu, F.cross_entropy, data)  # type: ignore[arg-type]


def test_complex_vectors_of_scipy() -> None:
    import numpy as np

    model, data = nn.Linear(3, 2).double(), [(torch.randn(4, 3).double(), torch.arange(4) % 2)]
    linear = HessianOperator(model, F.cross_entropy, data).to_scipy()
    v = np.arange(8) + 1j * np.arange(8)[::-1]
    np.testing.assert_allclose(linear @ v, (linear @ np.eye(8)) @ v, atol=1e-12)


def test_squares_that_float32_does_not_have_are_the_callers() -> None:
    """What the ops promise, and solvers therefore see to."""
    tiny = [torch.full((1, 4), 1e-23)]
    assert ops.multi_tensor_dot(tiny, tiny).item() == 0.0
    assert ops.multi_tensor_dot(
        [t.double() for t in tiny], [t.double() for t in tiny]
    ).item() == pytest.approx(4e-46)
