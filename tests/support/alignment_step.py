"""Runs one step of the alignment phase in worker processes and returns its losses and full gradients."""

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

# Ends documents within samples of the blend: positions with this input have no loss, unevenly over samples.
EOD_ID = 39

# Megatron-Core's checkpoints name the norms as in Transformer Engine, which fuses them with the next layer.
CHECKPOINT_NAMES = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}

WORD_GROUPS = 20

# Of the optimizer of the projection heads.
ADAM_BETA1 = 0.9

# A slot of the global batch of words: its group and its tokens; without tokens it is an empty slot.
Slot = tuple[int, Sequence[int]]

# (name, range of the shard in the full tensor per axis, the shard)
Shard = tuple[str, tuple[tuple[int, int], ...], np.ndarray]


@dataclass(frozen=True)
class Case:
    """One step.

    Attributes:
        slots: the words of all ranks, `alignment.words_per_step` of them; None to draw them.
        return_weights: also return the model's weights.
    """

    recipe: Recipe
    slots: Sequence[Slot] | None
    return_weights: bool = False


@dataclass(frozen=True)
class Result:
    """State of one rank after the step.

    Attributes:
        metrics: metrics of the phase.
        gradients: shards of the gradients on this rank.
        weights: shards of the weights, if requested.
    """

    metrics: dict[str, Any]
    gradients: list[Shard] = field(repr=False)
    weights: list[Shard] = field(repr=False)


@lru_cache
def _recipe(family: str) -> Recipe:
    """`model_builds.recipe_values` with an alignment section. Cached: parsing takes longer than the step."""
    sections = {
        "dictionary": {"table": "t"},
        "alignment": {"train_iters": 1, "words_per_step": 24, "lr": 0.001, "lm_micro_batch_size": 1},
    }
    with tempfile.TemporaryDirectory() as directory:
        return recipe_of(recipe_values(family, **sections), Path(directory))


def step_recipe(family: str, **sections: dict[str, Any]) -> Recipe:
    """Recipe of a step; `sections` override its fields."""
    recipe = _recipe(family)
    changed = {name: replace(getattr(recipe, name), **fields) for name, fields in sections.items()}
    return replace(recipe, **changed)


def blend_rows(count: int) -> torch.Tensor:
    """Token ids `[count, SEQ_LENGTH + 1]` of samples of the blend."""
    generator = torch.Generator().manual_seed(5)
    rows = torch.randint(0, VOCAB_SIZE, (64, SEQ_LENGTH + 1), generator=generator)
    # In some samples only, so that the number of scored positions differs between ranks.
    rows[::3, 2:9] = EOD_ID
    return rows[:count]


class BlendSamples:
    """Stands in for `TrainSamples`."""

    def batch(self, positions: Sequence[int]) -> Any:
        from megatron_prealign.data.samples import SampleBatch

        indices = torch.tensor(list(positions))
        return SampleBatch(tokens=blend_rows(64)[indices], language=torch.zeros_like(indices), sample_id=indices)


def hand_made_words(slots: Sequence[Slot]) -> Any:
    """A `WordSampler` that returns these slots in every step."""
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
    """The real `WordSampler` over a small table of three languages."""
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
    """Runs in a worker: the words that `drawing_words` draws for the first step."""
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
    """Runs in workers: each case with its own model; all cases have the same parallel sizes."""
    from megatron_prealign.runtime.distributed import start

    runtime = start(cases[0].recipe.parallel, seed=1)
    # The process groups depend on the sizes only; the other fields of `parallel` may differ.
    return [_run_case(case, replace(runtime, parallel=case.recipe.parallel)) for case in cases]


def _run_case(case: Case, runtime: Any) -> Result:
    from megatron_prealign.alignment.freezing import frozen_parameters
    from megatron_prealign.checkpoint.train_state import TrainState
    from megatron_prealign.code_switch.switcher import SequenceFormat, plain_batch
    from megatron_prealign.model.build import build_model
    from megatron_prealign.runtime.engine import wrap_data_parallel
    from megatron_prealign.runtime.optimizer import freeze
    from megatron_prealign.training.alignment_phase import AlignmentPhase
    from megatron_prealign.training.guarded_phase import GuardedLanguageModelPhase
    from megatron_prealign.training.microbatches import SampleReader
    from megatron_prealign.training.word_steps import WordSteps

    recipe = case.recipe
    models = build_model(recipe, runtime, vocab_size=VOCAB_SIZE)
    for model in models:
        disturb_alike(model)
    weights = [shard for model in models for shard in local_shards(model)]
    freeze(frozen_parameters(recipe, models))
    chunks = wrap_data_parallel(models, recipe.parallel)
    sequence_format = SequenceFormat(seq_length=SEQ_LENGTH, eod_id=EOD_ID, mask_eod=True)
    sampler = drawing_words(recipe.alignment) if case.slots is None else hand_made_words(case.slots)
    words = WordSteps(recipe, runtime, sampler)
    heads = words.attach(chunks)
    weights += head_shards(heads)
    guarded = recipe.alignment_guard is not None
    reader = SampleReader(
        BlendSamples(),
        runtime,
        micro_batch_size=recipe.training.micro_batch_size if guarded else recipe.alignment_micro_batch_size,
        make_batch=lambda rows, consumed: plain_batch(rows.tokens, sequence_format),
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
    gradients = [shard for chunk in chunks for shard in local_shards(chunk.module, gradients=True)]
    return Result(
        phase.metrics(1), gradients + head_shards(heads, gradients=True), weights if case.return_weights else []
    )


def disturb_alike(model: Any) -> None:
    """Randomises all weights, including norms and biases, so that none has a neutral value; the same in every layout.
    Larger than initial weights, so that attention is far from uniform."""
    from megatron_prealign.model.initialise import sharded_tensors

    with torch.no_grad():
        for entry in model.sharded_state_dict().values():
            for shard in sharded_tensors(entry):
                if shard.data is None:
                    continue
                name, ranges = _locate(shard)
                shape = list(shard.global_shape[shard.prepend_axis_num :])
                vocabulary = name.endswith(("word_embeddings.weight", "output_layer.weight"))
                if vocabulary:
                    shape[0] = VOCAB_SIZE
                seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "little")
                noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
                if len(shape) == 1:
                    full = 0.3 * noise + (1.0 if "norm.weight" in name else 0.0)
                else:
                    full = noise * shape[-1] ** -0.5
                part = full[tuple(slice(*each) for each in ranges)]
                shard.data.zero_()
                shard.data[tuple(slice(0, size) for size in part.shape)].copy_(part)


def _locate(shard: Any) -> tuple[str, tuple[tuple[int, int], ...]]:
    """Name with the layer's global number, and the range of the shard in the full tensor per axis."""
    first, name = shard.prepend_axis_num, shard.key
    for checkpoint_name, module_name in CHECKPOINT_NAMES.items():
        name = name.replace(checkpoint_name, module_name)
    if first:
        name = name.replace("decoder.layers.", f"decoder.layers.{shard.global_offset[0]}.")
    sizes = zip(shard.global_offset[first:], shard.local_shape, strict=True)
    return name, tuple((start, start + size) for start, size in sizes)


def local_shards(model: Any, *, gradients: bool = False) -> list[Shard]:
    """Shards of the weights, or of the gradients, on this rank."""
    from megatron_prealign.model.initialise import sharded_tensors

    if gradients:
        # Read through the state dict, which contains the offsets of each shard.
        for parameter in model.parameters():
            parameter.data = parameter.main_grad.reshape(parameter.shape).clone()
    return [
        (*_locate(shard), shard.data.detach().double().numpy().copy())
        for entry in model.sharded_state_dict().values()
        for shard in sharded_tensors(entry)
        if shard.data is not None
    ]


def head_shards(heads: Any, *, gradients: bool = False) -> list[Shard]:
    """The projection heads of this stage, or their last gradients, computed from Adam's first moment."""
    if heads is None:
        return []
    suffix, scale = (".exp_avg", 1.0 - ADAM_BETA1) if gradients else (".weight", 1.0)
    return [
        (key.removesuffix(suffix), tuple((0, size) for size in shard.data.shape), shard.data.double().numpy() / scale)
        for key, shard in heads.sharded_state_dict().items()
        if key.endswith(suffix)
    ]


def gather_gradient_shards(chunk: Any) -> None:
    """Gathers the full gradient buffer, of which each data-parallel rank has only a shard under the distributed
    optimizer. Collective: call on all ranks of the data-parallel group."""
    if not chunk.ddp_config.use_distributed_optimizer:
        return
    group = chunk.intra_dp_cp_group
    for buffer in chunk.buffers:
        for bucket in buffer.buckets:
            own = bucket.grad_data.chunk(group.size())[group.rank()].clone()
            torch.distributed.all_gather_into_tensor(bucket.grad_data, own, group=group)


def full_tensors(shards: Sequence[Shard], tolerance: float) -> dict[str, torch.Tensor]:
    """Joins the shards of all ranks; removes the padding of vocabularies.

    A shard may be replicated (data-parallel ranks, norms of tensor-parallel ranks, both ends of a tied embedding); the
    replicas may differ by `tolerance`, relative to the norm. Padding must be 0.
    """
    joined: dict[str, torch.Tensor] = {}
    filled: dict[str, torch.Tensor] = {}
    for name, ranges, shard in shards:
        shape = [max(other[axis][1] for key, other, _ in shards if key == name) for axis in range(len(ranges))]
        full = joined.setdefault(name, torch.zeros(shape, dtype=torch.float64))
        done = filled.setdefault(name, torch.zeros(shape, dtype=torch.bool))
        at, new = tuple(slice(*each) for each in ranges), torch.from_numpy(shard)
        if done[at].any():
            assert done[at].all(), name
            assert (full[at] - new).norm() <= tolerance * max(new.norm(), 1e-30), (name, ranges)
        full[at], done[at] = new, True
    assert all(done.all() for done in filled.values())
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        if name in joined:
            assert not joined[name][VOCAB_SIZE:].any(), name
            joined[name] = joined[name][:VOCAB_SIZE]
    return joined
