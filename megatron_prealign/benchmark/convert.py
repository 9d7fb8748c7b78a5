"""Benchmark of conversion: speed to and from Hugging Face compared with `cp` of the same bytes, and memory."""

import math
import multiprocessing
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from megatron_prealign.benchmark.memory import peak_bytes
from megatron_prealign.benchmark.options import ConvertOptions
from megatron_prealign.checkpoint.commit import TOKENIZER, complete_weights
from megatron_prealign.checkpoint.single_process.writer import ShardWriter
from megatron_prealign.checkpoint.state import layout, model_identity, weights_state
from megatron_prealign.conversion.config import huggingface_config
from megatron_prealign.conversion.from_hf import from_huggingface
from megatron_prealign.conversion.tensors import TensorPlan
from megatron_prealign.conversion.to_hf import ConvertSettings, to_huggingface
from megatron_prealign.errors import UserError
from megatron_prealign.files.sync import sync_directory, sync_file
from megatron_prealign.preprocess.tokenizer_trainers import train_byte_bpe
from megatron_prealign.progress import Progress
from megatron_prealign.recipe import ModelSection
from megatron_prealign.tokenizer.load import load_tokenizer

COPY, TO_HF, FROM_HF = "cp", "to-hf", "from-hf"
_ITEM_BYTES = 2
# Parameters of the small model that is converted first, to load all libraries.
_WARM_UP_PARAMETERS = 1_000_000
# Minimum parameters -> hidden size, MLP width, heads, key/value heads, vocabulary: shapes of published Llama models.
_SHAPES = (
    (4_000_000_000, (4096, 14336, 32, 8, 128_256)),
    (1_000_000_000, (2048, 8192, 32, 8, 128_256)),
    (200_000_000, (1024, 4096, 16, 4, 32_000)),
    (10_000_000, (512, 2048, 8, 4, 4_096)),
    (0, (128, 512, 4, 2, 1_024)),
)


@dataclass(frozen=True)
class ConvertMeasurement:
    """One operation on one source."""

    operation: str
    """`cp`, `to-hf` or `from-hf`."""
    source: str
    """What is read: `checkpoint` or `model`."""
    parameters: int
    bytes: int
    """Size of the weights that are read."""
    seconds: float
    """Median of the repeats, until everything is synced to disk."""
    share_of_cp: float
    """Speed relative to `cp` of the same source."""
    memory_bytes: int | None
    """Peak main memory minus the memory in use before; None for `cp`."""
    bound_bytes: int | None
    """Twice the largest tensor, plus one output file for to-hf."""

    @property
    def gb_per_second(self) -> float:
        """10^9 bytes per second."""
        return self.bytes / self.seconds / 1e9


class ConvertBenchmark:
    """Converts a synthetic Llama, each conversion in its own process."""

    def __init__(self, options: ConvertOptions) -> None:
        self._options = options
        self.model, self.plan = _plan(options.parameters)
        self.parameters = sum(math.prod(shape) for shape in self.plan.hf_shapes.values())
        self._largest = max(math.prod(entry.shape) for entry in self.plan.entries) * _ITEM_BYTES

    def measure(self) -> Iterator[ConvertMeasurement]:
        """Yields the measurements as soon as they are available.

        Raises:
            UserError: there is not enough disk space.
        """
        size = self.parameters * _ITEM_BYTES
        with tempfile.TemporaryDirectory(prefix="prealign-benchmark-", dir=self._options.directory) as name:
            directory = Path(name)
            free = shutil.disk_usage(directory).free
            if free < 2.1 * size:
                raise UserError(
                    f"{directory.parent}: {free:,} bytes free, expected at least {int(2.1 * size):,}; choose another "
                    "--directory or fewer --parameters"
                )
            checkpoint, model = directory / "checkpoint", directory / "model"
            small = {"checkpoint": directory / "small_checkpoint", "model": directory / "small_model"}
            _write_checkpoint(small["checkpoint"], *_plan(_WARM_UP_PARAMETERS), self._options.seed)
            to_huggingface(small["checkpoint"], small["model"], ConvertSettings(), show_progress=False)
            _write_checkpoint(checkpoint, self.model, self.plan, self._options.seed)
            yield from self._compare_with_copy(TO_HF, "checkpoint", checkpoint, model, small)
            shutil.rmtree(checkpoint)
            yield from self._compare_with_copy(FROM_HF, "model", model, checkpoint, small)

    def _compare_with_copy(
        self, operation: str, kind: str, source: Path, output: Path, small: dict[str, Path]
    ) -> Iterator[ConvertMeasurement]:
        """Alternates between `cp` and the conversion, so that both see the same state of the disk."""
        copies, conversions, memory = [], [], 0
        for _ in range(self._options.repeats):
            copy = source.with_name("copy")
            copies.append(_timed_copy(source, copy))
            shutil.rmtree(copy)
            if output.exists():
                shutil.rmtree(output)
            _drop_page_cache(source)
            result = _run_in_subprocess(operation, source, output, small[kind], self._options.shard_bytes)
            conversions.append(result["seconds"])
            memory = max(memory, result["memory"] or 0)
        size = self.parameters * _ITEM_BYTES
        seconds, baseline = statistics.median(conversions), statistics.median(copies)
        bound = 2 * self._largest + (min(self._options.shard_bytes, size) if operation == TO_HF else 0)
        yield ConvertMeasurement(COPY, kind, self.parameters, size, baseline, 1.0, None, None)
        yield ConvertMeasurement(
            operation, kind, self.parameters, size, seconds, baseline / seconds, memory or None, bound
        )


def _plan(parameters: int) -> tuple[ModelSection, TensorPlan]:
    """Returns a Llama model with approximately the given number of parameters."""
    hidden, width, heads, groups, ids = next(shape for minimum, shape in _SHAPES if parameters >= minimum)
    head_dim = hidden // heads
    layer = 2 * hidden * hidden + 2 * hidden * groups * head_dim + 3 * hidden * width + 2 * hidden
    layers = max(1, round((parameters - 2 * ids * hidden - hidden) / layer))
    model = ModelSection(
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_query_groups=groups,
        ffn_hidden_size=width,
        max_position_embeddings=2048,
    )
    return model, TensorPlan(model, ids)


def _write_checkpoint(directory: Path, model: ModelSection, plan: TensorPlan, seed: int) -> None:
    """Writes a weights-only checkpoint with random values, identical for tensors of the same shape."""
    directory.mkdir()
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[tuple[int, ...], torch.Tensor] = {}
    ids = plan.entries[0].shape[0]
    total = sum(math.prod(entry.shape) for entry in plan.entries) * _ITEM_BYTES
    with ShardWriter(directory) as writer, Progress("write checkpoint", total, unit="B", unit_scale=True) as progress:
        for entry in plan.entries:
            if entry.shape not in tensors:
                # Do not keep the embeddings: they are the largest tensors and occur only once.
                tensors = {shape: tensor for shape, tensor in tensors.items() if shape[0] != ids}
                tensors[entry.shape] = torch.randn(entry.shape, generator=generator).bfloat16()
            layers = model.num_layers if entry.layer is not None else None
            writer.add(entry.key, tensors[entry.shape], layer=entry.layer, num_layers=layers)
            progress.update(tensors[entry.shape].nbytes)
        records = writer.close()
    (directory / TOKENIZER).mkdir()
    tokenizer = train_byte_bpe(iter(["the benchmark reads no text " * 20]), 270)
    tokenizer.save(str(directory / TOKENIZER / "tokenizer.json"))
    complete_weights(
        directory,
        weights_state(
            model_identity(
                asdict(model),
                vocab_size=ids,
                padded_vocab_size=ids,
                tokenizer_fingerprint=load_tokenizer(directory / TOKENIZER).fingerprint,
            ),
            layout=layout(1, 1),
            source={"format": "megatron-prealign"},
        ),
        config=huggingface_config(model, vocab_size=ids, seq_length=2048, dtype="bfloat16", eod_id=0),
        records=records,
    )


def _copy(source: Path, target: Path) -> None:
    # Without a reflink, which would share blocks with the source and write nothing.
    command = ["cp", "-r", "--reflink=never", str(source), str(target)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", b"") or str(error).encode()
        raise UserError(f"cannot copy {source} with cp: {reason.decode(errors='replace').strip()}") from error
    for path in sorted(target.rglob("*")):
        (sync_directory if path.is_dir() else sync_file)(path)
    sync_directory(target)


def _timed_copy(source: Path, target: Path) -> float:
    _drop_page_cache(source)
    start = time.perf_counter()
    _copy(source, target)
    return time.perf_counter() - start


def _drop_page_cache(directory: Path) -> None:
    """Drops the files from the page cache, so that both operations read from disk."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in directory.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def _run_in_subprocess(operation: str, source: Path, output: Path, small: Path, shard_bytes: int) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(operation, source, output, small, shard_bytes, sender))
    process.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError as error:
        raise UserError(f"{operation}: the measuring process died (out of memory?); use fewer --parameters") from error
    finally:
        process.join()
    if isinstance(result, UserError):
        raise result
    return dict(result)


def _run(operation: str, source: Path, output: Path, small: Path, shard_bytes: int, sender: Connection) -> None:
    seconds = 0.0

    def work() -> None:
        nonlocal seconds
        start = time.perf_counter()
        _convert(operation, source, output, shard_bytes)
        seconds = time.perf_counter() - start

    try:
        # Loading the libraries takes seconds and memory regardless of the size of the model.
        _convert(operation, small, output, shard_bytes)
        shutil.rmtree(output)
        memory = peak_bytes(work, torch.device("cpu"))
        sender.send({"seconds": seconds, "memory": memory})
    except UserError as error:
        sender.send(error)


def _convert(operation: str, source: Path, output: Path, shard_bytes: int) -> None:
    if operation == TO_HF:
        to_huggingface(source, output, ConvertSettings(shard_bytes=shard_bytes, verify="sizes"), show_progress=False)
    else:
        from_huggingface(source, output)
