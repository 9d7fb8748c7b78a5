"""Runs the files that take longest first, so that no worker of pytest-xdist is left with one at the end.

xdist itself sorts files by their number of tests (`--no-loadscope-reorder` turns that off), but a file of ten tests may
take a minute and one of a hundred a second. The seconds of each file are in `tests/durations.json`;
`--record-durations` writes them, for the files that ran.
"""

import json
from collections import defaultdict
from pathlib import Path

import pytest

RECORD = Path(__file__).parents[1] / "durations.json"


def recorded() -> dict[str, float]:
    return json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record-durations", action="store_true", help=f"write the seconds of each file to {RECORD.name}")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    seconds = recorded()
    # New files first, since they may be long. The order of tests within a file stays.
    items.sort(key=lambda item: (-seconds.get(file_of(item.nodeid), float("inf")), file_of(item.nodeid)))


def file_of(nodeid: str) -> str:
    return nodeid.split("::")[0]


class Recorder:
    """Adds up the reports of all workers in the main process."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._seconds[file_of(report.nodeid)] += report.duration

    def pytest_sessionfinish(self) -> None:
        seconds = recorded() | {name: round(spent, 1) for name, spent in self._seconds.items()}
        there = {name: spent for name, spent in seconds.items() if (RECORD.parents[1] / name).exists()}
        RECORD.write_text(json.dumps(there, indent=0, sort_keys=True) + "\n", encoding="utf-8")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--record-durations") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder())
