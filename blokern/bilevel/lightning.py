"""Step rules under Lightning's Trainer, which owns loop, data, checkpoints and logging.

Needs lightning, and so is imported by itself::

    from blokern.bilevel.lightning import RuleModule

    rule = FastBAT(model, torch.optim.SGD(model.parameters(), lr=0.1), FastBATSettings(eps=8 / 255))
    lightning.Trainer(max_epochs=20).fit(RuleModule(rule), train_loader, val_loader)
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from blokern.attack import evaluate
from blokern.attack.evaluate import AnyAttack
from blokern.bilevel import schedule
from blokern.bilevel.step import ScoreRule, StatefulRule, StepRule, TwoBatchRule

try:
    from lightning.pytorch import LightningModule
except ImportError as error:
    raise ImportError("blokern.bilevel.lightning needs lightning: pip install lightning") from error

__all__ = ["RuleModule"]


class RuleModule(LightningModule):  # type: ignore[misc]  # lightning is optional
    """Trains by a step rule, `FastBAT`, `BiP` or one's own, with manual optimization, and validates.

    Logged are "loss" and the rule's metrics a step, and of validation batches (x, y) "val_accuracy", and
    "val_robust_accuracy" where there is an attack. Checkpoints hold the rule's own state, such as BiP's scores.
    A score learning rate falls as in :class:`blokern.bilevel.Trainer`.

    Args:
        rule: built on the model, where that is to be trained, and on its optimizer. One of two levels takes pairs of
            batches, as ``CombinedLoader([lower, upper])`` gives them.
        scheduler: of the rule's optimizer, stepped after every batch.
        attack: (x, y) -> x_adv on the same model, such as ``PGD(model, steps=10)``.

    Raises:
        ValueError: in fit, if the Trainer has several processes: :mod:`blokern.distributed` trains in these.

    >>> trainer.fit(RuleModule(rule, attack=PGD(model)), train_loader, val_loader)
    """

    def __init__(
        self,
        rule: StepRule | TwoBatchRule,
        scheduler: LRScheduler | None = None,
        attack: AnyAttack | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model, self.rule, self.scheduler, self.attack = rule.model, rule, scheduler, attack
        self._optimizer = rule.optimizer

    def configure_optimizers(self) -> Any:
        optimizer = {"optimizer": self._optimizer}
        return optimizer if self.scheduler is None else optimizer | {"lr_scheduler": self.scheduler}

    def on_fit_start(self) -> None:
        if self.trainer.world_size > 1:
            raise ValueError(
                f"trainer must have one process, got {self.trainer.world_size}: rules make gradients that DDP "
                "does not see; blokern.distributed trains in several"
            )

    def on_train_start(self) -> None:
        self.rule.optimizer = self.optimizers()  # Lightning's own, whose steps it counts

    def on_train_end(self) -> None:
        self.rule.optimizer = self._optimizer

    def training_step(self, batch: Any, batch_idx: int) -> None:
        if isinstance(self.rule, ScoreRule):
            total = self.trainer.estimated_stepping_batches
            self.rule.score_lr = self.rule.settings.score_lr * schedule.multistep(self.global_step / total)
        result = self.rule.step(*batch)
        if self.scheduler is not None:
            self.scheduler.step()
        self.log_dict({"loss": result.loss, **result.metrics}, prog_bar=True, batch_size=len(result.logits))

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        found = evaluate(self.model, [batch], {} if self.attack is None else self.attack)
        values = {"val_accuracy": found.clean_accuracy}
        if self.attack is not None:
            values["val_robust_accuracy"] = found.robust_accuracy
        self.log_dict(values, prog_bar=True, batch_size=found.samples)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if isinstance(self.rule, StatefulRule):
            checkpoint["rule"] = self.rule.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if isinstance(self.rule, StatefulRule):
            self.rule.load_state_dict(checkpoint["rule"])
