"""Adversarial attacks, and the accuracy that is left under them.

Images are batched in the first dimension and live in [clip_min, clip_max] (normalise inside the model); defaults are
relative to that range. An attack is built on a model and called as ``attack(x, y) -> x_adv``::

    attack = PGD(model, eps=8 / 255, step_size=2 / 255, steps=10)
    print(evaluate(model, loader))
"""

from blokern.attack.apgd import APGD
from blokern.attack.base import Attack
from blokern.attack.evaluate import Evaluation, evaluate
from blokern.attack.losses import cross_entropy, dlr, dlr_targeted, margin
from blokern.attack.modes import eval_mode, frozen_parameters
from blokern.attack.outputs import logits_of
from blokern.attack.pgd import FGSM, NFGSM, PGD

__all__ = [
    "APGD",
    "FGSM",
    "NFGSM",
    "PGD",
    "Attack",
    "Evaluation",
    "cross_entropy",
    "dlr",
    "dlr_targeted",
    "eval_mode",
    "evaluate",
    "frozen_parameters",
    "logits_of",
    "margin",
]
