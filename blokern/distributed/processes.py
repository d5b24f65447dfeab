"""The processes that train one network together, and all that they exchange.

Each holds the whole network and a part of every batch. What one process would compute of the batch is the mean or the
sum of what they compute of the parts, so that all stay equal, bit for bit: collectives give everyone the same result.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["Processes", "joined"]

T = TypeVar("T")

#: Bytes that are exchanged at once: enough for the network's full rate, few enough to copy one while another travels.
_BUCKET = 1 << 25


@dataclass(frozen=True)
class Processes:
    """The processes that train one network together; by default this one alone, which exchanges nothing.

    All must call the same methods in the same order. One that ends, by an error or a signal, is noticed by the others:
    their next exchange raises ConnectionError.

    Args:
        group: torch.distributed's, with a backend for CPU tensors besides that of the network's device.

    >>> with joined() as processes:
    ...     rule = FastBAT(model, optimizer, settings, processes)
    """

    group: dist.ProcessGroup | None = None

    @property
    def size(self) -> int:
        """How many they are."""
        return 1 if self.group is None else self.group.size()

    @property
    def rank(self) -> int:
        """This one's number, from 0."""
        return 0 if self.group is None else self.group.rank()

    @property
    def leads(self) -> bool:
        """Whether this is the one that writes files and speaks."""
        return self.rank == 0

    def part(self, count: int) -> slice:
        """This process's part of a batch of `count` samples; they are dealt in equal parts, in order.

        Raises ValueError if there are no equal parts.
        """
        share, rest = divmod(count, self.size)
        if rest:
            raise ValueError(f"a batch must have equal parts for {self.size} processes, got {count} samples")
        return slice(self.rank * share, (self.rank + 1) * share)

    # --- Tensors --------------------------------------------------------------------------------------------

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over the processes: any shapes, dtypes and devices, the same everywhere."""
        if self.size == 1:
            return
        under_way = [(bucket, *self._send(bucket)) for bucket in _buckets(tensors)]
        for bucket, flat, work in under_way:
            with _noticed():
                work.wait()
            _unpack(flat, bucket)

    def average_(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its mean over the processes; floating-point, else as `sum_`."""
        if self.size == 1:
            return
        self.sum_(tensors := list(tensors))
        torch._foreach_div_(tensors, self.size)

    def average_gradients(self, model: nn.Module) -> None:
        """Average every gradient, and the running statistics of normalisation layers with them.

        A parameter that no process has a gradient of keeps none. Parameters must be the same everywhere: `equalize_`.
        """
        if self.size == 1:
            return
        parameters = [p for p in model.parameters() if p.requires_grad]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        # Who has any: on the way with them, and looked at only where one is missing.
        present = grads[0].new_tensor([p.grad is not None for p in parameters]) if grads else torch.zeros(0)
        self.average_([*grads, present, *running_statistics(model)])
        missing = [i for i, p in enumerate(parameters) if p.grad is None]
        for i in missing:
            if present[i] != 0:
                parameters[i].grad = grads[i]

    def equalize_(self, model: nn.Module) -> None:
        """Give every process the parameters and buffers of the first."""
        if self.size > 1:
            for bucket in _buckets(t.detach() for t in (*model.parameters(), *model.buffers())):
                flat = _packed(bucket)
                with _noticed():
                    dist.broadcast(flat, group=self.group, group_src=0)
                _unpack(flat, bucket)

    def _send(self, bucket: Sequence[Tensor]) -> tuple[Tensor, Any]:
        flat = _packed(bucket)
        with _noticed():
            return flat, dist.all_reduce(flat, group=self.group, async_op=True)

    # --- Numbers and outcomes -------------------------------------------------------------------------------

    def largest(self, numbers: Sequence[int]) -> list[int]:
        """Of each number the largest that a process has."""
        if self.size == 1:
            return [*numbers]
        largest = torch.tensor(numbers, dtype=torch.int64)
        with _noticed():
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        return largest.tolist()

    def lead(self, work: Callable[[], T]) -> T:
        """What `work` returns, or raises, in the first process; the others wait for it, and do not call it."""
        if self.size == 1:
            return work()
        outcome: list[Any] = [None, None]
        if self.leads:
            try:
                outcome[0] = work()
            except Exception as error:
                outcome[1] = error
        with _noticed():
            dist.broadcast_object_list(outcome, group=self.group, group_src=0)
        if outcome[1] is not None:
            raise outcome[1]
        result: T = outcome[0]
        return result


class _Parted:
    """In the place of a group that has ended."""

    def __getattr__(self, name: str) -> NoReturn:
        raise ConnectionError("the processes have parted: they exchange inside `with joined()` alone")


@contextmanager
def joined() -> Iterator[Processes]:
    """The processes that torchrun started together with this one; this one alone where it was not torchrun.

    Gloo exchanges what is on the CPU, NCCL what is on a GPU, where there is one.

    Raises ConnectionError if the others do not come.

    >>> with joined() as processes:
    ...     rule = FastBAT(model, optimizer, settings, processes)
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield Processes()
        return
    with _noticed():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    processes = Processes(dist.group.WORLD)
    yield processes
    # Not after an error: it would wait for processes that wait for this one. They notice when it ends.
    dist.destroy_process_group()
    # Whoever still has the processes must not keep the group: its threads end with it, and one that lets go of a tensor
    # while Python ends would take the program down (SIGABRT).
    object.__setattr__(processes, "group", _Parted())


def running_statistics(model: nn.Module) -> list[Tensor]:
    """The means and variances that normalisation layers in train mode keep.

    >>> len(running_statistics(nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4))))
    4
    """
    return [
        statistic
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.training
        for statistic in (module.running_mean, module.running_var)
        if statistic is not None
    ]


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in groups of one dtype and device, of a bucket's size or little more."""
    filling: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        bucket = filling.setdefault((tensor.dtype, tensor.device), [])
        bucket.append(tensor)
        if sum(t.nbytes for t in bucket) >= _BUCKET:
            yield filling.pop((tensor.dtype, tensor.device))
    yield from filling.values()


def _packed(bucket: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in bucket])


def _unpack(flat: Tensor, bucket: Sequence[Tensor]) -> None:
    for tensor, part in zip(bucket, torch.split(flat, [t.numel() for t in bucket]), strict=True):
        tensor.copy_(part.view(tensor.shape))


@contextmanager
def _noticed() -> Iterator[None]:
    """That another process is gone, in words; backends report it as a RuntimeError of their own."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConnectionError(
            f"another process of the run does not answer, see what it says ({reason})"
        ) from error
