"""blokern's attacks as foolbox's own: in the place of ``foolbox.attacks.LinfPGD`` and its like, on a PyTorchModel.

Needs foolbox, and so is imported by itself::

    from blokern.attack.foolbox import PGD

    raw, clipped, success = PGD(steps=40)(foolbox.PyTorchModel(net, bounds=(0, 1)), x, y, epsilons=8 / 255)
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor, nn

from blokern import attack
from blokern.attack.checks import check_norm
from blokern.attack.losses import LossName
from blokern.ops.types import Norm

try:
    import eagerpy
    import foolbox
    from foolbox.attacks.base import FixedEpsilonAttack, get_criterion, raise_if_kwargs
except ImportError as error:
    raise ImportError(f"blokern.attack.foolbox needs foolbox: pip install foolbox ({error})") from error

__all__ = ["APGD", "PGD"]

_DISTANCES = {
    "linf": foolbox.distances.linf,
    "l2": foolbox.distances.l2,
    "l1": foolbox.distances.l1,
}


class _Network(nn.Module):
    """A foolbox model, which says itself how its network is reached."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x)
        return logits


class _Adapter(FixedEpsilonAttack):  # type: ignore[misc]  # untyped
    """Bounds, criterion and radii are foolbox's affair, the attack is blokern's."""

    def __init__(self, norm: Norm) -> None:
        check_norm(norm)
        self.norm: Norm = norm

    @property
    def distance(self) -> Any:
        return _DISTANCES[self.norm]

    @abstractmethod
    def _attack(self, model: nn.Module, epsilon: float, **how: Any) -> attack.Attack[Any]:
        """The attack on `model` with this radius and the settings of self."""

    def run(self, model: Any, inputs: Any, criterion: Any, *, epsilon: float, **kwargs: Any) -> Any:
        """The attacked inputs; criterion is labels, Misclassification or TargetedMisclassification."""
        raise_if_kwargs(kwargs)
        x, restore_type = eagerpy.astensor_(inputs)
        criterion = get_criterion(criterion)
        targeted = isinstance(criterion, foolbox.TargetedMisclassification)
        if not targeted and not isinstance(criterion, foolbox.Misclassification):
            raise ValueError(
                f"criterion must be Misclassification or TargetedMisclassification, got {criterion!r}"
            )
        y = criterion.target_classes if targeted else criterion.labels
        lower, upper = model.bounds
        adversary = self._attack(_Network(model), epsilon, clip_min=lower, clip_max=upper, targeted=targeted)
        return restore_type(eagerpy.astensor(adversary(x.raw, y.raw)))


class PGD(_Adapter):
    """:class:`blokern.attack.PGD` as a foolbox attack with a fixed epsilon, for PyTorchModel.

    rel_stepsize: a step's size in epsilons, as of foolbox's LinfPGD; abs_stepsize: in units of x, in its place.
    The rest are blokern's words. Inputs [N, ...] within the model's bounds, of any interval. ValueError or TypeError on
    bad settings, in the call for those that blokern checks::

        raw, clipped, success = PGD(steps=40)(fmodel, x, y, epsilons=[2 / 255, 8 / 255])
    """

    def __init__(
        self,
        *,
        norm: Norm = "linf",
        rel_stepsize: float = 0.01 / 0.3,
        abs_stepsize: float | None = None,
        steps: int = 40,
        random_start: bool = True,
        restarts: int = 1,
        early_stop: bool = False,
        loss: LossName = "ce",
    ) -> None:
        super().__init__(norm)
        self.rel_stepsize, self.abs_stepsize, self.steps = rel_stepsize, abs_stepsize, steps
        self.random_start, self.restarts, self.early_stop, self.loss = (
            random_start,
            restarts,
            early_stop,
            loss,
        )

    def _attack(self, model: nn.Module, epsilon: float, **how: Any) -> attack.PGD:
        step_size = self.rel_stepsize * epsilon if self.abs_stepsize is None else self.abs_stepsize
        return attack.PGD(
            model,
            *(epsilon, step_size, self.steps, self.norm, self.restarts, self.random_start),
            early_stop=self.early_stop,
            loss=self.loss,
            **how,
        )


class APGD(_Adapter):
    """:class:`blokern.attack.APGD` as a foolbox attack with a fixed epsilon, for PyTorchModel; as :class:`PGD`::

    raw, clipped, success = APGD(steps=100, loss="dlr", target_classes=9)(fmodel, x, y, epsilons=8 / 255)
    """

    def __init__(
        self,
        *,
        norm: Norm = "linf",
        steps: int = 100,
        restarts: int = 1,
        target_classes: int | None = None,
        rho: float = 0.75,
        early_stop: bool = False,
        loss: LossName = "ce",
    ) -> None:
        super().__init__(norm)
        self.steps, self.restarts, self.target_classes = steps, restarts, target_classes
        self.rho, self.early_stop, self.loss = rho, early_stop, loss

    def _attack(self, model: nn.Module, epsilon: float, **how: Any) -> attack.APGD:
        return attack.APGD(
            model,
            *(epsilon, self.steps, self.norm, self.restarts),
            target_classes=self.target_classes,
            rho=self.rho,
            early_stop=self.early_stop,
            loss=self.loss,
            **how,
        )
