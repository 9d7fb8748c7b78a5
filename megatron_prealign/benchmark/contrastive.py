"""The benchmark of the contrastive loss, forward and backward: eager torch, torch.compile of it, strips in plain torch,
and the Triton kernels.

Nothing is timed before its loss and gradient were found equal to those of the strips, within rounding.
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
"""The method's."""
MEMBERS = 2
"""Words of a group."""
_PRODUCTS = 3
"""Products of N x N x H that the loss and its gradient need at least: the similarities, once more in backward, and
their weights with the words."""
# Against the strips, norm over norm. Of float32 both are 1e-5 from the truth at most, of bfloat16 2e-3.
_BOUND = {torch.float32: 3e-5, torch.bfloat16: 5e-3}
_LARGEST_S = 30.0
"""The search for the most words ends at a call that takes longer."""


@dataclass(frozen=True, kw_only=True)
class ContrastiveMeasurement:
    """One implementation on one case; None where something was not measured."""

    implementation: str
    """eager, compiled, chunked, kernel."""
    device: str
    words: int
    hidden: int
    layers: int
    dtype: str
    threads: int | None
    """Of torch on a CPU."""
    repeats: int = 0
    median_us: float | None = None
    """Forward and backward, by the host's clock until the device is done; None where memory did not do."""
    p10_us: float | None = None
    p90_us: float | None = None
    fastest_us: float | None = None
    teraflops: float | None = None
    """The work that is needed at least, 6 x layers x words^2 x hidden, over the median."""
    peak_bytes: int | None = None
    """Memory on top of words and groups: of the allocator on a GPU, of the process on a CPU."""
    times_eager: float | None = None
    """How many times faster than eager."""
    times_compiled: float | None = None
    largest_words: int | None = None
    """The most words, among powers of two, that memory (and half a minute) did for."""


class ContrastiveBenchmark:
    """Everything that the cases of a run share."""

    def __init__(self, options: ContrastiveOptions) -> None:
        """Looks at the device.

        Raises:
            UserError: the device does not do.
        """
        self._options = options
        self.device = choose_device(options.device)
        self.on_gpu = self.device.type == "cuda"
        options.check_device(self.device.type)
        self.machine = describe_machine(self.device)
        self._repeats = options.repeats or (GPU_REPEATS if self.on_gpu else CPU_REPEATS)
        # a compiled function keeps what it compiled for each shape
        self._losses: dict[str, Loss] = {EAGER: contrastive_loss_reference}
        if options.compiled:
            self._losses[COMPILED] = torch.compile(contrastive_loss_reference, dynamic=False)
        self._losses[CHUNKED] = partial(contrastive_loss, use_kernels=False)
        if runs_triton(self.device):
            self._losses[KERNEL] = partial(contrastive_loss, use_kernels=True)

    def header(self) -> list[str]:
        """What a reader must know besides the figures."""
        lines = [*self.machine.lines(), f"workload  random words, groups of {MEMBERS}, temperature {TEMPERATURE}"]
        return lines if self.on_gpu else [*lines, f"threads   {self._options.threads}"]

    def cases(self) -> Iterator[list[ContrastiveMeasurement]]:
        """Measures case after case.

        Raises:
            RuntimeError: an implementation gives another loss or gradient than the strips.
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
        check_equal(entry.implementation, call(), expected)
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
        """Doubles the words until memory or patience ends."""
        total, largest, seconds = 1024, 0, 0.0
        while seconds < _LARGEST_S:
            torch.cuda.empty_cache()
            try:
                words, groups = self._inputs(total, hidden, dtype)
                begun = time.perf_counter()
                run(self._losses[entry.implementation], words, groups)
                torch.cuda.synchronize()
            except torch.OutOfMemoryError:
                break
            seconds, largest, total = time.perf_counter() - begun, total, 2 * total
        return largest


def run(loss: Loss, words: Tensor, groups: WordGroups) -> tuple[Tensor, Tensor]:
    """Forward and backward: the loss of every layer, and the gradient of their sum."""
    words = words.detach().requires_grad_()
    result = loss(words, groups, temperature=TEMPERATURE)
    result.sum().backward()
    assert words.grad is not None
    return result.detach(), words.grad


def check_equal(name: str, found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    """Compares loss and gradient within rounding.

    Raises:
        RuntimeError: one is farther off.
    """
    for what, ours, wanted in zip(("loss", "gradient"), found, expected, strict=True):
        bound = _BOUND[wanted.dtype]
        off = float((ours.double() - wanted.double()).norm() / wanted.double().norm())
        if not off <= bound:
            raise RuntimeError(f"{name}: the {what} is {off:.2g} off what the strips give, expected at most {bound:g}")


def compare(measured: list[ContrastiveMeasurement]) -> list[ContrastiveMeasurement]:
    """The measurements of one case with their ratios to eager torch and to torch.compile."""
    medians = {each.implementation: each.median_us for each in measured}

    def times(other: str, median_us: float | None) -> float | None:
        theirs = medians.get(other)
        return None if theirs is None or median_us is None else theirs / median_us

    return [
        replace(each, times_eager=times(EAGER, each.median_us), times_compiled=times(COMPILED, each.median_us))
        for each in measured
    ]
