"""Breaking things on purpose: kills, full disks, servers that go away, files that are damaged."""

import pytest

# Else an assertion that fails in there says nothing.
pytest.register_assert_rewrite("tests.scenarios.faults.whole")
