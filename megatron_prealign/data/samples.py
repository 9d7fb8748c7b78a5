"""Fixed-length samples: the shuffled, weighted blend for training, and held-out text per language for validation."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_prealign.data.blend import Blend, SavedBlend, initial_blend, resume_blend
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

# Number of blend positions counted at a time, so that counting never copies an index of billions of positions.
_COUNT_CHUNK = 1 << 24
# Part of the index name, so that an index with another sample order is not reused.
_ORDER_VERSION = 2


@dataclass(frozen=True)
class SampleBatch:
    """A batch of samples before code-switching and masks."""

    tokens: torch.Tensor
    """int64 [samples, seq_length + 1 + lookahead]: inputs, labels (shifted by one) and the tokens that follow."""
    language: torch.Tensor
    """int64 [samples], index in the run's list of languages."""
    sample_id: torch.Tensor
    """int64 [samples], position in the blend, or index among the validation samples of a language."""
    word_starts: torch.Tensor | None = None
    """bool, shape of `tokens`: whether a word starts at the token according to a segmenter; False for sources without
    one. None if no source of the run has a segmenter, and for validation."""


@dataclass(frozen=True, eq=False)
class TrainPlan:
    """Opened and checked sources of the training blend, and the directory of its sample index, not yet built.

    A distributed job reads the plan on all processes, writes the index on one process per node, then opens it on all.
    No step waits for another process, so the job can check after each step that it succeeded everywhere.
    """

    sources: Sequence[OpenSource]
    blend: Blend
    seq_length: int
    num_samples: int
    seed: int
    directory: Path
    """Directory of the index."""
    lookahead: int = 0
    """Number of extra tokens after each sample; the index does not depend on it."""

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

        A source with fewer samples than its weight requires is repeated in epochs, reshuffled each time. The sample
        order depends on document lengths, weights, `seed` and sequence length, not on paths: moved data keeps its order
        and its cache. A plan with more samples starts with the samples of a shorter one.

        Args:
            data: The recipe's `data` section.
            num_samples: Number of samples of the complete run.
            seed: Non-negative; determines the order.
            languages: The run's languages, in the order of their ids.
            cache_dir: Directory of the index cache, on a disk shared by the processes of a node.
            vocab_size: Vocabulary size of the model; None skips the check.
            tokenizer_fingerprint: Fingerprint that all sidecars must have; None only requires that they agree.
            lookahead: Number of extra tokens to read after every sample: those that follow in the source's shuffled
                document order, which wraps around after its last document.
            saved: Blend of the checkpoint to resume from; None for a new run.

        Raises:
            UserError: A source is missing, corrupt, too small, incompatible or has changed since it was saved.
        """
        if lookahead < 0:
            raise ValueError(f"lookahead is {lookahead}, expected at least 0")
        if num_samples <= 0:
            raise ValueError(f"num_samples is {num_samples}, expected at least 1")
        sources = open_training_sources(
            data, languages, tokenizer_fingerprint=tokenizer_fingerprint, vocab_size=vocab_size
        )
        _check_sizes(sources, data)
        weights = [source.weight for source in data.sources]
        blend = initial_blend(sources, weights, data.seq_length, [_lengths_digest(source) for source in sources])
        if saved is not None:
            blend = resume_blend(saved, blend)
        # A finished run may still be opened to read its state, and an index must not be empty.
        num_samples = max(num_samples, blend.start + 1)
        key = _index_key(blend, data.seq_length, num_samples, seed)
        return cls(sources, blend, data.seq_length, num_samples, seed, cache_dir / f"blend-{key}", lookahead)

    def write_index(self) -> bool:
        """Builds the index if it is missing or corrupt; call on exactly one process per node.

        Returns:
            Whether this call built it.

        Raises:
            UserError: The cache cannot be written.
        """
        return build_if_needed(
            self.directory,
            lambda: _build_arrays(self.sources, self.blend, self.seq_length, self.num_samples, self.seed),
        )

    def open(self) -> "TrainSamples":
        """Memory-maps the index, which must have been written.

        Raises:
            UserError: It does not exist.
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
    """The training blend: sample i is the same on every process and in any access order.

    After a change of the blend only the positions after the change can be read.
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
        self._sample_tokens = seq_length + 1 + lookahead
        self._num_samples = num_samples
        self._source_of = arrays["blend_source"]
        self._sample_of = arrays["blend_sample"]
        self._documents = [arrays.get(f"documents_{number}") for number in range(len(sources))]
        self._samples = [arrays.get(f"samples_{number}") for number in range(len(sources))]
        self._shuffle = [arrays.get(f"shuffle_{number}") for number in range(len(sources))]
        # Cached (position, counts): every checkpoint needs the consumed samples per source.
        self._counted = (0, np.zeros(len(sources), dtype=np.int64))

    def __len__(self) -> int:
        return self._num_samples

    def batch(self, indices: Sequence[int]) -> SampleBatch:
        """Reads the samples at positions `indices` of the run.

        Raises:
            IndexError: A position is before the start of the blend, or not below `len(self)`.
            UserError: A token id is outside the vocabulary of the source's tokenizer.
        """
        _check_indices(indices, len(self), self._blend.start)
        tokens = np.empty((len(indices), self._sample_tokens), dtype=np.int64)
        has_words = any(source.words is not None for source in self._sources)
        word_starts = np.zeros(tokens.shape, dtype=np.bool_) if has_words else None
        source_of_sample = [int(self._source_of[index - self._blend.start]) for index in indices]
        for place, (index, number) in enumerate(zip(indices, source_of_sample, strict=True)):
            documents, position, offset = self._locate(number, int(self._sample_of[index - self._blend.start]))
            source = self._sources[number]
            bits = None if word_starts is None else word_starts[place]
            read_span(source.dataset, documents, position, offset, tokens[place], source.words, bits)
        check_token_range(tokens, self._sources, source_of_sample)
        return SampleBatch(
            tokens=torch.from_numpy(tokens),
            language=torch.tensor(
                [self._sources[number].language_id for number in source_of_sample], dtype=torch.int64
            ),
            sample_id=torch.tensor([int(index) for index in indices], dtype=torch.int64),
            word_starts=None if word_starts is None else torch.from_numpy(word_starts),
        )

    def _locate(self, number: int, sample: int) -> tuple[np.ndarray, int, int]:
        """Start of sample `sample` (counted in the blend) of source `number`: document order of its epoch, position in
        that order, token offset."""
        documents, samples, shuffle = self._documents[number], self._samples[number], self._shuffle[number]
        assert documents is not None and samples is not None and shuffle is not None, number
        info = self._blend.sources[number]
        per_epoch = info.samples_per_epoch
        # The arrays start with the epoch that the source was in when the blend started.
        epoch, inside = divmod(sample + info.consumed_at_start % per_epoch, per_epoch)
        sequences = self._sources[number].stop
        position, offset = samples[epoch * (per_epoch + 1) + int(shuffle[epoch * per_epoch + inside])]
        return documents[epoch * sequences : (epoch + 1) * sequences], int(position), int(offset)

    @property
    def segmenters(self) -> list[str | None]:
        """Segmenter that marked the word starts of each source; None for sources without one."""
        return [source.sidecar.segmenter for source in self._sources]

    @property
    def blend(self) -> Blend:
        """The current sources and the start position of their blend."""
        return self._blend

    def blend_state(self, num_samples: int) -> dict[str, Any]:
        """Returns the blend as saved in a checkpoint after the first `num_samples` samples of the run."""
        return self._blend.to_dict(self._consumed(num_samples))

    def consumed_per_source(self, num_samples: int) -> dict[str, int]:
        """Number of samples from each source, by path, among the first `num_samples` of the run; sources no longer in
        the blend come last."""
        counts = self._consumed(num_samples)
        dropped = {source.path: source.consumed_at_start for source in self._blend.dropped}
        current = {source.path: int(count) for source, count in zip(self._sources, counts, strict=True)}
        return current | {path: count for path, count in dropped.items() if path not in current}

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
    """Held-out text per language: samples in file order, in which every token after the first is a label exactly
    once."""

    def __init__(self, streams: Mapping[str, "_Stream"], *, seq_length: int, max_samples: int) -> None:
        self._seq_length = seq_length
        # The last token of a sample is the first input of the next one, so T tokens have T - 1 labels to score.
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
        """Opens the validation datasets or, if there are none, the documents held out of the training sources.

        Sources of the same language are concatenated in the recipe's order.

        Args:
            data: The recipe's `data` section.
            languages: The run's languages, in the order of their ids.
            max_samples: Maximum number of samples per language; the first ones are used.
            vocab_size: Vocabulary size of the model; None skips the check.
            tokenizer_fingerprint: Fingerprint that all sidecars must have; None only requires that they agree.

        Raises:
            UserError: A source is missing, corrupt or incompatible.
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
        """Languages with at least one sample, in the order of their ids."""
        return list(self._streams)

    def num_samples(self, language: str) -> int:
        """Number of samples of a language; 0 for a language without held-out text."""
        return self._counts.get(language, 0)

    def batch(self, language: str, indices: Sequence[int]) -> tuple[SampleBatch, torch.Tensor]:
        """Reads the samples `indices` of a language and their loss mask.

        Returns:
            The samples, and a bool [samples, seq_length] mask that is True where the label is text. The last sample of
            a language may be padded with end-of-document tokens, which are masked.

        Raises:
            KeyError: The language has no samples.
            IndexError: An index is negative or not below `num_samples(language)`.
            UserError: A token id is outside the vocabulary of the source's tokenizer.
        """
        stream = self._streams[language]
        _check_indices(indices, self._counts[language])
        tokens = np.full((len(indices), self._seq_length + 1), stream.eod_id, dtype=np.int64)
        mask = np.zeros((len(indices), self._seq_length), dtype=np.bool_)
        for place, index in enumerate(indices):
            start = int(index) * self._seq_length
            count = min(self._seq_length + 1, stream.tokens - start)
            stream.read(start, tokens[place, :count])
            mask[place, : count - 1] = True
        batch = SampleBatch(
            tokens=torch.from_numpy(tokens),
            language=torch.full((len(indices),), stream.language_id, dtype=torch.int64),
            sample_id=torch.tensor([int(index) for index in indices], dtype=torch.int64),
        )
        return batch, torch.from_numpy(mask)


class _Stream:
    """The held-out tokens of a language as one stream."""

    def __init__(self, sources: Sequence[OpenSource]) -> None:
        self._sources = list(sources)
        self._sequences = [np.arange(source.start, source.stop) for source in sources]
        # ends[s][k]: number of tokens of source s up to and including its k-th sequence.
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
            raise IndexError(f"sample {index} is out of range for {count} samples")
        if index < start:
            raise IndexError(f"sample {index} is before the start of the blend at {start}")


def _check_sizes(sources: Sequence[OpenSource], data: DataSection) -> None:
    if len(sources) > MAX_BLEND_SOURCES:
        raise UserError(
            f"data.sources: got {len(sources)} sources, at most {MAX_BLEND_SOURCES} are supported; merge some"
        )
    for source in sources:
        if source.stop > MAX_SEQUENCES:
            raise UserError(
                f"{source.path}.idx: got {source.stop} documents, at most {MAX_SEQUENCES} are supported; split it"
            )
        if source.tokens < data.seq_length + 1:
            held_out = len(source.dataset) - source.stop
            raise UserError(
                f"{source.path}: got {source.tokens} tokens in {source.stop} training documents ({held_out} more are "
                f"held out for validation), expected at least data.seq_length + 1 = {data.seq_length + 1}; add text, "
                "lower data.seq_length or remove the source"
            )


def _lengths_digest(source: OpenSource) -> str:
    return hashlib.blake2b(np.ascontiguousarray(source.lengths).data, digest_size=16).hexdigest()


def _index_key(blend: Blend, seq_length: int, num_samples: int, seed: int) -> str:
    """Hash of everything that the arrays depend on: sequence lengths determine the samples, not tokens or paths."""
    inputs = {
        "order": _ORDER_VERSION,
        "megatron_core": megatron_core_version(),
        "seq_length": seq_length,
        "start": blend.start,
        "num_samples": num_samples,
        "seed": seed,
        "sources": [[source.key, source.weight, source.digest, source.consumed_at_start] for source in blend.sources],
    }
    return hashlib.blake2b(json.dumps(inputs, sort_keys=True).encode(), digest_size=16).hexdigest()


def _build_arrays(
    sources: Sequence[OpenSource], blend: Blend, seq_length: int, num_samples: int, seed: int
) -> Iterator[tuple[str, np.ndarray]]:
    source_of, sample_of = blending_indices([source.weight for source in blend.sources], num_samples - blend.start)
    yield "blend_source", source_of
    yield "blend_sample", sample_of
    counts = _count_per_source(source_of, len(sources))
    for number, (source, info, count) in enumerate(zip(sources, blend.sources, counts, strict=True)):
        if count == 0:
            continue
        per_epoch = info.samples_per_epoch
        first = info.consumed_at_start // per_epoch
        last = (info.consumed_at_start + int(count) - 1) // per_epoch
        epochs = [
            epoch_indices(
                source.dataset,
                sequences=source.stop,
                seq_length=seq_length,
                seed=_epoch_seed(seed, info.key, epoch),
            )
            for epoch in range(first, last + 1)
        ]
        yield f"documents_{number}", _concatenate([epoch.documents for epoch in epochs])
        yield f"samples_{number}", _concatenate([epoch.samples for epoch in epochs])
        yield f"shuffle_{number}", _concatenate([epoch.shuffle for epoch in epochs])


def _concatenate(arrays: Sequence[np.ndarray]) -> np.ndarray:
    # Does not copy the single epoch of a large source.
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _epoch_seed(seed: int, key: int, epoch: int) -> int:
    """Seed of an epoch of a source.

    Every source has its own seed: with a common one, sources of equal size (parallel texts, a language and its clone)
    would get the same order, and matching documents would appear at the same time. Every epoch has its own seed, so
    that an epoch does not depend on the number of epochs.
    """
    return int(np.random.SeedSequence([seed, key, *([epoch] if epoch else [])]).generate_state(1)[0])


def _count_per_source(source_of: np.ndarray, num_sources: int) -> np.ndarray:
    counts = np.zeros(num_sources, dtype=np.int64)
    for start in range(0, len(source_of), _COUNT_CHUNK):
        counts += np.bincount(source_of[start : start + _COUNT_CHUNK], minlength=num_sources)
    return counts
