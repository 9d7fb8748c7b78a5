"""Megatron-Core models loaded from checkpoints of weights; the functions run in workers."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from megatron_prealign.checkpoint.state import model_identity


def load(checkpoint: str, parallel: dict[str, Any], precision: str = "fp32") -> tuple[Any, list[Any]]:
    """Runtime and model chunks of this rank, built as by `pretrain --config model.yaml --config ...`."""
    import tempfile

    import yaml

    from megatron_prealign.checkpoint.resume.load import load_weights
    from megatron_prealign.checkpoint.state import read_state
    from megatron_prealign.model.build import build_model
    from megatron_prealign.model.sizes import padded_vocab_size
    from megatron_prealign.recipe import load_recipe
    from megatron_prealign.runtime.distributed import start

    values = {
        "data": {"tokenizer": "t", "seq_length": 12, "sources": [{"path": "p", "language": "en"}]},
        "optimizer": {"lr": 0.001},
        "training": {
            "seed": 1,
            "micro_batch_size": 2,
            "global_batch_size": 4,
            "train_iters": 1,
            "precision": precision,
        },
        "logging": {"run_dir": "unused"},
        "parallel": {"device": "cpu", **parallel},
    }
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(values, file)
        file.flush()
        recipe = load_recipe(["--config", f"{checkpoint}/model.yaml", "--config", file.name])
    runtime = start(recipe.parallel, seed=recipe.training.seed)
    summary = read_state(Path(checkpoint))
    vocab_size = summary["vocab_size"]
    chunks = build_model(recipe, runtime, vocab_size=vocab_size)
    padded = padded_vocab_size(
        vocab_size, recipe.model.make_vocab_size_divisible_by, recipe.parallel.tensor_model_parallel_size
    )
    identity = model_identity(
        asdict(recipe.model),
        vocab_size=vocab_size,
        padded_vocab_size=padded,
        tokenizer_fingerprint=summary["tokenizer_fingerprint"],
    )
    load_weights(chunks, None, Path(checkpoint), identity=identity)
    return runtime, [chunk.eval() for chunk in chunks]


def logits(checkpoint: str, tokens: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Logits `[batch, tokens, vocabulary]`, in one process."""
    _, (chunk,) = load(checkpoint, {})
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    with torch.no_grad():
        return chunk(tokens, positions, None)[..., :vocab_size].clone()


def parameters(checkpoint: str, parallel: dict[str, Any]) -> dict[str, tuple[torch.Tensor, int | None, int]]:
    """Name with the global layer number -> this rank's shard, its partitioned dimension (None if replicated) and the
    tensor-parallel rank."""
    runtime, chunks = load(checkpoint, parallel)
    shards = {}
    for chunk in chunks:
        numbers = {f"decoder.layers.{index}.": layer.layer_number for index, layer in enumerate(chunk.decoder.layers)}
        for name, parameter in chunk.named_parameters():
            for prefix, number in numbers.items():
                if name.startswith(prefix):
                    name = f"layer {number} {name.removeprefix(prefix)}"
                    break
            partition_dim = parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else None
            shards[name] = (parameter.detach().clone(), partition_dim, runtime.tensor_rank)
    return shards
