"""Validation loss per language."""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

from megatron_prealign.code_switch.switcher import RowFormat, plain_batch
from megatron_prealign.data.samples import ValidationSamples
from megatron_prealign.runtime.distributed import Runtime
from megatron_prealign.runtime.engine import LossFunction, run_schedule
from megatron_prealign.runtime.transfer import to_device
from megatron_prealign.training.rows import RowMicrobatch, idle_rows, row_loss_sum


def validation_losses(
    runtime: Runtime,
    chunks: Sequence[torch.nn.Module],
    samples: ValidationSamples,
    *,
    micro_batch_size: int,
    row_format: RowFormat,
) -> dict[str, float]:
    """Mean next-token loss in nats per token, for every language that has held-out text. Takes part: all ranks.

    Args:
        row_format: that of training, so that documents are kept apart or not as there. Every token of the text is
            scored, also those that `mask_eod` leaves out of training.
    """
    losses = {}
    for language in samples.languages:
        total = torch.zeros(2, dtype=torch.float64, device=runtime.device)

        def forward_step(
            microbatches: Iterator[RowMicrobatch], chunk: torch.nn.Module, total: torch.Tensor = total
        ) -> tuple[torch.Tensor, LossFunction]:
            batch = next(microbatches)
            output, loss_of = row_loss_sum(chunk, batch)

            def loss_function(values: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
                loss = loss_of(values)
                total.add_(torch.stack([loss, batch.loss_mask.sum()]))
                return loss, {}

            return output, loss_function

        microbatches = _microbatches(runtime, samples, language, micro_batch_size, row_format)
        with torch.no_grad():
            run_schedule(
                runtime,
                chunks,
                forward_step,
                microbatches,
                idle=lambda: idle_rows(runtime),
                shape=(row_format.seq_length, micro_batch_size),
                mixed_shapes=True,
                forward_only=True,
            )
        # Only the last stage has losses; ranks of one tensor-parallel group have the same.
        dist.all_reduce(total, group=runtime.groups.dp)
        dist.all_reduce(total, group=runtime.groups.pp)
        loss, tokens = total.tolist()
        losses[language] = loss / max(tokens, 1.0)
    return losses


def _microbatches(
    runtime: Runtime, samples: ValidationSamples, language: str, micro_batch_size: int, row_format: RowFormat
) -> list[RowMicrobatch]:
    """This rank's rows; the last round is filled up with rows that have no loss."""
    count = samples.num_samples(language)
    per_round = micro_batch_size * runtime.data_size
    one = torch.ones((), device=runtime.device)
    batches = []
    for first in range(0, count, per_round):
        start = first + runtime.data_rank * micro_batch_size
        wanted = range(start, start + micro_batch_size)
        rows, mask = samples.rows(language, [min(index, count - 1) for index in wanted])
        real = torch.tensor([index < count for index in wanted])
        batch = plain_batch(to_device(rows.tokens, runtime.device), row_format)
        batches.append(
            RowMicrobatch(
                tokens=batch.tokens,
                labels=batch.labels,
                loss_mask=(mask & real[:, None]).float().to(runtime.device),
                position_ids=batch.position_ids,
                scored_tokens=one,
                document_starts=batch.document_starts,
            )
        )
    return batches
