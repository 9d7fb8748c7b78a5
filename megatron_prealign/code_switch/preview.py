"""Preview of code-switching on samples of a dataset, word by word, before training.

The samples come from the sources of the blend in languages that have keys, since in others no word is switched, and go
through `CodeSwitcher`, as in training. The word that each translation replaces is found by a second pass over the same
samples with every token of every translation replaced by a mark: the decisions do not depend on the tokens written, so
the marks are exactly where the translations are.
"""

import logging
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron_prealign.code_switch.schedule import RatioSchedule
from megatron_prealign.code_switch.switcher import CodeSwitcher, SequenceFormat
from megatron_prealign.code_switch.token_text import TokenText
from megatron_prealign.data.samples import SampleBatch, TrainPlan
from megatron_prealign.data.sidecar import load_sidecar
from megatron_prealign.dictionary.coverage import blend_coverage, split_words
from megatron_prealign.dictionary.switchable import switchable_table
from megatron_prealign.dictionary.table import DictionaryTable
from megatron_prealign.kernels.code_switch_interface import (
    KNOWN,
    LANGUAGES_FROM,
    PADDED,
    RUNNING,
    SWITCHED,
    TRUNCATED,
)
from megatron_prealign.recipe import CodeSwitchSection, DataSection
from megatron_prealign.tokenizer.base import Tokenizer


class Part(NamedTuple):
    """Unchanged text, or one word with its translation."""

    source: str
    """Original text, with the leading space."""
    output: str
    """Text of the result; equal to `source` if nothing is switched."""
    language: str | None
    """Language of the translation; None for unchanged text."""
    source_tokens: int
    """Number of tokens of the original."""
    output_tokens: int
    """Number of tokens of the result that fit into the sequence."""


@dataclass(frozen=True)
class PreviewSample:
    """One sample of the blend and the model input built from it."""

    language: str
    """Language of the original."""
    parts: tuple[Part, ...]
    """The sequence from left to right, without padding."""
    tokens: tuple[int, ...]
    """Model input."""
    labels: tuple[int | None, ...]
    """Label of each input token; None where the loss is masked."""
    targets: tuple[str | None, ...]
    """Language of the translation that each input token belongs to; None elsewhere."""
    counts: tuple[int, ...]
    """Counts of this sample, in the order of `CodeSwitchOutput.counts`."""

    @property
    def switched(self) -> tuple[Part, ...]:
        """The replaced words."""
        return tuple(part for part in self.parts if part.language is not None)


@dataclass(frozen=True)
class Preview:
    """Samples, the settings they were drawn with, and totals over the samples."""

    samples: tuple[PreviewSample, ...]
    section: CodeSwitchSection
    ratios: Mapping[str, float]
    """Requested ratio of every target language that can be drawn."""
    seq_length: int
    seed: int
    text: TokenText
    """Decoder for single tokens."""
    skipped: Mapping[str, int] = field(default_factory=dict)
    """Number of documents in each language of the blend without keys."""

    def _total(self, column: int) -> int:
        return sum(sample.counts[column] for sample in self.samples)

    @property
    def running(self) -> int:
        """Number of running words."""
        return self._total(RUNNING)

    @property
    def known(self) -> int:
        """Number of words that the table contains."""
        return self._total(KNOWN)

    @property
    def switched(self) -> int:
        """Number of replaced words."""
        return self._total(SWITCHED)

    @property
    def padded(self) -> int:
        """Number of padded positions."""
        return self._total(PADDED)

    @property
    def truncated(self) -> int:
        """Number of source tokens that no longer fit."""
        return self._total(TRUNCATED)

    @property
    def positions(self) -> int:
        """Number of positions of all samples."""
        return len(self.samples) * self.seq_length

    @property
    def by_language(self) -> dict[str, int]:
        """Number of words switched into every target language that can be drawn, most frequent first."""
        counts = Counter({language: 0 for language in self.ratios})
        counts.update(str(part.language) for sample in self.samples for part in sample.switched)
        return dict(counts.most_common())

    @property
    def token_lengths(self) -> tuple[float, float] | None:
        """Mean number of tokens of the replaced words and of their translations; None if there are none. Excludes
        translations that reach the end of their sample, which may be truncated."""
        parts = [part for sample in self.samples for part in _complete_parts(sample) if part.language is not None]
        if not parts:
            return None
        count = len(parts)
        return sum(part.source_tokens for part in parts) / count, sum(part.output_tokens for part in parts) / count


def _complete_parts(sample: PreviewSample) -> tuple[Part, ...]:
    filled = sum(part.output_tokens for part in sample.parts)
    return sample.parts[:-1] if filled == len(sample.tokens) else sample.parts


def make_preview(
    table: DictionaryTable,
    section: CodeSwitchSection,
    data: DataSection,
    tokenizer: Tokenizer,
    *,
    num_samples: int,
    seed: int,
    consumed_tokens: int = 0,
) -> Preview:
    """Draws samples from all of the data in languages with keys and code-switches them as in training.

    Args:
        table: the dictionary without held-out groups.
        section: the recipe's code_switch section; its lookahead is at most the length of a sample.
        data: the blend.
        tokenizer: tokenizer of the data and of the table.
        num_samples: number of samples, at least 1; fewer are returned if the data has fewer.
        seed: at least 0; determines the samples and every draw.
        consumed_tokens: tokens of the phase already trained on, for a ratio with a schedule.

    Raises:
        UserError: a dataset is missing, corrupt or shorter than a sample, or data, table and section do not match.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}, expected at least 1")
    selected = switchable_table(table, section, data.languages)
    data, skipped = _of_languages(data, {selected.languages[index] for index in np.unique(selected.key_language)})
    with tempfile.TemporaryDirectory(prefix="megatron-prealign-") as directory:
        plan = TrainPlan.read(
            data,
            num_samples=num_samples,
            seed=seed,
            languages=data.languages,
            cache_dir=Path(directory),
            vocab_size=tokenizer.vocab_size,
            tokenizer_fingerprint=tokenizer.fingerprint,
            lookahead=section.lookahead_tokens(data.seq_length),
        )
        # more would repeat samples
        available = sum((source.tokens - 1) // data.seq_length for source in plan.sources)
        plan = replace(plan, num_samples=min(num_samples, available))
        plan.write_index()
        train = plan.open()
        previewer = _Previewer(selected, section, data, tokenizer, seed)
        samples = tuple(previewer.sample(train.batch([index]), consumed_tokens) for index in range(len(train)))
    ratios = dict(zip(table.languages, RatioSchedule(section, table.languages).ratios(consumed_tokens), strict=True))
    drawn = section.language_weights or {table.languages[index]: 1.0 for index in np.unique(table.candidate_language)}
    return Preview(
        samples=samples,
        section=section,
        ratios={language: ratio for language, ratio in ratios.items() if language in drawn},
        seq_length=data.seq_length,
        seed=seed,
        text=previewer.text,
        skipped=skipped,
    )


def _of_languages(data: DataSection, languages: Collection[str]) -> tuple[DataSection, dict[str, int]]:
    """The sources in `languages`, and the number of documents of the others by language."""
    kept = [source for source in data.sources if source.language in languages]
    if not kept:
        # Only the validation data has such a language; the samples then show that nothing is switched.
        return data, {}
    skipped: Counter[str] = Counter()
    for source in data.sources:
        if source not in kept:
            skipped[source.language] += load_sidecar(source.path).documents
    return replace(data, sources=kept), dict(skipped)


class _Previewer:
    """Switches samples twice, once with the table and once with marks for its translations."""

    def __init__(
        self, table: DictionaryTable, section: CodeSwitchSection, data: DataSection, tokenizer: Tokenizer, seed: int
    ) -> None:
        coverage = blend_coverage(table, data.sources) if section.ratio_of == "words" else None
        sequence_format = SequenceFormat(
            seq_length=data.seq_length, eod_id=tokenizer.eod_id, mask_eod=data.eod_mask_loss
        )

        def build(table: DictionaryTable) -> CodeSwitcher:
            return CodeSwitcher(
                table, section, sequence_format, seed=seed, languages=data.languages, device="cpu", coverage=coverage
            )

        self._switch = build(table)
        with _without_warnings():
            self._mark = build(_with_marks(table))
        self._table = table
        self._languages = data.languages
        self.text = TokenText(tokenizer)

    def sample(self, source: SampleBatch, consumed_tokens: int) -> PreviewSample:
        """Preview of a batch of one sample."""
        inputs = (source.tokens, source.language, source.sample_id, consumed_tokens, source.word_starts)
        batch, marked = self._switch(*inputs), self._mark(*inputs)
        tokens, marks = batch.tokens[0].tolist(), marked.tokens[0].tolist()
        unmarked = [(token, mark) for token, mark in zip(tokens, marks, strict=True) if mark < self._table.vocab_size]
        assert all(token == mark for token, mark in unmarked), "the marks are not where the translations are"
        spans = find_spans(source.tokens[0].tolist(), marks, self._word_ends(source), self._table.vocab_size)
        counts = [0] * (LANGUAGES_FROM + len(self._table.languages)) if batch.counts is None else batch.counts.tolist()
        labels = zip(batch.labels[0].tolist(), batch.loss_mask[0].tolist(), strict=True)
        targets: list[str | None] = [None] * len(tokens)
        for span in spans:
            if span.language is not None:
                size = span.output.stop - span.output.start
                targets[span.output] = [self._table.languages[span.language]] * size
        return PreviewSample(
            language=self._languages[int(source.language[0])],
            parts=self._parts(source.tokens[0].tolist(), tokens, spans),
            tokens=tuple(tokens),
            labels=tuple(label if scored else None for label, scored in labels),
            targets=tuple(targets),
            counts=tuple(counts),
        )

    def _word_ends(self, source: SampleBatch) -> dict[int, int]:
        extra = source.word_starts
        words = split_words(
            source.tokens[0].numpy(),
            np.zeros(1, dtype=np.int64),
            self._table.word_boundary,
            None if extra is None else extra[0].numpy(),
        )
        return dict(zip(words.start.tolist(), (words.start + words.length).tolist(), strict=True))

    def _parts(self, source: list[int], output: list[int], spans: Sequence["Span"]) -> tuple[Part, ...]:
        originals = self.text.pieces([source[span.source] for span in spans])
        results = self.text.pieces([output[span.output] for span in spans])
        return tuple(
            Part(
                source=original,
                output=original if span.language is None else result,
                language=None if span.language is None else self._table.languages[span.language],
                source_tokens=span.source.stop - span.source.start,
                output_tokens=span.output.stop - span.output.start,
            )
            for span, original, result in zip(spans, originals, results, strict=True)
        )


class Span(NamedTuple):
    """Tokens of the original and the tokens of the result that replace them."""

    source: slice
    output: slice
    language: int | None
    """Index of the translation's language in the table; None for unchanged tokens."""


def find_spans(
    source: Sequence[int], marks: Sequence[int], word_ends: Mapping[int, int], vocab_size: int
) -> list[Span]:
    """Aligns the original with the marked result.

    Args:
        source: [sequence + 1 + lookahead], the original.
        marks: [sequence], the result with marks: `vocab_size` + 1 + language for the first token of a translation,
            `vocab_size` for its others.
        word_ends: start -> end of each word of `source`.
        vocab_size: ids below this are tokens.

    Returns:
        Spans that cover the result up to its padding, in order.
    """
    spans: list[Span] = []
    read = written = 0
    while written < len(marks) and read < len(source):
        end = written + 1
        if marks[written] > vocab_size:
            while end < len(marks) and marks[end] == vocab_size:
                end += 1
            spans.append(Span(slice(read, word_ends[read]), slice(written, end), marks[written] - vocab_size - 1))
            read = word_ends[read]
        else:
            longest = min(len(marks), written + len(source) - read)
            while end < longest and marks[end] < vocab_size:
                end += 1
            spans.append(Span(slice(read, read + end - written), slice(written, end), None))
            read += end - written
        written = end
    return spans


def _with_marks(table: DictionaryTable) -> DictionaryTable:
    """The table with the tokens of its candidates replaced by marks as in `find_spans`."""
    marks = np.full(len(table.candidate_tokens), table.vocab_size, dtype=np.int32)
    marks[table.candidate_offsets[:-1]] = table.vocab_size + 1 + table.candidate_language
    added = 1 + len(table.languages)
    return replace(
        table,
        vocab_size=table.vocab_size + added,
        word_boundary=np.append(table.word_boundary, np.zeros(added, dtype=np.uint8)),
        candidate_tokens=marks,
    )


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Suppresses the warnings of `CodeSwitcher`, which a second one with the same settings would repeat."""
    logger = logging.getLogger(CodeSwitcher.__module__)
    disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = disabled
