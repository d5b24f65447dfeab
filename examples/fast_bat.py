"""Fast-BAT in a loop of one's own: the rule takes the place of attack, loss, backward and step.

python examples/fast_bat.py
"""

import torch

from blokern import data, models
from blokern.attack import PGD, evaluate
from blokern.bilevel import FastBAT, FastBATSettings

EPS = 0.1


def main(epochs=8):
    torch.manual_seed(0)
    splits = data.load("digits")
    model = models.small_cnn(in_channels=1, mean=splits.train.mean, std=splits.train.std)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    rule = FastBAT(model, optimizer, FastBATSettings(eps=EPS, step_size=20.0))
    batches = data.Batches(splits.train, 64, shuffle=True, drop_last=True)
    for epoch in range(epochs):
        for x, y in batches.epoch(epoch):
            result = rule.step(x, y)
        print(f"epoch {epoch + 1}: loss {result.loss:.3f}")
    attack = PGD(model, EPS, EPS / 4, steps=20, early_stop=True)
    result = evaluate(model, data.Batches(splits.test, 256), attack)
    print(f"SA {result.clean_accuracy:.1%}, RA {result.robust_accuracy:.1%} under {attack.name}")
    return result


if __name__ == "__main__":
    main()
