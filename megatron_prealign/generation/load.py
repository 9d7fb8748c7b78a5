"""Loads a checkpoint or a Hugging Face model directory as a transformers model with its tokenizer.

A checkpoint becomes the model that `convert to-hf` would write, without its copy on disk: config and tokenizer, a few
megabytes, are written to a temporary directory, and the weights are read tensor by tensor into memory.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from megatron_prealign.checkpoint.directory import resolve_checkpoint
from megatron_prealign.checkpoint.single_process.intact import check_intact
from megatron_prealign.checkpoint.single_process.weights import check_finite
from megatron_prealign.conversion.hf_directory import HuggingFaceDirectory
from megatron_prealign.conversion.to_hf import (
    is_model_directory,
    open_checkpoint,
    read_weights,
    write_config_and_tokenizer,
)
from megatron_prealign.errors import UserError, shortened
from megatron_prealign.progress import Progress


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode and its tokenizer, both of transformers."""

    path: Path
    """Checkpoint or model directory that it was loaded from."""
    model: Any
    tokenizer: Any

    @property
    def context_length(self) -> int:
        """Largest number of tokens that the model takes, prompt and completion together."""
        return int(self.model.config.max_position_embeddings)

    @property
    def vocab_size(self) -> int:
        """Number of embedding rows."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))


def load_model(path: str | Path, device: torch.device) -> LoadedModel:
    """Loads a model, with the dtype of its weights. Memory: one copy of the weights.

    Args:
        path: A checkpoint, a directory of checkpoints, a run directory or a Hugging Face model directory.

    Raises:
        UserError: nothing is found at the path, it is corrupt, or transformers cannot load it.
    """
    path = Path(path)
    loaded = _load_directory(path) if is_model_directory(path) else _load_checkpoint(resolve_checkpoint(path))
    loaded.model.eval().to(device)
    return loaded


def _load_checkpoint(directory: Path) -> LoadedModel:
    import transformers

    check_intact(directory)
    source = open_checkpoint(directory)
    with TemporaryDirectory(prefix="megatron-prealign-") as working, _errors_of_transformers(directory):
        write_config_and_tokenizer(source, Path(working), source.dtype)
        config = transformers.AutoConfig.from_pretrained(working, local_files_only=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(working, local_files_only=True)
    state: dict[str, torch.Tensor] = {}
    with Progress("read weights", len(source.plan.entries), unit="tensors") as progress:
        for _, tensors in read_weights(source):
            state |= tensors
            progress.update()
    architecture = getattr(transformers, config.architectures[0])
    with _errors_of_transformers(directory):
        model = architecture.from_pretrained(None, config=config, state_dict=state, torch_dtype=source.dtype)
    return LoadedModel(directory, model, tokenizer)


def _load_directory(directory: Path) -> LoadedModel:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # transformers reads headers, indexes and links without these checks.
    HuggingFaceDirectory(directory)
    with _errors_of_transformers(directory):
        tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
        model, info = AutoModelForCausalLM.from_pretrained(
            str(directory), local_files_only=True, use_safetensors=True, torch_dtype="auto", output_loading_info=True
        )
    # transformers initialises these randomly.
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(f"{directory}: missing {shortened(missing)}; download or convert the model again")
    for name, parameter in model.named_parameters():
        check_finite(directory, name, parameter.detach(), "; use another model")
    return LoadedModel(directory, model, tokenizer)


@contextmanager
def _errors_of_transformers(directory: Path) -> Iterator[None]:
    """Turns off transformers' own output, and turns its errors into user errors."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # transformers raises many types.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{directory}: transformers cannot load this model: {reason}; use another one") from error
