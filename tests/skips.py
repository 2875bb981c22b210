"""pytest plugin (-p tests.skips): a skip that no reason below explains fails the run. CI uses it.

So that a package or a compiler that went missing does not leave its tests out in silence.
"""

from __future__ import annotations

import re

import pytest

ALLOWED = (
    "torch sees no CUDA device",
    "only since transformers",
    "the interpreter of triton before 3.7 fails with numpy 2.4",
    # Bridges of TransformerLens need a newer transformers than the sets beside the newest have.
    "could not import 'transformer_lens.model_bridge'",
)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None:  # a worker of pytest-xdist
        return
    reasons = {
        str(report.longrepr[2]) for report in reporter.stats.get("skipped", ()) if isinstance(report.longrepr, tuple)
    }
    unexplained = sorted(reason for reason in reasons if not re.search("|".join(map(re.escape, ALLOWED)), reason))
    if unexplained:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        reporter.write_line("skipped without a reason that tests/skips.py allows: " + "; ".join(unexplained), red=True)
