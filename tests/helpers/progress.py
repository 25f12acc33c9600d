# SPDX-License-Identifier: Apache-2.0
"""What a run of many tests says: how long the last one took, where it is now, and what was skipped and why."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import pytest

EVERY = 30.0  # seconds
MANY = 200  # tests: fewer need no such lines
LAST_RUN = "progress/seconds"


def minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


class Progress:
    """One in the process that prints; xdist's workers have none."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.total = self.done = 0
        self.started = self.spoke = time.monotonic()

    def say(self, line: str) -> None:
        reporter: Any = self.config.pluginmanager.get_plugin("terminalreporter")
        reporter.ensure_newline()
        reporter.write_line(line)

    def start(self, total: int) -> None:
        if self.total:
            return  # xdist: every worker has collected the same tests
        self.total = total
        last = self.config.cache.get(LAST_RUN, {}).get(str(total)) if getattr(self.config, "cache", None) else None
        if total >= MANY:
            self.say(f"{total} tests; " + (f"the last such run took {minutes(last)}" if last else "the first such run"))

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        if session.items:  # with xdist the printing process collects nothing
            self.start(len(session.items))

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: Any, ids: list[str]) -> None:
        self.start(len(ids))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "teardown":
            return
        self.done += 1
        now = time.monotonic()
        if self.total >= MANY and now - self.spoke >= EVERY:
            self.spoke = now
            self.say(f"{minutes(now - self.started)}: {self.done} of {self.total} tests, now {report.location[0]}")

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self.total >= MANY and self.done == self.total and getattr(self.config, "cache", None):
            # A run of as many tests lasts as long: what was selected is told by its size.
            seconds = {**self.config.cache.get(LAST_RUN, {}), str(self.total): time.monotonic() - self.started}
            self.config.cache.set(LAST_RUN, seconds)
        if reasons := Counter(reason(report) for report in terminalreporter.stats.get("skipped", [])):
            terminalreporter.write_line("skipped: " + "; ".join(f"{why} ({n})" for why, n in reasons.most_common()))


def reason(report: Any) -> str:
    """Of a skipped test or file, in the words of its mark."""
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text.removeprefix("Skipped: ")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Progress(config), "progress")
