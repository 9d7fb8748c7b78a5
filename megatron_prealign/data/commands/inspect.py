"""Summarises a preprocessed dataset in bounded memory: counts, lengths, frequent tokens and sample documents."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_prealign.data.dataset import Dataset, open_dataset, token_positions
from megatron_prealign.data.indexed import Index
from megatron_prealign.data.sidecar import sidecar_path
from megatron_prealign.errors import UserError
from megatron_prealign.text import plural

if TYPE_CHECKING:
    from megatron_prealign.tokenizer.base import Tokenizer

# Number of documents processed at a time.
_CHUNK = 1 << 18
# Lengths below twice this value are exact; above, this many buckets per power of two: an error below 0.1 %.
_STEPS = 1024
# Tokens are counted in this many ranges spread evenly over the file.
_RANGES = 64
_FREQUENT = 10
# Enough tokens for the displayed characters of a sample.
_SAMPLE_TOKENS = 200
_SAMPLE_CHARACTERS = 200
_BAR = 40


@dataclass(frozen=True)
class Lengths:
    """Statistics of tokens per document."""

    min: int
    median: int
    mean: float
    p90: int
    p99: int
    max: int
    histogram: list[tuple[int, int, int]]
    """(min, max, documents) of each power of two, from the shortest to the longest document."""


@dataclass(frozen=True)
class Sample:
    """The start of a document."""

    document: int
    """Number of the document, from 0."""
    tokens: int
    """Length of the document."""
    text: str | None
    """Decoded text; None without a tokenizer."""
    ids: list[int]
    """First token ids."""


@dataclass(frozen=True)
class TokenCounts:
    """Token frequencies in a sample of the dataset."""

    tokens: int
    """Number of counted tokens."""
    distinct: int
    """Number of distinct ids."""
    outside: int
    """Number of tokens outside the vocabulary."""
    frequent: list[tuple[int, int, str | None]]
    """(id, count, text), most frequent first."""


@dataclass(frozen=True)
class Inspection:
    """Summary of a dataset."""

    prefix: str
    documents: int
    sequences: int
    tokens: int
    dtype: str
    bin_bytes: int
    sidecar: dict[str, Any] | None
    """Content of PREFIX.json; None if it does not exist."""
    tokenizer: str | None
    """Path of the tokenizer used for decoding."""
    note: str | None
    """Reason why no text was decoded."""
    lengths: Lengths | None
    """None for a dataset without documents."""
    counts: TokenCounts
    samples: list[Sample]


def inspect_dataset(
    prefix: str, *, tokenizer: str | None = None, samples: int = 3, count_tokens: int = 10_000_000
) -> Inspection:
    """Summarises a dataset. Document lengths are streamed and tokens are sampled: memory does not depend on the size.

    Args:
        prefix: Path without extension; `PREFIX.json` may be missing.
        tokenizer: Tokenizer that produced the ids; by default the one named in the sidecar, if it still exists.
        samples: Number of documents to show, evenly spaced from the first on.
        count_tokens: Number of tokens to count for the most frequent ones.

    Raises:
        UserError: The dataset is missing or corrupt, or the tokenizer does not match.
    """
    dataset = open_dataset(prefix, sidecar=sidecar_path(prefix).exists())
    index = dataset.index
    opened, note = _open_tokenizer(dataset, tokenizer)
    tokens = np.memmap(dataset.bin, index.dtype, "r") if index.tokens else np.empty(0, index.dtype)
    return Inspection(
        prefix=prefix,
        documents=index.documents,
        sequences=index.sequences,
        tokens=index.tokens,
        dtype=str(index.dtype),
        bin_bytes=index.token_bytes,
        sidecar=None if dataset.sidecar is None else asdict(dataset.sidecar),
        tokenizer=None if opened is None else str(opened.path),
        note=note,
        lengths=measure_lengths(index) if index.documents else None,
        counts=_count(dataset, tokens, count_tokens, opened),
        samples=list(_samples(dataset, tokens, samples, opened)),
    )


def _open_tokenizer(dataset: Dataset, path: str | None) -> "tuple[Tokenizer | None, str | None]":
    """Returns the tokenizer, or the reason why there is none."""
    from megatron_prealign.tokenizer.load import load_tokenizer

    if path is None and dataset.sidecar is None:
        return None, f"{sidecar_path(dataset.prefix).name} is missing; use --tokenizer to show text"
    named = dataset.sidecar.tokenizer.path if dataset.sidecar is not None else ""
    try:
        opened = load_tokenizer(path or named)
    except UserError as error:
        if path is not None:
            raise
        return None, f"cannot load the tokenizer named in the sidecar ({error}); use --tokenizer to show text"
    if dataset.sidecar is not None and opened.fingerprint != dataset.sidecar.tokenizer.fingerprint:
        if path is not None:
            raise UserError(
                f"--tokenizer {path} does not match {dataset.prefix}, which was preprocessed with {named}; pass that "
                "tokenizer"
            )
        return None, f"tokenizer {named} has changed since {dataset.prefix} was made; use --tokenizer to show text"
    return opened, None


def document_lengths(index: Index) -> Iterator[np.ndarray]:
    """Yields the number of tokens of every document, int64, in chunks."""
    for start in range(0, index.documents, _CHUNK):
        bounds = index.boundaries[start : min(start + _CHUNK, index.documents) + 1]
        if (np.diff(bounds) == 1).all():
            yield index.lengths[bounds[0] : bounds[-1]].astype(np.int64)
        else:
            yield np.diff(token_positions(index, bounds))


def measure_lengths(index: Index) -> Lengths:
    """Computes statistics over all documents, at least one. Quantiles are exact below 2,048 tokens, to 0.1 % above."""
    counts = np.zeros(1, dtype=np.int64)
    shortest, longest = 2**63 - 1, 0
    for lengths in document_lengths(index):
        added = np.bincount(_bucket(lengths))
        if len(added) > len(counts):
            counts = np.pad(counts, (0, len(added) - len(counts)))
        counts[: len(added)] += added
        shortest, longest = min(shortest, int(lengths.min())), max(longest, int(lengths.max()))
    ends = np.cumsum(counts)

    def quantile(fraction: float) -> int:
        # The smallest length that this fraction of the documents does not exceed.
        bucket = int(np.searchsorted(ends, max(int(np.ceil(fraction * index.documents)), 1)))
        return min(max(_lowest(bucket), shortest), longest)

    by_power: dict[int, int] = {}
    for bucket in np.flatnonzero(counts).tolist():
        power = _lowest(bucket).bit_length()
        by_power[power] = by_power.get(power, 0) + int(counts[bucket])
    histogram = [
        (2**power // 2, max(2**power - 1, 0), by_power.get(power, 0))
        for power in range(min(by_power), max(by_power) + 1)
    ]
    return Lengths(
        min=shortest,
        median=quantile(0.5),
        mean=index.tokens / index.documents,
        p90=quantile(0.9),
        p99=quantile(0.99),
        max=longest,
        histogram=histogram,
    )


def _bucket(lengths: np.ndarray) -> np.ndarray:
    """Bucket of each length: the length itself below 2,048, then 1,024 equal buckets per power of two."""
    exponent = np.maximum(np.frexp(lengths.astype(np.float64))[1].astype(np.int64) - _STEPS.bit_length(), 0)
    return exponent * _STEPS + (lengths >> exponent)


def _lowest(bucket: int) -> int:
    """Smallest length in a bucket."""
    exponent = max(bucket // _STEPS - 1, 0)
    return (bucket - exponent * _STEPS) << exponent


def _count(dataset: Dataset, tokens: np.ndarray, limit: int, tokenizer: "Tokenizer | None") -> TokenCounts:
    """Counts ids in up to `limit` tokens."""
    part = max(-(-min(limit, len(tokens)) // _RANGES), 1)
    starts = np.unique(np.linspace(0, max(len(tokens) - part, 0), _RANGES).astype(np.int64))
    if len(tokens) <= limit:
        ranges = [tokens[start : start + _CHUNK] for start in range(0, len(tokens), _CHUNK)]
    else:
        ranges = [tokens[start : start + part] for start in starts.tolist()]
    seen: dict[int, int] = {}
    for part_tokens in ranges:
        ids, counts = np.unique(part_tokens, return_counts=True)
        for token, count in zip(ids.tolist(), counts.tolist(), strict=True):
            seen[token] = seen.get(token, 0) + count
    vocab_size = None
    if dataset.sidecar is not None:
        vocab_size = dataset.sidecar.tokenizer.vocab_size
    elif tokenizer is not None:
        vocab_size = tokenizer.vocab_size
    outside = sum(count for token, count in seen.items() if vocab_size is not None and not 0 <= token < vocab_size)
    frequent = sorted(seen.items(), key=lambda item: (-item[1], item[0]))[:_FREQUENT]
    return TokenCounts(
        tokens=sum(seen.values()),
        distinct=len(seen),
        outside=outside,
        frequent=[(token, count, _decoded(tokenizer, [token])) for token, count in frequent],
    )


def _samples(dataset: Dataset, tokens: np.ndarray, count: int, tokenizer: "Tokenizer | None") -> Iterator[Sample]:
    index = dataset.index
    count = min(count, index.documents)
    for number in range(count):
        document = number * index.documents // count
        start, stop = token_positions(index, index.boundaries[document : document + 2]).tolist()
        ids = tokens[start : min(stop, start + _SAMPLE_TOKENS)].tolist()
        ended = dataset.sidecar is not None and ids[-1:] == [dataset.sidecar.eod_id]
        text = _decoded(tokenizer, ids[:-1] if ended else ids)
        yield Sample(document, stop - start, None if text is None else text[:_SAMPLE_CHARACTERS], ids)


def _decoded(tokenizer: "Tokenizer | None", ids: list[int]) -> str | None:
    if tokenizer is None:
        return None
    return tokenizer.decode([token for token in ids if 0 <= token < tokenizer.vocab_size])


def render(inspection: Inspection) -> list[str]:
    """Formats the summary as human-readable lines."""
    sidecar = inspection.sidecar
    lines = [
        f"{inspection.prefix}",
        f"documents     {inspection.documents:,}"
        + ("" if inspection.sequences == inspection.documents else f" in {plural(inspection.sequences, 'sequence')}"),
        f"tokens        {inspection.tokens:,} as {inspection.dtype}, {plural(inspection.bin_bytes, 'byte')}",
    ]
    lines += (
        ["sidecar       none (made by other tools); training needs one"] if sidecar is None else _sidecar_lines(sidecar)
    )
    if inspection.lengths is not None:
        lines += _length_lines(inspection.lengths)
    counts = inspection.counts
    lines += ["", f"most frequent tokens ({counts.distinct:,} distinct among {counts.tokens:,} counted):"]
    for token, count, text in counts.frequent:
        shown = "" if text is None else f"  {text!r}"
        lines.append(f"  {token:>8}  {count / counts.tokens:7.2%}{shown}")
    if counts.outside:
        lines.append(
            f"  outside the vocabulary: {plural(counts.outside, 'token')}; run megatron-prealign dataset verify for "
            "details"
        )
    if inspection.samples:
        lines += ["", "samples:"]
    for sample in inspection.samples:
        lines.append(f"  document {sample.document:,}, {plural(sample.tokens, 'token')}:")
        lines.append(f"    {' '.join(map(str, sample.ids[:20])) if sample.text is None else repr(sample.text)}")
    if inspection.note is not None:
        lines.append(f"note: {inspection.note}")
    return lines


def _sidecar_lines(sidecar: dict[str, Any]) -> list[str]:
    tokenizer = sidecar["tokenizer"]
    ends = f"every document ends with {sidecar['eod_id']}" if sidecar["append_eod"] else "no end-of-document tokens"
    lines = [
        f"language      {sidecar['language']}",
        f"tokenizer     {tokenizer['path']}, {tokenizer['vocab_size']:,} ids, {tokenizer['fingerprint'][:19]}...",
        f"documents     {ends}{', starts with BOS' if sidecar['bos'] else ''}",
        f"text          {sidecar['bytes']:,} bytes, {sidecar['bytes'] / max(sidecar['tokens'], 1):.2f} per token"
        if sidecar["bytes"]
        else "text          size unknown",
        f"words         {'not marked' if sidecar['segmenter'] is None else 'marked by ' + sidecar['segmenter']}",
    ]
    if sidecar["shard"] is not None:
        lines.append(f"shard         {sidecar['shard']}")
    if sidecar["engine"]:
        lines.append(f"encoded by    {sidecar['engine']}")
    inputs = sidecar["inputs"]
    lines.append(f"inputs        {len(inputs):,}, {sum(each['bytes'] for each in inputs):,} bytes")
    lines += [f"  {each['path']}" for each in inputs[:5]]
    lines += [f"  ... {len(inputs) - 5:,} more"] if len(inputs) > 5 else []
    lines.append(f"skipped       {sidecar['skipped_count']:,}")
    lines += [f"  {each['where']}: {each['why']}" for each in sidecar["skipped"][:5]]
    lines += [f"  ... {sidecar['skipped_count'] - 5:,} more"] if sidecar["skipped_count"] > 5 else []
    lines.append(f"checksums     {', '.join(sidecar['checksums']) or 'none'}")
    return lines


def _length_lines(lengths: Lengths) -> list[str]:
    lines = [
        "",
        "tokens per document:",
        f"  min {lengths.min:,}, median {lengths.median:,}, mean {lengths.mean:,.1f}, p90 {lengths.p90:,}, "
        f"p99 {lengths.p99:,}, max {lengths.max:,}",
    ]
    most = max(count for _, _, count in lengths.histogram)
    for low, high, count in lengths.histogram:
        bar = "#" * -(-count * _BAR // most)
        span = f"{low:,}" if low == high else f"{low:,} to {high:,}"
        lines.append(f"  {span:>24}  {count:>13,}  {bar}".rstrip())
    return lines
