"""Wrong calls: what is said of them, and that they cost nothing."""

from __future__ import annotations

from typing import Any

import oracles
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blokern.curvature import ggnvp, hvp, linearize


@pytest.fixture
def problem() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    return model, torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])


def broken(v: dict[str, Tensor], what: str) -> Any:
    weight = v["0.weight"]
    changes: dict[str, Any] = {
        "missing": {name: t for name, t in v.items() if name != "0.weight"},
        "extra": v | {"3.weight": weight},
        "shape": v | {"0.weight": weight.T},
        "stack of one entry": v | {"0.weight": torch.stack([weight, weight])},
        "stacks of two sizes": {
            name: torch.stack([t] * (2 if name == "0.weight" else 3)) for name, t in v.items()
        },
        "dtype": v | {"0.weight": weight.float()},
        "device": v | {"0.weight": weight.to("meta")},
        "no tensor": v | {"0.weight": 1.0},
        "no dict": list(v.values()),
    }
    return changes[what]


@pytest.mark.parametrize(
    ("what", "error", "message"),
    [
        ("missing", ValueError, r"missing: 0\.weight; unknown: none"),
        ("extra", ValueError, r"missing: none; unknown: 3\.weight"),
        (
            "shape",
            ValueError,
            r"v\['0\.weight'\] must have the shape of the parameter, \(5, 4\), got \(4, 5\)",
        ),
        ("stack of one entry", ValueError, r"stacks of one size, got 2 in '0\.weight', one in '0\.bias'"),
        ("stacks of two sizes", ValueError, r"stacks of one size, got 2 in '0\.weight', 3 in '0\.bias'"),
        (
            "dtype",
            TypeError,
            r"v\['0\.weight'\] must have the dtype of the parameter, torch\.float64, got torch\.fl",
        ),
        ("device", ValueError, r"v\['0\.weight'\] must be on the device of the parameter, cpu, got meta"),
        ("no tensor", TypeError, r"v\['0\.weight'\] must be a Tensor, got float"),
        ("no dict", TypeError, r"v must be a dict of tensors by parameter name, got list"),
    ],
)
def test_vectors_that_do_not_fit(
    problem: tuple[nn.Module, Tensor, Tensor], what: str, error: type[Exception], message: str
) -> None:
    model, x, y = problem
    v = oracles.random_vector(model)
    at_x = linearize(model, F.cross_entropy, x, y)
    for call in (at_x.hvp, at_x.ggnvp, at_x.mixed_hvp_transpose):
        with pytest.raises(error, match=message):
            call(broken(v, what))
    for one_off in (hvp, ggnvp):
        with pytest.raises(error, match=message):
            one_off(model, F.cross_entropy, x, y, broken(v, what))
    at_x.hvp(v)  # the graph is still there


def test_input_vectors_that_do_not_fit(problem: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = problem
    at_x = linearize(model, F.cross_entropy, x, y)
    for u, error, message in (
        (x[:3], ValueError, r"^u must have the shape of x, \(6, 4\), got \(3, 4\)"),
        (x.float(), TypeError, r"^u must have the dtype of x"),
        (x.to("meta"), ValueError, r"^u must be on the device of x, cpu, got meta"),
        (1.0, TypeError, r"^u must be a Tensor, got float"),
    ):
        with pytest.raises(error, match=message):
            at_x.mixed_hvp(u)  # type: ignore[arg-type]


def test_losses_that_are_no_scalars(problem: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = problem
    v = oracles.random_vector(model)
    with pytest.raises(ValueError, match=r"^loss_fn must return a scalar, got shape \(6, 3\)"):
        hvp(model, lambda out, y: out, x, y, v)
    with pytest.raises(ValueError, match=r"^loss_fn must return a scalar, got float"):
        hvp(model, lambda out, y: 1.0, x, y, v)


def test_gauss_newton_needs_a_loss_of_the_output(problem: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = problem
    v = oracles.random_vector(model)

    def decayed(out: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(out, y) + 0.1 * model[0].weight.square().sum()

    with pytest.raises(
        ValueError, match="loss_fn must depend on the parameters through the model's output alone"
    ):
        ggnvp(model, decayed, x, y, v)
    oracles.assert_close(hvp(model, decayed, x, y, v), oracles.hvp(model, decayed, x, y, v))


def test_values_that_are_not_finite_are_traced_to_a_module(problem: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = problem
    with torch.no_grad():
        model[2].weight[0, 0] = torch.inf
    with pytest.raises(
        FloatingPointError, match="the loss is nan: the output of module '2' is the first that is not finite"
    ):
        linearize(model, F.cross_entropy, x, y)
    with torch.no_grad():
        model[2].weight[0, 0] = 1.0
    with pytest.raises(
        FloatingPointError, match="the loss is inf: the model's output is finite, loss_fn's result is not"
    ):
        hvp(model, lambda out, y: out.sum() / 0.0 if out.sum() > 0 else -out.sum() / 0.0, x, y, {})


def test_one_sample_has_no_batch_statistics() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double()
    x = torch.randn(1, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        linearize(model, F.cross_entropy, x, torch.tensor([0]))


def test_inference_mode_is_refused(problem: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = problem
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        linearize(model, F.cross_entropy, x, y)


def test_a_freed_graph_says_so(problem: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = problem
    v = oracles.random_vector(model)
    at_x = linearize(model, F.cross_entropy, x, y)
    at_x.hvp(v, retain_graph=False)
    with pytest.raises(RuntimeError, match=r"ggnvp: hvp\(…, retain_graph=False\) has freed"):
        at_x.ggnvp(v)
    at_x = linearize(model, F.cross_entropy, x, y)
    at_x.release()
    assert at_x.grad_input.shape == x.shape
    with pytest.raises(
        RuntimeError, match=r"hvp: release\(\) has freed what the forward pass left: linearize again"
    ):
        at_x.hvp(v)


@pytest.mark.parametrize("act", [torch.tanh, torch.special.i0e], ids=["tape", "double backward"])
@pytest.mark.filterwarnings("ignore:no R-operator rule")
def test_a_linearization_is_used_again(act: Any) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(act(self.first(x)))

    torch.manual_seed(0)
    model, x, y = Net().double(), torch.randn(6, 4).double(), torch.tensor([0, 1, 2, 0, 1, 2])
    v, at_x = oracles.random_vector(model), linearize(model, F.cross_entropy, x, y)
    for _ in range(2):
        oracles.assert_close(at_x.hvp(v), oracles.hvp(model, F.cross_entropy, x, y, v))
        oracles.assert_close(at_x.ggnvp(v), oracles.ggnvp(model, F.cross_entropy, x, y, v))
        oracles.assert_close(at_x.mixed_hvp(x), oracles.mixed_hvp(model, F.cross_entropy, x, y, x))


def test_tokens_have_no_input_gradient(problem: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, _, y = problem
    with pytest.raises(TypeError, match=r"^x must be floating-point, got torch.int64"):
        linearize(model, F.cross_entropy, y, y)
    with pytest.raises(TypeError, match=r"^x must be a Tensor, got list"):
        linearize(model, F.cross_entropy, [1.0], y)  # type: ignore[arg-type]
