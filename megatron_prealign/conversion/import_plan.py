"""Plans an import from Hugging Face before anything is written: which tensor becomes which, its dtype, and the size of
the vocabulary."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_prealign.checkpoint.commit import copy_tokenizer
from megatron_prealign.checkpoint.single_process.weights import cast_tensor, check_finite
from megatron_prealign.checkpoint.single_process.writer import ShardWriter
from megatron_prealign.checkpoint.state import model_identity
from megatron_prealign.conversion.config import huggingface_config, model_values, section_of
from megatron_prealign.conversion.hf_directory import HuggingFaceDirectory
from megatron_prealign.conversion.tensors import Entry, TensorPlan
from megatron_prealign.errors import UserError
from megatron_prealign.model.sizes import padded_vocab_size
from megatron_prealign.recipe import ModelSection
from megatron_prealign.tokenizer.base import Tokenizer
from megatron_prealign.tokenizer.load import load_tokenizer

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
CONFIG_DTYPES = {torch.bfloat16: "bfloat16", torch.float32: "float32"}
_ROLES = ("bos_token_id", "eos_token_id", "pad_token_id")
# Rows summed at a time for their mean.
_MEAN_ROWS = 4096


@dataclass(frozen=True)
class VocabResize:
    """Resizes dimension 0 of the embedding and of the output layer."""

    source_rows: int
    """Rows in the Hugging Face directory."""
    token_rows: int
    """How many of those have a token; a new row is their mean."""
    vocab_size: int
    padded_vocab_size: int

    def resize(self, tensor: torch.Tensor) -> torch.Tensor:
        """`[source_rows, ...]` -> `[padded_vocab_size, ...]`: kept, new and padding rows. Memory: the result."""
        if self.padded_vocab_size == self.source_rows:
            return tensor
        resized = torch.zeros(self.padded_vocab_size, *tensor.shape[1:], dtype=tensor.dtype)
        kept = min(self.source_rows, self.vocab_size)
        resized[:kept] = tensor[:kept]
        if self.vocab_size > self.source_rows:
            resized[self.source_rows : self.vocab_size] = self._mean(tensor).to(tensor.dtype)
        return resized

    def _mean(self, tensor: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(tensor.shape[1:], dtype=torch.float64)
        for start in range(0, self.token_rows, _MEAN_ROWS):
            total += tensor[start : min(start + _MEAN_ROWS, self.token_rows)].double().sum(0)
        return total / self.token_rows


@dataclass(frozen=True)
class ImportPlan:
    """How a Hugging Face model is written as a checkpoint."""

    directory: HuggingFaceDirectory
    model: ModelSection
    tensors: TensorPlan
    stored_names: Mapping[str, str]
    """Name of a tensor in `tensors` -> its name in the directory."""
    tokenizer: Tokenizer
    vocab: VocabResize
    dtype: torch.dtype

    def copy_tokenizer(self, target: Path) -> None:
        """Copies the tokenizer's own files into the new directory `target`.

        Raises:
            UserError: the copied files alone do not give the same ids, or a link points outside the directory.
        """
        copies = copy_tokenizer(self.tokenizer.path, target)
        if self.tokenizer.path == self.directory.path:
            for copy in copies:
                # Links that point outside the directory are refused, as for its weights.
                self.directory.path_of(copy.name)
        if (
            not (target / "tokenizer.json").exists()
            and load_tokenizer(target).fingerprint != self.tokenizer.fingerprint
        ):
            raise UserError(
                f"{self.tokenizer.path}: a copy of the tokenizer's files does not reproduce its ids; save it with "
                "transformers' save_pretrained, which writes tokenizer.json, and pass that with --tokenizer"
            )

    def write(self, writer: ShardWriter, progress: Callable[[int, int], None] | None) -> int:
        """Converts all tensors; returns the number of parameters without padding."""
        total = sum(self.directory.tensors[name].bytes for name in self.stored_names.values())
        done = parameters = 0
        self._check_tied()
        for entry in self.tensors.entries:
            tensor = self._convert(entry)
            if entry.is_vocabulary:
                parameters += tensor.numel() // len(tensor) * self.vocab.vocab_size
            else:
                parameters += tensor.numel()
            layers = self.model.num_layers if entry.layer is not None else None
            writer.add(entry.key, tensor, layer=entry.layer, num_layers=layers, split=entry.partition_dim)
            del tensor
            done += sum(self.directory.tensors[self.stored_names[name]].bytes for name in entry.hf_shapes)
            if progress is not None:
                progress(done, total)
        return parameters

    def identity(self) -> dict[str, Any]:
        """Identity of the model and its tokenizer, for `state.json`."""
        return model_identity(
            asdict(self.model),
            vocab_size=self.vocab.vocab_size,
            padded_vocab_size=self.vocab.padded_vocab_size,
            tokenizer_fingerprint=self.tokenizer.fingerprint,
        )

    def source(self) -> dict[str, Any]:
        """Origin of the weights, for `state.json`."""
        config = self.directory.config
        return {
            "format": "huggingface",
            "model": str(self.directory.path),
            "model_type": config.get("model_type"),
            **{role: config.get(role) for role in _ROLES},
            "dtypes": sorted({self.directory.tensors[name].dtype for name in self.stored_names.values()}),
            "vocab_size": self.vocab.source_rows,
            "tokenizer_size": self.tokenizer.vocab_size,
            "own_tokenizer": self.has_own_tokenizer,
        }

    @property
    def has_own_tokenizer(self) -> bool:
        """Whether the tokenizer is the one in the model's directory, whose special-token policy is kept."""
        return self.tokenizer.path.resolve() == self.directory.path.resolve()

    def config(self) -> dict[str, Any]:
        """config.json as `convert to-hf` would write it, with the directory's own special token ids."""
        config = huggingface_config(
            self.model,
            vocab_size=self.vocab.vocab_size,
            seq_length=self.model.max_position_embeddings or 0,
            dtype=CONFIG_DTYPES[self.dtype],
            eod_id=self.tokenizer.eod_id,
        )
        # The special token ids in the directory's config.json belong to the directory's own tokenizer.
        for role in _ROLES if self.has_own_tokenizer else ():
            own = self.directory.config.get(role)
            ids = own if isinstance(own, list) else [own]
            if ids and all(type(each) is int and 0 <= each < self.vocab.vocab_size for each in ids):
                config[role] = own
        return config

    def _convert(self, entry: Entry) -> torch.Tensor:
        hf = {name: self._read(self.stored_names[name]) for name in entry.hf_shapes}
        tensor = entry.from_huggingface(hf)
        # Frees the Hugging Face tensors before rows are added.
        hf.clear()
        return self.vocab.resize(tensor) if entry.is_vocabulary else tensor

    def _read(self, name: str) -> torch.Tensor:
        where, tensor = self.directory.tensors[name].file, self.directory.read(name)
        check_finite(where, name, tensor, "; the model is corrupt or its training diverged, use another one")
        return cast_tensor(where, name, tensor, self.dtype)

    def _check_tied(self) -> None:
        """Checks that an output layer stored with a tied model equals the embedding."""
        for name, other in self.tensors.tied.items():
            if name not in self.directory.tensors:
                continue
            expected = {name: self.tensors.hf_shapes[other]}
            others = {each for each in self.directory.tensors if each != name}
            self.directory.check(expected, others.__contains__)
            if not torch.equal(self.directory.read(name), self.directory.read(self.stored_names[other])):
                raise UserError(
                    f"{self.directory.path}: config.json ties the output layer to the embedding, but {name} and "
                    f"{other} differ; set tie_word_embeddings to false in config.json if this is intended"
                )


def plan_import(
    directory: HuggingFaceDirectory,
    *,
    tensor_parallel: int,
    dtype: str | None,
    tokenizer: Path | None,
    vocab_size: int | None,
    divisible_by: int,
    ignore: Collection[str],
) -> ImportPlan:
    """Reads the small files of a directory and plans its import.

    Args:
        directory: The directory.
        tensor_parallel: Number of shards that matrices will be written in.
        dtype: bf16 or fp32; None for bf16 if the directory is all bf16, else fp32.
        tokenizer: Path of the model's tokenizer; None if it is in the directory.
        vocab_size: Number of ids; None for the number of embedding rows, or of the tokenizer's ids if it has more.
        divisible_by: The padded vocabulary size is a multiple of this times `tensor_parallel`.
        ignore: Fields of config.json that the user declares harmless.

    Raises:
        UserError: the directory is corrupt, the model is unsupported, or its tokenizer does not fit.
    """
    if divisible_by < 1:
        raise UserError(f"--make-vocab-size-divisible-by is {divisible_by}, expected a positive integer")
    values = model_values(directory.config, str(directory.path / "config.json"), ignore=ignore)
    source_rows = values["vocab_size"]
    section = section_of(values)
    tensors = TensorPlan(section, source_rows)
    stored_names = _stored_names(directory, tensors)
    directory.check(
        {stored_names[name]: shape for name, shape in tensors.hf_shapes.items()},
        lambda name: _is_optional(tensors, name),
    )
    loaded = _load_tokenizer(directory, tokenizer)
    size = max(source_rows, loaded.vocab_size) if vocab_size is None else vocab_size
    if size < loaded.vocab_size:
        raise UserError(
            f"--vocab-size is {size:,}, expected at least {loaded.vocab_size:,}, the number of ids of {loaded.path}"
        )
    # Training accepts any padding.
    padded = padded_vocab_size(size, divisible_by, tensor_parallel)
    model = replace(section, vocab_size=size, make_vocab_size_divisible_by=divisible_by)
    if dtype is None:
        # fp16 is no dtype to train in; fp32 represents all of its values exactly.
        dtype = "bf16" if {directory.tensors[name].dtype for name in stored_names.values()} == {"BF16"} else "fp32"
    vocab = VocabResize(source_rows, min(source_rows, loaded.vocab_size), size, padded)
    return ImportPlan(directory, model, tensors, stored_names, loaded, vocab, _DTYPES[dtype])


def _stored_names(directory: HuggingFaceDirectory, tensors: TensorPlan) -> dict[str, str]:
    """Name in `tensors` -> name in the directory, which may have been saved from the base model, without a prefix."""
    prefix = tensors.family.base_prefix
    is_base_model = not any(name.startswith(prefix) for name in directory.tensors)
    return {name: name.removeprefix(prefix) if is_base_model else name for name in tensors.hf_shapes}


def _is_optional(tensors: TensorPlan, name: str) -> bool:
    return tensors.is_buffer(name) or name in tensors.tied


def _load_tokenizer(directory: HuggingFaceDirectory, path: Path | None) -> Tokenizer:
    try:
        return load_tokenizer(directory.path if path is None else path)
    except UserError as error:
        if path is not None:
            raise
        raise UserError(f"{error}; use --tokenizer if the tokenizer is in another directory") from error
