"""Turns a batch of samples into model inputs and labels, with or without code-switching."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_prealign.code_switch.schedule import RatioSchedule
from megatron_prealign.dictionary.table import DictionaryTable
from megatron_prealign.errors import UserError
from megatron_prealign.kernels import (
    CodeSwitchBatch,
    CodeSwitchSettings,
    NgramTable,
    build_ngram_table,
    code_switch,
    document_starts_of,
    ratio_threshold,
)
from megatron_prealign.recipe import CodeSwitchSection

logger = logging.getLogger(__name__)


class SwitchedBatch(NamedTuple):
    """Model inputs and labels of a batch."""

    tokens: Tensor
    """int64 [batch, sequence]."""
    labels: Tensor
    """int64 [batch, sequence]; 0 where the loss is masked."""
    loss_mask: Tensor
    """float32 [batch, sequence]."""
    position_ids: Tensor
    """int64 [batch, sequence]."""
    document_starts: Tensor | None
    """int32 [batch, sequence], the first position that each position may attend to; None if attention may cross
    documents."""
    counts: Tensor | None
    """int64 [5 + languages of the table], on the device: running, known and switched words of this batch, padded
    positions, truncated source tokens, then words switched into each language (`CodeSwitcher.languages`); None if
    code-switching is off. Sum over batches."""


@dataclass(frozen=True, kw_only=True)
class SequenceFormat:
    """Format of the sequences that the model is trained on."""

    seq_length: int
    """Sequence length in tokens."""
    eod_id: int
    """End-of-document token, never part of a word; also pads sequences that became shorter."""
    mask_eod: bool = False
    """Mask the loss at positions whose input is `eod_id`."""
    reset_position_ids: bool = False
    """Restart position ids at 0 after every `eod_id`."""
    reset_attention_mask: bool = False
    """Return `document_starts`."""


def plain_batch(tokens: Tensor, sequence_format: SequenceFormat) -> SwitchedBatch:
    """The batch without code-switching, for runs that do not use it and for validation.

    Args:
        tokens: int32 or int64 [batch, sequence + 1 or more]; tokens beyond sequence + 1 are ignored.
        sequence_format: format of the result.
    """
    positions = sequence_format.seq_length
    inputs = tokens[:, :positions].to(torch.int64).contiguous()
    shape = inputs.shape
    position_ids = torch.arange(positions, device=tokens.device).expand(shape).contiguous()
    document_starts = None
    if sequence_format.reset_position_ids or sequence_format.reset_attention_mask:
        document_starts = document_starts_of(inputs, sequence_format.eod_id)
        if sequence_format.reset_position_ids:
            position_ids -= document_starts
    return SwitchedBatch(
        tokens=inputs,
        labels=tokens[:, 1 : positions + 1].to(torch.int64).contiguous(),
        loss_mask=(inputs != sequence_format.eod_id).to(torch.float32)
        if sequence_format.mask_eod
        else torch.ones(shape, dtype=torch.float32, device=tokens.device),
        position_ids=position_ids,
        document_starts=document_starts if sequence_format.reset_attention_mask else None,
        counts=None,
    )


class CodeSwitcher:
    """Code-switches batches as the recipe says. Has no state that a resume would need."""

    languages: tuple[str, ...]
    """The table's languages, in the order of their counts in `SwitchedBatch.counts`."""

    def __init__(
        self,
        table: DictionaryTable,
        section: CodeSwitchSection,
        sequence_format: SequenceFormat,
        *,
        seed: int,
        languages: Sequence[str],
        device: torch.device | str,
        coverage: Mapping[str, float] | None = None,
    ) -> None:
        """Builds the device table.

        Args:
            table: the dictionary without held-out groups, with the keys that `section` selects
                (`switchable.switchable_table`).
            section: the recipe's code_switch section.
            sequence_format: format of the result.
            seed: 0 to 2^64-1; every draw is a function of seed, sample id and position.
            languages: the data's languages; a batch gives a sequence's language as an index into these.
            device: device of the batches.
            coverage: fraction of running words that the table covers, per language of the data; required by
                `ratio_of: words`.

        Raises:
            UserError: the table is corrupt.
        """
        self.languages = tuple(table.languages)
        self._format = sequence_format
        self._table = _device_table(table, section, sequence_format.eod_id, device)
        self._settings = CodeSwitchSettings(
            seed=seed,
            sequence_length=sequence_format.seq_length,
            label_mode=section.label_mode,
            pad_id=sequence_format.eod_id,
            eod_id=sequence_format.eod_id,
            mask_eod=sequence_format.mask_eod,
            reset_at_eod=sequence_format.reset_position_ids or sequence_format.reset_attention_mask,
            vocab_size=table.vocab_size,
        )
        # entry 0 is for sequences of unknown language (-1)
        ids = [-1, *(self.languages.index(each) if each in self.languages else -1 for each in languages)]
        self._table_language = torch.tensor(ids, device=device)
        self._schedule = RatioSchedule(section, self.languages)
        self._divisors = _ratio_divisors(self.languages, section, coverage)
        self._ratios: list[float] = []
        self._switches = False
        self._thresholds = torch.zeros((len(self.languages),) * 2, dtype=torch.int64, device=device)

    def __call__(
        self,
        tokens: Tensor,
        language: Tensor,
        sample_id: Tensor,
        consumed_tokens: int,
        word_starts: Tensor | None = None,
    ) -> SwitchedBatch:
        """Code-switches one batch without waiting for the device.

        Args:
            tokens: int32 or int64 [batch, sequence + 1 + lookahead].
            language: integers [batch], index into the data's languages, -1 if unknown.
            sample_id: int64 [batch], unique within a run.
            consumed_tokens: tokens of the phase before this batch, for the ratio's schedule.
            word_starts: bool [batch, sequence + 1 + lookahead], word starts in addition to those derived from the
                tokens.
        """
        self._set_thresholds(consumed_tokens)
        if not self._switches:
            return plain_batch(tokens, self._format)
        table_language = self._table_language.index_select(0, language.to(torch.int64) + 1)
        batch = CodeSwitchBatch(tokens, table_language, sample_id, word_starts)
        output = code_switch(batch, self._table, self._thresholds, self._settings)
        position_ids, starts = output.position_ids, output.document_starts
        if starts is not None and not self._format.reset_position_ids:
            position_ids = position_ids + starts
        return SwitchedBatch(
            tokens=output.tokens,
            labels=output.labels,
            loss_mask=output.loss_mask,
            position_ids=position_ids,
            document_starts=starts if self._format.reset_attention_mask else None,
            counts=output.counts.sum(0),
        )

    def _set_thresholds(self, consumed_tokens: int) -> None:
        ratios = self._schedule.ratios(consumed_tokens)
        if ratios == self._ratios:
            return
        self._ratios = ratios
        thresholds = torch.tensor(
            [
                [ratio_threshold(min(ratio / divisor, 1.0)) if divisor else 0 for ratio in ratios]
                for divisor in self._divisors
            ]
        )
        self._switches = bool(thresholds.any())
        if self._thresholds.is_cuda:
            # a copy from pageable memory would wait for the device
            thresholds = thresholds.pin_memory()
        self._thresholds.copy_(thresholds, non_blocking=True)


def _ratio_divisors(
    languages: Sequence[str], section: CodeSwitchSection, coverage: Mapping[str, float] | None
) -> list[float]:
    """Divisor of the ratio for sequences of each language."""
    if section.ratio_of == "occurrences":
        return [1.0] * len(languages)
    if coverage is None:
        raise ValueError(
            "coverage is None, expected the fraction of known words per language because of ratio_of: words"
        )
    for language, covered in coverage.items():
        # 0: not a source language, so none of its words would be switched anyway
        if language in languages and 0 < covered < section.highest_ratio:
            logger.warning(
                "code_switch.ratio reaches %g of the running words, but the table covers only %.1f%% of them in %s; "
                "all known words will be switched",
                section.highest_ratio,
                100 * covered,
                language,
            )
    return [coverage.get(language, 0.0) for language in languages]


def _device_table(
    table: DictionaryTable, section: CodeSwitchSection, eod_id: int, device: torch.device | str
) -> NgramTable:
    weights = section.language_weights or dict.fromkeys(table.languages, 1.0)
    try:
        return build_ngram_table(
            word_boundary=table.word_boundary,
            key_tokens=table.key_tokens,
            key_offsets=table.key_offsets,
            key_language=table.key_language,
            key_candidate_offsets=table.key_candidate_offsets,
            candidate_tokens=table.candidate_tokens,
            candidate_offsets=table.candidate_offsets,
            candidate_language=table.candidate_language,
            candidate_weight=table.candidate_weight,
            language_weights=[weights.get(language, 0.0) for language in table.languages],
            forbidden_tokens=[eod_id],
            device=device,
        )
    except ValueError as error:
        raise UserError(
            f"{table.path or 'dictionary table'}: cannot be used for code-switching: {error}; "
            "rebuild it with megatron-prealign dictionary build"
        ) from error
