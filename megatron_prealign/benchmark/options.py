"""Options of `megatron-prealign benchmark`. Does not import torch."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_prealign.errors import UserError
from megatron_prealign.files.directories import check_output_file
from megatron_prealign.recipe.describe import PathText, PrefixText


@dataclass(frozen=True, kw_only=True)
class CodeSwitchOptions:
    """Benchmarks code-switching of a batch: the Triton kernels (on a GPU), plain PyTorch and a Python loop."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Device to run on; auto uses a GPU if one is available, otherwise one CPU thread."""
    cases: list[str] = field(default_factory=list)
    """Batch shapes as ROWSxSEQUENCE, one or more. Default: 8x4096 256x4096 2x131072 on a GPU, 16x4096 on a CPU."""
    ratio: list[float] = field(default_factory=lambda: [0.05, 0.5])
    """Probabilities of switching a word in the table, one or more; the lookahead is ratio x sequence length."""
    token_dtype: Literal["int64", "int32", "both"] = "int64"
    """Dtype of the source tokens."""
    keys: int | None = None
    """Number of keys in the synthetic table. Default: 1,000,000 on a GPU, 100,000 on a CPU."""
    table: PathText | None = None
    """Table file to use instead of the synthetic table; requires --data."""
    data: PrefixText | None = None
    """Prefix of a preprocessed dataset to use instead of the synthetic text, in a source language of --table."""
    seed: int = 1234
    """Seed of the synthetic table, the synthetic text and the random draws."""
    repeats: int | None = None
    """Repeats per measurement. Default: 200 on a GPU, 30 on a CPU. Slow calls are repeated less often."""
    l2: Literal["cold", "warm", "both"] = "cold"
    """GPU: state of the L2 cache. cold writes a large buffer before every repeat to evict everything else."""
    python_loop: bool = True
    """Also measure the Python loop. With a million keys, its dictionary takes 1 GB and about 20 seconds to build."""
    output: PathText | None = None
    """CSV file to write, one row per measurement."""

    def __post_init__(self) -> None:
        self.shapes()
        for ratio in self.ratio:
            _require(0.0 <= ratio <= 1.0, "--ratio", ratio, "numbers in [0, 1]")
        _require(bool(self.ratio), "--ratio", "empty", "one or more numbers in [0, 1]")
        _require(self.keys is None or self.keys >= 1, "--keys", self.keys, "at least 1")
        _require(0 <= self.seed < 1 << 64, "--seed", self.seed, "0 to 2^64-1")
        _require(self.repeats is None or self.repeats >= 1, "--repeats", self.repeats, "at least 1")
        if (self.table is None) != (self.data is None):
            option, missing = ("--table", "--data") if self.data is None else ("--data", "--table")
            raise UserError(f"{option} requires {missing}; add {missing}")
        if self.table is not None and self.keys is not None:
            raise UserError("--keys cannot be combined with --table; remove --keys")
        check_output_file(self.output)

    def shapes(self) -> list[tuple[int, int]]:
        """Returns the cases as (rows, sequence); empty for the default cases."""
        shapes = []
        for case in self.cases:
            parts = re.fullmatch(r"([1-9]\d{0,6})x([1-9]\d{0,6})", case)
            if parts is None:
                raise UserError(f"--cases is {case!r}, expected ROWSxSEQUENCE such as 8x4096, both from 1 to 9999999")
            shapes.append((int(parts[1]), int(parts[2])))
        return shapes


@dataclass(frozen=True, kw_only=True)
class ContrastiveOptions:
    """Benchmarks the contrastive loss, forward and backward: eager PyTorch, torch.compile, chunked plain PyTorch and
    the Triton kernels (on a GPU)."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Device to run on; auto uses a GPU if one is available."""
    words: list[int] = field(default_factory=list)
    """Numbers of words per batch, one or more. Default: 4096 16384 65536 on a GPU, 1024 4096 on a CPU."""
    hidden: list[int] = field(default_factory=list)
    """Hidden sizes, one or more. Default: 2048 on a GPU, 256 on a CPU."""
    layers: int = 1
    """Number of layers per call."""
    dtype: Literal["float32", "bfloat16", "both"] = "float32"
    """Dtype of the words."""
    threads: int = 1
    """CPU: number of PyTorch threads."""
    compiled: bool = True
    """Also measure torch.compile of the eager code, which requires a C++ compiler on a CPU."""
    largest: bool = False
    """GPU: also double the number of words until each implementation runs out of memory."""
    seed: int = 1234
    """Seed of the words."""
    repeats: int | None = None
    """Repeats per measurement. Default: 30 on a GPU, 10 on a CPU. Slow calls are repeated less often."""
    output: PathText | None = None
    """CSV file to write, one row per measurement."""

    def __post_init__(self) -> None:
        for total in self.words:
            _require(2 <= total <= 1 << 21, "--words", total, "2 to 2097152")
        for hidden in self.hidden:
            _require(1 <= hidden <= 1 << 16, "--hidden", hidden, "1 to 65536")
        _require(self.layers >= 1, "--layers", self.layers, "at least 1")
        _require(self.threads >= 1, "--threads", self.threads, "at least 1")
        _require(0 <= self.seed < 1 << 63, "--seed", self.seed, "0 to 2^63-1")
        _require(self.repeats is None or self.repeats >= 1, "--repeats", self.repeats, "at least 1")
        check_output_file(self.output)

    def check_device(self, kind: str) -> None:
        """Checks the options that depend on the device type, `cuda` or `cpu`.

        Raises:
            UserError: an option is not supported on this device.
        """
        if self.largest and kind != "cuda":
            raise UserError("--largest requires a GPU: on a CPU it would exhaust the machine's memory; remove it")


@dataclass(frozen=True, kw_only=True)
class PreprocessOptions:
    """Benchmarks preprocessing with gigatoken, with the tokenizer's own library (plain), and document by document as in
    Megatron-LM's tool (megatron). All of them must write the same tokens."""

    input: list[PathText] = field(default_factory=list)
    """Files, directories or patterns to preprocess. Default: synthetic text."""
    text_key: str = "text"
    """Key of the text in each JSON object."""
    tokenizer: PathText | None = None
    """Tokenizer directory or sentencepiece model. Default: train a byte-level BPE with 4,096 ids on the text."""
    implementation: list[str] = field(default_factory=lambda: ["gigatoken", "plain", "megatron"])
    """Implementations to measure, one or more of gigatoken, plain and megatron."""
    workers: int = 2
    """Worker processes per implementation."""
    mb: float = 200
    """Size of the synthetic text in MB (10^6 bytes)."""
    document_bytes: list[int] = field(default_factory=lambda: [200, 2000])
    """Minimum and maximum size of synthetic documents in bytes; sizes are log-uniform between them."""
    megatron_mb: float = 20
    """Amount of text for megatron, in 10^6 characters; it is slow, and has no cache that a longer text would warm
    up."""
    directory: PathText | None = None
    """Directory for text and output during the run. Default: the system's temporary directory."""
    seed: int = 1234
    """Seed of the synthetic text."""
    output: PathText | None = None
    """CSV file to write, one row per measurement."""

    def __post_init__(self) -> None:
        known = ("gigatoken", "plain", "megatron")
        names = self.implementation
        valid = bool(names) and len(set(names)) == len(names) and set(names) <= set(known)
        _require(valid, "--implementation", " ".join(names) or "empty", f"one or more of {', '.join(known)}")
        _require(self.workers >= 1, "--workers", self.workers, "at least 1")
        _require(0 < self.mb <= 1e7, "--mb", self.mb, "more than 0, at most 10000000")
        _require(0 < self.megatron_mb <= 1e7, "--megatron-mb", self.megatron_mb, "more than 0, at most 10000000")
        sizes = self.document_bytes
        valid = len(sizes) == 2 and 1 <= sizes[0] <= sizes[-1] <= 1 << 28
        _require(
            valid, "--document-bytes", " ".join(map(str, sizes)) or "empty", "two numbers from 1 to 2^28, ascending"
        )
        _require(0 <= self.seed < 1 << 63, "--seed", self.seed, "0 to 2^63-1")
        directory = self.directory
        _require(directory is None or Path(directory).is_dir(), "--directory", directory, "an existing directory")
        check_output_file(self.output)


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """Benchmarks speed and memory of convert to-hf and from-hf with a synthetic bf16 Llama, compared with cp of the
    same bytes. Files are read from disk, not from the page cache, and written until they are synced."""

    parameters: int = 1_000_000_000
    """Approximate number of parameters of the model; needs 2 x 2 bytes of disk space per parameter."""
    shard_bytes: int = 5_000_000_000
    """Maximum size of a weight file in bytes."""
    repeats: int = 3
    """Repeats per measurement; the median is reported."""
    directory: PathText | None = None
    """Directory for the files during the run. Default: the system's temporary directory."""
    seed: int = 1234
    """Seed of the weights."""
    output: PathText | None = None
    """CSV file to write, one row per measurement."""

    def __post_init__(self) -> None:
        count = self.parameters
        _require(1_000_000 <= count <= 10**12, "--parameters", count, "1000000 to 1000000000000")
        _require(self.shard_bytes >= 1_000_000, "--shard-bytes", self.shard_bytes, "at least 1000000")
        _require(self.repeats >= 1, "--repeats", self.repeats, "at least 1")
        _require(0 <= self.seed < 1 << 63, "--seed", self.seed, "0 to 2^63-1")
        directory = self.directory
        _require(directory is None or Path(directory).is_dir(), "--directory", directory, "an existing directory")
        check_output_file(self.output)


@dataclass(frozen=True, kw_only=True)
class ResourcesOptions:
    """Compiles the kernels and lists their registers, spills and shared memory. Does not require a GPU."""

    capability: list[int] = field(default_factory=list)
    """Compute capabilities (90 for an H200), one or more. Default: that of the GPU, or 80 90 100 without a GPU."""
    output: PathText | None = None
    """CSV file to write, one row per kernel, setting and capability."""

    def __post_init__(self) -> None:
        for capability in self.capability:
            _require(80 <= capability <= 121, "--capability", capability, "80 (A100) to 121, for example 90 (H200)")
        check_output_file(self.output)


def _require(condition: bool, option: str, value: object, expected: str) -> None:
    if not condition:
        raise UserError(f"{option} is {value}, expected {expected}")
