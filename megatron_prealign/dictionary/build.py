"""Builds the dictionary table: word lists → groups → case variants → token sequences → keys with candidates."""

import gc
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_prealign.data.tokenizer import Tokenizer
from megatron_prealign.dictionary.groups import GroupBuilder, Groups
from megatron_prealign.dictionary.lexicon import SequenceLexicon, letter_boundaries
from megatron_prealign.dictionary.readers import DictionaryInput, OnError, ReadErrors, read_entries
from megatron_prealign.dictionary.table import FORM_WORD_INITIAL, MAX_KEY_TOKENS, DictionaryTable
from megatron_prealign.dictionary.variants import CASES, Case, apply_case, source_variant
from megatron_prealign.errors import UserError
from megatron_prealign.progress import Progress

UNKNOWN = "pairs with a word the tokenizer does not know"
LONG_SOURCE = f"pairs with a source of more than {MAX_KEY_TOKENS} tokens"
LONG_TARGET = "pairs with a translation of too many tokens"
IDENTICAL = "pairs whose words are the same tokens"
SURPLUS = "pairs beyond the translations of one language"
KEPT = "pairs kept"
SPLIT_KEY = "case variants that are several words or more than 8 tokens to the tokenizer"
MARKED_KEY = "case variants found without their space, which is a token of its own"
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
class _Spelling:
    """Words in one case: S groups have it, with P pairs of T different translations."""

    group: NDArray[np.int64]
    """[S]"""
    sources: list[str]
    """[S]"""
    targets: list[str]
    """[T]"""
    target_language: NDArray[np.int16]
    """[T]"""
    pair_source: NDArray[np.int64]
    """[P], index into `sources`."""
    pair_target: NDArray[np.int64]
    """[P], index into `targets`."""


@dataclass
class _Keys:
    """Keys of one case variant, or of all of them put together (K keys, C candidates)."""

    group: NDArray[np.int64]
    sequence: NDArray[np.int64]
    form: NDArray[np.uint8]
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
    show_progress: bool = False,
) -> DictionaryTable:
    """The table of `groups` in the ids of `tokenizer`; its `group_count` is 0 until a corpus is counted.

    Raises:
        UserError: no pair is left.
    """
    lexicon = SequenceLexicon(tokenizer, groups.languages)
    word_boundary = letter_boundaries(tokenizer)
    with _without_garbage_collection(), Progress("tokenise", None, unit="words", enabled=show_progress) as progress:
        # As the word stands inside a sentence: this spelling decides which pairs are kept and is what alignment sees.
        plain = lexicon.encode(groups.texts, groups.text_language, True, progress)
        groups = _keep_pairs(groups, plain, lexicon, settings, report.rules)
        if not len(groups.source):
            raise _nothing_left(report)
        parts = []
        for number, case in enumerate(CASES):
            spelling = _spell(groups, case)
            for word_initial in (True, False):
                form = number | (FORM_WORD_INITIAL if word_initial else 0)
                variant = _encode_variant(groups, spelling, form, lexicon, progress)
                parts.append(_usable_keys(variant, lexicon, word_boundary, settings, report.rules))
    keys = _unique_keys(_join(parts), groups, report.rules)
    report.rules[KEYLESS] += len(groups.source) - len(np.unique(keys.group))
    return _assemble(groups, plain, keys, lexicon, tokenizer, word_boundary, sources)


def _nothing_left(report: BuildReport) -> UserError:
    reasons = [f"{count} {name}" for name, count in report.rules.items() if count]
    if report.errors.count:
        reasons.append(f"{report.errors.count} lines skipped, the first {report.errors.first[0]}")
    return UserError(
        f"dictionary: no pair is left ({'; '.join(reasons)}); check the format, the languages and the tokenizer"
    )


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    # Millions of small lists and no cycles: looking for cycles among them doubled the time of a build.
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


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


def _spell(groups: Groups, case: Case) -> _Spelling:
    """Source words and translations in one case; every different translation is spelled once."""
    texts, languages, text_language = groups.texts, groups.languages, groups.text_language
    spelled = [source_variant(texts[text], languages[text_language[text]], case) for text in groups.source]
    written = np.fromiter((spelling is not None for spelling in spelled), bool, len(spelled))
    pairs = np.flatnonzero(written[groups.pair_group])
    targets, pair_target = np.unique(groups.pair_target[pairs], return_inverse=True)
    return _Spelling(
        group=np.flatnonzero(written),
        sources=[spelling for spelling in spelled if spelling is not None],
        targets=[apply_case(texts[text], languages[text_language[text]], case) for text in targets],
        target_language=text_language[targets],
        # Groups that are not written have no pairs left: counting those that are gives a pair its place among them.
        pair_source=(np.cumsum(written) - 1)[groups.pair_group[pairs]],
        pair_target=pair_target,
    )


def _encode_variant(
    groups: Groups, spelling: _Spelling, form: int, lexicon: SequenceLexicon, progress: Progress
) -> _Keys:
    word_initial = bool(form & FORM_WORD_INITIAL)
    source_language = groups.text_language[groups.source[spelling.group]]
    targets = lexicon.encode(spelling.targets, spelling.target_language, word_initial, progress)
    return _Keys(
        group=spelling.group,
        sequence=lexicon.encode(spelling.sources, source_language, word_initial, progress),
        form=np.full(len(spelling.group), form, dtype=np.uint8),
        candidate_key=spelling.pair_source,
        candidate_sequence=targets[spelling.pair_target],
        candidate_language=spelling.target_language[spelling.pair_target],
    )


def _usable_keys(
    keys: _Keys,
    lexicon: SequenceLexicon,
    word_boundary: NDArray[np.uint8],
    settings: BuildSettings,
    rules: Counter[str],
) -> _Keys:
    """Keys that can be found in a text as one word and have a candidate."""
    lengths, usable = np.diff(lexicon.sequences()[1]), lexicon.usable()
    inner_starts = lexicon.word_starts(word_boundary)
    single = (usable & (lengths <= MAX_KEY_TOKENS) & (inner_starts == 0))[keys.sequence]
    # Where the tokenizer keeps the space as a token of its own, the word begins behind it: its key without the space
    # finds it, and the space stays in the text. So this spelling needs no key.
    bare_marker = (lexicon.first_tokens() == lexicon.space_token) & (inner_starts == 1)
    marked = ~single & bare_marker[keys.sequence]
    good = (usable & (lengths <= settings.max_target_tokens))[keys.candidate_sequence]
    if settings.drop_identical:
        good &= keys.candidate_sequence != keys.sequence[keys.candidate_key]
    filled = np.zeros(len(keys.group), dtype=bool)
    filled[keys.candidate_key[good]] = True
    rules[MARKED_KEY] += int(marked.sum())
    rules[SPLIT_KEY] += int((~single & ~marked).sum())
    rules[EMPTY_KEY] += int((single & ~filled).sum())
    keys = replace(
        keys,
        candidate_key=keys.candidate_key[good],
        candidate_sequence=keys.candidate_sequence[good],
        candidate_language=keys.candidate_language[good],
    )
    return _take_keys(keys, np.flatnonzero(filled & single))


def _take_keys(keys: _Keys, chosen: NDArray[np.int64]) -> _Keys:
    """The `chosen` keys in that order, with their candidates."""
    place = np.full(len(keys.group), -1, dtype=np.int64)
    place[chosen] = np.arange(len(chosen))
    candidate_key = place[keys.candidate_key]
    kept = candidate_key >= 0
    return _Keys(
        keys.group[chosen],
        keys.sequence[chosen],
        keys.form[chosen],
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
        np.concatenate([part.form for part in parts]),
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
        key_form=keys.form,
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
