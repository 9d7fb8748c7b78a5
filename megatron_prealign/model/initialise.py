"""Initialises weights that depend only on the seed and the parameter's name, never on the parallel layout.

Each parameter is drawn in full, from a generator seeded by (seed, name, layer), and every rank keeps its shard. So TP2,
PP2 and a single process start from the same model, and a run can change its layout without changing the experiment.
CPU and CUDA generators differ, so the same seed gives different weights on the two device types.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.models.gpt import GPTModel

from megatron_prealign.recipe import ModelSection

VOCABULARY_WEIGHTS = ("embedding.word_embeddings.weight", "output_layer.weight")
RESIDUAL_WEIGHTS = ("linear_proj.weight", "linear_fc2.weight")


def initialise(chunks: Sequence[GPTModel], model: ModelSection, *, vocab_size: int, seed: int) -> None:
    """Draws every matrix of `chunks` from a normal distribution. Norms stay one, biases zero, and padding rows of the
    vocabulary are zero.

    The matrices that write to the residual stream have standard deviation `init_method_std / sqrt(2 * num_layers)`, as
    in Megatron-Core. With `equal_clone_embeddings`, row i + vocab_size / 2 equals row i.
    """
    with torch.no_grad():
        for chunk in chunks:
            for sharded in chunk.sharded_state_dict().values():
                for shard in sharded_tensors(sharded):
                    if shard.data is not None and shard.data.dim() >= 2:
                        _draw(shard, model, vocab_size, seed)


def sharded_tensors(entry: Any) -> list[ShardedTensor]:
    """The sharded tensors of one entry of a sharded state dict; the factory of a gated MLP has two."""
    if isinstance(entry, ShardedTensorFactory):
        built = entry.build()
        return [
            leaf for leaf in (built.values() if isinstance(built, dict) else built) if isinstance(leaf, ShardedTensor)
        ]
    return [entry] if isinstance(entry, ShardedTensor) else []


def _draw(shard: ShardedTensor, model: ModelSection, vocab_size: int, seed: int) -> None:
    prepended = shard.prepend_axis_num
    layer = shard.global_offset[:prepended]
    shape = list(shard.global_shape[prepended:])
    offset = shard.global_offset[prepended:]
    std = model.init_method_std
    is_vocabulary = shard.key in VOCABULARY_WEIGHTS
    if is_vocabulary:
        shape[0] = vocab_size
        std = model.embedding_std or std
    if shard.key.endswith(RESIDUAL_WEIGHTS):
        std /= math.sqrt(2 * model.num_layers)
    key_hash = hashlib.sha256(f"{seed}/{shard.key}/{layer}".encode()).digest()
    generator = torch.Generator(device=shard.data.device).manual_seed(int.from_bytes(key_hash[:8], "little") >> 1)
    full = torch.normal(0.0, std, shape, generator=generator, device=shard.data.device)
    if is_vocabulary and model.equal_clone_embeddings:
        full[vocab_size // 2 :] = full[: vocab_size // 2]
    part = full[tuple(slice(start, start + size) for start, size in zip(offset, shard.local_shape, strict=True))]
    shard.data.zero_()
    shard.data[tuple(slice(0, size) for size in part.shape)].copy_(part)
