"""Document masking: the losses of a packed sequence are those of its documents run alone."""

from typing import Any

import pytest
import torch
from support.model_builds import SEQ_LENGTH, VOCAB_SIZE, build, perturb, recipe_values
from support.workers import WorkerPool

EOD = 7
# fp32; the order of sums differs between a document alone and one in a packed sequence. Losses are of order 1 to 10.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def packed_samples() -> torch.Tensor:
    """int64 [2, SEQ_LENGTH + 1] of several documents, one of them a single end-of-document token."""
    samples = torch.randint(EOD + 1, VOCAB_SIZE, (2, SEQ_LENGTH + 1), generator=torch.Generator().manual_seed(6))
    samples[0, [2, 6]] = EOD
    samples[1, [0, 4, 5]] = EOD
    return samples


def micro_batch(samples: torch.Tensor, **resets: bool) -> Any:
    from megatron_prealign.code_switch.switcher import SequenceFormat, plain_batch
    from megatron_prealign.training.microbatches import SampleMicrobatch

    batch = plain_batch(samples, SequenceFormat(seq_length=SEQ_LENGTH, eod_id=EOD, **resets))
    one = torch.ones(())
    return SampleMicrobatch(batch.tokens, batch.labels, batch.loss_mask, batch.position_ids, one, batch.document_starts)


def losses_and_gradients(chunk: Any, batch: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Next-token losses `[batch, SEQ_LENGTH]` as in training, and the gradients of their sum."""
    from megatron_prealign.training.microbatches import lm_loss_sum

    chunk.zero_grad()
    losses, loss_of = lm_loss_sum(chunk, batch)
    loss_of(losses).backward()
    return losses.detach().clone(), {name: each.grad.clone() for name, each in chunk.named_parameters()}


def losses_alone(chunk: Any, samples: torch.Tensor) -> torch.Tensor:
    """Losses of every document run separately, with positions from 0."""
    losses = torch.empty(len(samples), SEQ_LENGTH)
    for sample, ids in enumerate(samples):
        ends = [at + 1 for at in range(SEQ_LENGTH - 1) if ids[at] == EOD]
        for first, last in zip([0, *ends], [*ends, SEQ_LENGTH], strict=True):
            document, labels = ids[None, first:last], ids[None, first + 1 : last + 1]
            positions = torch.arange(last - first)[None]
            with torch.no_grad():
                losses[sample, first:last] = chunk(document, positions, None, labels=labels)[0]
    return losses


def packed_and_alone(
    family: str, resets: dict[str, bool], model: dict[str, Any], precision: str = "fp32"
) -> dict[str, Any]:
    """Runs in a worker."""
    (chunk,) = build(recipe_values(family, model, training={"precision": precision}))[2]
    perturb(chunk)
    samples = packed_samples()
    losses, gradients = losses_and_gradients(chunk, micro_batch(samples, **resets))
    plain = micro_batch(samples)
    with torch.no_grad():
        unmasked = chunk(plain.tokens, plain.position_ids, None, labels=plain.labels)
    return {"packed": losses, "gradients": gradients, "alone": losses_alone(chunk, samples), "unmasked": unmasked}


BOTH = {"reset_attention_mask": True, "reset_position_ids": True}


@pytest.mark.parametrize(
    ("family", "resets"),
    [("llama", {"reset_attention_mask": True}), ("llama", BOTH), ("gpt2", BOTH)],
    ids=["rotary", "rotary_both", "learned_both"],
)
def test_packed_documents_match_documents_alone(workers: WorkerPool, family: str, resets: dict[str, bool]) -> None:
    result = workers.run(1, packed_and_alone, family, resets, {})[0]
    torch.testing.assert_close(result["packed"], result["alone"], **TOLERANCE)
    assert not torch.allclose(result["unmasked"], result["alone"], atol=0.1)


def test_packed_documents_match_documents_alone_in_half_precision(workers: WorkerPool) -> None:
    """The mask has the dtype of the queries; grouped queries use another code path with a mask than without."""
    result = workers.run(1, packed_and_alone, "llama", BOTH, {}, "bf16")[0]
    # bf16 has eight bits of precision: another order of one sum exhausts it at losses of up to 10.
    torch.testing.assert_close(result["packed"], result["alone"], rtol=0.02, atol=0.1)
    assert not torch.allclose(result["unmasked"].float(), result["alone"].float(), atol=0.5)


@pytest.mark.parametrize("resets", [{"reset_attention_mask": True}, {"reset_position_ids": True}])
def test_learned_positions_need_both_resets(workers: WorkerPool, resets: dict[str, bool]) -> None:
    result = workers.run(1, packed_and_alone, "gpt2", resets, {})[0]
    for other in ("alone", "unmasked"):
        assert not torch.allclose(result["packed"], result[other], atol=0.1)


def test_reset_position_ids_has_no_effect_with_rotary_positions(workers: WorkerPool) -> None:
    result = workers.run(1, packed_and_alone, "llama", {"reset_position_ids": True}, {})[0]
    assert torch.equal(result["packed"], result["unmasked"])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_without_the_options_nothing_is_masked(workers: WorkerPool, family: str) -> None:
    result = workers.run(1, packed_and_alone, family, {}, {})[0]
    assert torch.equal(result["packed"], result["unmasked"])


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recomputation_applies_the_mask(workers: WorkerPool, recompute: str) -> None:
    """The backward pass runs the layers again and must pass the mask."""
    expected = workers.run(1, packed_and_alone, "gpt2", BOTH, {})[0]
    got = workers.run(1, packed_and_alone, "gpt2", BOTH, {"recompute_granularity": recompute})[0]
    assert torch.equal(got["packed"], expected["packed"])
    assert got["gradients"].keys() == expected["gradients"].keys()
    for name, gradient in expected["gradients"].items():
        assert torch.equal(got["gradients"][name], gradient), name


def engine_attention(reset_attention_mask: bool) -> tuple[str, str]:
    """Runs in a worker: core attention of the layers with a fake Transformer Engine, and of the fake's own
    specification afterwards, which must be unchanged."""
    from types import ModuleType, SimpleNamespace
    from unittest.mock import patch

    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from megatron_prealign.model import config

    recipe: Any = SimpleNamespace(
        model=SimpleNamespace(transformer_impl="transformer_engine", qk_layernorm=False),
        data=SimpleNamespace(reset_attention_mask=reset_attention_mask),
    )
    engine_spec = get_gpt_layer_local_spec()
    nothing: Any = None
    with (
        patch.dict("sys.modules", {"transformer_engine": ModuleType("transformer_engine")}),
        patch.object(config, "get_gpt_layer_with_transformer_engine_spec", lambda **_: engine_spec),
    ):
        layer: Any = config.block_spec(recipe, nothing, nothing, None)
    names = [each.submodules.self_attention.submodules.core_attention.__name__ for each in (layer, engine_spec)]
    return names[0], names[1]


def test_transformer_engine_uses_fused_causal_attention_for_document_masks(workers: WorkerPool) -> None:
    """Its own attention ignores the mask."""
    assert workers.run(1, engine_attention, True)[0] == ("FusedCausalAttention", "DotProductAttention")
    assert workers.run(1, engine_attention, False)[0] == ("DotProductAttention", "DotProductAttention")
