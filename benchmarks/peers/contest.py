"""The same work by several libraries, whose results are compared before their times count."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from blokern._race import Case, pretty, run_case

Run = Callable[[], Any]
#: All rivals' results -> what to say of each; AssertionError where they are not the same.
Agree = Callable[[Mapping[str, Any]], Mapping[str, str]]


@dataclass(frozen=True)
class Contest:
    """A :class:`Case` with `agree`. Rivals that are called "blokern..." are ours, and `ours` is the one of them that
    ratios are of. `rounds`: for work so long that it is timed so often without warming up, and that the results
    compared are those that were timed; None for short work."""

    name: str
    rivals: Mapping[str, Run]
    ours: str
    agree: Agree
    rounds: int | None = None


def hold(contest: Contest, rounds: int) -> list[dict[str, Any]]:
    """A row a rival: :class:`blokern._race.Row`'s fields, and `result`. rounds: of short work."""
    results: dict[str, Any] = {}

    def kept(name: str, run: Run) -> Run:
        def call() -> None:
            results[name] = run()

        return call

    rivals = {name: kept(name, run) for name, run in contest.rivals.items()}
    if contest.rounds is not None:
        rows = run_case(Case(contest.name, rivals, contest.ours, long=True), contest.rounds)
        try:
            said = contest.agree(results)
        except AssertionError as error:
            took = ", ".join(f"{row.rival} {pretty(row.seconds)}" for row in rows)
            raise AssertionError(f"{error}; it took {took}") from error
    else:
        for run in rivals.values():
            run()
        said = contest.agree(results)
        rows = run_case(Case(contest.name, contest.rivals, contest.ours), rounds)
    return [asdict(row) | {"result": said[row.rival]} for row in rows]


def close(ours: str, tolerance: float) -> Agree:
    """Tensors that are `ours` to a relative error (of the norm) of `tolerance`."""

    def agree(results: Mapping[str, Any]) -> Mapping[str, str]:
        want = results[ours].double().flatten()
        errors = {
            name: float((got.double().flatten() - want).norm() / want.norm()) for name, got in results.items()
        }
        for name, error in errors.items():
            assert error <= tolerance, f"{name}: relative error {error:.2g} of {ours}"
        return {name: "" if name == ours else f"error {error:.0e}" for name, error in errors.items()}

    return agree


def flat(parts: Any) -> torch.Tensor:
    """One vector of a dict's or an iterable's tensors."""
    values = parts.values() if isinstance(parts, Mapping) else parts
    return torch.cat([torch.as_tensor(part).detach().flatten() for part in values])
