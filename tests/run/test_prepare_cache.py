"""`dataset prepare-cache`: the sample index of a training run, built ahead of it by any number of processes."""

import json
import logging
import os
import shlex
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.messages import assert_facts, assert_refused
from support.tiny import Tiny, recipe_of
from support.workers import WorkerPool

from megatron_prealign import cli


@pytest.fixture(autouse=True)
def log() -> Iterator[None]:
    """Restores the logging configuration, which the command changes."""
    logger = logging.getLogger("megatron_prealign")
    before = logger.handlers[:], logger.level, logger.propagate
    with warnings.catch_warnings():
        yield
    logger.handlers[:], logger.level, logger.propagate = before


def prepare_on_rank(values: dict[str, Any], directory: str, caches: list[str]) -> bool:
    """Runs in workers with separate cache directories or a shared one; returns whether this rank built the index."""
    from megatron_prealign.run.prepare_cache import prepare_cache

    values["data"]["cache"] = caches[int(os.environ["RANK"])]
    return prepare_cache(recipe_of(values, Path(directory))).built


def train_on_nodes(values: dict[str, Any], directory: str, caches: list[str]) -> int:
    """Runs in workers: trains with each rank as a separate node; fails if a rank builds an index."""
    from megatron_prealign.data import samples
    from megatron_prealign.run.pretrain import pretrain

    def refuse(*_: object) -> None:
        raise AssertionError("training rebuilds a prepared index")

    values["data"]["cache"] = caches[int(os.environ["RANK"])]
    # First process of its node.
    os.environ["LOCAL_RANK"] = "0"
    build = samples._build_arrays
    samples._build_arrays = refuse  # type: ignore[assignment]
    try:
        return pretrain(recipe_of(values, Path(directory)), leave_process_group=True).step
    finally:
        samples._build_arrays = build


def small(tiny: Tiny, directory: Path) -> dict[str, Any]:
    values = tiny.values(directory / "run")
    for section in ("dictionary", "alignment", "code_switch"):
        del values[section]
    values["training"] |= {"train_iters": 2, "global_batch_size": 4, "micro_batch_size": 2}
    return values


def visible(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if not path.name.endswith(".lock"))


def arrays(directory: Path) -> dict[str, bytes]:
    (cache,) = directory.iterdir() if not directory.name.startswith("blend") else (directory,)
    return {path.name: path.read_bytes() for path in sorted(cache.iterdir())}


@pytest.mark.slow
def test_two_nodes(tiny: Tiny, workers: WorkerPool, tmp_path: Path) -> None:
    """With separate disks both nodes build the same index; on a shared disk one does. Training finds it on every
    node."""
    values = small(tiny, tmp_path)
    own = [str(tmp_path / "node0"), str(tmp_path / "node1")]
    shared = [str(tmp_path / "shared")] * 2
    assert workers.run(2, prepare_on_rank, values, str(tmp_path / "a"), own) == [True, True]
    assert sorted(workers.run(2, prepare_on_rank, values, str(tmp_path / "b"), shared)) == [False, True]
    names = [visible(tmp_path / name) for name in ("node0", "node1", "shared")]
    assert names[0] == names[1] == names[2] and len(names[0]) == 1
    contents = [arrays(tmp_path / name / names[0][0]) for name in ("node0", "node1", "shared")]
    assert contents[0] == contents[1] == contents[2]
    assert workers.run(2, train_on_nodes, values, str(tmp_path / "c"), own) == [2, 2]


def test_the_command(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = small(tiny, tmp_path)
    del values["data"]["cache"]
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(values))
    command = ["dataset", "prepare-cache", "--config", str(recipe), "--training.train_iters", "3"]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    (cache,) = [path for path in (tmp_path / "run" / "cache").iterdir() if not path.name.endswith(".lock")]
    size = sum(path.stat().st_size for path in cache.glob("*.npy"))
    note, made, following = printed.splitlines()
    assert_facts(note, "data.cache", "logging.run_dir")
    assert made.startswith(f"wrote {cache}: 12 samples of 32 tokens, index of ")
    assert 0 < int(made.split("index of ")[1].split()[0].replace(",", "")) < size
    assert following.endswith(shlex.join(["pretrain", *command[2:]]))
    assert cli.main([*command, "--optimizer.lr", "0.5", "--parallel.tensor-model-parallel-size", "2"]) == 0
    line = capsys.readouterr().out.splitlines()[1]
    assert str(cache) in line and not line.startswith("wrote")
    assert cli.main([*command, "--training.seed", "4", "--data.cache", str(tmp_path / "other")]) == 0
    assert visible(tmp_path / "other") != [cache.name]
    (tmp_path / "file").write_text("in the way")
    for options, facts in [
        (["--data.cache", str(tmp_path / "file" / "cache")], ("cannot write", "sample index", tmp_path / "file")),
        (["--data.tokenizer", "none"], ("none: tokenizer not found",)),
        (["--data.seq_length", "1000000"], ("data.seq_length + 1 = 1000001",)),
        (["--data.no", "1"], ("unknown option --data.no",)),
    ]:
        assert_refused(cli.main([*command, *options]), capsys.readouterr().err, *facts)


KILLED = """
import os, signal, sys
from megatron_prealign import cli
from megatron_prealign.data import index_cache
index_cache._publish = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
cli.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_killed_builder(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Killed after writing all arrays under a temporary name: nothing looks complete, and the next run builds the
    index."""
    values = small(tiny, tmp_path)
    values["data"]["cache"] = str(tmp_path / "cache")
    (tmp_path / "recipe.json").write_text(json.dumps(values))
    command = ["dataset", "prepare-cache", "--config", str(tmp_path / "recipe.json")]
    done = subprocess.run([sys.executable, "-c", KILLED, *command], capture_output=True, timeout=100)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (unfinished,) = visible(tmp_path / "cache")
    assert unfinished.startswith(".blend-") and ".tmp-" in unfinished
    assert cli.main(command) == 0
    assert capsys.readouterr().out.startswith("wrote ")
    (built,) = visible(tmp_path / "cache")
    assert unfinished.startswith(f".{built}.tmp-")
