"""A pytest plugin: writes the outcome of each test to a pipe or file at once, as a line of JSON.

python -m pytest -p bench.gpu.pytest_rows --rows FILE_DESCRIPTOR ...
"""

from __future__ import annotations

import json
import os

import pytest

from .kernel_hashes import fix_hashes

# In the names of most tests that took more than 12 s on an H200, nearly all of it compilation. Started last, they would
# leave the other cores idle.
SLOW = ("pairs", "everything", "every_feature", "features_decode", "same_bits", "linear", "planes", "head_dim_200",
        "threads_that", "the_pages")  # fmt: skip


def pytest_addoption(parser) -> None:
    parser.addoption("--rows", type=int, help="file descriptor that gets a line for each test")
    parser.addoption("--every", type=int, default=1, help="run each n-th of the collected tests")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items) -> None:
    """Runs after the selection by `-m` and `-k`, with the same result in each xdist worker."""
    step = config.getoption("--every")
    if step > 1:
        config.hook.pytest_deselected(items=[x for i, x in enumerate(items) if i % step])
        items[:] = items[::step]
    items.sort(key=lambda item: not any(word in item.name for word in SLOW))


class Rows:
    """For the process that receives the results of all workers."""

    def __init__(self, file: int):
        self.file = file
        self.seconds: dict[str, float] = {}

    def write(self, **values) -> None:
        os.write(self.file, (json.dumps(values) + "\n").encode())

    def pytest_xdist_node_collection_finished(self, node, ids) -> None:
        self.write(collected=len(ids))

    def pytest_collection_finish(self, session) -> None:
        self.write(collected=len(session.items))

    def pytest_runtest_logreport(self, report) -> None:
        """A test has up to three reports, but gets one row: at its first failure or skip, else after its call."""
        seconds = self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration
        if report.when == "call" or not report.passed:
            message = None if report.passed else shorten_report(report)
            self.write(nodeid=report.nodeid, outcome=report.outcome, seconds=round(seconds, 3), message=message)

    def pytest_collectreport(self, report) -> None:
        if report.failed:
            self.write(nodeid=report.nodeid, outcome="failed", seconds=0.0, message=shorten_report(report))


def shorten_report(report) -> str:
    """The first line of the error, or the reason of a skip."""
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2])[:300]
    crash = getattr(report.longrepr, "reprcrash", None)
    text = (crash.message if crash else str(report.longrepr)).strip().splitlines()
    return (text[0] if text else "")[:300]


def pytest_configure(config) -> None:
    fix_hashes()  # in each worker, so that none compiles a kernel again
    file = config.getoption("--rows")
    if file is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Rows(file))
