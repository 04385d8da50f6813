"""Tests that take too long for every run: DEPTHFUSE_LONG=1 asks for them."""

import os

import pytest

LONG = os.environ.get("DEPTHFUSE_LONG") == "1"


def on_request(how_long: str) -> pytest.MarkDecorator:
    """Function decorator: skip a test unless it is asked for."""
    return pytest.mark.skipif(not LONG, reason=f"{how_long}: set DEPTHFUSE_LONG=1")
