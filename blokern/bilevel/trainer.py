"""The loop around any step rule: schedule, validation, checkpoints, and a resume bit for bit."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import sys
import time
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from tqdm import tqdm

from blokern.attack import PGD, eval_mode, evaluate
from blokern.bilevel import checkpoint, schedule
from blokern.bilevel.lock import locked
from blokern.bilevel.progress import check_progress
from blokern.bilevel.record import Record, Totals, accuracies, ranking, summary
from blokern.bilevel.saver import LAST, Saver, latest
from blokern.bilevel.signals import Interrupted, StopRequest
from blokern.bilevel.step import (
    DistributedRule,
    ScoreRule,
    StatefulRule,
    StepResult,
    StepRule,
    TwoBatchRule,
)
from blokern.bilevel.tensorboard import tensorboard
from blokern.bilevel.threat import ThreatModel
from blokern.bilevel.train_settings import TrainSettings
from blokern.data import Batches, Splits
from blokern.distributed import Processes, sync_batch_norm

__all__ = ["Trainer"]

#: Steps between two looks at the losses: on a GPU each look waits for all work queued so far.
READ_EVERY = 16
_METRICS = "metrics.jsonl"


class Trainer:
    """Trains with ``rule`` in ``run_dir`` and can continue after any stop as if there had been none.

    In ``run_dir``: ``last.pt`` (where to continue), ``best.pt`` (highest robust accuracy on the validation
    images; see ``val_steps``), ``metrics.jsonl`` (a line an epoch), ``curves.png``, ``examples.png`` if the
    validation attacks, and TensorBoard's files where TensorBoard is installed. Each file is replaced whole, never
    half-written. A lock on ``.lock`` keeps a second process out while one trains; it ends with the process.

    A resumed run has the bits of an uninterrupted one wherever the training itself is reproducible: with the
    same machine and number of threads, and on a GPU with ``torch.use_deterministic_algorithms(True)``.

    The processes of a :class:`DistributedRule` share each batch, and the validation's batches; the first one reads and
    writes the files. A signal that any of them gets stops all at the same step, or, while they validate, after it. How
    many they are is no part of the run: it may be continued by more or fewer.

    Args:
        rule: the method; its optimizer's learning rate (and momentum, if cycled) is set before each step, and the
            learning rate of its scores, if any: a tenth from 50 % of the run on, a hundredth from 75 % on. A rule of
            two levels gets a second batch of the same images, in another order. State of its own is saved too.
        splits: the data; it is copied to the model's device.
        settings: see :class:`TrainSettings`; ``optimizer`` of it makes the optimizer they describe.
        run_dir: the folder of the run, made if needed.
        resume: continue the run in ``run_dir``, or start it if there is none yet.
        recipe: plain values that say how rule, model and data were made. They are stored in the checkpoints,
            and a resume with other ones is refused.
        checkpoint_minutes: save at least this often within an epoch; in any case after each epoch.
        keep_epochs: also save ``epoch-N.pt`` after these epochs, 0 being the start.
        keep_last: how many ``last.pt`` to keep, as ``last.pt``, ``last-1.pt``, …; a damaged one is passed over.
        threat: what the network has been trained for before, where the rule does not attack itself, as in the
            fine-tuning of a pruned network. Checkpoints carry it, or the rule's own (:class:`ThreatModel`).

    Warns where the validation attacks with another eps than the rule.

    Raises:
        OSError: ``run_dir`` cannot be written.
        BlockingIOError: another process trains in ``run_dir``.
        FileExistsError: ``run_dir`` holds a run and ``resume`` is false.
        CheckpointError: the run there is damaged or another one.
        ValueError: too few images, or a rule for images that do not lie in [0, 1], as those of ``splits`` do.

    >>> trainer = Trainer(FastBAT(model, settings.optimizer(model), method), splits, settings, "runs/a")
    >>> history = trainer.fit()
    """

    def __init__(
        self,
        rule: StepRule | TwoBatchRule,
        splits: Splits,
        settings: TrainSettings,
        run_dir: str | Path,
        *,
        resume: bool = False,
        recipe: Mapping[str, Any] | None = None,
        checkpoint_minutes: float = 10.0,
        keep_epochs: Collection[int] = (),
        keep_last: int = 1,
        threat: ThreatModel | None = None,
    ) -> None:
        if not checkpoint_minutes > 0:
            raise ValueError(f"checkpoint_minutes must be positive, got {checkpoint_minutes}")
        if settings.cycle_momentum and any("momentum" not in group for group in rule.optimizer.param_groups):
            raise ValueError(f"cycle_momentum needs an optimizer with momentum, got {rule.optimizer}")
        if len(splits.val) == 0:
            raise ValueError("splits.val must hold images to choose the best model by, got none")
        #: What an attacker may do to the images that the network has been trained for; None for no attacker.
        self.threat = _threat(rule, settings, threat)
        self.rule = rule
        self.processes = rule.processes if isinstance(rule, DistributedRule) else Processes()
        self.splits = splits
        self.settings = settings
        self.run_dir = Path(run_dir)
        self.checkpoint_minutes = checkpoint_minutes
        self.keep_epochs = keep_epochs
        self.keep_last = keep_last
        #: The finished epochs' records.
        self.history: list[Record] = []
        self.device = next(rule.model.parameters()).device
        self._identity = {
            "method": {"rule": type(rule).__name__, "optimizer": type(rule.optimizer).__name__},
            "settings": asdict(settings),
            "recipe": dict(recipe or {}),
        }
        self._epoch = 0  # epochs finished, validation included
        self._batch = 0  # batches trained on in the epoch under way
        self._totals = Totals()
        self._best = (-1.0, -1.0)
        self._rng: dict[str, Any] | None = None
        self._saved_at = time.monotonic()

        if settings.sync_batch_norm:
            sync_batch_norm(rule.model, self.processes)
        if settings.channels_last:
            rule.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub
        seeds = [settings.seed]
        if isinstance(rule, TwoBatchRule):
            seeds.append(-1 - settings.seed)  # no other run's
        train = splits.train.to(self.device)
        self._streams = [  # one a level
            Batches(
                train,
                settings.batch_size,
                shuffle=True,
                augment=settings.augment,
                drop_last=True,  # a last batch of one image would spoil BatchNorm's statistics
                seed=seed,
                channels_last=settings.channels_last,
                shard=(self.processes.rank, self.processes.size),
            )
            for seed in seeds
        ]
        self._batches = self._streams[0]
        validation = splits.val.subset(range(min(len(splits.val), settings.val_samples)))
        self._validation = Batches(
            validation.to(self.device), settings.val_batch_size, channels_last=settings.channels_last
        )
        self._claim(resume)

    @property
    def complete(self) -> bool:
        """Whether the run has had all its epochs."""
        return self._epoch == self.settings.epochs

    def fit(self) -> list[Record]:
        """Train to the end, and return the records of all epochs, earlier ones of a resumed run included.

        Seeds torch's global generator. While it runs in the main thread, the first SIGINT, SIGTERM or SIGHUP lets the
        current batch finish and saves; a second one acts at once.

        Raises:
            Interrupted: stopped by a signal; everything is saved.
            FloatingPointError: the loss or a weight is NaN or infinite; the checkpoints are those before.
            OSError: a file cannot be written.
            BlockingIOError: another process trains in ``run_dir``.

        >>> history = trainer.fit()
        >>> history[-1]["val_robust_accuracy"]
        """
        with self._locked():
            if self.complete:
                done = (
                    "its epoch is done"
                    if self.settings.epochs == 1
                    else f"all {self.settings.epochs} epochs are done"
                )
                self._say(f"{self.run_dir}: complete, {done}")
            else:
                with contextlib.closing(Saver(self.run_dir, self.keep_last)) as self._saver:
                    self._train()
                    self.processes.lead(self._saver.flush)
            self.processes.lead(self._draw)
        return self.history

    # --- An epoch -------------------------------------------------------------------------------------------

    def _train(self) -> None:
        if self._rng is None:
            torch.manual_seed(self.settings.seed)
            self._keep()
        else:
            _set_rng_state(self._rng, self.device)
            self._say(f"{self.run_dir}: continuing {self._position()}")
        self._saved_at = time.monotonic()
        board = tensorboard(self.run_dir, self._epoch, writes=self.processes.leads)
        with StopRequest() as stop, contextlib.closing(board), self._progress() as bar:
            while not self.complete:
                self._train_epoch(stop, bar)
                self._check_weights()
                record = self._validate(stop)
                self._finish_epoch(record)
                for name, value in record.items():
                    board.add_scalar(name, value, self._epoch)
                self._say(summary(record, self.settings.epochs), bar)
                signum, _ = self._agreed(stop)
                if signum:
                    self._interrupt(signum)

    def _train_epoch(self, stop: StopRequest, bar: tqdm[Any]) -> None:
        self.rule.model.train()
        pending: list[tuple[int, Tensor, StepResult]] = []
        start = time.perf_counter()

        def read() -> None:
            nonlocal start
            self._read(pending)
            pending.clear()
            now = time.perf_counter()
            self._totals.seconds += now - start
            start = now

        for batches in zip(*(s.epoch(self._epoch, self._batch) for s in self._streams), strict=True):
            self._set_rates()
            rule = self.rule
            try:
                result = rule.step(*batches) if isinstance(rule, TwoBatchRule) else rule.step(*batches[0])
            except FloatingPointError as error:
                if self.processes.size == 1:  # the others are elsewhere
                    read()  # an earlier loss may have been the first
                self._diverged(str(error), self._batch + 1)
            pending.append((self._batch + 1, batches[0][1], result))
            self._batch += 1
            bar.update()
            due = time.monotonic() - self._saved_at > 60 * self.checkpoint_minutes
            signum, due = self._agreed(stop, due)
            if len(pending) == READ_EVERY or due or signum:
                read()
                bar.set_postfix(self._postfix())
                if signum:
                    self._interrupt(signum)
                if due:
                    self._check_weights()
                    self._save(LAST)
        read()

    def _set_rates(self) -> None:
        step, total = self._step(), self.settings.epochs * len(self._batches)
        for group in self.rule.optimizer.param_groups:
            group["lr"] = schedule.learning_rate(
                step, total, peak=self.settings.lr, schedule=self.settings.schedule
            )
            if self.settings.cycle_momentum:
                group["momentum"] = schedule.momentum(step, total, base=self.settings.momentum, cycle=True)
        if isinstance(self.rule, ScoreRule):
            self.rule.score_lr = schedule.learning_rate(
                step, total, peak=self.rule.settings.score_lr, schedule="multistep"
            )

    def _read(self, pending: Sequence[tuple[int, Tensor, StepResult]]) -> None:
        """Bring the results of some steps to the host and add them up; of several processes, their means."""
        if not pending:
            return
        rows = []
        for _, y, result in pending:
            correct = (result.logits.argmax(dim=1) == y).float().mean()
            rows.append(torch.stack([*result.metrics.values(), result.loss, correct]).double())
        means = torch.cat(rows)
        self.processes.average_([means])
        numbers = iter(means.tolist())
        for batch, y, result in pending:
            values = {name: next(numbers) for name in (*result.metrics, "loss", "train_accuracy")}
            if not math.isfinite(values["loss"]):
                self._diverged(f"the loss is {values['loss']}", batch)
            self._totals.add(values, len(y) * self.processes.size)

    def _validate(self, stop: StopRequest) -> Record:
        """The epoch's record. The attack draws from its own generator, seeded for each batch: training does not depend
        on it, and it not on which process has the batch."""
        lr = self.rule.optimizer.param_groups[0]["lr"]
        generator = torch.Generator(self.device)
        attack: Any = self._attack(generator) if self.settings.val_steps else {}
        rank, size = self.processes.rank, self.processes.size

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            for batch in self._validation.dealt(rank, size, generator, self.settings.seed):
                # Several processes may have different numbers of batches: there is no place to agree to stop.
                if stop.signum is not None and size == 1:
                    self._interrupt(stop.signum)
                yield batch

        start = time.perf_counter()
        result = evaluate(self.rule.model, batches(), attack, processes=self.processes)
        robust = {"val_robust_accuracy": result.robust_accuracy} if attack else {}
        return {
            "epoch": self._epoch + 1,
            **self._totals.means(),
            "lr": lr,
            "val_accuracy": result.clean_accuracy,
            **robust,
            "train_seconds": self._totals.seconds,
            "val_seconds": time.perf_counter() - start,
        }

    def _attack(self, generator: torch.Generator) -> PGD:
        return PGD(
            self.rule.model,
            eps=self.settings.eps,
            step_size=self.settings.eps / 4,
            steps=self.settings.val_steps,
            restarts=self.settings.val_restarts,
            early_stop=True,
            generator=generator,
        )

    def _finish_epoch(self, record: Record) -> None:
        self.history.append(record)
        self._epoch, self._batch, self._totals = self._epoch + 1, 0, Totals()
        if (score := ranking(record)) > self._best:
            self._best = score
            # Before last.pt: killed in between, the run repeats this epoch and writes the same best.pt again.
            self._save("best.pt")
        self._keep()
        self._save(LAST)
        self.processes.lead(lambda: self._saver.write(_METRICS, self._metrics()))

    def _keep(self) -> None:
        if self._epoch in self.keep_epochs:
            self._save(f"epoch-{self._epoch}.pt")

    # --- Stopping -------------------------------------------------------------------------------------------

    def _agreed(self, stop: StopRequest, due: bool = False) -> tuple[int, bool]:
        """The signal that some process got, 0 for none, and whether a checkpoint is due: the same for all."""
        signum, late = self.processes.largest([stop.signum or 0, due])
        return signum, bool(late)

    def _interrupt(self, signum: int) -> None:
        self._check_weights()
        self._save(LAST)
        self.processes.lead(self._saver.flush)
        name, last = signal.Signals(signum).name, self.run_dir / LAST
        raise Interrupted(signum, f"stopped by {name} {self._position()}; resume to continue from {last}")

    def _check_weights(self) -> None:
        """A last step can leave weights that no loss has shown yet: look before they are saved."""
        for name, tensor in self.rule.model.state_dict().items():
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                self._diverged(f"{name} is not finite", self._batch)

    def _diverged(self, what: str, batch: int) -> NoReturn:
        step = self._epoch * len(self._batches) + batch
        last = self.run_dir / "last.pt"
        kept = f"the last good checkpoint is {last}" if last.exists() else "there is no checkpoint yet"
        raise FloatingPointError(f"{what} in epoch {self._epoch + 1}, batch {batch} (step {step}); {kept}")

    def _step(self) -> int:
        return self._epoch * len(self._batches) + self._batch

    def _position(self) -> str:
        where = f"after epoch {self._epoch}" if self._batch == 0 else f"in epoch {self._epoch + 1}"
        return f"{where} of {self.settings.epochs}, batch {self._batch} of {len(self._batches)}"

    # --- Files ----------------------------------------------------------------------------------------------

    def _claim(self, resume: bool) -> None:
        """Make sure that the folder can be written and is this run's, before any work is put in."""
        Saver(self.run_dir, self.keep_last).close()  # refuses a bad number
        self.processes.lead(self._prepare)
        with self._locked():
            found = self.processes.lead(lambda: self._find(resume))
            if found is not None:
                self._restore(*found)
                path, lines = self.run_dir / _METRICS, self._metrics()
                self.processes.lead(lambda: checkpoint.write_atomically(path, lines))

    def _prepare(self) -> None:
        self.run_dir.mkdir(parents=True, exist_ok=True)
        probe = self.run_dir / ".probe"
        checkpoint.write_atomically(probe, b"probe")
        probe.unlink()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """The folder's lock, which the first process holds for all."""
        with contextlib.ExitStack() as stack:
            self.processes.lead(lambda: stack.enter_context(locked(self.run_dir)))
            yield

    def _find(self, resume: bool) -> tuple[dict[str, Any], Path] | None:
        """The checkpoint to continue from and its file, None for a new run."""
        if resume:
            return latest(self.run_dir, self._say)
        for name in (LAST, "best.pt", _METRICS):
            if (self.run_dir / name).exists():
                raise FileExistsError(
                    f"{self.run_dir} holds a run already ({name}): resume, or choose another folder"
                )
        return None

    def _save(self, name: str) -> None:
        self._rng = _rng_state(self.device)
        self._saved_at = time.monotonic()
        self.processes.lead(lambda: self._saver.save(name, self._payload()))

    def _payload(self) -> dict[str, Any]:
        return {
            **self._identity,
            "threat": None if self.threat is None else self.threat.plain(),
            "model": self.rule.model.state_dict(),
            "optimizer": self.rule.optimizer.state_dict(),
            **({"rule": self.rule.state_dict()} if isinstance(self.rule, StatefulRule) else {}),
            "rng": self._rng,
            "epoch": self._epoch,
            "batch": self._batch,
            "totals": asdict(self._totals),
            "best": self._best,
            "history": self.history,
        }

    def _restore(self, payload: Mapping[str, Any], source: Path) -> None:
        checkpoint.check_same(
            "run", {key: payload.get(key) for key in self._identity}, self._identity, source
        )
        if "threat" in payload:  # not in checkpoints of before
            here = None if self.threat is None else self.threat.plain()
            checkpoint.check_same("run", {"threat": payload["threat"]}, {"threat": here}, source)
        check_progress(payload, self.settings.epochs, len(self._batches), source)
        checkpoint.check_finite(payload.get("model"), source)
        checkpoint.load_weights(self.rule.model, payload["model"], source)
        try:
            self.rule.optimizer.load_state_dict(payload.get("optimizer"))  # type: ignore[arg-type]  # refused if none
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise checkpoint.CheckpointError(f"{source} is of another optimizer: {error}") from error
        if isinstance(self.rule, StatefulRule):
            try:
                self.rule.load_state_dict(payload.get("rule"))  # type: ignore[arg-type]  # refused if none
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise checkpoint.CheckpointError(f"{source} is of another model: {error}") from error
        self._rng = payload["rng"]
        self._epoch, self._batch = payload["epoch"], payload["batch"]
        self._totals = Totals(**payload["totals"])
        self._best = payload["best"]
        self.history = payload["history"]

    def _metrics(self) -> bytes:
        """All lines of metrics.jsonl, written anew so that it and the checkpoint always tell the same story."""
        return "".join(json.dumps(record) + "\n" for record in self.history).encode()

    def _draw(self) -> None:
        """The run's pictures, unless they are there; the run is done and saved whatever becomes of them."""
        if (self.run_dir / "curves.png").exists():
            return
        for draw in (self._draw_examples, self._draw_curves):
            try:
                draw()
            except Exception as error:  # of matplotlib, of its fonts, of the disk
                self._say(f"{self.run_dir}: a picture is not drawn: {error}")

    def _draw_curves(self) -> None:
        from blokern import plots  # matplotlib takes a second to import

        plots.curves({self.run_dir.name: self.history}, self.run_dir / "curves.png")

    def _draw_examples(self) -> None:
        from blokern import plots

        model = self.rule.model
        if self.settings.val_steps:
            x, y = next(iter(self._validation))
            x, y = x[:8], y[:8]
            generator = torch.Generator(self.device).manual_seed(self.settings.seed)
            x_adv = self._attack(generator)(x, y)
            with torch.no_grad(), eval_mode(model):
                before, after = model(x).argmax(dim=1), model(x_adv).argmax(dim=1)
            plots.examples(x, x_adv, y, before, after, self.run_dir / "examples.png")

    # --- Display --------------------------------------------------------------------------------------------

    def _say(self, message: str, bar: tqdm[Any] | None = None) -> None:
        if not self.processes.leads or sys.stderr is None:
            return
        with contextlib.suppress(OSError):  # whoever read it is gone, and the training is not
            write = tqdm.write if bar is None else bar.write
            write(message, file=sys.stderr)

    def _progress(self) -> tqdm[Any]:
        """A bar over all steps with the time left, where somebody watches."""
        total = self.settings.epochs * len(self._batches)
        # None: shown on a terminal only.
        disable = None if self.processes.leads and sys.stderr is not None else True
        return tqdm(total=total, initial=self._step(), unit="step", disable=disable, dynamic_ncols=True)

    def _postfix(self) -> dict[str, str]:
        shown = {"epoch": f"{self._epoch + 1}/{self.settings.epochs}"}
        shown["loss"] = f"{self._totals.means()['loss']:.3f}"
        if self.history:
            shown["val"] = accuracies(self.history[-1], digits=1)
        return shown


def _threat(rule: object, settings: TrainSettings, before: ThreatModel | None) -> ThreatModel | None:
    own = ThreatModel.of_rule(rule)
    if own is None:
        return before
    if before not in (None, own):
        raise ValueError(f"threat must be the rule's own, {own}, or None, got {before}")
    if (own.clip_min, own.clip_max) != (0.0, 1.0):
        raise ValueError(
            f"rule.settings: clip_min and clip_max must be 0 and 1, as the trainer's images lie in [0, 1], "
            f"got {own.clip_min:g} and {own.clip_max:g}"
        )
    if settings.val_steps and settings.eps != own.eps:
        warnings.warn(
            f"the validation attacks with settings.eps = {settings.eps:.4g}, the rule with eps = {own.eps:.4g}: "
            "best.pt is chosen under the former, and said to be trained for the latter",
            stacklevel=3,
        )
    return own


def _rng_state(device: torch.device) -> dict[str, Any]:
    """The state of torch's global generators, from which the methods draw: the same in all processes."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def _set_rng_state(state: Mapping[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
