"""Validation loss compared with a plain loop over samples, in every layout; the evaluator."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from support.marks import slow_except
from support.tiny import Tiny, recipe_of
from support.workers import WorkerPool

SEQ_LENGTH = 96


def values_for(tiny: Tiny, directory: Path, **parallel: Any) -> dict[str, Any]:
    """Recipe values for which neither the last microbatch nor the last sample is full."""
    values = copy.deepcopy(tiny.values(directory))
    values["data"]["seq_length"] = SEQ_LENGTH
    values["training"].update(micro_batch_size=3, global_batch_size=12, eval_samples=100_000)
    values["alignment"].update(lm_global_batch_size=12)
    values["parallel"] = {"device": "cpu", **parallel}
    return values


def opened(values: dict[str, Any], directory: str) -> tuple[Any, Any, Any, Any, Any, Any, Any]:
    from megatron_prealign.evaluation.word_classes import word_classes
    from megatron_prealign.model.build import build_model
    from megatron_prealign.run.dictionary import load_measured
    from megatron_prealign.run.inputs import open_validation, open_vocabulary
    from megatron_prealign.run.pretrain import build_sequence_format
    from megatron_prealign.runtime.distributed import start

    recipe = recipe_of(values, Path(directory))
    runtime = start(recipe.parallel, seed=recipe.training.seed)
    vocabulary = open_vocabulary(recipe)
    chunks = build_model(recipe, runtime, vocab_size=vocabulary.size)
    validation = open_validation(recipe, vocabulary)
    words = None if recipe.dictionary is None else load_measured(recipe.dictionary, vocabulary.tokenizer.fingerprint)
    classes = word_classes(recipe, words, vocabulary.tokenizer)
    return recipe, runtime, chunks, validation, words, classes, build_sequence_format(recipe, vocabulary)


def measured(values: dict[str, Any], directory: str) -> Any:
    """Runs in workers: `ValidationLosses`."""
    from megatron_prealign.evaluation.validation import validation_losses

    recipe, runtime, chunks, samples, _, classes, sequence_format = opened(values, directory)
    return validation_losses(
        runtime,
        chunks,
        samples,
        micro_batch_size=recipe.training.micro_batch_size,
        sequence_format=sequence_format,
        classes=classes,
    )


def by_hand(values: dict[str, Any], directory: str) -> dict[str, Any]:
    """Runs in a worker: one sample at a time through the model, with torch's cross entropy; with `reset_attention_mask`
    one document of a sample at a time."""
    _, _, (chunk,), samples, _, classes, sequence_format = opened(values, directory)
    losses: dict[str, float] = {}
    by_class: dict[str, dict[str, float]] = {}
    counts, last = {}, {}
    for language in samples.languages:
        total, count = 0.0, 0
        of_class: dict[str, list[float]] = {}
        counts[language] = samples.num_samples(language)
        for index in range(counts[language]):
            rows, mask = samples.batch(language, [index])
            inputs, labels = rows.tokens[0, :-1], rows.tokens[0, 1:]
            ends = (inputs == sequence_format.eod_id).nonzero()[:, 0] + 1
            pieces = inputs.tensor_split(ends) if sequence_format.reset_attention_mask else (inputs,)
            with torch.no_grad():
                logits = torch.cat(
                    [chunk(ids[None], torch.arange(len(ids))[None], None)[0] for ids in pieces if len(ids)]
                )
            each = torch.nn.functional.cross_entropy(logits.double(), labels, reduction="none")
            total += each[mask[0]].sum().item()
            for loss, kind in zip(each[mask[0]].tolist(), classes.labels[language][count:].tolist(), strict=False):
                of_class.setdefault(("trained", "held_out", "other")[kind], []).append(loss)
            count += int(mask.sum())
        assert count == len(classes.labels[language])
        losses[language], last[language] = total / count, int(mask.sum())
        by_class[language] = {name: sum(values) / len(values) for name, values in of_class.items()}
    return {"losses": losses, "by_class": by_class, "counts": counts, "last": last}


def evaluation(values: dict[str, Any], directory: str) -> dict[str, Any]:
    """Runs in a worker: the evaluator's result and the state of the model afterwards."""
    from megatron_prealign.evaluation.evaluator import Evaluator, flatten_metrics
    from megatron_prealign.evaluation.parallel_text import measured_pairs
    from megatron_prealign.run.inputs import open_sentences, open_vocabulary

    recipe, runtime, chunks, samples, words, classes, sequence_format = opened(values, directory)
    chunks[0].train()
    sentences = measured_pairs(open_sentences(recipe, open_vocabulary(recipe)))
    evaluator = Evaluator(recipe, runtime, samples, sequence_format, words, sentences, classes)
    first = evaluator.measure(chunks)
    return {
        "flat": flatten_metrics(first),
        "result": first,
        "again": evaluator.measure(chunks),
        "names": evaluator.names,
        "training": chunks[0].training,
        "held_out": int(words[1].sum()) if words else 0,
    }


@pytest.fixture(scope="module")
def expected(workers: WorkerPool, tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("by_hand")
    reference = workers.run(1, by_hand, values_for(tiny, directory), str(directory))[0]
    assert list(reference["losses"]) == ["en", "en_clone"]
    # What the test is about: neither the last microbatch nor the last sample is full.
    assert all(count % 6 for count in reference["counts"].values())
    assert all(last < SEQ_LENGTH for last in reference["last"].values())
    assert all(set(each) == {"trained", "held_out", "other"} for each in reference["by_class"].values())
    return reference


@pytest.mark.parametrize(
    ("ranks", "parallel"),
    slow_except(
        [
            (1, {}),
            (2, {}),
            (2, {"pipeline_model_parallel_size": 2}),
            (2, {"tensor_model_parallel_size": 2}),
        ],
        (1, {}),
        (2, {"pipeline_model_parallel_size": 2}),
    ),
    ids=["one", "dp2", "pp2", "tp2"],
)
def test_loss_is_the_mean_over_all_text(
    workers: WorkerPool, tiny: Tiny, tmp_path: Path, expected: dict[str, Any], ranks: int, parallel: dict[str, Any]
) -> None:
    for losses in workers.run(ranks, measured, values_for(tiny, tmp_path, **parallel), str(tmp_path)):
        # fp32 losses summed in another order.
        assert losses.mean == pytest.approx(expected["losses"], rel=1e-6)
        assert list(losses.by_class) == list(expected["by_class"])
        for language, by_class in expected["by_class"].items():
            assert losses.by_class[language] == pytest.approx(by_class, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_documents_are_separated_as_in_training(workers: WorkerPool, tiny: Tiny, tmp_path: Path, family: str) -> None:
    values = values_for(tiny, tmp_path)
    values["model"].update(family=family, num_query_groups=4)
    together = workers.run(1, measured, values, str(tmp_path))[0].mean
    values["data"].update(reset_position_ids=True, reset_attention_mask=True, eod_mask_loss=True)
    reference = workers.run(1, by_hand, values, str(tmp_path))[0]
    losses = workers.run(1, measured, values, str(tmp_path))[0].mean
    # fp32 losses summed in another order; sums over single documents differ in order, too.
    assert losses == pytest.approx(reference["losses"], rel=1e-6)
    assert losses != pytest.approx(together, rel=1e-6)


def test_samples_are_limited(workers: WorkerPool, tiny: Tiny, tmp_path: Path, expected: dict[str, Any]) -> None:
    values = values_for(tiny, tmp_path)
    values["training"]["eval_samples"] = 2
    losses = workers.run(1, measured, values, str(tmp_path))[0]
    reference = workers.run(1, by_hand, values, str(tmp_path))[0]
    assert reference["counts"] == {"en": 2, "en_clone": 2}
    assert losses.mean == pytest.approx(reference["losses"], rel=1e-6)
    assert losses.mean != pytest.approx(expected["losses"], rel=1e-6)
    for language, by_class in reference["by_class"].items():
        assert losses.by_class[language] == pytest.approx(by_class, rel=1e-6)


def test_evaluator_measures_everything_and_leaves_the_model_in_training(
    workers: WorkerPool, tiny: Tiny, tmp_path: Path
) -> None:
    values = values_for(tiny, tmp_path)
    values["model"].update(hidden_dropout=0.5, attention_dropout=0.5)
    values["training"]["eval_samples"] = 4
    values["data"]["parallel_text"] = [tiny.sentences()]
    evaluated = workers.run(1, evaluation, values, str(tmp_path))[0]
    result = evaluated["result"]
    assert set(result["validation_loss"]) == {"en", "en_clone"}
    retrieval = ("word_retrieval_p_at_1", "word_retrieval_p_at_1_held_out", "sentence_retrieval_p_at_1")
    for name in retrieval:
        assert list(result[name]) == ["en-en_clone"]
        assert len(result[name]["en-en_clone"]) == 6
    assert [name for name in evaluated["names"] if "retrieval" in name] == [f"{each}/en-en_clone" for each in retrieval]
    names = [f"validation_loss_words/{each}/{name}" for each in ("en", "en_clone") for name in ("trained", "other")]
    assert set(names) <= set(evaluated["names"])
    assert set(evaluated["flat"]) == set(evaluated["names"])
    # Without dropout, two evaluations are bit-identical.
    assert evaluated["again"] == result
    assert evaluated["training"]


def test_without_a_dictionary_there_is_no_retrieval(workers: WorkerPool, tiny: Tiny, tmp_path: Path) -> None:
    values = values_for(tiny, tmp_path)
    for section in ("dictionary", "alignment", "code_switch"):
        del values[section]
    values["training"]["eval_samples"] = 2
    values["data"]["validation_fraction"] = 0.0
    result = workers.run(1, evaluation, values, str(tmp_path))[0]["result"]
    assert result["word_retrieval_p_at_1"] == result["word_retrieval_p_at_1_held_out"] == {}
    assert result["sentence_retrieval_p_at_1"] == result["validation_loss_words"] == {}
