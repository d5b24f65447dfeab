"""Training methods as step rules: `Method(model, optimizer, settings).step(x, y)`, in anyone's loop.

BiP prunes, and its step takes two batches."""

from blokern.bilevel.adversarial import (
    NFGSMAT,
    PGDAT,
    TRADES,
    FastAT,
    FastATSettings,
    GradAlign,
    GradAlignSettings,
    NFGSMATSettings,
    PGDATSettings,
    Plain,
    PlainSettings,
    TRADESSettings,
)
from blokern.bilevel.bip import BiP, BiPSettings
from blokern.bilevel.fast_bat import FastBAT, FastBATSettings
from blokern.bilevel.step import StepResult, StepRule, TwoBatchRule
from blokern.bilevel.trainer import Interrupted, Trainer, TrainSettings

__all__ = [
    "METHODS",
    "NFGSMAT",
    "PGDAT",
    "TRADES",
    "BiP",
    "BiPSettings",
    "FastAT",
    "FastATSettings",
    "FastBAT",
    "FastBATSettings",
    "GradAlign",
    "GradAlignSettings",
    "Interrupted",
    "NFGSMATSettings",
    "PGDATSettings",
    "Plain",
    "PlainSettings",
    "StepResult",
    "StepRule",
    "TRADESSettings",
    "TrainSettings",
    "Trainer",
    "TwoBatchRule",
]

#: The command line's name of each method: its rule and its settings.
METHODS: dict[str, tuple[type, type]] = {
    "plain": (Plain, PlainSettings),
    "fast-at": (FastAT, FastATSettings),
    "fast-bat": (FastBAT, FastBATSettings),
    "grad-align": (GradAlign, GradAlignSettings),
    "n-fgsm": (NFGSMAT, NFGSMATSettings),
    "pgd": (PGDAT, PGDATSettings),
    "trades": (TRADES, TRADESSettings),
}
