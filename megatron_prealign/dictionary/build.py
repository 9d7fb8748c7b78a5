"""Builds the dictionary table: word lists → groups → case variants → token sequences → keys with candidates."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_prealign.data.tokenizer import Tokenizer
from megatron_prealign.dictionary.groups import GroupBuilder, Groups
from megatron_prealign.dictionary.lexicon import SequenceLexicon, letter_boundaries
from megatron_prealign.dictionary.readers import DictionaryInput, OnError, ReadErrors, read_entries
from megatron_prealign.dictionary.table import MAX_KEY_TOKENS, DictionaryTable
from megatron_prealign.dictionary.variants import VARIANTS, Variant, apply_case, source_variant
from megatron_prealign.errors import UserError

UNKNOWN = "pairs with a word the tokenizer does not know"
LONG_SOURCE = f"pairs with a source of more than {MAX_KEY_TOKENS} tokens"
LONG_TARGET = "pairs with a translation of too many tokens"
IDENTICAL = "pairs whose words are the same tokens"
SURPLUS = "pairs beyond the translations of one language"
KEPT = "pairs kept"
SPLIT_KEY = "case variants that are not one word to the tokenizer"
EMPTY_KEY = "case variants without a usable translation"
TAKEN_KEY = "case variants that another word has already"
KEYLESS = "groups without a key (for alignment alone)"


@dataclass(frozen=True, kw_only=True)
class BuildSettings:
    """Rules of a build."""

    max_translations: int = 4
    """Most translations of one word in one language; a file's first ones are kept."""
    max_target_tokens: int = 8
    """Longest translation, in tokens; it may be several words."""
    drop_identical: bool = True
    """Leave out pairs whose words are the same tokens: replacing one by the other changes nothing."""

    def __post_init__(self) -> None:
        for name in ("max_translations", "max_target_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}, expected 1 or more")


@dataclass
class BuildReport:
    """What happened to the pairs."""

    rules: Counter[str] = field(default_factory=Counter)
    """How many pairs or variants each rule took, in the order in which the rules apply."""
    errors: ReadErrors = field(default_factory=ReadErrors)
    """Lines left out."""


@dataclass
class _Keys:
    """Keys of one case variant, or of all of them put together (K keys, C candidates)."""

    group: NDArray[np.int64]
    sequence: NDArray[np.int64]
    candidate_key: NDArray[np.int64]
    candidate_sequence: NDArray[np.int64]
    candidate_language: NDArray[np.int16]


def read_groups(
    inputs: Sequence[DictionaryInput], report: BuildReport, on_error: OnError = "stop"
) -> tuple[Groups, list[dict[str, Any]]]:
    """Groups of all files, and one record per file for the table's `sources`.

    Raises:
        UserError: see `read_entries`.
    """
    builder = GroupBuilder(counts=report.rules)
    sources = []
    for source in inputs:
        pairs = builder.add(read_entries(source, report.errors, on_error), source.languages)
        sources.append({"path": str(source.path), "pairs": pairs, "licence": source.licence})
    return builder.build(), sources


def build_table(
    groups: Groups,
    tokenizer: Tokenizer,
    settings: BuildSettings,
    report: BuildReport,
    *,
    sources: Sequence[dict[str, Any]] = (),
    progress: bool = False,
) -> DictionaryTable:
    """The table of `groups` in the ids of `tokenizer`; its `group_count` is 0 until a corpus is counted.

    Raises:
        UserError: no pair is left.
    """
    lexicon = SequenceLexicon(tokenizer, groups.languages, progress)
    word_boundary = letter_boundaries(tokenizer)
    # As the word stands inside a sentence: this spelling decides which pairs are kept and is what alignment sees.
    plain = lexicon.encode(groups.texts, groups.text_language, word_initial=True)
    groups = _keep_pairs(groups, plain, lexicon, settings, report.rules)
    if not len(groups.source):
        raise UserError(
            "dictionary: no pair is left after the rules ("
            + ", ".join(f"{count} {name}" for name, count in report.rules.items() if count)
            + "); check the languages, the columns and the tokenizer"
        )
    parts = [_variant_keys(groups, variant, lexicon, word_boundary, settings, report.rules) for variant in VARIANTS]
    keys = _unique_keys(_join(parts), groups, report.rules)
    report.rules[KEYLESS] += len(groups.source) - len(np.unique(keys.group))
    return _assemble(groups, plain, keys, lexicon, tokenizer, word_boundary, sources)


def _keep_pairs(
    groups: Groups,
    plain: NDArray[np.int64],
    lexicon: SequenceLexicon,
    settings: BuildSettings,
    rules: Counter[str],
) -> Groups:
    """Drops pairs by what their tokens are, then groups without a pair; `texts` stay as they are."""
    lengths, usable = np.diff(lexicon.sequences()[1]), lexicon.usable()
    source, target = plain[groups.source[groups.pair_group]], plain[groups.pair_target]
    keep = np.ones(len(source), dtype=bool)
    for name, bad in (
        (UNKNOWN, ~(usable[source] & usable[target])),
        (LONG_SOURCE, lengths[source] > MAX_KEY_TOKENS),
        (LONG_TARGET, lengths[target] > settings.max_target_tokens),
        (IDENTICAL, (source == target) & settings.drop_identical),
    ):
        rules[name] += int((keep & bad).sum())
        keep &= ~bad
    kept = np.flatnonzero(keep)
    # Pairs of one group and language lie together: a pair's place in its run is its rank among the translations.
    language = groups.text_language[groups.pair_target[kept]]
    new_run = np.ones(len(kept), dtype=bool)
    new_run[1:] = (np.diff(groups.pair_group[kept]) != 0) | (np.diff(language) != 0)
    run_start = np.maximum.accumulate(np.where(new_run, np.arange(len(kept)), 0))
    first = np.arange(len(kept)) - run_start < settings.max_translations
    rules[SURPLUS] += int((~first).sum())
    rules[KEPT] += int(first.sum())
    kept = kept[first]
    left, pair_group = np.unique(groups.pair_group[kept], return_inverse=True)
    return replace(
        groups,
        source=groups.source[left],
        pair_group=pair_group.astype(np.int32),
        pair_target=groups.pair_target[kept],
    )


def _variant_keys(
    groups: Groups,
    variant: Variant,
    lexicon: SequenceLexicon,
    word_boundary: NDArray[np.uint8],
    settings: BuildSettings,
    rules: Counter[str],
) -> _Keys:
    """Keys of all groups in one spelling, each with the candidates in the same spelling."""
    texts, languages = groups.texts, groups.languages
    spellings = [
        source_variant(texts[text], languages[groups.text_language[text]], variant.case) for text in groups.source
    ]
    spelled = np.fromiter((spelling is not None for spelling in spellings), bool, len(spellings))
    written = np.flatnonzero(spelled)
    pairs = np.flatnonzero(spelled[groups.pair_group])
    target = groups.pair_target[pairs]
    target_language = groups.text_language[target]
    key_sequence = lexicon.encode(
        [spelling for spelling in spellings if spelling is not None],
        groups.text_language[groups.source[written]],
        variant.word_initial,
    )
    candidate_sequence = lexicon.encode(
        [
            apply_case(texts[text], languages[language], variant.case)
            for text, language in zip(target, target_language, strict=True)
        ],
        target_language,
        variant.word_initial,
    )
    lengths, usable = np.diff(lexicon.sequences()[1]), lexicon.usable()
    single = usable & (lengths <= MAX_KEY_TOKENS) & lexicon.single_word(word_boundary)
    place = np.zeros(len(spellings), dtype=np.int64)
    place[written] = np.arange(len(written))
    candidate_key = place[groups.pair_group[pairs]]
    good = usable[candidate_sequence] & (lengths[candidate_sequence] <= settings.max_target_tokens)
    if settings.drop_identical:
        good &= candidate_sequence != key_sequence[candidate_key]
    filled = np.zeros(len(written), dtype=bool)
    filled[candidate_key[good]] = True
    rules[SPLIT_KEY] += int((~single[key_sequence]).sum())
    rules[EMPTY_KEY] += int((single[key_sequence] & ~filled).sum())
    return _take_keys(
        _Keys(written, key_sequence, candidate_key[good], candidate_sequence[good], target_language[good]),
        np.flatnonzero(filled & single[key_sequence]),
    )


def _take_keys(keys: _Keys, chosen: NDArray[np.int64]) -> _Keys:
    """The `chosen` keys in that order, with their candidates."""
    place = np.full(len(keys.group), -1, dtype=np.int64)
    place[chosen] = np.arange(len(chosen))
    candidate_key = place[keys.candidate_key]
    kept = candidate_key >= 0
    return _Keys(
        keys.group[chosen],
        keys.sequence[chosen],
        candidate_key[kept],
        keys.candidate_sequence[kept],
        keys.candidate_language[kept],
    )


def _join(parts: Sequence[_Keys]) -> _Keys:
    """All variants one after the other."""
    begin = np.cumsum([0, *(len(part.group) for part in parts[:-1])])
    return _Keys(
        np.concatenate([part.group for part in parts]),
        np.concatenate([part.sequence for part in parts]),
        np.concatenate([part.candidate_key + first for part, first in zip(parts, begin, strict=True)]),
        np.concatenate([part.candidate_sequence for part in parts]),
        np.concatenate([part.candidate_language for part in parts]),
    )


def _unique_keys(keys: _Keys, groups: Groups, rules: Counter[str]) -> _Keys:
    """One key per language and token sequence, the first one; keys of a group together; every candidate once."""
    language = groups.text_language[groups.source[keys.group]].astype(np.int64)
    identity = language * (keys.sequence.max(initial=0) + 1) + keys.sequence
    _, first = np.unique(identity, return_index=True)
    rules[TAKEN_KEY] += len(keys.group) - len(first)
    first.sort()
    keys = _take_keys(keys, first[np.argsort(keys.group[first], kind="stable")])
    columns = (keys.candidate_key, keys.candidate_language.astype(np.int64), keys.candidate_sequence)
    # A stable sort by key and language keeps the file's order of translations, here and below.
    _, once = np.unique(np.stack(columns, axis=1), axis=0, return_index=True)
    once.sort()
    order = once[np.lexsort((keys.candidate_language[once], keys.candidate_key[once]))]
    return replace(
        keys,
        candidate_key=keys.candidate_key[order],
        candidate_sequence=keys.candidate_sequence[order],
        candidate_language=keys.candidate_language[order],
    )


def _assemble(
    groups: Groups,
    plain: NDArray[np.int64],
    keys: _Keys,
    lexicon: SequenceLexicon,
    tokenizer: Tokenizer,
    word_boundary: NDArray[np.uint8],
    sources: Sequence[dict[str, Any]],
) -> DictionaryTable:
    count = len(groups.source)
    key_tokens, key_offsets = lexicon.rows(keys.sequence)
    candidate_tokens, candidate_offsets = lexicon.rows(keys.candidate_sequence)
    sizes = np.bincount(groups.pair_group, minlength=count) + 1
    group_offsets = _offsets(sizes)
    words = np.empty(group_offsets[-1], dtype=np.int64)
    is_source = np.zeros(len(words), dtype=bool)
    is_source[group_offsets[:-1]] = True
    words[is_source], words[~is_source] = groups.source, groups.pair_target
    word_tokens, word_offsets = lexicon.rows(plain[words])
    spelled = [groups.texts[word].encode() for word in words]
    return DictionaryTable(
        languages=groups.languages,
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        word_boundary=word_boundary,
        key_tokens=key_tokens,
        key_offsets=key_offsets,
        key_language=groups.text_language[groups.source[keys.group]],
        key_group=keys.group.astype(np.int32),
        key_candidate_offsets=_offsets(np.bincount(keys.candidate_key, minlength=len(keys.group))),
        candidate_tokens=candidate_tokens,
        candidate_offsets=candidate_offsets,
        candidate_language=keys.candidate_language,
        candidate_weight=np.ones(len(keys.candidate_language), dtype=np.float32),
        word_tokens=word_tokens,
        word_offsets=word_offsets,
        word_language=groups.text_language[words],
        word_text=np.frombuffer(b"".join(spelled), dtype=np.uint8),
        word_text_offsets=_offsets(np.fromiter(map(len, spelled), np.int64, len(spelled))),
        group_offsets=group_offsets,
        group_count=np.zeros(count, dtype=np.int64),
        sources=tuple(sources),
    )


def _offsets(lengths: NDArray[Any]) -> NDArray[np.int64]:
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets
