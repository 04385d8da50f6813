"""These tests need the engine: without a compiler there is none."""

import pytest

from depthfuse.native.library import why_missing


def pytest_collection_modifyitems(items):
    reason = why_missing()
    if reason:
        for item in items:
            if "tests/native/" in str(item.path) and "without" not in item.name:
                item.add_marker(pytest.mark.skip(reason=f"no native engine: {reason}"))
