"""Converts a checkpoint to a directory that transformers loads directly: weights, config, tokenizer, model card.

One process on a CPU streams the checkpoint tensor by tensor, in any parallel layout, into safetensors files. The
directory gets its final name when it is complete.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from megatron_prealign.checkpoint.commit import CONFIG, TOKENIZER
from megatron_prealign.checkpoint.directory import resolve_checkpoint
from megatron_prealign.checkpoint.single_process.intact import check_intact
from megatron_prealign.checkpoint.single_process.reader import ShardReader
from megatron_prealign.checkpoint.single_process.weights import check_finite, is_finite
from megatron_prealign.checkpoint.state import is_run, read_state
from megatron_prealign.conversion.card import History, model_card
from megatron_prealign.conversion.config import huggingface_config, section_of
from megatron_prealign.conversion.safetensors_shards import SafetensorsWriter
from megatron_prealign.conversion.tensors import Entry, TensorPlan
from megatron_prealign.conversion.tokenizer import (
    TokenizerExport,
    check_tokenizer,
    compare_tokenizer,
    export_tokenizer,
    export_unchanged,
    write_json,
)
from megatron_prealign.data.sidecar import load_sidecar
from megatron_prealign.errors import UserError, shortened
from megatron_prealign.files.atomic import check_new_directory, new_directory
from megatron_prealign.progress import Progress
from megatron_prealign.recipe import ModelSection, RecipeValueError
from megatron_prealign.recipe.checkpoint import Verify

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_POSITIONS = "embedding.position_embeddings.weight"
# Prefixes of the fp32 master weights in the plain and in the distributed optimizer.
_MASTER_PREFIXES = ("optimizer.state.fp32_param.", "optimizer.state.param.")


@dataclass(frozen=True)
class ConvertSettings:
    """How a checkpoint is converted."""

    dtype: Literal["bf16", "fp16", "fp32"] | None = None
    """Dtype of the written weights; None for that of the checkpoint."""
    shard_bytes: int = 5_000_000_000
    """Maximum size of a weight file."""
    tokenizer: Literal["convert", "copy"] | None = None
    """None converts the tokenizer of a run, and copies that of an imported model that was not trained since."""
    overwrite: bool = False
    """Replace an existing model."""
    verify: Verify = "checksums"
    """How to verify the checkpoint first."""


@dataclass(frozen=True)
class ConvertResult:
    """Summary of a written model directory."""

    checkpoint: Path
    dtype: str
    from_master_weights: bool
    """Whether the weights are the optimizer's fp32 master weights and not the model's own."""
    tensors: int
    parameters: int
    bytes: int
    """Size of the weights."""
    files: int
    """Number of weight files."""
    notes: list[str]
    """Warnings about the tokenizer for the user."""


@dataclass(frozen=True)
class SourceCheckpoint:
    """A checkpoint whose small files were read and checked."""

    directory: Path
    summary: dict[str, Any]
    model: ModelSection
    plan: TensorPlan
    seq_length: int
    dtype: torch.dtype
    """Dtype of the weights."""


def open_checkpoint(directory: Path) -> SourceCheckpoint:
    """Reads and checks the small files of a checkpoint.

    Raises:
        UserError: it is corrupt, or its tensors do not match its model.
    """
    summary = read_state(directory)
    try:
        model = section_of(summary["model"])
    except (RecipeValueError, TypeError) as error:
        raise UserError(f"{directory}/state.json: model not supported by this version: {error}") from error
    if summary["vocab_size"] < 1:
        raise UserError(
            f"{directory}/state.json is corrupt: vocab_size is {summary['vocab_size']}; use another checkpoint"
        )
    with ShardReader(directory) as reader:
        tensors = reader.tensors
    stored = {key: tensor.shape for key, tensor in tensors.items()}
    positions = stored[_POSITIONS][0] if len(stored.get(_POSITIONS, ())) == 2 else None
    plan = TensorPlan(model, summary["vocab_size"], positions)
    _check_tensors(directory, plan, stored, summary)
    length = (summary["run"] if is_run(summary) else summary["source"]).get("seq_length")
    length = positions or model.max_position_embeddings or length
    if not isinstance(length, int):
        raise UserError(
            f"{directory}/state.json: sequence length is missing; set max_position_embeddings in its model section"
        )
    return SourceCheckpoint(directory, summary, model, plan, length, tensors[plan.entries[0].key].dtype)


def _check_tensors(directory: Path, plan: TensorPlan, stored: dict[str, Any], summary: dict[str, Any]) -> None:
    vocabulary = {entry.key for entry in plan.entries if entry.is_vocabulary}
    problems = []
    for key, shape in plan.checkpoint_shapes.items():
        got = stored.get(key)
        if got is None:
            problems.append(f"{key} is missing")
        # Rows after the vocabulary are padding.
        elif got != shape and not (key in vocabulary and got[1:] == shape[1:] and got[0] >= shape[0]):
            problems.append(f"{key} is {list(got)}, expected {list(shape)}")
    if problems:
        raise UserError(
            f"{directory}: weights do not match the model in state.json ({summary['model'].get('family')}): "
            f"{shortened(problems, separator='; ')}; use another checkpoint"
        )


def read_weights(
    source: SourceCheckpoint, dtype: torch.dtype | None = None
) -> Iterator[tuple[Entry, dict[str, torch.Tensor]]]:
    """Yields every tensor of a checkpoint as Hugging Face tensors, in the order of the model.

    Memory: one tensor of the checkpoint and the tensors converted from it.

    Args:
        dtype: Dtype of the results; None keeps that of the checkpoint. float32 reads the optimizer's fp32 master
            weights if the checkpoint has them.

    Yields:
        The entry, and name -> Hugging Face tensor.

    Raises:
        UserError: the checkpoint is corrupt, or a value is NaN, infinite or too large for `dtype`.
    """
    with ShardReader(source.directory) as reader:
        prefix = master_weights_prefix(reader, dtype) or ""
        trained = is_run(source.summary)
        advice = "; training diverged, use an older checkpoint" if trained else "; use other weights"
        for entry in source.plan.entries:
            mcore = reader.read(prefix + entry.key, entry.layer)
            if entry.is_vocabulary:
                mcore = mcore[: entry.shape[0]]
            name = entry.key if entry.layer is None else f"{entry.key}, layer {entry.layer}"
            check_finite(source.directory, name, mcore, advice)
            if dtype is not None and mcore.dtype is not dtype:
                converted = mcore.to(dtype)
                if not is_finite(converted):
                    raise UserError(
                        f"{source.directory}: {name} has values up to {float(mcore.abs().max()):.3g}, too large for "
                        f"{dtype}; use bf16 or fp32"
                    )
                mcore = converted
            yield entry, entry.to_huggingface(mcore)


def master_weights_prefix(reader: ShardReader, dtype: torch.dtype | None) -> str | None:
    """Prefix of the optimizer's fp32 master weights; None if the checkpoint has none or `dtype` does not need them."""
    if dtype is not torch.float32:
        return None
    embedding = "embedding.word_embeddings.weight"
    if reader.tensors[embedding].dtype is torch.float32:
        return None
    return next((prefix for prefix in _MASTER_PREFIXES if prefix + embedding in reader.tensors), None)


def to_huggingface(
    path: str | Path,
    output: Path,
    settings: ConvertSettings,
    *,
    history: History | None = None,
    show_progress: bool = True,
) -> ConvertResult:
    """Writes a checkpoint as a model directory for transformers.

    Memory: the largest tensor twice, and what transformers needs to load the tokenizer.

    Args:
        path: The checkpoint, a directory of checkpoints or a run directory.
        output: Directory to write.
        history: Metrics of the run, for the model card.

    Raises:
        UserError: the checkpoint is corrupt, its values or its tokenizer cannot be converted, or the output cannot be
            written; the incomplete output is removed.
    """
    directory = resolve_checkpoint(path)
    if output.resolve() == directory.resolve():
        raise UserError(f"--output {output} is the checkpoint itself; choose another path")
    check_new_directory(output, overwrite=settings.overwrite, replaceable=is_model_directory)
    check_intact(directory, settings.verify)
    source = open_checkpoint(directory)
    dtype = source.dtype if settings.dtype is None else DTYPES[settings.dtype]
    with ShardReader(source.directory) as reader:
        from_master_weights = master_weights_prefix(reader, dtype) is not None
    with new_directory(output, overwrite=settings.overwrite, replaceable=is_model_directory) as working:
        # First the part that can fail within seconds.
        exported, notes = write_config_and_tokenizer(source, working, dtype, settings.tokenizer)
        with SafetensorsWriter(working, source.plan.hf_shapes, dtype, settings.shard_bytes) as writer:
            with Progress(
                "write weights", writer.total_bytes, unit="B", unit_scale=True, enabled=show_progress
            ) as progress:
                for _, hf in read_weights(source, dtype):
                    for name, tensor in hf.items():
                        writer.add(name, tensor)
                        progress.update(tensor.nbytes)
                writer.close()
            written, files = writer.total_bytes, len(writer.files)
        parameters = written // dtype.itemsize
        result = ConvertResult(
            source.directory,
            _dtype_name(dtype),
            from_master_weights,
            len(source.plan.hf_shapes),
            parameters,
            written,
            files,
            notes,
        )
        card = model_card(
            output.name, source.directory, source.summary, source.model, source.seq_length, result, exported, history
        )
        (working / "README.md").write_text(card, encoding="utf-8")
    return result


def is_model_directory(directory: Path) -> bool:
    """Whether the directory contains a transformers model, which may be overwritten."""
    return (directory / "config.json").is_file() and any(directory.glob("*.safetensors*"))


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def write_config_and_tokenizer(
    source: SourceCheckpoint, working: Path, dtype: torch.dtype, tokenizer: Literal["convert", "copy"] | None = None
) -> tuple[TokenizerExport, list[str]]:
    """Writes tokenizer, config.json and generation_config.json, and checks that transformers can load them.

    Args:
        working: Existing directory to write into.
        dtype: Dtype of the written weights.
        tokenizer: `ConvertSettings.tokenizer`.

    Returns:
        Summary of the tokenizer; warnings for the user.

    Raises:
        UserError: transformers does not support the model's shape or cannot reproduce the ids of the tokenizer.
    """
    directory, vocab_size = source.directory / TOKENIZER, source.summary["vocab_size"]
    mode = tokenizer or ("copy" if is_imported(source.summary) else "convert")
    if mode == "copy":
        exported = export_unchanged(directory, working)
    else:
        exported = export_tokenizer(directory, working, family=source.model.family, max_length=source.seq_length)
    config = huggingface_config(
        source.model,
        vocab_size=vocab_size,
        seq_length=source.seq_length,
        dtype=_dtype_name(dtype),
        eod_id=exported.eod_id,
    )
    generation: dict[str, Any] = {"bos_token_id": exported.eod_id, "eos_token_id": exported.eod_id}
    if is_imported(source.summary):
        own = _hf_token_roles(source.directory)
        config |= own
        generation |= own
    write_json(working / "config.json", config)
    write_json(working / "generation_config.json", generation)
    _check_config(source, working)
    notes = (
        _copy_notes(directory, working, vocab_size)
        if mode == "copy"
        else check_tokenizer(directory, working, vocab_size)
    )
    return exported, [*exported.notes, *_policy_notes(source.summary), *notes]


def _copy_notes(directory: Path, working: Path, vocab_size: int) -> list[str]:
    """Warnings about tokenizer files that are copied unchanged; special tokens they add around a text do not count."""
    problem, notes = compare_tokenizer(directory, working, vocab_size, add_special_tokens=False)
    if not problem:
        return notes
    return [f"The tokenizer was copied unchanged, but {problem}; use --tokenizer convert to keep the ids."]


def _check_config(source: SourceCheckpoint, working: Path) -> None:
    """Loads config.json: some versions of transformers refuse shapes that other versions, and training, accept."""
    import transformers

    try:
        transformers.AutoConfig.from_pretrained(str(working), local_files_only=True)
    except Exception as error:  # transformers raises many types.
        raise UserError(
            f"{source.directory}: transformers {transformers.__version__} does not support a {source.model.family} of "
            f"this shape: {' '.join(str(error).split())}; try another version of transformers"
        ) from error


def _policy_notes(summary: dict[str, Any]) -> list[str]:
    """Notes on the training data that the tokenizer's config cannot express, from the sidecars that still exist."""
    run = summary.get("run") or {}
    notes = []
    for item in run.get("sources") or []:
        try:
            sidecar = load_sidecar(item["path"])
        except (UserError, KeyError, TypeError):
            continue
        if sidecar.bos:
            notes.append(f"Documents of `{Path(item['path']).name}` started with a BOS token.")
        if not sidecar.append_eod:
            notes.append(f"Documents of `{Path(item['path']).name}` had no end-of-document token.")
    return notes


def is_imported(summary: dict[str, Any]) -> bool:
    """Whether the weights were imported with their own tokenizer and not trained since; its policy is then kept."""
    source = {} if is_run(summary) else summary["source"]
    return source.get("format") == "huggingface" and bool(source["own_tokenizer"])


def _hf_token_roles(directory: Path) -> dict[str, Any]:
    """Special token ids of the imported model."""
    try:
        content = json.loads((directory / CONFIG).read_bytes())
    except (OSError, ValueError):
        return {}
    roles = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: content[name] for name in roles if content.get(name) is not None}
