"""The alignment guard: which steps of language-model training carry words, what they minimise and what they count."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.phase_steps import opened, step
from support.tiny import VOCAB_SIZE, Tiny
from support.whole_runs import records, run, weights
from support.workers import WorkerPool

LAYERS = 4
# 8 rows of 32 tokens.
ROW_TOKENS = 256
PP2 = {"pipeline_model_parallel_size": 2}
VPP2 = {**PP2, "virtual_pipeline_model_parallel_size": 2}
TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}


def guarded(tiny: Tiny, run_dir: Path, **guard: Any) -> dict[str, Any]:
    """A recipe whose language-model training has a guard; with a floor there must be a watch."""
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
    """Runs in workers: steps of language-model training without an update, from number `first` of the phase on.

    Args:
        reports: step -> what the watch finds before it, direction -> P@1 of each layer.
    """
    from megatron_prealign.alignment.layout import WordLayout
    from megatron_prealign.checkpoint.train_state import TrainState

    recipe, runtime, inputs, phases, chunks = opened(values, directory)
    phase = phases[-1]
    assert phase.name == "language_model"
    # Steps of the alignment phase are behind it.
    state = TrainState(phase=1, phase_step=first, step=5 + first, tokens=1000, phase_start_tokens=1000)
    layout = WordLayout.of(runtime, chunks)
    found = []
    for number in range(first, first + count):
        if number in reports:
            phase.saw_alignment(state, {name: {"p_at_1": by_layer} for name, by_layer in reports[number].items()})
            # As a checkpoint between the measurement and the step would.
            state = TrainState.from_dict(json.loads(json.dumps(state.to_dict())))
        before = state.tokens
        _, metrics = step(phase, state, chunks)
        words = phase._words.sampler.draw(state.step, layout)
        phase.advance(state)
        state.phase_step += 1
        state.step += 1
        found.append(
            {
                "metrics": metrics,
                "tokens": state.tokens - before,
                "word_tokens": words.tokens,
                "samples": state.consumed_samples,
                "below_floor": state.below_floor,
            }
        )
    return found


def carried(answers: list[dict[str, Any]]) -> list[int]:
    """1 for each step with words; whatever else tells of words must agree."""
    steps = []
    for place, answer in enumerate(answers):
        metrics = answer["metrics"]
        steps.append(metrics["word_steps"])
        assert answer["word_tokens"] > 0
        assert answer["tokens"] == ROW_TOKENS + metrics["word_steps"] * answer["word_tokens"]
        # Words take no rows of the blend.
        assert answer["samples"] == 8 * (place + 1)
        assert ("alignment_loss" in metrics) == bool(metrics["word_steps"])
        assert metrics["loss"] == metrics["lm_loss"] > 0
        if metrics["word_steps"]:
            assert len(metrics["alignment_loss"]) == LAYERS + 2
            assert all(loss > 0 for loss in metrics["alignment_loss"])
    return steps


@pytest.mark.parametrize("interval", [1, 2, 3])
@pytest.mark.parametrize("first", [0, 4])
def test_every_nth_step_carries_words(
    workers: WorkerPool, tiny: Tiny, tmp_path: Path, interval: int, first: int
) -> None:
    """Counted over the phase, wherever a run is resumed."""
    values = guarded(tiny, tmp_path, interval=interval)
    answers = workers.run(1, several_steps, values, str(tmp_path), first, 7, {})[0]
    assert carried(answers) == [int((first + place + 1) % interval == 0) for place in range(7)]
    assert not any(answer["below_floor"] for answer in answers)


@pytest.mark.parametrize("parallel", [{}, TP2, VPP2], ids=["dp2", "tp2", "vpp2"])
def test_all_ranks_count_alike(workers: WorkerPool, tiny: Tiny, tmp_path: Path, parallel: dict[str, Any]) -> None:
    values = guarded(tiny, tmp_path, interval=2)
    values["parallel"].update(parallel)
    first, second = workers.run(2, several_steps, values, str(tmp_path), 0, 3, {})
    assert carried(first) == carried(second) == [0, 1, 0]
    for one, other in zip(first, second, strict=True):
        assert one["metrics"] == other["metrics"]


LOW, HIGH = [0.1] * 6, [0.9] * 6


@pytest.mark.parametrize(
    ("reports", "expected"),
    [
        # Nothing was measured yet.
        ({}, [0, 0, 0, 0, 0, 0, 0, 0]),
        # From the first due step on, until it is back above.
        ({0: {"en-de": LOW}}, [0, 1, 0, 1, 0, 1, 0, 1]),
        ({2: {"en-de": LOW}, 5: {"en-de": HIGH}}, [0, 0, 0, 1, 0, 0, 0, 0]),
        ({1: {"en-de": LOW}, 3: {"en-de": HIGH}, 6: {"en-de": LOW}}, [0, 1, 0, 0, 0, 0, 0, 1]),
        # The floor itself is not below it.
        ({0: {"en-de": [0.5] * 6}}, [0, 0, 0, 0, 0, 0, 0, 0]),
        # Means over the directions.
        ({0: {"en-de": LOW, "de-en": HIGH}}, [0, 0, 0, 0, 0, 0, 0, 0]),
        ({0: {"en-de": LOW, "de-en": [0.89] * 6}}, [0, 1, 0, 1, 0, 1, 0, 1]),
    ],
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
    answers = workers.run(1, several_steps, values, str(tmp_path), 0, 8, reports)[0]
    assert carried(answers) == expected


@pytest.mark.parametrize(("by_layer", "below"), [([0.1, 0.9, 0.1, 0.9, 0.9, 0.9], True), ([0.9] + [0.1] * 5, False)])
def test_the_floor_is_of_the_aligned_layers(
    workers: WorkerPool, tiny: Tiny, tmp_path: Path, by_layer: list[float], below: bool
) -> None:
    """Layers without weight do not count; how much weight one has does not matter."""
    values = guarded(tiny, tmp_path, interval=1, floor=0.4)
    values["alignment"]["layers"] = {0: 1.0, 2: 100.0}
    (answer,) = workers.run(1, several_steps, values, str(tmp_path), 0, 1, {0: {"en-de": by_layer}})[0]
    assert answer["below_floor"] is below
    assert answer["metrics"]["word_steps"] == int(below)


def test_without_a_floor_what_is_measured_does_not_matter(workers: WorkerPool, tiny: Tiny, tmp_path: Path) -> None:
    values = guarded(tiny, tmp_path, interval=2)
    for found in (LOW, HIGH):
        answers = workers.run(1, several_steps, values, str(tmp_path), 0, 4, {0: {"en-de": found}})[0]
        assert carried(answers) == [0, 1, 0, 1]
        assert not any(answer["below_floor"] for answer in answers)


def seen_by_the_alignment_phase(values: dict[str, Any], directory: str, by_layer: list[float]) -> bool:
    """Runs in a worker: whether a run is below the floor after the watch at the end of the alignment phase."""
    from megatron_prealign.checkpoint.train_state import TrainState

    _, _, _, phases, _ = opened(values, directory)
    assert phases[0].name == "alignment"
    state = TrainState()
    phases[0].saw_alignment(state, {"en-de": {"p_at_1": by_layer}})
    state.next_phase()
    return state.below_floor


@pytest.mark.parametrize(("by_layer", "below"), [(LOW, True), (HIGH, False)])
def test_what_was_measured_at_the_end_of_alignment_counts(
    workers: WorkerPool, tiny: Tiny, tmp_path: Path, by_layer: list[float], below: bool
) -> None:
    values = guarded(tiny, tmp_path, interval=1, floor=0.5)
    assert workers.run(1, seen_by_the_alignment_phase, values, str(tmp_path), by_layer)[0] is below


def phase_names(values: dict[str, Any], directory: str) -> list[str]:
    """Runs in a worker: the phases of a run."""
    return [phase.name for phase in opened(values, directory)[3]]


@pytest.mark.parametrize(("train_iters", "names"), [(0, ["language_model"]), (1, ["alignment", "language_model"])])
def test_without_steps_there_is_no_alignment_phase(
    workers: WorkerPool, tiny: Tiny, tmp_path: Path, train_iters: int, names: list[str]
) -> None:
    values = guarded(tiny, tmp_path, interval=1)
    values["alignment"]["train_iters"] = train_iters
    assert workers.run(1, phase_names, values, str(tmp_path))[0] == names


def metrics_of_several_steps(values: dict[str, Any], directory: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Runs in a worker: the metrics of six steps one by one, and of the same six at once."""
    from megatron_prealign.checkpoint.train_state import TrainState

    _, _, _, phases, chunks = opened(values, directory)
    phase, alone = phases[-1], []
    states = [TrainState(phase=1, phase_step=number, step=number, consumed_samples=8 * number) for number in range(6)]
    for state in states:
        alone.append(step(phase, state, chunks)[1])
    for state in states:
        for chunk in chunks:
            chunk.zero_grad_buffer()
        phase.forward_backward(state, chunks)
    return alone, phase.metrics(6)


def test_metrics_are_means_over_the_steps_that_have_them(workers: WorkerPool, tiny: Tiny, tmp_path: Path) -> None:
    values = guarded(tiny, tmp_path, interval=3)
    alone, together = workers.run(1, metrics_of_several_steps, values, str(tmp_path))[0]
    with_words = [metrics for metrics in alone if metrics["word_steps"]]
    assert [alone.index(metrics) for metrics in with_words] == [2, 5]
    assert together["word_steps"] == 2
    # Sums in float64 of the same numbers.
    assert together["lm_loss"] == pytest.approx(sum(metrics["lm_loss"] for metrics in alone) / 6, rel=1e-12)
    for layer, loss in enumerate(together["alignment_loss"]):
        assert loss == pytest.approx(sum(m["alignment_loss"][layer] for m in with_words) / 2, rel=1e-12)
    assert together["switched_words"]["en_clone"] == sum(m["switched_words"]["en_clone"] for m in alone)


def three_gradients(
    values: dict[str, Any], directory: str
) -> dict[str, tuple[dict[str, torch.Tensor], dict[str, Any]]]:
    """Runs in workers: gradients and metrics of a guarded step, of its rows and of its words with a weight of one."""
    from dataclasses import replace

    from megatron_prealign.checkpoint.train_state import TrainState
    from megatron_prealign.run.pretrain import build_phases, open_words

    recipe, runtime, inputs, phases, chunks = opened(values, directory)

    def phases_of(**fields: Any) -> list[Any]:
        changed = replace(recipe, **fields)
        words = open_words(changed, runtime, inputs.dictionary)
        return build_phases(changed, runtime, inputs, words)

    assert recipe.alignment is not None
    words_alone = replace(recipe.alignment, alpha=1.0, lm_global_batch_size=0, word_micro_batch_size=None)
    state = TrainState(phase=1, phase_step=8, step=20, tokens=9000, phase_start_tokens=1000, consumed_samples=40)
    return {
        "guarded": step(phases[-1], state, chunks),
        "not_due": step(phases[-1], TrainState(**{**state.to_dict(), "phase_step": 9}), chunks),
        "rows": step(phases_of(alignment_guard=None)[-1], state, chunks),
        "words": step(phases_of(alignment=words_alone)[0], state, chunks),
    }


@pytest.mark.parametrize("size", [None, 4])
@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [(1, {}), (2, {}), (2, PP2), (2, VPP2), (2, TP2), (2, {"overlap_grad_reduce": True})],
    ids=["one", "dp2", "pp2", "vpp2", "tp2", "overlapped"],
)
def test_gradients_are_those_of_both_losses(
    workers: WorkerPool, tiny: Tiny, tmp_path: Path, ranks: int, parallel: dict[str, Any], size: int | None
) -> None:
    values = guarded(tiny, tmp_path, interval=3)
    values["parallel"].update(parallel)
    values["alignment"].update(alpha=0.3, word_micro_batch_size=size, layers=[0, 2, 4, 5])
    for answer in workers.run(ranks, three_gradients, values, str(tmp_path)):
        (together, metrics), (rows, rows_metrics), (words, words_metrics) = (
            answer[name] for name in ("guarded", "rows", "words")
        )
        assert together.keys() == rows.keys() == words.keys()
        for name, gradient in together.items():
            expected = rows[name] + 0.3 * words[name]
            # The same sums in another order.
            assert (gradient - expected).norm() <= 1e-5 * expected.norm(), name
            assert torch.equal(answer["not_due"][0][name], rows[name])
        # Both take part in the layers that have a loss of both.
        assert any(0.3 * words[name].norm() > 1e-2 * rows[name].norm() > 0 for name in rows)
        assert metrics["lm_loss"] == pytest.approx(rows_metrics["lm_loss"], rel=1e-6)
        assert metrics["switched_words"] == rows_metrics["switched_words"]
        for got, wanted in zip(metrics["alignment_loss"], words_metrics["alignment_loss"], strict=True):
            assert (got is None) == (wanted is None)
            assert got is None or got == pytest.approx(wanted, rel=1e-6)
        assert answer["not_due"][1]["word_steps"] == 0
        assert "word_steps" not in rows_metrics


def measured_means(run_dir: Path) -> dict[int, float]:
    """Step -> mean P@1 over directions and layers, as the watch found it."""
    means = {}
    for (_, number), line in records(run_dir, "alignment_watch").items():
        values = [value for by_name in line["pairs"].values() for value in by_name["p_at_1"]]
        means[number] = sum(values) / len(values)
    return means


def test_whole_runs_guard_and_go_on_bit_for_bit(workers: WorkerPool, tiny: Tiny, tmp_path: Path) -> None:
    """Without an alignment phase; the watch measures every second step and before the first one."""
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
    # Alignment helps: words of the run are above the floor at some time.
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
    # Goes on from a step at which only the checkpoint knows that retrieval is below the floor.
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
    whole, again = (weights(workers, tmp_path / name, 2 * VOCAB_SIZE) for name in ("floor", "resumed"))
    assert whole.keys() == again.keys()
    for name, tensor in whole.items():
        assert torch.equal(again[name], tensor), name


def test_a_run_lists_the_words_that_it_leaves_out(workers: WorkerPool, tiny: Tiny, tmp_path: Path) -> None:
    values = guarded(tiny, tmp_path, interval=1)
    values["alignment"].update(train_iters=0, max_word_tokens=3)
    values["training"]["train_iters"] = 2
    run(workers, 1, values, tmp_path)
    lines = [line.split("\t") for line in (tmp_path / "alignment_dropped_words.tsv").read_text().splitlines()]
    assert len(lines) > 10
    assert {language for language, _, _ in lines} == {"en", "en_clone"}
    assert all(word and int(tokens) > 3 for _, word, tokens in lines)
