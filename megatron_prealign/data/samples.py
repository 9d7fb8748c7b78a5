"""Samples of fixed length: the shuffled, weighted blend for training and plain windows per language for validation."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_prealign.data.blend import Blend, SavedBlend, continue_blend, first_blend
from megatron_prealign.data.index_cache import build_if_needed, wait_for_arrays
from megatron_prealign.data.sources import (
    OpenSource,
    check_token_range,
    open_training_sources,
    open_validation_sources,
    read_span,
)
from megatron_prealign.errors import UserError
from megatron_prealign.recipe.data import DataSection
from megatron_prealign.runtime.index_builder import (
    MAX_BLEND_SOURCES,
    MAX_SEQUENCES,
    blending_indices,
    epoch_indices,
    megatron_core_version,
)

# Positions of the blend counted at a time, so that counting never copies an index of billions of positions at once.
_COUNT_CHUNK = 1 << 24
# Part of the name of an index: another way to order samples must not find an older one.
_ORDER_VERSION = 2


@dataclass(frozen=True)
class SampleRows:
    """A batch of samples before code-switching and masks."""

    tokens: torch.Tensor
    """int64 [rows, seq_length + 1 + lookahead]: inputs and, one to the right, labels; behind them what follows."""
    language: torch.Tensor
    """int64 [rows], index into the run's list of languages."""
    sample_id: torch.Tensor
    """int64 [rows], position in the blended order (or in a language's validation windows)."""
    word_starts: torch.Tensor | None = None
    """bool, shape of `tokens`: where a segmenter says that a word starts; false in rows of a source without one. None
    if no source of the run has one, and for validation."""


@dataclass(frozen=True, eq=False)
class TrainPlan:
    """The sources of the training blend and where its index belongs: opened and checked, the index not yet made.

    A job of several processes reads the plan on all, lets one per node write the index, and then opens it on all. No
    step waits for another process, so a job can agree after each that it succeeded everywhere.
    """

    sources: Sequence[OpenSource]
    blend: Blend
    seq_length: int
    num_samples: int
    seed: int
    directory: Path
    """Directory of the index."""
    lookahead: int = 0
    """Tokens that each row has behind its sample; the index does not depend on it."""

    @classmethod
    def read(
        cls,
        data: DataSection,
        *,
        num_samples: int,
        seed: int,
        languages: Sequence[str],
        cache_dir: Path,
        vocab_size: int | None = None,
        tokenizer_fingerprint: str | None = None,
        lookahead: int = 0,
        saved: SavedBlend | None = None,
    ) -> "TrainPlan":
        """Opens and checks the sources.

        A source with fewer samples than its share is repeated in epochs, reshuffled each time. Which samples follow
        each other depends on the documents' lengths, the weights, `seed` and the sequence length, not on paths: moved
        data keeps its order and its cache. A plan of more samples begins with those of a shorter one.

        Args:
            data: The recipe's section.
            num_samples: Samples of the whole run.
            seed: From 0; decides the order.
            languages: The run's languages, in the order of their ids.
            cache_dir: Directory of the index cache, on a disk that the processes of a node share.
            vocab_size: Ids that the model has; None does not check.
            tokenizer_fingerprint: What the sidecars must name; None asks only that all name the same.
            lookahead: Tokens to read behind every sample, from 0: those that follow in the same source's shuffled order
                of documents, and behind its last document those of its first.
            saved: The blend of the checkpoint to go on from; None for a run that begins.

        Raises:
            UserError: a source is missing, damaged, too small, does not fit or is not what it was when it was saved.
        """
        if lookahead < 0:
            raise ValueError(f"lookahead is {lookahead}, expected a number from 0")
        if num_samples <= 0:
            raise ValueError(f"num_samples is {num_samples}, expected a number above 0")
        sources = open_training_sources(
            data, languages, tokenizer_fingerprint=tokenizer_fingerprint, vocab_size=vocab_size
        )
        _check_sizes(sources, data)
        weights = [source.weight for source in data.sources]
        blend = first_blend(sources, weights, data.seq_length, [_digest_of_lengths(source) for source in sources])
        if saved is not None:
            blend = continue_blend(saved, blend)
        # A run that is through may still be asked for its state: an index is never empty.
        num_samples = max(num_samples, blend.start + 1)
        key = _index_key(blend, data.seq_length, num_samples, seed)
        return cls(sources, blend, data.seq_length, num_samples, seed, cache_dir / f"blend-{key}", lookahead)

    def write_index(self) -> bool:
        """Makes the index where it is missing or damaged; called on exactly one process per node. Says whether it was.

        Raises:
            UserError: the cache cannot be written.
        """
        return build_if_needed(
            self.directory,
            lambda: _build_arrays(self.sources, self.blend, self.seq_length, self.num_samples, self.seed),
        )

    def open(self) -> "TrainSamples":
        """Maps the index, once it is written.

        Raises:
            UserError: it is not there.
        """
        arrays = wait_for_arrays(self.directory)
        return TrainSamples(
            self.sources,
            self.blend,
            arrays,
            seq_length=self.seq_length,
            num_samples=self.num_samples,
            lookahead=self.lookahead,
        )


class TrainSamples:
    """The training blend: sample i is the same whichever process asks, and in whatever order.

    After a change of the blend only the positions behind it can be read.
    """

    def __init__(
        self,
        sources: Sequence[OpenSource],
        blend: Blend,
        arrays: Mapping[str, np.ndarray],
        *,
        seq_length: int,
        num_samples: int,
        lookahead: int = 0,
    ) -> None:
        self._sources = list(sources)
        self._blend = blend
        self._row_tokens = seq_length + 1 + lookahead
        self._num_samples = num_samples
        self._source_of = arrays["blend_source"]
        self._sample_of = arrays["blend_sample"]
        self._documents = [arrays.get(f"documents_{number}") for number in range(len(sources))]
        self._samples = [arrays.get(f"samples_{number}") for number in range(len(sources))]
        self._shuffle = [arrays.get(f"shuffle_{number}") for number in range(len(sources))]
        # Counted once: a run asks at each checkpoint how far its sources were read.
        self._counted = (0, np.zeros(len(sources), dtype=np.int64))

    def __len__(self) -> int:
        return self._num_samples

    def rows(self, indices: Sequence[int]) -> SampleRows:
        """The samples at positions `indices` of the run.

        Raises:
            IndexError: a position before the blend, or not below `len(self)`.
            UserError: a token id outside the vocabulary of the source's tokenizer.
        """
        _check_indices(indices, len(self), self._blend.start)
        tokens = np.empty((len(indices), self._row_tokens), dtype=np.int64)
        marked = any(source.words is not None for source in self._sources)
        word_starts = np.zeros(tokens.shape, dtype=np.bool_) if marked else None
        source_of_row = [int(self._source_of[index - self._blend.start]) for index in indices]
        for row, (index, number) in enumerate(zip(indices, source_of_row, strict=True)):
            documents, position, offset = self._place(number, int(self._sample_of[index - self._blend.start]))
            source = self._sources[number]
            bits = None if word_starts is None else word_starts[row]
            read_span(source.dataset, documents, position, offset, tokens[row], source.words, bits)
        check_token_range(tokens, self._sources, source_of_row)
        return SampleRows(
            tokens=torch.from_numpy(tokens),
            language=torch.tensor([self._sources[number].language_id for number in source_of_row], dtype=torch.int64),
            sample_id=torch.tensor([int(index) for index in indices], dtype=torch.int64),
            word_starts=None if word_starts is None else torch.from_numpy(word_starts),
        )

    def _place(self, number: int, sample: int) -> tuple[np.ndarray, int, int]:
        """Where a sample begins, as the blend counts those of its source: the order of the documents in the sample's
        epoch, the place in it and the token there."""
        documents, samples, shuffle = self._documents[number], self._samples[number], self._shuffle[number]
        assert documents is not None and samples is not None and shuffle is not None, number
        facts = self._blend.sources[number]
        per_epoch = facts.samples_per_epoch
        # The arrays begin with the epoch in which the source was when the blend began.
        epoch, inside = divmod(sample + facts.consumed_at_start % per_epoch, per_epoch)
        sequences = self._sources[number].stop
        place = samples[epoch * (per_epoch + 1) + int(shuffle[epoch * per_epoch + inside])]
        return documents[epoch * sequences : (epoch + 1) * sequences], int(place[0]), int(place[1])

    @property
    def segmenters(self) -> list[str | None]:
        """For each source who marked where its words start; None if nobody did."""
        return [source.sidecar.segmenter for source in self._sources]

    @property
    def blend(self) -> Blend:
        """The sources, and where the blend of them begins."""
        return self._blend

    def blend_state(self, num_samples: int) -> dict[str, Any]:
        """What a checkpoint keeps of the blend when the first `num_samples` rows of the run are consumed."""
        return self._blend.to_dict(self._consumed(num_samples))

    def consumed_per_source(self, num_samples: int) -> dict[str, int]:
        """For each source's path, how many of the first `num_samples` rows of the run are its; sources that the run no
        longer has come last."""
        counts = self._consumed(num_samples)
        dropped = {source.path: source.consumed_at_start for source in self._blend.dropped}
        own = {source.path: int(count) for source, count in zip(self._sources, counts, strict=True)}
        return own | {path: count for path, count in dropped.items() if path not in own}

    def _consumed(self, num_samples: int) -> list[int]:
        start = self._blend.start
        if not start <= num_samples <= len(self):
            raise ValueError(f"num_samples is {num_samples}, expected {start} to {len(self)}")
        done, counts = self._counted if self._counted[0] <= num_samples - start else (0, 0)
        counts = counts + _count_per_source(self._source_of[done : num_samples - start], len(self._sources))
        self._counted = (num_samples - start, counts)
        return [
            source.consumed_at_start + int(count) for source, count in zip(self._blend.sources, counts, strict=True)
        ]


class ValidationSamples:
    """Held-out text per language: windows in file order that score every token after the first exactly once."""

    def __init__(self, streams: Mapping[str, "_Stream"], *, seq_length: int, max_samples: int) -> None:
        self._seq_length = seq_length
        # A window's last token is the next one's first input, so a stream of T tokens has T - 1 labels to score.
        counts = {
            language: min(-(-(stream.tokens - 1) // seq_length), max_samples) for language, stream in streams.items()
        }
        self._streams = {language: stream for language, stream in streams.items() if counts[language] > 0}
        self._counts = {language: counts[language] for language in self._streams}

    @classmethod
    def build(
        cls,
        data: DataSection,
        *,
        languages: Sequence[str],
        max_samples: int,
        vocab_size: int | None = None,
        tokenizer_fingerprint: str | None = None,
    ) -> "ValidationSamples":
        """Opens the validation datasets, or else the documents that `TrainSamples` leaves out.

        Sources of one language are read one after the other, in the recipe's order.

        Args:
            data: The recipe's section.
            languages: The run's languages, in the order of their ids.
            max_samples: Windows per language, at most; the first ones are kept.
            vocab_size: Ids that the model has; None does not check.
            tokenizer_fingerprint: What the sidecars must name; None asks only that all name the same.

        Raises:
            UserError: a source is missing, damaged or does not fit.
        """
        sources = open_validation_sources(
            data, languages, tokenizer_fingerprint=tokenizer_fingerprint, vocab_size=vocab_size
        )
        grouped: dict[str, list[OpenSource]] = {}
        for source in sources:
            grouped.setdefault(source.language, []).append(source)
        ordered = {language: _Stream(grouped[language]) for language in languages if language in grouped}
        return cls(ordered, seq_length=data.seq_length, max_samples=max_samples)

    @property
    def languages(self) -> list[str]:
        """Languages that have at least one window, in the order of their ids."""
        return list(self._streams)

    def num_samples(self, language: str) -> int:
        """Windows of one language; 0 for a language without held-out text."""
        return self._counts.get(language, 0)

    def rows(self, language: str, indices: Sequence[int]) -> tuple[SampleRows, torch.Tensor]:
        """The windows `indices` of one language and their loss mask.

        Returns:
            The rows, and a bool [rows, seq_length] that is true where the label is text. The last window of a
            language may be shorter: it is filled up with end-of-document tokens, which the mask leaves out.

        Raises:
            KeyError: a language without windows.
            IndexError: an index below 0 or not below `num_samples(language)`.
            UserError: a token id outside the vocabulary of the source's tokenizer.
        """
        stream = self._streams[language]
        _check_indices(indices, self._counts[language])
        tokens = np.full((len(indices), self._seq_length + 1), stream.eod_id, dtype=np.int64)
        mask = np.zeros((len(indices), self._seq_length), dtype=np.bool_)
        for row, index in enumerate(indices):
            start = int(index) * self._seq_length
            count = min(self._seq_length + 1, stream.tokens - start)
            stream.read(start, tokens[row, :count])
            mask[row, : count - 1] = True
        rows = SampleRows(
            tokens=torch.from_numpy(tokens),
            language=torch.full((len(indices),), stream.language_id, dtype=torch.int64),
            sample_id=torch.tensor([int(index) for index in indices], dtype=torch.int64),
        )
        return rows, torch.from_numpy(mask)


class _Stream:
    """The held-out tokens of one language as one long text."""

    def __init__(self, sources: Sequence[OpenSource]) -> None:
        self._sources = list(sources)
        self._sequences = [np.arange(source.start, source.stop) for source in sources]
        # ends[s][k]: tokens of source s up to and including its k-th sequence.
        self._ends = [np.cumsum(source.lengths, dtype=np.int64) for source in sources]
        self._source_ends = np.cumsum([source.tokens for source in sources], dtype=np.int64)
        self.tokens = int(self._source_ends[-1])
        self.language_id = sources[0].language_id
        self.eod_id = sources[0].sidecar.eod_id

    def read(self, start: int, out: np.ndarray) -> None:
        """Copies tokens `start` to `start + len(out)` into `out` (int64)."""
        filled = 0
        while filled < len(out):
            at = start + filled
            number = int(np.searchsorted(self._source_ends, at, side="right"))
            inside = at - (int(self._source_ends[number - 1]) if number else 0)
            count = min(len(out) - filled, int(self._source_ends[number]) - at)
            ends = self._ends[number]
            position = int(np.searchsorted(ends, inside, side="right"))
            offset = inside - (int(ends[position - 1]) if position else 0)
            part = out[filled : filled + count]
            read_span(self._sources[number].dataset, self._sequences[number], position, offset, part)
            check_token_range(part[None, :], self._sources, [number])
            filled += count


def _check_indices(indices: Sequence[int], count: int, start: int = 0) -> None:
    for index in indices:
        if not 0 <= index < count:
            raise IndexError(f"sample {index} does not exist, there are {count}")
        if index < start:
            raise IndexError(f"sample {index} lies before the blend, which begins at {start}")


def _check_sizes(sources: Sequence[OpenSource], data: DataSection) -> None:
    if len(sources) > MAX_BLEND_SOURCES:
        raise UserError(f"data.sources: {len(sources)} sources, at most {MAX_BLEND_SOURCES} can be blended; merge some")
    for source in sources:
        if source.stop > MAX_SEQUENCES:
            raise UserError(
                f"{source.path}.idx: {source.stop} documents, at most {MAX_SEQUENCES} can be indexed; split the dataset"
            )
        if source.tokens < data.seq_length + 1:
            held_out = len(source.dataset) - source.stop
            raise UserError(
                f"{source.path}: {source.tokens} tokens in {source.stop} training documents ({held_out} more are held "
                f"out for validation), one sample needs data.seq_length + 1 = {data.seq_length + 1}; add text, lower "
                "data.seq_length or drop the source"
            )


def _digest_of_lengths(source: OpenSource) -> str:
    return hashlib.blake2b(np.ascontiguousarray(source.lengths).data, digest_size=16).hexdigest()


def _index_key(blend: Blend, seq_length: int, num_samples: int, seed: int) -> str:
    """Hash of everything the arrays depend on: lengths and not tokens or paths decide where samples begin."""
    facts = {
        "order": _ORDER_VERSION,
        "megatron_core": megatron_core_version(),
        "seq_length": seq_length,
        "start": blend.start,
        "num_samples": num_samples,
        "seed": seed,
        "sources": [[source.key, source.weight, source.digest, source.consumed_at_start] for source in blend.sources],
    }
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16).hexdigest()


def _build_arrays(
    sources: Sequence[OpenSource], blend: Blend, seq_length: int, num_samples: int, seed: int
) -> Iterator[tuple[str, np.ndarray]]:
    source_of, sample_of = blending_indices([source.weight for source in blend.sources], num_samples - blend.start)
    yield "blend_source", source_of
    yield "blend_sample", sample_of
    counts = _count_per_source(source_of, len(sources))
    for number, (source, facts, count) in enumerate(zip(sources, blend.sources, counts, strict=True)):
        if count == 0:
            continue
        per_epoch = facts.samples_per_epoch
        first = facts.consumed_at_start // per_epoch
        last = (facts.consumed_at_start + int(count) - 1) // per_epoch
        built = [
            epoch_indices(
                source.dataset,
                sequences=source.stop,
                seq_length=seq_length,
                seed=_epoch_seed(seed, facts.key, epoch),
            )
            for epoch in range(first, last + 1)
        ]
        yield f"documents_{number}", _joined([epoch.documents for epoch in built])
        yield f"samples_{number}", _joined([epoch.samples for epoch in built])
        yield f"shuffle_{number}", _joined([epoch.shuffle for epoch in built])


def _joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
    # The one epoch of a large source is not copied.
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _epoch_seed(seed: int, key: int, epoch: int) -> int:
    """Seed of one epoch of one source.

    One of its own for each source: with one seed for all, sources of equal size (parallel texts, a language and its
    clone) would be shuffled alike, and the same document would come up in both at the same time. One of its own for
    each epoch too, so that an epoch is the same however many there are.
    """
    return int(np.random.SeedSequence([seed, key, *([epoch] if epoch else [])]).generate_state(1)[0])


def _count_per_source(source_of: np.ndarray, num_sources: int) -> np.ndarray:
    counts = np.zeros(num_sources, dtype=np.int64)
    for start in range(0, len(source_of), _COUNT_CHUNK):
        counts += np.bincount(source_of[start : start + _COUNT_CHUNK], minlength=num_sources)
    return counts
