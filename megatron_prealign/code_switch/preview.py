"""What code-switching makes of rows of a dataset, word by word, for a look before training.

The rows come from the blend and go through `CodeSwitcher`, as in training. Which word each translation stands for is
read off a second run over the same rows, with every token of every translation replaced by a mark: the decisions do
not depend on what is written, so the marks stand exactly where the translations do.
"""

import logging
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron_prealign.code_switch.schedule import RatioSchedule
from megatron_prealign.code_switch.switcher import CodeSwitcher, RowFormat
from megatron_prealign.code_switch.token_text import TokenText
from megatron_prealign.data.samples import SampleRows, TrainPlan
from megatron_prealign.dictionary.coverage import blend_coverage, split_words
from megatron_prealign.dictionary.switchable import switchable_table
from megatron_prealign.dictionary.table import DictionaryTable
from megatron_prealign.errors import UserError
from megatron_prealign.kernels.code_switch_interface import (
    KNOWN,
    LANGUAGES_FROM,
    PADDED,
    RUNNING,
    SWITCHED,
    TRUNCATED,
)
from megatron_prealign.recipe import CodeSwitchSection, DataSection, RecipeValueError
from megatron_prealign.tokenizer.base import Tokenizer


class Part(NamedTuple):
    """A stretch of a row that stays as it is, or one word with its translation."""

    source: str
    """Text of the original, with the space in front."""
    output: str
    """Text of the result; `source` where nothing is switched."""
    language: str | None
    """The translation's language; None for what stays."""
    source_tokens: int
    """Tokens of the original."""
    output_tokens: int
    """Tokens of the result, as far as the row holds them."""


@dataclass(frozen=True)
class PreviewRow:
    """One row of the blend and what the model gets for it."""

    language: str
    """Language of the original."""
    parts: tuple[Part, ...]
    """The row from left to right, without padding."""
    tokens: tuple[int, ...]
    """Model input."""
    labels: tuple[int | None, ...]
    """For each input token what it is to predict; None where nothing is scored."""
    targets: tuple[str | None, ...]
    """For each input token the language of the translation it belongs to; None elsewhere."""
    counts: tuple[int, ...]
    """Of this row, in the order of `CodeSwitchOutput.counts`."""

    @property
    def switched(self) -> tuple[Part, ...]:
        """The words that were replaced."""
        return tuple(part for part in self.parts if part.language is not None)


@dataclass(frozen=True)
class Preview:
    """Rows with what is asked for; the totals are those of the rows."""

    rows: tuple[PreviewRow, ...]
    section: CodeSwitchSection
    ratios: Mapping[str, float]
    """The ratio asked for, of every target language that can be drawn."""
    seq_length: int
    seed: int
    text: TokenText
    """The text of single tokens."""

    def _total(self, column: int) -> int:
        return sum(row.counts[column] for row in self.rows)

    @property
    def running(self) -> int:
        """Running words."""
        return self._total(RUNNING)

    @property
    def known(self) -> int:
        """Words that the table knows."""
        return self._total(KNOWN)

    @property
    def switched(self) -> int:
        """Words that were replaced."""
        return self._total(SWITCHED)

    @property
    def padded(self) -> int:
        """Padded positions."""
        return self._total(PADDED)

    @property
    def truncated(self) -> int:
        """Source tokens that no longer fit."""
        return self._total(TRUNCATED)

    @property
    def positions(self) -> int:
        """Positions of all rows."""
        return len(self.rows) * self.seq_length

    @property
    def by_language(self) -> dict[str, int]:
        """Words switched into every target language that can be drawn, most first."""
        found = Counter({language: 0 for language in self.ratios})
        found.update(str(part.language) for row in self.rows for part in row.switched)
        return dict(found.most_common())

    @property
    def token_lengths(self) -> tuple[float, float] | None:
        """Mean tokens of the replaced words and of their translations; None without any. Translations that reach the
        end of their row may be cut there and do not count."""
        whole = [part for row in self.rows for part in _whole(row) if part.language is not None]
        if not whole:
            return None
        count = len(whole)
        return sum(part.source_tokens for part in whole) / count, sum(part.output_tokens for part in whole) / count


def _whole(row: PreviewRow) -> tuple[Part, ...]:
    filled = sum(part.output_tokens for part in row.parts)
    return row.parts[:-1] if filled == len(row.tokens) else row.parts


def make_preview(
    table: DictionaryTable,
    section: CodeSwitchSection,
    data: DataSection,
    tokenizer: Tokenizer,
    *,
    rows: int,
    seed: int,
    consumed_tokens: int = 0,
) -> Preview:
    """Draws rows from all over the data and switches them as training would.

    Args:
        table: the dictionary, already without held-out groups.
        section: what to do with it.
        data: the blend.
        tokenizer: that of the data and of the table.
        rows: rows to show, from 1; fewer come back where the data has fewer.
        seed: from 0; decides the rows and every draw.
        consumed_tokens: tokens of the phase already trained on, for a ratio with a schedule.

    Raises:
        UserError: a dataset is missing, damaged or shorter than a row, or data, table and section do not fit together.
    """
    if rows < 1:
        raise ValueError(f"rows is {rows}, expected a number from 1")
    try:
        section.check_lookahead(data.seq_length)
    except RecipeValueError as error:
        raise UserError(str(error)) from error
    selected = switchable_table(table, section, data.languages)
    with tempfile.TemporaryDirectory(prefix="megatron-prealign-") as directory:
        plan = TrainPlan.read(
            data,
            num_samples=rows,
            seed=seed,
            languages=data.languages,
            cache_dir=Path(directory),
            vocab_size=tokenizer.vocab_size,
            tokenizer_fingerprint=tokenizer.fingerprint,
            lookahead=section.lookahead_tokens(data.seq_length),
        )
        # more would be the same rows again
        different = sum((source.tokens - 1) // data.seq_length for source in plan.sources)
        plan = replace(plan, num_samples=min(rows, different))
        plan.write_index()
        samples = plan.open()
        previewer = _Previewer(selected, section, data, tokenizer, seed)
        shown = tuple(previewer.row(samples.rows([index]), consumed_tokens) for index in range(len(samples)))
    ratios = dict(zip(table.languages, RatioSchedule(section, table.languages).ratios(consumed_tokens), strict=True))
    drawn = section.language_weights or {table.languages[index]: 1.0 for index in np.unique(table.candidate_language)}
    return Preview(
        rows=shown,
        section=section,
        ratios={language: ratio for language, ratio in ratios.items() if language in drawn},
        seq_length=data.seq_length,
        seed=seed,
        text=previewer.text,
    )


class _Previewer:
    """Switches rows twice, once with the table and once with marks for its translations."""

    def __init__(
        self, table: DictionaryTable, section: CodeSwitchSection, data: DataSection, tokenizer: Tokenizer, seed: int
    ) -> None:
        coverage = blend_coverage(table, data.sources) if section.ratio_of == "words" else None
        row_format = RowFormat(seq_length=data.seq_length, eod_id=tokenizer.eod_id, mask_eod=data.eod_mask_loss)

        def build(table: DictionaryTable) -> CodeSwitcher:
            return CodeSwitcher(
                table, section, row_format, seed=seed, languages=data.languages, device="cpu", coverage=coverage
            )

        self._switch = build(table)
        with _said_once():
            self._mark = build(_with_marks(table))
        self._table = table
        self._languages = data.languages
        self.text = TokenText(tokenizer)

    def row(self, rows: SampleRows, consumed_tokens: int) -> PreviewRow:
        """The one row of `rows`."""
        given = (rows.tokens, rows.language, rows.sample_id, consumed_tokens, rows.word_starts)
        batch, marked = self._switch(*given), self._mark(*given)
        tokens, marks = batch.tokens[0].tolist(), marked.tokens[0].tolist()
        unmarked = [(token, mark) for token, mark in zip(tokens, marks, strict=True) if mark < self._table.vocab_size]
        assert all(token == mark for token, mark in unmarked), "the marks do not stand where the translations do"
        spans = find_spans(rows.tokens[0].tolist(), marks, self._word_ends(rows), self._table.vocab_size)
        counts = [0] * (LANGUAGES_FROM + len(self._table.languages)) if batch.counts is None else batch.counts.tolist()
        labels = zip(batch.labels[0].tolist(), batch.loss_mask[0].tolist(), strict=True)
        targets: list[str | None] = [None] * len(tokens)
        for span in spans:
            if span.language is not None:
                size = span.output.stop - span.output.start
                targets[span.output] = [self._table.languages[span.language]] * size
        return PreviewRow(
            language=self._languages[int(rows.language[0])],
            parts=self._parts(rows.tokens[0].tolist(), tokens, spans),
            tokens=tuple(tokens),
            labels=tuple(label if scored else None for label, scored in labels),
            targets=tuple(targets),
            counts=tuple(counts),
        )

    def _word_ends(self, rows: SampleRows) -> dict[int, int]:
        extra = rows.word_starts
        words = split_words(
            rows.tokens[0].numpy(),
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
    """Tokens of the original and the tokens of the result that stand for them."""

    source: slice
    output: slice
    language: int | None
    """Index of the translation's language in the table; None for tokens that stay."""


def find_spans(
    source: Sequence[int], marks: Sequence[int], word_ends: Mapping[int, int], vocab_size: int
) -> list[Span]:
    """Walks the original and the marked result side by side.

    Args:
        source: [sequence + 1 + lookahead], the original.
        marks: [sequence], the result with marks: `vocab_size` + 1 + language for the first token of a translation,
            `vocab_size` for its others.
        word_ends: where each word that starts at a token of `source` ends.
        vocab_size: ids below it are tokens.

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
    """The table with marks as `find_spans` wants them in place of the tokens of its candidates."""
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
def _said_once() -> Iterator[None]:
    """Keeps a second switcher of the same settings from giving the warnings of the first again."""
    logger = logging.getLogger(CodeSwitcher.__module__)
    disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = disabled
