"""The judge's server, for the tests of this room."""

from tests.judge_server import server

__all__ = ["server"]
