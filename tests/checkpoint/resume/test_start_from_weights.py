"""Training starts from a transformers model, and from only the weights of a run, in another layout each time."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.tiny import Tiny
from support.whole_runs import run, weights
from support.workers import WorkerPool
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_prealign.checkpoint.commands.export import export_weights
from megatron_prealign.checkpoint.directory import resolve_checkpoint
from megatron_prealign.checkpoint.single_process.reader import ShardReader
from megatron_prealign.conversion.from_hf import from_huggingface

CONFIG = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "vocab_size": 1000,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}
# A step with this learning rate changes no weight by more.
LR = 1e-9


def weights_of(directory: Path, vocab_size: int) -> dict[str, torch.Tensor]:
    with ShardReader(directory) as reader:
        keys = [key for key in reader.tensors if key.startswith(("embedding", "decoder", "output"))]
        return {
            key: reader.read(key)[:vocab_size] if key.startswith(("emb", "out")) else reader.read(key) for key in keys
        }


def one_step(tiny: Tiny, checkpoint: Path, run_dir: Path, **parallel: Any) -> dict[str, Any]:
    """Recipe values whose model is the checkpoint's `model.yaml`."""
    values = tiny.values(run_dir)
    for section in ("dictionary", "alignment", "code_switch"):
        del values[section]
    values["model"] = yaml.safe_load((checkpoint / "model.yaml").read_text(encoding="utf-8"))["model"]
    values["training"]["train_iters"] = 1
    values["optimizer"] = {"lr": LR, "weight_decay": 0.0}
    values["checkpoint"] = {"load": str(checkpoint)}
    values["parallel"] = parallel
    return values


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_from_hugging_face_to_a_run_to_its_weights_to_a_run(tiny: Tiny, tmp_path: Path, workers: WorkerPool) -> None:
    LlamaForCausalLM(LlamaConfig(**CONFIG)).save_pretrained(tmp_path / "hf")
    # 1,024 ids; the model has embeddings for 1,000.
    result = from_huggingface(tmp_path / "hf", tmp_path / "mcore", tokenizer=Path(tiny.tokenizer))
    assert result.added_rows == 24
    layout = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    run(workers, 4, one_step(tiny, tmp_path / "mcore", tmp_path / "first", **layout), tmp_path)
    trained = weights(workers, tmp_path / "first", 1024)
    initial = weights_of(tmp_path / "mcore", 1024)
    assert initial.keys() == trained.keys()
    for key, tensor in initial.items():
        torch.testing.assert_close(trained[key], tensor, rtol=0, atol=2 * LR)

    export_weights(resolve_checkpoint(tmp_path / "first"), tmp_path / "exported")
    exported = weights_of(tmp_path / "exported", 1024)
    assert exported.keys() == trained.keys()
    assert all(torch.equal(tensor, trained[key]) for key, tensor in exported.items())
    run(workers, 1, one_step(tiny, tmp_path / "exported", tmp_path / "second"), tmp_path)
    for key, tensor in weights(workers, tmp_path / "second", 1024).items():
        torch.testing.assert_close(tensor, exported[key], rtol=0, atol=2 * LR)
