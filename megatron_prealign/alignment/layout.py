"""Distribution of words over ranks and microbatches, and collection of their states at every layer."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_prealign.alignment.packing import WordBatch, lay_out_words
from megatron_prealign.alignment.taps import LayerTaps, no_loss
from megatron_prealign.model.attention import supports_document_mask
from megatron_prealign.runtime.distributed import Runtime
from megatron_prealign.runtime.engine import LossFunction, run_schedule, unwrap


@dataclass(frozen=True)
class WordLayout:
    """Partitioning of a step's words: over data-parallel ranks, then into microbatches. The taps return the t-th part
    of a microbatch to tensor-parallel rank t.

    Attributes:
        data_size, tensor_size: data- and tensor-parallel size.
        data_rank: data-parallel rank of this process.
        packed: whether a sequence may have several words.
        multiple: sequence lengths are padded to a multiple of this.
        dtype: dtype of the activations.
        device: device of the batches.
    """

    data_size: int
    tensor_size: int
    data_rank: int
    packed: bool
    multiple: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, runtime: Runtime, chunks: Sequence[torch.nn.Module]) -> "WordLayout":
        """Layout of a run. Sequences have several words if the model's attention can mask them from each other."""
        tensor_size = runtime.parallel.tensor_model_parallel_size
        models = [unwrap(chunk) for chunk in chunks]
        return cls(
            data_size=runtime.data_size,
            tensor_size=tensor_size,
            data_rank=runtime.data_rank,
            packed=all(supports_document_mask(model) for model in models),
            multiple=tensor_size if runtime.parallel.sequence_parallel else 1,
            dtype=models[0].config.params_dtype,
            device=runtime.device,
        )

    def by_rank(self, values: NDArray[np.int64], microbatches: int) -> NDArray[np.int64]:
        """Reorders the values of all words into the order in which ranks and their microbatches are gathered."""
        parts = values.reshape(self.data_size, microbatches, self.tensor_size, -1)
        return parts.transpose(0, 2, 1, 3).reshape(-1)

    def batches(self, tokens: NDArray[np.int64], lengths: NDArray[np.int64], microbatches: int) -> list[WordBatch]:
        """This rank's words, one batch per microbatch.

        Args:
            tokens: `[words, longest]`, the words of all ranks; `words` is a multiple of ranks x microbatches.
            lengths: tokens of each word, 0 for an empty slot.
        """
        own = np.split(np.arange(len(lengths)), self.data_size)[self.data_rank]
        return [self._batch(tokens[part], lengths[part]) for part in np.split(own, microbatches)]

    def idle_batch(self) -> WordBatch:
        """The smallest batch, without any words; pads an interleaved schedule."""
        empty = np.zeros((0, 1), dtype=np.int64)
        return self._batch(empty, empty[:, 0])

    def _batch(self, tokens: NDArray[np.int64], lengths: NDArray[np.int64]) -> WordBatch:
        return lay_out_words(
            tokens, lengths, packed=self.packed, multiple=self.multiple, dtype=self.dtype, device=self.device
        )


def collect_states(
    runtime: Runtime,
    chunks: Sequence[torch.nn.Module],
    layout: WordLayout,
    batches: Sequence[WordBatch],
    *,
    num_layers: int,
    layers: Collection[int] | None = None,
) -> dict[int, torch.Tensor]:
    """States of this rank's words at the layers of its stage that are in `layers` (None for all), from one forward pass
    without gradients. Collective: call on all ranks.

    Returns:
        layer -> float32 `[words, hidden]`, in the order of the microbatches.
    """
    collected: dict[int, list[torch.Tensor]] = {}
    taps = LayerTaps([unwrap(chunk) for chunk in chunks], runtime, num_layers)

    def collect(layer: int, states: torch.Tensor, batch: WordBatch) -> None:
        collected.setdefault(layer, []).append(states)

    def forward_step(iterator: Iterator[WordBatch], chunk: torch.nn.Module) -> tuple[torch.Tensor, LossFunction]:
        return taps.run_words(chunk, unwrap(chunk), next(iterator)), lambda hidden: (no_loss(hidden), {})

    with torch.no_grad(), taps.observing(collect, layers=layers):
        run_schedule(
            runtime,
            chunks,
            forward_step,
            batches,
            idle=layout.idle_batch,
            shape=(batches[0].tokens.shape[1], batches[0].tokens.shape[0]),
            mixed_shapes=True,
            forward_only=True,
        )
    return {layer: torch.cat(states) for layer, states in collected.items()}
