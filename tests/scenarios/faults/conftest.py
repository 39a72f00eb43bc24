"""What several tests of faults share: two nodes, whole again for each test."""

from collections.abc import Iterator

import pytest

from tests.scenarios.faults.nodes import TwoNodes, why_not


@pytest.fixture(scope="module")
def _room() -> Iterator[TwoNodes]:
    reason = why_not()
    if reason:
        pytest.skip(reason)
    with TwoNodes() as room:
        yield room


@pytest.fixture
def room(_room: TwoNodes) -> Iterator[TwoNodes]:
    yield _room
    _room.end()
    _room.mend()
