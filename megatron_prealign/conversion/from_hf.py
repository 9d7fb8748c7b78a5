"""A Hugging Face model folder becomes a checkpoint of weights: one process, CPU, a tensor at a time."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_prealign.checkpoint.commit import TOKENIZER, complete_weights, copy_tokenizer
from megatron_prealign.checkpoint.single_process.weights import check_numbers, converted
from megatron_prealign.checkpoint.single_process.writer import ShardWriter
from megatron_prealign.checkpoint.state import is_weights_checkpoint, layout, model_identity, weights_state
from megatron_prealign.conversion.config import huggingface_config, model_values, section_of
from megatron_prealign.conversion.hf_folder import HuggingFaceFolder
from megatron_prealign.conversion.tensors import Entry, TensorPlan
from megatron_prealign.conversion.tokenizer import own_class_notes
from megatron_prealign.errors import UserError
from megatron_prealign.files.atomic import new_directory
from megatron_prealign.recipe import ModelSection
from megatron_prealign.tokenizer.base import Tokenizer
from megatron_prealign.tokenizer.load import load_tokenizer

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_CONFIG_DTYPES = {torch.bfloat16: "bfloat16", torch.float32: "float32"}
_ROLES = ("bos_token_id", "eos_token_id", "pad_token_id")
# Rows that are added up at a time for their mean.
_MEAN_ROWS = 4096


@dataclass(frozen=True, kw_only=True)
class Imported:
    """What was written."""

    family: str
    tensors: int
    """In the files of the folder that was read."""
    parameters: int
    bytes: int
    """Of the weights that were written."""
    dtype: str
    vocab_size: int
    padded_vocab_size: int
    tokenizer_size: int
    added_rows: int
    """Rows of the embedding (and of the output layer) that are the mean of the others."""
    dropped_rows: int
    """Rows without a token that were left out, as the vocabulary size asked for."""
    notes: list[str]
    """What a user should know about the tokenizer."""


@dataclass(frozen=True)
class _Rows:
    """What becomes of dimension 0 of the embedding and the output layer."""

    there: int
    """In the folder."""
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
class _Import:
    """All that is decided before anything is written."""

    folder: HuggingFaceFolder
    model: ModelSection
    plan: TensorPlan
    names: Mapping[str, str]
    """Name of the plan -> name in the folder."""
    tokenizer: Tokenizer
    rows: _Rows
    dtype: torch.dtype


def from_huggingface(
    model: Path,
    output: Path,
    *,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    dtype: str | None = None,
    tokenizer: Path | None = None,
    vocab_size: int | None = None,
    make_vocab_size_divisible_by: int = 128,
    ignore_config_fields: Collection[str] = (),
    allow_pickle: bool = False,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Imported:
    """Writes the weights as a checkpoint that `pretrain --checkpoint.load` takes in any layout. Memory: twice the
    largest tensor.

    Args:
        model: Folder as `save_pretrained` writes it.
        output: Folder to write.
        tensor_parallel: In how many parts matrices are written; loading takes any number.
        pipeline_parallel: In how many parts the layers are written.
        dtype: bf16 or fp32; None for bf16 if that is what the folder has, else fp32.
        tokenizer: Of the model; None if it is in its folder.
        vocab_size: Number of ids; None for that of the embedding, or of the tokenizer if it has more.
        make_vocab_size_divisible_by: The written vocabulary is a multiple of this times `tensor_parallel`.
        ignore_config_fields: Fields of config.json that the user vouches for.
        allow_pickle: Read pytorch_model*.bin.
        overwrite: Replace a checkpoint that is there.
        progress: Told the bytes read so far and in all.

    Raises:
        UserError: the folder is damaged or of a model that cannot be converted, its tokenizer does not fit, or the
            output cannot be written.
    """
    for name, parts in (("--tensor", tensor_parallel), ("--pipeline", pipeline_parallel)):
        if parts < 1:
            raise UserError(f"{name} is {parts}, expected a number above 0")
    work = _plan(
        HuggingFaceFolder(model, allow_pickle=allow_pickle),
        tensor_parallel=tensor_parallel,
        dtype=dtype,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        divisible_by=make_vocab_size_divisible_by,
        ignore=ignore_config_fields,
    )
    _check_split(work.plan, work.model, tensor_parallel, pipeline_parallel)
    with new_directory(output, overwrite=overwrite, replaceable=is_weights_checkpoint) as working:
        # First: what is wrong with it shows before the long part.
        _copy_tokenizer(work, working / TOKENIZER)
        writer = ShardWriter(working, tensor_parallel=tensor_parallel, pipeline_parallel=pipeline_parallel)
        with writer:
            parameters = _write(work, writer, progress)
            records = writer.close()
        complete_weights(
            working,
            weights_state(
                model_identity(
                    asdict(work.model),
                    vocab_size=work.rows.wanted,
                    padded_vocab_size=work.rows.padded,
                    tokenizer_fingerprint=work.tokenizer.fingerprint,
                ),
                layout=layout(tensor_parallel, pipeline_parallel),
                source=_source(work),
            ),
            config=_config(work),
            records=records,
        )
    return Imported(
        family=work.model.family,
        tensors=len(work.names),
        parameters=parameters,
        bytes=sum(record.bytes for name, record in records.items() if name.endswith(".distcp")),
        dtype=_CONFIG_DTYPES[work.dtype],
        vocab_size=work.rows.wanted,
        padded_vocab_size=work.rows.padded,
        tokenizer_size=work.tokenizer.vocab_size,
        added_rows=max(0, work.rows.wanted - work.rows.there),
        dropped_rows=max(0, work.rows.there - work.rows.wanted),
        notes=own_class_notes(work.tokenizer.path, work.model.family),
    )


def _plan(
    folder: HuggingFaceFolder,
    *,
    tensor_parallel: int,
    dtype: str | None,
    tokenizer: Path | None,
    vocab_size: int | None,
    divisible_by: int,
    ignore: Collection[str],
) -> _Import:
    if divisible_by < 1:
        raise UserError(f"--make-vocab-size-divisible-by is {divisible_by}, expected a number above 0")
    values = model_values(folder.config, str(folder.path / "config.json"), ignore=ignore)
    there = values["vocab_size"]
    read = section_of(values)
    plan = TensorPlan(read, there)
    names = _names(folder, plan)
    folder.check({names[name]: shape for name, shape in plan.names.items()}, lambda name: _may_have(plan, name))
    loaded = _load_tokenizer(folder, tokenizer)
    wanted = max(there, loaded.vocab_size) if vocab_size is None else vocab_size
    if wanted < loaded.vocab_size:
        raise UserError(
            f"--vocab-size is {wanted:,}, but {loaded.path} has {loaded.vocab_size:,} ids; expected at least as many"
        )
    # As `model.config.padded_vocab_size`, whose module loads Megatron-Core; training takes any other padding, too.
    multiple = divisible_by * tensor_parallel
    padded = -(-wanted // multiple) * multiple
    model = replace(read, vocab_size=wanted, make_vocab_size_divisible_by=divisible_by)
    found = {folder.tensors[name].dtype for name in names.values()}
    if dtype is None:
        # Half precision is no type to train in; single precision holds all of its numbers.
        dtype = "bf16" if found == {"BF16"} else "fp32"
    rows = _Rows(there, min(there, loaded.vocab_size), wanted, padded)
    return _Import(folder, model, plan, names, loaded, rows, _DTYPES[dtype])


def _names(folder: HuggingFaceFolder, plan: TensorPlan) -> dict[str, str]:
    """Name of the plan -> name in the folder, which may hold the model without its output layer's class."""
    base = plan.family.base
    bare = not any(name.startswith(base) for name in folder.tensors)
    return {name: name.removeprefix(base) if bare else name for name in plan.names}


def _may_have(plan: TensorPlan, name: str) -> bool:
    return plan.is_buffer(name) or name in plan.tied


def _load_tokenizer(folder: HuggingFaceFolder, path: Path | None) -> Tokenizer:
    try:
        return load_tokenizer(folder.path if path is None else path)
    except UserError as error:
        if path is not None:
            raise
        raise UserError(f"{error}; a tokenizer that lies elsewhere is named by --tokenizer") from error


def _check_split(plan: TensorPlan, model: ModelSection, tensor_parallel: int, pipeline_parallel: int) -> None:
    """Finds out before anything is written whether the tensors can be shared out, as training in that layout would."""
    if model.num_layers % pipeline_parallel:
        raise UserError(
            f"--pipeline is {pipeline_parallel}, expected a divisor of the model's {model.num_layers} layers"
        )
    shared = {
        entry.shape[entry.split] for entry in plan.entries if entry.split is not None and not entry.vocabulary
    } | {model.query_groups, model.num_attention_heads}
    if any(size % tensor_parallel for size in shared):
        raise UserError(
            f"--tensor is {tensor_parallel}, expected a common divisor of the model's heads, key/value heads and "
            f"widths ({', '.join(map(str, sorted(shared)))})"
        )


def _copy_tokenizer(work: _Import, target: Path) -> None:
    copies = copy_tokenizer(work.tokenizer.path, target)
    if work.tokenizer.path == work.folder.path:
        for copy in copies:
            # What leads out of the folder is refused, like its weights.
            work.folder.path_of(copy.name)
    if not (target / "tokenizer.json").exists() and load_tokenizer(target).fingerprint != work.tokenizer.fingerprint:
        raise UserError(
            f"{work.tokenizer.path}: the tokenizer's ids depend on more than its own files; save it with "
            "transformers' save_pretrained, which writes tokenizer.json, and name that with --tokenizer"
        )


def _write(work: _Import, writer: ShardWriter, progress: Callable[[int, int], None] | None) -> int:
    """Converts all tensors; returns how many numbers there are without padding."""
    total = sum(work.folder.tensors[name].bytes for name in work.names.values())
    done = parameters = 0
    _check_tied(work)
    for entry in work.plan.entries:
        tensor = _ours(work, entry)
        parameters += tensor.numel() // len(tensor) * work.rows.wanted if entry.vocabulary else tensor.numel()
        layers = work.model.num_layers if entry.layer is not None else None
        writer.add(entry.key, tensor, layer=entry.layer, num_layers=layers, split=entry.split)
        del tensor
        done += sum(work.folder.tensors[work.names[name]].bytes for name in entry.names)
        if progress is not None:
            progress(done, total)
    return parameters


def _ours(work: _Import, entry: Entry) -> torch.Tensor:
    theirs = {name: _read(work, work.names[name]) for name in entry.names}
    tensor = entry.from_huggingface(theirs)
    # Theirs need not stay while rows are added.
    theirs.clear()
    return work.rows.fit(tensor) if entry.vocabulary else tensor


def _read(work: _Import, name: str) -> torch.Tensor:
    where, tensor = work.folder.tensors[name].file, work.folder.read(name)
    check_numbers(where, name, tensor, "; the model is damaged or had broken down in training, use another one")
    return converted(where, name, tensor, work.dtype)


def _check_tied(work: _Import) -> None:
    """A file of a tied model that holds the output layer too must hold the same numbers twice."""
    for name, other in work.plan.tied.items():
        if name not in work.folder.tensors:
            continue
        expected = {name: work.plan.names[other]}
        others = {each for each in work.folder.tensors if each != name}
        work.folder.check(expected, others.__contains__)
        if not torch.equal(work.folder.read(name), work.folder.read(work.names[other])):
            raise UserError(
                f"{work.folder.path}: config.json ties the output layer to the embedding, but {name} and {other} "
                "differ; set tie_word_embeddings to false in it if both are meant"
            )


def _source(work: _Import) -> dict[str, Any]:
    config = work.folder.config
    return {
        "format": "huggingface",
        "model": str(work.folder.path),
        "model_type": config.get("model_type"),
        **{role: config.get(role) for role in _ROLES},
        "dtypes": sorted({work.folder.tensors[name].dtype for name in work.names.values()}),
        "vocab_size": work.rows.there,
        "tokenizer_size": work.tokenizer.vocab_size,
        "own_tokenizer": _has_own_tokenizer(work),
    }


def _has_own_tokenizer(work: _Import) -> bool:
    """Whether the tokenizer is that of the model's makers, whose policy it keeps."""
    return work.tokenizer.path.resolve() == work.folder.path.resolve()


def _config(work: _Import) -> dict[str, Any]:
    """config.json as `convert to-hf` would write it, with the folder's own ids of tokens that have a role."""
    config = huggingface_config(
        work.model,
        vocab_size=work.rows.wanted,
        seq_length=work.model.max_position_embeddings or 0,
        dtype=_CONFIG_DTYPES[work.dtype],
        eod_id=work.tokenizer.eod_id,
    )
    # Ids of roles are those of the makers' tokenizer.
    for role in _ROLES if _has_own_tokenizer(work) else ():
        own = work.folder.config.get(role)
        ids = own if isinstance(own, list) else [own]
        if ids and all(type(each) is int and 0 <= each < work.rows.wanted for each in ids):
            config[role] = own
    return config
