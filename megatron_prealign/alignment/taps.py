"""Taps: observe every layer's word representations while the model runs, and attach losses on them.

A forward hook on the embedding, on every transformer layer and on the final norm pools each word's subword states and
passes this rank's words to an observer. Tensor-parallel ranks, which all have the states of a microbatch, process a
part of its words each and gather the gradients of all of them in the backward pass. What the observer returns is
attached as a loss of that layer: an autograd function returns the layer's output unchanged and gives the loss a
gradient of one in the backward pass (as Megatron-Core attaches its auxiliary losses). So every pipeline stage
contributes its own layers, and nothing extra is sent between stages.

Layers are numbered like Hugging Face's hidden states: 0 is the embedding output, i the output of block i, the last one
taken after the final norm; the output embedding is layer `num_layers + 1`.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    reduce_scatter_to_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.utils import make_viewless_tensor

from megatron_prealign.alignment.packing import WordBatch
from megatron_prealign.runtime.distributed import Runtime

# (layer, this rank's words [words / tensor-parallel size, hidden], batch) -> loss to attach, or None.
Observer = Callable[[int, torch.Tensor, WordBatch], torch.Tensor | None]


class _AttachLoss(torch.autograd.Function):
    """Identity on the first argument; the second, a scalar loss, gets a gradient of one."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(loss)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        (loss,) = ctx.saved_tensors
        return gradient, torch.ones_like(loss)


class _NoLoss(torch.autograd.Function):
    """Zero loss connected to the graph, for a last stage whose only losses are attached to layers."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor) -> torch.Tensor:
        ctx.shape, ctx.dtype = output.shape, output.dtype
        return torch.zeros((), device=output.device)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return torch.zeros(ctx.shape, dtype=ctx.dtype, device=gradient.device)


def no_loss(output: torch.Tensor) -> torch.Tensor:
    """Differentiable zero at the end of `output`'s graph."""
    return _NoLoss.apply(output)


def layer_modules(chunk: GPTModel, num_layers: int) -> dict[int, torch.nn.Module | None]:
    """Layer number -> module whose output it is, for a model chunk; None for the output embedding, which is read
    without being run."""
    modules: dict[int, torch.nn.Module | None] = {}
    if chunk.pre_process:
        modules[0] = chunk.embedding
    modules.update({layer.layer_number: layer for layer in chunk.decoder.layers})
    if chunk.post_process:
        # Replaces the last block, whose states are taken after the final norm.
        modules[num_layers] = chunk.decoder.final_layernorm
        modules[num_layers + 1] = None
    return modules


class LayerTaps:
    """Hooks on the model chunks of this process, active inside `with taps.observing(observer):`."""

    def __init__(self, chunks: Sequence[GPTModel], runtime: Runtime, num_layers: int) -> None:
        self._chunks = chunks
        self._runtime = runtime
        self._num_layers = num_layers
        self._observer: Observer | None = None
        self._layers: Collection[int] = ()
        self._needs_graph = False
        # Blocks find the batch by the attention mask they receive: recomputation passes them the same mask during the
        # backward pass, when another microbatch may already be in its forward pass. Same storage, same batch.
        self._batches: dict[int, WordBatch] = {}
        # The embedding and the final norm are never recomputed, so they use the microbatch in its forward pass.
        self._current: WordBatch | None = None
        # The loss returned by the observer for the output embedding in the last `run_words` on the last stage.
        self.output_embedding_loss: torch.Tensor | None = None

    @contextmanager
    def observing(
        self, observer: Observer, *, layers: Collection[int] | None = None, needs_graph: bool = False
    ) -> Iterator[None]:
        """Registers the hooks within the `with` block; outside it the model runs unmodified.

        Args:
            layers: layers to observe; None for all.
            needs_graph: skip forward passes without a graph; with full recomputation, losses are attached in the
                recomputed pass.
        """
        handles = []
        self._observer, self._needs_graph = observer, needs_graph
        self._layers = range(self._num_layers + 2) if layers is None else layers
        for chunk in self._chunks:
            for layer, module in layer_modules(chunk, self._num_layers).items():
                if layer not in self._layers or module is None:
                    continue
                if isinstance(module, TransformerLayer):
                    handles.append(module.register_forward_hook(self._block_hook, with_kwargs=True))
                else:
                    handles.append(module.register_forward_hook(self._outer_hook(layer)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._observer = None
            self._batches.clear()

    def run_words(self, chunk: torch.nn.Module, model: GPTModel, batch: WordBatch) -> torch.Tensor:
        """Runs the forward pass of a word batch through one chunk (`model` is `chunk` without its wrapper) and returns
        its hidden states.

        On the last stage the logits, `[rows, tokens, vocabulary]`, are not computed, since no loss needs them. A batch
        without words is not passed to the observer.
        """
        has_words = len(batch.weights) > 0
        if has_words:
            self._batches[batch.attention_mask.data_ptr()] = batch
            self._current = batch
        self.output_embedding_loss = None
        post_process, model.post_process = model.post_process, False
        try:
            output = chunk(batch.tokens, batch.position_ids, batch.attention_mask)
        finally:
            model.post_process = post_process
            self._current = None
        last = self._num_layers + 1
        if post_process and has_words and self._observer is not None and last in self._layers:
            self.output_embedding_loss = self._observer(last, self._output_embeddings(model, batch), batch)
        return output

    def _block_hook(self, module: TransformerLayer, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        mask = kwargs.get("attention_mask")
        batch = None if mask is None else self._batches.get(mask.data_ptr())
        if batch is None:
            return output
        hidden = self._observe(module.layer_number, output[0], batch)
        return (hidden, *output[1:])

    def _outer_hook(self, layer: int) -> Callable[..., torch.Tensor]:
        def hook(module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
            return output if self._current is None else self._observe(layer, output, self._current)

        return hook

    def _observe(self, layer: int, hidden: torch.Tensor, batch: WordBatch) -> torch.Tensor:
        """`hidden` is `[tokens, rows, hidden]`, split along tokens under sequence parallelism."""
        if self._observer is None or (self._needs_graph and not torch.is_grad_enabled()):
            return hidden
        loss = self._observer(layer, self._pool(hidden, batch), batch)
        if loss is None or not loss.requires_grad:
            return hidden
        # The pipeline frees outputs once they are sent, which would break a view.
        return make_viewless_tensor(_AttachLoss.apply(hidden, loss), requires_grad=True, keep_graph=True)

    def _pool(self, hidden: torch.Tensor, batch: WordBatch) -> torch.Tensor:
        """Mean subword states of this rank's words, float32."""
        tokens = hidden.flatten(0, 1).float()
        if not self._runtime.parallel.sequence_parallel:
            pooled = _weighted_sum(tokens, batch.token_indices, batch.weights)
            return scatter_to_sequence_parallel_region(pooled, group=self._runtime.groups.tp)
        return self._sharded_weighted_sum(tokens, batch.token_indices, batch.weights)

    def _output_embeddings(self, model: GPTModel, batch: WordBatch) -> torch.Tensor:
        """Mean output embeddings (float32) of this rank's words; the vocabulary is tensor-parallel."""
        weight = (
            model.shared_embedding_or_output_weight()
            if model.share_embeddings_and_output_weights
            else model.output_layer.weight
        )
        return self._sharded_weighted_sum(weight, batch.word_tokens, batch.weights)

    def _sharded_weighted_sum(self, rows: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Weighted sums for this rank's words of rows that are sharded over tensor-parallel ranks in equal parts."""
        local = indices - self._runtime.tensor_rank * rows.shape[0]
        is_local = (local >= 0) & (local < rows.shape[0])
        # Rows of other ranks get weight 0 and any local index. `remainder` spreads these indices: gradients of a single
        # row for all of them would be accumulated one after the other.
        part = _weighted_sum(rows, local.remainder(rows.shape[0]), weights * is_local)
        return reduce_scatter_to_sequence_parallel_region(part, group=self._runtime.groups.tp)


def _weighted_sum(rows: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """`sum_k weights[w, k] * rows[indices[w, k]]`, float32 `[words, hidden]`."""
    # Does not materialise the selected rows: forward and backward take 63 ms, against 289 with a product and 538 with
    # an index and a sum (8,192 words of up to 8 of 20,480 tokens, 1,024 wide, torch 2.13 on a loaded CPU). Of its modes
    # torch lists only `max` as non-deterministic on a GPU.
    return F.embedding_bag(indices, rows, per_sample_weights=weights.to(rows.dtype), mode="sum").float()
