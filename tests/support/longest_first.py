"""Runs the files that take longest first, so that no worker of pytest-xdist is left with one at the end.

xdist itself sorts files by their number of tests (`--no-loadscope-reorder` turns that off), but a file of ten tests may
take a minute and one of a hundred a second. The seconds of each file, of its `slow` tests and of the others, are in
`tests/durations.json`; `--record-durations` writes them, for the files that ran. Not for Triton's interpreter, whose
tests are shared out one by one.
"""

import json
import os
from collections import defaultdict
from pathlib import Path

import pytest

RECORD = Path(__file__).parents[1] / "durations.json"


Seconds = dict[str, dict[str, float]]
"""Seconds by part ("fast" or "slow") and file."""


def recorded() -> Seconds:
    return json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record-durations", action="store_true", help=f"write the seconds of each file to {RECORD.name}")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    seconds = recorded()
    parts = defaultdict(set)
    for item in items:
        parts[file_of(item.nodeid)].add(part_of(item.get_closest_marker("slow") is not None))
    # New files first, since they may be long. The order of tests within a file stays.
    expected = {
        file: sum(seconds.get(part, {}).get(file, float("inf")) for part in sorted(of_file))
        for file, of_file in parts.items()
    }
    items.sort(key=lambda item: (-expected[file_of(item.nodeid)], file_of(item.nodeid)))


def file_of(nodeid: str) -> str:
    return nodeid.split("::")[0]


def part_of(is_slow: bool) -> str:
    return "slow" if is_slow else "fast"


class Recorder:
    """Adds up the reports of all workers in the main process."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._seconds[part_of("slow" in report.keywords)][file_of(report.nodeid)] += report.duration

    def pytest_sessionfinish(self) -> None:
        seconds = recorded()
        for part, by_file in self._seconds.items():
            there = seconds.get(part, {}) | {file: round(spent, 1) for file, spent in by_file.items()}
            seconds[part] = {file: spent for file, spent in there.items() if (RECORD.parents[1] / file).exists()}
        RECORD.write_text(json.dumps(seconds, indent=0, sort_keys=True) + "\n", encoding="utf-8")


def pytest_configure(config: pytest.Config) -> None:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if config.getoption("--record-durations") and not interpreted and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder())
