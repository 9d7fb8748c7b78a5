"""Checkpoint directories as a run leaves them, made without training."""

import json
from pathlib import Path
from typing import Any

import torch

from megatron_prealign.checkpoint.manifest import write_manifest
from megatron_prealign.checkpoint.single_process.writer import ShardWriter

LAYERS, HIDDEN, ROWS, VOCABULARY = 2, 4, 8, 6
MODEL = {"num_layers": LAYERS, "hidden_size": HIDDEN, "num_attention_heads": 2, "family": "llama"}
STACKED = "decoder.layers.mlp.linear_fc2.weight"


def make_weights(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "embedding.word_embeddings.weight": torch.randn(ROWS, HIDDEN, generator=generator),
        STACKED: torch.randn(LAYERS, HIDDEN, 6, generator=generator),
        "decoder.final_layernorm.weight": torch.ones(HIDDEN),
        "output_layer.weight": torch.randn(ROWS, HIDDEN, generator=generator),
    }


def summary_of(step: int, **changes: Any) -> dict[str, Any]:
    return {
        "kind": "run",
        "vocab_size": VOCABULARY,
        "padded_vocab_size": ROWS,
        "tokenizer_fingerprint": "sha256:0",
        "model": MODEL,
        "layout": {
            "tensor_model_parallel_size": 2,
            "pipeline_model_parallel_size": 1,
            "virtual_pipeline_model_parallel_size": 1,
            "data_parallel_size": 3,
            "device": "cpu",
        },
        "run": {"seq_length": 16, "precision": "fp32", "seed": 7, "sources": [{"path": "en", "language": "en"}]},
        "train_state": {"step": step, "phase_step": step, "tokens": step * 1000},
        "phase": "language_model",
        "consumed_samples_per_source": {"en": step * 8},
        "blend": {},
        "metrics": {"validation_loss/en": 5.0 - step / 100},
        "saved_at": f"2026-01-01T00:00:{step % 60:02d}+00:00",
        "versions": {"torch": "2.13"},
        **changes,
    }


def make_checkpoint(directory: Path, step: int = 10, *, optimizer: bool = True, **changes: Any) -> Path:
    """A complete checkpoint with the weights of `make_weights(step)`."""
    directory.mkdir(parents=True)
    weights = make_weights(step)
    with ShardWriter(directory, tensor_parallel=2) as writer:
        for key, tensor in weights.items():
            for prefix in ("", "optimizer.state.exp_avg.") if optimizer else ("",):
                if key == STACKED:
                    for layer in range(LAYERS):
                        writer.add(prefix + key, tensor[layer], layer=layer, num_layers=LAYERS, split=1)
                else:
                    writer.add(prefix + key, tensor, split=0)
        if optimizer:
            writer.add("projection_heads.layer_0.weight_1.weight", torch.ones(3))
        records = writer.close()
    (directory / "state.json").write_text(json.dumps(summary_of(step, **changes)), encoding="utf-8")
    (directory / "recipe.yaml").write_text("model: {}\n", encoding="utf-8")
    (directory / "tokenizer").mkdir()
    (directory / "tokenizer" / "tokenizer.json").write_text("{}", encoding="utf-8")
    (directory / "huggingface").mkdir()
    config = {"model_type": "llama", "dtype": "float32"}
    (directory / "huggingface" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    write_manifest(directory, records)
    return directory


def make_run(run_dir: Path, steps: list[int], **changes: Any) -> Path:
    """A run's directory with checkpoints, the last of them the latest; returns the directory of checkpoints."""
    directory = run_dir / "checkpoints"
    for step in steps:
        make_checkpoint(directory / f"step_{step:08d}", step, **changes)
    (directory / "latest").write_text(f"step_{steps[-1]:08d}\n", encoding="utf-8")
    return directory
