"""A few hundred of the cases that `make fuzz` runs for as long as one likes; hypothesis shrinks what fails."""

from __future__ import annotations

import random

import hostile
import pytest
from arbitrary import Draw
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_cases import CASES

few = settings(
    max_examples=12, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
sources = st.randoms(use_true_random=False)


@pytest.mark.parametrize("name", CASES)
@few
@given(source=sources)
def test_any_call_gives_the_oracles_answer(name: str, source: random.Random) -> None:
    CASES[name](Draw(source))


@pytest.mark.parametrize("name", CASES)
def test_any_call_works_or_is_refused(name: str) -> None:
    """In this process, where a call that reads out of bounds may go unseen; `make sanitize` sees it."""
    for number in range(2):
        draw = Draw(random.Random(number))
        for call in hostile.recorded(draw, name):
            for _ in range(15):
                hostile.attack(draw, call)
