"""Fast-BAT: adversarial training as bi-level optimisation, at the least cost the mathematics allows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from blokern import ops
from blokern.bilevel.adversarial import AdversarialRule, cross_entropy_sum
from blokern.bilevel.adversarial_settings import AdversarialSettings
from blokern.bilevel.step import StepResult

__all__ = ["FastBAT", "FastBATSettings"]


@dataclass(frozen=True, kw_only=True)
class FastBATSettings(AdversarialSettings):
    """`AdversarialSettings` of `FastBAT`; step_size, the paper's 1/λ of the attack and called a below, is
    5000/255 for eps <= 8/255 and 2000/255 above by default.

    These are for a range of 1. A step along the gradient itself scales with the square of the images' range, and so the
    defaults do: for images in [0, 255], 255² times that, and λ / 255².

    Args:
        attack_steps: closed-form steps, of which the last gives δ*.
        lam: λ of the implicit term; None becomes 10 over the square of the range; 0 stands for 1/a, the exact implicit
            gradient; inf switches the term off.
    """

    attack_steps: int = 2
    lam: float = None  # type: ignore[assignment]  # a float once it is made

    def __post_init__(self) -> None:
        super().__post_init__()
        self._default("lam", 10.0 / self.span**2)

    def _default_step_size(self) -> float:
        small = self.eps / self.span <= 8 / 255 * (1 + 1e-9)  # whatever the rounding of a range
        return (5000 if small else 2000) / 255 * self.span**2

    @property
    def implicit_lam(self) -> float:
        """The λ in use."""
        return 1.0 / self.attack_step_size if self.lam == 0.0 else self.lam


class FastBAT(AdversarialRule[FastBATSettings]):
    """Fast-BAT in its exact minimum of sweeps: 2k + 7 for k = attack_steps, 2k + 3 without the implicit term.

    With ℓ_atk = −ΣCE, g(z) = ∇ℓ_atk(x + z) and P the projection onto ‖δ‖∞ ≤ eps, clip_min ≤ x + δ ≤ clip_max:

    1. z is uniform in the ball and clipped; k − 1 times, z ← P(z − a g(z)), with frozen parameters.
    2. g at z, kept differentiable in θ; δ* = P(z − a g); H is 1 where P is inactive, else 0.
    3. One forward and one backward at x + δ* give ∇_θ and v = ∇_δ of ℓ_tr, the mean CE.
    4. θ.grad = ∇_θ ℓ_tr − ∇_θ⟨g, H ⊙ v / λ⟩; the optimizer's step takes both terms through its momentum.

    The released code runs the forward at x + δ* twice, so BatchNorm's running statistics move k + 1 times a
    step here and k + 2 times there; the weights agree. metrics: "free", the mean of H.

    Zhang, Zhang, Khanduri, Hong, Chang, Liu, "Revisiting and Advancing Fast Adversarial Training Through The
    Lens of Bi-Level Optimization", ICML 2022.

    >>> rule = FastBAT(model, torch.optim.SGD(model.parameters(), lr=0.1), FastBATSettings(eps=8 / 255))
    >>> loss = rule.step(x, y).loss
    """

    settings_type = FastBATSettings

    def _backward(self, x: Tensor, y: Tensor) -> StepResult:
        lam = self.settings.implicit_lam
        z = self._random_start(x, self.settings.eps) - x
        for _ in range(self.settings.attack_steps - 1):
            z, _ = self._closed_form(z, x, self._input_gradient(_attack_loss, x + z, y))

        if lam == math.inf:
            delta, free = self._closed_form(z, x, self._input_gradient(_attack_loss, x + z, y))
            result = self._descend(x + delta, y)
        else:
            at_z = self._linearize(_attack_loss, x + z, y)
            delta, free = self._closed_form(z, x, at_z.grad_input)
            x_adv = (x + delta).requires_grad_()
            result = self._descend(x_adv, y)
            if x_adv.grad is not None:  # None: the model ignores its input
                u = torch.where(free, x_adv.grad, 0.0) / -lam
                self._add_to_grad(at_z.mixed_hvp(u, retain_graph=False))
        return StepResult(result.loss, result.logits, {"free": free.to(x.dtype).mean()})

    def _closed_form(self, z: Tensor, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """P(z − a grad), and where P is inactive."""
        settings = self.settings
        return ops.fast_bat_step(z, x, grad, settings.attack_step_size, settings.eps, **settings.box)


def _attack_loss(logits: Tensor, y: Tensor) -> Tensor:
    """ℓ_atk = −ΣCE, which the attacker minimises."""
    return -cross_entropy_sum(logits, y)
