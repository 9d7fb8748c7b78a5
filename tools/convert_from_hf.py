"""`megatron-prealign convert from-hf`: a Hugging Face model becomes a checkpoint to train on from."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_prealign.cli import parse_options


@dataclass(frozen=True, kw_only=True)
class FromHfOptions:
    """Makes a checkpoint of the weights of a Hugging Face model, for `pretrain --checkpoint.load` in any layout.

    OUTPUT/model.yaml is the section `model` of a recipe for it. Needs no GPU, and memory for twice the largest tensor.
    """

    model: str
    """Folder with config.json, safetensors and the tokenizer, as save_pretrained writes it."""
    output: str
    """Folder to write."""
    tensor: int = 1
    """In how many parts matrices are written; best tensor_model_parallel_size, but any loads."""
    pipeline: int = 1
    """In how many parts the layers are written; best pipeline_model_parallel_size, but any loads."""
    dtype: Literal["bf16", "fp32"] | None = None
    """Type of the weights; by default bf16 if that is what the folder has, else fp32."""
    tokenizer: str | None = None
    """Tokenizer folder or sentencepiece file; by default that in the model's folder."""
    vocab_size: int | None = None
    """Number of ids; by default the rows of the embedding, or the tokenizer's ids if there are more of them."""
    make_vocab_size_divisible_by: int = 128
    """The padded vocabulary is a multiple of this times --tensor."""
    ignore_config_field: list[str] = field(default_factory=list)
    """Fields of config.json that are not known and do not change the maths, as you know."""
    allow_pickle: bool = False
    """Read pytorch_model*.bin where there are no safetensors, by torch's weights_only, which runs no code."""
    overwrite: bool = False
    """Replace a checkpoint that is there."""


def from_hf(argv: Sequence[str]) -> int:
    """Runs `convert from-hf`."""
    options = parse_options(FromHfOptions, "convert from-hf", argv)

    from megatron_prealign.checkpoint.listing import readable_bytes
    from megatron_prealign.conversion.from_hf import from_huggingface
    from megatron_prealign.progress import Progress

    bar: Progress | None = None
    done = 0

    def show(now: int, total: int) -> None:
        nonlocal bar, done
        bar = bar or Progress("converting", total, unit="B", unit_scale=True)
        bar.update(now - done)
        done = now

    try:
        written = from_huggingface(
            Path(options.model),
            Path(options.output),
            tensor_parallel=options.tensor,
            pipeline_parallel=options.pipeline,
            dtype=options.dtype,
            tokenizer=None if options.tokenizer is None else Path(options.tokenizer),
            vocab_size=options.vocab_size,
            make_vocab_size_divisible_by=options.make_vocab_size_divisible_by,
            ignore_config_fields=options.ignore_config_field,
            allow_pickle=options.allow_pickle,
            overwrite=options.overwrite,
            progress=show,
        )
    finally:
        if bar is not None:
            bar.close()
    print(f"wrote {options.output}: {written.family}, {written.parameters:,} parameters, {written.dtype}")
    print(f"tensors     {written.tensors:,} of theirs, {readable_bytes(written.bytes)}")
    print(
        f"vocabulary  {written.vocab_size:,} ids, padded to {written.padded_vocab_size:,}; the tokenizer has "
        f"{written.tokenizer_size:,}"
    )
    if written.added_rows:
        print(f"added       {written.added_rows:,} rows, each the mean of those with a token")
    if written.dropped_rows:
        print(f"left out    {written.dropped_rows:,} rows without a token")
    print(
        f"train it    pretrain --config {options.output}/model.yaml --config my.yaml --checkpoint.load {options.output}"
    )
    return 0
