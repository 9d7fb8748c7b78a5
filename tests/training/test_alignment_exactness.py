"""One alignment step in every layout against a single-process float64 reference: losses of all layers and gradients."""

from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from support.alignment_step import (
    EOD_ID,
    VOCAB_SIZE,
    Case,
    Result,
    Slot,
    blend_rows,
    drawn_slots,
    full_tensors,
    run_cases,
    step_recipe,
)
from support.marks import slow_except
from support.plain_alignment import Expected, Step, plain_step
from support.plain_losses import contrastive_loops, contrastive_matrix
from support.workers import WorkerPool

from megatron_prealign.recipe import AlignmentGuardSection, Recipe

LAYERS = 4
WORDS_PER_STEP = 24
# Guaranteed accuracy. One fp32 rounding is 3e-8 on average and a gradient has a hundred of them, some amplified by
# 1 / temperature; measured: at most 1.5e-6.
EXACT = 1e-5
# bf16 has 8 bits: a rounding is 0.0016 on average. Four blocks of about 11 forward and twice as many backward have 130
# independent ones, together 0.018; three times that for the worst parameter. Measured: typical 0.015, worst 0.034.
BF16_GRADIENTS = 0.05
# The losses depend on the forward third of them, 0.01, averaged over words; measured: worst 0.0034.
BF16_LOSSES = 0.01

TP2, SP, PP2 = {"tensor_model_parallel_size": 2}, {"sequence_parallel": True}, {"pipeline_model_parallel_size": 2}
VPP2 = {**PP2, "virtual_pipeline_model_parallel_size": 2}
TP4, PP4 = {"tensor_model_parallel_size": 4}, {"pipeline_model_parallel_size": 4}
# Number of processes and `parallel`: every layout of four processes, and those of two and one. The remaining factor is
# data parallelism.
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "tp2": (2, TP2),
    "sp_tp2": (2, TP2 | SP),
    "pp2": (2, PP2),
    "vpp2": (2, VPP2),
    "dp2": (2, {}),
    "tp4": (4, TP4),
    "sp_tp4": (4, TP4 | SP),
    "pp4": (4, PP4),
    "dp4": (4, {}),
    "tp2_pp2": (4, TP2 | PP2),
    "sp_tp2_pp2": (4, TP2 | SP | PP2),
    "tp2_vpp2": (4, TP2 | VPP2),
    "sp_tp2_vpp2": (4, TP2 | SP | VPP2),
    "tp2_dp2": (4, TP2),
    "sp_tp2_dp2": (4, TP2 | SP),
    "pp2_dp2": (4, PP2),
    "vpp2_dp2": (4, VPP2),
}
# Family and whether the embeddings are tied.
MODELS = {"llama": ("llama", False), "llama_tied": ("llama", True), "gpt2_tied": ("gpt2", True)}
# How gradients are summed over data-parallel ranks.
REDUCTIONS: dict[str, dict[str, Any]] = {
    "plain": {"use_distributed_optimizer": False},
    "sharded": {},
    "overlapped": {"overlap_grad_reduce": True},
}
RECOMPUTATIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective"},
    "full": {"recompute_granularity": "full"},
    "full_by_two": {"recompute_granularity": "full", "recompute_num_layers": 2},
}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "words": {},
    "mixed": {
        "lm_global_batch_size": 4,
        "alpha": 0.5,
        "lm_weight": 0.7,
        "gamma": 0.3,
        "temperature": 0.2,
        "layers": {0: 1.0, 2: 2.0, 4: 0.5},
    },
}


class Kind(NamedTuple):
    """Configuration of a step apart from its layout."""

    model: str
    recompute: str
    objective: str
    reduction: str
    word_microbatches: int


# Every model with every recomputation mode; the other options vary among them. The three kinds of a list have every
# model, recomputation and reduction and both objectives, so each layout runs one list.
KINDS = [
    [
        Kind("llama", "none", "mixed", "plain", 2),
        Kind("llama_tied", "full", "mixed", "sharded", 1),
        Kind("gpt2_tied", "selective", "words", "overlapped", 2),
    ],
    [
        Kind("llama", "selective", "words", "sharded", 1),
        Kind("llama_tied", "none", "words", "overlapped", 1),
        Kind("gpt2_tied", "full_by_two", "mixed", "plain", 2),
    ],
    [
        Kind("llama", "full", "words", "overlapped", 2),
        Kind("llama_tied", "selective", "mixed", "plain", 2),
        Kind("gpt2_tied", "none", "mixed", "sharded", 1),
    ],
]


def some_words(seed: int, groups: list[int], longest: int = 5) -> list[Slot]:
    """A word of random length for each slot with group 0 or above."""
    random = np.random.default_rng(seed)
    slots: list[Slot] = []
    for group in groups:
        word = random.integers(0, VOCAB_SIZE, random.integers(1, longest + 1)).tolist()
        slots.append((group, word if group >= 0 else []))
    return slots


# Four ranks have six slots each: six words, one, none, five. Group 0 is on three ranks, 1 on two; groups 9 and 10 have
# a single word without a partner.
UNEVEN = some_words(1, [0, 0, 1, 9, 2, 2, -1, -1, 0, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0, 3, 3, -1, 1, 10])
WORDS = {
    "uneven": UNEVEN,
    "one_group": some_words(2, [0] * 24),
    "pairs_apart": some_words(3, [*range(12), *range(12)]),
    # Some are the same token in the same group or in different ones.
    "single_tokens": some_words(4, [*range(8)] * 3, longest=1),
    # Three words, since with a single candidate the loss would be 0.
    "one_pair": some_words(5, [-1] * 11 + [3] + [-1] * 5 + [7] + [-1] * 5 + [3]),
}
NO_POSITIVES = some_words(6, [*range(20), -1, -1, -1, -1])


def recipe_of_model(which: str, layout: str, **sections: dict[str, Any]) -> Recipe:
    """Recipe of one of `MODELS` in a layout; `sections` changes further fields."""
    family, tied = MODELS[which]
    sections["model"] = {"share_embeddings_and_output_weights": tied, **sections.get("model", {})}
    sections["parallel"] = {**LAYOUTS[layout][1], **sections.get("parallel", {})}
    return step_recipe(family, **sections)


def case_of(kind: Kind, layout: str, slots: list[Slot] | None, **sections: dict[str, Any]) -> Case:
    """A step with `slots`, or with words drawn by the sampler if None; `sections` changes further fields."""
    world_size, parallel = LAYOUTS[layout]
    stages, tensor_size = (parallel.get(f"{axis}_model_parallel_size", 1) for axis in ("pipeline", "tensor"))
    data_size = world_size // stages // tensor_size
    sections["model"] = {**RECOMPUTATIONS[kind.recompute], **sections.get("model", {})}
    if kind.recompute == "full_by_two" and stages * parallel.get("virtual_pipeline_model_parallel_size", 1) == 4:
        # A chunk has a single block.
        sections["model"]["recompute_num_layers"] = 1
    sections["parallel"] = {**REDUCTIONS[kind.reduction], **sections.get("parallel", {})}
    sections["alignment"] = {
        **OBJECTIVES[kind.objective],
        "word_micro_batch_size": WORDS_PER_STEP // data_size // kind.word_microbatches,
        # Two microbatches of samples, or one where a rank has a single sample.
        "lm_micro_batch_size": max(1, 2 // data_size),
        **sections.get("alignment", {}),
    }
    return Case(recipe_of_model(kind.model, layout, **sections), slots)


class References:
    """Results of the plain model, each computed once."""

    def __init__(self, workers: WorkerPool) -> None:
        self._workers = workers
        self.weights = lru_cache(self._weights)
        self.expected = lru_cache(self._expected)

    def _weights(self, model: str, precision: str = "fp32") -> dict[str, torch.Tensor]:
        recipe = recipe_of_model(model, "one", training={"precision": precision})
        result = self._workers.run(1, run_cases, [Case(recipe, UNEVEN, return_weights=True)])[0][0]
        return full_tensors(result.weights, tolerance=0.0)

    def _expected(self, model: str, objective: str, words: str, precision: str = "fp32") -> Expected:
        step = step_of(WORDS[words], OBJECTIVES[objective])
        return plain_step(*MODELS[model], self.weights(model, precision), step)


def step_of(slots: list[Slot], section: dict[str, Any]) -> Step:
    """The reference's step for a recipe's alignment section."""
    options = dict(section)
    layers = options.pop("layers", dict.fromkeys(range(LAYERS + 2), 1.0))
    return Step(
        words=[word for _, word in slots if word],
        groups=[group for group, word in slots if word],
        rows=blend_rows(options.pop("lm_global_batch_size", 0)),
        eod_id=EOD_ID,
        layer_weights={layer: weight / sum(layers.values()) for layer, weight in layers.items()},
        **options,
    )


@pytest.fixture(scope="module")
def references(workers: WorkerPool) -> References:
    return References(workers)


def run_steps(workers: WorkerPool, layout: str, cases: list[Case]) -> list[list[Result]]:
    """Results of all ranks, by case."""
    return [list(results) for results in zip(*workers.run(LAYOUTS[layout][0], run_cases, cases), strict=True)]


def relative(got: float, expected: float) -> float:
    """Relative error; absolute error if `expected` is 0."""
    return abs(got - expected) / (abs(expected) or 1.0)


def loss_errors(metrics: dict[str, Any], expected: Expected) -> dict[str, float]:
    by_layer = metrics["alignment_loss"]
    assert [layer for layer, loss in enumerate(by_layer) if loss is not None] == sorted(expected.alignment_loss)
    errors = {f"layer {layer}": relative(by_layer[layer], loss) for layer, loss in expected.alignment_loss.items()}
    errors["loss"] = relative(metrics["loss"], expected.loss)
    assert (metrics["lm_loss"] is None) == (expected.lm_loss == 0.0)
    return errors | {"lm_loss": relative(metrics["lm_loss"] or 0.0, expected.lm_loss)}


def gradient_errors(results: list[Result], expected: Expected, copies: float) -> dict[str, float]:
    """Norm of the difference divided by the norm, for each parameter.

    Not element by element: an element can be a small difference of large terms and has their rounding error.

    Args:
        copies: Tolerance between ranks that have the same gradient.
    """
    gradients = full_tensors([part for result in results for part in result.gradients], copies)
    assert gradients.keys() == expected.gradients.keys()
    errors = {}
    for name, reference in expected.gradients.items():
        assert gradients[name].shape == reference.shape, name
        # Gradients that must be zero are exactly zero.
        assert reference.any() or not gradients[name].any(), name
        errors[name] = ((gradients[name] - reference).norm() / (reference.norm() or 1.0)).item()
    return errors


def assert_exact(
    results: list[Result], expected: Expected, gradients: float, *, losses: float = EXACT, of: Any = None
) -> None:
    """Fails unless every rank's losses and all gradients are as expected within relative tolerances."""
    errors = gradient_errors(results, expected, gradients)
    wrong: dict[Any, float] = {name: error for name, error in errors.items() if not error <= gradients}
    for rank, result in enumerate(results):
        by_loss = loss_errors(result.metrics, expected)
        wrong |= {(rank, name): error for name, error in by_loss.items() if not error <= losses}
    assert not wrong, (of, wrong)


@pytest.mark.parametrize("layout", slow_except(LAYOUTS, "one", "dp2", "vpp2", "sp_tp2"))
def test_every_layout_is_exact(workers: WorkerPool, references: References, layout: str) -> None:
    kinds = KINDS[list(LAYOUTS).index(layout) % len(KINDS)]
    if "tp4" in layout:
        # The Llama models have two key/value heads, too few for TP4.
        kinds = [kind for each in KINDS for kind in each if kind.model == "gpt2_tied"]
    results = run_steps(workers, layout, [case_of(kind, layout, UNEVEN) for kind in kinds])
    for kind, result in zip(kinds, results, strict=True):
        expected = references.expected(kind.model, kind.objective, "uneven")
        assert_exact(result, expected, EXACT, of=kind)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["dp4", "tp2_dp2"])
def test_every_batch_of_words_is_exact(workers: WorkerPool, references: References, layout: str) -> None:
    kind = Kind("llama", "none", "mixed", "sharded", 2)
    results = run_steps(workers, layout, [case_of(kind, layout, slots) for slots in WORDS.values()])
    for words, result in zip(WORDS, results, strict=True):
        expected = references.expected("llama", "mixed", words)
        assert all(loss > 0 for loss in expected.alignment_loss.values())
        assert_exact(result, expected, EXACT, of=words)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["vpp2_dp2", "sp_tp2_dp2"])
def test_without_positives_only_the_samples_count(workers: WorkerPool, references: References, layout: str) -> None:
    """The words are skipped, including the penalty; without samples all gradients are zero."""
    kinds = [Kind("llama", "full", objective, "overlapped", 2) for objective in ("mixed", "words")]
    mixed, words = run_steps(workers, layout, [case_of(kind, layout, NO_POSITIVES) for kind in kinds])
    samples_only = replace(step_of([], OBJECTIVES["mixed"]), layer_weights={})
    expected = plain_step(*MODELS["llama"], references.weights("llama"), samples_only)
    aligned = dict.fromkeys(OBJECTIVES["mixed"]["layers"], 0.0)
    assert_exact(mixed, replace(expected, alignment_loss=aligned), EXACT)
    for result in words:
        assert result.metrics["loss"] == 0.0
        assert all(not part.any() for _, _, part in result.gradients)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tp2_pp2", "sp_tp2_dp2"])
def test_drawn_words_are_exact(workers: WorkerPool, references: References, layout: str) -> None:
    """Words drawn by the sampler, of which each rank takes its part."""
    kind = Kind("llama", "none", "words", "sharded", 2)
    slots = workers.run(1, drawn_slots, case_of(kind, "one", None).recipe)[0]
    assert len(slots) == WORDS_PER_STEP
    assert len({group for group, _ in slots}) > WORDS_PER_STEP // 3
    expected = plain_step(*MODELS["llama"], references.weights("llama"), step_of(slots, {}))
    (result,) = run_steps(workers, layout, [case_of(kind, layout, None)])
    assert_exact(result, expected, EXACT)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tp2_pp2", "vpp2_dp2"])
def test_guarded_steps_are_exact(workers: WorkerPool, references: References, layout: str) -> None:
    """A step of language-model training with words: its samples have full weight."""
    kind = Kind("gpt2_tied", "full", "mixed", "overlapped", 2)
    training = {"global_batch_size": 4, "micro_batch_size": 1}
    case = case_of(kind, layout, UNEVEN, training=training)
    guarded = replace(case, recipe=replace(case.recipe, alignment_guard=AlignmentGuardSection(interval=1)))
    (result,) = run_steps(workers, layout, [guarded])
    step = step_of(UNEVEN, {**OBJECTIVES["mixed"], "lm_weight": 1.0})
    expected = plain_step(*MODELS["gpt2_tied"], references.weights("gpt2_tied"), step)
    # The phase reports the loss of the samples as its loss.
    assert_exact(result, replace(expected, loss=expected.lm_loss), EXACT)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["sp_tp2_dp2", "vpp2_dp2"])
def test_projection_heads_are_exact(workers: WorkerPool, layout: str) -> None:
    """Losses, gradients of the model and gradients of the heads."""
    kinds = [Kind("llama", "full", "mixed", "sharded", 2), Kind("llama", "none", "mixed", "overlapped", 1)]
    # Without clipping, which would scale the gradients of the heads.
    sections = {"alignment": {"projection_size": 12}, "optimizer": {"clip_grad": 0.0}}
    alone = replace(case_of(kinds[0], "one", UNEVEN, **sections), return_weights=True)
    weights = full_tensors(run_steps(workers, "one", [alone])[0][0].weights, tolerance=0.0)
    assert sum(name.startswith("projection_heads.") for name in weights) == 4 * len(OBJECTIVES["mixed"]["layers"])
    expected = plain_step(*MODELS["llama"], weights, step_of(UNEVEN, OBJECTIVES["mixed"]))
    results = run_steps(workers, layout, [case_of(kind, layout, UNEVEN, **sections) for kind in kinds])
    for kind, result in zip(kinds, results, strict=True):
        assert_exact(result, expected, EXACT, of=kind)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["sp_tp2", "vpp2_dp2"])
def test_frozen_blocks_have_no_gradient_and_change_no_other(
    workers: WorkerPool, references: References, layout: str
) -> None:
    kind = Kind("llama", "full", "mixed", "sharded", 2)
    cases = [case_of(kind, layout, UNEVEN, alignment={"freeze": half}) for half in ("lower", "upper")]
    expected = references.expected("llama", "mixed", "uneven")
    for frozen, result in zip(((0, 1), (2, 3)), run_steps(workers, layout, cases), strict=True):
        blocks = tuple(f"decoder.layers.{block}." for block in frozen)
        gradients = {
            name: torch.zeros_like(gradient) if name.startswith(blocks) else gradient
            for name, gradient in expected.gradients.items()
        }
        assert_exact(result, replace(expected, gradients=gradients), EXACT, of=frozen)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["one", "sp_tp2", "vpp2_dp2"])
def test_bf16_is_accurate_within_its_rounding(workers: WorkerPool, references: References, layout: str) -> None:
    """Against float64 with the same (bf16) weights."""
    kinds = [
        Kind("llama", "none", "mixed", "sharded", 2),
        Kind("llama_tied", "full", "words", "plain", 1),
        Kind("gpt2_tied", "selective", "words", "overlapped", 1),
    ]
    cases = [case_of(kind, layout, UNEVEN, training={"precision": "bf16"}) for kind in kinds]
    for kind, result in zip(kinds, run_steps(workers, layout, cases), strict=True):
        expected = references.expected(kind.model, kind.objective, "uneven", "bf16")
        assert_exact(result, expected, BF16_GRADIENTS, losses=BF16_LOSSES, of=kind)


def test_the_plain_losses_agree() -> None:
    """Two reference implementations of the contrastive loss, both float64."""
    words = torch.randn(len(UNEVEN), 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    groups = [group for group, _ in UNEVEN]
    valid = [at for at, group in enumerate(groups) if group >= 0]
    loss, penalty, pairs = contrastive_loops(words, groups, 0.1)
    assert pairs > 0
    for got, expected in zip(
        contrastive_matrix(words[valid], [groups[at] for at in valid], 0.1), (loss, penalty), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
