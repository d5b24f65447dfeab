"""float32 steps of saturated networks are float64's: no product or quotient of tiny numbers turns into NaN."""

import pytest
import torch
from torch import nn

from blokern.bilevel import METHODS


def saturated(weight: float, dtype: torch.dtype) -> nn.Module:
    """Rows +weight and −weight of four pixels, so that grey images have a margin of 4 · weight."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False)).to(dtype)
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([[weight], [-weight]]).expand(2, 4))
    return net


def step(
    name: str, dtype: torch.dtype, weight: float, label: int, samples: int = 1
) -> tuple[torch.Tensor, ...]:
    rule, settings = METHODS[name]
    net = saturated(weight, dtype)
    torch.manual_seed(0)
    x = 0.5 + 0.1 * torch.rand(samples, 1, 2, 2, dtype=torch.float64)
    x[0] = 0.5
    words = {"attack_steps": 1} if name == "trades" else {}
    result = rule(net, torch.optim.SGD(net.parameters(), lr=1.0), settings(**words)).step(
        x.to(dtype), torch.full((samples,), label)
    )
    return result.loss, net[1].weight.grad


# e to the minus margin is a normal float32 number up to 87; beyond 103 it is zero, and GradAlign has no cosine.
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("margin", [1.0, 20.0, 47.5, 50.0, 54.0, 68.0, 80.0, 1e3, 1e5])
@pytest.mark.parametrize("label", [0, 1])
def test_steps_are_float64s(name: str, margin: float, label: int) -> None:
    loss, grad = step(name, torch.float32, margin / 4, label)
    want_loss, want_grad = step(name, torch.float64, margin / 4, label)
    assert loss.isfinite()
    assert grad.isfinite().all()
    torch.testing.assert_close(loss.double(), want_loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad.double(), want_grad, rtol=1e-4, atol=1e-6)


def test_trades_of_the_smallest_case() -> None:
    loss, grad = step("trades", torch.float32, 30.0, 1)
    assert float(loss) == pytest.approx(120.0)
    assert grad.isfinite().all()


@pytest.mark.parametrize("margin", [40.0, 60.0, 80.0])
def test_grad_align_follows_tiny_gradients(margin: float) -> None:
    """Of several samples, whose cosines are less than one, so that the penalty has a gradient."""

    def run(dtype: torch.dtype) -> torch.Tensor:
        rule, settings = METHODS["grad-align"]
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(torch.float64)
        with torch.no_grad():
            net[3].weight.mul_(3.0)
            net[3].bias.copy_(torch.tensor([margin, 0.0, -margin]))
        net = net.to(dtype)
        one = rule(net, torch.optim.SGD(net.parameters(), lr=0.0), settings(eps=0.3, penalty=5.0))
        x = torch.rand(6, 1, 2, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)
        torch.manual_seed(3)
        result = one.step(x, torch.zeros(6, dtype=torch.int64))
        assert 0.0 < float(result.metrics["cosine"]) < 1.0
        return torch.cat([p.grad.flatten() for p in net.parameters()]).double()

    got, want = run(torch.float32), run(torch.float64)
    assert want.norm() > 1e-3
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * float(want.norm()))


@pytest.mark.parametrize("name", METHODS)
def test_classes_that_are_masked_out(name: str) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(4, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x).index_fill(1, torch.tensor([2]), -torch.inf)

    rule, settings = METHODS[name]
    model = Masked()
    result = rule(model, torch.optim.SGD(model.parameters(), lr=0.1), settings()).step(
        torch.rand(4, 1, 2, 2), torch.tensor([0, 1, 3, 0])
    )
    assert result.loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters())
