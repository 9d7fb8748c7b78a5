"""One step of each phase against reference losses on a plain forward pass: gradients, metrics, counters."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.messages import assert_facts
from support.model_builds import states_by_hand
from support.phase_steps import open_run, step
from support.plain_losses import contrastive_loops, next_token_loss
from support.tiny import Tiny, recipe_of
from support.workers import WorkerError, WorkerPool

LAYERS = 4
# fp32 sums in another order; the loops are float64.
TOLERANCE = {"rtol": 1e-3, "atol": 1e-5}


def plain_gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {
        name: torch.zeros_like(parameter) if gradient is None else gradient
        for name, parameter, gradient in zip(names, parameters, gradients, strict=True)
    }


def plain_loss(model: Any, batch: Any) -> torch.Tensor:
    from megatron_prealign.model.attention import document_mask

    starts = batch.document_starts
    logits = model(batch.tokens, batch.position_ids, None if starts is None else document_mask(starts, torch.float32))
    return next_token_loss(logits, batch.labels, batch.loss_mask)


def restricted_positions(batch: Any) -> int:
    """Number of positions that may not attend to all earlier ones."""
    return 0 if batch.document_starts is None else int((batch.document_starts > 0).sum())


def alignment_step(values: dict[str, Any], directory: str) -> dict[str, Any]:
    """Runs in a worker: step 3 of the alignment phase, by the phase and by hand with one word per sequence."""
    from megatron_prealign.alignment.layout import WordLayout
    from megatron_prealign.alignment.words import WordSampler
    from megatron_prealign.checkpoint.train_state import TrainState
    from megatron_prealign.code_switch.switcher import SequenceFormat, plain_batch

    recipe, runtime, inputs, phases, chunks = open_run(values, directory)
    section = recipe.alignment
    state = TrainState(phase_step=3, step=3, consumed_samples=12)
    gradients, metrics = step(phases[0], state, chunks)
    before = copy.copy(state)
    phases[0].advance(state)
    dictionary = inputs.dictionary
    sampler = WordSampler(dictionary.table, dictionary.words, section, recipe.training.seed)
    words = sampler.draw(3, replace(WordLayout.of(runtime, chunks), packed=False))
    (unpacked,) = words.batches
    model = chunks[0].module
    lengths = (unpacked.weights > 0).sum(dim=1).tolist()
    states = states_by_hand(model, unpacked.tokens, unpacked.position_ids, lengths, LAYERS)
    losses, penalties = {}, {}
    for layer, weight in enumerate(section.layer_weights(LAYERS)):
        if weight:
            losses[layer], penalties[layer], _ = contrastive_loops(
                states[layer], words.groups.group.tolist(), section.temperature
            )
    weights = section.layer_weights(LAYERS)
    aligned = sum(weights[layer] * loss for layer, loss in losses.items())
    penalty = sum(weights[layer] * penalty for layer, penalty in penalties.items())
    lm_loss, apart = torch.zeros(()), 0
    if section.lm_global_batch_size:
        samples = inputs.train.batch(range(12, 12 + section.lm_global_batch_size))
        sequence_format = SequenceFormat(
            seq_length=recipe.data.seq_length,
            eod_id=inputs.vocabulary.tokenizer.eod_id,
            reset_attention_mask=recipe.data.reset_attention_mask,
        )
        batch = plain_batch(samples.tokens, sequence_format)
        lm_loss, apart = plain_loss(model, batch), restricted_positions(batch)
    total = section.alpha * aligned + section.gamma * penalty + section.lm_weight * lm_loss
    return {
        "gradients": gradients,
        "metrics": metrics,
        "expected_gradients": plain_gradients(model, total),
        "expected_loss": total.item(),
        "expected_lm_loss": lm_loss.item(),
        "expected_layers": {layer: loss.item() for layer, loss in losses.items()},
        "penalty": penalty.item(),
        "apart": apart,
        "consumed": state.consumed_samples - before.consumed_samples,
        "tokens": state.tokens - before.tokens,
        "expected_tokens": section.lm_global_batch_size * recipe.data.seq_length + sum(lengths),
    }


def language_model_step(values: dict[str, Any], directory: str) -> dict[str, Any]:
    """Runs in a worker: a later step of language-model training, by the phase and by hand."""
    from megatron_prealign.checkpoint.train_state import TrainState
    from megatron_prealign.code_switch.switcher import CodeSwitcher, SequenceFormat, plain_batch

    recipe, runtime, inputs, phases, chunks = open_run(values, directory)
    eod_id, size = inputs.vocabulary.tokenizer.eod_id, recipe.training.global_batch_size
    # Samples in the middle of which a document ends, so that the next one starts in the same sample.
    start = next(at for at in range(20, 400) if (inputs.train.batch([at]).tokens[:, 2:-16] == eod_id).any())
    state = TrainState(phase=1, phase_step=2, step=7, tokens=5000, phase_start_tokens=1000, consumed_samples=start)
    gradients, metrics = step(phases[-1], state, chunks)
    seq_length = recipe.data.seq_length
    sequence_format = SequenceFormat(
        seq_length=seq_length,
        eod_id=eod_id,
        mask_eod=recipe.data.eod_mask_loss,
        reset_position_ids=recipe.data.reset_position_ids,
        reset_attention_mask=recipe.data.reset_attention_mask,
    )
    samples = inputs.train.batch(range(start, start + size))
    if recipe.code_switch is None:
        batch = plain_batch(samples.tokens, sequence_format)
    else:
        switcher = CodeSwitcher(
            inputs.dictionary.switching.table,
            recipe.code_switch,
            sequence_format,
            seed=recipe.training.seed,
            languages=recipe.data.languages,
            device="cpu",
        )
        batch = switcher(samples.tokens, samples.language, samples.sample_id, 4000)
    loss = plain_loss(chunks[0].module, batch)
    phases[-1].advance(state)
    return {
        "gradients": gradients,
        "metrics": metrics,
        "expected_gradients": plain_gradients(chunks[0].module, loss),
        "expected_loss": loss.item(),
        "counts": None if batch.counts is None else batch.counts.tolist(),
        "changed": int((batch.tokens != samples.tokens[:, :seq_length]).sum()),
        "unscored": int((batch.loss_mask == 0).sum()),
        "apart": restricted_positions(batch),
        "loss_together": plain_loss(chunks[0].module, batch._replace(document_starts=None)).item(),
        "consumed": state.consumed_samples - start,
        "tokens": state.tokens,
    }


def assert_same_gradients(result: dict[str, Any]) -> None:
    got, expected = result["gradients"], result["expected_gradients"]
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = gradient.abs().max()
        assert scale > 0, name
        torch.testing.assert_close(
            got[name] / scale, gradient / scale, msg=lambda text, name=name: f"{name}: {text}", **TOLERANCE
        )


@pytest.mark.parametrize(
    "section",
    [
        {},
        {"alpha": 0.5, "gamma": 0.3, "lm_weight": 0.7, "layers": [0, 2, 5], "temperature": 0.2},
        {"lm_global_batch_size": 12, "lm_micro_batch_size": 4, "gamma": 2.0, "layers": [4]},
        {"layers": {1: 0.25, 4: 2.0, 5: 1.0}, "gamma": 0.5, "word_micro_batch_size": 8},
        {"layers": "1-3", "words_per_step": 24},
    ],
    ids=["defaults", "weights_and_layers", "last_block", "weighted_layers_in_microbatches", "range_of_layers"],
)
def test_alignment_step_matches_the_reference(
    workers: WorkerPool, tiny: Tiny, tmp_path: Path, section: dict[str, Any]
) -> None:
    values = tiny.values(tmp_path)
    values["alignment"].update(section)
    result = workers.run(1, alignment_step, values, str(tmp_path))[0]
    assert_same_gradients(result)
    metrics = result["metrics"]
    assert set(metrics) == {"loss", "lm_loss", "alignment_loss"}
    # fp32 against float64.
    assert metrics["loss"] == pytest.approx(result["expected_loss"], rel=1e-5)
    assert metrics["lm_loss"] == pytest.approx(result["expected_lm_loss"], rel=1e-5)
    by_layer = metrics["alignment_loss"]
    assert len(by_layer) == LAYERS + 2
    assert {layer: loss for layer, loss in enumerate(by_layer) if loss is not None} == pytest.approx(
        result["expected_layers"], rel=1e-5
    )
    assert result["consumed"] == values["alignment"]["lm_global_batch_size"]
    assert result["tokens"] == result["expected_tokens"]


@pytest.mark.slow
def test_alignment_step_keeps_documents_apart(workers: WorkerPool, tiny: Tiny, tmp_path: Path) -> None:
    """The samples have a mask of the same kind as the batch of words."""
    values = tiny.values(tmp_path)
    # A document has about 80 samples, so among 400 some contain the end of one, for any version of the Python docs.
    values["alignment"].update(lm_global_batch_size=400, lm_micro_batch_size=8)
    values["data"]["reset_attention_mask"] = True
    result = workers.run(1, alignment_step, values, str(tmp_path))[0]
    assert result["apart"] > 0
    assert_same_gradients(result)
    assert result["metrics"]["loss"] == pytest.approx(result["expected_loss"], rel=1e-5)


@pytest.mark.slow
def test_alignment_on_words_only(workers: WorkerPool, tiny: Tiny, tmp_path: Path) -> None:
    values = tiny.values(tmp_path)
    values["alignment"].update(lm_global_batch_size=0)
    result = workers.run(1, alignment_step, values, str(tmp_path))[0]
    assert_same_gradients(result)
    assert result["metrics"]["lm_loss"] is None
    assert result["metrics"]["loss"] == pytest.approx(result["expected_loss"], rel=1e-5)
    assert result["consumed"] == 0


def steps_of_a_schedule(values: dict[str, Any], directory: str) -> list[dict[str, Any]]:
    """Runs in workers: metrics of one step at ratio 0, of that and two with a ratio above 0, and of only these two."""
    from megatron_prealign.checkpoint.train_state import TrainState

    _, _, _, phases, chunks = open_run(values, directory)
    phase, results = phases[-1], []
    make_batch = phase._reader._make_batch

    def padded(samples: Any, consumed_tokens: int) -> Any:
        # The clone's words are as long as their originals; counts as if 8 of the 64 positions were padding, 16 cut off.
        batch = make_batch(samples, consumed_tokens)
        if batch.counts is None:
            return batch
        return batch._replace(counts=batch.counts + torch.tensor([0, 0, 0, 8, 16, 0, 0]))

    phase._reader._make_batch = padded
    for after in ([0], [0, 4000, 4000], [4000, 4000]):
        for tokens in after:
            state = TrainState(phase=1, tokens=1000 + tokens, phase_start_tokens=1000, consumed_samples=tokens // 100)
            phase.begin(state, chunks)
            phase.forward_backward(state, chunks)
            phase.end()
        results.append(phase.metrics(len(after)))
    return results


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{}, {"pipeline_model_parallel_size": 2}], ids=["dp2", "pp2"])
def test_steps_at_ratio_zero_do_not_lower_the_rates(
    workers: WorkerPool, tiny: Tiny, tmp_path: Path, layout: dict[str, Any]
) -> None:
    values = tiny.values(tmp_path)
    values["training"].update(train_iters=60, micro_batch_size=2)
    values["parallel"] = {"device": "cpu", **layout}
    values["code_switch"] = {"ratio": 0.0, "schedule": "linear", "final_ratio": 0.5, "schedule_tokens": 8000}
    for unswitched, mixed, switched in workers.run(2, steps_of_a_schedule, values, str(tmp_path)):
        assert set(unswitched) == {"loss", "lm_loss"}
        assert (switched["padding_share"], switched["truncation_share"]) == (1 / 8, 1 / 4)
        assert switched["switched_word_rate"] > 0
        for name in ("known_word_rate", "switched_word_rate", "padding_share", "truncation_share", "switched_words"):
            assert mixed[name] == switched[name], name


@pytest.mark.parametrize("mask_eod", [False, True])
@pytest.mark.parametrize("switching", [True, False])
def test_language_model_step_matches_the_reference(
    workers: WorkerPool, tiny: Tiny, tmp_path: Path, switching: bool, mask_eod: bool
) -> None:
    values = tiny.values(tmp_path)
    values["data"]["eod_mask_loss"] = mask_eod
    values["training"]["train_iters"] = 60
    # The ratio depends on the tokens of this phase: 0.25 after 4,000.
    values["code_switch"] = {"ratio": 0.0, "schedule": "linear", "final_ratio": 0.5, "schedule_tokens": 8000}
    if not switching:
        del values["code_switch"]
    result = workers.run(1, language_model_step, values, str(tmp_path))[0]
    assert_same_gradients(result)
    metrics = result["metrics"]
    assert metrics["loss"] == metrics["lm_loss"] == pytest.approx(result["expected_loss"], rel=1e-5)
    assert result["consumed"] == 8
    assert result["tokens"] == 5000 + 8 * 32
    if not switching:
        assert result["changed"] == 0
        assert (result["unscored"] > 0) == mask_eod
        assert set(metrics) == {"loss", "lm_loss"}
        return
    running, known, switched, padded, truncated, *by_language = result["counts"]
    assert result["changed"] >= switched > 0
    assert metrics["known_word_rate"] == known / running
    assert metrics["switched_word_rate"] == switched / running
    assert (metrics["padding_share"], metrics["truncation_share"]) == (padded / 256, truncated / 256)
    assert metrics["switched_words"] == dict(zip(["en", "en_clone"], by_language, strict=True))


@pytest.mark.parametrize("switching", [True, False])
def test_language_model_step_keeps_documents_apart(
    workers: WorkerPool, tiny: Tiny, tmp_path: Path, switching: bool
) -> None:
    values = tiny.values(tmp_path)
    values["model"].update(family="gpt2", num_query_groups=4)
    values["data"].update(reset_position_ids=True, reset_attention_mask=True)
    values["training"]["train_iters"] = 60
    if not switching:
        del values["code_switch"]
    result = workers.run(1, language_model_step, values, str(tmp_path))[0]
    assert result["apart"] > 0
    assert_same_gradients(result)
    assert result["metrics"]["loss"] == pytest.approx(result["expected_loss"], rel=1e-5)
    assert result["loss_together"] != pytest.approx(result["expected_loss"], rel=2e-5)


def total_iters(
    training: dict[str, Any], spent: int, values: dict[str, Any], directory: str, steps: int = 0, samples: int = 0
) -> int:
    """Runs in a worker: number of steps of language-model training after the alignment phase consumed `spent` tokens;
    `steps` of them are done and consumed `samples` samples."""
    from types import SimpleNamespace

    from megatron_prealign.checkpoint.train_state import TrainState
    from megatron_prealign.training.language_model_phase import LanguageModelPhase

    values["training"].update(training)
    runtime: Any = SimpleNamespace(device=torch.device("cpu"))
    reader: Any = None
    phase = LanguageModelPhase(recipe_of(values, Path(directory)), runtime, reader, target_languages=None)
    state = TrainState(
        phase_step=steps,
        tokens=spent + 99,
        phase_start_tokens=spent,
        consumed_samples=40 + samples,
        phase_start_samples=40,
    )
    assert phase.schedule_settings(state).decay_iters == phase.total_iters(state)
    return phase.total_iters(state)


# One step is 8 samples of 32 tokens.
STEP_TOKENS = 256


@pytest.mark.parametrize(
    ("training", "spent", "steps"),
    [
        ({"train_iters": 7}, 10_000, 7),
        ({"train_iters": None, "train_tokens": 20 * STEP_TOKENS}, 0, 20),
        ({"train_iters": None, "train_tokens": 20 * STEP_TOKENS}, 5 * STEP_TOKENS, 15),
        # One token more leaves one step less, since the budget is never exceeded.
        ({"train_iters": None, "train_tokens": 20 * STEP_TOKENS}, 5 * STEP_TOKENS + 1, 14),
        ({"train_iters": None, "train_tokens": 20 * STEP_TOKENS + STEP_TOKENS - 1}, 0, 20),
    ],
)
def test_token_budget(
    workers: WorkerPool, tiny: Tiny, tmp_path: Path, training: dict[str, Any], spent: int, steps: int
) -> None:
    assert workers.run(1, total_iters, training, spent, tiny.values(tmp_path), str(tmp_path))[0] == steps


def test_token_budget_after_another_batch_size(workers: WorkerPool, tiny: Tiny, tmp_path: Path) -> None:
    """Of a budget for 20 steps of 8 samples, 6 steps of 16 are done, which leaves 8 steps of 8."""
    training = {"train_iters": None, "train_tokens": 25 * STEP_TOKENS}
    arguments = (training, 5 * STEP_TOKENS, tiny.values(tmp_path), str(tmp_path))
    assert workers.run(1, total_iters, *arguments, 6, 6 * 16)[0] == 6 + 8
    # With a constant batch size it is the initial number.
    for done in (1, 19, 20):
        assert workers.run(1, total_iters, *arguments, done, done * 8)[0] == 20


def test_alignment_may_not_consume_the_complete_budget(workers: WorkerPool, tiny: Tiny, tmp_path: Path) -> None:
    training = {"train_iters": None, "train_tokens": 20 * STEP_TOKENS}
    spent = 19 * STEP_TOKENS + 1
    with pytest.raises(WorkerError) as caught:
        workers.run(1, total_iters, training, spent, tiny.values(tmp_path), str(tmp_path))
    kind, message, _ = caught.value.failures[0]
    assert kind == "UserError"
    assert_facts(message, f"training.train_tokens is {20 * STEP_TOKENS}", "alignment phase", spent)


def read_samples(values: dict[str, Any], directory: str) -> dict[str, Any]:
    """Runs in workers: this rank's microbatches of 8 samples from sample 4 on, and these samples read directly."""
    from megatron_prealign.code_switch.switcher import SequenceFormat, plain_batch
    from megatron_prealign.training.microbatches import SampleReader, StepSamples

    _, runtime, inputs, _, _ = open_run(values, directory)
    seen: list[int] = []

    def make_batch(samples: Any, consumed_tokens: int) -> Any:
        seen.append(consumed_tokens)
        batch = plain_batch(samples.tokens, SequenceFormat(seq_length=samples.tokens.shape[1] - 1, eod_id=0))
        # Each sample has a different number of scored tokens.
        mask = (torch.arange(batch.tokens.shape[1]) < samples.sample_id[:, None]).float()
        return batch._replace(loss_mask=mask, counts=samples.sample_id)

    reader = SampleReader(inputs.train, runtime, micro_batch_size=2, make_batch=make_batch)
    batches, counts = reader.read(StepSamples(4, 8, consumed_tokens=77), following=None)
    return {
        "tokens": [batch.tokens for batch in batches],
        "scored": [batch.scored_tokens.item() for batch in batches],
        "counts": counts.tolist(),
        "seen": seen,
        "all": inputs.train.batch(range(4, 12)).tokens[:, :-1],
    }


@pytest.mark.parametrize("ranks", [1, 2])
def test_samples_of_a_step_are_divided_over_ranks(workers: WorkerPool, tiny: Tiny, tmp_path: Path, ranks: int) -> None:
    results = workers.run(ranks, read_samples, tiny.values(tmp_path), str(tmp_path))
    # Rank by rank in each round, so that the order of the blend does not depend on the number of ranks.
    rounds = zip(*(result["tokens"] for result in results), strict=True)
    assert torch.equal(torch.cat([part for each in rounds for part in each]), results[0]["all"])
    for result in results:
        # Each of the samples 4 to 11 scores as many tokens as its index, summed over all ranks.
        assert result["scored"] == [float(sum(range(4, 12)))] * (4 // ranks)
        assert result["seen"] == [77] * (4 // ranks)
    totals = [sum(column) for column in zip(*(result["counts"] for result in results), strict=True)]
    assert sum(totals) == sum(range(4, 12))
