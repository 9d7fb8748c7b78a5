"""Runs one step of the alignment phase in worker processes and brings home its losses and its gradients, whole."""

import hashlib
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from megatron_prealign.recipe import Recipe
from support.model_builds import SEQ_LENGTH, VOCAB_SIZE, recipe_values
from support.tiny import recipe_of
from support.word_table import word_table

# A row of the blend ends its document here and there: positions with this input have no loss, unevenly over rows.
EOD_ID = 39

# Megatron-Core's checkpoints name the norms as Transformer Engine does, which fuses them with what follows.
CHECKPOINT_NAMES = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}

WORD_GROUPS = 20

# Of the projection heads' optimizer.
ADAM_BETA1 = 0.9

# A slot of the global batch of words: its meaning and its tokens; no tokens is an empty slot.
Slot = tuple[int, Sequence[int]]

# (name, place of the part in the whole tensor, the part)
Part = tuple[str, tuple[tuple[int, int], ...], np.ndarray]


@dataclass(frozen=True)
class Case:
    """One step.

    Attributes:
        slots: the words of all ranks, `alignment.words_per_step` of them; None draws them.
        wants_weights: also return the model's weights.
    """

    recipe: Recipe
    slots: Sequence[Slot] | None
    wants_weights: bool = False


@dataclass(frozen=True)
class Result:
    """What one rank has after the step.

    Attributes:
        metrics: those of the phase.
        gradients: the parts that this rank holds.
        weights: likewise, if wanted.
    """

    metrics: dict[str, Any]
    gradients: list[Part] = field(repr=False)
    weights: list[Part] = field(repr=False)


@lru_cache
def _recipe(family: str) -> Recipe:
    """`model_builds.recipe_values` with an alignment section. To parse it takes longer than the step."""
    sections = {
        "dictionary": {"table": "t"},
        "alignment": {"train_iters": 1, "words_per_step": 24, "lr": 0.001, "lm_micro_batch_size": 1},
    }
    with tempfile.TemporaryDirectory() as directory:
        return recipe_of(recipe_values(family, **sections), Path(directory))


def step_recipe(family: str, **sections: dict[str, Any]) -> Recipe:
    """Recipe of a step; `sections` change its fields."""
    recipe = _recipe(family)
    changed = {name: replace(getattr(recipe, name), **fields) for name, fields in sections.items()}
    return replace(recipe, **changed)


def blend_rows(count: int) -> torch.Tensor:
    """Token ids `[count, SEQ_LENGTH + 1]` of the rows of the blend."""
    generator = torch.Generator().manual_seed(5)
    rows = torch.randint(0, VOCAB_SIZE, (64, SEQ_LENGTH + 1), generator=generator)
    # In some rows only, so that ranks differ in how many positions they score.
    rows[::3, 2:9] = EOD_ID
    return rows[:count]


class BlendRows:
    """Stands for `TrainSamples`."""

    def rows(self, positions: Sequence[int]) -> Any:
        from megatron_prealign.data.samples import SampleRows

        at = torch.tensor(list(positions))
        return SampleRows(tokens=blend_rows(64)[at], language=torch.zeros_like(at), sample_id=at)


def hand_made_words(slots: Sequence[Slot]) -> Any:
    """A `WordSampler` that draws these slots at every step."""
    from megatron_prealign.alignment.words import WordSampler

    class HandMadeWords(WordSampler):
        def __init__(self) -> None:
            lengths = [len(word) for _, word in slots]
            self.table = SimpleNamespace(
                word_tokens=np.array([token for _, word in slots for token in word], dtype=np.int32),
                word_offsets=np.cumsum([0, *lengths]),
            )

        def _draw_words(self, step: int) -> tuple[np.ndarray, np.ndarray]:
            empty = np.array([not word for _, word in slots])
            return (
                np.where(empty, -1, np.arange(len(slots))),
                np.where(empty, -1, np.array([group for group, _ in slots])),
            )

    return HandMadeWords()


def drawing_words(section: Any) -> Any:
    """A `WordSampler` of the product over a small table of three languages."""
    from megatron_prealign.alignment.words import WordSampler
    from megatron_prealign.dictionary.alignment_groups import alignment_groups

    random = np.random.default_rng(7)

    def word() -> list[int]:
        return random.integers(0, VOCAB_SIZE, random.integers(1, 6)).tolist()

    languages = ("en", "de", "fr")
    # Some groups have two words in a language, or none.
    groups = [
        [(language, word()) for language in (*languages, "fr")[: 2 + number % 3]] for number in range(WORD_GROUPS)
    ]
    table = word_table(groups, languages, vocab_size=VOCAB_SIZE)
    usable = alignment_groups(table, section, held_out=np.zeros(WORD_GROUPS, dtype=bool))
    return WordSampler(table, usable, section, seed=3)


def drawn_slots(recipe: Recipe) -> list[Slot]:
    """Runs in a worker: the words of the first step that `drawing_words` draws."""
    from megatron_prealign.alignment.layout import WordLayout

    alone = WordLayout(
        data_size=1,
        tensor_size=1,
        data_rank=0,
        packed=True,
        multiple=1,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    words = drawing_words(recipe.alignment).draw(0, alone)
    lengths = (words.batches[0].weights > 0).sum(dim=1).tolist()
    tokens = words.batches[0].word_tokens.tolist()
    return [
        (group, word[:length]) for group, word, length in zip(words.groups.group.tolist(), tokens, lengths, strict=True)
    ]


def run_cases(cases: Sequence[Case]) -> list[Result]:
    """Runs in workers: each case with a model of its own; all of the same parallel sizes."""
    from megatron_prealign.runtime.distributed import start

    runtime = start(cases[0].recipe.parallel, seed=1)
    # The groups are those of the sizes; how gradients are summed may differ.
    return [_run_case(case, replace(runtime, parallel=case.recipe.parallel)) for case in cases]


def _run_case(case: Case, runtime: Any) -> Result:
    from megatron_prealign.alignment.freezing import frozen_parameters
    from megatron_prealign.checkpoint.train_state import TrainState
    from megatron_prealign.code_switch.switcher import RowFormat, plain_batch
    from megatron_prealign.model.build import build_model
    from megatron_prealign.runtime.engine import wrap_data_parallel
    from megatron_prealign.runtime.optimizer import hold
    from megatron_prealign.training.alignment_phase import AlignmentPhase
    from megatron_prealign.training.guarded_phase import GuardedLanguageModelPhase
    from megatron_prealign.training.rows import RowReader
    from megatron_prealign.training.word_steps import WordSteps

    recipe = case.recipe
    models = build_model(recipe, runtime, vocab_size=VOCAB_SIZE)
    for model in models:
        disturb_alike(model)
    weights = [part for model in models for part in held_parts(model)]
    hold(frozen_parameters(recipe, models))
    chunks = wrap_data_parallel(models, recipe.parallel)
    row_format = RowFormat(seq_length=SEQ_LENGTH, eod_id=EOD_ID, mask_eod=True)
    sampler = drawing_words(recipe.alignment) if case.slots is None else hand_made_words(case.slots)
    words = WordSteps(recipe, runtime, sampler)
    heads = words.attach(chunks)
    weights += head_parts(heads)
    guarded = recipe.alignment_guard is not None
    reader = RowReader(
        BlendRows(),
        runtime,
        micro_batch_size=recipe.training.micro_batch_size if guarded else recipe.alignment_micro_batch_size,
        make_batch=lambda rows, consumed: plain_batch(rows.tokens, row_format),
    )
    phase = (
        GuardedLanguageModelPhase(recipe, runtime, reader, words, target_languages=None)
        if guarded
        else AlignmentPhase(recipe, runtime, reader, words)
    )
    state = TrainState()
    for chunk in chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    phase.begin(state, chunks)
    phase.forward_backward(state, chunks)
    phase.end()
    for chunk in chunks:
        gather_gradient_shards(chunk)
    gradients = [part for chunk in chunks for part in held_parts(chunk.module, gradients=True)]
    return Result(
        phase.metrics(1), gradients + head_parts(heads, gradients=True), weights if case.wants_weights else []
    )


def disturb_alike(model: Any) -> None:
    """Random weights everywhere, norms and biases too, so that no one stands for what is left out; the same in every
    layout. Larger than initial weights: attention is then far from uniform."""
    from megatron_prealign.model.initialise import sharded_tensors

    with torch.no_grad():
        for entry in model.sharded_state_dict().values():
            for shard in sharded_tensors(entry):
                if shard.data is None:
                    continue
                name, place = _place(shard)
                shape = list(shard.global_shape[shard.prepend_axis_num :])
                vocabulary = name.endswith(("word_embeddings.weight", "output_layer.weight"))
                if vocabulary:
                    shape[0] = VOCAB_SIZE
                seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "little")
                noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
                if len(shape) == 1:
                    whole = 0.3 * noise + (1.0 if "norm.weight" in name else 0.0)
                else:
                    whole = noise * shape[-1] ** -0.5
                part = whole[tuple(slice(*each) for each in place)]
                shard.data.zero_()
                shard.data[tuple(slice(0, size) for size in part.shape)].copy_(part)


def _place(shard: Any) -> tuple[str, tuple[tuple[int, int], ...]]:
    """Name with the layer's global number, and where the shard lies in the whole tensor."""
    first, name = shard.prepend_axis_num, shard.key
    for theirs, ours in CHECKPOINT_NAMES.items():
        name = name.replace(theirs, ours)
    if first:
        name = name.replace("decoder.layers.", f"decoder.layers.{shard.global_offset[0]}.")
    sizes = zip(shard.global_offset[first:], shard.local_shape, strict=True)
    return name, tuple((start, start + size) for start, size in sizes)


def held_parts(model: Any, *, gradients: bool = False) -> list[Part]:
    """The parts of the weights, or of the gradients, that this rank holds."""
    from megatron_prealign.model.initialise import sharded_tensors

    if gradients:
        # Seen through the state dict, which knows where each shard belongs.
        for parameter in model.parameters():
            parameter.data = parameter.main_grad.reshape(parameter.shape).clone()
    return [
        (*_place(shard), shard.data.detach().double().numpy().copy())
        for entry in model.sharded_state_dict().values()
        for shard in sharded_tensors(entry)
        if shard.data is not None
    ]


def head_parts(heads: Any, *, gradients: bool = False) -> list[Part]:
    """The projection heads of this stage, or the gradients that moved them, which Adam's first moment tells."""
    if heads is None:
        return []
    suffix, scale = (".exp_avg", 1.0 - ADAM_BETA1) if gradients else (".weight", 1.0)
    return [
        (key.removesuffix(suffix), tuple((0, size) for size in shard.data.shape), shard.data.double().numpy() / scale)
        for key, shard in heads.sharded_state_dict().items()
        if key.endswith(suffix)
    ]


def gather_gradient_shards(chunk: Any) -> None:
    """Under the distributed optimizer each data-parallel rank has its part of the gradient buffer only: fetches the
    others' parts. Takes part: the data-parallel group."""
    if not chunk.ddp_config.use_distributed_optimizer:
        return
    group = chunk.intra_dp_cp_group
    for buffer in chunk.buffers:
        for bucket in buffer.buckets:
            own = bucket.grad_data.chunk(group.size())[group.rank()].clone()
            torch.distributed.all_gather_into_tensor(bucket.grad_data, own, group=group)


def whole_tensors(parts: Sequence[Part], tolerance: float) -> dict[str, torch.Tensor]:
    """Joins the parts of all ranks; vocabularies without their padding.

    Several ranks hold the same part (data-parallel ranks, norms of tensor-parallel ranks, both ends of a tied
    embedding): the copies may differ by `tolerance`, relative to the norm. Padding must be 0.
    """
    joined: dict[str, torch.Tensor] = {}
    filled: dict[str, torch.Tensor] = {}
    for name, place, part in parts:
        shape = [max(where[axis][1] for other, where, _ in parts if other == name) for axis in range(len(place))]
        whole = joined.setdefault(name, torch.zeros(shape, dtype=torch.float64))
        done = filled.setdefault(name, torch.zeros(shape, dtype=torch.bool))
        at, new = tuple(slice(*each) for each in place), torch.from_numpy(part)
        if done[at].any():
            assert done[at].all(), name
            assert (whole[at] - new).norm() <= tolerance * max(new.norm(), 1e-30), (name, place)
        whole[at], done[at] = new, True
    assert all(done.all() for done in filled.values())
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        if name in joined:
            assert not joined[name][VOCAB_SIZE:].any(), name
            joined[name] = joined[name][:VOCAB_SIZE]
    return joined
