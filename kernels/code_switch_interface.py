"""What every form of the code-switching kernel takes and gives."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_prealign.kernels.ngram_table import NgramTable

LABEL_MODES = ("input_only", "codeswitch", "no_predict", "mix")
RUNNING, KNOWN, SWITCHED, PADDED, TRUNCATED, LANGUAGES_FROM = range(6)
"""Columns of `CodeSwitchOutput.counts`."""
MAX_SEQUENCE = 1 << 22
"""Longest row, in tokens."""


class CodeSwitchBatch(NamedTuple):
    """The rows to switch, on one device (B rows, W source tokens)."""

    tokens: Tensor
    """int32 or int64 [B, W], W above the positions of the result."""
    language: Tensor
    """int64 [B], index into the table's languages; -1 for a row that is never switched."""
    sample_id: Tensor
    """int64 [B], must not repeat within a run, or words repeat their draws."""
    word_starts: Tensor | None = None
    """bool [B, W], further places where words start (scripts without spaces)."""


class CodeSwitchOutput(NamedTuple):
    """A batch ready for the model (B rows, S positions, L languages)."""

    tokens: Tensor
    """int64 [B, S], model input."""
    labels: Tensor
    """int64 [B, S], 0 where nothing is to be predicted (vocabulary-parallel cross entropy takes no negative label)."""
    loss_mask: Tensor
    """float32 [B, S], 1 where the label counts, else 0."""
    position_ids: Tensor
    """int64 [B, S], 0..S-1, or counted from 0 in every document."""
    document_starts: Tensor | None
    """int32 [B, S], where the document of each position begins; None unless asked for. Padding belongs to none: each
    padded position begins at itself."""
    counts: Tensor
    """int64 [B, 5 + L]: running, known and switched words, padded positions, truncated source tokens, and the words
    switched into each language.

    A running word starts at a position that reaches the output and, where the table knows letters, its first token
    contains one. Known and switched words are counted where they reach the output too. A source token is truncated if
    it stands in the first S and did not reach the output; a switched word counts as one token here."""


@dataclass(frozen=True, kw_only=True)
class CodeSwitchSettings:
    """What stays the same from batch to batch.

    Raises:
        ValueError: a value is out of range.
    """

    seed: int
    """0 to 2^64-1."""
    sequence_length: int
    """S: positions of the result. The input has at least one token more."""
    label_mode: str
    """One of LABEL_MODES."""
    pad_id: int
    """Token that fills up rows which became shorter."""
    eod_id: int | None = None
    """End-of-document token; needed by the two switches below."""
    mask_eod: bool = False
    """Give positions whose input is `eod_id` loss mask 0."""
    reset_at_eod: bool = False
    """Count positions from 0 after every `eod_id` and give `document_starts`."""
    vocab_size: int | None = None
    """Ids of the tokenizer, if the table is to be checked against it."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 1 << 64:
            raise ValueError(f"seed is {self.seed}, expected 0 to 2^64-1")
        if not 0 < self.sequence_length <= MAX_SEQUENCE:
            raise ValueError(f"sequence_length is {self.sequence_length}, expected 1 to {MAX_SEQUENCE}")
        if self.label_mode not in LABEL_MODES:
            raise ValueError(f"label_mode is {self.label_mode!r}, expected one of {', '.join(LABEL_MODES)}")
        if self.pad_id < 0:
            raise ValueError(f"pad_id is {self.pad_id}, expected a token id")
        if self.eod_id is None and (self.mask_eod or self.reset_at_eod):
            raise ValueError("eod_id is None, expected a token id because mask_eod or reset_at_eod is set")


def ratio_threshold(ratio: float) -> int:
    """Threshold of 32 random bits below which a word is switched: never for ratio 0, always for ratio 1.

    Raises:
        ValueError: the ratio is outside [0, 1].
    """
    if not 0.0 <= ratio <= 1.0:
        raise ValueError(f"ratio is {ratio}, expected a number from 0 to 1")
    return round(ratio * (1 << 32))


def check_inputs(batch: CodeSwitchBatch, table: NgramTable, thresholds: Tensor, settings: CodeSwitchSettings) -> None:
    """Checks what costs no look at the data.

    Raises:
        ValueError: a dtype, shape, layout or device is wrong; the argument, what it is and what was expected.
    """
    tokens, language, sample_id, word_starts = batch
    least = settings.sequence_length + 1
    if tokens.dim() != 2 or tokens.dtype not in (torch.int32, torch.int64) or tokens.shape[1] < least:
        raise ValueError(
            f"tokens is {tokens.dtype} {list(tokens.shape)}, expected int32 or int64 [batch, {least} or more]"
        )
    rows = tokens.shape[0]
    if tokens.shape[1] > MAX_SEQUENCE:
        raise ValueError(f"tokens has rows of {tokens.shape[1]}, expected at most {MAX_SEQUENCE}")
    if language.shape != (rows,) or language.dtype != torch.int64:
        raise ValueError(f"language is {language.dtype} {list(language.shape)}, expected int64 [{rows}]")
    if sample_id.shape != (rows,) or sample_id.dtype != torch.int64:
        raise ValueError(f"sample_id is {sample_id.dtype} {list(sample_id.shape)}, expected int64 [{rows}]")
    languages = table.num_languages
    if thresholds.shape != (languages, languages) or thresholds.dtype != torch.int64:
        raise ValueError(
            f"thresholds is {thresholds.dtype} {list(thresholds.shape)}, expected int64 [{languages}, {languages}]"
        )
    if word_starts is not None and (word_starts.shape != tokens.shape or word_starts.dtype != torch.bool):
        raise ValueError(
            f"word_starts is {word_starts.dtype} {list(word_starts.shape)}, expected bool {list(tokens.shape)}"
        )
    given = {"tokens": tokens, "language": language, "sample_id": sample_id, "thresholds": thresholds}
    if word_starts is not None:
        given["word_starts"] = word_starts
    for name, each in given.items():
        if not each.is_contiguous():
            raise ValueError(f"{name} has strides {list(each.stride())}, expected a contiguous tensor")
        if each.device != table.device:
            raise ValueError(f"{name} lies on {each.device}, expected {table.device}, where the table is")
    if settings.eod_id is not None and settings.eod_id not in table.forbidden_tokens:
        raise ValueError(
            f"eod_id is {settings.eod_id}, expected one of the table's forbidden tokens "
            f"{sorted(table.forbidden_tokens)}: a document must not end inside a word"
        )
    if settings.vocab_size not in (None, len(table.word_boundary)):
        raise ValueError(
            f"table is for a vocabulary of {len(table.word_boundary)}, expected vocab_size = {settings.vocab_size}"
        )
    if settings.pad_id >= len(table.word_boundary):
        raise ValueError(f"pad_id is {settings.pad_id}, expected an id below {len(table.word_boundary)}")
