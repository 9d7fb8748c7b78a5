"""Rows of the training blend as microbatches on the device, and their language-model loss."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from megatron_prealign.code_switch.switcher import SwitchedBatch
from megatron_prealign.data.samples import SampleRows, TrainSamples
from megatron_prealign.model.attention import document_mask
from megatron_prealign.runtime.distributed import Runtime
from megatron_prealign.runtime.engine import unwrap
from megatron_prealign.runtime.transfer import to_device

# (rows on the device, tokens consumed in the phase so far) -> model inputs, labels and masks.
MakeBatch = Callable[[SampleRows, int], SwitchedBatch]


@dataclass(frozen=True, eq=False)
class RowMicrobatch:
    """Model inputs of one microbatch, `[rows, seq_length]` each.

    Attributes:
        scored_tokens: tokens with a loss in the whole step over all ranks, a float scalar on the device. Dividing each
            rank's sum by it makes every token weigh the same whatever the layout and however code-switching spread the
            masks.
        document_starts: the first position that each position may attend to; None where only order restricts it.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    position_ids: torch.Tensor
    scored_tokens: torch.Tensor
    document_starts: torch.Tensor | None = None


class RowReader:
    """Reads this rank's rows of a step and turns them into microbatches."""

    def __init__(
        self, samples: TrainSamples, runtime: Runtime, *, micro_batch_size: int, make_batch: MakeBatch
    ) -> None:
        self._samples = samples
        self._runtime = runtime
        self._micro_batch_size = micro_batch_size
        self._make_batch = make_batch

    def read(
        self, first_sample: int, rows: int, consumed_tokens: int
    ) -> tuple[list[RowMicrobatch], torch.Tensor | None]:
        """Microbatches of `rows` rows over all ranks, from position `first_sample` of the blend, and the sum of their
        code-switching counts (None without code-switching). Takes part: the data-parallel group (one small
        all-reduce)."""
        runtime, size = self._runtime, self._micro_batch_size
        per_round = size * runtime.data_size
        batches, counts = [], None
        for first in range(first_sample, first_sample + rows, per_round):
            own = first + runtime.data_rank * size
            sample = self._samples.rows(range(own, own + size))
            batch = self._make_batch(rows_to_device(sample, runtime.device), consumed_tokens)
            batches.append(batch)
            if batch.counts is not None:
                counts = batch.counts if counts is None else counts + batch.counts
        scored = torch.stack([batch.loss_mask.sum() for batch in batches]).sum()
        dist.all_reduce(scored, group=runtime.groups.dp)
        scored.clamp_(min=1.0)
        return [
            RowMicrobatch(b.tokens, b.labels, b.loss_mask, b.position_ids, scored, b.document_starts) for b in batches
        ], counts


def rows_to_device(rows: SampleRows, device: torch.device) -> SampleRows:
    """Copies rows to the device without waiting for the copy."""
    starts = rows.word_starts
    return replace(
        rows,
        tokens=to_device(rows.tokens, device),
        language=to_device(rows.language, device),
        sample_id=to_device(rows.sample_id, device),
        word_starts=None if starts is None else to_device(starts, device),
    )


def idle_rows(runtime: Runtime) -> RowMicrobatch:
    """The smallest microbatch without any loss; fills up an interleaved schedule."""
    tokens = runtime.parallel.tensor_model_parallel_size
    zeros = torch.zeros((1, tokens), dtype=torch.int64, device=runtime.device)
    return RowMicrobatch(zeros, zeros, zeros.float(), zeros, torch.ones((), device=runtime.device))


def row_loss_sum(
    chunk: torch.nn.Module, batch: RowMicrobatch
) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """Forward pass of one chunk. Returns its output and, for the last stage, the function that sums the masked losses
    of it and divides by the scored tokens of the step: summed over microbatches and ranks that is the mean loss per
    token."""
    model = unwrap(chunk)
    labels = batch.labels if model.post_process else None
    # Made here and not with the batch: a step's microbatches all wait in memory at once, their masks must not.
    starts = batch.document_starts
    mask = None if starts is None else document_mask(starts, model.config.params_dtype)
    output = chunk(batch.tokens, batch.position_ids, mask, labels=labels)
    return output, lambda losses: (losses.float() * batch.loss_mask).sum() / batch.scored_tokens
