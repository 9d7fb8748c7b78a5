"""What is in a preprocessed dataset: counts, lengths, frequent tokens and samples of its text, in bounded memory."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_prealign.data.dataset import Dataset, open_dataset, token_positions
from megatron_prealign.data.indexed import Index
from megatron_prealign.data.sidecar import sidecar_path
from megatron_prealign.errors import UserError

if TYPE_CHECKING:
    from megatron_prealign.tokenizer.base import Tokenizer

# Documents looked at at a time.
_CHUNK = 1 << 18
# Lengths below twice this count exactly; above, this many steps between powers of two: an error below 0.1 %.
_STEPS = 1024
# Tokens are counted in this many stretches spread evenly over the file.
_STRETCHES = 64
_FREQUENT = 10
# Enough tokens for the characters of a sample that are shown.
_SAMPLE_TOKENS = 200
_SAMPLE_CHARACTERS = 200
_BAR = 40


@dataclass(frozen=True)
class Lengths:
    """Tokens per document."""

    min: int
    median: int
    mean: float
    p90: int
    p99: int
    max: int
    histogram: list[tuple[int, int, int]]
    """(shortest, longest, documents) of each power of two from the shortest to the longest document."""


@dataclass(frozen=True)
class Sample:
    """The beginning of one document."""

    document: int
    """Its number, from 0."""
    tokens: int
    """Its length."""
    text: str | None
    """What it says; None without a tokenizer."""
    ids: list[int]
    """Its first ids."""


@dataclass(frozen=True)
class TokenCounts:
    """How often tokens occur, in a sample."""

    tokens: int
    """Tokens that were counted."""
    distinct: int
    """Different ids among them."""
    outside: int
    """How many were no ids of the tokenizer."""
    frequent: list[tuple[int, int, str | None]]
    """(id, count, text), the most frequent first."""


@dataclass(frozen=True)
class Inspection:
    """Everything about one dataset."""

    prefix: str
    documents: int
    sequences: int
    tokens: int
    dtype: str
    bin_bytes: int
    sidecar: dict[str, Any] | None
    """The whole of PREFIX.json; None if there is none."""
    tokenizer: str | None
    """Path of the tokenizer that decoded."""
    note: str | None
    """Why nothing was decoded."""
    lengths: Lengths | None
    """None for a dataset without documents."""
    counts: TokenCounts
    samples: list[Sample]


def inspect_dataset(
    prefix: str, *, tokenizer: str | None = None, samples: int = 3, count_tokens: int = 10_000_000
) -> Inspection:
    """Looks at a dataset. The lengths of all documents are streamed from the index, tokens are sampled: memory does not
    depend on the size.

    Args:
        prefix: path without ending; `PREFIX.json` may be missing.
        tokenizer: the tokenizer that made the ids; by default the one that the sidecar names, if it is still there.
        samples: documents to show, spread evenly from the first on.
        count_tokens: tokens to count for the most frequent ones.

    Raises:
        UserError: the dataset is missing or damaged, or the tokenizer is another one.
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
    """The tokenizer, or why there is none."""
    from megatron_prealign.tokenizer.load import load_tokenizer

    if path is None and dataset.sidecar is None:
        return None, f"{sidecar_path(dataset.prefix).name} is missing; give --tokenizer to see text"
    named = dataset.sidecar.tokenizer.path if dataset.sidecar is not None else ""
    try:
        opened = load_tokenizer(path or named)
    except UserError as error:
        if path is not None:
            raise
        return None, f"the tokenizer that the sidecar names cannot be opened ({error}); give --tokenizer to see text"
    if dataset.sidecar is not None and opened.fingerprint != dataset.sidecar.tokenizer.fingerprint:
        message = f"the tokenizer {path or named} is another one than that which made {dataset.prefix} ({named})"
        if path is not None:
            raise UserError(f"{message}; give the right --tokenizer")
        return None, f"{message}, it has changed; give --tokenizer to see text"
    return opened, None


def document_lengths(index: Index) -> Iterator[np.ndarray]:
    """Tokens of every document, int64, in pieces."""
    for start in range(0, index.documents, _CHUNK):
        bounds = index.boundaries[start : min(start + _CHUNK, index.documents) + 1]
        if (np.diff(bounds) == 1).all():
            yield index.lengths[bounds[0] : bounds[-1]].astype(np.int64)
        else:
            yield np.diff(token_positions(index, bounds))


def measure_lengths(index: Index) -> Lengths:
    """Statistics of all documents, at least one. Quantiles are exact below 2,048 tokens and to 0.1 % above."""
    counts = np.zeros(1, dtype=np.int64)
    shortest, longest = 2**63 - 1, 0
    for lengths in document_lengths(index):
        found = np.bincount(_bucket(lengths))
        if len(found) > len(counts):
            counts = np.pad(counts, (0, len(found) - len(counts)))
        counts[: len(found)] += found
        shortest, longest = min(shortest, int(lengths.min())), max(longest, int(lengths.max()))
    ends = np.cumsum(counts)

    def quantile(share: float) -> int:
        # The smallest length that this share of the documents does not exceed.
        bucket = int(np.searchsorted(ends, max(int(np.ceil(share * index.documents)), 1)))
        return min(max(_lowest(bucket), shortest), longest)

    rows: dict[int, int] = {}
    for bucket in np.flatnonzero(counts).tolist():
        power = _lowest(bucket).bit_length()
        rows[power] = rows.get(power, 0) + int(counts[bucket])
    histogram = [(2**power // 2, max(2**power - 1, 0), rows.get(power, 0)) for power in range(min(rows), max(rows) + 1)]
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
    """The bucket of each length: its number below 2,048, then 1,024 of equal width for each power of two."""
    exponent = np.maximum(np.frexp(lengths.astype(np.float64))[1].astype(np.int64) - _STEPS.bit_length(), 0)
    return exponent * _STEPS + (lengths >> exponent)


def _lowest(bucket: int) -> int:
    """The smallest length of a bucket."""
    exponent = max(bucket // _STEPS - 1, 0)
    return (bucket - exponent * _STEPS) << exponent


def _count(dataset: Dataset, tokens: np.ndarray, limit: int, tokenizer: "Tokenizer | None") -> TokenCounts:
    """Counts the ids of up to `limit` tokens."""
    part = max(-(-min(limit, len(tokens)) // _STRETCHES), 1)
    starts = np.unique(np.linspace(0, max(len(tokens) - part, 0), _STRETCHES).astype(np.int64))
    if len(tokens) <= limit:
        stretches = [tokens[start : start + _CHUNK] for start in range(0, len(tokens), _CHUNK)]
    else:
        stretches = [tokens[start : start + part] for start in starts.tolist()]
    seen: dict[int, int] = {}
    for stretch in stretches:
        ids, counts = np.unique(stretch, return_counts=True)
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


def render(found: Inspection) -> list[str]:
    """The lines that a person reads."""
    facts = found.sidecar
    lines = [
        f"{found.prefix}",
        f"documents     {found.documents:,}"
        + ("" if found.sequences == found.documents else f" in {found.sequences:,} sequences"),
        f"tokens        {found.tokens:,} as {found.dtype}, {found.bin_bytes:,} bytes",
    ]
    lines += ["sidecar       none: made by other tools, training needs one"] if facts is None else _fact_lines(facts)
    if found.lengths is not None:
        lines += _length_lines(found.lengths)
    counts = found.counts
    lines += ["", f"most frequent tokens, of {counts.distinct:,} different ones among {counts.tokens:,}:"]
    for token, count, text in counts.frequent:
        shown = "" if text is None else f"  {text!r}"
        lines.append(f"  {token:>8}  {count / counts.tokens:7.2%}{shown}")
    if counts.outside:
        lines.append(
            f"  {counts.outside:,} of them are no ids of the tokenizer: megatron-prealign dataset verify says more"
        )
    if found.samples:
        lines += ["", "samples:"]
    for sample in found.samples:
        lines.append(f"  document {sample.document:,}, {sample.tokens:,} tokens:")
        lines.append(f"    {' '.join(map(str, sample.ids[:20])) if sample.text is None else repr(sample.text)}")
    if found.note is not None:
        lines.append(f"note: {found.note}")
    return lines


def _fact_lines(facts: dict[str, Any]) -> list[str]:
    tokenizer = facts["tokenizer"]
    ends = f"every document ends with {facts['eod_id']}" if facts["append_eod"] else "no end-of-document tokens"
    lines = [
        f"language      {facts['language']}",
        f"tokenizer     {tokenizer['path']}, {tokenizer['vocab_size']:,} ids, {tokenizer['fingerprint'][:19]}...",
        f"documents     {ends}{', starts with BOS' if facts['bos'] else ''}",
        f"text          {facts['bytes']:,} bytes, {facts['bytes'] / max(facts['tokens'], 1):.2f} a token"
        if facts["bytes"]
        else "text          of unknown size",
        f"words         {'not marked' if facts['segmenter'] is None else 'marked by ' + facts['segmenter']}",
    ]
    if facts["shard"] is not None:
        lines.append(f"shard         {facts['shard']}")
    if facts["engine"]:
        lines.append(f"encoded by    {facts['engine']}")
    inputs = facts["inputs"]
    lines.append(f"inputs        {len(inputs):,}, {sum(each['bytes'] for each in inputs):,} bytes")
    lines += [f"  {each['path']}" for each in inputs[:5]]
    lines += [f"  ... {len(inputs) - 5:,} more"] if len(inputs) > 5 else []
    lines.append(f"skipped       {facts['skipped_count']:,}")
    lines += [f"  {each['where']}: {each['why']}" for each in facts["skipped"][:5]]
    lines += [f"  ... {facts['skipped_count'] - 5:,} more"] if facts["skipped_count"] > 5 else []
    lines.append(f"checksums     {', '.join(facts['checksums']) or 'none'}")
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
