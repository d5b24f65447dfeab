"""Methods to train with, as step rules: `Method(model, optimizer, settings).step(x, y)`, in anyone's loop; and methods
to prune with: `Method(settings).masks(model, batches)`. BiP does both, and its step takes two batches."""

from blokern.bilevel.adversarial import NFGSMAT, PGDAT, TRADES, FastAT, GradAlign, Plain
from blokern.bilevel.adversarial_settings import (
    FastATSettings,
    GradAlignSettings,
    NFGSMATSettings,
    PGDATSettings,
    PlainSettings,
    TRADESSettings,
)
from blokern.bilevel.bip import BiP, BiPSettings
from blokern.bilevel.fast_bat import FastBAT, FastBATSettings
from blokern.bilevel.masking import PruningSettings
from blokern.bilevel.pruning import (
    IMP,
    OMP,
    SNIP,
    GraSP,
    GraSPSettings,
    Hydra,
    HydraSettings,
    IMPSettings,
    OMPSettings,
    RandomPruning,
    RandomPruningSettings,
    SNIPSettings,
    SynFlow,
    SynFlowSettings,
)
from blokern.bilevel.signals import Interrupted
from blokern.bilevel.step import StepResult, StepRule, TwoBatchRule
from blokern.bilevel.threat import ThreatModel
from blokern.bilevel.train_settings import TrainSettings
from blokern.bilevel.trainer import Trainer

__all__ = [
    "IMP",
    "METHODS",
    "NFGSMAT",
    "OMP",
    "PGDAT",
    "PRUNERS",
    "SNIP",
    "TRADES",
    "BiP",
    "BiPSettings",
    "FastAT",
    "FastATSettings",
    "FastBAT",
    "FastBATSettings",
    "GraSP",
    "GraSPSettings",
    "GradAlign",
    "GradAlignSettings",
    "Hydra",
    "HydraSettings",
    "IMPSettings",
    "Interrupted",
    "NFGSMATSettings",
    "OMPSettings",
    "PGDATSettings",
    "Plain",
    "PlainSettings",
    "PruningSettings",
    "RandomPruning",
    "RandomPruningSettings",
    "SNIPSettings",
    "StepResult",
    "StepRule",
    "SynFlow",
    "SynFlowSettings",
    "TRADESSettings",
    "ThreatModel",
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

#: The command line's name of each pruning method that fine-tuning follows, and its settings.
PRUNERS: dict[str, tuple[type, type]] = {
    "omp": (OMP, OMPSettings),
    "imp": (IMP, IMPSettings),
    "snip": (SNIP, SNIPSettings),
    "grasp": (GraSP, GraSPSettings),
    "synflow": (SynFlow, SynFlowSettings),
    "hydra": (Hydra, HydraSettings),
    "random": (RandomPruning, RandomPruningSettings),
}
