"""From a checkpoint to a directory that transformers opens as it is: weights, config, tokenizer, model card.

One process on a CPU reads the checkpoint tensor by tensor, whatever layout wrote it, and writes safetensors files as it
goes. The directory gets its name when it is complete.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from megatron_prealign.checkpoint.commit import CONFIG, TOKENIZER
from megatron_prealign.checkpoint.directory import resolve_checkpoint
from megatron_prealign.checkpoint.manifest import ManifestError, find_damage, read_manifest
from megatron_prealign.checkpoint.single_process.reader import ShardReader
from megatron_prealign.checkpoint.single_process.weights import check_numbers, is_finite
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

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_POSITIONS = "embedding.position_embeddings.weight"
# What the optimizers, the plain and the distributed one, call the weights in full precision.
_MASTERS = ("optimizer.state.fp32_param.", "optimizer.state.param.")


@dataclass(frozen=True)
class ToHuggingFace:
    """What is to be written."""

    dtype: Literal["bf16", "fp16", "fp32"] | None = None
    """None is the type of the weights in the checkpoint."""
    shard_bytes: int = 5_000_000_000
    """Most bytes of a file with weights."""
    tokenizer: Literal["convert", "copy"] | None = None
    """None converts that of a run, and copies that of a model that was only brought from Hugging Face."""
    overwrite: bool = False
    """Replace a model that is there."""
    checksums: bool = False
    """Read the checkpoint's files once more before, and compare them with its manifest."""


@dataclass(frozen=True)
class ConvertResult:
    """What was written."""

    checkpoint: Path
    dtype: str
    from_masters: bool
    """Whether the numbers are the optimizer's in full precision and not the model's own."""
    tensors: int
    parameters: int
    bytes: int
    """Of the weights."""
    files: int
    """With weights."""
    notes: list[str]
    """What a user should know about the tokenizer."""


@dataclass(frozen=True)
class Source:
    """A checkpoint that was looked at."""

    directory: Path
    summary: dict[str, Any]
    model: ModelSection
    plan: TensorPlan
    seq_length: int


def open_source(directory: Path) -> Source:
    """Looks at the small files of a checkpoint.

    Raises:
        UserError: it is damaged, or its tensors are not those of its model.
    """
    summary = read_state(directory)
    try:
        model = section_of(summary["model"])
    except (RecipeValueError, TypeError) as error:
        raise UserError(f"{directory}/state.json: its model is none of this version ({error})") from error
    if summary["vocab_size"] < 1:
        raise UserError(
            f"{directory}/state.json is damaged (vocab_size {summary['vocab_size']}); use another checkpoint"
        )
    with ShardReader(directory) as reader:
        stored = {key: facts.shape for key, facts in reader.tensors.items()}
    positions = stored[_POSITIONS][0] if len(stored.get(_POSITIONS, ())) == 2 else None
    plan = TensorPlan(model, summary["vocab_size"], positions)
    _check_tensors(directory, plan, stored, summary)
    length = (summary["run"] if is_run(summary) else summary["source"]).get("seq_length")
    length = positions or model.max_position_embeddings or length
    if not isinstance(length, int):
        raise UserError(f"{directory}/state.json names no sequence length; set max_position_embeddings in its model")
    return Source(directory, summary, model, plan, length)


def check_manifest(directory: Path, *, checksums: bool) -> None:
    """Compares a checkpoint with its manifest.

    Raises:
        UserError: it is damaged; all files are named.
    """
    try:
        records = read_manifest(directory)
        if checksums:
            total = sum(record.bytes for record in records.values())
            with Progress("verify checkpoint", total, unit="B", unit_scale=True) as progress:
                problems = find_damage(directory, records, checksums=True, progress=progress.update)
        else:
            problems = find_damage(directory, records, checksums=False)
    except ManifestError as error:
        problems = [str(error)]
    if problems:
        raise UserError(
            f"{directory} is damaged ({shortened(problems, separator='; ')}); use another checkpoint or copy it again"
        )


def _check_tensors(directory: Path, plan: TensorPlan, stored: dict[str, Any], summary: dict[str, Any]) -> None:
    vocabulary = {entry.key for entry in plan.entries if entry.vocabulary}
    problems = []
    for key, shape in plan.stacks.items():
        found = stored.get(key)
        if found is None:
            problems.append(f"{key} is missing")
        # Rows behind the vocabulary only pad it.
        elif found != shape and not (key in vocabulary and found[1:] == shape[1:] and found[0] >= shape[0]):
            problems.append(f"{key} is {list(found)}, expected {list(shape)}")
    if problems:
        raise UserError(
            f"{directory}: the weights are not those of the model in its state.json "
            f"({summary['model'].get('family')}): "
            f"{shortened(problems, separator='; ')}; use another checkpoint"
        )


def read_weights(source: Source, dtype: torch.dtype | None = None) -> Iterator[tuple[Entry, dict[str, torch.Tensor]]]:
    """Every tensor of a checkpoint as transformers has it, in the order of the model.

    Memory: one tensor of the checkpoint and what is made of it.

    Args:
        dtype: Of the results; None leaves them as they are. float32 takes the optimizer's own numbers where they are
            in the checkpoint.

    Yields:
        The entry, and name -> tensor.

    Raises:
        UserError: the checkpoint is damaged, or a number is NaN, infinite or too large for `dtype`.
    """
    with ShardReader(source.directory) as reader:
        prefix = masters_of(reader, dtype) or ""
        broke = is_run(source.summary)
        advice = ": the training had broken down; use an older checkpoint" if broke else "; use other weights"
        for entry in source.plan.entries:
            mcore = reader.read(prefix + entry.key, entry.layer)
            if entry.vocabulary:
                mcore = mcore[: entry.shape[0]]
            name = entry.key if entry.layer is None else f"{entry.key}, layer {entry.layer}"
            check_numbers(source.directory, name, mcore, advice)
            if dtype is not None and mcore.dtype is not dtype:
                converted = mcore.to(dtype)
                if not is_finite(converted):
                    raise UserError(
                        f"{source.directory}: {name} has numbers up to {float(mcore.abs().max()):.3g}, too large for "
                        f"{dtype}; choose bf16 or fp32"
                    )
                mcore = converted
            yield entry, entry.to_huggingface(mcore)


def masters_of(reader: ShardReader, dtype: torch.dtype | None) -> str | None:
    """What stands before the names of the optimizer's weights in full precision; None where they are not there or where
    `dtype` has no use for them."""
    if dtype is not torch.float32:
        return None
    embedding = "embedding.word_embeddings.weight"
    if reader.tensors[embedding].dtype is torch.float32:
        return None
    return next((prefix for prefix in _MASTERS if prefix + embedding in reader.tensors), None)


def to_huggingface(
    path: str | Path,
    output: Path,
    options: ToHuggingFace,
    *,
    history: History | None = None,
    show_progress: bool = True,
) -> ConvertResult:
    """Writes a checkpoint as a directory for transformers.

    Memory: the largest tensor twice, and what transformers needs to open the tokenizer.

    Args:
        path: The checkpoint, a directory of checkpoints or a run's directory.
        output: Directory to write.
        history: What the run's metrics say, for the model card.

    Raises:
        UserError: the checkpoint is damaged, its numbers or its tokenizer cannot be carried over, or the output cannot
            be written; nothing is left of it then.
    """
    directory = resolve_checkpoint(path)
    if output.resolve() == directory.resolve():
        raise UserError(f"--output is {output}, the checkpoint itself; choose another path")
    check_new_directory(output, overwrite=options.overwrite, replaceable=is_model_directory)
    check_manifest(directory, checksums=options.checksums)
    source = open_source(directory)
    with ShardReader(source.directory) as reader:
        stored = reader.tensors[source.plan.entries[0].key].dtype
        dtype = DTYPES[options.dtype] if options.dtype is not None else stored
        masters = masters_of(reader, dtype) is not None
    with new_directory(output, overwrite=options.overwrite, replaceable=is_model_directory) as working:
        # First what can be refused in seconds.
        exported, notes = _write_tokenizer(source, working, options, _dtype_name(dtype))
        with SafetensorsWriter(working, source.plan.names, dtype, options.shard_bytes) as writer:
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
        converted = ConvertResult(
            source.directory,
            _dtype_name(dtype),
            masters,
            len(source.plan.names),
            parameters,
            written,
            files,
            notes,
        )
        card = model_card(
            output.name, source.directory, source.summary, source.model, source.seq_length, converted, exported, history
        )
        (working / "README.md").write_text(card, encoding="utf-8")
    return converted


def is_model_directory(directory: Path) -> bool:
    """Whether there is a model of transformers, which may be replaced by another."""
    return (directory / "config.json").is_file() and any(directory.glob("*.safetensors*"))


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _write_tokenizer(
    source: Source, working: Path, options: ToHuggingFace, dtype: str
) -> tuple[TokenizerExport, list[str]]:
    """Writes tokenizer, config.json and generation_config.json, and opens the tokenizer with transformers."""
    directory, vocab_size = source.directory / TOKENIZER, source.summary["vocab_size"]
    mode = options.tokenizer or ("copy" if came_from_huggingface(source.summary) else "convert")
    if mode == "copy":
        exported = export_unchanged(directory, working)
    else:
        exported = export_tokenizer(directory, working, family=source.model.family, max_length=source.seq_length)
    config = huggingface_config(
        source.model, vocab_size=vocab_size, seq_length=source.seq_length, dtype=dtype, eod_id=exported.eod_id
    )
    generation: dict[str, Any] = {"bos_token_id": exported.eod_id, "eos_token_id": exported.eod_id}
    if came_from_huggingface(source.summary):
        own = _hf_added_tokens(source.directory)
        config |= own
        generation |= own
    write_json(working / "config.json", config)
    write_json(working / "generation_config.json", generation)
    _check_config(source, working)
    found = (
        _copy_notes(directory, working, vocab_size)
        if mode == "copy"
        else check_tokenizer(directory, working, vocab_size)
    )
    return exported, [*exported.notes, *_policy_notes(source.summary), *found]


def _copy_notes(directory: Path, working: Path, vocab_size: int) -> list[str]:
    """What a user should know of files that are as their makers left them; what these put around a text is no
    difference."""
    problem, notes = compare_tokenizer(directory, working, vocab_size, add_special_tokens=False)
    if not problem:
        return notes
    return [f"The tokenizer was copied as its makers left it, but {problem}; --tokenizer convert keeps the ids."]


def _check_config(source: Source, working: Path) -> None:
    """Opens config.json: versions of transformers refuse shapes that others take, and that train."""
    import transformers

    try:
        transformers.AutoConfig.from_pretrained(str(working), local_files_only=True)
    except Exception as error:  # transformers raises many kinds.
        raise UserError(
            f"{source.directory}: transformers {transformers.__version__} does not open a {source.model.family} of "
            "this "
            f"shape ({' '.join(str(error).split())}); another version of it may"
        ) from error


def _policy_notes(summary: dict[str, Any]) -> list[str]:
    """What the sidecars of the training data say that the tokenizer's config cannot, where they are still there."""
    run = summary.get("run") or {}
    notes = []
    for item in run.get("sources") or []:
        try:
            sidecar = load_sidecar(item["path"])
        except (UserError, KeyError, TypeError):
            continue
        if sidecar.bos:
            notes.append(f"Documents of `{Path(item['path']).name}` began with a BOS token.")
        if not sidecar.append_eod:
            notes.append(f"Documents of `{Path(item['path']).name}` had no end-of-document token.")
    return notes


def came_from_huggingface(summary: dict[str, Any]) -> bool:
    """Whether the weights and their tokenizer were only brought here: it keeps the policy of those who trained them."""
    source = {} if is_run(summary) else summary["source"]
    return source.get("format") == "huggingface" and bool(source["own_tokenizer"])


def _hf_added_tokens(directory: Path) -> dict[str, Any]:
    """Ids with a role, as the model that was brought here had them."""
    try:
        content = json.loads((directory / CONFIG).read_bytes())
    except (OSError, ValueError):
        return {}
    roles = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: content[name] for name in roles if content.get(name) is not None}
