"""Benchmark of code-switching: the variants of the kernel, the plain PyTorch reference and a Python loop.

An implementation is timed only after its output has been compared with that of the reference.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_prealign.benchmark.machine import describe_machine
from megatron_prealign.benchmark.options import CodeSwitchOptions
from megatron_prealign.benchmark.python_loop import PythonLoop
from megatron_prealign.benchmark.timing import (
    WARM_CALLS,
    Timing,
    capture,
    copy_bandwidth,
    flush_buffer,
    one_thread,
    time_call,
    time_host,
    time_replays,
)
from megatron_prealign.benchmark.workload import Workload, dataset_workload, synthetic_workload
from megatron_prealign.errors import UserError
from megatron_prealign.kernels import (
    CodeSwitchBatch,
    CodeSwitchOutput,
    CodeSwitchSettings,
    NgramTable,
    build_ngram_table,
    code_switch,
    code_switch_reference,
    philox_4x32_10,
    ratio_threshold,
)
from megatron_prealign.kernels._triton import HAS_TRITON
from megatron_prealign.kernels.build_ngram_table import to_device
from megatron_prealign.kernels.code_switch import launch_code_switch
from megatron_prealign.kernels.code_switch_interface import KNOWN, LANGUAGES_FROM, MAX_SEQUENCE, RUNNING, SWITCHED
from megatron_prealign.kernels.ngram_table import WORD
from megatron_prealign.text import plural

GPU_CASES = ((8, 4096), (256, 4096), (2, 131072))
CPU_CASES = ((16, 4096),)
GPU_KEYS, CPU_KEYS = 1_000_000, 100_000
GPU_REPEATS, CPU_REPEATS = 200, 30
COPY_BYTES = {"cuda": 1 << 30, "cpu": 512 << 20}
"""Size in bytes of the buffer that is copied to measure memory bandwidth."""
CHECKED_ROWS, CHECKED_SEQUENCE = 2, 2048
"""Part of a batch on which the Python loop is compared with the reference."""
REFERENCE, PYTHON_LOOP = "reference", "python_loop"


class Inputs(NamedTuple):
    """Arguments of `code_switch`."""

    batch: CodeSwitchBatch
    table: NgramTable
    thresholds: Tensor
    settings: CodeSwitchSettings


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One implementation on one case; None for what was not measured."""

    implementation: str
    """kernel_row, kernel_blocks, kernel_auto (`code_switch` as training calls it), reference, python_loop."""
    device: str
    rows: int
    sequence: int
    lookahead: int
    token_dtype: str
    ratio: float
    text: str
    keys: int
    table_bytes: int
    known_share: float
    """Fraction of the batch's running words that are in the table."""
    switched_share: float
    """Fraction of the batch's running words that are switched."""
    timed_as: str
    """graph: replays of a CUDA graph; call: synchronous calls, with the host clock."""
    l2: str
    """State of the L2 cache: cold, warm, or empty if not controlled."""
    repeats: int
    median_us: float
    p10_us: float
    p90_us: float
    tokens_per_second: float
    """Output positions per second."""
    bytes_moved: int
    gb_per_second: float
    copy_gb_per_second: float
    """Bandwidth of `Tensor.copy_` on the same device in the same run."""
    share_of_copy: float
    times_reference: float | None = None
    """Speed-up over the reference."""
    times_python_loop: float | None = None
    host_us: float | None = None
    """GPU: host time of an eager call."""
    floor_us: float | None = None
    """GPU: time of a graph with one kernel on one element, measured in the same way."""


def bytes_moved(rows: int, width: int, sequence: int, token_bytes: int, languages: int, word_starts: bool) -> int:
    """Minimum number of bytes that an implementation must move: read all arguments once, write the result once.

    rows x (width x (token_bytes + 1 with word starts) + 16 for language and sample id
    + sequence x (8 tokens + 8 labels + 4 loss mask + 8 position ids) + 8 x (5 + languages) for the counts).
    Reads of the table are not counted: their number depends on the data, and the table is partly cached.
    """
    read = width * (token_bytes + int(word_starts)) + 16
    return rows * (read + sequence * (8 + 8 + 4 + 8) + 8 * (LANGUAGES_FROM + languages))


class CodeSwitchBenchmark:
    """Measures all cases of a run with one table."""

    def __init__(self, options: CodeSwitchOptions) -> None:
        """Builds the table and measures the memory bandwidth.

        Raises:
            UserError: the device, a file or the number of keys is not usable, or the text is too short for a case.
        """
        self._options = options
        self.device = choose_device(options.device)
        self.on_gpu = self.device.type == "cuda"
        self.machine = describe_machine(self.device)
        self._cases = options.shapes() or list(GPU_CASES if self.on_gpu else CPU_CASES)
        self._repeats = options.repeats or (GPU_REPEATS if self.on_gpu else CPU_REPEATS)
        self.workload = self._open_workload()
        self._host_table = build_ngram_table(**self.workload.arrays)
        self._table = to_device(self._host_table, self.device)
        self._flush = flush_buffer(self.device) if self.on_gpu else None
        self._floor_us: float | None = None
        with one_thread():
            self.copy_bytes_per_second = copy_bandwidth(self.device, COPY_BYTES[self.device.type])
            if self.on_gpu:
                one = torch.zeros(1, device=self.device)
                self._floor_us = time_replays(capture(lambda: one.add_(1), 1), self._repeats, self._flush).median_us

    def _open_workload(self) -> Workload:
        options, max_ratio = self._options, max(self._options.ratio)
        for rows, sequence in self._cases:
            length = sequence + 1 + round(max_ratio * sequence)
            if length > MAX_SEQUENCE:
                raise UserError(
                    f"--cases has {rows}x{sequence}: {length} tokens with lookahead, expected at most {MAX_SEQUENCE}"
                )
        if options.table is None or options.data is None:
            return synthetic_workload(options.keys or (GPU_KEYS if self.on_gpu else CPU_KEYS), options.seed)
        workload = dataset_workload(options.table, options.data)
        for rows, sequence in self._cases:
            workload.check_length(rows, sequence, round(max_ratio * sequence))
        return workload

    @cached_property
    def _python_loop(self) -> PythonLoop:
        workload = self.workload
        return PythonLoop(workload.arrays, self._host_table, workload.language, workload.eod_id)

    def header(self) -> list[str]:
        """Describes the machine and the workload."""
        table = f"{plural(self._table.num_keys, 'key')}, {self._table.nbytes / 2**20:.1f} MiB"
        lines = [*self.machine.lines(), f"workload  {self.workload.name} text, table of {table}"]
        lines.append(f"copy      {self.copy_bytes_per_second / 1e9:,.1f} GB/s with Tensor.copy_ (reads + writes)")
        if self.on_gpu:
            lines.append(f"floor     {self._floor_us:.1f} us for a graph with one tiny kernel, timed like the kernels")
            lines.append(f"L2        {self._options.l2} (cold: a large buffer is written before every repeat)")
        else:
            lines.append("threads   1")
        return lines

    def cases(self) -> Iterator[list[Measurement]]:
        """Measures the cases one by one.

        Raises:
            RuntimeError: the result of an implementation differs from the reference.
        """
        dtypes = ["int64", "int32"] if self._options.token_dtype == "both" else [self._options.token_dtype]
        for rows, sequence in self._cases:
            for ratio in self._options.ratio:
                for dtype in dtypes:
                    with one_thread():
                        yield self._measure_case(self._inputs(rows, sequence, ratio, dtype), ratio)

    def _inputs(self, rows: int, sequence: int, ratio: float, dtype: str) -> Inputs:
        tokens, starts = self.workload.rows(rows, sequence, round(ratio * sequence))
        languages = self._table.num_languages
        return Inputs(
            batch=CodeSwitchBatch(
                tokens=torch.from_numpy(tokens).to(self.device, getattr(torch, dtype)),
                language=torch.full((rows,), self.workload.language, device=self.device),
                sample_id=torch.arange(rows, device=self.device),
                word_starts=None if starts is None else torch.from_numpy(starts).to(self.device),
            ),
            table=self._table,
            thresholds=torch.full((languages, languages), ratio_threshold(ratio), device=self.device),
            settings=CodeSwitchSettings(
                seed=self._options.seed,
                sequence_length=sequence,
                label_mode="input_only",
                pad_id=self.workload.eod_id,
                eod_id=self.workload.eod_id,
            ),
        )

    def _measure_case(self, inputs: Inputs, ratio: float) -> list[Measurement]:
        expected = code_switch_reference(*inputs)
        kernels: dict[str, Callable[..., CodeSwitchOutput]] = {}
        if self.on_gpu:
            kernels = {
                "kernel_row": partial(launch_code_switch, form="row"),
                "kernel_blocks": partial(launch_code_switch, form="blocks"),
                "kernel_auto": code_switch,
            }
        measured: list[Measurement] = []
        for name, kernel in kernels.items():
            measured += self._measure_kernel(name, partial(kernel, *inputs), inputs, ratio, expected)
        reference = partial(code_switch_reference, *inputs)
        timing = time_call(reference, self._repeats, self.device)
        entry = self._entry(REFERENCE, timing, inputs, ratio, expected)
        if self.on_gpu:
            entry = replace(entry, host_us=time_host(reference, self._repeats, self.device).median_us)
        measured.append(entry)
        if self._options.python_loop:
            measured.append(self._measure_python_loop(inputs, ratio, expected))
        return compare(measured)

    def _measure_kernel(
        self,
        name: str,
        call: Callable[[], CodeSwitchOutput],
        inputs: Inputs,
        ratio: float,
        expected: CodeSwitchOutput,
    ) -> list[Measurement]:
        check_equal(name, call(), expected)
        host_us = time_host(call, self._repeats, self.device).median_us
        measured = []
        for l2 in ("cold", "warm") if self._options.l2 == "both" else (self._options.l2,):
            captured = capture(call, 1 if l2 == "cold" else WARM_CALLS)
            captured.graph.replay()
            check_equal(f"{name} in a CUDA graph", captured.output, expected)
            timing = time_replays(captured, self._repeats, self._flush if l2 == "cold" else None)
            entry = self._entry(name, timing, inputs, ratio, expected)
            measured.append(replace(entry, timed_as="graph", l2=l2, host_us=host_us, floor_us=self._floor_us))
        return measured

    def _measure_python_loop(self, inputs: Inputs, ratio: float, expected: CodeSwitchOutput) -> Measurement:
        sequence, threshold = inputs.settings.sequence_length, ratio_threshold(ratio)
        check_python_loop(self._python_loop, threshold, inputs, self._host_table)
        tokens = inputs.batch.tokens.cpu()
        starts = None if inputs.batch.word_starts is None else inputs.batch.word_starts.cpu()
        host = torch.device("cpu")
        loop = partial(self._python_loop, tokens, sequence, threshold, starts)
        timing = time_call(loop, self._repeats, host)
        return self._entry(PYTHON_LOOP, timing, inputs, ratio, expected)

    def _entry(
        self, name: str, timing: Timing, inputs: Inputs, ratio: float, expected: CodeSwitchOutput
    ) -> Measurement:
        rows, width = inputs.batch.tokens.shape
        sequence, languages = inputs.settings.sequence_length, inputs.table.num_languages
        moved = bytes_moved(
            rows, width, sequence, inputs.batch.tokens.element_size(), languages, inputs.batch.word_starts is not None
        )
        running, known, switched = (int(expected.counts[:, each].sum()) for each in (RUNNING, KNOWN, SWITCHED))
        return Measurement(
            implementation=name,
            device="cpu" if name == PYTHON_LOOP else self.device.type,
            rows=rows,
            sequence=sequence,
            lookahead=width - sequence - 1,
            token_dtype=str(inputs.batch.tokens.dtype).removeprefix("torch."),
            ratio=ratio,
            text=self.workload.name,
            keys=inputs.table.num_keys,
            table_bytes=inputs.table.nbytes,
            known_share=known / max(running, 1),
            switched_share=switched / max(running, 1),
            timed_as="call",
            l2="",
            repeats=timing.repeats,
            median_us=timing.median_us,
            p10_us=timing.p10_us,
            p90_us=timing.p90_us,
            tokens_per_second=rows * sequence / timing.median_us * 1e6,
            bytes_moved=moved,
            gb_per_second=moved / timing.median_us / 1e3,
            copy_gb_per_second=self.copy_bytes_per_second / 1e9,
            share_of_copy=moved / timing.median_us * 1e6 / self.copy_bytes_per_second,
        )


def choose_device(name: str) -> torch.device:
    """Returns the device for the value of `--device`.

    Raises:
        UserError: torch found no GPU, or Triton is not installed.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("--device is cuda, but torch found no GPU; run megatron-prealign doctor or use --device cpu")
    if not HAS_TRITON:
        raise UserError("the kernels require triton, which is not installed; pip install triton or use --device cpu")
    return torch.device("cuda", torch.cuda.current_device())


def check_equal(name: str, output: CodeSwitchOutput, expected: CodeSwitchOutput) -> None:
    """Checks that every tensor is bit-identical to the expected one.

    Raises:
        RuntimeError: a tensor differs.
    """
    for field, actual, wanted in zip(CodeSwitchOutput._fields, output, expected, strict=True):
        if (actual is None) != (wanted is None) or (actual is not None and not torch.equal(actual, wanted)):
            raise RuntimeError(f"{name}: {field} differs from the reference")


def check_python_loop(loop: PythonLoop, threshold: int, inputs: Inputs, table: NgramTable) -> None:
    """Compares the Python loop with the reference on a part of the batch, with the same random draws.

    Args:
        loop: The collate function.
        threshold: `ratio_threshold` of the case.
        inputs: Inputs of the case.
        table: The table on the CPU.

    Raises:
        RuntimeError: tokens, labels, loss mask or position ids differ.
    """
    batch = inputs.batch
    tokens = batch.tokens[:CHECKED_ROWS].cpu()
    rows, width = tokens.shape
    sequence = min(inputs.settings.sequence_length, CHECKED_SEQUENCE)
    # Keep the ratio of lookahead to sequence.
    width = min(width, sequence * width // inputs.settings.sequence_length + 1)
    tokens = tokens[:, :width].contiguous()
    starts = None if batch.word_starts is None else batch.word_starts[:CHECKED_ROWS, :width].cpu().contiguous()
    sample_id = batch.sample_id[:rows].cpu()
    settings = replace(inputs.settings, sequence_length=sequence)
    checked = CodeSwitchBatch(tokens, batch.language[:rows].cpu(), sample_id, starts)
    expected = code_switch_reference(checked, table, inputs.thresholds.cpu(), settings)
    whether, which = _draws(sample_id, width, settings.seed)
    output = loop(tokens, sequence, threshold, starts, lambda row, at: whether[row][at], lambda row, at: which[row][at])
    for name, actual, wanted in zip(CodeSwitchOutput._fields, output, expected, strict=False):
        if not torch.equal(actual, wanted):
            raise RuntimeError(f"{PYTHON_LOOP}: {name} differs from the reference")


def _draws(sample_id: Tensor, width: int, seed: int) -> tuple[list[Any], list[Any]]:
    """Returns the first two random words of the reference for every row and position."""
    position, sample = torch.arange(width)[None, :], sample_id[:, None]
    counter = (position, sample & WORD, (sample >> 32) & WORD, torch.zeros_like(sample))
    whether, which, *_ = philox_4x32_10(counter, (seed & WORD, seed >> 32))
    return whether.tolist(), which.tolist()


def compare(measured: list[Measurement]) -> list[Measurement]:
    """Adds the speed-ups over the reference and over the Python loop to the measurements of one case."""
    medians = {each.implementation: each.median_us for each in measured}
    reference, loop = medians.get(REFERENCE), medians.get(PYTHON_LOOP)
    return [
        replace(
            each,
            times_reference=None if reference is None else reference / each.median_us,
            times_python_loop=None if loop is None else loop / each.median_us,
        )
        for each in measured
    ]
