"""Initial weights: the same in every layout, with the right standard deviation, determined by the seed."""

import math
from typing import Any

import pytest
import torch
from support.model_builds import VOCAB_SIZE, initial_weights, recipe_values
from support.workers import WorkerPool

Weights = dict[str, torch.Tensor]
EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"


def layout(**parallel: Any) -> dict[str, Any]:
    return recipe_values("llama", parallel={"device": "cpu", **parallel})


@pytest.fixture(scope="module")
def full(workers: WorkerPool) -> Weights:
    return workers.run(1, initial_weights, layout())[0][0]


def shard_of(name: str, tensor: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    """The shard of a full parameter on tensor-parallel rank `rank` (norms are replicated)."""
    if name.endswith("linear_fc1.weight"):
        # Gate and up projection are sharded separately.
        return torch.cat([half.chunk(ranks)[rank] for half in tensor.chunk(2)])
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return tensor.chunk(ranks, dim=1)[rank]
    return tensor.chunk(ranks)[rank] if name.endswith("linear_qkv.weight") else tensor


def test_tensor_parallel_ranks_have_shards_of_the_same_model(workers: WorkerPool, full: Weights) -> None:
    ranks = [chunks[0] for chunks in workers.run(2, initial_weights, layout(tensor_model_parallel_size=2))]
    for rank, shards in enumerate(ranks):
        assert shards.keys() == full.keys()
        for name, tensor in shards.items():
            if name not in (EMBEDDING, OUTPUT):
                assert torch.equal(tensor, shard_of(name, full[name], rank, 2)), (rank, name)
    # 40 ids are 48 rows for one process and 64 rows for two.
    for name in (EMBEDDING, OUTPUT):
        rows = torch.cat([shards[name] for shards in ranks])
        assert (len(rows), len(full[name])) == (64, 48)
        assert torch.equal(rows[:VOCAB_SIZE], full[name][:VOCAB_SIZE])
        assert torch.count_nonzero(rows[VOCAB_SIZE:]) == 0
        assert torch.count_nonzero(full[name][VOCAB_SIZE:]) == 0


@pytest.mark.parametrize(("virtual", "first_layers"), [(None, [[0], [2]]), (2, [[0, 2], [1, 3]])])
def test_pipeline_stages_have_layers_of_the_same_model(
    workers: WorkerPool, full: Weights, virtual: int | None, first_layers: list[list[int]]
) -> None:
    sections = layout(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=virtual)
    stages = workers.run(2, initial_weights, sections)
    seen = set()
    for chunks, firsts in zip(stages, first_layers, strict=True):
        for chunk, first in zip(chunks, firsts, strict=True):
            for name, tensor in chunk.items():
                parts = name.split(".")
                if parts[:2] == ["decoder", "layers"]:
                    parts[2] = str(int(parts[2]) + first)
                seen.add(".".join(parts))
                assert torch.equal(tensor, full[".".join(parts)]), name
    assert seen == full.keys()


def test_tied_weights_are_shared(workers: WorkerPool, full: Weights) -> None:
    values = recipe_values("llama", {"share_embeddings_and_output_weights": True})
    tied = workers.run(1, initial_weights, values)[0][0]
    assert OUTPUT not in tied
    assert torch.equal(tied[EMBEDDING], full[EMBEDDING])
    values["parallel"] = {"device": "cpu", "pipeline_model_parallel_size": 2}
    first, last = (chunks[0] for chunks in workers.run(2, initial_weights, values))
    assert torch.equal(first[EMBEDDING][:VOCAB_SIZE], last[OUTPUT][:VOCAB_SIZE])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_standard_deviation(workers: WorkerPool, family: str) -> None:
    values = recipe_values(family, {"hidden_size": 128, "ffn_hidden_size": 256, "init_method_std": 0.05})
    weights = workers.run(1, initial_weights, values)[0][0]
    for name, tensor in weights.items():
        if tensor.dim() == 1:
            assert set(tensor.tolist()) == ({0.0} if name.endswith("bias") else {1.0}), name
            continue
        rows = tensor[:VOCAB_SIZE] if name in (EMBEDDING, OUTPUT) else tensor
        residual = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
        std = 0.05 / math.sqrt(2 * 4) if residual else 0.05
        # At least 1,500 normal samples: mean and standard deviation are within five standard errors of the true ones.
        error = 5 / math.sqrt(rows.numel())
        assert rows.std().item() == pytest.approx(std, rel=error), name
        assert abs(rows.mean().item()) < std * error, name


def test_every_matrix_is_drawn_separately(full: Weights) -> None:
    matrices = [tensor for tensor in full.values() if tensor.dim() == 2]
    matrices += [
        half for name, tensor in full.items() if name.endswith("linear_fc1.weight") for half in tensor.chunk(2)
    ]
    first_values = [tensor.flatten()[:4].tolist() for tensor in matrices if tensor.shape[0] != 96]
    assert len({tuple(values) for values in first_values}) == len(first_values)


def test_seed_determines_the_weights(workers: WorkerPool, full: Weights) -> None:
    values = layout()
    again = workers.run(1, initial_weights, values)[0][0]
    values["training"]["seed"] = 2
    other = workers.run(1, initial_weights, values)[0][0]
    for name, tensor in full.items():
        assert torch.equal(tensor, again[name]), name
        if tensor.dim() == 2:
            assert not torch.equal(tensor, other[name]), name


def test_embeddings_have_a_standard_deviation_of_their_own(workers: WorkerPool, full: Weights) -> None:
    values = recipe_values("llama", {"embedding_std": 0.08})
    weights = workers.run(1, initial_weights, values)[0][0]
    for name, tensor in weights.items():
        if name in (EMBEDDING, OUTPUT):
            # The same draws, scaled: 0.02 is the default of init_method_std.
            assert torch.allclose(tensor, full[name] * 4)
        else:
            assert torch.equal(tensor, full[name])


@pytest.mark.parametrize("ranks", [1, 2])
def test_clones_start_with_equal_embeddings(workers: WorkerPool, full: Weights, ranks: int) -> None:
    values = recipe_values("llama", {"equal_clone_embeddings": True})
    values["parallel"] = {"device": "cpu", "tensor_model_parallel_size": ranks}
    shards = [chunks[0] for chunks in workers.run(ranks, initial_weights, values)]
    half = VOCAB_SIZE // 2
    for name in (EMBEDDING, OUTPUT):
        rows = torch.cat([each[name] for each in shards])
        assert torch.equal(rows[:half], full[name][:half])
        assert torch.equal(rows[half:VOCAB_SIZE], full[name][:half])
        assert torch.count_nonzero(rows[VOCAB_SIZE:]) == 0
