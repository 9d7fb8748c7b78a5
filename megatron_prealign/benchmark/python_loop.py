"""Code-switching as it is commonly written: a collate function that loops over the tokens in Python.

It is the baseline for the kernel and therefore written for speed: a dictionary keyed by tuples, lists, and tensors only
at the end. With the same random draws it returns the same batch as the kernel.
"""

from bisect import bisect_left
from collections.abc import Callable
from random import getrandbits
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_prealign.kernels.ngram_table import (
    BOUNDARY_AFTER,
    BOUNDARY_BEFORE,
    DRAW_BIAS,
    LENGTH_SHIFT,
    MAX_CANDIDATE_TOKENS,
    MAX_NGRAM,
    WORD,
    NgramTable,
)

Draw = Callable[[int, int], int]
"""32 random bits for a row and the position of a word."""
NOT_SCORED = -1


class _Translations(NamedTuple):
    last: list[int]
    """Largest draw that selects each translation."""
    tokens: list[list[int]]


def _random_bits(row: int, position: int) -> int:
    return getrandbits(32)


class PythonLoop:
    """The collate function (label mode input_only)."""

    def __init__(self, arrays: dict[str, Any], table: NgramTable, language: int, pad_id: int) -> None:
        """Builds the dictionary.

        Args:
            arrays: Arrays that the table was built from.
            table: The table on the CPU; its key k is key k of `arrays`.
            language: Language of the rows; keys of other languages are skipped.
            pad_id: Token that pads rows that became shorter.

        Raises:
            ValueError: the table does not have all keys of `arrays`.
        """
        if table.num_keys != len(arrays["key_language"]):
            raise ValueError(f"the table has {table.num_keys} keys, expected {len(arrays['key_language'])}")
        flags = table.word_boundary.tolist()
        self._before = [flag & BOUNDARY_BEFORE for flag in flags]
        self._after = [flag & BOUNDARY_AFTER for flag in flags]
        self._pad_id = pad_id
        self._entries: dict[tuple[int, ...], _Translations] = {}
        key_tokens, key_offsets = arrays["key_tokens"].tolist(), arrays["key_offsets"].tolist()
        bounds, last = table.key_candidates.tolist(), (table.candidate_last.to(torch.int64) + DRAW_BIAS).tolist()
        candidates, candidate_tokens = table.candidates.tolist(), table.candidate_tokens.tolist()
        for key, key_language in enumerate(arrays["key_language"].tolist()):
            if key_language != language:
                continue
            first, end = bounds[key], bounds[key + 1]
            translations = []
            for candidate in candidates[first:end]:
                start, length = candidate & WORD, (candidate >> LENGTH_SHIFT) & MAX_CANDIDATE_TOKENS
                translations.append(candidate_tokens[start : start + length])
            word = tuple(key_tokens[key_offsets[key] : key_offsets[key + 1]])
            self._entries[word] = _Translations(last[first:end], translations)

    def __call__(
        self,
        tokens: Tensor,
        sequence: int,
        threshold: int,
        word_starts: Tensor | None = None,
        switch_draw: Draw = _random_bits,
        translation_draw: Draw = _random_bits,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Collates a batch.

        Args:
            tokens: Integers [B, W], W > sequence, on the CPU.
            sequence: Length of the output sequences.
            threshold: `ratio_threshold` of the ratio.
            word_starts: Bool [B, W] or None.
            switch_draw: Draws whether a word is switched.
            translation_draw: Draws the translation.

        Returns:
            tokens (int64), labels (int64), loss mask (float32) and position ids (int64), [B, sequence] each.
        """
        inputs, labels, masks = [], [], []
        marks = None if word_starts is None else word_starts.tolist()
        for number, row in enumerate(tokens.tolist()):
            row_marks = marks and marks[number]
            stream, target = self._switch(
                number, row, sequence + 1, threshold, row_marks, switch_draw, translation_draw
            )
            missing = sequence + 1 - len(stream)
            stream += [self._pad_id] * missing
            target += [NOT_SCORED] * missing
            predicted = target[1 : sequence + 1]
            inputs.append(stream[:sequence])
            masks.append([0.0 if label == NOT_SCORED else 1.0 for label in predicted])
            labels.append([0 if label == NOT_SCORED else label for label in predicted])
        positions = [list(range(sequence))] * len(inputs)
        return torch.tensor(inputs), torch.tensor(labels), torch.tensor(masks), torch.tensor(positions)

    def _switch(
        self,
        number: int,
        row: list[int],
        min_tokens: int,
        threshold: int,
        marks: list[bool] | None,
        switch_draw: Draw,
        translation_draw: Draw,
    ) -> tuple[list[int], list[int]]:
        """Returns the switched tokens of a row (at least `min_tokens`, if the row suffices) and their targets."""
        before, after, entries = self._before, self._after, self._entries
        stream: list[int] = []
        target: list[int] = []
        start = 0
        starts_word = bool(before[row[0]] or (marks and marks[0]))
        for position in range(1, len(row)):
            if not (before[row[position]] or after[row[position - 1]] or (marks and marks[position])):
                continue
            word = row[start:position]
            entry = entries.get(tuple(word)) if starts_word and len(word) <= MAX_NGRAM else None
            if entry is not None and switch_draw(number, start) < threshold:
                translation = entry.tokens[bisect_left(entry.last, translation_draw(number, start))]
                stream += translation
                target.append(word[0])
                target += [NOT_SCORED] * (len(translation) - 1)
            else:
                stream += word
                target += word
            start, starts_word = position, True
            if len(stream) >= min_tokens:
                return stream, target
        # The last word may be cut off by the end of the row, so it is not switched.
        return stream + row[start:], target + row[start:]
