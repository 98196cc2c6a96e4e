"""The clients are tested against a real server process."""

from tests.server.conftest import shared

__all__ = ["shared"]
