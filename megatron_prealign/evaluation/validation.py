"""Validation loss per language, of all tokens and by class of word."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_prealign.code_switch.switcher import SequenceFormat, plain_batch
from megatron_prealign.data.samples import ValidationSamples
from megatron_prealign.evaluation.word_classes import CLASSES, NO_LABEL, WordClasses
from megatron_prealign.runtime.distributed import Runtime
from megatron_prealign.runtime.engine import LossFunction, run_schedule
from megatron_prealign.runtime.transfer import to_device
from megatron_prealign.training.microbatches import SampleMicrobatch, idle_microbatch, lm_loss_sum


class ValidationLosses(NamedTuple):
    """Mean next-token losses in nats per token."""

    mean: dict[str, float]
    """Language -> loss of all tokens."""
    by_class: dict[str, dict[str, float]]
    """Language -> class of word -> loss; classes without tokens are absent."""


@dataclass(frozen=True, eq=False)
class _ValidationMicrobatch(SampleMicrobatch):
    """A microbatch of held-out text."""

    classes: torch.Tensor | None = None
    """Class ids of the labels, int8 `[samples, seq_length]`; None for a language without classes."""


def validation_losses(
    runtime: Runtime,
    chunks: Sequence[torch.nn.Module],
    samples: ValidationSamples,
    *,
    micro_batch_size: int,
    sequence_format: SequenceFormat,
    classes: WordClasses,
) -> ValidationLosses:
    """Measures the loss per language with held-out text, of all tokens and by class of word, in one forward pass.
    Collective: call on all ranks.

    Args:
        sequence_format: The format used in training, so that documents are separated (or not) in the same way. All
            tokens of the text count, including those that `mask_eod` excludes from the training loss.
        classes: Classes of the labels of `samples`.
    """
    losses, by_class = {}, {}
    for language in samples.languages:
        total = torch.zeros(2, dtype=torch.float64, device=runtime.device)
        class_total = torch.zeros(len(CLASSES), dtype=torch.float64, device=runtime.device)

        def forward_step(
            microbatches: Iterator[SampleMicrobatch],
            chunk: torch.nn.Module,
            total: torch.Tensor = total,
            class_total: torch.Tensor = class_total,
        ) -> tuple[torch.Tensor, LossFunction]:
            batch = next(microbatches)
            output, loss_of = lm_loss_sum(chunk, batch)

            def loss_function(values: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
                loss = loss_of(values)
                total.add_(torch.stack([loss, batch.loss_mask.sum()]))
                if isinstance(batch, _ValidationMicrobatch) and batch.classes is not None:
                    class_total.add_(_sum_by_class(values, batch.classes))
                return loss, {}

            return output, loss_function

        microbatches = _microbatches(runtime, samples, language, micro_batch_size, sequence_format, classes)
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
        if language in classes.labels:
            dist.all_reduce(class_total, group=runtime.groups.dp)
            dist.all_reduce(class_total, group=runtime.groups.pp)
            sums = dict(zip(CLASSES, class_total.tolist(), strict=True))
            by_class[language] = {name: sums[name] / count for name, count in classes.tokens(language).items()}
    return ValidationLosses(losses, by_class)


def _sum_by_class(losses: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Sum of the losses `[samples, seq_length]` of each class, float64 `[classes]`; deterministic on a GPU."""
    ids = torch.arange(len(CLASSES), device=classes.device).view(-1, 1, 1)
    return torch.where(classes == ids, losses.double(), 0.0).sum((1, 2))


def _microbatches(
    runtime: Runtime,
    samples: ValidationSamples,
    language: str,
    micro_batch_size: int,
    sequence_format: SequenceFormat,
    classes: WordClasses,
) -> list[SampleMicrobatch]:
    """Samples of this rank; the last microbatch is padded with samples whose loss is masked."""
    count = samples.num_samples(language)
    per_round = micro_batch_size * runtime.data_size
    one = torch.ones((), device=runtime.device)
    batches: list[SampleMicrobatch] = []
    for first in range(0, count, per_round):
        start = first + runtime.data_rank * micro_batch_size
        indices = range(start, start + micro_batch_size)
        existing = [min(index, count - 1) for index in indices]
        rows, mask = samples.batch(language, existing)
        real = torch.tensor([index < count for index in indices])
        batch = plain_batch(to_device(rows.tokens, runtime.device), sequence_format)
        ids = None
        if language in classes.labels:
            ids = torch.from_numpy(classes.samples(language, existing))
            ids = ids.masked_fill(~real[:, None], NO_LABEL).to(runtime.device)
        batches.append(
            _ValidationMicrobatch(
                tokens=batch.tokens,
                labels=batch.labels,
                loss_mask=(mask & real[:, None]).float().to(runtime.device),
                position_ids=batch.position_ids,
                scored_tokens=one,
                document_starts=batch.document_starts,
                classes=ids,
            )
        )
    return batches
