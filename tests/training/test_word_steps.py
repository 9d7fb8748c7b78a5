"""Steps with words: in several microbatches as in one, and batches in which no word has a translation."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.phase_steps import opened, step
from support.tiny import Tiny
from support.workers import WorkerPool

PP2 = {"pipeline_model_parallel_size": 2}
VPP2 = {**PP2, "virtual_pipeline_model_parallel_size": 2}
TP2 = {"tensor_model_parallel_size": 2}


def steps_in_microbatches(
    values: dict[str, Any], directory: str, sizes: list[int | None]
) -> list[tuple[dict[str, torch.Tensor], dict[str, Any], int]]:
    """Runs in workers: gradients of this process, metrics and tokens of the same step with words in passes of each
    size."""
    from dataclasses import replace

    from megatron_prealign.checkpoint.train_state import TrainState
    from megatron_prealign.run.pretrain import open_words

    recipe, runtime, inputs, phases, chunks = opened(values, directory)
    phase, found = phases[0], []
    for size in sizes:
        assert recipe.alignment is not None
        section = replace(recipe.alignment, word_micro_batch_size=size)
        phase._words = open_words(replace(recipe, alignment=section), runtime, inputs.dictionary)
        state = TrainState(phase_step=2, step=2, consumed_samples=8)
        gradients, metrics = step(phase, state, chunks)
        tokens = state.tokens
        phase.advance(state)
        found.append((gradients, metrics, state.tokens - tokens))
    return found


def losses_of(metrics: dict[str, Any]) -> list[float]:
    every = [metrics["loss"], metrics["lm_loss"], *metrics["alignment_loss"]]
    return [loss for loss in every if loss is not None]


@pytest.mark.parametrize("rows", [0, 4])
@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [
        (1, {}),
        (2, {}),
        (2, PP2),
        (2, VPP2),
        (2, {**TP2, "sequence_parallel": False}),
        (2, {**TP2, "sequence_parallel": True}),
    ],
    ids=["one", "dp2", "pp2", "vpp2", "tp2", "sp"],
)
def test_words_in_several_microbatches_are_one_batch(
    workers: WorkerPool, tiny: Tiny, tmp_path: Path, ranks: int, parallel: dict[str, Any], rows: int
) -> None:
    """24 words in one pass, in three and in twelve or six; three and one do not divide by two stages, so that the
    interleaved schedule has idle microbatches in both of its passes."""
    values = tiny.values(tmp_path)
    values["parallel"] = {"device": "cpu", "use_distributed_optimizer": False, **parallel}
    values["alignment"].update(
        words_per_step=24, lm_global_batch_size=rows, gamma=0.5, alpha=0.7, layers={0: 1, 2: 2, 3: 1, 5: 1}
    )
    own = 24 if "tensor_model_parallel_size" in parallel or "pipeline_model_parallel_size" in parallel else 24 // ranks
    for (one, metrics, tokens), *others in workers.run(
        ranks, steps_in_microbatches, values, str(tmp_path), [None, own // 3, 2]
    ):
        assert any(gradient.any() for gradient in one.values())
        assert tokens > rows * 32
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
    """Runs in workers: two steps without any pair and a good one of the alignment phase, a bad and a good one together,
    and what rows alone give."""
    import logging
    from dataclasses import replace

    from megatron_prealign.checkpoint.train_state import TrainState
    from megatron_prealign.training.word_steps import WordSteps

    recipe, runtime, inputs, phases, chunks = opened(values, directory)
    phase = phases[0]
    sampler = phase._words.sampler
    draw_words = sampler._draw_words

    def spoiled(number: int) -> tuple[np.ndarray, np.ndarray]:
        words, group = draw_words(number)
        if number > 6:
            return words, group
        # Every word a group of its own, and at step 6 only one word.
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
            # The same rows each time.
            found = step(phase, TrainState(phase_step=number, step=number, consumed_samples=8), chunks)
            gradients.append(found[0])
            metrics.append(found[1])
        for number in (5, 7):
            for chunk in chunks:
                chunk.zero_grad_buffer()
            phase.forward_backward(TrainState(phase_step=number, step=number, consumed_samples=8), chunks)
        together = phase.metrics(2)
    finally:
        logger.removeHandler(handler)
    rows_alone: dict[str, torch.Tensor] = {}
    if recipe.alignment.lm_global_batch_size:
        no_weight = replace(recipe.alignment, alpha=0.0, gamma=0.0)
        phase._words = WordSteps(replace(recipe, alignment=no_weight), runtime, phase._words.sampler)
        rows_alone, _ = step(phase, TrainState(phase_step=7, step=7, consumed_samples=8), chunks)
    return {
        "gradients": gradients,
        "metrics": metrics,
        "together": together,
        "messages": messages,
        "rows_alone": rows_alone,
    }


@pytest.mark.parametrize("size", [None, 4])
@pytest.mark.parametrize("rows", [0, 4])
@pytest.mark.parametrize(
    ("ranks", "parallel"), [(1, {}), (2, VPP2), (2, {"overlap_grad_reduce": True})], ids=["one", "vpp2", "dp2"]
)
def test_words_without_a_pair_are_skipped_with_a_warning(
    workers: WorkerPool,
    tiny: Tiny,
    tmp_path: Path,
    ranks: int,
    parallel: dict[str, Any],
    rows: int,
    size: int | None,
) -> None:
    values = tiny.values(tmp_path)
    values["parallel"] = {"device": "cpu", "use_distributed_optimizer": False, **parallel}
    values["alignment"].update(lm_global_batch_size=rows, gamma=0.5, word_micro_batch_size=size)
    for answer in workers.run(ranks, spoiled_steps, values, str(tmp_path)):
        assert answer["messages"] == [
            f"step {number}: no word of the batch has a translation in it, its words are skipped ({count} such steps "
            "so far)"
            for number, count in ((5, 1), (6, 2), (5, 3))
        ]
        for gradients, metrics in zip(answer["gradients"][:2], answer["metrics"][:2], strict=True):
            assert metrics["alignment_loss"] == [0.0] * 6
            if rows:
                assert metrics["loss"] == metrics["lm_loss"] > 0
            else:
                assert (metrics["loss"], metrics["lm_loss"]) == (0.0, None)
            for name, gradient in gradients.items():
                expected = answer["rows_alone"][name] if rows else torch.zeros_like(gradient)
                # Rows are the same; an idle microbatch and words of no weight add zeros.
                torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-8)
        # The step after it is as good as ever.
        good = answer["metrics"][2]
        assert all(0 < loss < math.inf for loss in good["alignment_loss"])
        assert any(gradient.any() for gradient in answer["gradients"][2].values())
        assert all(gradient.isfinite().all() for gradient in answer["gradients"][2].values())
        # A mean over the steps that had words, not over all.
        assert answer["together"]["alignment_loss"] == pytest.approx(good["alignment_loss"], rel=1e-6)
