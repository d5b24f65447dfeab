"""blokern's attacks as torchattacks' own: in the place of ``torchattacks.PGD`` and ``torchattacks.APGD``.

Needs torchattacks, and so is imported by itself::

    from blokern.attack.torchattacks import PGD

    attack = PGD(model, eps=8 / 255, alpha=2 / 255, steps=10)
    attack.set_mode_targeted_least_likely()
    x_adv = attack(x, y)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from blokern import attack
from blokern.attack.losses import LossName

try:
    from torchattacks.attack import Attack as _Peer
except ImportError as error:
    raise ImportError("blokern.attack.torchattacks needs torchattacks: pip install torchattacks") from error

__all__ = ["APGD", "PGD"]


class _Logits(nn.Module):
    """The network as an attack of torchattacks sees it: normalised, if it was told so."""

    def __init__(self, peer: Any) -> None:
        super().__init__()
        self.network = peer.model  # whose parameters are frozen during an attack
        self.logits = peer.get_logits

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.logits(x)
        return logits


class _Adapter(_Peer, ABC):  # type: ignore[misc]  # untyped
    """Targets, devices, normalisation and the model's mode are torchattacks' affair, the attack is blokern's."""

    def __init__(self, name: str, model: nn.Module) -> None:
        super().__init__(name, model)
        self.supported_mode = ["default", "targeted"]

    @abstractmethod
    def _attack(self, model: nn.Module, **how: Any) -> attack.Attack[Any]:
        """The attack on `model` with the settings that self has now."""

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        images, labels = images.to(self.device), labels.to(self.device)
        y = self.get_target_label(images, labels) if self.targeted else labels
        # torchattacks has put the model into the mode that it is to be attacked in.
        return self._attack(_Logits(self), targeted=self.targeted, eval_mode=False)(images, y)


class PGD(_Adapter):
    """:class:`blokern.attack.PGD` with the arguments of torchattacks.PGD.

    Images [N, C, H, W], floating-point in [0, 1]; labels [N] int64. norm: "Linf", "L2" or "L1"; it, restarts,
    early_stop and loss are blokern's. ValueError or TypeError on bad settings::

        x_adv = PGD(model, eps=8 / 255, alpha=2 / 255, steps=10)(x, y)
    """

    def __init__(
        self,
        model: nn.Module,
        eps: float = 8 / 255,
        alpha: float = 2 / 255,
        steps: int = 10,
        random_start: bool = True,
        *,
        norm: str = "Linf",
        restarts: int = 1,
        early_stop: bool = False,
        loss: LossName = "ce",
    ) -> None:
        super().__init__("PGD", model)
        self.eps, self.alpha, self.steps, self.random_start = eps, alpha, steps, random_start
        self.norm, self.restarts, self.early_stop, self.loss = norm, restarts, early_stop, loss
        self._attack(model)  # a bad setting is noticed here

    def _attack(self, model: nn.Module, **how: Any) -> attack.PGD:
        norm: Any = self.norm.lower()
        return attack.PGD(
            model,
            *(self.eps, self.alpha, self.steps, norm, self.restarts, self.random_start),
            early_stop=self.early_stop,
            loss=self.loss,
            **how,
        )


class APGD(_Adapter):
    """:class:`blokern.attack.APGD` with the arguments of torchattacks.APGD.

    Images [N, C, H, W], floating-point in [0, 1]; labels [N] int64. norm: "Linf", "L2" or "L1"; early_stop is
    blokern's. seed: of the random starts, the same in each call. ValueError or TypeError on bad settings::

        x_adv = APGD(model, norm="Linf", eps=8 / 255, steps=10, loss="dlr")(x, y)
    """

    def __init__(
        self,
        model: nn.Module,
        norm: str = "Linf",
        eps: float = 8 / 255,
        steps: int = 10,
        n_restarts: int = 1,
        seed: int = 0,
        loss: LossName = "ce",
        eot_iter: int = 1,
        rho: float = 0.75,
        verbose: bool = False,
        *,
        early_stop: bool = False,
    ) -> None:
        if verbose:
            raise ValueError("verbose must be False: blokern's attacks print nothing")
        super().__init__("APGD", model)
        self.norm, self.eps, self.steps, self.n_restarts = norm, eps, steps, n_restarts
        self.seed, self.loss, self.eot_iter, self.rho = seed, loss, eot_iter, rho
        self.early_stop = early_stop
        self._attack(model)  # a bad setting is noticed here

    def _attack(self, model: nn.Module, **how: Any) -> attack.APGD:
        norm: Any = self.norm.lower()
        return attack.APGD(
            model,
            *(self.eps, self.steps, norm, self.n_restarts),
            rho=self.rho,
            eot=self.eot_iter,
            early_stop=self.early_stop,
            loss=self.loss,
            generator=torch.Generator(self.device).manual_seed(self.seed),
            **how,
        )
