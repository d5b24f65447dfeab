"""The loop around any step rule: schedule, validation, checkpoints, and a resume bit for bit."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import sys
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import SGD
from tqdm import tqdm

from blokern._names import unknown_name
from blokern.attack import PGD, eval_mode, evaluate
from blokern.bilevel import checkpoint, schedule
from blokern.bilevel.step import ScoreRule, StatefulRule, StepResult, StepRule, TwoBatchRule
from blokern.data import Batches, ImageDataset, Splits

__all__ = ["Interrupted", "Record", "TrainSettings", "Trainer", "accuracies", "on_device", "ranking"]

#: One epoch's line in metrics.jsonl.
Record: TypeAlias = dict[str, float]

#: Steps between two looks at the losses: on a GPU each look waits for all work queued so far.
READ_EVERY = 16


@dataclass(frozen=True)
class TrainSettings:
    """What a run is made of besides its method, model and data. The defaults are Fast-BAT's.

    Args:
        epochs: passes over the training images.
        batch_size: images a step.
        lr: peak learning rate.
        schedule: learning rate over the run: cyclic (0 → lr → 0), multistep (a tenth from 50 % on, a
            hundredth from 75 % on), cosine (lr → 0) or constant.
        momentum: of SGD.
        cycle_momentum: lower the momentum by up to 0.1 where the learning rate peaks, as Fast-BAT's released
            code does.
        weight_decay: of SGD.
        augment: random crops, and mirror images where the data allow it.
        channels_last: keep images and weights in channels-last memory order.
        seed: of the order of the images, of augmentation, and of all that the method draws.
        eps: L∞ budget of the validation attack, for pixels in [0, 1].
        val_steps: PGD steps of the validation attack, each eps / 4; 0 validates without an attack, and the best
            model is that of the highest standard accuracy.
        val_restarts: random restarts of the validation attack.
        val_samples: validate on at most so many images, the first of the validation split.
        val_batch_size: images a validation batch.

    Raises:
        TypeError, ValueError: a setting of another type or out of range.

    >>> settings = TrainSettings(epochs=10, lr=0.1, eps=0.1)
    >>> optimizer = settings.optimizer(model)
    """

    epochs: int = 20
    batch_size: int = 128
    lr: float = 0.2
    schedule: str = "cyclic"
    momentum: float = 0.9
    cycle_momentum: bool = False
    weight_decay: float = 5e-4
    augment: bool = True
    channels_last: bool = False
    seed: int = 0
    eps: float = 8 / 255
    val_steps: int = 10
    val_restarts: int = 1
    val_samples: int = 1000
    val_batch_size: int = 256

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "val_steps", "val_restarts", "val_samples", "val_batch_size"):
            value, least = getattr(self, name), 0 if name == "val_steps" else 1
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be an int, got {value!r}")
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if self.schedule not in schedule.SCHEDULES:
            raise unknown_name("schedule", self.schedule, schedule.SCHEDULES)
        lowest = schedule.MOMENTUM_DIP if self.cycle_momentum else 0.0
        for name, expected, fits in (
            ("lr", "positive and finite", 0 < self.lr < math.inf),
            ("momentum", f"in [{lowest}, 1)", lowest <= self.momentum < 1),
            ("weight_decay", "at least 0 and finite", 0 <= self.weight_decay < math.inf),
            ("eps", "in (0, 1]", 0 < self.eps <= 1),
            ("seed", "in [0, 2**63)", 0 <= self.seed < 2**63),
        ):
            if not fits:
                raise ValueError(f"{name} must be {expected}, got {getattr(self, name)}")

    def optimizer(self, model: nn.Module) -> SGD:
        """SGD over the model's parameters with these settings."""
        return SGD(model.parameters(), self.lr, momentum=self.momentum, weight_decay=self.weight_decay)


class Interrupted(KeyboardInterrupt):
    """The run was stopped by a signal, and saved where it stopped. Like Ctrl-C, it is no ``Exception``.

    signum: the signal; ``128 + signum`` is the customary exit code.
    """

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum


class Trainer:
    """Trains with ``rule`` in ``run_dir`` and can continue after any stop as if there had been none.

    In ``run_dir``: ``last.pt`` (where to continue), ``best.pt`` (highest robust accuracy on the validation
    images; see ``val_steps``), ``metrics.jsonl`` (a line an epoch), ``curves.png``, ``examples.png`` if the
    validation attacks, and TensorBoard's files where TensorBoard is installed. Each file is replaced whole, never
    half-written. A lock on ``.lock`` keeps a second process out while one trains; it ends with the process.

    A resumed run has the bits of an uninterrupted one wherever the training itself is reproducible: with the
    same machine and number of threads, and on a GPU with ``torch.use_deterministic_algorithms(True)``.

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

    Raises:
        OSError: ``run_dir`` cannot be written.
        BlockingIOError: another process trains in ``run_dir``.
        FileExistsError: ``run_dir`` holds a run and ``resume`` is false.
        CheckpointError: the run there is damaged or another one.
        ValueError: too few images.

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
    ) -> None:
        if not checkpoint_minutes > 0:
            raise ValueError(f"checkpoint_minutes must be positive, got {checkpoint_minutes}")
        if settings.cycle_momentum and any("momentum" not in group for group in rule.optimizer.param_groups):
            raise ValueError(f"cycle_momentum needs an optimizer with momentum, got {rule.optimizer}")
        if len(splits.val) == 0:
            raise ValueError("splits.val must hold images to choose the best model by, got none")
        self.rule = rule
        self.settings = settings
        self.run_dir = Path(run_dir)
        self.checkpoint_minutes = checkpoint_minutes
        self.keep_epochs = keep_epochs
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
        self._totals = _Totals()
        self._best = (-1.0, -1.0)
        self._rng: dict[str, Any] | None = None
        self._saved_at = time.monotonic()

        if settings.channels_last:
            rule.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub
        seeds = [settings.seed]
        if isinstance(rule, TwoBatchRule):
            seeds.append(-1 - settings.seed)  # no other run's
        train = on_device(self.device, splits.train)
        self._streams = [  # one a level
            Batches(
                train,
                settings.batch_size,
                shuffle=True,
                augment=settings.augment,
                drop_last=True,  # a last batch of one image would spoil BatchNorm's statistics
                seed=seed,
                channels_last=settings.channels_last,
            )
            for seed in seeds
        ]
        self._batches = self._streams[0]
        validation = splits.val.subset(range(min(len(splits.val), settings.val_samples)))
        self._validation = Batches(
            on_device(self.device, validation), settings.val_batch_size, channels_last=settings.channels_last
        )
        self._claim(resume)

    @property
    def complete(self) -> bool:
        """Whether the run has had all its epochs."""
        return self._epoch == self.settings.epochs

    def fit(self) -> list[Record]:
        """Train to the end, and return the records of all epochs, earlier ones of a resumed run included.

        Seeds torch's global generator. While it runs in the main thread, the first SIGINT or SIGTERM lets the
        current batch finish and saves; a second one acts at once.

        Raises:
            Interrupted: stopped by a signal; everything is saved.
            FloatingPointError: the loss or a weight is NaN or infinite; the checkpoints are those before.
            OSError: a file cannot be written.
            BlockingIOError: another process trains in ``run_dir``.

        >>> history = trainer.fit()
        >>> history[-1]["val_robust_accuracy"]
        """
        with _locked(self.run_dir):
            if self.complete:
                _say(f"{self.run_dir}: complete, all {self.settings.epochs} epochs are done")
            else:
                self._train()
            if not (self.run_dir / "curves.png").exists():
                self._draw()
        return self.history

    # --- An epoch -------------------------------------------------------------------------------------------

    def _train(self) -> None:
        if self._rng is None:
            torch.manual_seed(self.settings.seed)
            self._keep()
        else:
            _set_rng_state(self._rng)
            _say(f"{self.run_dir}: continuing {self._position()}")
        self._saved_at = time.monotonic()
        board = _tensorboard(self.run_dir, self._epoch)
        with _StopRequest() as stop, contextlib.closing(board), self._progress() as bar:
            while not self.complete:
                self._train_epoch(stop, bar)
                self._check_weights()
                record = self._validate(stop)
                self._finish_epoch(record)
                for name, value in record.items():
                    board.add_scalar(name, value, self._epoch)
                bar.write(_summary(record, self.settings.epochs), file=sys.stderr)
                if stop.signum is not None:
                    self._interrupt(stop.signum)

    def _train_epoch(self, stop: _StopRequest, bar: tqdm[Any]) -> None:
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
            result = rule.step(*batches) if isinstance(rule, TwoBatchRule) else rule.step(*batches[0])
            pending.append((self._batch + 1, batches[0][1], result))
            self._batch += 1
            bar.update()
            due = time.monotonic() - self._saved_at > 60 * self.checkpoint_minutes
            if len(pending) == READ_EVERY or due or stop.signum is not None:
                read()
                bar.set_postfix(self._postfix())
                if stop.signum is not None:
                    self._interrupt(stop.signum)
                if due:
                    self._check_weights()
                    self._save("last.pt")
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

    def _read(self, pending: list[tuple[int, Tensor, StepResult]]) -> None:
        """Bring the results of some steps to the host and add them up."""
        for batch, y, result in pending:
            loss = result.loss.item()
            if not math.isfinite(loss):
                self._diverged(f"the loss is {loss}", batch)
            correct = (result.logits.argmax(dim=1) == y).float().mean().item()
            values = {name: value.item() for name, value in result.metrics.items()}
            self._totals.add({**values, "loss": loss, "train_accuracy": correct}, len(y))

    def _validate(self, stop: _StopRequest) -> Record:
        """The epoch's record. The attack draws from its own generator: training does not depend on it."""
        lr = self.rule.optimizer.param_groups[0]["lr"]
        attack: Any = self._attack() if self.settings.val_steps else {}

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            for batch in self._validation:
                if stop.signum is not None:
                    self._interrupt(stop.signum)
                yield batch

        start = time.perf_counter()
        result = evaluate(self.rule.model, batches(), attack)
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

    def _attack(self) -> PGD:
        return PGD(
            self.rule.model,
            eps=self.settings.eps,
            step_size=self.settings.eps / 4,
            steps=self.settings.val_steps,
            restarts=self.settings.val_restarts,
            early_stop=True,
            generator=torch.Generator(self.device).manual_seed(self.settings.seed),
        )

    def _finish_epoch(self, record: Record) -> None:
        self.history.append(record)
        self._epoch, self._batch, self._totals = self._epoch + 1, 0, _Totals()
        if (score := ranking(record)) > self._best:
            self._best = score
            # Before last.pt: killed in between, the run repeats this epoch and writes the same best.pt again.
            self._save("best.pt")
        self._keep()
        self._save("last.pt")
        self._write_metrics()

    def _keep(self) -> None:
        if self._epoch in self.keep_epochs:
            self._save(f"epoch-{self._epoch}.pt")

    # --- Stopping -------------------------------------------------------------------------------------------

    def _interrupt(self, signum: int) -> None:
        self._check_weights()
        self._save("last.pt")
        name, last = signal.Signals(signum).name, self.run_dir / "last.pt"
        raise Interrupted(signum, f"stopped by {name} {self._position()}; resume to continue from {last}")

    def _check_weights(self) -> None:
        """A last step can leave weights that no loss has shown yet: look before they are saved."""
        for name, tensor in self.rule.model.state_dict().items():
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                self._diverged(f"{name} is not finite", self._batch)

    def _diverged(self, what: str, batch: int) -> None:
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
        self.run_dir.mkdir(parents=True, exist_ok=True)
        probe = self.run_dir / ".probe"
        checkpoint.write_atomically(probe, b"probe")
        probe.unlink()
        last = self.run_dir / "last.pt"
        with _locked(self.run_dir):
            if not resume:
                for file in (last, self.run_dir / "best.pt", self.run_dir / "metrics.jsonl"):
                    if file.exists():
                        raise FileExistsError(
                            f"{self.run_dir} holds a run already ({file.name}): "
                            "resume, or choose another folder"
                        )
            elif last.exists():
                self._restore(checkpoint.load(last), last)
                self._write_metrics()

    def _save(self, name: str) -> None:
        self._rng = _rng_state()
        self._saved_at = time.monotonic()
        checkpoint.save(
            self.run_dir / name,
            {
                **self._identity,
                "model": self.rule.model.state_dict(),
                "optimizer": self.rule.optimizer.state_dict(),
                **({"rule": self.rule.state_dict()} if isinstance(self.rule, StatefulRule) else {}),
                "rng": self._rng,
                "epoch": self._epoch,
                "batch": self._batch,
                "totals": asdict(self._totals),
                "best": self._best,
                "history": self.history,
            },
        )

    def _restore(self, payload: Mapping[str, Any], source: Path) -> None:
        checkpoint.check_same(
            "run", {key: payload.get(key) for key in self._identity}, self._identity, source
        )
        checkpoint.load_weights(self.rule.model, payload["model"], source)
        try:
            self.rule.optimizer.load_state_dict(payload["optimizer"])
        except ValueError as error:
            raise checkpoint.CheckpointError(f"{source} is of another optimizer: {error}") from error
        if isinstance(self.rule, StatefulRule):
            try:
                self.rule.load_state_dict(payload["rule"])
            except ValueError as error:
                raise checkpoint.CheckpointError(f"{source} is of another model: {error}") from error
        self._rng = payload["rng"]
        self._epoch, self._batch = payload["epoch"], payload["batch"]
        self._totals = _Totals(**payload["totals"])
        self._best = payload["best"]
        self.history = payload["history"]

    def _write_metrics(self) -> None:
        """Write all lines anew, so that the file and the checkpoint always tell the same story."""
        lines = "".join(json.dumps(record) + "\n" for record in self.history)
        checkpoint.write_atomically(self.run_dir / "metrics.jsonl", lines.encode())

    def _draw(self) -> None:
        from blokern import plots  # matplotlib takes a second to import

        model = self.rule.model
        if self.settings.val_steps:
            x, y = next(iter(self._validation))
            x, y = x[:8], y[:8]
            x_adv = self._attack()(x, y)
            with torch.no_grad(), eval_mode(model):
                before, after = model(x).argmax(dim=1), model(x_adv).argmax(dim=1)
            plots.examples(x, x_adv, y, before, after, self.run_dir / "examples.png")
        plots.curves({self.run_dir.name: self.history}, self.run_dir / "curves.png")

    # --- Display --------------------------------------------------------------------------------------------

    def _progress(self) -> tqdm[Any]:
        """A bar over all steps with the time left, where somebody watches."""
        total = self.settings.epochs * len(self._batches)
        # disable=None: shown on a terminal only.
        return tqdm(total=total, initial=self._step(), unit="step", disable=None, dynamic_ncols=True)

    def _postfix(self) -> dict[str, str]:
        shown = {"epoch": f"{self._epoch + 1}/{self.settings.epochs}"}
        shown["loss"] = f"{self._totals.means()['loss']:.3f}"
        if self.history:
            shown["val"] = accuracies(self.history[-1], digits=1)
        return shown


@dataclass
class _Totals:
    """Sums over an epoch's samples, and the seconds it took so far."""

    samples: int = 0
    seconds: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)

    def add(self, means: Mapping[str, float], samples: int) -> None:
        self.samples += samples
        for name, mean in means.items():
            self.sums[name] = self.sums.get(name, 0.0) + mean * samples

    def means(self) -> dict[str, float]:
        return {name: total / self.samples for name, total in self.sums.items()}


class _StopRequest:
    """Within it, the first SIGINT or SIGTERM is noted in ``signum``, and a second one acts as it did before.

    Only the main thread may set handlers; in another one nothing changes. An ignored signal stays ignored.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> _StopRequest:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(signum) is not signal.SIG_IGN:
                    self._previous[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._put_back()

    def _put_back(self) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)  # None: set outside Python

    def _note(self, signum: int, _: FrameType | None) -> None:
        if self.signum is not None:
            self._put_back()
            signal.raise_signal(signum)
        self.signum = signum


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of ``folder``, which one process at a time can; the system frees it when that one dies.

    The file stays behind: were it deleted, two processes could each lock a ``.lock`` of their own.
    """
    with (folder / ".lock").open("w") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(f"another process trains in {folder}: wait for it, or stop it") from None
        except (ImportError, OSError):
            pass  # Windows has no flock, nor do some network file systems: better to train unguarded there
        yield


def on_device(device: torch.device, dataset: ImageDataset) -> ImageDataset:
    """The data set with its images and labels on the device."""
    return replace(dataset, images=dataset.images.to(device), labels=dataset.labels.to(device))


def _rng_state() -> dict[str, Any]:
    """The state of torch's global generators, from which the methods draw."""
    return {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _set_rng_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def _tensorboard(run_dir: Path, epoch: int) -> Any:
    """TensorBoard's writer, forgetting what it was told after ``epoch``, or one that does nothing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        _say("TensorBoard is not installed: metrics go to metrics.jsonl only")
        return _NoBoard()
    return SummaryWriter(str(run_dir), purge_step=epoch + 1)


class _NoBoard:
    def add_scalar(self, name: str, value: float, step: int) -> None:
        pass

    def close(self) -> None:
        pass


def ranking(record: Record) -> tuple[float, float]:
    """What the best epoch is the highest in."""
    return record.get("val_robust_accuracy", 0.0), record["val_accuracy"]


def accuracies(record: Record, digits: int = 2) -> str:
    """A record's standard and robust accuracy, in words."""
    names = {"SA": "val_accuracy", "RA": "val_robust_accuracy"}
    return ", ".join(f"{word} {record[name]:.{digits}%}" for word, name in names.items() if name in record)


def _summary(record: Record, epochs: int) -> str:
    return (
        f"epoch {record['epoch']}/{epochs}: loss {record['loss']:.4f}, train {record['train_accuracy']:.2%}, "
        f"validation {accuracies(record)}; "
        f"{record['train_seconds']:.1f} s + {record['val_seconds']:.1f} s"
    )


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
