"""`megatron-prealign convert`: checkpoints to and from Hugging Face, and the proof that they agree."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from megatron_prealign.cli.actions import Actions, run_action
from megatron_prealign.cli.options import parse_options
from megatron_prealign.errors import UserError
from megatron_prealign.progress import Progress
from megatron_prealign.recipe.describe import PathText
from megatron_prealign.resources import use_huge_pages

if TYPE_CHECKING:
    from megatron_prealign.conversion.card import History

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(kB|KB|MB|GB|TB|B)?")
_UNITS = {"B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
# Of a file of its own for every tensor; less would only be a slip of the pen.
_LEAST_SHARD = 1_000_000


@dataclass(frozen=True, kw_only=True)
class ToHfOptions:
    """Writes a checkpoint as a directory that transformers opens: weights, config, tokenizer and model card.

    One process on a CPU, whatever layout wrote the checkpoint; the files are the same for all layouts.
    """

    checkpoint: PathText
    """A step_* directory, a directory of checkpoints (its newest) or a run's directory."""
    output: PathText
    """Directory to write; it gets its name when it is complete."""
    dtype: Literal["bf16", "fp16", "fp32"] | None = None
    """Type of the weights; by default as they were trained, bf16 for a bf16 run.

    fp32 of a bf16 run takes the optimizer's own weights in full precision, where they are in the checkpoint.
    """
    shard_size: str = "5GB"
    """Most bytes of a file with weights, such as 500MB or 5GB (10^9 bytes)."""
    tokenizer: Literal["convert", "copy"] | None = None
    """convert writes a tokenizer.json with the same ids and compares them; copy takes the files as they are and tells
    where ids differ.

    By default convert, and copy for weights that came from Hugging Face with their own tokenizer and were not trained
    here.
    """
    verify: Literal["sizes", "checksums"] = "sizes"
    """How to compare the checkpoint's files with its manifest before; checksums reads them all."""
    overwrite: bool = False
    """Replace a model that is there."""


@dataclass(frozen=True, kw_only=True)
class FromHfOptions:
    """Writes a Hugging Face model directory as a checkpoint of weights; pretrain --checkpoint.load takes it in any
    layout.

    One process on a CPU. model.yaml in the checkpoint has the section `model` of a recipe for it.
    """

    model: PathText
    """Directory as transformers' save_pretrained writes it: config.json, safetensors, tokenizer."""
    output: PathText
    """Directory to write; it gets its name when it is complete."""
    tensor: int = 1
    """Parts in which matrices are written."""
    pipeline: int = 1
    """Parts in which the layers are written."""
    dtype: Literal["bf16", "fp32"] | None = None
    """Type of the weights; by default as in the directory, fp32 for fp16."""
    tokenizer: PathText | None = None
    """Tokenizer of the model, if it lies elsewhere."""
    vocab_size: int | None = None
    """Number of ids; by default the rows of the embedding, or the tokenizer's ids if it has more."""
    make_vocab_size_divisible_by: int = 128
    """The written vocabulary is padded to a multiple of this times --tensor."""
    ignore_config_field: list[str] = field(default_factory=list)
    """Fields of config.json that are not known here and do not change the maths; you vouch for it."""
    allow_pickle: bool = False
    """Read pytorch_model*.bin, where there are no safetensors."""
    overwrite: bool = False
    """Replace a checkpoint of weights that is there."""


def from_hf(argv: Sequence[str]) -> int:
    options = parse_options(FromHfOptions, "convert from-hf", argv)

    from megatron_prealign.checkpoint.commands.list import readable_bytes
    from megatron_prealign.conversion.from_hf import from_huggingface

    with _ProgressOf("read weights") as progress:
        found = from_huggingface(
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
    print(f"family      {found.family}")
    print(f"weights     {found.parameters:,} numbers of {found.tensors:,} tensors, {found.dtype}")
    print(f"files       {readable_bytes(found.bytes)}")
    print(
        f"vocabulary  {found.vocab_size:,} ids, padded to {found.padded_vocab_size:,}; the tokenizer has "
        f"{found.tokenizer_size:,}"
    )
    if found.added_rows:
        print(f"note: {found.added_rows:,} new rows of the embedding are the mean of the others")
    if found.dropped_rows:
        print(f"note: {found.dropped_rows:,} rows of the embedding without a token were left out")
    for note in found.notes:
        print(f"note: {note}")
    print(f"wrote {options.output}")
    return 0


class _ProgressOf:
    """A progress bar that is told how much is done so far and how much there is in all."""

    def __init__(self, description: str) -> None:
        self._description = description
        self._bar: Progress | None = None
        self._done = 0

    def __enter__(self) -> "_ProgressOf":
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

    from megatron_prealign.checkpoint.commands.list import readable_bytes
    from megatron_prealign.checkpoint.directory import resolve_checkpoint
    from megatron_prealign.conversion.to_hf import ToHuggingFace, to_huggingface

    settings = ToHuggingFace(
        dtype=options.dtype,
        shard_bytes=shard_bytes,
        tokenizer=options.tokenizer,
        overwrite=options.overwrite,
        checksums=options.verify == "checksums",
    )
    output = Path(options.output)
    checkpoint = resolve_checkpoint(options.checkpoint)
    found = to_huggingface(checkpoint, output, settings, history=_history(checkpoint))
    origin = " (the optimizer's, in full precision)" if found.from_masters else ""
    print(f"checkpoint  {found.checkpoint}")
    print(f"weights     {found.parameters:,} numbers in {found.tensors:,} tensors, {found.dtype}{origin}")
    print(f"files       {found.files:,} with {readable_bytes(found.bytes)}")
    for note in found.notes:
        print(f"note: {note}")
    print(f"wrote {output}")
    return 0


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """Tells whether a checkpoint and a Hugging Face model directory are the same model: every tensor, the tokenizer,
    and the states of every layer and the logits on a text. Exit status 0 if they are, 1 if not.

    Both models are run on the CPU in fp32, one after the other.
    """

    checkpoint: PathText
    """A step_* directory, a directory of checkpoints (its newest) or a run's directory."""
    model: PathText
    """Hugging Face model directory."""
    text: PathText | None = None
    """Text file to run through both models; by default some lines that are built in."""
    tolerance: float = 1e-4
    """Largest difference of states and logits, against the largest number there."""
    logits: bool = True
    """Run the models; false compares tensors and tokenizers alone, in little memory."""
    ignore_config_field: list[str] = field(default_factory=list)
    """Fields of config.json that are not known here and do not change the maths; you vouch for it."""
    output: PathText | None = None
    """JSON file to write the whole report to."""
    overwrite: bool = False
    """Replace a report that is there."""


def verify(argv: Sequence[str]) -> int:
    options = parse_options(VerifyOptions, "convert verify", argv)
    if not options.tolerance >= 0:
        raise UserError(f"--tolerance is {options.tolerance}, expected a number of at least 0")

    import json

    from megatron_prealign.runtime import log

    log.configure()
    from megatron_prealign.benchmark.options import check_output
    from megatron_prealign.conversion.verify import DEFAULT_TEXT, render
    from megatron_prealign.conversion.verify import verify as compare
    from megatron_prealign.files.atomic import write_atomically

    check_output(options.output)
    if options.output is not None and not options.overwrite and Path(options.output).exists():
        raise UserError(
            f"--output {options.output} is there already; choose another path, or replace it with --overwrite"
        )
    report = compare(
        options.checkpoint,
        Path(options.model),
        text=DEFAULT_TEXT if options.text is None else _read_text(Path(options.text)),
        tolerance=options.tolerance,
        logits=options.logits,
        ignore_config_fields=options.ignore_config_field,
    )
    print("\n".join(render(report)))
    if options.output is not None:
        with write_atomically(Path(options.output)) as temporary:
            temporary.write_text(json.dumps(report.to_dict(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"wrote {options.output}")
    return 0 if report.agrees else 1


def _read_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--text {path}: not a readable UTF-8 file ({error}); name another file") from error
    if not text:
        raise UserError(f"--text {path} is empty; name a file with words")
    return text


def parse_size(text: str, option: str) -> int:
    """Bytes of a size such as 5GB.

    Raises:
        UserError: it is none, or less than 1 MB.
    """
    match = _SIZE.fullmatch(text.strip())
    size = int(float(match[1]) * _UNITS[match[2] or "B"]) if match else 0
    if size < _LEAST_SHARD:
        raise UserError(f"{option} is {text!r}, expected a size of at least 1MB such as 500MB or 5GB")
    return size


def _history(checkpoint: Path) -> "History | None":
    """What the metrics of the checkpoint's run say up to it; None if they are not beside it any more."""
    from megatron_prealign.checkpoint.directory import step_of
    from megatron_prealign.conversion.card import Evaluation, History
    from megatron_prealign.evaluation.run_record import load_run

    run_dir, step = checkpoint.resolve().parent.parent, step_of(checkpoint.resolve())
    if step is None or not (run_dir / "metrics.jsonl").is_file():
        return None
    try:
        record = load_run(run_dir)
    except UserError as error:
        print(f"note: the model card has no history: {error}")
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
    "to-hf": (to_hf, "write a checkpoint as a directory that transformers opens"),
    "from-hf": (from_hf, "write a Hugging Face model directory as a checkpoint to train from"),
    "verify": (verify, "tell whether a checkpoint and a Hugging Face model directory are the same model"),
}


def main(argv: Sequence[str]) -> int:
    """Runs `convert ACTION`."""
    use_huge_pages()
    return run_action("convert", ACTIONS, argv)
