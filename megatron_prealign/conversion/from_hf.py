"""A Hugging Face model directory becomes a checkpoint of weights: one process, CPU, a tensor at a time."""

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
    """What was written."""

    family: str
    tensors: int
    """In the files of the directory that was read."""
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
    """Writes the weights as a checkpoint that `pretrain --checkpoint.load` takes in any layout. Memory: twice the
    largest tensor.

    Args:
        model: Directory as `save_pretrained` writes it.
        output: Directory to write.
        tensor_parallel: In how many parts matrices are written; loading takes any number.
        pipeline_parallel: In how many parts the layers are written.
        dtype: bf16 or fp32; None for bf16 if that is what the directory has, else fp32.
        tokenizer: Of the model; None if it is in its directory.
        vocab_size: Number of ids; None for that of the embedding, or of the tokenizer if it has more.
        make_vocab_size_divisible_by: The written vocabulary is a multiple of this times `tensor_parallel`.
        ignore_config_fields: Fields of config.json that the user vouches for.
        allow_pickle: Read pytorch_model*.bin.
        overwrite: Replace a checkpoint that is there.
        progress: Told the bytes read so far and in all.

    Raises:
        UserError: the directory is damaged or of a model that cannot be converted, its tokenizer does not fit, or the
            output cannot be written.
    """
    for name, parts in (("--tensor", tensor_parallel), ("--pipeline", pipeline_parallel)):
        if parts < 1:
            raise UserError(f"{name} is {parts}, expected a number above 0")
    work = plan_import(
        HuggingFaceDirectory(model, allow_pickle=allow_pickle),
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
        work.copy_tokenizer(working / TOKENIZER)
        with ShardWriter(working, tensor_parallel=tensor_parallel, pipeline_parallel=pipeline_parallel) as writer:
            parameters = work.write(writer, progress)
            records = writer.close()
        complete_weights(
            working,
            weights_state(work.identity(), layout=layout(tensor_parallel, pipeline_parallel), source=work.source()),
            config=work.config(),
            records=records,
        )
    return ImportResult(
        family=work.model.family,
        tensors=len(work.names),
        parameters=parameters,
        bytes=sum(record.bytes for name, record in records.items() if name.endswith(".distcp")),
        dtype=CONFIG_DTYPES[work.dtype],
        vocab_size=work.rows.wanted,
        padded_vocab_size=work.rows.padded,
        tokenizer_size=work.tokenizer.vocab_size,
        added_rows=max(0, work.rows.wanted - work.rows.there),
        dropped_rows=max(0, work.rows.there - work.rows.wanted),
        notes=own_class_notes(work.tokenizer.path, work.model.family),
    )


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
