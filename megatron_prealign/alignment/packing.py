"""Lays out words in rows: several words per row, separated by the attention mask, or one word per row.

Each word is fed without context. With one word per row most rows would be nearly empty, since all are as long as the
longest word; so words share rows of `PACKED_ROW_TOKENS`. No token attends to another word, and positions restart at
each word.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_prealign.model.attention import document_mask
from megatron_prealign.runtime.transfer import to_device

# Long enough that little is left unused at the end of a row, short enough that the square mask stays small.
PACKED_ROW_TOKENS = 64


@dataclass(frozen=True, eq=False)
class WordBatch:
    """Words of one data-parallel rank in one forward pass, laid out in rows.

    Attributes:
        tokens: int64 `[rows, tokens]`, 0 for padding.
        position_ids: int64 `[rows, tokens]`, from 0 in every word.
        attention_mask: the model's attention mask; its address also identifies the batch. `document_mask` of packed
            rows, or a tensor of two dimensions, which leaves attention causal.
        word_tokens: int64 `[words, longest]`, the tokens of each word, 0 after its end.
        token_indices: int64 `[words, longest]`, index of each token when tokens come first as in the model,
            `token * rows + row`; after a word's end, the index of its first token.
        weights: float32 `[words, longest]`, 1/length on a word's tokens, 0 after its end: a weighted sum is the mean.
    """

    tokens: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor
    word_tokens: torch.Tensor
    token_indices: torch.Tensor
    weights: torch.Tensor


def lay_out_words(
    word_tokens: NDArray[np.int64],
    lengths: NDArray[np.int64],
    *,
    packed: bool,
    multiple: int,
    dtype: torch.dtype,
    device: torch.device,
) -> WordBatch:
    """Builds a batch of words.

    Args:
        word_tokens: `[words, longest]`, 0 after a word's end.
        lengths: tokens of each word, 0 for an empty slot.
        packed: whether several words share a row; requires attention that supports `document_mask`.
        multiple: row lengths are padded to a multiple of this.
        dtype: dtype of the activations.
        device: device of the batch.
    """
    longest = max(word_tokens.shape[1], 1)
    width = -(-max(longest, PACKED_ROW_TOKENS if packed else 1) // multiple) * multiple
    row, start = _pack(lengths, width) if packed else (np.arange(len(lengths)), np.zeros_like(lengths))
    rows = int(row[-1]) + 1 if len(row) else 1
    inside = np.arange(longest) < lengths[:, None]
    column = start[:, None] + np.where(inside, np.arange(longest), 0)
    tokens = np.zeros((rows, width), dtype=np.int64)
    positions = np.zeros_like(tokens)
    starts = np.broadcast_to(np.arange(width), tokens.shape).copy()
    at = np.broadcast_to(row[:, None], column.shape)[inside], column[inside]
    tokens[at] = word_tokens[inside]
    positions[at] = np.broadcast_to(np.arange(longest), column.shape)[inside]
    starts[at] = np.broadcast_to(start[:, None], column.shape)[inside]
    weights = torch.from_numpy((inside / np.maximum(lengths, 1)[:, None]).astype(np.float32))
    # The column of an empty slot after a full row is out of range.
    token_indices = np.minimum(column, width - 1) * rows + row[:, None]
    sent = [
        to_device(torch.from_numpy(each), device)
        for each in (tokens, positions, np.where(inside, word_tokens, 0), token_indices, starts)
    ]
    return WordBatch(
        tokens=sent[0],
        position_ids=sent[1],
        attention_mask=document_mask(sent[4], dtype) if packed else torch.ones_like(weights, device=device),
        word_tokens=sent[2],
        token_indices=sent[3],
        weights=to_device(weights, device),
    )


def _pack(lengths: NDArray[np.int64], width: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row and first column of each word. Words stay in order and fill a row until the next one does not fit."""
    ends = np.cumsum(lengths)
    row = np.zeros(len(lengths), dtype=np.int64)
    start = ends - lengths
    first = 0
    while first < len(lengths):
        next_first = int(np.searchsorted(ends, start[first] + width, side="right"))
        row[first:next_first] = row[first - 1] + 1 if first else 0
        offset = start[first]
        start[first:next_first] -= offset
        first = next_first
    return row, start
