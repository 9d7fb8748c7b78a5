"""Evaluates a table on corpora: coverage, switch rate, change in length, ambiguity and unknown words.

The report has only JSON values; `report_page` renders it as HTML.
"""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_prealign.data.sidecar import Sidecar, load_sidecar
from megatron_prealign.dictionary.coverage import Words, match_words, read_sample, split_words
from megatron_prealign.dictionary.frequent_words import frequent_words
from megatron_prealign.dictionary.ragged import row_numbers
from megatron_prealign.dictionary.running_words import DistinctWords, distinct_words, word_texts
from megatron_prealign.dictionary.table import DictionaryTable
from megatron_prealign.errors import UserError
from megatron_prealign.tokenizer.base import Tokenizer

FORMAT_VERSION = 1
# Upper bounds of frequency ranks of the words of a corpus.
RANK_BANDS = (100, 1_000, 10_000, 100_000)
MOST_TRANSLATIONS_SHOWN = 8
CONTEXT_TOKENS = 24

DEFINITIONS = {
    "running words": "Words of the corpus as code-switching splits them: at spaces and punctuation or, if the corpus "
    "was segmented, at the marks of the segmenter. Words without a letter do not count.",
    "coverage": "Percentage of running words with a key in the table, including capitalised words and words before a "
    "comma. A known word with several target languages counts for each of them.",
    "vocabulary": "Coverage of distinct words: each counts once, regardless of frequency and case.",
    "switch rate": "Percentage of all running words that code-switching replaces at this ratio: ratio times coverage. "
    "For a word with translations in several languages, the language is drawn with equal probability.",
    "tokens per word": "Mean tokens of the known running words and of their translations, weighted by the probability "
    "of "
    "being drawn.",
    "growth": "Change in the number of tokens of the corpus by switching at this ratio. A sequence that grows is "
    "truncated.",
    "translations per word": "Mean number of translations of a known running word in that language, and the percentage "
    "of known running words with more than one.",
}


@dataclass(frozen=True)
class ReportSettings:
    """Settings of a report.

    Attributes:
        ratio: fraction of known words that code-switching replaces, 0 to 1.
        max_tokens: number of tokens to sample from each corpus, spread evenly over it.
        samples: number of switched words to show for each corpus.
        frequent_words: number of most frequent known words to list with their translations.
        unknown_words: number of most frequent unknown words to list.
        seed: seed of the samples.
    """

    ratio: float = 0.05
    max_tokens: int = 5_000_000
    samples: int = 20
    frequent_words: int = 50
    unknown_words: int = 50
    seed: int = 1

    def __post_init__(self) -> None:
        if not 0.0 <= self.ratio <= 1.0:
            raise UserError(f"--ratio is {self.ratio}, expected a number from 0 to 1")
        for name in ("max_tokens", "samples", "frequent_words", "unknown_words"):
            minimum = 1 if name == "max_tokens" else 0
            if getattr(self, name) < minimum:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}, expected {minimum} or more")


@dataclass(frozen=True)
class _Sample:
    """Sampled tokens of one corpus, with the key of each word."""

    tokens: NDArray[Any]
    row_starts: NDArray[np.int64]
    words: Words
    keys: NDArray[np.int64]


@dataclass(frozen=True)
class _Translations:
    """Translations of every key, for one or all target languages, each `[K]`."""

    count: NDArray[np.int64]
    """Number of translations."""
    probability: NDArray[np.float64]
    """Probability that the language is drawn: 1 divided by the number of languages of the key."""
    tokens: NDArray[np.float64]
    """Weighted mean of the tokens of a translation; 0 for a key without translations."""


def make_report(
    table: DictionaryTable, corpora: Sequence[str | Path], tokenizers: Sequence[Tokenizer], settings: ReportSettings
) -> dict[str, Any]:
    """Creates the report of a table on preprocessed datasets.

    Args:
        table: the table.
        corpora: prefixes of datasets.
        tokenizers: tokenizer of each corpus.
        settings: settings of the report.

    Raises:
        UserError: a dataset is missing, corrupt, or preprocessed with another tokenizer.
    """
    translations = _translations(table)
    return {
        "format_version": FORMAT_VERSION,
        "table": _table_info(table),
        "settings": {"ratio": settings.ratio, "max_tokens": settings.max_tokens, "seed": settings.seed},
        "corpora": [
            _measure(table, translations, prefix, tokenizer, settings)
            for prefix, tokenizer in zip(corpora, tokenizers, strict=True)
        ],
        "definitions": DEFINITIONS,
    }


def _table_info(table: DictionaryTable) -> dict[str, Any]:
    return {
        "path": str(table.path or ""),
        "languages": list(table.languages),
        "tokenizer_fingerprint": table.tokenizer_fingerprint,
        "groups": table.num_groups,
        "words": table.num_words,
        "keys": table.num_keys,
        "candidates": table.num_candidates,
        "sources": list(table.sources),
        "build": table.build,
    }


def _measure(
    table: DictionaryTable,
    translations: Mapping[int | None, _Translations],
    prefix: str | Path,
    tokenizer: Tokenizer,
    settings: ReportSettings,
) -> dict[str, Any]:
    sidecar = load_sidecar(prefix)
    table.check_tokenizer(sidecar.tokenizer.fingerprint, f"dataset {prefix}")
    table.check_tokenizer(tokenizer.fingerprint, f"tokenizer {tokenizer.path}")
    sample = _read_sample(table, prefix, sidecar, settings.max_tokens)
    distinct = distinct_words(sample.tokens, sample.words)
    texts = word_texts(tokenizer, sample.tokens, sample.words, distinct.first)
    known = sample.keys >= 0
    vocabulary = _Vocabulary(texts, distinct, known[distinct.first])
    running, num_known = len(known), int(known.sum())
    coverage = num_known / running if running else 0.0
    return {
        "prefix": str(prefix),
        "language": sidecar.language,
        "segmenter": sidecar.segmenter,
        "tokens": len(sample.tokens),
        "running_words": running,
        "known_words": num_known,
        "coverage": coverage,
        "vocabulary": len(vocabulary.counts),
        "known_vocabulary": len(vocabulary.known),
        "vocabulary_coverage": len(vocabulary.known) / len(vocabulary.counts) if vocabulary.counts else 0.0,
        "switch_rate": settings.ratio * coverage,
        **_lengths(table, translations[None], sample, settings.ratio),
        "by_rank": vocabulary.by_rank(),
        "pairs": [
            {
                "target": table.languages[language],
                **_pair(table, of_language, sample, distinct, texts, settings.ratio),
            }
            for language, of_language in translations.items()
            if language is not None and table.languages[language] != sidecar.language
        ],
        "frequent_words": frequent_words(table, sample.keys, distinct, texts, tokenizer, settings.frequent_words),
        "unknown_words": vocabulary.unknown(settings.unknown_words, running),
        "samples": _samples(table, sample, tokenizer, settings),
    }


def _read_sample(table: DictionaryTable, prefix: str | Path, sidecar: Sidecar, max_tokens: int) -> _Sample:
    tokens, row_starts, word_starts = read_sample(prefix, max_tokens, sidecar.segmenter, table.vocab_size)
    words = split_words(tokens, row_starts, table.word_boundary, word_starts)
    words = words.take(words.has_letter)
    language = table.language_id(sidecar.language)
    keys = match_words(table, -1 if language is None else language, tokens, words)
    return _Sample(tokens, row_starts, words, keys)


class _Vocabulary:
    """Distinct case-folded words of a corpus."""

    def __init__(self, texts: Sequence[str], distinct: DistinctWords, known: NDArray[np.bool_]) -> None:
        self.counts: Counter[str] = Counter()
        self.known: set[str] = set()
        self._unknown: Counter[str] = Counter()
        self._spelling: dict[str, str] = {}
        for text, count, has_key in zip(texts, distinct.occurrences.tolist(), known.tolist(), strict=True):
            word = text.casefold()
            self.counts[word] += count
            if has_key:
                self.known.add(word)
            else:
                self._unknown[word] += count
                # Texts are sorted by descending frequency.
                self._spelling.setdefault(word, text)

    def unknown(self, limit: int, running: int) -> list[dict[str, Any]]:
        """Returns the most frequent words without a key, in their most frequent spelling."""
        return [
            {"word": self._spelling[word], "count": count, "share": count / running}
            for word, count in self._unknown.most_common(limit)
        ]

    def by_rank(self) -> list[dict[str, Any]]:
        """Returns the fraction of known words per band of frequency ranks."""
        ranked = [word in self.known for word, _ in self.counts.most_common()]
        bands, begin = [], 0
        for end in (*RANK_BANDS, len(ranked)):
            band = ranked[begin:end]
            if band:
                bands.append({"from": begin + 1, "to": begin + len(band), "known": sum(band) / len(band)})
            begin = max(begin, end)
        return bands


def _translations(table: DictionaryTable) -> dict[int | None, _Translations]:
    """Translations per target language; the key None has those of all languages."""
    key, language = row_numbers(table.key_candidate_offsets), table.candidate_language
    weight, length = table.candidate_weight.astype(np.float64), np.diff(table.candidate_offsets)
    # Candidates of a key are sorted by language, so those of one language are contiguous.
    begins = np.ones(len(key), dtype=bool)
    begins[1:] = (np.diff(key) != 0) | (np.diff(language) != 0)
    run = np.cumsum(begins) - 1
    fraction = weight / np.bincount(run, weights=weight)[run]
    languages = np.bincount(key[begins], minlength=table.num_keys)
    probability = 1.0 / np.maximum(languages, 1)
    result: dict[int | None, _Translations] = {}
    for each in (None, *np.unique(language).tolist()):
        chosen = np.ones(len(key), dtype=bool) if each is None else language == each
        # Languages have equal probability, translations within a language are drawn by weight.
        parts = fraction * length * (probability[key] if each is None else 1.0)
        count = np.bincount(key[chosen], minlength=table.num_keys)
        tokens = np.bincount(key[chosen], weights=parts[chosen], minlength=table.num_keys).astype(np.float64)
        language_probability = np.ones_like(probability) if each is None else probability * (count > 0)
        result[each] = _Translations(count, language_probability, tokens)
    return result


def _lengths(
    table: DictionaryTable, translations: _Translations, sample: _Sample, ratio: float
) -> dict[str, float | None]:
    """Mean tokens of the known words and of their replacements, and the growth of the corpus."""
    keys = sample.keys[sample.keys >= 0]
    keys = keys[translations.count[keys] > 0]
    if not len(keys):
        return {"tokens_before": None, "tokens_after": None, "growth": 0.0}
    probability = translations.probability[keys]
    before, after = np.diff(table.key_offsets)[keys] * probability, translations.tokens[keys] * probability
    return {
        "tokens_before": float(before.sum() / probability.sum()),
        "tokens_after": float(after.sum() / probability.sum()),
        "growth": float(ratio * (after - before).sum() / len(sample.tokens)),
    }


def _pair(
    table: DictionaryTable,
    translations: _Translations,
    sample: _Sample,
    distinct: DistinctWords,
    texts: Sequence[str],
    ratio: float,
) -> dict[str, Any]:
    """Metrics of one target language."""
    count = np.where(sample.keys >= 0, translations.count[sample.keys], 0)
    probability = np.where(sample.keys >= 0, translations.probability[sample.keys], 0.0)
    known, running = count > 0, max(len(count), 1)
    types = {text.casefold() for text, has_key in zip(texts, known[distinct.first].tolist(), strict=True) if has_key}
    vocabulary = len({text.casefold() for text in texts})
    num_known = int(known.sum())
    histogram = np.bincount(np.minimum(count[known], MOST_TRANSLATIONS_SHOWN), minlength=MOST_TRANSLATIONS_SHOWN + 1)
    return {
        "known_words": num_known,
        "coverage": num_known / running,
        "known_vocabulary": len(types),
        "vocabulary_coverage": len(types) / max(vocabulary, 1),
        "switch_rate": float(ratio * probability.sum() / running),
        **_lengths(table, translations, sample, ratio),
        "translations_per_word": float(count[known].mean()) if num_known else None,
        "ambiguous_share": float((count[known] > 1).mean()) if num_known else None,
        "words_by_translations": histogram[1:].tolist(),
    }


def _samples(
    table: DictionaryTable, sample: _Sample, tokenizer: Tokenizer, settings: ReportSettings
) -> list[dict[str, str]]:
    """Known words spread evenly over the sample, each with its context and one of its translations."""
    known = np.flatnonzero(sample.keys >= 0)
    if not len(known) or not settings.samples:
        return []
    draw = random.Random(settings.seed)
    size = min(settings.samples, len(known))
    # One random word per bin: evenly spread, but not at the same position of every document.
    bounds = [len(known) * number // size for number in range(size + 1)]
    chosen = [int(known[draw.randrange(begin, end)]) for begin, end in zip(bounds, bounds[1:], strict=False)]
    samples = []
    for word in chosen:
        begin, length = int(sample.words.start[word]), int(sample.words.length[word])
        row = int(np.searchsorted(sample.row_starts, begin, side="right")) - 1
        row_begin = int(sample.row_starts[row])
        row_end = int(sample.row_starts[row + 1]) if row + 1 < len(sample.row_starts) else len(sample.tokens)
        candidate = _draw(table, int(sample.keys[word]), draw)
        bounds = [max(row_begin, begin - CONTEXT_TOKENS), begin, begin + length]
        bounds.append(min(row_end, begin + length + CONTEXT_TOKENS))
        before, original, after = _decode_parts(tokenizer, sample.tokens, bounds)
        tokens = table.candidate_tokens[slice(*table.candidate_offsets[candidate : candidate + 2])]
        samples.append(
            {
                "before": before,
                "original": original.strip(),
                "switched": _decode(tokenizer, tokens).strip(),
                "space": " " if original.startswith(" ") else "",
                "target": table.languages[table.candidate_language[candidate]],
                "after": after,
            }
        )
    return samples


def _draw(table: DictionaryTable, key: int, draw: random.Random) -> int:
    """Draws a candidate of a key: a language with equal probability, then a candidate of that language by weight."""
    candidates = range(*table.key_candidate_offsets[key : key + 2].tolist())
    language = draw.choice(sorted({int(table.candidate_language[each]) for each in candidates}))
    chosen = [each for each in candidates if table.candidate_language[each] == language]
    return draw.choices(chosen, weights=[float(table.candidate_weight[each]) for each in chosen])[0]


def _decode_parts(tokenizer: Tokenizer, tokens: NDArray[Any], bounds: Sequence[int]) -> list[str]:
    """Decodes adjacent spans of tokens."""
    begin, first, *ends = bounds
    parts = [_decode(tokenizer, tokens[begin:first])]
    text = parts[0]
    for start, end in zip([first, *ends], ends, strict=False):
        # Decoded alone, a span would lose its leading space, which sentencepiece drops at the start of a text.
        longer = _decode(tokenizer, tokens[begin:end])
        is_prefix = longer.startswith(text)
        parts.append(longer[len(text) :] if is_prefix else _decode(tokenizer, tokens[start:end]))
        text = longer
    return parts


def _decode(tokenizer: Tokenizer, tokens: NDArray[Any]) -> str:
    # Truncation can split a multi-byte character at the end.
    return tokenizer.decode([token for token in tokens.tolist() if token not in tokenizer.special_ids]).strip("\ufffd")
