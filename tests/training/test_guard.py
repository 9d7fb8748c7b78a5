"""The alignment guard: which steps of language-model training have words, what they minimise and what they count."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.marks import slow_except
from support.phase_steps import open_run, step
from support.tiny import VOCAB_SIZE, Tiny
from support.whole_runs import records, run, weights
from support.workers import WorkerPool

LAYERS = 4
# 8 samples of 32 tokens.
SAMPLE_TOKENS = 256
PP2 = {"pipeline_model_parallel_size": 2}
VPP2 = {**PP2, "virtual_pipeline_model_parallel_size": 2}
TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
OVERLAP = {"overlap_grad_reduce": True}


def guarded(tiny: Tiny, run_dir: Path, **guard: Any) -> dict[str, Any]:
    """A recipe with a guard in language-model training; a floor requires a watch."""
    values = tiny.values(run_dir)
    values["alignment_guard"] = guard
    values["training"]["train_iters"] = 60
    values["parallel"] = {"device": "cpu", "use_distributed_optimizer": False}
    if "floor" in guard:
        values["alignment_watch"] = {"interval": 100}
    return values


def several_steps(
    values: dict[str, Any], directory: str, first: int, count: int, reports: dict[int, dict[str, list[float]]]
) -> list[dict[str, Any]]:
    """Runs in workers: steps of language-model training without updates, from step `first` of the phase on.

    Args:
        reports: Step -> measurement of the watch before it: direction -> P@1 of each layer.
    """
    from megatron_prealign.alignment.layout import WordLayout
    from megatron_prealign.checkpoint.train_state import TrainState

    recipe, runtime, inputs, phases, chunks = open_run(values, directory)
    phase = phases[-1]
    assert phase.name == "language_model"
    # The alignment phase had five steps.
    state = TrainState(phase=1, phase_step=first, step=5 + first, tokens=1000, phase_start_tokens=1000)
    layout = WordLayout.of(runtime, chunks)
    results = []
    for number in range(first, first + count):
        if number in reports:
            phase.on_alignment_watch(state, {name: {"p_at_1": by_layer} for name, by_layer in reports[number].items()})
            # As a checkpoint between the measurement and the step would.
            state = TrainState.from_dict(json.loads(json.dumps(state.to_dict())))
        before = state.tokens
        _, metrics = step(phase, state, chunks)
        words = phase._words.sampler.draw(state.step, layout)
        phase.advance(state)
        state.phase_step += 1
        state.step += 1
        results.append(
            {
                "metrics": metrics,
                "tokens": state.tokens - before,
                "word_tokens": words.tokens,
                "samples": state.consumed_samples,
                "below_floor": state.below_floor,
            }
        )
    return results


def word_steps(results: list[dict[str, Any]]) -> list[int]:
    """1 for each step with words; checks that all other metrics agree."""
    steps = []
    for index, result in enumerate(results):
        metrics = result["metrics"]
        steps.append(metrics["word_steps"])
        assert result["word_tokens"] > 0
        assert result["tokens"] == SAMPLE_TOKENS + metrics["word_steps"] * result["word_tokens"]
        # Words consume no samples of the blend.
        assert result["samples"] == 8 * (index + 1)
        assert ("alignment_loss" in metrics) == bool(metrics["word_steps"])
        assert metrics["loss"] == metrics["lm_loss"] > 0
        if metrics["word_steps"]:
            assert len(metrics["alignment_loss"]) == LAYERS + 2
            assert all(loss > 0 for loss in metrics["alignment_loss"])
    return steps


@pytest.mark.parametrize(("interval", "first"), slow_except([(2, 3), (3, 4)], (2, 3)))
def test_every_nth_step_has_words(workers: WorkerPool, tiny: Tiny, tmp_path: Path, interval: int, first: int) -> None:
    """Counted from the start of the phase, also in a resumed run, whose first step is no multiple of the interval."""
    values = guarded(tiny, tmp_path, interval=interval)
    results = workers.run(1, several_steps, values, str(tmp_path), first, 7, {})[0]
    assert word_steps(results) == [int((first + index + 1) % interval == 0) for index in range(7)]
    assert not any(result["below_floor"] for result in results)


@pytest.mark.parametrize("parallel", slow_except([{}, TP2, VPP2], {}), ids=["dp2", "tp2", "vpp2"])
def test_all_ranks_have_the_same_counts(
    workers: WorkerPool, tiny: Tiny, tmp_path: Path, parallel: dict[str, Any]
) -> None:
    values = guarded(tiny, tmp_path, interval=2)
    values["parallel"].update(parallel)
    first, second = workers.run(2, several_steps, values, str(tmp_path), 0, 3, {})
    assert word_steps(first) == word_steps(second) == [0, 1, 0]
    for one, other in zip(first, second, strict=True):
        assert one["metrics"] == other["metrics"]


LOW, HIGH = [0.1] * 6, [0.9] * 6


@pytest.mark.parametrize(
    ("reports", "expected"),
    slow_except(
        [
            # No measurement yet.
            ({}, [0, 0, 0, 0, 0, 0, 0, 0]),
            # From the first due step on, until retrieval is above the floor again.
            ({0: {"en-de": LOW}}, [0, 1, 0, 1, 0, 1, 0, 1]),
            ({2: {"en-de": LOW}, 5: {"en-de": HIGH}}, [0, 0, 0, 1, 0, 0, 0, 0]),
            ({1: {"en-de": LOW}, 3: {"en-de": HIGH}, 6: {"en-de": LOW}}, [0, 1, 0, 0, 0, 0, 0, 1]),
            # Retrieval equal to the floor is not below it.
            ({0: {"en-de": [0.5] * 6}}, [0, 0, 0, 0, 0, 0, 0, 0]),
            # Means over the directions.
            ({0: {"en-de": LOW, "de-en": HIGH}}, [0, 0, 0, 0, 0, 0, 0, 0]),
            ({0: {"en-de": LOW, "de-en": [0.89] * 6}}, [0, 1, 0, 1, 0, 1, 0, 1]),
        ],
        ({0: {"en-de": LOW}}, [0, 1, 0, 1, 0, 1, 0, 1]),
        ({0: {"en-de": [0.5] * 6}}, [0, 0, 0, 0, 0, 0, 0, 0]),
        ({0: {"en-de": LOW, "de-en": [0.89] * 6}}, [0, 1, 0, 1, 0, 1, 0, 1]),
    ),
    ids=["unmeasured", "below", "back_above", "below_again", "at_the_floor", "mean_at_it", "mean_below_it"],
)
def test_with_a_floor_only_while_retrieval_is_below_it(
    workers: WorkerPool,
    tiny: Tiny,
    tmp_path: Path,
    reports: dict[int, dict[str, list[float]]],
    expected: list[int],
) -> None:
    values = guarded(tiny, tmp_path, interval=2, floor=0.5)
    results = workers.run(1, several_steps, values, str(tmp_path), 0, 8, reports)[0]
    assert word_steps(results) == expected


@pytest.mark.parametrize(("by_layer", "below"), [([0.1, 0.9, 0.1, 0.9, 0.9, 0.9], True), ([0.9] + [0.1] * 5, False)])
def test_the_floor_applies_to_the_aligned_layers(
    workers: WorkerPool, tiny: Tiny, tmp_path: Path, by_layer: list[float], below: bool
) -> None:
    """Layers without weight do not count; the size of a layer's weight does not matter."""
    values = guarded(tiny, tmp_path, interval=1, floor=0.4)
    values["alignment"]["layers"] = {0: 1.0, 2: 100.0}
    (result,) = workers.run(1, several_steps, values, str(tmp_path), 0, 1, {0: {"en-de": by_layer}})[0]
    assert result["below_floor"] is below
    assert result["metrics"]["word_steps"] == int(below)


@pytest.mark.slow
def test_without_a_floor_retrieval_does_not_matter(workers: WorkerPool, tiny: Tiny, tmp_path: Path) -> None:
    values = guarded(tiny, tmp_path, interval=2)
    for by_layer in (LOW, HIGH):
        results = workers.run(1, several_steps, values, str(tmp_path), 0, 4, {0: {"en-de": by_layer}})[0]
        assert word_steps(results) == [0, 1, 0, 1]
        assert not any(result["below_floor"] for result in results)


def below_floor_after_alignment(values: dict[str, Any], directory: str, by_layer: list[float]) -> bool:
    """Runs in a worker: whether retrieval is below the floor after the measurement at the end of the alignment
    phase."""
    from megatron_prealign.checkpoint.train_state import TrainState

    _, _, _, phases, _ = open_run(values, directory)
    assert phases[0].name == "alignment"
    state = TrainState()
    phases[0].on_alignment_watch(state, {"en-de": {"p_at_1": by_layer}})
    state.next_phase()
    return state.below_floor


@pytest.mark.parametrize(("by_layer", "below"), [(LOW, True), (HIGH, False)])
def test_the_measurement_at_the_end_of_alignment_counts(
    workers: WorkerPool, tiny: Tiny, tmp_path: Path, by_layer: list[float], below: bool
) -> None:
    values = guarded(tiny, tmp_path, interval=1, floor=0.5)
    assert workers.run(1, below_floor_after_alignment, values, str(tmp_path), by_layer)[0] is below


def phase_names(values: dict[str, Any], directory: str) -> list[str]:
    """Runs in a worker: names of the phases of a run."""
    return [phase.name for phase in open_run(values, directory)[3]]


@pytest.mark.parametrize(("train_iters", "names"), [(0, ["language_model"]), (1, ["alignment", "language_model"])])
def test_without_steps_there_is_no_alignment_phase(
    workers: WorkerPool, tiny: Tiny, tmp_path: Path, train_iters: int, names: list[str]
) -> None:
    values = guarded(tiny, tmp_path, interval=1)
    values["alignment"]["train_iters"] = train_iters
    assert workers.run(1, phase_names, values, str(tmp_path))[0] == names


def metrics_of_several_steps(values: dict[str, Any], directory: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Runs in a worker: the metrics of each of six steps, and of the same six together."""
    from megatron_prealign.checkpoint.train_state import TrainState

    _, _, _, phases, chunks = open_run(values, directory)
    phase, separate = phases[-1], []
    states = [TrainState(phase=1, phase_step=number, step=number, consumed_samples=8 * number) for number in range(6)]
    for state in states:
        separate.append(step(phase, state, chunks)[1])
    for state in states:
        for chunk in chunks:
            chunk.zero_grad_buffer()
        phase.forward_backward(state, chunks)
    return separate, phase.metrics(6)


@pytest.mark.slow
def test_metrics_are_means_over_the_steps_that_have_them(workers: WorkerPool, tiny: Tiny, tmp_path: Path) -> None:
    values = guarded(tiny, tmp_path, interval=3)
    separate, together = workers.run(1, metrics_of_several_steps, values, str(tmp_path))[0]
    with_words = [metrics for metrics in separate if metrics["word_steps"]]
    assert [separate.index(metrics) for metrics in with_words] == [2, 5]
    assert together["word_steps"] == 2
    # Sums in float64 of the same values.
    assert together["lm_loss"] == pytest.approx(sum(metrics["lm_loss"] for metrics in separate) / 6, rel=1e-12)
    for layer, loss in enumerate(together["alignment_loss"]):
        assert loss == pytest.approx(sum(m["alignment_loss"][layer] for m in with_words) / 2, rel=1e-12)
    assert together["switched_words"]["en_clone"] == sum(m["switched_words"]["en_clone"] for m in separate)


def three_gradients(
    values: dict[str, Any], directory: str
) -> dict[str, tuple[dict[str, torch.Tensor], dict[str, Any]]]:
    """Runs in workers: gradients and metrics of a guarded step, of its samples only and of its words only with weight
    one."""
    from dataclasses import replace

    from megatron_prealign.checkpoint.train_state import TrainState
    from megatron_prealign.run.pretrain import build_phases, build_word_steps

    recipe, runtime, inputs, phases, chunks = open_run(values, directory)

    def phases_of(**fields: Any) -> list[Any]:
        changed = replace(recipe, **fields)
        words = build_word_steps(changed, runtime, inputs.dictionary)
        return build_phases(changed, runtime, inputs, words)

    assert recipe.alignment is not None
    words_only = replace(recipe.alignment, alpha=1.0, lm_global_batch_size=0, word_micro_batch_size=None)
    state = TrainState(phase=1, phase_step=8, step=20, tokens=9000, phase_start_tokens=1000, consumed_samples=40)
    return {
        "guarded": step(phases[-1], state, chunks),
        "not_due": step(phases[-1], TrainState(**{**state.to_dict(), "phase_step": 9}), chunks),
        "samples": step(phases_of(alignment_guard=None)[-1], state, chunks),
        "words": step(phases_of(alignment=words_only)[0], state, chunks),
    }


@pytest.mark.parametrize(
    ("ranks", "parallel", "size"),
    slow_except(
        [(1, {}, 4), (2, {}, None), (2, PP2, 4), (2, VPP2 | OVERLAP, 16), (2, TP2, None), (2, OVERLAP, 4)],
        (1, {}, 4),
        (2, VPP2 | OVERLAP, 16),
    ),
    ids=["one", "dp2", "pp2", "vpp2", "tp2", "overlapped"],
)
def test_gradients_are_the_sum_of_both_losses(
    workers: WorkerPool, tiny: Tiny, tmp_path: Path, ranks: int, parallel: dict[str, Any], size: int | None
) -> None:
    values = guarded(tiny, tmp_path, interval=3)
    values["parallel"].update(parallel)
    if "virtual_pipeline_model_parallel_size" in parallel:
        # Three microbatches of samples, alone or after two of words: both schedules have an idle one, and are longer
        # than their warm-up.
        values["training"].update(global_batch_size=12, micro_batch_size=4)
    values["alignment"].update(alpha=0.3, word_micro_batch_size=size, layers=[0, 2, 4, 5])
    for result in workers.run(ranks, three_gradients, values, str(tmp_path)):
        (together, metrics), (samples, sample_metrics), (words, word_metrics) = (
            result[name] for name in ("guarded", "samples", "words")
        )
        assert together.keys() == samples.keys() == words.keys()
        for name, gradient in together.items():
            expected = samples[name] + 0.3 * words[name]
            # The same sums in another order.
            assert (gradient - expected).norm() <= 1e-5 * expected.norm(), name
            assert torch.equal(result["not_due"][0][name], samples[name])
        # Both losses contribute to some parameters.
        assert any(0.3 * words[name].norm() > 1e-2 * samples[name].norm() > 0 for name in samples)
        assert metrics["lm_loss"] == pytest.approx(sample_metrics["lm_loss"], rel=1e-6)
        assert metrics["switched_words"] == sample_metrics["switched_words"]
        for got, reference in zip(metrics["alignment_loss"], word_metrics["alignment_loss"], strict=True):
            assert (got is None) == (reference is None)
            assert got is None or got == pytest.approx(reference, rel=1e-6)
        assert result["not_due"][1]["word_steps"] == 0
        assert "word_steps" not in sample_metrics


def measured_means(run_dir: Path) -> dict[int, float]:
    """Step -> mean P@1 over directions and layers, as measured by the watch."""
    means = {}
    for (_, number), line in records(run_dir, "alignment_watch").items():
        values = [value for by_name in line["pairs"].values() for value in by_name["p_at_1"]]
        means[number] = sum(values) / len(values)
    return means


@pytest.mark.slow
def test_complete_runs_are_guarded_and_resume_bit_for_bit(workers: WorkerPool, tiny: Tiny, tmp_path: Path) -> None:
    """Without an alignment phase; the watch measures before the first step and after every second one."""
    steps = 8
    values = guarded(tiny, tmp_path / "always", interval=1, floor=1.0)
    values["alignment"].update(train_iters=0, words_per_step=64)
    values["optimizer"].update(lr=0.01, lr_warmup_iters=0)
    values["training"]["train_iters"] = steps
    values["alignment_watch"] = {"interval": 2, "groups": "trained", "words": 100}
    values["checkpoint"] = {"save_interval": 1, "keep": 100}
    run(workers, 1, values, tmp_path / "always")
    lines = records(tmp_path / "always")
    assert sorted(lines) == [("language_model", number) for number in range(1, steps + 1)]
    assert [line["word_steps"] for _, line in sorted(lines.items())] == [1] * steps
    means = measured_means(tmp_path / "always")
    assert sorted(means) == [0, 2, 4, 6, 8]
    # Alignment helps: retrieval is above the floor at some step.
    best = max(means[number] for number in (2, 4, 6))
    assert best > means[0]
    floor = (best + means[0]) / 2
    values = copy.deepcopy(values)
    values["alignment_guard"]["floor"] = floor
    values["logging"]["run_dir"] = str(tmp_path / "floor")
    run(workers, 1, values, tmp_path / "floor")
    means = measured_means(tmp_path / "floor")
    expected = [int(means[(number - 1) // 2 * 2] < floor) for number in range(1, steps + 1)]
    assert expected[:2] == [1, 1]
    assert 0 in expected
    lines = records(tmp_path / "floor")
    assert [line["word_steps"] for _, line in sorted(lines.items())] == expected
    # Resumes from a step at which only the checkpoint records that retrieval is below the floor.
    checkpoints = tmp_path / "resumed" / "checkpoints"
    checkpoints.mkdir(parents=True)
    shutil.copytree(tmp_path / "floor" / "checkpoints" / "step_00000001", checkpoints / "step_00000001")
    (checkpoints / "latest").write_text("step_00000001")
    values = copy.deepcopy(values)
    values["logging"]["run_dir"] = str(tmp_path / "resumed")
    run(workers, 1, values, tmp_path / "resumed")
    resumed = records(tmp_path / "resumed")
    assert sorted(number for _, number in resumed) == list(range(2, steps + 1))
    for key, line in resumed.items():
        for name in ("lm_loss", "word_steps", "tokens", "grad_norm"):
            assert line[name] == lines[key][name], (key, name)
        assert line.get("alignment_loss") == lines[key].get("alignment_loss"), key
    expected, actual = (weights(workers, tmp_path / name, 2 * VOCAB_SIZE) for name in ("floor", "resumed"))
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


def test_words_of_the_guard_are_part_of_the_tokens(workers: WorkerPool, tiny: Tiny, tmp_path: Path) -> None:
    """Every second step has 64 words of about 90 tokens; without them, a budget of 6,000 tokens has 23 steps of 256."""
    values = guarded(tiny, tmp_path, interval=2)
    values["alignment"].update(train_iters=0, words_per_step=64)
    values["training"].update(train_iters=None, train_tokens=6000, retrieval_words=2, eval_samples=2)
    run(workers, 1, values, tmp_path)
    lines = sorted(records(tmp_path).items())
    steps, tokens = len(lines), lines[-1][1]["tokens"]
    words = tokens - SAMPLE_TOKENS * steps
    assert sum(line["word_steps"] for _, line in lines) == steps // 2 and words > SAMPLE_TOKENS
    # A step more would exceed the budget, but for the difference between the words of these steps and of all.
    assert abs(6000 - tokens) <= SAMPLE_TOKENS + words / steps + 0.2 * words
    assert steps < 6000 // SAMPLE_TOKENS


@pytest.mark.slow
def test_a_run_lists_the_words_that_it_drops(workers: WorkerPool, tiny: Tiny, tmp_path: Path) -> None:
    values = guarded(tiny, tmp_path, interval=1)
    values["alignment"].update(train_iters=0, max_word_tokens=3)
    values["training"]["train_iters"] = 2
    run(workers, 1, values, tmp_path)
    lines = [line.split("\t") for line in (tmp_path / "alignment_dropped_words.tsv").read_text().splitlines()]
    assert len(lines) > 10
    assert {language for language, _, _ in lines} == {"en", "en_clone"}
    assert all(word and int(tokens) > 3 for _, word, tokens in lines)
