"""Some of the random networks that `make fuzz-networks` makes thousands of."""

from __future__ import annotations

import fuzz_networks
import pytest

CASES = {"products": 120, "masks": 80, "compaction": 12}


@pytest.mark.parametrize("subject", CASES)
@pytest.mark.filterwarnings("ignore")
def test_no_answer_is_silently_wrong(subject: str) -> None:
    answered = sum(fuzz_networks.run_case(number, subject)[1] == "" for number in range(CASES[subject]))
    assert answered > CASES[subject] / 2


def test_every_function_is_drawn() -> None:
    import random

    import random_networks
    from arbitrary import Draw

    drawn = {
        module.name
        for number in range(600)
        for module in random_networks.network(Draw(random.Random(number)))[0].modules()
        if isinstance(module, random_networks.Apply)
    }
    assert drawn == {*random_networks.FUNCTIONS, *random_networks.IMAGE_FUNCTIONS}
