"""Validation loss per language."""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

from megatron_prealign.code_switch.switcher import SequenceFormat, plain_batch
from megatron_prealign.data.samples import ValidationSamples
from megatron_prealign.runtime.distributed import Runtime
from megatron_prealign.runtime.engine import LossFunction, run_schedule
from megatron_prealign.runtime.transfer import to_device
from megatron_prealign.training.microbatches import SampleMicrobatch, idle_microbatch, lm_loss_sum


def validation_losses(
    runtime: Runtime,
    chunks: Sequence[torch.nn.Module],
    samples: ValidationSamples,
    *,
    micro_batch_size: int,
    sequence_format: SequenceFormat,
) -> dict[str, float]:
    """Mean next-token loss in nats per token, per language with held-out text. Collective: call on all ranks.

    Args:
        sequence_format: The format used in training, so that documents are separated (or not) in the same way. All
            tokens of the text count, including those that `mask_eod` excludes from the training loss.
    """
    losses = {}
    for language in samples.languages:
        total = torch.zeros(2, dtype=torch.float64, device=runtime.device)

        def forward_step(
            microbatches: Iterator[SampleMicrobatch], chunk: torch.nn.Module, total: torch.Tensor = total
        ) -> tuple[torch.Tensor, LossFunction]:
            batch = next(microbatches)
            output, loss_of = lm_loss_sum(chunk, batch)

            def loss_function(values: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
                loss = loss_of(values)
                total.add_(torch.stack([loss, batch.loss_mask.sum()]))
                return loss, {}

            return output, loss_function

        microbatches = _microbatches(runtime, samples, language, micro_batch_size, sequence_format)
        with torch.no_grad():
            run_schedule(
                runtime,
                chunks,
                forward_step,
                microbatches,
                idle=lambda: idle_microbatch(runtime),
                shape=(sequence_format.seq_length, micro_batch_size),
                mixed_shapes=True,
                forward_only=True,
            )
        # Only the last stage has losses; they are identical within a tensor-parallel group.
        dist.all_reduce(total, group=runtime.groups.dp)
        dist.all_reduce(total, group=runtime.groups.pp)
        loss, tokens = total.tolist()
        losses[language] = loss / max(tokens, 1.0)
    return losses


def _microbatches(
    runtime: Runtime, samples: ValidationSamples, language: str, micro_batch_size: int, sequence_format: SequenceFormat
) -> list[SampleMicrobatch]:
    """Samples of this rank; the last microbatch is padded with samples whose loss is masked."""
    count = samples.num_samples(language)
    per_round = micro_batch_size * runtime.data_size
    one = torch.ones((), device=runtime.device)
    batches = []
    for first in range(0, count, per_round):
        start = first + runtime.data_rank * micro_batch_size
        indices = range(start, start + micro_batch_size)
        rows, mask = samples.batch(language, [min(index, count - 1) for index in indices])
        real = torch.tensor([index < count for index in indices])
        batch = plain_batch(to_device(rows.tokens, runtime.device), sequence_format)
        batches.append(
            SampleMicrobatch(
                tokens=batch.tokens,
                labels=batch.labels,
                loss_mask=(mask & real[:, None]).float().to(runtime.device),
                position_ids=batch.position_ids,
                scored_tokens=one,
                document_starts=batch.document_starts,
            )
        )
    return batches
