"""Adversarial training: what its rules share, and the baselines that Fast-BAT is measured against.

Every rule runs its passes in the mode that the caller put the model in, train mode for every published
number, and leaves it so; only TRADES attacks in eval mode. Each forward in train mode moves BatchNorm's
running statistics once.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from blokern import ops
from blokern.attack import eval_mode, frozen_parameters, logits_of
from blokern.attack.attributes import Fixed
from blokern.attack.checks import check_logits, check_values
from blokern.bilevel.adversarial_settings import (
    AdversarialSettings,
    Box,
    FastATSettings,
    GradAlignSettings,
    NFGSMATSettings,
    PGDATSettings,
    PlainSettings,
    TRADESSettings,
)
from blokern.bilevel.settings import Precision, autocast
from blokern.bilevel.step import StepResult, check_batch, check_optimizer, check_types
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

_SCALE = 2.0**-60

SettingsT = TypeVar("SettingsT", bound=PlainSettings)
AdversarialSettingsT = TypeVar("AdversarialSettingsT", bound=AdversarialSettings)


class Rule(ABC, Generic[SettingsT]):
    """A `StepRule`: checks the batch, leaves the method's gradient in every `.grad`, steps the optimizer.

    The model returns logits [N, K], or an object that has them as ``.logits`` or ``["logits"]``. Parameters that do not
    require a gradient are left alone, `.grad` included; parameters that the loss does not use end with `.grad` None.
    Raises TypeError if an argument is not of its type, ValueError if the optimizer holds no parameter of the model.

    `settings` and `optimizer` may be set at any time, and count from the next step on.

    Of several `processes`, each gives its part of the batch, in order of rank and of equal size, and their generators
    are seeded alike. They begin with the first one's model, and take the step that one process would for the whole
    batch, but for BatchNorm's statistics (see :func:`blokern.distributed.sync_batch_norm`) and for layers that draw.
    """

    settings_type: ClassVar[type[PlainSettings]]

    model = Fixed[nn.Module]("make a new rule, with an optimizer of the new model's parameters")
    processes = Fixed[Processes]("make a new rule, which has all processes begin with one model")

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
            processes=(processes, Processes),
        )
        check_optimizer(model, optimizer)
        self.settings = settings
        processes.equalize_(model)
        self.model = model
        self.optimizer = optimizer
        self.processes = processes

    @property
    def settings(self) -> SettingsT:
        """What the next step goes by."""
        return self._settings

    @settings.setter
    def settings(self, settings: SettingsT) -> None:
        check_types(settings=(settings, self.settings_type))
        self._settings = settings
        self._values_checked = False  # of the batches that come
        self._largest_label = -1

    def step(self, x: Tensor, y: Tensor) -> StepResult:
        """Updates the model once.

        x: [N, ...] float32 or float64, in [clip_min, clip_max]. y: [N] int64. Values are read in the first step alone,
        as reading makes the host wait for the device. Raises TypeError or ValueError, naming the argument, for other
        dtypes or shapes, images outside the box (by more than 1e-4 of it), labels that the model does not have, and
        a model that returns no [N, K] logits of two classes or more; RuntimeError if no parameter gets a gradient.
        """
        check_batch(x, y)
        if not self._values_checked:
            _, self._largest_label = check_values(x, y, **self.settings.box)
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(x.device.type, enabled=False):  # forwards choose their own; see `precision`
            result = self._backward(x.detach(), y)
        _check_gradients(self.model)
        self._values_checked = True
        self.processes.average_gradients(self.model)
        self.optimizer.step()
        return result

    @abstractmethod
    def _backward(self, x: Tensor, y: Tensor) -> StepResult:
        """Leaves the method's gradient in every parameter's `.grad`, all of them None before."""

    def _descend(self, x: Tensor, y: Tensor) -> StepResult:
        """One forward and backward of the mean cross-entropy at x; fills x.grad too if x requires it."""
        logits = self._logits(x)
        loss = _cross_entropy(logits, y, "mean")
        torch.autograd.backward(loss)
        return StepResult(loss.detach(), logits.detach())

    def _logits(self, x: Tensor) -> Tensor:
        with self._autocast(x):
            output = self.model(x.clone())  # which a forward may change in place
        return self._checked(output, len(x))

    def _checked(self, output: object, samples: int) -> Tensor:
        """The logits in what the model returned."""
        logits = logits_of(output)
        check_logits(logits, samples, self._largest_label)
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


class AdversarialRule(Rule[AdversarialSettingsT]):
    """A rule that attacks with gradients of the input."""

    def _random_start(self, x: Tensor, eps: float, box: Box | None = None) -> Tensor:
        """x with uniform noise of radius eps, clipped: what these samples draw within the whole batch."""
        return ops.random_start(x, eps, first=self.processes.rank * len(x), **(box or self.settings.box))

    def _input_gradient(self, loss_fn: LossFn, x: Tensor, y: Tensor) -> Tensor:
        """∇ₓ loss_fn(logits, y): two sweeps; nothing is kept for the weights' gradients."""
        x = x.detach().requires_grad_()
        with frozen_parameters(self.model):
            (grad,) = torch.autograd.grad(loss_fn(self._logits(x), y), x)
        return grad

    def _step(self, x_adv: Tensor, x: Tensor, grad: Tensor, eps: float) -> Tensor:
        """One ascent step along grad, into the box and the ball of radius eps around x."""
        return ops.pgd_step(x_adv, x, grad, self.settings.attack_step_size, eps, **self.settings.box)

    def _sign_step(self, x_adv: Tensor, x: Tensor, y: Tensor, eps: float) -> Tensor:
        """`_step` on the cross-entropy."""
        return self._step(x_adv, x, self._input_gradient(cross_entropy_sum, x_adv, y), eps)

    def _linearize(self, loss_fn: LossFn, x: Tensor, y: Tensor) -> Linearization:
        """Of loss_fn(logits, y)."""
        with self._autocast(x):
            return linearize(self.model, lambda output, y: loss_fn(self._checked(output, len(x)), y), x, y)

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
        result = self._descend(self._step(x, x, clean, eps), y)

        noise = self._random_start(x, eps, {"clip_min": -math.inf, "clip_max": math.inf})
        at_noise = self._linearize(cross_entropy_sum, noise, y)
        noisy = at_noise.grad_input.requires_grad_()
        with torch.enable_grad():
            cosine = self._mean_cosine(clean, noisy)
        # u is as large as these gradients are small, and so it is scaled, exactly, lest it overflow on its way.
        (u,) = torch.autograd.grad(-penalty * _SCALE * cosine, noisy)
        products = at_noise.mixed_hvp(u, retain_graph=False)
        self._add_to_grad({name: product / _SCALE for name, product in products.items()})

        cosine = cosine.detach()
        return StepResult(result.loss + penalty * (1.0 - cosine), result.logits, {"cosine": cosine})

    def _mean_cosine(self, a: Tensor, b: Tensor) -> Tensor:
        """Mean over the samples of which neither a nor b is zero; without a host synchronisation.

        Of several processes, a share whose mean over them is that of all their samples.
        """
        a, b = _directions(a), _directions(b)
        counted = a.detach().any(dim=1) & b.detach().any(dim=1)
        count = counted.sum().to(a.dtype)
        self.processes.average_([count])
        mean: Tensor = (a * b).sum() / count.clamp(min=1 / self.processes.size)
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
                clean = self._logits(x).log_softmax(dim=1)
            x_adv = x + 0.001 * settings.span * self._normal_like(x)
            for _ in range(settings.attack_steps):
                x_adv = self._step(x_adv, x, self._input_gradient(_kl_sum, x_adv, clean), settings.eps)

        clean_logits, logits = self._logits(x), self._logits(x_adv)
        cross_entropy = _cross_entropy(clean_logits, y, "mean")
        kl = _kl_sum(logits, clean_logits.log_softmax(dim=1)) / x.shape[0]
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
    return _cross_entropy(_at_least_float32(logits), y, "sum")


def _cross_entropy(logits: Tensor, y: Tensor, reduction: str) -> Tensor:
    """torch's, in which no label stands for "leave this sample out": -100 is as wrong as -1."""
    return F.cross_entropy(logits, y, reduction=reduction, ignore_index=torch.iinfo(torch.int64).min)


def _kl_sum(logits: Tensor, log_p: Tensor) -> Tensor:
    """ΣKL(p ‖ softmax(logits)) over the batch. With p's logarithm given, a p that underflows has a finite derivative,
    which that of log p is not; a class of p = 0 has none."""
    p = log_p.exp()
    apart = torch.where(p > 0, log_p - logits.log_softmax(dim=1), 0.0)
    return (p * apart).sum()


def _directions(v: Tensor) -> Tensor:
    """v [N, ...] → [N, D], each sample over its norm; zero stays zero, and what is too small to be divided by becomes
    it. Samples are scaled first, as squares of small numbers underflow."""
    v = v.flatten(1)
    size = v.detach().abs().amax(dim=1, keepdim=True)
    large = size > torch.finfo(size.dtype).tiny
    scaled = torch.where(large, v, 0.0) / torch.where(large, size, 1.0)
    return scaled / torch.where(large, scaled.norm(dim=1, keepdim=True), 1.0)


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
