"""Benchmark of the contrastive loss, forward and backward: eager PyTorch, torch.compile, chunked plain PyTorch and the
Triton kernels.

An implementation is timed only after its loss and gradient have been compared with those of the chunked version.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from megatron_prealign.benchmark.code_switch import choose_device
from megatron_prealign.benchmark.machine import describe_machine
from megatron_prealign.benchmark.memory import peak_bytes
from megatron_prealign.benchmark.options import ContrastiveOptions
from megatron_prealign.benchmark.timing import threads, time_call
from megatron_prealign.kernels import WordGroups, contrastive_loss, contrastive_loss_reference, word_groups
from megatron_prealign.kernels._triton import runs_triton

Loss = Callable[..., Tensor]
EAGER, COMPILED, CHUNKED, KERNEL = "eager", "compiled", "chunked", "kernel"
GPU_WORDS, CPU_WORDS = (4096, 16_384, 65_536), (1024, 4096)
GPU_HIDDEN, CPU_HIDDEN = (2048,), (256,)
GPU_REPEATS, CPU_REPEATS = 30, 10
TEMPERATURE = 0.1
"""Temperature of the method."""
MEMBERS = 2
"""Words per group."""
_PRODUCTS = 3
"""Minimum number of N x N x H products for loss and gradient: the similarities, the same again in the backward pass,
and the product of their weights with the words."""
# Relative error (ratio of norms) compared with the chunked version. Both are within 1e-5 of the exact values in float32
# and within 2e-3 in bfloat16.
_TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 5e-3}
_LARGEST_S = 30.0
"""Seconds; the search for the largest number of words ends after a call that takes longer."""


@dataclass(frozen=True, kw_only=True)
class ContrastiveMeasurement:
    """One implementation on one case; None for what was not measured."""

    implementation: str
    """eager, compiled, chunked, kernel."""
    device: str
    words: int
    hidden: int
    layers: int
    dtype: str
    threads: int | None
    """Number of torch threads on a CPU."""
    repeats: int = 0
    median_us: float | None = None
    """Forward and backward with the host clock, including synchronisation; None if out of memory."""
    p10_us: float | None = None
    p90_us: float | None = None
    fastest_us: float | None = None
    teraflops: float | None = None
    """Minimum work, 6 x layers x words^2 x hidden, divided by the median."""
    peak_bytes: int | None = None
    """Peak memory in addition to words and groups: of the allocator on a GPU, of the process on a CPU."""
    times_eager: float | None = None
    """Speed-up over eager."""
    times_compiled: float | None = None
    largest_words: int | None = None
    """Largest number of words (a power of two) that fits in memory and, roughly, in half a minute."""


class ContrastiveBenchmark:
    """Measures all cases of a run."""

    def __init__(self, options: ContrastiveOptions) -> None:
        """Selects the device and the implementations.

        Raises:
            UserError: the device is not usable.
        """
        self._options = options
        self.device = choose_device(options.device)
        self.on_gpu = self.device.type == "cuda"
        options.check_device(self.device.type)
        self.machine = describe_machine(self.device)
        self._repeats = options.repeats or (GPU_REPEATS if self.on_gpu else CPU_REPEATS)
        # A compiled function caches its code for each shape.
        self._losses: dict[str, Loss] = {EAGER: contrastive_loss_reference}
        if options.compiled:
            self._losses[COMPILED] = torch.compile(contrastive_loss_reference, dynamic=False)
        self._losses[CHUNKED] = partial(contrastive_loss, use_kernels=False)
        if runs_triton(self.device):
            self._losses[KERNEL] = partial(contrastive_loss, use_kernels=True)

    def header(self) -> list[str]:
        """Describes the machine and the workload."""
        lines = [*self.machine.lines(), f"workload  random words, groups of {MEMBERS}, temperature {TEMPERATURE}"]
        return lines if self.on_gpu else [*lines, f"threads   {self._options.threads}"]

    def cases(self) -> Iterator[list[ContrastiveMeasurement]]:
        """Measures the cases one by one.

        Raises:
            RuntimeError: loss or gradient of an implementation differ from those of the chunked version.
        """
        options = self._options
        dtypes = ["float32", "bfloat16"] if options.dtype == "both" else [options.dtype]
        for total in options.words or (GPU_WORDS if self.on_gpu else CPU_WORDS):
            for hidden in options.hidden or (GPU_HIDDEN if self.on_gpu else CPU_HIDDEN):
                for dtype in dtypes:
                    with threads(options.threads):
                        yield self._measure_case(total, hidden, getattr(torch, dtype))

    def _measure_case(self, total: int, hidden: int, dtype: torch.dtype) -> list[ContrastiveMeasurement]:
        words, groups = self._inputs(total, hidden, dtype)
        expected = run(self._losses[CHUNKED], words, groups)
        measured = []
        for name in self._losses:
            entry = self._entry(name, words)
            try:
                measured.append(self._measure(entry, words, groups, expected))
            except torch.OutOfMemoryError:
                measured.append(entry)
        if self._options.largest:
            measured = [replace(each, largest_words=self._largest(each, hidden, dtype)) for each in measured]
        return compare(measured)

    def _inputs(self, total: int, hidden: int, dtype: torch.dtype) -> tuple[Tensor, WordGroups]:
        random = torch.Generator().manual_seed(self._options.seed)
        drawn = torch.randn((self._options.layers, total, hidden), generator=random)
        groups = word_groups(torch.arange(total, device=self.device) // MEMBERS)
        return drawn.to(self.device, dtype), groups

    def _entry(self, name: str, words: Tensor) -> ContrastiveMeasurement:
        layers, total, hidden = words.shape
        return ContrastiveMeasurement(
            implementation=name,
            device=self.device.type,
            words=total,
            hidden=hidden,
            layers=layers,
            dtype=str(words.dtype).removeprefix("torch."),
            threads=None if self.on_gpu else self._options.threads,
        )

    def _measure(
        self, entry: ContrastiveMeasurement, words: Tensor, groups: WordGroups, expected: tuple[Tensor, Tensor]
    ) -> ContrastiveMeasurement:
        call = partial(run, self._losses[entry.implementation], words, groups)
        check_close(entry.implementation, call(), expected)
        peak = peak_bytes(call, self.device)
        timing = time_call(call, self._repeats, self.device)
        layers, total, hidden = words.shape
        return replace(
            entry,
            repeats=timing.repeats,
            median_us=timing.median_us,
            p10_us=timing.p10_us,
            p90_us=timing.p90_us,
            fastest_us=timing.fastest_us,
            teraflops=2 * _PRODUCTS * layers * total * total * hidden / timing.median_us / 1e6,
            peak_bytes=peak,
        )

    def _largest(self, entry: ContrastiveMeasurement, hidden: int, dtype: torch.dtype) -> int:
        """Doubles the number of words until memory or `_LARGEST_S` is exceeded."""
        total, largest, seconds = 1024, 0, 0.0
        while seconds < _LARGEST_S:
            torch.cuda.empty_cache()
            try:
                words, groups = self._inputs(total, hidden, dtype)
                start = time.perf_counter()
                run(self._losses[entry.implementation], words, groups)
                torch.cuda.synchronize()
            except torch.OutOfMemoryError:
                break
            seconds, largest, total = time.perf_counter() - start, total, 2 * total
        return largest


def run(loss: Loss, words: Tensor, groups: WordGroups) -> tuple[Tensor, Tensor]:
    """Runs forward and backward; returns the loss of every layer and the gradient of their sum."""
    words = words.detach().requires_grad_()
    result = loss(words, groups, temperature=TEMPERATURE)
    result.sum().backward()
    assert words.grad is not None
    return result.detach(), words.grad


def check_close(name: str, actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """Compares loss and gradient up to rounding.

    Raises:
        RuntimeError: one differs by more.
    """
    for label, value, wanted in zip(("loss", "gradient"), actual, expected, strict=True):
        tolerance = _TOLERANCE[wanted.dtype]
        error = float((value.double() - wanted.double()).norm() / wanted.double().norm())
        if not error <= tolerance:
            raise RuntimeError(
                f"{name}: relative error of the {label} is {error:.2g} compared with {CHUNKED}, expected at most "
                f"{tolerance:g}"
            )


def compare(measured: list[ContrastiveMeasurement]) -> list[ContrastiveMeasurement]:
    """Adds the speed-ups over eager PyTorch and over torch.compile to the measurements of one case."""
    medians = {each.implementation: each.median_us for each in measured}

    def speed_up(baseline: str, median_us: float | None) -> float | None:
        baseline_us = medians.get(baseline)
        return None if baseline_us is None or median_us is None else baseline_us / median_us

    return [
        replace(each, times_eager=speed_up(EAGER, each.median_us), times_compiled=speed_up(COMPILED, each.median_us))
        for each in measured
    ]
