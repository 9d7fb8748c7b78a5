"""Converts a Hugging Face model directory to a checkpoint of weights: one process, on the CPU, a tensor at a time."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from megatron_prealign.checkpoint.commit import TOKENIZER, complete_weights
from megatron_prealign.checkpoint.single_process.writer import ShardWriter
from megatron_prealign.checkpoint.state import is_weights_checkpoint, layout, weights_state
from megatron_prealign.conversion.hf_directory import HuggingFaceDirectory
from megatron_prealign.conversion.import_plan import CONFIG_DTYPES, plan_import
from megatron_prealign.conversion.tensors import TensorPlan
from megatron_prealign.conversion.tokenizer import own_class_notes
from megatron_prealign.errors import UserError
from megatron_prealign.files.atomic import new_directory
from megatron_prealign.recipe import ModelSection


@dataclass(frozen=True, kw_only=True)
class ImportResult:
    """Summary of a written checkpoint."""

    family: str
    tensors: int
    """Number of tensors in the source directory."""
    parameters: int
    bytes: int
    """Size of the written weights."""
    dtype: str
    vocab_size: int
    padded_vocab_size: int
    tokenizer_size: int
    added_rows: int
    """New rows of the embedding (and of the output layer), set to the mean of the others."""
    dropped_rows: int
    """Rows without a token, dropped to reach the requested vocabulary size."""
    notes: list[str]
    """Warnings about the tokenizer for the user."""


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
) -> ImportResult:
    """Writes the weights as a checkpoint that `pretrain --checkpoint.load` loads in any layout. Memory: twice the
    largest tensor.

    Args:
        model: Directory written by `save_pretrained`.
        output: Directory to write.
        tensor_parallel: Number of shards that matrices are written in; loading supports any number.
        pipeline_parallel: Number of stages that the layers are written in.
        dtype: bf16 or fp32; None for bf16 if the directory is all bf16, else fp32.
        tokenizer: Path of the model's tokenizer; None if it is in the directory.
        vocab_size: Number of ids; None for the number of embedding rows, or of the tokenizer's ids if it has more.
        make_vocab_size_divisible_by: The padded vocabulary size is a multiple of this times `tensor_parallel`.
        ignore_config_fields: Fields of config.json that the user declares harmless.
        allow_pickle: Read pytorch_model*.bin.
        overwrite: Replace an existing checkpoint.
        progress: Called with the bytes read so far and the total.

    Raises:
        UserError: the directory is corrupt, the model is unsupported, its tokenizer does not fit, or the output
            cannot be written.
    """
    for option, size in (("--tensor", tensor_parallel), ("--pipeline", pipeline_parallel)):
        if size < 1:
            raise UserError(f"{option} is {size}, expected a positive integer")
    plan = plan_import(
        HuggingFaceDirectory(model, allow_pickle=allow_pickle),
        tensor_parallel=tensor_parallel,
        dtype=dtype,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        divisible_by=make_vocab_size_divisible_by,
        ignore=ignore_config_fields,
    )
    _check_layout(plan.tensors, plan.model, tensor_parallel, pipeline_parallel)
    with new_directory(output, overwrite=overwrite, replaceable=is_weights_checkpoint) as working:
        # First, so that errors in it are reported before the long part.
        plan.copy_tokenizer(working / TOKENIZER)
        with ShardWriter(working, tensor_parallel=tensor_parallel, pipeline_parallel=pipeline_parallel) as writer:
            parameters = plan.write(writer, progress)
            records = writer.close()
        complete_weights(
            working,
            weights_state(plan.identity(), layout=layout(tensor_parallel, pipeline_parallel), source=plan.source()),
            config=plan.config(),
            records=records,
        )
    return ImportResult(
        family=plan.model.family,
        tensors=len(plan.stored_names),
        parameters=parameters,
        bytes=sum(record.bytes for name, record in records.items() if name.endswith(".distcp")),
        dtype=CONFIG_DTYPES[plan.dtype],
        vocab_size=plan.vocab.vocab_size,
        padded_vocab_size=plan.vocab.padded_vocab_size,
        tokenizer_size=plan.tokenizer.vocab_size,
        added_rows=max(0, plan.vocab.vocab_size - plan.vocab.source_rows),
        dropped_rows=max(0, plan.vocab.source_rows - plan.vocab.vocab_size),
        notes=own_class_notes(plan.tokenizer.path, plan.model.family),
    )


def _check_layout(tensors: TensorPlan, model: ModelSection, tensor_parallel: int, pipeline_parallel: int) -> None:
    """Checks before anything is written that the tensors can be partitioned as training in that layout would."""
    if model.num_layers % pipeline_parallel:
        raise UserError(
            f"--pipeline is {pipeline_parallel}, expected a divisor of the model's {model.num_layers} layers"
        )
    partitioned = {
        entry.shape[entry.partition_dim]
        for entry in tensors.entries
        if entry.partition_dim is not None and not entry.is_vocabulary
    } | {model.query_groups, model.num_attention_heads}
    if any(size % tensor_parallel for size in partitioned):
        raise UserError(
            f"--tensor is {tensor_parallel}, expected a common divisor of the model's heads, key/value heads and "
            f"widths ({', '.join(map(str, sorted(partitioned)))})"
        )
