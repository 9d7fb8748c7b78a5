"""Reads samples of the training blend as microbatches on the device and computes their language-model loss."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from megatron_prealign.code_switch.switcher import SwitchedBatch
from megatron_prealign.data.samples import SampleBatch, TrainSamples
from megatron_prealign.model.attention import document_mask
from megatron_prealign.runtime.distributed import Runtime
from megatron_prealign.runtime.engine import unwrap
from megatron_prealign.runtime.read_ahead import ReadAhead
from megatron_prealign.runtime.transfer import to_device

# (samples on the device, tokens consumed in the phase so far) -> model inputs, labels and masks.
MakeBatch = Callable[[SampleBatch, int], SwitchedBatch]


@dataclass(frozen=True, eq=False)
class SampleMicrobatch:
    """Model inputs of one microbatch, `[samples, seq_length]` each.

    Attributes:
        scored_tokens: Number of tokens with a loss in the step over all ranks, a float scalar on the device. Dividing
            each rank's sum by it gives every token the same weight in any layout and for any masks of code-switching.
        document_starts: First position that each position may attend to; None if only causality restricts attention.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    position_ids: torch.Tensor
    scored_tokens: torch.Tensor
    document_starts: torch.Tensor | None = None


@dataclass(frozen=True)
class StepSamples:
    """Which samples of the blend a step uses, over all ranks."""

    first: int
    """Position of the first one in the blend."""
    count: int
    """Number of samples."""
    consumed_tokens: int
    """Tokens consumed in the phase before this step."""


class SampleReader:
    """Reads this rank's samples of a step as microbatches, one step ahead."""

    def __init__(
        self,
        samples: TrainSamples,
        runtime: Runtime,
        *,
        micro_batch_size: int,
        make_batch: MakeBatch,
        every_stage: bool = False,
    ) -> None:
        """
        Args:
            every_stage: Whether the stages between the first and the last one need the samples, to mask attention.
        """
        self._needed = every_stage or runtime.is_first_stage or runtime.is_last_stage
        self._samples = samples
        self._runtime = runtime
        self._micro_batch_size = micro_batch_size
        self._make_batch = make_batch
        self._ahead = ReadAhead("samples", self._read, runtime.device)

    def read(
        self, step: StepSamples, *, following: StepSamples | None
    ) -> tuple[list[SampleMicrobatch], torch.Tensor | None]:
        """Returns this rank's microbatches of a step and the sum of their code-switching counts (None without
        code-switching), and starts reading those of the step that follows.

        Collective: call on all ranks of the data-parallel group (one small all-reduce).

        Raises:
            UserError: A token id of the step's samples is outside the vocabulary.
        """
        if not self._needed:
            microbatches = step.count // (self._micro_batch_size * self._runtime.data_size)
            return [idle_microbatch(self._runtime)] * microbatches, None
        batches = self._ahead.take(step, following=following)
        counts = [batch.counts for batch in batches if batch.counts is not None]
        # Here and not in the thread, because collectives of two threads would interleave.
        scored = torch.stack([batch.loss_mask.sum() for batch in batches]).sum()
        dist.all_reduce(scored, group=self._runtime.groups.dp)
        scored.clamp_(min=1.0)
        return [
            SampleMicrobatch(b.tokens, b.labels, b.loss_mask, b.position_ids, scored, b.document_starts)
            for b in batches
        ], torch.stack(counts).sum(0) if counts else None

    def _read(self, step: StepSamples) -> list[SwitchedBatch]:
        """Reads and code-switches this rank's microbatches."""
        runtime, size = self._runtime, self._micro_batch_size
        batches = []
        for first in range(step.first, step.first + step.count, size * runtime.data_size):
            own = first + runtime.data_rank * size
            samples = self._samples.batch(range(own, own + size))
            batches.append(self._make_batch(samples_to_device(samples, runtime.device), step.consumed_tokens))
        return batches

    def drain_waited_s(self) -> float:
        """Returns the seconds that this process has waited for samples since the last call."""
        return self._ahead.drain_waited_s()

    def close(self) -> None:
        """Drops the samples that were read ahead."""
        self._ahead.close()


def samples_to_device(samples: SampleBatch, device: torch.device) -> SampleBatch:
    """Copies samples to the device without waiting for the copy."""
    starts = samples.word_starts
    return replace(
        samples,
        tokens=to_device(samples.tokens, device),
        language=to_device(samples.language, device),
        sample_id=to_device(samples.sample_id, device),
        word_starts=None if starts is None else to_device(starts, device),
    )


def idle_microbatch(runtime: Runtime) -> SampleMicrobatch:
    """Returns the smallest possible microbatch, without loss, for padding an interleaved schedule."""
    tokens = runtime.parallel.tensor_model_parallel_size
    zeros = torch.zeros((1, tokens), dtype=torch.int64, device=runtime.device)
    return SampleMicrobatch(zeros, zeros, zeros.float(), zeros, torch.ones((), device=runtime.device))


def lm_loss_sum(
    chunk: torch.nn.Module, batch: SampleMicrobatch
) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """Runs the forward pass of one chunk. Returns its output and, for the last stage, the function that sums the masked
    losses and divides by the scored tokens of the step: summed over microbatches and ranks this is the mean loss per
    token."""
    model = unwrap(chunk)
    labels = batch.labels if model.post_process else None
    # Built here and not with the batch, since all microbatches of a step are in memory at once.
    starts = batch.document_starts
    mask = None if starts is None else document_mask(starts, model.config.params_dtype)
    output = chunk(batch.tokens, batch.position_ids, mask, labels=labels)
    return output, lambda losses: (losses.float() * batch.loss_mask).sum() / batch.scored_tokens
