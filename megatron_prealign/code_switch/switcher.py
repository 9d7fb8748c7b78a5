"""From the samples of a batch to what the model is trained on, with or without code-switching."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_prealign.code_switch.schedule import RatioSchedule
from megatron_prealign.dictionary.switchable import check_table
from megatron_prealign.dictionary.table import DictionaryTable
from megatron_prealign.errors import UserError
from megatron_prealign.kernels import NgramTable, build_ngram_table, code_switch_reference, ratio_threshold
from megatron_prealign.recipe import CodeSwitchSection


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
    counts: Tensor | None
    """int64 [3 + languages of the table], on the device: running words, known words, switched words of this batch, then
    words switched into each language (`CodeSwitcher.languages`); None without code-switching. Add up over batches."""


def plain_batch(tokens: Tensor, eod_id: int, mask_eod: bool) -> SwitchedBatch:
    """The batch as it is, for runs without code-switching and for validation.

    Args:
        tokens: int32 or int64 [batch, sequence + 1].
        eod_id: end-of-document token.
        mask_eod: give positions whose input is `eod_id` loss mask 0.
    """
    inputs = tokens[:, :-1].to(torch.int64).contiguous()
    rows, positions = inputs.shape
    return SwitchedBatch(
        tokens=inputs,
        labels=tokens[:, 1:].to(torch.int64).contiguous(),
        loss_mask=(inputs != eod_id).to(torch.float32)
        if mask_eod
        else torch.ones((rows, positions), dtype=torch.float32, device=tokens.device),
        position_ids=torch.arange(positions, device=tokens.device).expand(rows, positions).contiguous(),
        counts=None,
    )


class CodeSwitcher:
    """Applies the dictionary to batches as the recipe says. A resume needs none of its state."""

    languages: tuple[str, ...]
    """The table's languages, in the order of `SwitchedBatch.counts[3:]`."""

    def __init__(
        self,
        table: DictionaryTable,
        section: CodeSwitchSection,
        *,
        seed: int,
        languages: Sequence[str],
        device: torch.device | str,
        eod_id: int,
        mask_eod: bool,
    ) -> None:
        """Builds the device table.

        Args:
            table: the dictionary, already without held-out groups.
            section: the recipe's section.
            seed: 0 to 2^64-1; with the sample id and the position it decides every draw.
            languages: the data's languages; a batch names a row's language by its index here.
            device: where the batches are.
            eod_id: end-of-document token, never part of a word; also fills rows that became shorter.
            mask_eod: give positions whose input is `eod_id` loss mask 0.

        Raises:
            UserError: the section or the data does not fit the table.
        """
        self.languages = tuple(table.languages)
        self._section, self._seed = section, seed
        self._eod_id, self._mask_eod = eod_id, mask_eod
        check_table(table, section, languages)
        self._table = _device_table(table, section, eod_id, device)
        # entry 0 is for rows of unknown language (-1)
        ids = [-1, *(self.languages.index(each) if each in self.languages else -1 for each in languages)]
        self._table_language = torch.tensor(ids, device=device)
        self._schedule = RatioSchedule(section, self.languages)
        self._current = [0] * len(self.languages)
        self._thresholds = torch.zeros(len(self.languages), dtype=torch.int64, device=device)

    def __call__(self, tokens: Tensor, language: Tensor, sample_id: Tensor, consumed_tokens: int) -> SwitchedBatch:
        """Switches one batch; waits for nothing on the device.

        Args:
            tokens: int32 or int64 [batch, sequence + 1].
            language: integers [batch], index into the data's languages, -1 if unknown.
            sample_id: int64 [batch], distinct within a run.
            consumed_tokens: tokens of the phase before this batch, for the ratio's schedule.
        """
        self._set_thresholds(consumed_tokens)
        output = code_switch_reference(
            tokens,
            self._table_language.index_select(0, language.to(torch.int64) + 1),
            sample_id,
            self._table,
            seed=self._seed,
            thresholds=self._thresholds,
            label_mode=self._section.label_mode,
            pad_id=self._eod_id,
            eod_id=self._eod_id if self._mask_eod else None,
        )
        return SwitchedBatch(*output)

    def _set_thresholds(self, consumed_tokens: int) -> None:
        wanted = [ratio_threshold(ratio) for ratio in self._schedule.ratios(consumed_tokens)]
        for index, (old, new) in enumerate(zip(self._current, wanted, strict=True)):
            if old != new:
                # fill_ hands the number over with the launch; a copy from host memory would wait for the device
                self._thresholds[index].fill_(new)
        self._current = wanted


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
