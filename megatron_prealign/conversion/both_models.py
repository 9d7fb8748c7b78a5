"""The same text through our model and through transformers': the states behind every layer, and the logits."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel

from megatron_prealign.checkpoint.single_process.reader import ShardReader
from megatron_prealign.checkpoint.single_process.weights import is_vocabulary
from megatron_prealign.conversion.to_hf import Source, masters_of
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
"""Place -> float32 [tokens, hidden]; last of all `logits`, [tokens, vocabulary]."""


@dataclass(frozen=True)
class Place:
    """Where the two models differ, or do not."""

    name: str
    difference: float
    """Largest, of all numbers."""
    scale: float
    """Largest number of transformers' model there."""

    @property
    def relative(self) -> float:
        """The difference against the largest number."""
        return self.difference / (self.scale or 1.0)


def compare(mcore: States, hf: States) -> list[Place]:
    """Every place, in the order of the model. A number that is not finite differs by infinity."""
    places = []
    for name, state in hf.items():
        difference = float((mcore[name] - state).abs().max())
        places.append(Place(name, difference if difference == difference else float("inf"), float(state.abs().max())))
    return places


def mcore_states(
    source: Source, ids: list[int], dtype: torch.dtype, masters: torch.dtype | None, *, leave_process_group: bool
) -> States:
    """Our model in float32 on this process's CPU.

    Args:
        source: The checkpoint.
        ids: The text.
        dtype: To which the weights are rounded first: that of the model to compare with.
        masters: As for `to_hf.masters_of`.
        leave_process_group: Keep torch's process group for the caller, who started it.
    """
    recipe = _recipe(source, len(ids))
    with running(recipe.parallel, seed=0, leave_process_group=leave_process_group) as runtime, torch.no_grad():
        if runtime.world_size > 1:
            raise UserError(f"convert verify was started as {runtime.world_size} processes, expected one")
        (model,) = build_model(recipe, runtime, vocab_size=source.summary["vocab_size"])
        _load(model, source, dtype, masters)
        states: States = {}
        _keep(states, "embedding", model.embedding, _first)
        for number, layer in enumerate(model.decoder.layers, start=1):
            _keep(states, f"layer {number}", layer, _first)
        _keep(states, "final norm", model.decoder.final_layernorm, _first)
        row = torch.tensor([ids])
        logits = model.eval()(row, torch.arange(len(ids))[None], None)
        states["logits"] = logits[0].float()
    return states


def _recipe(source: Source, tokens: int) -> Recipe:
    """A recipe for the model alone; nothing that it names is opened."""
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
        data=DataSection(tokenizer="", sources=[DataSource(path="", language="")], seq_length=tokens),
        optimizer=OptimizerSection(lr=1.0),
        training=TrainingSection(seed=0, micro_batch_size=1, global_batch_size=1, train_iters=1, precision="fp32"),
        logging=LoggingSection(run_dir=""),
        parallel=ParallelSection(device="cpu"),
    )


def _load(model: GPTModel, source: Source, dtype: torch.dtype, masters: torch.dtype | None) -> None:
    """Fills the parameters from the checkpoint by Megatron-Core's own names, not by the tables of the conversion."""
    with ShardReader(source.directory) as reader:
        prefix = masters_of(reader, masters) or ""
        for entry in model.sharded_state_dict().values():
            for shard in sharded_tensors(entry):
                count = shard.prepend_axis_num
                layer = shard.global_offset[0] if count else None
                whole = reader.read(prefix + shard.key, layer)
                if is_vocabulary(shard.key):
                    whole = whole[: shard.global_shape[count]]
                start, shape = shard.global_offset[count:], shard.local_shape
                part = whole[tuple(slice(begin, begin + size) for begin, size in zip(start, shape, strict=True))]
                shard.data.copy_(part.to(dtype))


def hf_states(directory: Path, ids: list[int], num_layers: int) -> States:
    """transformers' model in float32.

    Raises:
        UserError: transformers does not open it, or it is built in another way than the families here.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        # Its plainest attention: fused ones are where a difference would hide.
        model = AutoModelForCausalLM.from_pretrained(str(directory), local_files_only=True, attn_implementation="eager")
    except Exception as error:  # transformers raises many kinds.
        reason = (str(error).strip().splitlines() or ["no message"])[0]
        raise UserError(f"{directory}: transformers cannot open this model ({reason}); convert it again") from error
    # Named when opening, the type has another name in every version.
    model = model.float()
    base = model.base_model
    layers, norm = (base.h, base.ln_f) if hasattr(base, "ln_f") else (base.layers, base.norm)
    states: States = {}
    # What the first layer is given: some families add positions to the embedding on the way.
    handle = layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: states.update(embedding=_rows(args[0] if args else kwargs["hidden_states"])),
        with_kwargs=True,
    )
    for number, layer in enumerate(layers, start=1):
        _keep(states, f"layer {number}", layer, _rows)
    _keep(states, "final norm", norm, _rows)
    with torch.no_grad():
        logits = model.eval()(torch.tensor([ids])).logits
    handle.remove()
    states["logits"] = logits[0].float()
    if len(layers) != num_layers:
        raise UserError(
            f"{directory}: the model has {len(layers)} layers, the checkpoint {num_layers}; convert it again"
        )
    return states


def _keep(states: States, name: str, module: Any, take: Callable[[Any], torch.Tensor]) -> None:
    module.register_forward_hook(lambda module, args, output: states.update({name: take(output)}))


def _first(output: Any) -> torch.Tensor:
    """[tokens, hidden] of our [tokens, 1, hidden]."""
    return (output[0] if isinstance(output, tuple) else output)[:, 0].float().clone()


def _rows(output: Any) -> torch.Tensor:
    """[tokens, hidden] of their [1, tokens, hidden]."""
    return (output[0] if isinstance(output, tuple) else output)[0].float().clone()
