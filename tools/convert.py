"""`megatron-prealign convert`: converts checkpoints to and from Hugging Face, and verifies the result."""

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from megatron_prealign.cli.actions import Actions, run_action
from megatron_prealign.cli.options import parse_options
from megatron_prealign.errors import UserError
from megatron_prealign.progress import Progress
from megatron_prealign.recipe.checkpoint import Verify
from megatron_prealign.recipe.describe import PathText
from megatron_prealign.resources import use_huge_pages
from megatron_prealign.text import closing, command, next_line, plural, readable_bytes

if TYPE_CHECKING:
    from megatron_prealign.conversion.card import History

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(kB|KB|MB|GB|TB|B)?")
_UNITS = {"B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
# Smallest accepted --shard-size; smaller values are typing errors.
_MIN_SHARD_BYTES = 1_000_000


@dataclass(frozen=True, kw_only=True)
class ToHfOptions:
    """Converts a checkpoint to a Hugging Face model directory: weights, config, tokenizer and model card.

    Runs in one process on a CPU. The parallel layout of the checkpoint does not affect the written files.
    """

    checkpoint: PathText
    """Checkpoint, or a checkpoint directory or run directory, whose newest checkpoint is used."""
    output: PathText
    """Output directory; it appears under this name only when complete."""
    dtype: Literal["bf16", "fp16", "fp32"] | None = None
    """Output dtype; by default, the dtype of the weights in the checkpoint, bf16 for a bf16 run.

    fp32 for a bf16 run uses the optimizer's fp32 master weights if the checkpoint has them.
    """
    shard_size: str = "5GB"
    """Maximum size of a weight file, such as 500MB or 5GB (GB = 10^9 bytes)."""
    tokenizer: Literal["convert", "copy"] | None = None
    """convert writes a tokenizer.json and checks that it gives the same ids; copy keeps the files unchanged and reports
    differing ids.

    By default, convert; copy for weights imported from Hugging Face with their own tokenizer and not trained since.
    """
    verify: Verify = "checksums"
    """How to verify the checkpoint first: checksums reads all files, sizes compares only their sizes."""
    overwrite: bool = False
    """Replace an existing model directory."""


@dataclass(frozen=True, kw_only=True)
class FromHfOptions:
    """Converts a Hugging Face model directory to a checkpoint of weights, which pretrain --checkpoint.load loads in any
    parallel layout.

    Runs in one process on a CPU. The output contains model.yaml, the matching `model` section of a recipe.
    """

    model: PathText
    """Hugging Face model directory as written by save_pretrained: config.json, safetensors, tokenizer."""
    output: PathText
    """Output directory; it appears under this name only when complete."""
    tensor: int = 1
    """Tensor-parallel size of the written checkpoint; loading supports any other."""
    pipeline: int = 1
    """Pipeline-parallel size of the written checkpoint; loading supports any other."""
    dtype: Literal["bf16", "fp32"] | None = None
    """Output dtype; by default, bf16 if all weights are bf16, otherwise (fp16 included) fp32."""
    tokenizer: PathText | None = None
    """Tokenizer of the model, if it is not in the model directory."""
    vocab_size: int | None = None
    """Vocabulary size; by default, the rows of the embedding, or the ids of the tokenizer if it has more."""
    make_vocab_size_divisible_by: int = 128
    """Pad the vocabulary size to a multiple of this value times --tensor."""
    ignore_config_field: list[str] = field(default_factory=list)
    """Unknown fields of config.json to ignore; use only for fields that do not affect the computation."""
    allow_pickle: bool = False
    """Read pytorch_model*.bin if there are no safetensors files."""
    overwrite: bool = False
    """Replace an existing checkpoint of weights."""


def from_hf(argv: Sequence[str]) -> int:
    options = parse_options(FromHfOptions, "convert from-hf", argv)

    from megatron_prealign.conversion.from_hf import from_huggingface

    with _ReadProgress("read weights") as progress:
        result = from_huggingface(
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
            progress=progress,
        )
    print(f"family      {result.family}")
    print(f"weights     {plural(result.parameters, 'parameter')} in {plural(result.tensors, 'tensor')}, {result.dtype}")
    print(f"files       {readable_bytes(result.bytes)}")
    print(
        f"vocabulary  {result.vocab_size:,} ids, padded to {result.padded_vocab_size:,}; the tokenizer has "
        f"{result.tokenizer_size:,}"
    )
    if result.added_rows:
        print(f"note: added {plural(result.added_rows, 'row')} to the embedding, set to the mean of the others")
    if result.dropped_rows:
        print(f"note: dropped {plural(result.dropped_rows, 'row')} of the embedding without a token")
    for note in result.notes:
        print(f"note: {note}")
    output = Path(options.output)
    train = command(
        *("pretrain", "--config", "recipe.yaml", "--config", output / "model.yaml", "--checkpoint.load", output),
        *("--data.tokenizer", output / "tokenizer", "--validate"),
    )
    print(closing(f"wrote {output}: {plural(result.parameters, 'parameter')}, {readable_bytes(result.bytes)}", train))
    return 0


class _ReadProgress:
    """A progress bar updated with the bytes done so far and the total, which is known only at the first update."""

    def __init__(self, description: str) -> None:
        self._description = description
        self._bar: Progress | None = None
        self._done = 0

    def __enter__(self) -> "_ReadProgress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, done: int, total: int) -> None:
        if self._bar is None:
            self._bar = Progress(self._description, total, unit="B", unit_scale=True)
        self._bar.update(done - self._done)
        self._done = done


def to_hf(argv: Sequence[str]) -> int:
    options = parse_options(ToHfOptions, "convert to-hf", argv)
    shard_bytes = parse_size(options.shard_size, "--shard-size")

    from megatron_prealign.checkpoint.directory import resolve_checkpoint
    from megatron_prealign.conversion.to_hf import ConvertSettings, to_huggingface

    settings = ConvertSettings(
        dtype=options.dtype,
        shard_bytes=shard_bytes,
        tokenizer=options.tokenizer,
        overwrite=options.overwrite,
        verify=options.verify,
    )
    output = Path(options.output)
    checkpoint = resolve_checkpoint(options.checkpoint)
    result = to_huggingface(checkpoint, output, settings, history=_history(checkpoint))
    origin = " (the optimizer's fp32 master weights)" if result.from_master_weights else ""
    print(f"checkpoint  {result.checkpoint}")
    tensors = plural(result.tensors, "tensor")
    print(f"weights     {plural(result.parameters, 'parameter')} in {tensors}, {result.dtype}{origin}")
    print(f"files       {result.files:,}, {readable_bytes(result.bytes)}")
    for note in result.notes:
        print(f"note: {note}")
    print(
        closing(
            f"wrote {output}: {plural(result.parameters, 'parameter')}, {readable_bytes(result.bytes)}",
            command("convert", "verify", "--checkpoint", result.checkpoint, "--model", output),
        )
    )
    return 0


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """Verifies that a checkpoint and a Hugging Face model directory are the same model: compares every tensor, the
    tokenizer, and the hidden states of every layer and the logits on a text. Exit status 0 if they match, 1 if not.

    Both models run on the CPU in fp32, one after the other.
    """

    checkpoint: PathText
    """Checkpoint, or a checkpoint directory or run directory, whose newest checkpoint is used."""
    model: PathText
    """Hugging Face model directory."""
    text: PathText | None = None
    """UTF-8 text file to run through both models; by default, a short built-in text."""
    tolerance: float = 1e-4
    """Tolerance of hidden states and logits, relative to their largest value."""
    logits: bool = True
    """Run both models and compare hidden states and logits; needs memory for one model in fp32."""
    ignore_config_field: list[str] = field(default_factory=list)
    """Unknown fields of config.json to ignore; use only for fields that do not affect the computation."""
    verify: Verify = "checksums"
    """How to verify the checkpoint first: checksums reads all files, sizes compares only their sizes."""
    output: PathText | None = None
    """JSON file to write the full report to."""
    overwrite: bool = False
    """Replace an existing report."""


def verify(argv: Sequence[str]) -> int:
    options = parse_options(VerifyOptions, "convert verify", argv)
    if not options.tolerance >= 0:
        raise UserError(f"--tolerance is {options.tolerance}, expected a non-negative number")
    if options.logits:
        _check_one_process()

    import json

    from megatron_prealign.runtime import log

    log.configure()
    from megatron_prealign.conversion.verify import DEFAULT_TEXT, render
    from megatron_prealign.conversion.verify import verify as compare
    from megatron_prealign.files.atomic import write_atomically
    from megatron_prealign.files.directories import check_output_file

    check_output_file(options.output, overwrite=options.overwrite)
    report = compare(
        options.checkpoint,
        Path(options.model),
        text=DEFAULT_TEXT if options.text is None else _read_text(Path(options.text)),
        tolerance=options.tolerance,
        logits=options.logits,
        ignore_config_fields=options.ignore_config_field,
        files=options.verify,
    )
    print("\n".join(render(report)))
    if options.output is not None:
        with write_atomically(Path(options.output)) as temporary:
            temporary.write_text(json.dumps(report.to_dict(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"wrote {options.output}")
    if not report.agrees:
        print(next_line(command("checkpoint", "verify", options.checkpoint)))
    return 0 if report.agrees else 1


def _check_one_process() -> None:
    """Raises in each of several processes, which torch would connect to run the model."""
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1":
        error = UserError(
            f"convert verify: got {processes} processes (WORLD_SIZE), expected one; start it without torchrun, or use "
            "--no-logits"
        )
        error.agreed = True
        raise error


def _read_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read --text {path} as UTF-8: {error}; use another file") from error
    if not text:
        raise UserError(f"--text {path} is empty; use a file with words")
    return text


def parse_size(text: str, option: str) -> int:
    """Parses a size such as 5GB into bytes.

    Raises:
        UserError: not a size, or less than 1 MB.
    """
    match = _SIZE.fullmatch(text.strip())
    size = int(float(match[1]) * _UNITS[match[2] or "B"]) if match else 0
    if size < _MIN_SHARD_BYTES:
        raise UserError(f"{option} is {text!r}, expected a size of at least 1MB such as 500MB or 5GB")
    return size


def _history(checkpoint: Path) -> "History | None":
    """Metrics of the checkpoint's run up to its step; None if they are no longer in its run directory."""
    from megatron_prealign.checkpoint.directory import step_of
    from megatron_prealign.conversion.card import Evaluation, History
    from megatron_prealign.evaluation.run_record import load_run
    from megatron_prealign.training.metrics_file import METRICS_FILE

    run_dir, step = checkpoint.resolve().parent.parent, step_of(checkpoint.resolve())
    if step is None or not (run_dir / METRICS_FILE).is_file():
        return None
    try:
        record = load_run(run_dir)
    except UserError as error:
        print(f"note: no training history in the model card: {error}")
        return None
    losses: dict[str, tuple[float, float]] = {}
    for point in record.train:
        if point.step <= step and math.isfinite(point.loss):
            losses[point.phase] = (losses.get(point.phase, (point.loss,))[0], point.loss)
    evaluations = [
        Evaluation(
            point.phase,
            point.step,
            point.tokens,
            point.validation_loss,
            {pair: sum(layers) / len(layers) for pair, layers in point.word_retrieval_p_at_1.items() if layers},
        )
        for point in record.evaluations
        if point.step <= step
    ]
    return History(evaluations, losses)


ACTIONS: Actions = {
    "to-hf": (to_hf, "convert a checkpoint to a Hugging Face model directory"),
    "from-hf": (from_hf, "convert a Hugging Face model directory to a checkpoint to train from"),
    "verify": (verify, "verify that a checkpoint and a Hugging Face model directory are the same model"),
}


def main(argv: Sequence[str]) -> int:
    """Runs `convert ACTION`."""
    use_huge_pages()
    return run_action("convert", ACTIONS, argv)
