"""What `megatron-prealign benchmark` can be asked for. Imports no torch."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_prealign.errors import UserError
from megatron_prealign.recipe.describe import PathText, PrefixText


def check_output(output: str | None) -> None:
    """Checks that a file can be written there, before minutes of measuring.

    Raises:
        UserError: its directory does not exist, or it is a directory itself.
    """
    if output is None:
        return
    path = Path(output)
    if path.is_dir() or not path.parent.is_dir():
        what = "is a directory" if path.is_dir() else f"lies in {path.parent}, which is no directory"
        raise UserError(f"--output {output} {what}, expected a file in a directory that exists; choose another path")


@dataclass(frozen=True, kw_only=True)
class CodeSwitchOptions:
    """Measures code-switching of a batch: the Triton kernels (on a GPU), plain torch and a loop in Python."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto is the GPU where torch has one, else the CPU, in one thread."""
    cases: list[str] = field(default_factory=list)
    """Batches as ROWSxSEQUENCE, one or more; by default 8x4096 256x4096 2x131072 on a GPU, 16x4096 on a CPU."""
    ratio: list[float] = field(default_factory=lambda: [0.05, 0.5])
    """Probabilities that a known word is switched, one or more; the lookahead is the ratio times the sequence."""
    token_dtype: Literal["int64", "int32", "both"] = "int64"
    """Type of the source tokens."""
    keys: int | None = None
    """Keys of the synthetic table; by default 1,000,000 on a GPU, 100,000 on a CPU."""
    table: PathText | None = None
    """Table file to use instead of the synthetic table; needs --data."""
    data: PrefixText | None = None
    """Prefix of a preprocessed dataset in a source language of --table, to use instead of the synthetic text."""
    seed: int = 1234
    """Of the synthetic table and text, and of the draws."""
    repeats: int | None = None
    """Repeats of every measurement; by default 200 on a GPU, 30 on a CPU. Slow calls are repeated less often."""
    l2: Literal["cold", "warm", "both"] = "cold"
    """GPU: whether a large buffer is written before every repeat, so that nothing is left in the L2 (cold)."""
    python_loop: bool = True
    """Measure the loop in Python as well. For a million keys its dictionary takes 1 GB and about 20 seconds."""
    output: PathText | None = None
    """CSV file to write, one row a measurement."""

    def __post_init__(self) -> None:
        self.shapes()
        for ratio in self.ratio:
            _require(0.0 <= ratio <= 1.0, "--ratio", ratio, "numbers from 0 to 1")
        _require(bool(self.ratio), "--ratio", "empty", "one or more numbers from 0 to 1")
        _require(self.keys is None or self.keys >= 1, "--keys", self.keys, "at least 1")
        _require(0 <= self.seed < 1 << 64, "--seed", self.seed, "0 to 2^64-1")
        _require(self.repeats is None or self.repeats >= 1, "--repeats", self.repeats, "at least 1")
        if (self.table is None) != (self.data is None):
            given, missing = ("--table", "--data") if self.data is None else ("--data", "--table")
            raise UserError(f"{given} is given without {missing}, expected both or none; add {missing}")
        if self.table is not None and self.keys is not None:
            raise UserError("--keys is given with --table, expected one of them; leave --keys out")
        check_output(self.output)

    def shapes(self) -> list[tuple[int, int]]:
        """The cases as (rows, sequence); empty for the default."""
        found = []
        for case in self.cases:
            parts = re.fullmatch(r"([1-9]\d{0,6})x([1-9]\d{0,6})", case)
            if parts is None:
                raise UserError(f"--cases is {case!r}, expected ROWSxSEQUENCE as in 8x4096, both from 1 to 9999999")
            found.append((int(parts[1]), int(parts[2])))
        return found


@dataclass(frozen=True, kw_only=True)
class ContrastiveOptions:
    """Measures the contrastive loss, forward and backward: eager torch, torch.compile, strips in plain torch and the
    Triton kernels (on a GPU)."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto is the GPU where torch has one, else the CPU."""
    words: list[int] = field(default_factory=list)
    """Words of a batch, one or more numbers; by default 4096 16384 65536 on a GPU, 1024 4096 on a CPU."""
    hidden: list[int] = field(default_factory=list)
    """Numbers a word, one or more; by default 2048 on a GPU, 256 on a CPU."""
    layers: int = 1
    """Layers that one call computes."""
    dtype: Literal["float32", "bfloat16", "both"] = "float32"
    """Type of the words."""
    threads: int = 1
    """CPU: threads of torch."""
    compiled: bool = True
    """Measure torch.compile of the eager code as well. It needs a C++ compiler on a CPU."""
    largest: bool = False
    """GPU: also double the words until each implementation is out of memory."""
    seed: int = 1234
    """Of the words."""
    repeats: int | None = None
    """Repeats of every measurement; by default 30 on a GPU, 10 on a CPU. Slow calls are repeated less often."""
    output: PathText | None = None
    """CSV file to write, one row a measurement."""

    def __post_init__(self) -> None:
        for total in self.words:
            _require(2 <= total <= 1 << 21, "--words", total, "numbers from 2 to 2097152")
        for hidden in self.hidden:
            _require(1 <= hidden <= 1 << 16, "--hidden", hidden, "numbers from 1 to 65536")
        _require(self.layers >= 1, "--layers", self.layers, "at least 1")
        _require(self.threads >= 1, "--threads", self.threads, "at least 1")
        _require(0 <= self.seed < 1 << 63, "--seed", self.seed, "0 to 2^63-1")
        _require(self.repeats is None or self.repeats >= 1, "--repeats", self.repeats, "at least 1")
        check_output(self.output)

    def check_device(self, kind: str) -> None:
        """Checks what depends on the device that was found, `cuda` or `cpu`.

        Raises:
            UserError: something is asked for that this device does not do.
        """
        if self.largest and kind != "cuda":
            raise UserError(
                "--largest is given without a GPU, where it would use up the machine's memory, expected with one; "
                "leave it out"
            )


@dataclass(frozen=True, kw_only=True)
class PreprocessOptions:
    """Measures preprocessing: with gigatoken, with the tokenizer's own library, and one document after the other as
    Megatron-LM's tool does it. All must write the same tokens."""

    input: list[PathText] = field(default_factory=list)
    """Files, directories or patterns to preprocess; by default synthetic text."""
    text_key: str = "text"
    """Key of the text in each object."""
    tokenizer: PathText | None = None
    """Tokenizer directory or sentencepiece model; by default a byte-level BPE of 4,096 ids is trained on the text."""
    implementation: list[str] = field(default_factory=lambda: ["gigatoken", "plain", "megatron"])
    """What to measure, one or more of gigatoken, plain and megatron."""
    workers: int = 2
    """Worker processes of each."""
    mb: float = 200
    """Synthetic text in 10^6 bytes."""
    document_bytes: list[int] = field(default_factory=lambda: [200, 2000])
    """Shortest and longest synthetic document; the lengths spread evenly over the orders of magnitude between."""
    megatron_mb: float = 20
    """How much of the text megatron gets, in 10^6 characters; it is slow, and keeps nothing from one document to the
    next."""
    directory: PathText | None = None
    """Where text and results lie while it runs; by default the system's directory for temporary files."""
    seed: int = 1234
    """Of the synthetic text."""
    output: PathText | None = None
    """CSV file to write, one row a measurement."""

    def __post_init__(self) -> None:
        known = ("gigatoken", "plain", "megatron")
        given = self.implementation
        good = bool(given) and len(set(given)) == len(given) and set(given) <= set(known)
        _require(good, "--implementation", " ".join(given) or "empty", f"one or more of {', '.join(known)}")
        _require(self.workers >= 1, "--workers", self.workers, "at least 1")
        _require(0 < self.mb <= 1e7, "--mb", self.mb, "more than 0, at most 10000000")
        _require(0 < self.megatron_mb <= 1e7, "--megatron-mb", self.megatron_mb, "more than 0, at most 10000000")
        sizes = self.document_bytes
        good = len(sizes) == 2 and 1 <= sizes[0] <= sizes[-1] <= 1 << 28
        _require(
            good, "--document-bytes", " ".join(map(str, sizes)) or "empty", "two numbers from 1 to 2^28, ascending"
        )
        _require(0 <= self.seed < 1 << 63, "--seed", self.seed, "0 to 2^63-1")
        directory = self.directory
        _require(directory is None or Path(directory).is_dir(), "--directory", directory, "a directory that exists")
        check_output(self.output)


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """Measures convert to-hf and from-hf on a synthetic Llama in bf16 against cp of the same bytes, and their memory.

    The files are read from the disk, not from memory, and written until they are synced.
    """

    parameters: int = 1_000_000_000
    """About how many numbers the model has; it takes two bytes each, twice, on the disk."""
    shard_bytes: int = 5_000_000_000
    """Most bytes of a file with weights."""
    repeats: int = 3
    """Repeats of every measurement, of which the median is told."""
    directory: PathText | None = None
    """Where the files lie while it runs; by default the system's directory for temporary files."""
    seed: int = 1234
    """Of the weights."""
    output: PathText | None = None
    """CSV file to write, one row a measurement."""

    def __post_init__(self) -> None:
        given = self.parameters
        _require(1_000_000 <= given <= 10**12, "--parameters", given, "1000000 to 1000000000000")
        _require(self.shard_bytes >= 1_000_000, "--shard-bytes", self.shard_bytes, "at least 1000000")
        _require(self.repeats >= 1, "--repeats", self.repeats, "at least 1")
        _require(0 <= self.seed < 1 << 63, "--seed", self.seed, "0 to 2^63-1")
        directory = self.directory
        _require(directory is None or Path(directory).is_dir(), "--directory", directory, "a directory that exists")
        check_output(self.output)


@dataclass(frozen=True, kw_only=True)
class ResourcesOptions:
    """Compiles the kernels and lists the registers, spills and shared memory that they take. Needs no GPU."""

    capability: list[int] = field(default_factory=list)
    """Compute capabilities (90 for an H200), one or more; by default the GPU's own, without one 80 90 100."""
    output: PathText | None = None
    """CSV file to write."""

    def __post_init__(self) -> None:
        for capability in self.capability:
            _require(80 <= capability <= 121, "--capability", capability, "80 (A100) to 121, for example 90 (H200)")
        check_output(self.output)


def _require(holds: bool, option: str, found: object, expected: str) -> None:
    if not holds:
        raise UserError(f"{option} is {found}, expected {expected}")
