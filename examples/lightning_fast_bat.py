"""Fast-BAT under Lightning's Trainer, validated by an attack after every epoch.

pip install lightning; python examples/lightning_fast_bat.py
"""

import lightning
import torch
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, TensorDataset

from blokern import data, models
from blokern.attack import PGD
from blokern.bilevel import FastBAT, FastBATSettings
from blokern.bilevel.lightning import RuleModule

EPS = 0.1


def loader(images, **options):
    return DataLoader(TensorDataset(images.images.float() / 255, images.labels), 64, **options)


def main(epochs=8, **options):
    lightning.seed_everything(0)
    splits = data.load("digits")
    train = loader(splits.train, shuffle=True, drop_last=True)
    model = models.small_cnn(in_channels=1, mean=splits.train.mean, std=splits.train.std)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    rule = FastBAT(model, optimizer, FastBATSettings(eps=EPS, step_size=20.0))
    scheduler = OneCycleLR(optimizer, max_lr=0.2, total_steps=epochs * len(train), cycle_momentum=False)
    module = RuleModule(rule, scheduler, attack=PGD(model, EPS, EPS / 4, steps=10, early_stop=True))
    trainer = lightning.Trainer(max_epochs=epochs, accelerator="cpu", logger=False, **options)
    trainer.fit(module, train, loader(splits.test))
    return trainer.logged_metrics


if __name__ == "__main__":
    main()
