"""Share of the running words of each language that the groups of an alignment phase reach, targets included.

Keys, which `coverage` counts, exist only for the source language. Here words are compared as text.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_prealign.dictionary.running_words import comparable, count_words
from megatron_prealign.dictionary.table import DictionaryTable
from megatron_prealign.recipe import DataSource
from megatron_prealign.tokenizer.base import Tokenizer

MAX_TOKENS = 200_000
"""Tokens sampled per language. On the demo's English text the share of this sample is within 0.001 of that of 5 M
tokens (0.957 and 0.956)."""


def word_coverage(
    table: DictionaryTable,
    words: NDArray[np.int64],
    sources: Sequence[DataSource],
    tokenizer: Tokenizer,
    max_tokens: int = MAX_TOKENS,
) -> dict[str, float]:
    """Measures the share of running words, in any case, that are words of the table; words of several runs of letters
    (`New York`) are not counted as reached.

    Args:
        words: indices of the words that count, such as `AlignmentGroups.words`.
        sources: datasets of the training blend; those of a language share its sample evenly.
        max_tokens: tokens to sample per language.

    Returns:
        Language of the data -> fraction, 0 to 1; languages without running words are absent.

    Raises:
        UserError: a dataset is missing, corrupt, or preprocessed with another tokenizer.
    """
    known: dict[str, set[str]] = {}
    for word in words.tolist():
        known.setdefault(table.languages[table.word_language[word]], set()).add(comparable(table.text(word)))
    number = Counter(source.language for source in sources)
    totals: Counter[str] = Counter()
    reached: Counter[str] = Counter()
    for source in sources:
        share = max(max_tokens // number[source.language], 1)
        for language, counts in count_words([source.path], tokenizer, table.word_boundary, share).items():
            totals[language] += sum(counts.values())
            reached[language] += sum(counts[word] for word in known.get(language, set()) & counts.keys())
    return {language: reached[language] / total for language, total in totals.items() if total}
