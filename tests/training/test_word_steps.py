"""Steps with words: several microbatches give the same result as one; batches in which no word has a translation."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.marks import slow_except
from support.messages import assert_facts
from support.phase_steps import open_run, step
from support.tiny import Tiny
from support.workers import WorkerPool

PP2 = {"pipeline_model_parallel_size": 2}
VPP2 = {**PP2, "virtual_pipeline_model_parallel_size": 2}
TP2 = {"tensor_model_parallel_size": 2}
# Ranks, layout, samples of a step: the schedules of a pipeline depend on whether there are samples.
MICROBATCHES: list[tuple[int, dict[str, Any], int]] = [
    (1, {}, 4),
    (2, {}, 0),
    (2, PP2, 4),
    (2, VPP2, 4),
    (2, VPP2, 0),
    (2, {**TP2, "sequence_parallel": False}, 4),
    (2, {**TP2, "sequence_parallel": True}, 0),
]
# Ranks, layout, samples of a step, words of a microbatch.
NO_PAIRS: list[tuple[int, dict[str, Any], int, int | None]] = [
    (1, {}, 0, None),
    (1, {}, 4, 4),
    (2, VPP2, 0, 4),
    (2, VPP2, 4, None),
    (2, {"overlap_grad_reduce": True}, 0, None),
    (2, {"overlap_grad_reduce": True}, 4, 4),
]


def steps_in_microbatches(
    values: dict[str, Any], directory: str, sizes: list[int | None]
) -> list[tuple[dict[str, torch.Tensor], dict[str, Any], int]]:
    """Runs in workers: gradients of this process, metrics and tokens of the same step with each size of word
    microbatches."""
    from dataclasses import replace

    from megatron_prealign.checkpoint.train_state import TrainState
    from megatron_prealign.run.pretrain import build_word_steps

    recipe, runtime, inputs, phases, chunks = open_run(values, directory)
    phase, results = phases[0], []
    for size in sizes:
        assert recipe.alignment is not None
        section = replace(recipe.alignment, word_micro_batch_size=size)
        phase._words = build_word_steps(replace(recipe, alignment=section), runtime, inputs.dictionary)
        state = TrainState(phase_step=2, step=2, consumed_samples=8)
        gradients, metrics = step(phase, state, chunks)
        tokens = state.tokens
        phase.advance(state)
        results.append((gradients, metrics, state.tokens - tokens))
    return results


def losses_of(metrics: dict[str, Any]) -> list[float]:
    losses = [metrics["loss"], metrics["lm_loss"], *metrics["alignment_loss"]]
    return [loss for loss in losses if loss is not None]


@pytest.mark.parametrize(
    ("ranks", "parallel", "samples"),
    slow_except(MICROBATCHES, MICROBATCHES[0], MICROBATCHES[3]),
    ids=["one", "dp2", "pp2", "vpp2", "vpp2_words_only", "tp2", "sp"],
)
def test_words_in_several_microbatches_are_one_batch(
    workers: WorkerPool, tiny: Tiny, tmp_path: Path, ranks: int, parallel: dict[str, Any], samples: int
) -> None:
    """24 words in one microbatch, in three and in twelve or six; three and one are not divisible by two stages, so the
    interleaved schedule has idle microbatches in both of its passes."""
    values = tiny.values(tmp_path)
    values["parallel"] = {"device": "cpu", "use_distributed_optimizer": False, **parallel}
    values["alignment"].update(
        words_per_step=24, lm_global_batch_size=samples, gamma=0.5, alpha=0.7, layers={0: 1, 2: 2, 3: 1, 5: 1}
    )
    own = 24 if "tensor_model_parallel_size" in parallel or "pipeline_model_parallel_size" in parallel else 24 // ranks
    for (one, metrics, tokens), *others in workers.run(
        ranks, steps_in_microbatches, values, str(tmp_path), [None, own // 3, 2]
    ):
        assert any(gradient.any() for gradient in one.values())
        assert tokens > samples * 32
        for gradients, other_metrics, other_tokens in others:
            assert other_tokens == tokens
            assert gradients.keys() == one.keys()
            for name, gradient in one.items():
                # The same sums in another order.
                error = (gradients[name] - gradient).norm() / gradient.norm().clamp(min=1e-30)
                assert error < 1e-5, (name, error)
            assert [loss is None for loss in other_metrics["alignment_loss"]] == [layer in (1, 4) for layer in range(6)]
            assert losses_of(other_metrics) == pytest.approx(losses_of(metrics), rel=1e-6)


def spoiled_steps(values: dict[str, Any], directory: str) -> dict[str, Any]:
    """Runs in workers: two alignment steps without any pair and a good one, a bad and a good one together, and one with
    only samples."""
    import logging
    from dataclasses import replace

    from megatron_prealign.checkpoint.train_state import TrainState
    from megatron_prealign.training.word_steps import WordSteps

    recipe, runtime, inputs, phases, chunks = open_run(values, directory)
    phase = phases[0]
    sampler = phase._words.sampler
    draw_words = sampler._draw_words

    def spoiled(number: int) -> tuple[np.ndarray, np.ndarray]:
        words, group = draw_words(number)
        if number > 6:
            return words, group
        # Every word has its own group, and step 6 has only one word.
        alone = np.arange(len(words))
        return (words, alone) if number == 5 else (np.where(alone, -1, words), np.where(alone, -1, group))

    sampler._draw_words = spoiled
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("megatron_prealign.training.word_steps")
    logger.addHandler(handler)
    gradients, metrics = [], []
    try:
        for number in (5, 6, 7):
            # The same samples each time.
            result = step(phase, TrainState(phase_step=number, step=number, consumed_samples=8), chunks)
            gradients.append(result[0])
            metrics.append(result[1])
        for number in (5, 7):
            for chunk in chunks:
                chunk.zero_grad_buffer()
            phase.forward_backward(TrainState(phase_step=number, step=number, consumed_samples=8), chunks)
        together = phase.metrics(2)
    finally:
        logger.removeHandler(handler)
    samples_only: dict[str, torch.Tensor] = {}
    if recipe.alignment.lm_global_batch_size:
        no_weight = replace(recipe.alignment, alpha=0.0, gamma=0.0)
        phase._words = WordSteps(replace(recipe, alignment=no_weight), runtime, phase._words.sampler)
        samples_only, _ = step(phase, TrainState(phase_step=7, step=7, consumed_samples=8), chunks)
    return {
        "gradients": gradients,
        "metrics": metrics,
        "together": together,
        "messages": messages,
        "samples_only": samples_only,
    }


@pytest.mark.parametrize(
    ("ranks", "parallel", "samples", "size"),
    slow_except(NO_PAIRS, *NO_PAIRS[:2]),
    ids=["one_words_only", "one", "vpp2_words_only", "vpp2", "dp2_words_only", "dp2"],
)
def test_words_without_a_pair_are_skipped_with_a_warning(
    workers: WorkerPool,
    tiny: Tiny,
    tmp_path: Path,
    ranks: int,
    parallel: dict[str, Any],
    samples: int,
    size: int | None,
) -> None:
    values = tiny.values(tmp_path)
    values["parallel"] = {"device": "cpu", "use_distributed_optimizer": False, **parallel}
    values["alignment"].update(lm_global_batch_size=samples, gamma=0.5, word_micro_batch_size=size)
    for result in workers.run(ranks, spoiled_steps, values, str(tmp_path)):
        for message, (number, count) in zip(result["messages"], ((5, 1), (6, 2), (5, 3)), strict=True):
            assert_facts(message, f"step {number}:", "translation", "skipped", f"({count} such steps")
        for gradients, metrics in zip(result["gradients"][:2], result["metrics"][:2], strict=True):
            assert metrics["alignment_loss"] == [0.0] * 6
            if samples:
                assert metrics["loss"] == metrics["lm_loss"] > 0
            else:
                assert (metrics["loss"], metrics["lm_loss"]) == (0.0, None)
            for name, gradient in gradients.items():
                expected = result["samples_only"][name] if samples else torch.zeros_like(gradient)
                # The samples are the same; an idle microbatch and words without weight add zeros.
                torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-8)
        # The next step is not affected.
        good = result["metrics"][2]
        assert all(0 < loss < math.inf for loss in good["alignment_loss"])
        assert any(gradient.any() for gradient in result["gradients"][2].values())
        assert all(gradient.isfinite().all() for gradient in result["gradients"][2].values())
        # The mean is over the steps with words, not over all.
        assert result["together"]["alignment_loss"] == pytest.approx(good["alignment_loss"], rel=1e-6)
