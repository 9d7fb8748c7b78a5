"""The known words of a corpus that occur most often, with their translations: most of what code-switching writes."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_prealign.dictionary.running_words import DistinctWords
from megatron_prealign.dictionary.table import DictionaryTable
from megatron_prealign.tokenizer.base import Tokenizer


def frequent_words(
    table: DictionaryTable,
    keys: NDArray[np.int64],
    distinct: DistinctWords,
    texts: Sequence[str],
    tokenizer: Tokenizer,
    limit: int,
) -> list[dict[str, Any]]:
    """Returns the most frequent known words, most frequent first, regardless of case.

    Args:
        keys: key of each running word of the corpus, -1 for an unknown word, `[W]`.
        distinct: the distinct words among them.
        texts: text of each distinct word.
        limit: maximum number of words.

    Returns:
        For each word: `word` in its most frequent spelling, `count`, `share` of the running words, `share_of_known`
        and `translations`, each with `target`, `text` and `probability`, most probable first.
    """
    of_distinct = keys[distinct.first].tolist()
    known = int((keys >= 0).sum())
    counts: Counter[str] = Counter()
    first: dict[str, tuple[str, int]] = {}
    for text, key, count in zip(texts, of_distinct, distinct.occurrences.tolist(), strict=True):
        if key >= 0:
            word = text.casefold()
            counts[word] += count
            # Distinct words are sorted by descending frequency.
            first.setdefault(word, (text, key))
    return [
        {
            "word": first[word][0],
            "count": count,
            "share": count / len(keys),
            "share_of_known": count / known,
            "translations": _translations(table, first[word][1], tokenizer),
        }
        for word, count in counts.most_common(limit)
    ]


def _translations(table: DictionaryTable, key: int, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Translations of a key with the probability of each: languages are equally probable, translations by weight."""
    candidates = range(*table.key_candidate_offsets[key : key + 2].tolist())
    languages = [int(table.candidate_language[each]) for each in candidates]
    weights = [float(table.candidate_weight[each]) for each in candidates]
    totals = {
        language: sum(w for w, of in zip(weights, languages, strict=True) if of == language) for language in languages
    }
    found = [
        {
            "target": table.languages[language],
            "text": tokenizer.decode(
                table.candidate_tokens[slice(*table.candidate_offsets[each : each + 2])].tolist()
            ).strip(),
            "probability": weight / totals[language] / len(totals),
        }
        for each, language, weight in zip(candidates, languages, weights, strict=True)
    ]
    return sorted(found, key=lambda each: -each["probability"])
