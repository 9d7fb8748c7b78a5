"""The summary of a run agrees with the run; warnings about repeated text and a full disk."""

from pathlib import Path
from typing import Any

import pytest
from support.messages import assert_facts
from support.tiny import Tiny, recipe_of
from support.whole_runs import language_model_values, logged_lines
from support.workers import WorkerPool

from megatron_prealign.checkpoint.directory import directory_bytes
from megatron_prealign.model.sizes import count_model_parameters, padded_vocab_size
from megatron_prealign.resources import machine_memory
from megatron_prealign.run import summary as summary_module
from megatron_prealign.run.plan import MANY_PASSES, SourceTokens
from megatron_prealign.run.requirements import process_memory
from megatron_prealign.run.summary import Summary, summarise
from megatron_prealign.text import plural, readable_bytes

VOCAB_SIZE = 1024


def summary_of(values: dict[str, Any], directory: Path, tokens: int = 10_000, **arguments: Any) -> Summary:
    recipe = recipe_of(values, directory)
    sources = [SourceTokens(each.path, each.language, each.weight, tokens) for each in recipe.data.sources]
    return summarise(recipe, vocab_size=VOCAB_SIZE, sources=sources, dictionary=None, **arguments)


def test_layout_and_parameters_of_a_process(tiny: Tiny, tmp_path: Path) -> None:
    values = tiny.values(tmp_path / "run")
    rows = dict(summary_of(values, tmp_path).rows)
    assert "up to" not in rows["processes"]
    values["parallel"] = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    assert_facts(dict(summary_of(values, tmp_path).rows)["processes"], "4 processes at least", "data 1")
    rows = dict(summary_of(values, tmp_path, world_size=8).rows)
    assert_facts(rows["processes"], "8 processes:", "tensor 2", "pipeline 2", "data 2", "up to")


def test_a_source_that_is_read_many_times(tiny: Tiny, tmp_path: Path) -> None:
    """60 samples of 32 tokens, 80 % of them of the first source: 1,536 tokens."""
    values = tiny.values(tmp_path / "run")
    path = values["data"]["sources"][0]["path"]
    enough = 1536 // MANY_PASSES
    assert summary_of(values, tmp_path, tokens=enough).warnings == []
    (warning,) = summary_of(values, tmp_path, tokens=enough - 1).warnings
    assert_facts(warning, path, "16.2 times", "arXiv 2305.16264")


def test_a_disk_that_is_too_small(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = tiny.values(tmp_path / "run")
    monkeypatch.setattr(summary_module, "free_disk_bytes", lambda directory: 1000)
    (warning,) = summary_of(values, tmp_path).warnings
    assert_facts(warning, tmp_path / "run" / "checkpoints", "1.0 kB", "checkpoint.keep")
    # Existing checkpoints of the run are replaced by its next ones.
    old = tmp_path / "run" / "checkpoints" / "step_00000001"
    old.mkdir(parents=True)
    (old / "weights").write_bytes(bytes(10_000_000))
    assert summary_of(values, tmp_path).warnings == []
    monkeypatch.setattr(summary_module, "free_disk_bytes", lambda directory: None)
    assert summary_of(values, tmp_path).warnings == []


@pytest.mark.parametrize(("local", "processes"), [(None, 8), ("2", 2)])
def test_a_machine_with_too_little_memory(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, local: str | None, processes: int
) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if local is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    recipe = recipe_of(tiny.values(tmp_path / "run"), tmp_path)
    padded = padded_vocab_size(VOCAB_SIZE, recipe.model.make_vocab_size_divisible_by, 1)
    parameters = count_model_parameters(recipe.model, padded_vocab_size=padded, seq_length=recipe.data.seq_length)
    memory = process_memory(recipe, parameters, 8)
    needed = processes * (memory.total + memory.checkpoint_copy)

    def warnings(available: int | None, on_cpu: bool = True) -> list[str]:
        monkeypatch.setattr(summary_module, "machine_memory", lambda: available)
        return summary_of(tiny.values(tmp_path / "run"), tmp_path, world_size=8, on_cpu=on_cpu).warnings

    (warning,) = warnings(needed - 1)
    assert_facts(warning, plural(processes, "process"), readable_bytes(needed), "checkpoint.async_save")
    assert warnings(needed) == warnings(None) == warnings(1, on_cpu=False) == []


def test_memory_of_this_machine() -> None:
    memory = machine_memory()
    assert memory is not None and memory > 100_000_000


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("model", "hidden_size", 4 * 10**12),
        ("training", "train_iters", 10**15),
        ("training", "eval_samples", 10**18),
        ("training", "global_batch_size", 8 * 10**15),
        ("checkpoint", "keep", 10**18),
    ],
)
def test_absurd_numbers(tiny: Tiny, tmp_path: Path, section: str, field: str, value: int) -> None:
    values = tiny.values(tmp_path / "run")
    values["checkpoint"] = {"save_interval": 1, "keep_every": 3}
    values[section][field] = value
    summary = summary_of(values, tmp_path, on_cpu=True)
    assert len(summary.lines()) == 7 and max(map(len, summary.lines())) < 400


def trained(values: list[dict[str, Any]], directory: str) -> list[tuple[list[str], int]]:
    """Runs in a worker: the log of each run and the computed bytes of a checkpoint."""
    from megatron_prealign.run.pretrain import pretrain
    from megatron_prealign.run.requirements import checkpoint_bytes

    results = []
    for number, each in enumerate(values):
        recipe = recipe_of(each, Path(directory) / str(number))
        with logged_lines() as lines:
            pretrain(recipe, leave_process_group=True)
        padded = padded_vocab_size(VOCAB_SIZE, recipe.model.make_vocab_size_divisible_by, 1)
        parameters = count_model_parameters(recipe.model, padded_vocab_size=padded, seq_length=recipe.data.seq_length)
        results.append((lines, checkpoint_bytes(recipe, parameters)))
    return results


def test_computed_checkpoint_size_is_that_of_a_run(workers: WorkerPool, tiny: Tiny, tmp_path: Path) -> None:
    """Within 2 % and the fixed size of metadata and tensor headers, for each way that optimizer states are saved."""
    cases = []
    for number, (precision, distributed) in enumerate([("fp32", True), ("bf16", False)]):
        values = language_model_values(tiny, tmp_path / f"run{number}")
        # Large enough that the metadata does not matter.
        values["model"] |= {"hidden_size": 256, "num_layers": 1}
        values["training"] |= {"precision": precision, "train_iters": 1}
        values["parallel"] |= {"use_distributed_optimizer": distributed}
        values["optimizer"]["lr_warmup_iters"] = 0
        del values["code_switch"]
        cases.append(values)
    (results,) = workers.run(1, trained, cases, str(tmp_path))
    for number, (lines, computed) in enumerate(results):
        real = directory_bytes(tmp_path / f"run{number}" / "checkpoints" / "step_00000001")
        assert computed == pytest.approx(real, rel=0.02)
        log = "\n".join(lines)
        assert_facts(log, readable_bytes(computed), "step 1/1 (language_model 1/1)")
