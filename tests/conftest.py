"""The order of tests, and what collections of garbage leave out."""

from __future__ import annotations

import gc
from collections import Counter

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with files marked `long`, then with those of most tests: processes take whole files, and the one that got a
    long file last would keep the others waiting."""
    tests = Counter(item.path for item in items)
    long = {item.path for item in items if item.get_closest_marker("long")}
    items.sort(key=lambda item: (item.path not in long, -tests[item.path]))


def pytest_collection_finish() -> None:
    """Runs that want memory collect garbage, over and over: not among all that is imported and collected by then."""
    gc.freeze()
