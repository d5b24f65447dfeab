"""The largest eigenvalues of the loss's Hessian over the training images, before and after training.

python examples/hessian_eigenvalues.py
"""

import torch
import torch.nn.functional as F

from blokern import data, models
from blokern.curvature import HessianOperator, lanczos


def top_eigenvalues(model, loader, count=5, steps=30):
    hessian = HessianOperator(model.eval(), F.cross_entropy, loader)
    ritz = lanczos(hessian, steps, generator=torch.Generator().manual_seed(0))
    return ritz.values[-count:].flip(0)


def main(epochs=8, images=512, steps=30):
    torch.manual_seed(0)
    splits = data.load("digits")
    model = models.small_cnn(in_channels=1, mean=splits.train.mean, std=splits.train.std)
    loader = data.Batches(splits.train.subset(range(images)), 256)
    before = top_eigenvalues(model, loader, steps=steps)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    model.train()
    for epoch in range(epochs):
        for x, y in data.Batches(splits.train, 64, shuffle=True, drop_last=True).epoch(epoch):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    after = top_eigenvalues(model, loader, steps=steps)
    for name, values in {"before training": before, "after": after}.items():
        print(f"{name}: {', '.join(f'{value:.3g}' for value in values)}")
    return model, loader, after


if __name__ == "__main__":
    main()
