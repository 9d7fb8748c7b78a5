"""Tiny models of every family, created and saved by transformers itself."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

TOKENS = 257
"""Number of ids of `save_tokenizer`'s tokenizer."""
ROWS = 261
"""Number of embedding rows: some have no token, as in many published models."""
END = "<|endoftext|>"
SHAPE = {
    "num_hidden_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": ROWS,
    "max_position_embeddings": 64,
    "bos_token_id": 256,
    "eos_token_id": 256,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
GPT2 = {
    "n_layer": 4,
    "n_embd": 32,
    "n_head": 4,
    "n_positions": 64,
    "vocab_size": ROWS,
    "bos_token_id": 256,
    "eos_token_id": 256,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SHAPE),
    "llama3_tied": LlamaConfig(**SHAPE, rope_parameters=LLAMA3, tie_word_embeddings=True),
    "llama_linear": LlamaConfig(
        **SHAPE, head_dim=12, rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    ),
    "mistral": MistralConfig(**SHAPE, sliding_window=32),
    "qwen2": Qwen2Config(**SHAPE, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    "qwen2_tied": Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SHAPE, head_dim=10),
    "gpt2": GPT2Config(**GPT2),
    "gpt2_untied": GPT2Config(**GPT2, n_inner=48, tie_word_embeddings=False),
}


def token_batch(length: int = 12) -> torch.Tensor:
    return torch.randint(0, TOKENS, (2, length), generator=torch.Generator().manual_seed(3))


def make_model(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model with random values in all parameters, norms and biases too, so that a missing one changes the output."""
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name])).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.add_(0.3 * noise)
            else:
                # Larger than initial weights, so that attention is far from uniform.
                parameter.copy_(noise * SHAPE["hidden_size"] ** -0.5)
    return model.to(dtype)


def train(model: Any, steps: int = 3) -> Any:
    """Trains for a few steps with transformers' own loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batch = token_batch(24)
    for _ in range(steps):
        loss = model(batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def save_tokenizer(directory: Path, extra: int = 0) -> None:
    """Saves an untrained tokenizer: a token per byte, an end-of-document token, and `extra` more words."""
    vocabulary = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END, special=True)])
    tokenizer.add_tokens([f"extra{number}" for number in range(extra)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, bos_token=END).save_pretrained(directory)


def save_model(model: Any, directory: Path, **options: Any) -> Path:
    """Saves the model and its tokenizer."""
    model.save_pretrained(directory, **options)
    save_tokenizer(directory)
    return directory


def change_config(directory: Path, **values: Any) -> None:
    """Sets fields of config.json; None removes a field."""
    file = directory / "config.json"
    config = {**json.loads(file.read_bytes()), **values}
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}), encoding="utf-8")


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(token_batch()).logits
