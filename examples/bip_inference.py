"""Train a network, prune it by BiP to a tenth of its weights, and see how much faster it answers.

python examples/bip_inference.py
"""

import time

import torch
import torch.nn.functional as F

from blokern import data, models
from blokern.attack import evaluate
from blokern.bilevel import BiP, BiPSettings
from blokern.sparse import samples_innermost, to_dense


def accuracy(model, test):
    return evaluate(model, data.Batches(test, 256), {}).clean_accuracy


def milliseconds(model, x, repeats=20):
    model.eval()
    with torch.inference_mode():
        model(x)
        start = time.perf_counter()
        for _ in range(repeats):
            model(x)
    return 1000 * (time.perf_counter() - start) / repeats


def main(epochs=4, width=64):
    torch.manual_seed(0)
    splits = data.load("digits")
    model = models.small_cnn(in_channels=1, mean=splits.train.mean, std=splits.train.std, width=width)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    first, second = (data.Batches(splits.train, 64, shuffle=True, drop_last=True, seed=s) for s in (0, 1))
    for epoch in range(epochs):
        for x, y in first.epoch(epoch):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    before = accuracy(model, splits.test)

    # Weights on one batch, which of them are kept on another.
    rule = BiP(model, optimizer, BiPSettings(density=0.1))
    for epoch in range(epochs):
        for lower, upper in zip(first.epoch(epoch), second.epoch(epoch), strict=True):
            rule.step(lower, upper)
    after = accuracy(model, splits.test)
    print(f"accuracy: dense {before:.1%}, a tenth of the weights {after:.1%}")

    x = torch.rand(128, 1, 8, 8)
    sparse = milliseconds(samples_innermost(model), x)
    dense = milliseconds(to_dense(model), x)
    print(f"128 images: dense {dense:.2f} ms, sparse {sparse:.2f} ms, {dense / sparse:.1f} times faster")
    return before, after


if __name__ == "__main__":
    main()
