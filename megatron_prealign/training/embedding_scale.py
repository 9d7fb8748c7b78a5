"""Root mean square of the embeddings before training and at the end of each phase.

The alignment phase makes embeddings larger than language-model training would; a learning rate that suits small ones
may then be too low.
"""

import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from megatron_prealign.runtime.distributed import Runtime
from megatron_prealign.runtime.engine import gather_parameters, unwrap
from megatron_prealign.training.callbacks import Callback
from megatron_prealign.training.metrics_log import MetricsLog
from megatron_prealign.training.position import position

if TYPE_CHECKING:
    from megatron_prealign.training.trainer import Trainer

logger = logging.getLogger(__name__)

_NAMES = ("input", "output")
# Rows per part: squares of all rows of a large vocabulary at once would take gigabytes at the peak of a run's memory.
_ROWS = 4096


class EmbeddingScale(Callback):
    """Writes a record of kind `embeddings` before the first step and at the end of each phase, and logs it."""

    def __init__(self, metrics: MetricsLog, vocab_size: int) -> None:
        """
        Args:
            vocab_size: Number of ids without padding; padding rows do not count.
        """
        self._metrics = metrics
        self._vocab_size = vocab_size

    def on_start(self, trainer: "Trainer") -> None:
        if trainer.state.step == 0:
            self._measure(trainer)

    def on_phase_end(self, trainer: "Trainer") -> None:
        self._measure(trainer)

    def _measure(self, trainer: "Trainer") -> None:
        state = trainer.state
        scale = embedding_rms(trainer.runtime, trainer.chunks, self._vocab_size)
        self._metrics.write(
            {
                "kind": "embeddings",
                "phase": trainer.phase.name,
                "step": state.step,
                "tokens": state.tokens,
                "rms": scale,
            }
        )
        text = ", ".join(f"{name} {value:.4f}" for name, value in scale.items())
        logger.info("RMS of the embeddings at %s: %s", position(trainer), text)


def embedding_rms(runtime: Runtime, chunks: Sequence[torch.nn.Module], vocab_size: int) -> dict[str, float]:
    """Root mean square of all elements of the input embedding and, if it is a weight of its own, of the output
    embedding. Collective: call on all ranks.

    Args:
        chunks: Model chunks of this process.
        vocab_size: Number of ids without padding.
    """
    gather_parameters(chunks)
    # Sum of squares and number of elements, each of input and output.
    sums = torch.zeros(2, len(_NAMES), dtype=torch.float64, device=runtime.device)
    for model in map(unwrap, chunks):
        weights = (
            model.embedding.word_embeddings.weight if model.pre_process else None,
            model.output_layer.weight if model.post_process and not model.share_embeddings_and_output_weights else None,
        )
        for place, weight in enumerate(weights):
            if weight is not None:
                first = runtime.tensor_rank * weight.shape[0]
                real = weight.detach()[: max(vocab_size - first, 0)]
                for part in real.split(_ROWS):
                    sums[0, place] += part.float().square().sum(dtype=torch.float64)
                sums[1, place] += real.numel()
    # Data-parallel replicas count equally often in both sums.
    dist.all_reduce(sums)
    squares, count = sums.tolist()
    return {name: math.sqrt(squares[place] / count[place]) for place, name in enumerate(_NAMES) if count[place]}
