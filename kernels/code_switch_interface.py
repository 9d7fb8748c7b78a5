"""Inputs, outputs and settings of all implementations of code-switching."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_prealign.kernels.ngram_table import NgramTable

LABEL_MODES = ("input_only", "codeswitch", "no_predict", "mix")
RUNNING, KNOWN, SWITCHED, PADDED, TRUNCATED, LANGUAGES_FROM = range(6)
"""Columns of `CodeSwitchOutput.counts`."""
MAX_SEQUENCE = 1 << 22
"""Maximum sequence length, in tokens."""


class CodeSwitchBatch(NamedTuple):
    """The sequences to switch, on one device (B sequences of W source tokens)."""

    tokens: Tensor
    """int32 or int64 [B, W], W greater than the sequence length of the result."""
    language: Tensor
    """int64 [B], index into the table's languages; -1 for a sequence that is never switched."""
    sample_id: Tensor
    """int64 [B], must be unique within a run, or draws repeat."""
    word_starts: Tensor | None = None
    """bool [B, W], additional word starts (scripts without spaces)."""


class CodeSwitchOutput(NamedTuple):
    """Model inputs and labels of a batch (B sequences of S positions, L languages)."""

    tokens: Tensor
    """int64 [B, S], model input."""
    labels: Tensor
    """int64 [B, S], 0 where the loss is masked (vocabulary-parallel cross entropy accepts no negative labels)."""
    loss_mask: Tensor
    """float32 [B, S], 1 where the label is scored, else 0."""
    position_ids: Tensor
    """int64 [B, S], 0..S-1, or restarting at 0 in every document."""
    document_starts: Tensor | None
    """int32 [B, S], start of the document of each position; None unless requested. Padding belongs to no document: the
    start of a padded position is the position itself."""
    counts: Tensor
    """int64 [B, 5 + L]: running, known and switched words, padded positions, truncated source tokens, and the words
    switched into each language.

    A running word starts at a position that reaches the output and, if the table has letter flags, its first token
    contains a letter. Known and switched words are also counted only if they reach the output. A source token is
    truncated if it is among the first S and does not reach the output; a switched word counts as one token here."""


@dataclass(frozen=True, kw_only=True)
class CodeSwitchSettings:
    """Settings that are the same for all batches.

    Raises:
        ValueError: a value is out of range.
    """

    seed: int
    """0 to 2^64-1."""
    sequence_length: int
    """S, the sequence length of the result. The input has at least one token more."""
    label_mode: str
    """One of LABEL_MODES."""
    pad_id: int
    """Token that pads sequences that became shorter."""
    eod_id: int | None = None
    """End-of-document token; required by the two options below."""
    mask_eod: bool = False
    """Mask the loss at positions whose input is `eod_id`."""
    reset_at_eod: bool = False
    """Restart position ids at 0 after every `eod_id` and return `document_starts`."""
    vocab_size: int | None = None
    """Vocabulary size of the tokenizer, to check the table against; None for no check."""

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
    """Threshold below which 32 random bits switch a word: never for ratio 0, always for ratio 1.

    Raises:
        ValueError: the ratio is outside [0, 1].
    """
    if not 0.0 <= ratio <= 1.0:
        raise ValueError(f"ratio is {ratio}, expected a number from 0 to 1")
    return round(ratio * (1 << 32))


def check_inputs(batch: CodeSwitchBatch, table: NgramTable, thresholds: Tensor, settings: CodeSwitchSettings) -> None:
    """Checks the arguments without reading tensor data.

    Raises:
        ValueError: a dtype, shape, layout, device or token id is wrong.
    """
    tokens, language, sample_id, word_starts = batch
    least = settings.sequence_length + 1
    if tokens.dim() != 2 or tokens.dtype not in (torch.int32, torch.int64) or tokens.shape[1] < least:
        raise ValueError(
            f"tokens is {tokens.dtype} {list(tokens.shape)}, expected int32 or int64 [batch, {least} or more]"
        )
    rows = tokens.shape[0]
    if tokens.shape[1] > MAX_SEQUENCE:
        raise ValueError(f"tokens has sequences of {tokens.shape[1]} tokens, expected at most {MAX_SEQUENCE}")
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
    tensors = {"tokens": tokens, "language": language, "sample_id": sample_id, "thresholds": thresholds}
    if word_starts is not None:
        tensors["word_starts"] = word_starts
    for name, each in tensors.items():
        if not each.is_contiguous():
            raise ValueError(f"{name} has strides {list(each.stride())}, expected a contiguous tensor")
        if each.device != table.device:
            raise ValueError(f"{name} is on {each.device}, expected {table.device}, the device of the table")
    if settings.eod_id is not None and settings.eod_id not in table.forbidden_tokens:
        raise ValueError(
            f"eod_id is {settings.eod_id}, expected one of the table's forbidden tokens "
            f"{sorted(table.forbidden_tokens)}, since a document must not end inside a word"
        )
    if settings.vocab_size not in (None, len(table.word_boundary)):
        raise ValueError(
            f"table has a vocabulary of {len(table.word_boundary)} tokens, expected vocab_size = {settings.vocab_size}"
        )
    if settings.pad_id >= len(table.word_boundary):
        raise ValueError(f"pad_id is {settings.pad_id}, expected an id below {len(table.word_boundary)}")
