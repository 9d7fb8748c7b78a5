"""IBM model 1 (Brown et al. 1993): probabilities of word translations, from sentence pairs by expectation-maximisation.

The probability of a word of the predicted language is the mean over the words of the other sentence, and a null word,
of t(predicted | given). Sentences are stored as distinct words with their multiplicity, which gives the same sums with
fewer terms.

In comments: S sentence pairs, E distinct words of all sentences of one side, U pairs of words that occur together in
any sentence pair, L links (a distinct word with one of the other sentence) of one block of sentence pairs.
"""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryFile
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_prealign.dictionary.ragged import offsets_of
from megatron_prealign.progress import Progress

BLOCK_LINKS = 1 << 20
"""Links processed at once: about 60 bytes of memory each."""
_BLOCK_WORDS = 1 << 20
_BLOCK_ROWS = 1 << 22


class Sentences(NamedTuple):
    """One side of all sentence pairs, as distinct words of each sentence."""

    word: NDArray[np.int32]
    """`[E]`"""
    times: NDArray[np.int32]
    """Occurrences of the word in its sentence `[E]`."""
    offsets: NDArray[np.int64]
    """First distinct word of every sentence, and E `[S + 1]`."""
    vocabulary: int
    """Number of words; words are below it."""


def make_sentences(running: NDArray[np.int32], offsets: NDArray[np.int64], vocabulary: int) -> Sentences:
    """Finds the distinct words of each sentence.

    Args:
        running: words of all sentences `[N]`.
        offsets: first running word of every sentence, and N `[S + 1]`; no sentence is empty.
        vocabulary: number of words.
    """
    parts: list[tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int64]]] = []
    for first, end in _spans(offsets, _BLOCK_WORDS):
        sentence = np.repeat(np.arange(end - first), np.diff(offsets[first : end + 1]))
        keys, times = np.unique(sentence * vocabulary + running[offsets[first] : offsets[end]], return_counts=True)
        sentence, word = np.divmod(keys, vocabulary)
        parts.append((word.astype(np.int32), times.astype(np.int32), np.bincount(sentence, minlength=end - first)))
    words, times, lengths = (np.concatenate(part) for part in zip(*parts, strict=True))
    return Sentences(words, times, offsets_of(lengths), vocabulary)


def _spans(offsets: NDArray[np.int64], limit: int) -> Iterator[tuple[int, int]]:
    """Yields ranges of rows with at most `limit` elements, or one row, given the offset of every row."""
    first, rows = 0, len(offsets) - 1
    while first < rows:
        end = int(np.searchsorted(offsets, offsets[first] + limit, side="right")) - 1
        end = max(end, first + 1)
        yield first, end
        first = end


class _Block(NamedTuple):
    """Links of some sentence pairs: every distinct word of a sentence with every one of the other sentence."""

    first: tuple[int, int]
    """First distinct word of the block, of source and target."""
    end: tuple[int, int]
    """Last distinct word, plus 1."""
    links: tuple[NDArray[np.int64], NDArray[np.int64]]
    """Distinct word of each link, counted from the first of the block, of source and target `[L]`."""


class Translations(NamedTuple):
    """Pairs of words that reach thresholds in both directions, each `[pairs]`."""

    source: NDArray[np.int32]
    target: NDArray[np.int32]
    probability: NDArray[np.float64]
    """t(target | source) · t(source | target)."""
    expected: NDArray[np.float64]
    """The smaller of the expected numbers of alignments in the two directions."""


class Model1:
    """The pairs of words of a bitext, and the training of both directions.

    Memory is 20 bytes for each pair of words that occur together (about 30 while they are collected), and 8 bytes for
    each distinct word of a sentence. The index of the pair of every link, 4 bytes each, is stored in a temporary file,
    which is read once per iteration.
    """

    def __init__(self, source: Sentences, target: Sentences, scratch: Path, block_links: int = BLOCK_LINKS) -> None:
        """
        Args:
            source: sentences of the source language.
            target: their translations.
            scratch: directory for the temporary file, which has no name and disappears with the process.
            block_links: links to process at once; does not change any result.
        """
        self._sides = (source, target)
        self._links_of = offsets_of(np.diff(source.offsets) * np.diff(target.offsets))
        self._spans = list(_spans(self._links_of, block_links))
        keys = self._distinct_keys()
        self._index_type = np.dtype(np.int32 if len(keys) < 2**31 else np.int64)
        self._file = TemporaryFile(dir=scratch)  # noqa: SIM115 - closed by __exit__
        for block in self._blocks():
            distinct, inverse = np.unique(self._keys(block), return_inverse=True)
            self._file.write(np.searchsorted(keys, distinct).astype(self._index_type)[inverse].data)
        self.source, self.target = self._split_keys(keys)
        """Words of each pair that occurs together `[U]`."""

    def __enter__(self) -> "Model1":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    @property
    def pairs(self) -> int:
        """Number of pairs of words that occur together."""
        return len(self.source)

    @property
    def links(self) -> int:
        """Number of links, over which each iteration sums."""
        return int(self._links_of[-1])

    def _blocks(self) -> Iterator[_Block]:
        source, target = self._sides
        for first, end in self._spans:
            source_offsets, target_offsets = source.offsets[first : end + 1], target.offsets[first : end + 1]
            # Target words in order, each with all source words of its sentence.
            lengths = np.diff(target_offsets)
            width = np.repeat(np.diff(source_offsets), lengths)
            begin = np.repeat(source_offsets[:-1] - source_offsets[0], lengths)
            ends = np.cumsum(width)
            source_link = np.repeat(begin - (ends - width), width) + np.arange(ends[-1])
            yield _Block(
                (int(source_offsets[0]), int(target_offsets[0])),
                (int(source_offsets[-1]), int(target_offsets[-1])),
                (source_link, np.repeat(np.arange(len(width)), width)),
            )

    def _keys(self, block: _Block) -> NDArray[np.int64]:
        """Returns the pair of words of each link as one number `[L]`."""
        source, target = (
            side.word[first:end][link]
            for side, first, end, link in zip(self._sides, block.first, block.end, block.links, strict=True)
        )
        return source.astype(np.int64) * self._sides[1].vocabulary + target

    def _distinct_keys(self) -> NDArray[np.int64]:
        """Returns the sorted keys of all pairs of words that occur together `[U]`."""
        merged = np.zeros(0, dtype=np.int64)
        waiting: list[NDArray[np.int64]] = []
        for block in self._blocks():
            waiting.append(_distinct(self._keys(block)))
            # Each merge handles at most twice as many keys as have come since the last: the cost of all is that of one.
            if sum(map(len, waiting)) > max(len(merged) // 2, BLOCK_LINKS):
                merged = _distinct(np.concatenate([merged, *waiting]))
                waiting.clear()
        return _distinct(np.concatenate([merged, *waiting])) if waiting else merged

    def _split_keys(self, keys: NDArray[np.int64]) -> Iterator[NDArray[np.int32]]:
        """Yields source and target word of each pair `[U]`."""
        vocabulary = self._sides[1].vocabulary
        for operation in (np.floor_divide, np.remainder):
            words = np.empty(len(keys), dtype=np.int32)
            for rows in _rows(len(keys)):
                words[rows] = operation(keys[rows], vocabulary)
            yield words

    def train(self, given: int, iterations: int, progress: Progress) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
        """Estimates one direction from uniform probabilities.

        Args:
            given: 0 for t(target | source), 1 for t(source | target).
            iterations: number of iterations of expectation-maximisation.

        Returns:
            t(predicted | given) and the expected number of alignments in the last iteration, of each pair `[U]`.
        """
        given_side, predicted_side = self._sides[given], self._sides[1 - given]
        # Equal values are uniform: only their ratios count.
        probability = np.ones(self.pairs, dtype=np.float32)
        null = np.ones(predicted_side.vocabulary)
        for _ in range(iterations):
            count, null_count = np.zeros(self.pairs), np.zeros(len(null))
            self._file.seek(0)
            for block, (first, end) in zip(self._blocks(), self._spans, strict=True):
                pair = np.empty(len(block.links[0]), dtype=self._index_type)
                self._file.readinto(pair.data)
                predicted = block.links[1 - given]
                here = slice(block.first[1 - given], block.end[1 - given])
                word, times = predicted_side.word[here], predicted_side.times[here]
                given_times = given_side.times[block.first[given] : block.end[given]]
                share = probability[pair] * given_times[block.links[given]]
                total = np.bincount(predicted, share, len(word)) + null[word]
                # Each word is aligned once per occurrence, in parts that are proportional to the probabilities.
                factor = times / total
                np.add.at(count, pair, share * factor[predicted])
                np.add.at(null_count, word, null[word] * factor)
                progress.update(end - first)
            self._normalise(count, given, probability)
            null = null_count / null_count.sum()
        return probability, count

    def _normalise(self, count: NDArray[np.float64], given: int, probability: NDArray[np.float32]) -> None:
        """Sets `probability` to the share of each pair's `count` in the sum over all pairs with its given word."""
        words = (self.source, self.target)[given]
        total = np.zeros(self._sides[given].vocabulary)
        for rows in _rows(self.pairs):
            np.add.at(total, words[rows], count[rows])
        for rows in _rows(self.pairs):
            divisor = total[words[rows]]
            # A word whose counts all underflow is never used as an explanation again.
            probability[rows] = np.divide(count[rows], divisor, out=np.zeros(len(divisor)), where=divisor > 0)

    def translations(
        self, iterations: int, min_count: float, min_probability: float, show_progress: bool = False
    ) -> Translations:
        """Trains both directions and returns the pairs that both support, in the order of (source, target).

        Args:
            iterations: number of iterations of expectation-maximisation.
            min_count: minimum of the smaller expected count.
            min_probability: minimum of the product of both probabilities.
        """
        total = 2 * iterations * len(self._links_of[1:])
        with Progress("train", total, unit="sentence pairs", enabled=show_progress) as progress:
            forward, forward_count = self.train(0, iterations, progress)
            # Neither factor is above 1. The arrays of this direction are freed before the next.
            rows = np.flatnonzero((forward_count >= min_count) & (forward >= min_probability))
            forward, forward_count = forward[rows], forward_count[rows]
            backward, backward_count = self.train(1, iterations, progress)
        probability = forward.astype(np.float64) * backward[rows]
        count = np.minimum(forward_count, backward_count[rows])
        kept = (probability >= min_probability) & (count >= min_count)
        return Translations(self.source[rows[kept]], self.target[rows[kept]], probability[kept], count[kept])


def _distinct(keys: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns the distinct keys, sorted; sorts `keys` itself.

    np.unique of numpy 2.4 fills a hash table instead: 2.3 s for 2 million random keys, here 0.04 s.
    """
    keys.sort()
    different = np.empty(len(keys), dtype=bool)
    different[:1] = True
    np.not_equal(keys[1:], keys[:-1], out=different[1:])
    return keys[different]


def _rows(number: int) -> Iterator[slice]:
    """Yields slices of at most `_BLOCK_ROWS` rows, so that temporary arrays are small."""
    for first in range(0, number, _BLOCK_ROWS):
        yield slice(first, min(first + _BLOCK_ROWS, number))
