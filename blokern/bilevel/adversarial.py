"""Adversarial training: what its rules share, and the baselines that Fast-BAT is measured against.

Every rule runs its passes in the mode that the caller put the model in, train mode for every published
number, and leaves it so; only TRADES attacks in eval mode. Each forward in train mode moves BatchNorm's
running statistics once.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Generic, TypedDict, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from blokern import ops
from blokern.attack import eval_mode, frozen_parameters
from blokern.attack.checks import check_box
from blokern.bilevel.settings import Precision, autocast, check_numbers, check_precision
from blokern.bilevel.step import StepResult, check_batch, check_types
from blokern.curvature import Linearization, LossFn, linearize
from blokern.distributed import Processes

__all__ = [
    "NFGSMAT",
    "PGDAT",
    "TRADES",
    "AdversarialRule",
    "AdversarialSettings",
    "FastAT",
    "FastATSettings",
    "GradAlign",
    "GradAlignSettings",
    "NFGSMATSettings",
    "PGDATSettings",
    "Plain",
    "PlainSettings",
    "Precision",
    "Rule",
    "TRADESSettings",
    "cross_entropy_sum",
]


@dataclass(frozen=True, kw_only=True)
class PlainSettings:
    """Settings of `Plain`.

    Args:
        precision: fp32, or bf16 for forwards under bfloat16 autocast.

    Raises:
        TypeError, ValueError: a setting of another type or out of range.
    """

    precision: Precision = "fp32"

    def __post_init__(self) -> None:
        check_numbers(self)
        check_precision(self.precision)


@dataclass(frozen=True, kw_only=True)
class AdversarialSettings(PlainSettings, ABC):
    """What every L∞ method takes.

    Args:
        eps: radius of the perturbation, in the images' units.
        step_size: of the attack; None is the method's default for this eps, see `attack_step_size`.
        clip_min: least value of an image.
        clip_max: greatest value of an image.
        precision: fp32, or bf16 for forwards under bfloat16 autocast.

    Raises:
        TypeError, ValueError: a setting of another type or out of range.
    """

    eps: float = 8 / 255
    step_size: float | None = None
    clip_min: float = 0.0
    clip_max: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_box(self.clip_min, self.clip_max)

    @property
    def attack_step_size(self) -> float:
        """The step size in use."""
        return self._default_step_size() if self.step_size is None else self.step_size

    @abstractmethod
    def _default_step_size(self) -> float: ...


@dataclass(frozen=True, kw_only=True)
class FastATSettings(AdversarialSettings):
    """`AdversarialSettings` of `FastAT`; step_size is 1.25 eps by default."""

    def _default_step_size(self) -> float:
        return 1.25 * self.eps


@dataclass(frozen=True, kw_only=True)
class NFGSMATSettings(AdversarialSettings):
    """`AdversarialSettings` of `NFGSMAT`; step_size is eps by default."""

    def _default_step_size(self) -> float:
        return self.eps


@dataclass(frozen=True, kw_only=True)
class GradAlignSettings(FastATSettings):
    """`AdversarialSettings` of `GradAlign`; step_size is 1.25 eps by default.

    Args:
        penalty: the weight c of 1 − cos; None is the paper's for this eps, see `alignment_penalty`.
    """

    penalty: float | None = None

    @property
    def alignment_penalty(self) -> float:
        """The penalty in use; by default 0.2 · 10^((255 eps − 8)/8), which the released code tabulates, and from the
        table's end at 16/255 on its last value, 2: the exponential soon drowns the loss."""
        if self.penalty is not None:
            return self.penalty
        return 0.2 * math.pow(10.0, (min(255.0 * self.eps, 16.0) - 8.0) / 8.0)


@dataclass(frozen=True, kw_only=True)
class PGDATSettings(AdversarialSettings):
    """`AdversarialSettings` of `PGDAT`; step_size is eps/attack_steps by default, but no less than eps/4.

    That is eps/2 for two steps, and 2/255 for ten at eps = 8/255.

    Args:
        attack_steps: sign steps of the attack.
    """

    attack_steps: int = 2

    def _default_step_size(self) -> float:
        return self.eps / min(self.attack_steps, 4)


@dataclass(frozen=True, kw_only=True)
class TRADESSettings(PGDATSettings):
    """`PGDATSettings` of `TRADES`.

    Args:
        attack_steps: sign steps of the attack.
        beta: weight of the KL divergence.
    """

    attack_steps: int = 10
    beta: float = 6.0


SettingsT = TypeVar("SettingsT", bound=PlainSettings)
AdversarialSettingsT = TypeVar("AdversarialSettingsT", bound=AdversarialSettings)


class Rule(ABC, Generic[SettingsT]):
    """A `StepRule`: checks the batch, leaves the method's gradient in every `.grad`, steps the optimizer.

    Parameters that do not require a gradient are left alone, `.grad` included; parameters that the loss does
    not use end with `.grad` None. Raises TypeError if an argument is not of its type.

    Of several `processes`, each gives its part of the batch, in order of rank and of equal size, and their generators
    are seeded alike. They begin with the first one's model, and take the step that one process would for the whole
    batch, but for BatchNorm's statistics (see :func:`blokern.distributed.sync_batch_norm`) and for layers that draw.
    """

    settings_type: ClassVar[type[PlainSettings]]

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        settings: SettingsT,
        processes: Processes = Processes(),  # noqa: B008  # frozen
    ) -> None:
        check_types(
            model=(model, nn.Module),
            optimizer=(optimizer, Optimizer),
            settings=(settings, self.settings_type),
            processes=(processes, Processes),
        )
        processes.equalize_(model)
        self.model = model
        self.optimizer = optimizer
        self.settings = settings
        self.processes = processes

    def step(self, x: Tensor, y: Tensor) -> StepResult:
        """Updates the model once.

        x: [N, ...] float32 or float64, in [clip_min, clip_max] (unchecked: a check would synchronise with the
        device). y: [N] int64. Raises TypeError or ValueError, naming the argument, for other dtypes or
        shapes; RuntimeError if no parameter gets a gradient.
        """
        check_batch(x, y)
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(x.device.type, enabled=False):  # forwards choose their own; see `precision`
            result = self._backward(x.detach(), y)
        _check_gradients(self.model)
        self.processes.average_gradients(self.model)
        self.optimizer.step()
        return result

    @abstractmethod
    def _backward(self, x: Tensor, y: Tensor) -> StepResult:
        """Leaves the method's gradient in every parameter's `.grad`, all of them None before."""

    def _descend(self, x: Tensor, y: Tensor) -> StepResult:
        """One forward and backward of the mean cross-entropy at x; fills x.grad too if x requires it."""
        logits = self._logits(x)
        loss = F.cross_entropy(logits, y)
        torch.autograd.backward(loss)
        return StepResult(loss.detach(), logits.detach())

    def _logits(self, x: Tensor) -> Tensor:
        with self._autocast(x):
            logits: Tensor = self.model(x)
        return _at_least_float32(logits)

    def _autocast(self, x: Tensor) -> torch.autocast:
        return autocast(self.settings.precision, x)


def _check_gradients(model: nn.Module) -> None:
    """RuntimeError if there are none: else the step would quietly do nothing."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if parameters and all(p.grad is None for p in parameters):
        raise RuntimeError(
            "no parameter of the model got a gradient. Does its output depend on them? A model compiled by torch 2.11 "
            "forgets that it does, after an attack's gradients of the input: take torch 2.13, or do not compile it"
        )


class Box(TypedDict):
    """The images' range, as the ops take it."""

    clip_min: float
    clip_max: float


class AdversarialRule(Rule[AdversarialSettingsT]):
    """A rule that attacks with gradients of the input."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        settings: AdversarialSettingsT,
        processes: Processes = Processes(),  # noqa: B008  # frozen
    ) -> None:
        super().__init__(model, optimizer, settings, processes)
        self._box: Box = {"clip_min": settings.clip_min, "clip_max": settings.clip_max}

    def _random_start(self, x: Tensor, eps: float, box: Box | None = None) -> Tensor:
        """x with uniform noise of radius eps, clipped: what these samples draw within the whole batch."""
        return ops.random_start(x, eps, first=self.processes.rank * len(x), **(box or self._box))

    def _input_gradient(self, loss_fn: LossFn, x: Tensor, y: Tensor) -> Tensor:
        """∇ₓ loss_fn(model(x), y): two sweeps; nothing is kept for the weights' gradients."""
        x = x.detach().requires_grad_()
        with frozen_parameters(self.model):
            (grad,) = torch.autograd.grad(loss_fn(self._logits(x), y), x)
        return grad

    def _sign_step(self, x_adv: Tensor, x: Tensor, y: Tensor, eps: float) -> Tensor:
        """One ascent step on the cross-entropy, into the box and the ball of radius eps around x."""
        grad = self._input_gradient(cross_entropy_sum, x_adv, y)
        return ops.pgd_step(x_adv, x, grad, self.settings.attack_step_size, eps, **self._box)

    def _linearize(self, loss_fn: LossFn, x: Tensor, y: Tensor) -> Linearization:
        with self._autocast(x):
            return linearize(self.model, loss_fn, x, y)

    def _add_to_grad(self, products: dict[str, Tensor]) -> None:
        """Adds to the gradients of the last backward; a parameter without one is unused and stays so."""
        for name, parameter in self.model.named_parameters():
            if name in products and parameter.grad is not None:
                parameter.grad += products[name]


class Plain(Rule[PlainSettings]):
    """Normal training, the unit of every cost: one forward, one backward. Three sweeps.

    >>> rule = Plain(model, torch.optim.SGD(model.parameters(), lr=0.1), PlainSettings())
    >>> loss = rule.step(x, y).loss
    """

    settings_type = PlainSettings

    def _backward(self, x: Tensor, y: Tensor) -> StepResult:
        return self._descend(x, y)


class FastAT(AdversarialRule[FastATSettings]):
    """Fast adversarial training: uniform random start in the ball, one sign step, projected. Five sweeps.

    Wong, Rice, Kolter, "Fast is better than free: Revisiting adversarial training", ICLR 2020, algorithm 3.

    >>> rule = FastAT(model, torch.optim.SGD(model.parameters(), lr=0.1), FastATSettings(eps=8 / 255))
    >>> loss = rule.step(x, y).loss
    """

    settings_type = FastATSettings

    def _backward(self, x: Tensor, y: Tensor) -> StepResult:
        start = self._random_start(x, self.settings.eps)
        return self._descend(self._sign_step(start, x, y, self.settings.eps), y)


class NFGSMAT(AdversarialRule[NFGSMATSettings]):
    """N-FGSM: uniform noise of radius 2 eps, one sign step, no projection to the ball. Five sweeps.

    de Jorge et al., "Make Some Noise: Reliable and Efficient Single-Step Adversarial Training", NeurIPS 2022,
    algorithm 1 with k = 2 eps; noise and result are clipped to the box, as the released code does.

    >>> rule = NFGSMAT(model, torch.optim.SGD(model.parameters(), lr=0.1), NFGSMATSettings(eps=8 / 255))
    >>> loss = rule.step(x, y).loss
    """

    settings_type = NFGSMATSettings

    def _backward(self, x: Tensor, y: Tensor) -> StepResult:
        noise = 2.0 * self.settings.eps
        start = self._random_start(x, noise)
        # A ball that holds noise and step leaves only the box to project to.
        return self._descend(self._sign_step(start, x, y, noise + self.settings.attack_step_size), y)


class PGDAT(AdversarialRule[PGDATSettings]):
    """PGD adversarial training: random start, k = attack_steps projected sign steps. 2k + 3 sweeps.

    Madry, Makelov, Schmidt, Tsipras, Vladu, "Towards Deep Learning Models Resistant to Adversarial Attacks",
    ICLR 2018.

    >>> rule = PGDAT(model, torch.optim.SGD(model.parameters(), lr=0.1), PGDATSettings(attack_steps=10))
    >>> loss = rule.step(x, y).loss
    """

    settings_type = PGDATSettings

    def _backward(self, x: Tensor, y: Tensor) -> StepResult:
        x_adv = self._random_start(x, self.settings.eps)
        for _ in range(self.settings.attack_steps):
            x_adv = self._sign_step(x_adv, x, y, self.settings.eps)
        return self._descend(x_adv, y)


class GradAlign(AdversarialRule[GradAlignSettings]):
    """FGSM from zero, gradients aligned: CE(x_adv) + c (1 − mean cos(∇ₓℓ(x), ∇ₓℓ(x + η))). Eleven sweeps.

    η is uniform in the ball and not clipped; the gradient at x is held constant, and samples with a zero
    gradient are left out of the mean, all as in the released code. The penalty's gradient is the mixed
    product of the loss at x + η with ∂penalty/∂∇ₓℓ(x + η). loss includes the penalty. metrics: "cosine", the
    mean cosine, whose fall announces catastrophic overfitting.

    Andriushchenko, Flammarion, "Understanding and Improving Fast Adversarial Training", NeurIPS 2020, section
    5.

    >>> rule = GradAlign(model, torch.optim.SGD(model.parameters(), lr=0.1), GradAlignSettings(eps=8 / 255))
    >>> cosine = rule.step(x, y).metrics["cosine"]
    """

    settings_type = GradAlignSettings

    def _backward(self, x: Tensor, y: Tensor) -> StepResult:
        eps, penalty = self.settings.eps, self.settings.alignment_penalty
        clean = self._input_gradient(cross_entropy_sum, x, y)
        x_adv = ops.pgd_step(x, x, clean, self.settings.attack_step_size, eps, **self._box)
        result = self._descend(x_adv, y)

        noise = self._random_start(x, eps, {"clip_min": -math.inf, "clip_max": math.inf})
        at_noise = self._linearize(cross_entropy_sum, noise, y)
        noisy = at_noise.grad_input.requires_grad_()
        with torch.enable_grad():
            cosine = self._mean_cosine(clean, noisy)
        (u,) = torch.autograd.grad(-penalty * cosine, noisy)
        self._add_to_grad(at_noise.mixed_hvp(u, retain_graph=False))

        cosine = cosine.detach()
        return StepResult(result.loss + penalty * (1.0 - cosine), result.logits, {"cosine": cosine})

    def _mean_cosine(self, a: Tensor, b: Tensor) -> Tensor:
        """Mean over the samples of which neither a nor b is zero; without a host synchronisation.

        Of several processes, a share whose mean over them is that of all their samples.
        """
        a, b = a.flatten(1), b.flatten(1)
        size = a.norm(dim=1) * b.norm(dim=1)
        counted = size > 0
        cosine = (a * b).sum(dim=1) / size.where(counted, 1.0)
        count = counted.sum().to(a.dtype)
        self.processes.average_([count])
        mean: Tensor = cosine.where(counted, 0.0).sum() / count.clamp(min=1 / self.processes.size)
        return mean


class TRADES(AdversarialRule[TRADESSettings]):
    """TRADES: CE(x) + β KL(p(x) ‖ p(x_adv)), x_adv by k = attack_steps sign steps on the KL. 2k + 7 sweeps.

    The attack starts from Gaussian noise of deviation 0.001 and runs in eval mode, with p(x) computed once.
    The forward at x serves both terms, so BatchNorm's running statistics move twice a step (three times in
    the released code). logits are those at x_adv; metrics: "cross_entropy" and "kl", means.

    Zhang, Yu, Jiao, Xing, El Ghaoui, Jordan, "Theoretically Principled Trade-off between Robustness and
    Accuracy", ICML 2019, algorithm 1.

    >>> rule = TRADES(model, torch.optim.SGD(model.parameters(), lr=0.1), TRADESSettings(beta=6.0))
    >>> loss = rule.step(x, y).loss
    """

    settings_type = TRADESSettings

    def _backward(self, x: Tensor, y: Tensor) -> StepResult:
        settings = self.settings
        with eval_mode(self.model):
            with torch.no_grad():
                clean = self._logits(x).softmax(dim=1)
            x_adv = x + 0.001 * self._normal_like(x)
            for _ in range(settings.attack_steps):
                grad = self._input_gradient(_kl_sum, x_adv, clean)
                x_adv = ops.pgd_step(x_adv, x, grad, settings.attack_step_size, settings.eps, **self._box)

        clean_logits, logits = self._logits(x), self._logits(x_adv)
        cross_entropy = F.cross_entropy(clean_logits, y)
        kl = _kl_sum(logits, clean_logits.softmax(dim=1)) / x.shape[0]
        loss = cross_entropy + settings.beta * kl
        torch.autograd.backward(loss)
        metrics = {"cross_entropy": cross_entropy.detach(), "kl": kl.detach()}
        return StepResult(loss.detach(), logits.detach(), metrics)

    def _normal_like(self, x: Tensor) -> Tensor:
        """Normal noise: this part of what is drawn for the whole batch."""
        count = self.processes.size * len(x)
        return x.new_empty(count, *x.shape[1:]).normal_()[self.processes.part(count)]


def cross_entropy_sum(logits: Tensor, y: Tensor) -> Tensor:
    """ΣCE over the batch, so that a sample's input gradient does not depend on the batch size."""
    return F.cross_entropy(_at_least_float32(logits), y, reduction="sum")


def _kl_sum(logits: Tensor, target: Tensor) -> Tensor:
    """ΣKL(target ‖ softmax(logits)) over the batch."""
    return F.kl_div(logits.log_softmax(dim=1), target, reduction="sum")


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
