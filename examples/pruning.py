"""A trained network, pruned to a tenth of its weights by each method, and trained on.

python examples/pruning.py
"""

import copy

import torch
import torch.nn.functional as F

from blokern import data, models
from blokern.attack import evaluate
from blokern.bilevel import (
    OMP,
    SNIP,
    GraSP,
    GraSPSettings,
    Hydra,
    HydraSettings,
    OMPSettings,
    RandomPruning,
    RandomPruningSettings,
    SNIPSettings,
    SynFlow,
    SynFlowSettings,
)
from blokern.sparse import sparsify

DENSITY = 0.1
METHODS = {
    "OMP": OMP(OMPSettings(density=DENSITY)),
    "SNIP": SNIP(SNIPSettings(density=DENSITY)),
    "GraSP": GraSP(GraSPSettings(density=DENSITY)),
    "SynFlow": SynFlow(SynFlowSettings(density=DENSITY)),
    "Hydra": Hydra(HydraSettings(density=DENSITY)),
    "random": RandomPruning(RandomPruningSettings(density=DENSITY)),
}


def train(model, batches, epochs):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for epoch in range(epochs):
        for x, y in batches.epoch(epoch):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model


def main(epochs=4, width=16):
    torch.manual_seed(0)
    splits = data.load("digits")
    test = data.Batches(splits.test, 256)
    batches = data.Batches(splits.train, 64, shuffle=True, drop_last=True)
    dense = models.small_cnn(in_channels=1, mean=splits.train.mean, std=splits.train.std, width=width)
    train(dense, batches, epochs)
    results = {"dense": evaluate(dense, test, {}).clean_accuracy}
    for name, method in METHODS.items():
        masks = method.masks(dense, list(batches.epoch(0)))
        pruned = train(sparsify(copy.deepcopy(dense), masks), batches, epochs)
        results[name] = evaluate(pruned, test, {}).clean_accuracy
    for name, accuracy in results.items():
        print(f"{name:8} {accuracy:.1%}")
    return results


if __name__ == "__main__":
    main()
