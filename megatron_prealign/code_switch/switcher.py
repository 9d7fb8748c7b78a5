"""From the samples of a batch to what the model is trained on, with or without code-switching."""

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
    """A batch ready for the model."""

    tokens: Tensor
    """int64 [batch, sequence]."""
    labels: Tensor
    """int64 [batch, sequence]; 0 where nothing is to be predicted."""
    loss_mask: Tensor
    """float32 [batch, sequence]."""
    position_ids: Tensor
    """int64 [batch, sequence]."""
    document_starts: Tensor | None
    """int32 [batch, sequence], the first position that a position may attend to; None where documents are not kept
    apart."""
    counts: Tensor | None
    """int64 [5 + languages of the table], on the device: running, known and switched words of this batch, padded
    positions, truncated source tokens, then words switched into each language (`CodeSwitcher.languages`); None if
    nothing was to be switched. Add up over batches."""


@dataclass(frozen=True, kw_only=True)
class RowFormat:
    """What a row of the model looks like."""

    seq_length: int
    """Positions."""
    eod_id: int
    """End-of-document token, never part of a word; also fills rows that became shorter."""
    mask_eod: bool = False
    """Give positions whose input is `eod_id` loss mask 0."""
    reset_position_ids: bool = False
    """Count positions from 0 again behind every `eod_id`."""
    reset_attention_mask: bool = False
    """Give `document_starts`."""


def plain_batch(tokens: Tensor, row_format: RowFormat) -> SwitchedBatch:
    """The batch as it is, for runs without code-switching and for validation.

    Args:
        tokens: int32 or int64 [batch, sequence + 1 or more]; what is beyond is left out.
        row_format: what comes out.
    """
    positions = row_format.seq_length
    inputs = tokens[:, :positions].to(torch.int64).contiguous()
    shape = inputs.shape
    position_ids = torch.arange(positions, device=tokens.device).expand(shape).contiguous()
    document_starts = None
    if row_format.reset_position_ids or row_format.reset_attention_mask:
        document_starts = document_starts_of(inputs, row_format.eod_id)
        if row_format.reset_position_ids:
            position_ids -= document_starts
    return SwitchedBatch(
        tokens=inputs,
        labels=tokens[:, 1 : positions + 1].to(torch.int64).contiguous(),
        loss_mask=(inputs != row_format.eod_id).to(torch.float32)
        if row_format.mask_eod
        else torch.ones(shape, dtype=torch.float32, device=tokens.device),
        position_ids=position_ids,
        document_starts=document_starts if row_format.reset_attention_mask else None,
        counts=None,
    )


class CodeSwitcher:
    """Applies the dictionary to batches as the recipe says. A resume needs none of its state."""

    languages: tuple[str, ...]
    """The table's languages, in the order of `SwitchedBatch.counts[5:]`."""

    def __init__(
        self,
        table: DictionaryTable,
        section: CodeSwitchSection,
        row_format: RowFormat,
        *,
        seed: int,
        languages: Sequence[str],
        device: torch.device | str,
        coverage: Mapping[str, float] | None = None,
    ) -> None:
        """Builds the device table.

        Args:
            table: the dictionary without held-out groups, with the keys that `section` asks for
                (`switchable.switchable_table`).
            section: the recipe's section.
            row_format: what comes out.
            seed: 0 to 2^64-1; with the sample id and the position it decides every draw.
            languages: the data's languages; a batch names a row's language by its index here.
            device: where the batches are.
            coverage: share of running words the table knows, per language of the data; needed by `ratio_of: words`.

        Raises:
            UserError: the table is damaged.
        """
        self.languages = tuple(table.languages)
        self._format = row_format
        self._table = _device_table(table, section, row_format.eod_id, device)
        self._settings = CodeSwitchSettings(
            seed=seed,
            sequence_length=row_format.seq_length,
            label_mode=section.label_mode,
            pad_id=row_format.eod_id,
            eod_id=row_format.eod_id,
            mask_eod=row_format.mask_eod,
            reset_at_eod=row_format.reset_position_ids or row_format.reset_attention_mask,
            vocab_size=table.vocab_size,
        )
        # entry 0 is for rows of unknown language (-1)
        ids = [-1, *(self.languages.index(each) if each in self.languages else -1 for each in languages)]
        self._table_language = torch.tensor(ids, device=device)
        self._schedule = RatioSchedule(section, self.languages)
        self._known_share = _known_shares(self.languages, section, coverage)
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
        """Switches one batch; waits for nothing on the device.

        Args:
            tokens: int32 or int64 [batch, sequence + 1 + lookahead].
            language: integers [batch], index into the data's languages, -1 if unknown.
            sample_id: int64 [batch], distinct within a run.
            consumed_tokens: tokens of the phase before this batch, for the ratio's schedule.
            word_starts: bool [batch, sequence + 1 + lookahead], places where words start besides those that the tokens
                tell.
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
        wanted = torch.tensor(
            [
                [ratio_threshold(min(ratio / known, 1.0)) if known else 0 for ratio in ratios]
                for known in self._known_share
            ]
        )
        self._switches = bool(wanted.any())
        if self._thresholds.is_cuda:
            # from pinned memory the copy is handed over like a launch; from other memory it would wait for the device
            wanted = wanted.pin_memory()
        self._thresholds.copy_(wanted, non_blocking=True)


def _known_shares(
    languages: Sequence[str], section: CodeSwitchSection, coverage: Mapping[str, float] | None
) -> list[float]:
    """What the ratio is divided by for rows of each language."""
    if section.ratio_of == "occurrences":
        return [1.0] * len(languages)
    if coverage is None:
        raise ValueError("coverage is None, expected the share of known words per language because of ratio_of: words")
    for language, share in coverage.items():
        # 0: a language that is no source, of which nothing would be switched anyway
        if language in languages and 0 < share < section.highest_ratio:
            logger.warning(
                "code_switch.ratio reaches %g of the running words, but the table knows only %.1f%% of those in %s: "
                "all known ones will be switched",
                section.highest_ratio,
                100 * share,
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
            f"{table.path or 'the dictionary table'} cannot be used for code-switching: {error}; "
            "build it again with megatron-prealign dictionary build"
        ) from error
