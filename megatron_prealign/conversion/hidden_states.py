"""Runs one text through both models, Megatron-Core and Hugging Face: hidden states after every layer, and logits."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel

from megatron_prealign.checkpoint.single_process.reader import ShardReader
from megatron_prealign.checkpoint.single_process.weights import is_vocabulary
from megatron_prealign.conversion.to_hf import SourceCheckpoint, master_weights_prefix
from megatron_prealign.errors import UserError
from megatron_prealign.model.build import build_model
from megatron_prealign.model.initialise import sharded_tensors
from megatron_prealign.recipe import Recipe
from megatron_prealign.recipe.data import DataSection, DataSource
from megatron_prealign.recipe.logging import LoggingSection
from megatron_prealign.recipe.optimizer import OptimizerSection
from megatron_prealign.recipe.parallel import ParallelSection
from megatron_prealign.recipe.training import TrainingSection
from megatron_prealign.runtime.distributed import running

States = dict[str, torch.Tensor]
"""Name -> float32 hidden state [tokens, hidden]; the last is `logits`, [tokens, vocabulary]."""


@dataclass(frozen=True)
class StateDifference:
    """Difference of one state of the two models."""

    name: str
    difference: float
    """Largest absolute difference."""
    scale: float
    """Largest absolute value of the Hugging Face model's state."""

    @property
    def relative(self) -> float:
        """Difference relative to the scale."""
        return self.difference / (self.scale or 1.0)


def compare(mcore: States, hf: States) -> list[StateDifference]:
    """Compares all states, in the order of the model. A NaN difference counts as infinite."""
    differences = []
    for name, state in hf.items():
        difference = float((mcore[name] - state).abs().max())
        difference = difference if difference == difference else float("inf")
        differences.append(StateDifference(name, difference, float(state.abs().max())))
    return differences


def mcore_states(
    source: SourceCheckpoint,
    ids: list[int],
    dtype: torch.dtype,
    master_dtype: torch.dtype | None,
    *,
    leave_process_group: bool,
) -> States:
    """Runs the Megatron-Core model in float32 on the CPU.

    Args:
        source: The checkpoint.
        ids: Token ids of the text.
        dtype: Dtype that the weights are rounded to first: that of the model to compare with.
        master_dtype: `dtype` of `to_hf.master_weights_prefix`.
        leave_process_group: Keep torch's process group, for callers that started it.
    """
    recipe = _recipe(source, len(ids))
    with running(recipe.parallel, seed=0, leave_process_group=leave_process_group) as runtime, torch.no_grad():
        assert runtime.world_size == 1, "the model is not partitioned"
        (model,) = build_model(recipe, runtime, vocab_size=source.summary["vocab_size"])
        _load_weights(model, source, dtype, master_dtype)
        states: States = {}
        _record(states, "embedding", model.embedding, _mcore_state)
        for number, layer in enumerate(model.decoder.layers, start=1):
            _record(states, f"layer {number}", layer, _mcore_state)
        _record(states, "final norm", model.decoder.final_layernorm, _mcore_state)
        logits = model.eval()(torch.tensor([ids]), torch.arange(len(ids))[None], None)
        states["logits"] = logits[0].float()
    return states


def _recipe(source: SourceCheckpoint, tokens: int) -> Recipe:
    """A recipe that only builds the model; its paths are placeholders."""
    model = replace(
        source.model,
        max_position_embeddings=source.seq_length,
        make_vocab_size_divisible_by=1,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        transformer_impl="local",
        recompute_granularity=None,
    )
    return Recipe(
        model=model,
        data=DataSection(tokenizer="", sources=[DataSource(path="", language="und")], seq_length=tokens),
        optimizer=OptimizerSection(lr=1.0),
        training=TrainingSection(seed=0, micro_batch_size=1, global_batch_size=1, train_iters=1, precision="fp32"),
        logging=LoggingSection(run_dir=""),
        parallel=ParallelSection(device="cpu"),
    )


def _load_weights(
    model: GPTModel, source: SourceCheckpoint, dtype: torch.dtype, master_dtype: torch.dtype | None
) -> None:
    """Loads the parameters from the checkpoint by Megatron-Core's own names, not through the conversion tables."""
    with ShardReader(source.directory) as reader:
        prefix = master_weights_prefix(reader, master_dtype) or ""
        for entry in model.sharded_state_dict().values():
            for shard in sharded_tensors(entry):
                count = shard.prepend_axis_num
                layer = shard.global_offset[0] if count else None
                full = reader.read(prefix + shard.key, layer)
                if is_vocabulary(shard.key):
                    full = full[: shard.global_shape[count]]
                start, shape = shard.global_offset[count:], shard.local_shape
                part = full[tuple(slice(begin, begin + size) for begin, size in zip(start, shape, strict=True))]
                shard.data.copy_(part.to(dtype))


def hf_states(directory: Path, ids: list[int], num_layers: int) -> States:
    """Runs the Hugging Face model in float32 on the CPU.

    Raises:
        UserError: transformers cannot load it, or it has another number of layers than the checkpoint.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        # Eager attention: fused kernels could hide a difference.
        model = AutoModelForCausalLM.from_pretrained(str(directory), local_files_only=True, attn_implementation="eager")
    except Exception as error:  # transformers raises many types.
        reason = (str(error).strip().splitlines() or ["no message"])[0]
        raise UserError(f"{directory}: transformers cannot load this model: {reason}; convert it again") from error
    # Not an argument of from_pretrained, whose dtype option has another name in every version.
    model = model.float()
    base = model.base_model
    layers, norm = (base.h, base.ln_f) if hasattr(base, "ln_f") else (base.layers, base.norm)
    states: States = {}
    # The input of the first layer: some families add positions to the embedding before it.
    handle = layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: states.update(embedding=_hf_state(args[0] if args else kwargs["hidden_states"])),
        with_kwargs=True,
    )
    for number, layer in enumerate(layers, start=1):
        _record(states, f"layer {number}", layer, _hf_state)
    _record(states, "final norm", norm, _hf_state)
    with torch.no_grad():
        logits = model.eval()(torch.tensor([ids])).logits
    handle.remove()
    states["logits"] = logits[0].float()
    if len(layers) != num_layers:
        raise UserError(
            f"{directory}: got {len(layers)} layers, expected {num_layers} as in the checkpoint; convert it again"
        )
    return states


def _record(states: States, name: str, module: Any, to_state: Callable[[Any], torch.Tensor]) -> None:
    module.register_forward_hook(lambda module, args, output: states.update({name: to_state(output)}))


def _mcore_state(output: Any) -> torch.Tensor:
    """[tokens, hidden] of Megatron-Core's [tokens, 1, hidden]."""
    return (output[0] if isinstance(output, tuple) else output)[:, 0].float().clone()


def _hf_state(output: Any) -> torch.Tensor:
    """[tokens, hidden] of Hugging Face's [1, tokens, hidden]."""
    return (output[0] if isinstance(output, tuple) else output)[0].float().clone()
