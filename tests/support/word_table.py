"""Builds a dictionary table from a list of groups, for tests that need words with known ids."""

from collections.abc import Sequence

import numpy as np

from megatron_prealign.dictionary.table import DictionaryTable, find_problem

# A word: its language and its token ids. A group: words that mean the same, the source word first.
Word = tuple[str, list[int]]


def _ragged(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([each for row in rows for each in row], dtype=np.int32), np.cumsum([0, *map(len, rows)])


def word_table(
    groups: Sequence[Sequence[Word]],
    languages: tuple[str, ...],
    *,
    vocab_size: int,
    counts: Sequence[int] | None = None,
) -> DictionaryTable:
    """Returns a table of these groups; its only code-switching key is the first word of the first group."""
    words = [word for group in groups for word in group]
    word_tokens, word_offsets = _ragged([tokens for _, tokens in words])
    text, text_offsets = _ragged([list(f"word{number}".encode()) for number in range(len(words))])
    candidate = next(word for word in groups[0] if word[0] != groups[0][0][0])
    table = DictionaryTable(
        languages=languages,
        tokenizer_fingerprint="sha256:0",
        vocab_size=vocab_size,
        word_boundary=np.full(vocab_size, 5, dtype=np.uint8),
        key_tokens=np.array(groups[0][0][1][:1], dtype=np.int32),
        key_offsets=np.array([0, 1]),
        key_language=np.array([languages.index(groups[0][0][0])], dtype=np.int16),
        key_group=np.zeros(1, dtype=np.int32),
        key_form=np.full(1, 4, dtype=np.uint8),
        key_candidate_offsets=np.array([0, 1]),
        candidate_tokens=np.array(candidate[1], dtype=np.int32),
        candidate_offsets=np.array([0, len(candidate[1])]),
        candidate_language=np.array([languages.index(candidate[0])], dtype=np.int16),
        candidate_weight=np.ones(1, dtype=np.float32),
        word_tokens=word_tokens,
        word_offsets=word_offsets,
        word_language=np.array([languages.index(language) for language, _ in words], dtype=np.int16),
        word_text=text.astype(np.uint8),
        word_text_offsets=text_offsets,
        group_offsets=np.cumsum([0, *map(len, groups)]),
        group_count=np.array(counts if counts is not None else [0] * len(groups), dtype=np.int64),
    )
    assert find_problem(table) is None
    return table
