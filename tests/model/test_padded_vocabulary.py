"""Padding ids have no probability, so the loss does not depend on their number."""

from typing import Any

import pytest
import torch
from support.model_builds import SEQ_LENGTH, VOCAB_SIZE, build, recipe_values, tokens
from support.plain_losses import next_token_loss
from support.workers import WorkerPool

from megatron_prealign.model.sizes import padded_vocab_size


def losses_and_logits(values: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Runs in workers: the model's next-token losses, its logits on this rank, and the largest gradient of the padding
    rows of the output layer."""
    (chunk,) = build(values)[2]
    batch = tokens()
    inputs, labels = batch[:, :-1], batch[:, 1:]
    positions = torch.arange(SEQ_LENGTH - 1).expand_as(inputs)
    losses = chunk(inputs, positions, None, labels=labels)
    losses.sum().backward()
    weight = chunk.shared_embedding_or_output_weight()
    weight = chunk.output_layer.weight if weight is None else weight
    ranks = values["parallel"].get("tensor_model_parallel_size", 1)
    rank = torch.distributed.get_rank() if ranks > 1 else 0
    padded = weight.grad[max(0, VOCAB_SIZE - rank * len(weight)) :]
    with torch.no_grad():
        logits = chunk(inputs, positions, None)
    return losses.detach(), logits, padded.abs().max().item() if len(padded) else 0.0


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("ranks", [1, 2])
def test_padding_has_no_probability(workers: WorkerPool, ranks: int, tied: bool) -> None:
    """40 ids are padded to 48 for one process and to 64 for two; weights are small, so all ids are equally likely."""
    values = recipe_values(
        "llama",
        {"share_embeddings_and_output_weights": tied},
        parallel={"device": "cpu", "tensor_model_parallel_size": ranks},
    )
    results = workers.run(ranks, losses_and_logits, values)
    logits = torch.cat([result[1] for result in results], dim=-1)
    assert logits.shape[-1] == {1: 48, 2: 64}[ranks]
    assert (logits[..., VOCAB_SIZE:] == torch.finfo(torch.float32).min).all()
    batch = tokens()
    expected = next_token_loss(logits[..., :VOCAB_SIZE], batch[:, 1:], torch.ones(2, SEQ_LENGTH - 1)).item()
    for losses, _, padded_gradient in results:
        # fp32 against float64.
        assert losses.mean().item() == pytest.approx(expected, rel=1e-6)
        assert padded_gradient == 0.0


# Number of ids, multiple, tensor-parallel ranks, padded size.
SIZES = [(1, 1, 1, 1), (128, 128, 1, 128), (129, 128, 1, 256), (129, 128, 2, 256), (257, 128, 2, 512), (10, 1, 4, 12)]


@pytest.mark.parametrize(("ids", "multiple", "ranks", "padded"), SIZES)
def test_padded_size(ids: int, multiple: int, ranks: int, padded: int) -> None:
    assert padded_vocab_size(ids, multiple, ranks) == padded
