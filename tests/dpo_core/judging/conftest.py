"""The judge's server, for the tests of this room."""

from tests.support.sites.judge_server import server

__all__ = ["server"]
