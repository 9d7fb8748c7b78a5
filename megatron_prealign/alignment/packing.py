"""Lays words out in rows: several in one, kept apart by the attention mask, or each in a row of its own.

A word is fed alone, without context. One word a row would leave most rows nearly empty, all being as long as the
longest word; so words share rows of `PACKED_ROW_TOKENS`. No token attends to another word and positions start anew with
each.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_prealign.model.attention import document_mask
from megatron_prealign.runtime.transfer import to_device

# Long enough that what is left at a row's end is little, short enough that the mask's square is little too.
PACKED_ROW_TOKENS = 64


@dataclass(frozen=True, eq=False)
class WordBatch:
    """Words of one data-parallel rank in one forward pass, laid out in rows.

    Attributes:
        tokens: int64 `[rows, tokens]`, 0 where no word lies.
        position_ids: int64 `[rows, tokens]`, from 0 in every word.
        attention_mask: goes into the model as its mask and tells batches apart by its memory: `document_mask` of packed
            rows, or a tensor of two dimensions, which leaves attention causal.
        word_tokens: int64 `[words, longest]`, the tokens of each word, 0 after its end.
        places: int64 `[words, longest]`, where they lie when tokens come first as in the model, `token * rows + row`;
            after a word's end its own first place.
        weights: float32 `[words, longest]`, 1/length on a word's tokens, 0 after its end: a weighted sum is the mean.
    """

    tokens: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor
    word_tokens: torch.Tensor
    places: torch.Tensor
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
    """Makes a batch of words.

    Args:
        word_tokens: `[words, longest]`, 0 after a word's end.
        lengths: tokens of each word, 0 for an empty slot.
        packed: several words a row; needs an attention that takes `document_mask`.
        multiple: rows have a multiple of so many tokens.
        dtype: of the activations.
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
    # An empty slot at the end of a full row has no place of its own.
    places = np.minimum(column, width - 1) * rows + row[:, None]
    sent = [
        to_device(torch.from_numpy(each), device)
        for each in (tokens, positions, np.where(inside, word_tokens, 0), places, starts)
    ]
    return WordBatch(
        tokens=sent[0],
        position_ids=sent[1],
        attention_mask=document_mask(sent[4], dtype) if packed else torch.ones_like(weights, device=device),
        word_tokens=sent[2],
        places=sent[3],
        weights=to_device(weights, device),
    )


def _pack(lengths: NDArray[np.int64], width: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row and first column of each word, in order, each in the row of the one before it while it fits."""
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
