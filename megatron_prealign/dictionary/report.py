"""What a table is worth on corpora: coverage, switch rate, change of length, ambiguity, what it does not know.

The result is plain values, for JSON and for the page that `report_page` makes of it.
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
from megatron_prealign.dictionary.ragged import row_numbers
from megatron_prealign.dictionary.running_words import DistinctWords, distinct_words, word_texts
from megatron_prealign.dictionary.table import DictionaryTable
from megatron_prealign.errors import UserError
from megatron_prealign.tokenizer.base import Tokenizer

FORMAT_VERSION = 1
# Of the words of a corpus, ordered by frequency.
RANK_BANDS = (100, 1_000, 10_000, 100_000)
MOST_TRANSLATIONS_SHOWN = 8
CONTEXT_TOKENS = 24

DEFINITIONS = {
    "running words": "Words of the corpus as code-switching sees them: between spaces and signs or, where a segmenter "
    "marked the corpus, between its marks. Words without a letter do not count.",
    "coverage": "Share of the running words that the table has a key for, capitalised ones and those before a comma "
    "included. A known word of several target languages counts for each of them.",
    "vocabulary": "The same for different words: each counts once however often it occurs, in any case.",
    "switch rate": "Share of all running words that code-switching replaces at this ratio: ratio times coverage. "
    "Where a word has translations in several languages, one of them is drawn with equal chances.",
    "tokens a word": "Tokens of the known running words and of their translations, by the chance with which they are "
    "drawn.",
    "growth": "By how much switching at this ratio lengthens the corpus, in tokens. A row that grows loses its end.",
    "translations a word": "Translations in that language that a known running word has on average, and the share of "
    "known running words with more than one.",
}


@dataclass(frozen=True)
class ReportSettings:
    """What to measure.

    Attributes:
        ratio: share of known words that code-switching is to replace, 0 to 1.
        max_tokens: tokens of each corpus to look at, drawn from all over it.
        samples: switched words to show of each corpus.
        unknown_words: most frequent unknown words to list.
        seed: decides the samples.
    """

    ratio: float = 0.05
    max_tokens: int = 5_000_000
    samples: int = 20
    unknown_words: int = 50
    seed: int = 1

    def __post_init__(self) -> None:
        if not 0.0 <= self.ratio <= 1.0:
            raise UserError(f"--ratio is {self.ratio}, expected a number from 0 to 1")
        for name in ("max_tokens", "samples", "unknown_words"):
            least = 1 if name == "max_tokens" else 0
            if getattr(self, name) < least:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}, expected {least} or more")


@dataclass(frozen=True)
class _Sample:
    """What was read of one corpus, and the key of each of its words."""

    tokens: NDArray[Any]
    row_starts: NDArray[np.int64]
    words: Words
    keys: NDArray[np.int64]


@dataclass(frozen=True)
class _Translations:
    """Of every key, for one target language or for all `[K]`."""

    count: NDArray[np.int64]
    chance: NDArray[np.float64]
    """With which chance it is drawn: 1 by the number of the key's languages."""
    tokens: NDArray[np.float64]
    """Mean tokens of a translation, by weight; 0 for a key without one."""


def make_report(
    table: DictionaryTable, corpora: Sequence[str | Path], tokenizers: Sequence[Tokenizer], settings: ReportSettings
) -> dict[str, Any]:
    """The report of a table on preprocessed datasets.

    Args:
        table: the table.
        corpora: prefixes of datasets.
        tokenizers: for each corpus the one that it was made with.
        settings: what to measure.

    Raises:
        UserError: a missing or damaged dataset, or one made with another tokenizer.
    """
    translations = _translations(table)
    return {
        "format_version": FORMAT_VERSION,
        "table": _about_table(table),
        "settings": {"ratio": settings.ratio, "max_tokens": settings.max_tokens, "seed": settings.seed},
        "corpora": [
            _measure(table, translations, prefix, tokenizer, settings)
            for prefix, tokenizer in zip(corpora, tokenizers, strict=True)
        ],
        "definitions": DEFINITIONS,
    }


def _about_table(table: DictionaryTable) -> dict[str, Any]:
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
    sample = _read(table, prefix, sidecar, settings.max_tokens)
    distinct = distinct_words(sample.tokens, sample.words)
    texts = word_texts(tokenizer, sample.tokens, sample.words, distinct.first)
    known = sample.keys >= 0
    vocabulary = _Vocabulary(texts, distinct, known[distinct.first])
    running, found = len(known), int(known.sum())
    share = found / running if running else 0.0
    return {
        "prefix": str(prefix),
        "language": sidecar.language,
        "segmenter": sidecar.segmenter,
        "tokens": len(sample.tokens),
        "running_words": running,
        "known_words": found,
        "coverage": share,
        "vocabulary": len(vocabulary.counts),
        "known_vocabulary": len(vocabulary.known),
        "vocabulary_coverage": len(vocabulary.known) / len(vocabulary.counts) if vocabulary.counts else 0.0,
        "switch_rate": settings.ratio * share,
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
        "unknown_words": vocabulary.unknown(settings.unknown_words, running),
        "samples": _samples(table, sample, tokenizer, settings),
    }


def _read(table: DictionaryTable, prefix: str | Path, sidecar: Sidecar, max_tokens: int) -> _Sample:
    tokens, row_starts, word_starts = read_sample(prefix, max_tokens, sidecar.segmenter, table.vocab_size)
    words = split_words(tokens, row_starts, table.word_boundary, word_starts)
    words = words.take(words.has_letter)
    language = table.language_id(sidecar.language)
    keys = match_words(table, -1 if language is None else language, tokens, words)
    return _Sample(tokens, row_starts, words, keys)


class _Vocabulary:
    """The different words of a corpus in small letters."""

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
                # Sequences come the most frequent first.
                self._spelling.setdefault(word, text)

    def unknown(self, most: int, running: int) -> list[dict[str, Any]]:
        """The most frequent words without a key, in their most frequent spelling."""
        return [
            {"word": self._spelling[word], "count": count, "share": count / running}
            for word, count in self._unknown.most_common(most)
        ]

    def by_rank(self) -> list[dict[str, Any]]:
        """Share of known words among the most frequent, band by band."""
        ranked = [word in self.known for word, _ in self.counts.most_common()]
        bands, begin = [], 0
        for end in (*RANK_BANDS, len(ranked)):
            band = ranked[begin:end]
            if band:
                bands.append({"from": begin + 1, "to": begin + len(band), "known": sum(band) / len(band)})
            begin = max(begin, end)
        return bands


def _translations(table: DictionaryTable) -> dict[int | None, _Translations]:
    """Of the candidates in each target language, and of all under None."""
    key, language = row_numbers(table.key_candidate_offsets), table.candidate_language
    weight, length = table.candidate_weight.astype(np.float64), np.diff(table.candidate_offsets)
    # Candidates of a key are sorted by language: those of one lie together.
    begins = np.ones(len(key), dtype=bool)
    begins[1:] = (np.diff(key) != 0) | (np.diff(language) != 0)
    run = np.cumsum(begins) - 1
    share = weight / np.bincount(run, weights=weight)[run]
    languages = np.bincount(key[begins], minlength=table.num_keys)
    chance = 1.0 / np.maximum(languages, 1)
    found: dict[int | None, _Translations] = {}
    for each in (None, *np.unique(language).tolist()):
        chosen = np.ones(len(key), dtype=bool) if each is None else language == each
        # A language with equal chances, a translation in it by weight.
        parts = share * length * (chance[key] if each is None else 1.0)
        count = np.bincount(key[chosen], minlength=table.num_keys)
        tokens = np.bincount(key[chosen], weights=parts[chosen], minlength=table.num_keys).astype(np.float64)
        found[each] = _Translations(count, np.ones_like(chance) if each is None else chance * (count > 0), tokens)
    return found


def _lengths(
    table: DictionaryTable, translations: _Translations, sample: _Sample, ratio: float
) -> dict[str, float | None]:
    """Tokens of the known words and of what replaces them."""
    keys = sample.keys[sample.keys >= 0]
    keys = keys[translations.count[keys] > 0]
    if not len(keys):
        return {"tokens_before": None, "tokens_after": None, "growth": 0.0}
    chance = translations.chance[keys]
    before, after = np.diff(table.key_offsets)[keys] * chance, translations.tokens[keys] * chance
    return {
        "tokens_before": float(before.sum() / chance.sum()),
        "tokens_after": float(after.sum() / chance.sum()),
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
    """What the table knows in one target language."""
    count = np.where(sample.keys >= 0, translations.count[sample.keys], 0)
    chance = np.where(sample.keys >= 0, translations.chance[sample.keys], 0.0)
    known, running = count > 0, max(len(count), 1)
    types = {text.casefold() for text, has in zip(texts, known[distinct.first].tolist(), strict=True) if has}
    vocabulary = len({text.casefold() for text in texts})
    found = int(known.sum())
    spread = np.bincount(np.minimum(count[known], MOST_TRANSLATIONS_SHOWN), minlength=MOST_TRANSLATIONS_SHOWN + 1)
    return {
        "known_words": found,
        "coverage": found / running,
        "known_vocabulary": len(types),
        "vocabulary_coverage": len(types) / max(vocabulary, 1),
        "switch_rate": float(ratio * chance.sum() / running),
        **_lengths(table, translations, sample, ratio),
        "translations_per_word": float(count[known].mean()) if found else None,
        "ambiguous_share": float((count[known] > 1).mean()) if found else None,
        "words_by_translations": spread[1:].tolist(),
    }


def _samples(
    table: DictionaryTable, sample: _Sample, tokenizer: Tokenizer, settings: ReportSettings
) -> list[dict[str, str]]:
    """Known words from all over the sample, each with what stands around it and one of its translations."""
    known = np.flatnonzero(sample.keys >= 0)
    if not len(known) or not settings.samples:
        return []
    draw = random.Random(settings.seed)
    size = min(settings.samples, len(known))
    # One word of each of equally many: evenly spread, and not the same place of every document.
    bounds = [len(known) * number // size for number in range(size + 1)]
    chosen = [int(known[draw.randrange(begin, end)]) for begin, end in zip(bounds, bounds[1:], strict=False)]
    shown = []
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
        shown.append(
            {
                "before": before,
                "original": original.strip(),
                "switched": _decode(tokenizer, tokens).strip(),
                "space": " " if original.startswith(" ") else "",
                "target": table.languages[table.candidate_language[candidate]],
                "after": after,
            }
        )
    return shown


def _draw(table: DictionaryTable, key: int, draw: random.Random) -> int:
    """A candidate of a key: a language with equal chances, and in it one by weight."""
    candidates = range(*table.key_candidate_offsets[key : key + 2].tolist())
    language = draw.choice(sorted({int(table.candidate_language[each]) for each in candidates}))
    chosen = [each for each in candidates if table.candidate_language[each] == language]
    return draw.choices(chosen, weights=[float(table.candidate_weight[each]) for each in chosen])[0]


def _decode_parts(tokenizer: Tokenizer, tokens: NDArray[Any], bounds: Sequence[int]) -> list[str]:
    """The texts of neighbouring stretches of tokens."""
    begin, first, *ends = bounds
    parts = [_decode(tokenizer, tokens[begin:first])]
    text = parts[0]
    for start, end in zip([first, *ends], ends, strict=False):
        # By itself a stretch would lack the space in front, which sentencepiece drops at the start of a text.
        longer = _decode(tokenizer, tokens[begin:end])
        whole = longer.startswith(text)
        parts.append(longer[len(text) :] if whole else _decode(tokenizer, tokens[start:end]))
        text = longer
    return parts


def _decode(tokenizer: Tokenizer, tokens: NDArray[Any]) -> str:
    # A cut through the bytes of a character leaves half of one at the end.
    return tokenizer.decode([token for token in tokens.tolist() if token not in tokenizer.special_ids]).strip("\ufffd")
