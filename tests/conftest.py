"""Fixtures shared by all tests."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

pytest_plugins = ["support.longest_first"]
# The same examples in every run.
settings.register_profile("seeded", derandomize=True, database=None, deadline=None)
settings.load_profile("seeded")

os.environ.setdefault("OMP_NUM_THREADS", "1")
# A shell without job control starts background commands with SIGINT ignored, and nohup starts them with SIGHUP ignored;
# processes started by tests inherit it.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator["WorkerPool"]:  # noqa: F821
    """Worker processes for multi-process tests, started once per session."""
    from support.workers import WorkerPool

    pool = WorkerPool(tmp_path_factory.mktemp("stores"))
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> "Tiny":  # noqa: F821
    """A tiny corpus in English and English-Clone, its tokenizer and dictionary."""
    from support.tiny import make_tiny

    return make_tiny(Path(tmp_path_factory.mktemp("tiny")))
