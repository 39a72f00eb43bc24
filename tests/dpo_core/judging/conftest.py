"""The judge server for these tests."""

from tests.support.sites.judge_server import server

__all__ = ["server"]
