"""N processes that share each batch are one process: every rule and every pruner, in float64, and over many steps."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from gang import Gang
from torch import Tensor, nn

from blokern import bilevel
from blokern.bilevel import BiP, BiPSettings
from blokern.distributed import Processes, sync_batch_norm

STEPS = 20
BATCH = 8
TOLERANCE = 1e-6
EPS = 0.1


def network(normalized: bool) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.BatchNorm2d(6) if normalized else nn.Identity(),
        nn.Softplus(),
        nn.Conv2d(6, 8, 3, stride=2),
        nn.BatchNorm2d(8, momentum=None) if normalized else nn.Identity(),
        nn.Softplus(),
        nn.Flatten(),
        nn.Linear(32, 3),
    ).double()


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.rand(BATCH, 1, 6, 6, generator=generator, dtype=torch.float64),
            torch.randint(0, 3, (BATCH,), generator=generator),
        )
        for _ in range(count)
    ]


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)


def part(processes: Processes, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    share = processes.part(BATCH)
    return batch[0][share], batch[1][share]


def outcome(model: nn.Module, results: list[Tensor]) -> dict[str, Tensor]:
    state = {name: t.clone() for name, t in model.state_dict().items()}
    return {**state, "results": torch.stack(results)}


def trained(processes: Processes, method: str, normalized: bool = False) -> dict[str, Tensor]:
    model = network(normalized)
    if processes.rank > 0:
        nn.init.zeros_(model[0].weight)  # the first process's is what counts
    sync_batch_norm(model, processes)
    rule_type, settings_type = bilevel.METHODS[method]
    options = {} if method == "plain" else {"eps": EPS}
    options |= {"step_size": 5.0, "lam": 0.5} if method == "fast-bat" else {}
    rule = rule_type(model, sgd(model), settings_type(**options), processes)
    torch.manual_seed(5)
    results = []
    for batch in batches(STEPS):
        result = rule.step(*part(processes, batch))
        results.append(torch.stack([result.loss, *result.metrics.values()]))
    processes.average_(results)
    if method == "fast-bat":
        assert (
            0.1 < float(torch.stack(results)[:, 1].mean()) < 0.9
        )  # the cross term counts, and so does the projection
    return outcome(model, results)


def pruned(processes: Processes, options: dict[str, object]) -> dict[str, Tensor]:
    model = network(False)
    settings, (example, _) = BiPSettings(**{"density": 0.3, "score_lr": 0.5, **options}), batches(1)[0]
    rule = BiP(model, sgd(model), settings, processes=processes, example=example)
    results = []
    data = batches(2 * STEPS)
    for lower, upper in zip(data[::2], data[1::2], strict=True):
        result = rule.step(part(processes, lower), part(processes, upper))
        results.append(torch.stack([result.loss, *(v.double() for v in result.metrics.values())]))
    processes.average_(results)
    assert float(torch.stack(results)[:, -1].sum()) > 0  # masks changed
    return outcome(model, results)


def assert_same(gang: Gang, work: Callable[..., dict[str, Tensor]], *args: object) -> None:
    want = work(Processes(), *args)
    results = gang(work, *args)
    for got in results:
        assert got.keys() == want.keys()
        for name, tensor in want.items():
            if name.endswith("mask_words"):
                assert torch.equal(got[name], tensor), name
            else:
                torch.testing.assert_close(got[name], tensor, rtol=TOLERANCE, atol=TOLERANCE, msg=name)
            assert torch.equal(got[name], results[0][name]), name  # and the same bits everywhere


@pytest.mark.parametrize("method", bilevel.METHODS)
def test_two_processes_are_one(method: str, two: Gang) -> None:
    assert_same(two, trained, method)


@pytest.mark.parametrize("method", ["fast-bat"])
def test_four_processes_are_one(method: str, four: Gang) -> None:
    assert_same(four, trained, method)


BIP = [
    {},
    {"mode": "released"},
    {"implicit": "cg", "implicit_steps": 3},
    {"granularity": "filter", "score_lr": 20.0},
]


@pytest.mark.parametrize("options", BIP)
def test_two_processes_prune_as_one(options: dict[str, object], two: Gang) -> None:
    assert_same(two, pruned, options)


def test_four_processes_prune_as_one(four: Gang) -> None:
    assert_same(four, pruned, {})


@pytest.mark.filterwarnings("ignore:.*double backward")
@pytest.mark.parametrize("method", ["fast-bat", "trades"])
def test_with_synchronised_batch_norm(method: str, two: Gang) -> None:
    assert_same(two, trained, method, True)


ONE_SHOT = {
    "snip": {},
    "grasp": {},
    "synflow": {"rounds": 3},
    "hydra": {"score_epochs": 2},
    "random": {},
    "omp": {},
}


def masks(processes: Processes, method: str) -> dict[str, Tensor]:
    pruner_type, settings_type = bilevel.PRUNERS[method]
    pruner = pruner_type(settings_type(density=0.3, **ONE_SHOT[method]), processes)
    found = pruner.masks(network(False), [part(processes, batch) for batch in batches(3)])
    return {name: mask.to_dense() for name, mask in found.items()}


@pytest.mark.parametrize("method", ONE_SHOT)
def test_one_shot_masks_of_all_batches(method: str, two: Gang) -> None:
    want = masks(Processes(), method)
    for got in two(masks, method):
        assert all(torch.equal(got[name], mask) for name, mask in want.items())
