"""Profiles of a few steps: which steps, which files, and that a failing profiler does not end a run."""

import copy
import gzip
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.messages import assert_facts, user_error
from support.tiny import Tiny, recipe_of
from support.whole_runs import run
from support.workers import WorkerPool
from torch.profiler import record_function

from megatron_prealign.training.profile import Profile


def trainer_at(step: int, device: str = "cpu") -> Any:
    return SimpleNamespace(
        state=SimpleNamespace(step=step, stop_requested=False),
        runtime=SimpleNamespace(rank=3, device=SimpleNamespace(type=device)),
    )


def run_steps(profile: Profile, first: int, last: int, *, device: str = "cpu") -> None:
    """A run that starts after step `first - 1` and ends after step `last`; each step is a range of its own."""
    trainer = trainer_at(first - 1, device)
    profile.on_start(trainer)
    for step in range(first, last + 1):
        with record_function(f"step {step}"):
            torch.zeros(2).sum()
        trainer.state.step = step
        profile.on_step(trainer)
    profile.on_end(trainer)
    profile.on_close(trainer)


def ranges(path: Path) -> Counter[str]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    return Counter(event["name"] for event in events if event.get("cat") == "user_annotation")


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize(
    ("first", "last", "profiled"),
    [
        (1, 9, (2, 4)),
        # Resumed between the two steps, or just before the first one.
        (3, 9, (3, 4)),
        (2, 9, (2, 4)),
        # Stopped between them.
        (1, 3, (2, 3)),
    ],
)
def test_profiles_both_steps_and_those_between(
    tmp_path: Path, first: int, last: int, profiled: tuple[int, int]
) -> None:
    run_steps(Profile([2, 4], tmp_path / "profile"), first, last)
    start, end = profiled
    assert names(tmp_path / "profile") == [f"steps_{start}-{end}_rank_3.json.gz"]
    (path,) = (tmp_path / "profile").iterdir()
    assert ranges(path) == {f"step {step}": 1 for step in range(start, end + 1)}


def test_a_single_first_step(tmp_path: Path) -> None:
    run_steps(Profile([1, 1], tmp_path), 1, 3)
    assert ranges(tmp_path / "steps_1-1_rank_3.json.gz") == {"step 1": 1}


def test_a_run_after_the_steps_writes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run_steps(Profile([2, 4], tmp_path / "profile"), 5, 7)
    assert not (tmp_path / "profile").exists()
    assert not caplog.messages


def test_a_run_that_ends_before_the_steps_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run_steps(Profile([5, 6], tmp_path / "profile"), 1, 3)
    (message,) = caplog.messages
    assert_facts(message, "logging.profile_steps", "step 5", "step 3")
    assert not (tmp_path / "profile").exists()


def test_a_profile_that_cannot_be_written_is_reported_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "profile").write_text("in the way")
    run_steps(Profile([1, 2], tmp_path / "profile"), 1, 4)
    (message,) = caplog.messages
    assert_facts(message, "FileExistsError", tmp_path / "profile", "continues")


def test_a_snapshot_of_gpu_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls only: there is no GPU here."""
    calls: list[Any] = []
    memory = torch.cuda.memory
    monkeypatch.setattr(memory, "_record_memory_history", lambda **options: calls.append(options))
    monkeypatch.setattr(memory, "_dump_snapshot", lambda path: Path(path).write_bytes(b"snapshot"))
    run_steps(Profile([2, 3], tmp_path), 1, 5, device="cuda")
    assert [set(options) for options in calls] == [{"max_entries"}, {"enabled"}]
    assert calls[1] == {"enabled": None}
    assert names(tmp_path) == ["steps_2-3_rank_3.json.gz", "steps_2-3_rank_3_memory.pickle"]
    assert (tmp_path / "steps_2-3_rank_3_memory.pickle").read_bytes() == b"snapshot"


def values_for(tiny: Tiny, directory: Path, steps: Any, **training: Any) -> dict[str, Any]:
    values = copy.deepcopy(tiny.values(directory))
    values["parallel"] = {"device": "cpu"}
    values["alignment"].update(train_iters=2)
    values["optimizer"].update(lr_warmup_iters=0)
    values["training"].update(train_iters=2, eval_samples=2, retrieval_words=4)
    values["training"].update(training)
    values["logging"]["profile_steps"] = steps
    return values


@pytest.mark.slow
def test_a_run_is_profiled_across_its_phases(workers: WorkerPool, tiny: Tiny, tmp_path: Path) -> None:
    run(workers, 2, values_for(tiny, tmp_path, [2, 3]), tmp_path)
    files = ["steps_2-3_rank_0.json.gz", "steps_2-3_rank_1.json.gz"]
    assert names(tmp_path / "profile") == files
    for name in files:
        found = ranges(tmp_path / "profile" / name)
        # Only the first phase has words.
        expected = {"forward-backward": 2, "optimizer": 2, "wait for samples": 2, "wait for words": 1}
        assert {range_: found[range_] for range_ in expected} == expected


@pytest.mark.parametrize(
    "steps", [[3], [1, 2, 3], [4, 3], [0, 2], [-3, -1], [1, 101]], ids=lambda steps: "-".join(map(str, steps))
)
def test_invalid_steps(tiny: Tiny, tmp_path: Path, steps: list[int]) -> None:
    with user_error("logging.profile_steps", steps, "from 1", "100 steps"):
        recipe_of(values_for(tiny, tmp_path, steps), tmp_path)


@pytest.mark.parametrize(
    ("training", "last"), [({}, 4), ({"train_iters": None, "train_tokens": 10 * 8 * 32}, 12)], ids=["iters", "tokens"]
)
def test_steps_after_the_end_of_the_run(tiny: Tiny, tmp_path: Path, training: dict[str, Any], last: int) -> None:
    recipe_of(values_for(tiny, tmp_path, [last, last], **training), tmp_path)
    with user_error("logging.profile_steps", [2, last + 1], f"up to {last}"):
        recipe_of(values_for(tiny, tmp_path, [2, last + 1], **training), tmp_path)


def test_steps_are_an_option(tiny: Tiny, tmp_path: Path) -> None:
    from megatron_prealign.recipe import load_recipe

    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(values_for(tiny, tmp_path, None)), encoding="utf-8")
    recipe = load_recipe(["--config", str(path), "--logging.profile_steps", "[2, 3]"])
    assert recipe.logging.profile_steps == [2, 3]
