"""Every rule of adversarial training in the same plain loop: what each costs, and how robust it makes the network.

python examples/adversarial_training.py
"""

import time

import torch

from blokern import data, models
from blokern.attack import PGD, evaluate
from blokern.bilevel import (
    NFGSMAT,
    PGDAT,
    TRADES,
    FastAT,
    FastATSettings,
    FastBAT,
    FastBATSettings,
    GradAlign,
    GradAlignSettings,
    NFGSMATSettings,
    PGDATSettings,
    TRADESSettings,
)

EPS = 0.1
RULES = {
    "Fast-AT": (FastAT, FastATSettings(eps=EPS)),
    "N-FGSM": (NFGSMAT, NFGSMATSettings(eps=EPS)),
    "GradAlign": (GradAlign, GradAlignSettings(eps=EPS)),
    "PGD-2": (PGDAT, PGDATSettings(eps=EPS, attack_steps=2)),
    "Fast-BAT": (FastBAT, FastBATSettings(eps=EPS, step_size=20.0)),
    "TRADES": (TRADES, TRADESSettings(eps=EPS)),
}


def train(kind, settings, splits, epochs, width):
    torch.manual_seed(0)
    model = models.small_cnn(in_channels=1, mean=splits.train.mean, std=splits.train.std, width=width)
    rule = kind(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), settings)
    batches = data.Batches(splits.train, 64, shuffle=True, drop_last=True)
    for epoch in range(epochs):
        for x, y in batches.epoch(epoch):
            rule.step(x, y)
    return model


def main(epochs=8, width=16):
    splits = data.load("digits")
    results = {}
    for name, (kind, settings) in RULES.items():
        start = time.perf_counter()
        model = train(kind, settings, splits, epochs, width)
        seconds = time.perf_counter() - start
        attack = PGD(model, EPS, EPS / 4, steps=20, early_stop=True)
        results[name] = evaluate(model, data.Batches(splits.test, 256), attack)
        clean, robust = results[name].clean_accuracy, results[name].robust_accuracy
        print(f"{name:10} SA {clean:.1%}, RA {robust:.1%}, {seconds:.1f} s")
    return results


if __name__ == "__main__":
    main()
