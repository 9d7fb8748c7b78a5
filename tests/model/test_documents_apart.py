"""Documents of one row kept apart: the row's losses are those of its documents run alone."""

from typing import Any

import pytest
import torch
from support.model_builds import SEQ_LENGTH, VOCAB_SIZE, build, disturb, recipe_values
from support.workers import WorkerPool

EOD = 7
# fp32; a document alone takes its sums in another order than inside the row. Losses are of order 1 to 10.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def packed_rows() -> torch.Tensor:
    """int64 [2, SEQ_LENGTH + 1] of several documents, one of them a single end-of-document token."""
    rows = torch.randint(EOD + 1, VOCAB_SIZE, (2, SEQ_LENGTH + 1), generator=torch.Generator().manual_seed(6))
    rows[0, [2, 6]] = EOD
    rows[1, [0, 4, 5]] = EOD
    return rows


def micro_batch(rows: torch.Tensor, **resets: bool) -> Any:
    from megatron_prealign.code_switch.switcher import RowFormat, plain_batch
    from megatron_prealign.training.rows import RowMicrobatch

    batch = plain_batch(rows, RowFormat(seq_length=SEQ_LENGTH, eod_id=EOD, **resets))
    one = torch.ones(())
    return RowMicrobatch(batch.tokens, batch.labels, batch.loss_mask, batch.position_ids, one, batch.document_starts)


def losses_and_gradients(chunk: Any, batch: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """What training computes: next-token losses `[rows, SEQ_LENGTH]` and the gradients of their sum."""
    from megatron_prealign.training.rows import row_loss_sum

    chunk.zero_grad()
    losses, loss_of = row_loss_sum(chunk, batch)
    loss_of(losses).backward()
    return losses.detach().clone(), {name: each.grad.clone() for name, each in chunk.named_parameters()}


def losses_alone(chunk: Any, rows: torch.Tensor) -> torch.Tensor:
    """Every document through the model by itself, with positions from 0."""
    losses = torch.empty(len(rows), SEQ_LENGTH)
    for row, ids in enumerate(rows):
        ends = [at + 1 for at in range(SEQ_LENGTH - 1) if ids[at] == EOD]
        for first, last in zip([0, *ends], [*ends, SEQ_LENGTH], strict=True):
            document, labels = ids[None, first:last], ids[None, first + 1 : last + 1]
            positions = torch.arange(last - first)[None]
            with torch.no_grad():
                losses[row, first:last] = chunk(document, positions, None, labels=labels)[0]
    return losses


def packed_and_alone(
    family: str, resets: dict[str, bool], model: dict[str, Any], precision: str = "fp32"
) -> dict[str, Any]:
    """Runs in a worker."""
    (chunk,) = build(recipe_values(family, model, training={"precision": precision}))[2]
    disturb(chunk)
    rows = packed_rows()
    losses, gradients = losses_and_gradients(chunk, micro_batch(rows, **resets))
    plain = micro_batch(rows)
    with torch.no_grad():
        untouched = chunk(plain.tokens, plain.position_ids, None, labels=plain.labels)
    return {"packed": losses, "gradients": gradients, "alone": losses_alone(chunk, rows), "untouched": untouched}


BOTH = {"reset_attention_mask": True, "reset_position_ids": True}


@pytest.mark.parametrize(
    ("family", "resets"),
    [("llama", {"reset_attention_mask": True}), ("llama", BOTH), ("gpt2", BOTH)],
    ids=["rotary", "rotary_both", "learned_both"],
)
def test_packed_documents_are_as_alone(workers: WorkerPool, family: str, resets: dict[str, bool]) -> None:
    answer = workers.run(1, packed_and_alone, family, resets, {})[0]
    torch.testing.assert_close(answer["packed"], answer["alone"], **TOLERANCE)
    assert not torch.allclose(answer["untouched"], answer["alone"], atol=0.1)


def test_packed_documents_are_as_alone_in_half_precision(workers: WorkerPool) -> None:
    """The mask has the type of the queries; grouped queries take another way with it than without."""
    answer = workers.run(1, packed_and_alone, "llama", BOTH, {}, "bf16")[0]
    # Eight bits of precision, which one sum in another order uses up at losses of up to 10.
    torch.testing.assert_close(answer["packed"], answer["alone"], rtol=0.02, atol=0.1)
    assert not torch.allclose(answer["untouched"].float(), answer["alone"].float(), atol=0.5)


@pytest.mark.parametrize("resets", [{"reset_attention_mask": True}, {"reset_position_ids": True}])
def test_learned_positions_need_both(workers: WorkerPool, resets: dict[str, bool]) -> None:
    answer = workers.run(1, packed_and_alone, "gpt2", resets, {})[0]
    for other in ("alone", "untouched"):
        assert not torch.allclose(answer["packed"], answer[other], atol=0.1)


def test_positions_change_nothing_for_rotary_ones(workers: WorkerPool) -> None:
    answer = workers.run(1, packed_and_alone, "llama", {"reset_position_ids": True}, {})[0]
    assert torch.equal(answer["packed"], answer["untouched"])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_without_the_options_nothing_changes(workers: WorkerPool, family: str) -> None:
    answer = workers.run(1, packed_and_alone, family, {}, {})[0]
    assert torch.equal(answer["packed"], answer["untouched"])


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recomputation_keeps_documents_apart(workers: WorkerPool, recompute: str) -> None:
    """The backward pass runs the layers again and has to be handed the mask."""
    expected = workers.run(1, packed_and_alone, "gpt2", BOTH, {})[0]
    got = workers.run(1, packed_and_alone, "gpt2", BOTH, {"recompute_granularity": recompute})[0]
    assert torch.equal(got["packed"], expected["packed"])
    assert got["gradients"].keys() == expected["gradients"].keys()
    for name, gradient in expected["gradients"].items():
        assert torch.equal(got["gradients"][name], gradient), name


def engine_attention(reset_attention_mask: bool) -> tuple[str, str]:
    """Runs in a worker: attention of the layers with a stand-in for Transformer Engine, and of its own specification
    afterwards."""
    from types import ModuleType, SimpleNamespace
    from unittest.mock import patch

    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from megatron_prealign.model import config

    recipe: Any = SimpleNamespace(
        model=SimpleNamespace(transformer_impl="transformer_engine", qk_layernorm=False),
        data=SimpleNamespace(reset_attention_mask=reset_attention_mask),
    )
    engines = get_gpt_layer_local_spec()
    nothing: Any = None
    with (
        patch.dict("sys.modules", {"transformer_engine": ModuleType("transformer_engine")}),
        patch.object(config, "get_gpt_layer_with_transformer_engine_spec", lambda **_: engines),
    ):
        layer: Any = config.block_spec(recipe, nothing, nothing, None)
    found = [each.submodules.self_attention.submodules.core_attention.__name__ for each in (layer, engines)]
    return found[0], found[1]


def test_transformer_engine_gets_our_attention_for_documents(workers: WorkerPool) -> None:
    """Its own would not look at the mask."""
    assert workers.run(1, engine_attention, True)[0] == ("FusedCausalAttention", "DotProductAttention")
    assert workers.run(1, engine_attention, False)[0] == ("DotProductAttention", "DotProductAttention")
