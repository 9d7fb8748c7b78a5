"""What an import from Hugging Face does, decided before anything is written: which tensor becomes which, in what
dtype, with how many rows of the vocabulary."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_prealign.checkpoint.commit import copy_tokenizer
from megatron_prealign.checkpoint.single_process.weights import check_numbers, converted
from megatron_prealign.checkpoint.single_process.writer import ShardWriter
from megatron_prealign.checkpoint.state import model_identity
from megatron_prealign.conversion.config import huggingface_config, model_values, section_of
from megatron_prealign.conversion.hf_directory import HuggingFaceDirectory
from megatron_prealign.conversion.tensors import Entry, TensorPlan
from megatron_prealign.errors import UserError
from megatron_prealign.recipe import ModelSection
from megatron_prealign.tokenizer.base import Tokenizer
from megatron_prealign.tokenizer.load import load_tokenizer

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
CONFIG_DTYPES = {torch.bfloat16: "bfloat16", torch.float32: "float32"}
_ROLES = ("bos_token_id", "eos_token_id", "pad_token_id")
# Rows that are added up at a time for their mean.
_MEAN_ROWS = 4096


@dataclass(frozen=True)
class _Rows:
    """What becomes of dimension 0 of the embedding and the output layer."""

    there: int
    """In the directory."""
    meant: int
    """Of those, the ones whose mean a new row becomes: they have tokens."""
    wanted: int
    padded: int

    def fit(self, tensor: torch.Tensor) -> torch.Tensor:
        """`[there, ...]` becomes `[padded, ...]`: kept, new and padding rows. Memory: the result."""
        if self.padded == self.there:
            return tensor
        fitted = torch.zeros(self.padded, *tensor.shape[1:], dtype=tensor.dtype)
        kept = min(self.there, self.wanted)
        fitted[:kept] = tensor[:kept]
        if self.wanted > self.there:
            fitted[self.there : self.wanted] = self._mean(tensor).to(tensor.dtype)
        return fitted

    def _mean(self, tensor: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(tensor.shape[1:], dtype=torch.float64)
        for start in range(0, self.meant, _MEAN_ROWS):
            total += tensor[start : min(start + _MEAN_ROWS, self.meant)].double().sum(0)
        return total / self.meant


@dataclass(frozen=True)
class Import:
    """A Hugging Face model on its way into a checkpoint."""

    directory: HuggingFaceDirectory
    model: ModelSection
    plan: TensorPlan
    names: Mapping[str, str]
    """Name of the plan -> name in the directory."""
    tokenizer: Tokenizer
    rows: _Rows
    dtype: torch.dtype

    def copy_tokenizer(self, target: Path) -> None:
        """Copies the tokenizer's own files into the new directory `target`.

        Raises:
            UserError: they alone do not give the same ids, or lead out of the directory.
        """
        copies = copy_tokenizer(self.tokenizer.path, target)
        if self.tokenizer.path == self.directory.path:
            for copy in copies:
                # What leads out of the directory is refused, like its weights.
                self.directory.path_of(copy.name)
        if (
            not (target / "tokenizer.json").exists()
            and load_tokenizer(target).fingerprint != self.tokenizer.fingerprint
        ):
            raise UserError(
                f"{self.tokenizer.path}: the tokenizer's ids depend on more than its own files; save it with "
                "transformers' save_pretrained, which writes tokenizer.json, and name that with --tokenizer"
            )

    def write(self, writer: ShardWriter, progress: Callable[[int, int], None] | None) -> int:
        """Converts all tensors; returns how many numbers there are without padding."""
        total = sum(self.directory.tensors[name].bytes for name in self.names.values())
        done = parameters = 0
        self._check_tied()
        for entry in self.plan.entries:
            tensor = self._convert(entry)
            parameters += tensor.numel() // len(tensor) * self.rows.wanted if entry.vocabulary else tensor.numel()
            layers = self.model.num_layers if entry.layer is not None else None
            writer.add(entry.key, tensor, layer=entry.layer, num_layers=layers, split=entry.split)
            del tensor
            done += sum(self.directory.tensors[self.names[name]].bytes for name in entry.names)
            if progress is not None:
                progress(done, total)
        return parameters

    def identity(self) -> dict[str, Any]:
        """What the weights are of, for `state.json`."""
        return model_identity(
            asdict(self.model),
            vocab_size=self.rows.wanted,
            padded_vocab_size=self.rows.padded,
            tokenizer_fingerprint=self.tokenizer.fingerprint,
        )

    def source(self) -> dict[str, Any]:
        """Where the weights come from, for `state.json`."""
        config = self.directory.config
        return {
            "format": "huggingface",
            "model": str(self.directory.path),
            "model_type": config.get("model_type"),
            **{role: config.get(role) for role in _ROLES},
            "dtypes": sorted({self.directory.tensors[name].dtype for name in self.names.values()}),
            "vocab_size": self.rows.there,
            "tokenizer_size": self.tokenizer.vocab_size,
            "own_tokenizer": self.has_own_tokenizer,
        }

    @property
    def has_own_tokenizer(self) -> bool:
        """Whether the tokenizer is that of the model's makers, whose policy it keeps."""
        return self.tokenizer.path.resolve() == self.directory.path.resolve()

    def config(self) -> dict[str, Any]:
        """config.json as `convert to-hf` would write it, with the directory's own ids of tokens that have a role."""
        config = huggingface_config(
            self.model,
            vocab_size=self.rows.wanted,
            seq_length=self.model.max_position_embeddings or 0,
            dtype=CONFIG_DTYPES[self.dtype],
            eod_id=self.tokenizer.eod_id,
        )
        # Ids of roles are those of the makers' tokenizer.
        for role in _ROLES if self.has_own_tokenizer else ():
            own = self.directory.config.get(role)
            ids = own if isinstance(own, list) else [own]
            if ids and all(type(each) is int and 0 <= each < self.rows.wanted for each in ids):
                config[role] = own
        return config

    def _convert(self, entry: Entry) -> torch.Tensor:
        hf = {name: self._read(self.names[name]) for name in entry.names}
        tensor = entry.from_huggingface(hf)
        # Theirs need not stay while rows are added.
        hf.clear()
        return self.rows.fit(tensor) if entry.vocabulary else tensor

    def _read(self, name: str) -> torch.Tensor:
        where, tensor = self.directory.tensors[name].file, self.directory.read(name)
        check_numbers(where, name, tensor, "; the model is damaged or had broken down in training, use another one")
        return converted(where, name, tensor, self.dtype)

    def _check_tied(self) -> None:
        """A file of a tied model that holds the output layer too must hold the same numbers twice."""
        for name, other in self.plan.tied.items():
            if name not in self.directory.tensors:
                continue
            expected = {name: self.plan.names[other]}
            others = {each for each in self.directory.tensors if each != name}
            self.directory.check(expected, others.__contains__)
            if not torch.equal(self.directory.read(name), self.directory.read(self.names[other])):
                raise UserError(
                    f"{self.directory.path}: config.json ties the output layer to the embedding, but {name} and "
                    f"{other} "
                    "differ; set tie_word_embeddings to false in it if both are meant"
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
) -> Import:
    """Reads the small files of a directory and decides everything.

    Args:
        directory: The directory.
        tensor_parallel: In how many parts matrices will be written.
        dtype: bf16 or fp32; None for bf16 if that is what the directory has, else fp32.
        tokenizer: Of the model; None if it is in its directory.
        vocab_size: Number of ids; None for that of the embedding, or of the tokenizer if it has more.
        divisible_by: The written vocabulary is a multiple of this times `tensor_parallel`.
        ignore: Fields of config.json that the user vouches for.

    Raises:
        UserError: the directory is damaged or of a model that cannot be converted, or its tokenizer does not fit.
    """
    if divisible_by < 1:
        raise UserError(f"--make-vocab-size-divisible-by is {divisible_by}, expected a number above 0")
    values = model_values(directory.config, str(directory.path / "config.json"), ignore=ignore)
    there = values["vocab_size"]
    read = section_of(values)
    plan = TensorPlan(read, there)
    names = _names(directory, plan)
    directory.check({names[name]: shape for name, shape in plan.names.items()}, lambda name: _may_have(plan, name))
    loaded = _load_tokenizer(directory, tokenizer)
    wanted = max(there, loaded.vocab_size) if vocab_size is None else vocab_size
    if wanted < loaded.vocab_size:
        raise UserError(
            f"--vocab-size is {wanted:,}, but {loaded.path} has {loaded.vocab_size:,} ids; expected at least as many"
        )
    # As `model.config.padded_vocab_size`, whose module loads Megatron-Core; training takes any other padding, too.
    multiple = divisible_by * tensor_parallel
    padded = -(-wanted // multiple) * multiple
    model = replace(read, vocab_size=wanted, make_vocab_size_divisible_by=divisible_by)
    found = {directory.tensors[name].dtype for name in names.values()}
    if dtype is None:
        # Half precision is no type to train in; single precision holds all of its numbers.
        dtype = "bf16" if found == {"BF16"} else "fp32"
    rows = _Rows(there, min(there, loaded.vocab_size), wanted, padded)
    return Import(directory, model, plan, names, loaded, rows, _DTYPES[dtype])


def _names(directory: HuggingFaceDirectory, plan: TensorPlan) -> dict[str, str]:
    """Name of the plan -> name in the directory, which may hold the model without its output layer's class."""
    base = plan.family.base
    bare = not any(name.startswith(base) for name in directory.tensors)
    return {name: name.removeprefix(base) if bare else name for name in plan.names}


def _may_have(plan: TensorPlan, name: str) -> bool:
    return plan.is_buffer(name) or name in plan.tied


def _load_tokenizer(directory: HuggingFaceDirectory, path: Path | None) -> Tokenizer:
    try:
        return load_tokenizer(directory.path if path is None else path)
    except UserError as error:
        if path is not None:
            raise
        raise UserError(f"{error}; a tokenizer that lies elsewhere is named by --tokenizer") from error
