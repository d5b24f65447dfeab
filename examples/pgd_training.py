"""An adversarial training loop as many have one, with its PGD step by blokern: the one line that is marked.

python examples/pgd_training.py
"""

import torch
import torch.nn.functional as F

from blokern import data, models, ops
from blokern.attack import PGD, evaluate

EPS, STEP, STEPS = 0.1, 0.03, 5


def attacked(model, x, y):
    x_adv = ops.random_start(x, EPS)
    for _ in range(STEPS):
        x_adv.requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(model(x_adv), y), x_adv)
        x_adv.detach_()
        # Was: x_adv = x_adv + STEP * grad.sign()
        #      x_adv = torch.clamp(torch.min(torch.max(x_adv, x - EPS), x + EPS), 0, 1)
        ops.pgd_step_(x_adv, x, grad, STEP, EPS)
    return x_adv


def main(epochs=8):
    torch.manual_seed(0)
    splits = data.load("digits")
    model = models.small_cnn(in_channels=1, mean=splits.train.mean, std=splits.train.std)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    batches = data.Batches(splits.train, 64, shuffle=True, drop_last=True)
    for epoch in range(epochs):
        for x, y in batches.epoch(epoch):
            x_adv = attacked(model, x, y)
            loss = F.cross_entropy(model(x_adv), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: loss {loss:.3f}")
    attack = PGD(model, EPS, EPS / 4, steps=20, early_stop=True)
    result = evaluate(model, data.Batches(splits.test, 256), attack)
    print(f"SA {result.clean_accuracy:.1%}, RA {result.robust_accuracy:.1%} under {attack.name}")
    return result


if __name__ == "__main__":
    main()
