from collections.abc import Iterator

import pytest
from gang import Gang


@pytest.fixture(scope="session")
def two() -> Iterator[Gang]:
    gang = Gang(2)
    yield gang
    gang.close()


@pytest.fixture(scope="session")
def four() -> Iterator[Gang]:
    gang = Gang(4)
    yield gang
    gang.close()
