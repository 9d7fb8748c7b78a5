"""Builds the dictionary table: word lists → groups → case variants → token sequences → keys with candidates."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import chain, compress
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from megatron_prealign.dictionary import build_report
from megatron_prealign.dictionary.build_report import BuildReport
from megatron_prealign.dictionary.groups import (
    Cleaning,
    GroupBuilder,
    Groups,
    ScriptFit,
    without_unused_texts,
)
from megatron_prealign.dictionary.lexicon import SequenceLexicon, letter_boundaries
from megatron_prealign.dictionary.ragged import offsets_of, row_indices
from megatron_prealign.dictionary.readers import DictionaryInput, FileInfo, OnError, read_entries
from megatron_prealign.dictionary.running_words import WordCounts
from megatron_prealign.dictionary.selection import drop_rare, keep_pairs, order_pairs
from megatron_prealign.dictionary.table import FORM_WORD_INITIAL, MAX_KEY_TOKENS, DictionaryTable
from megatron_prealign.dictionary.variants import CASES, spell
from megatron_prealign.errors import UserError
from megatron_prealign.progress import Progress
from megatron_prealign.resources import gc_disabled
from megatron_prealign.text import plural
from megatron_prealign.tokenizer.base import Tokenizer


@dataclass(frozen=True, kw_only=True)
class BuildSettings:
    """Rules for building a table."""

    max_translations: int = 4
    """Maximum number of translations of a word per language; the first ones are kept."""
    order: Literal["file", "weight", "frequency"] = "file"
    """Order of translations: order of the files, descending weight, or descending frequency in the corpora."""
    max_target_tokens: int = 8
    """Maximum length of a translation in tokens; it may have several words."""
    drop_identical: bool = True
    """Drop pairs whose words have identical tokens: replacing one by the other changes nothing."""
    min_count: int = 0
    """Minimum number of occurrences of a source word in the corpora."""
    min_target_count: int = 0
    """Minimum number of occurrences of a translation in the corpora of its language."""

    def __post_init__(self) -> None:
        for name in ("max_translations", "max_target_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}, expected 1 or more")
        for name in ("min_count", "min_target_count"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}, expected 0 or more")

    @property
    def needs_counts(self) -> bool:
        """Whether corpus word counts are needed."""
        return bool(self.min_count or self.min_target_count or self.order == "frequency")


@dataclass
class _Keys:
    """Keys of one or all case variants (K keys, C candidates); sequences are lexicon rows."""

    group: NDArray[np.int64]
    sequence: NDArray[np.int32]
    form: NDArray[np.uint8]
    candidate_key: NDArray[np.int64]
    candidate_sequence: NDArray[np.int32]
    candidate_language: NDArray[np.int16]
    candidate_weight: NDArray[np.float32]


def read_groups(
    inputs: Sequence[DictionaryInput],
    report: BuildReport,
    on_error: OnError = "stop",
    *,
    cleaning: Cleaning | None = None,
    source_language: str | None = None,
    pivot: str | None = None,
) -> tuple[Groups, list[dict[str, Any]]]:
    """Reads the groups of all files, and one record per file for the table's `sources`.

    Args:
        inputs: the files.
        report: updated with the statistics.
        on_error: what to do at a bad line.
        cleaning: rules for words and pairs.
        source_language: lists that have this language in another column are reversed.
        pivot: pivot language, whose words may be phrases.

    Raises:
        UserError: see `read_entries`; a list whose columns are swapped.
    """
    cleaning = cleaning or Cleaning()
    builder = GroupBuilder(report.rules, cleaning, frozenset({pivot} if pivot else ()))
    sources = []
    with gc_disabled():
        for source in inputs:
            pairs = 0
            info = FileInfo()
            builder.fit = ScriptFit()
            for block in read_entries(source, report.errors, on_error, info):
                languages = block.languages or source.languages
                columns = block.columns
                if source_language in languages[1:]:
                    columns, languages = _move_to_front(columns, languages, languages.index(source_language))
                pairs += builder.add_columns(columns, languages, block.weights)
            if cleaning.scripts:
                _check_scripts(source, builder.fit, report)
            report.rules.update(info.skipped)
            sources.append(
                {
                    "path": str(source.path),
                    "format": info.format,
                    "languages": "-".join(source.languages),
                    "pairs": pairs,
                    "title": info.title,
                    "licence": info.licence,
                }
            )
        return builder.build(), sources


def _move_to_front(
    columns: list[list[str]], languages: tuple[str, ...], first: int
) -> tuple[list[list[str]], tuple[str, ...]]:
    """Moves column and language `first` to the front."""
    order = [first, *(index for index in range(len(languages)) if index != first)]
    return [columns[index] for index in order], tuple(languages[index] for index in order)


def _check_scripts(source: DictionaryInput, fit: ScriptFit, report: BuildReport) -> None:
    declared = "-".join(source.languages)
    if fit.swapped * 2 > fit.pairs and fit.swapped > 9 * fit.as_declared:
        other = "-".join((*source.languages[1:], source.languages[0]))
        raise UserError(
            f"{source.path}: languages {declared} are swapped, {fit.swapped:,} of {fit.pairs:,} pairs match the "
            f"scripts of {other}; declare the columns as {other}, and use --source {source.languages[0]} to replace "
            f"words of {source.languages[0]}"
        )
    if fit.as_declared * 2 < fit.pairs:
        report.warnings.append(
            f"{source.path}: only {fit.as_declared:,} of {fit.pairs:,} pairs match the scripts of {declared}; check "
            "the languages"
        )


def build_table(
    groups: Groups,
    tokenizer: Tokenizer,
    settings: BuildSettings,
    report: BuildReport,
    *,
    sources: Sequence[dict[str, Any]] = (),
    counts: WordCounts | None = None,
    show_progress: bool = False,
) -> DictionaryTable:
    """Builds the table of `groups` in the ids of `tokenizer`; `group_count` is 0 until `coverage.count_groups`.

    Args:
        groups: the pairs.
        tokenizer: the tokenizer of the corpora.
        settings: the rules.
        report: updated with the statistics.
        sources: records of the files, stored in the table.
        counts: word counts in corpora, required if `settings.needs_counts`.
        show_progress: show a progress bar of the encoded words.

    Raises:
        UserError: no pair remains, or a language has no corpus to count its words in.
    """
    if settings.needs_counts:
        groups = drop_rare(
            groups,
            counts or {},
            report.rules,
            min_count=settings.min_count,
            min_target_count=settings.min_target_count,
        )
    if settings.order != "file":
        groups = order_pairs(groups, settings.order, counts or {})
    word_boundary = letter_boundaries(tokenizer)
    lexicon = SequenceLexicon(tokenizer, groups.languages, word_boundary)
    with gc_disabled(), Progress("tokenise", None, unit="words", enabled=show_progress) as progress:
        # The spelling inside a sentence decides which pairs are kept and is what alignment sees.
        plain = lexicon.encode(groups.texts, groups.text_language, True, progress)
        groups = _keep_pairs(groups, plain, lexicon, settings, report.rules)
        if not len(groups.source):
            raise _no_pairs_error(report)
        # Dropped words need no other spellings.
        groups, used = without_unused_texts(groups)
        plain = plain[used]
        keys = _concatenate(_encode_variants(groups, plain, lexicon, progress))
    report.encoder = " and ".join(lexicon.encoders)
    keys = _usable_keys(keys, lexicon, settings, report.rules)
    keys = _unique_keys(keys, groups, lexicon, report.rules)
    report.rules[build_report.KEYLESS] += int((np.bincount(keys.group, minlength=len(groups.source)) == 0).sum())
    table = _assemble(groups, plain, keys, lexicon, tokenizer, word_boundary)
    build = {"settings": asdict(settings), "rules": dict(report.rules), "lines_skipped": report.errors.count}
    return replace(table, sources=tuple(sources), build=build)


def _no_pairs_error(report: BuildReport) -> UserError:
    reasons = [f"{count} {name}" for name, count in report.rules.items() if count]
    if report.errors.count:
        reasons.append(f"{plural(report.errors.count, 'line')} skipped, the first one {report.errors.first[0]}")
    return UserError(
        f"cannot build the dictionary: no pairs remain ({'; '.join(reasons) or 'none were read'}); check the format, "
        "the languages and the tokenizer"
    )


def _keep_pairs(
    groups: Groups,
    plain: NDArray[np.int32],
    lexicon: SequenceLexicon,
    settings: BuildSettings,
    rules: Counter[str],
) -> Groups:
    """Drops pairs based on their tokens, then empty groups; `texts` is unchanged."""
    info = lexicon.row_info()
    source, target = plain[groups.source[groups.pair_group]], plain[groups.pair_target]
    keep = np.ones(len(source), dtype=bool)
    for name, bad in (
        (build_report.UNKNOWN, ~(info.usable[source] & info.usable[target])),
        (build_report.LONG_SOURCE, info.lengths[source] > MAX_KEY_TOKENS),
        (build_report.LONG_TARGET, info.lengths[target] > settings.max_target_tokens),
        (build_report.IDENTICAL, lexicon.same(source, target) & settings.drop_identical),
    ):
        rules[name] += int((keep & bad).sum())
        keep &= ~bad
    kept = np.flatnonzero(keep)
    # Pairs of one group and language are contiguous: the index within the run is the rank of the translation.
    language = groups.text_language[groups.pair_target[kept]]
    new_run = np.ones(len(kept), dtype=bool)
    new_run[1:] = (np.diff(groups.pair_group[kept]) != 0) | (np.diff(language) != 0)
    run_start = np.maximum.accumulate(np.where(new_run, np.arange(len(kept)), 0))
    first = np.arange(len(kept)) - run_start < settings.max_translations
    rules[build_report.SURPLUS] += int((~first).sum())
    rules[build_report.KEPT] += int(first.sum())
    keep[kept[~first]] = False
    return keep_pairs(groups, keep)


def _encode_variants(
    groups: Groups, plain: NDArray[np.int32], lexicon: SequenceLexicon, progress: Progress
) -> Iterator[_Keys]:
    """Encodes the words of all groups in each case, with and without a leading space.

    `plain` has the lexicon row of each unchanged text after a space `[T]`.
    """
    texts = groups.texts
    sizes = np.bincount(groups.text_language, minlength=len(groups.languages))
    ends = np.cumsum(sizes).tolist()
    # Texts of one language are contiguous.
    spellings = [
        spell(texts[end - size : end], language)
        for language, size, end in zip(groups.languages, sizes.tolist(), ends, strict=True)
    ]
    as_is = {True: plain, False: lexicon.encode(texts, groups.text_language, False, progress)}
    for case in CASES:
        changed = np.concatenate([each.changed[case] for each in spellings])
        is_variant = np.concatenate([each.is_variant[case] for each in spellings])[groups.source]
        words = list(chain.from_iterable(each.words[case] for each in spellings))
        group = np.flatnonzero(is_variant)
        pairs = np.flatnonzero(is_variant[groups.pair_group])
        # Words that the case does not change are already encoded: most German nouns, every Chinese word.
        changed &= _mask(len(texts), groups.source[group], groups.pair_target[pairs])
        for word_initial in (True, False):
            rows = as_is[word_initial].copy()
            _encode_into(rows, changed, words, groups, word_initial, lexicon, progress)
            form = CASES.index(case) | (FORM_WORD_INITIAL if word_initial else 0)
            yield _Keys(
                group=group,
                sequence=rows[groups.source[group]],
                form=np.full(len(group), form, dtype=np.uint8),
                # Groups without this case have no pairs here: the running count of groups with it is the key index.
                candidate_key=(np.cumsum(is_variant) - 1)[groups.pair_group[pairs]],
                candidate_sequence=rows[groups.pair_target[pairs]],
                candidate_language=groups.text_language[groups.pair_target[pairs]],
                candidate_weight=groups.pair_weight[pairs],
            )


def _mask(count: int, *chosen: NDArray[Any]) -> NDArray[np.bool_]:
    mask = np.zeros(count, dtype=bool)
    for each in chosen:
        mask[each] = True
    return mask


def _encode_into(
    rows: NDArray[np.int32],
    chosen: NDArray[np.bool_],
    words: Sequence[str],
    groups: Groups,
    word_initial: bool,
    lexicon: SequenceLexicon,
    progress: Progress,
) -> None:
    """Sets the rows of the `chosen` texts (bool `[T]`) to the encodings of `words` `[T]`."""
    languages = groups.text_language[chosen]
    rows[chosen] = lexicon.encode(list(compress(words, chosen.tolist())), languages, word_initial, progress)


def _usable_keys(keys: _Keys, lexicon: SequenceLexicon, settings: BuildSettings, rules: Counter[str]) -> _Keys:
    """Selects the keys that occur as one word in a text and have a candidate."""
    info = lexicon.row_info()
    single = (info.usable & (info.lengths <= MAX_KEY_TOKENS) & info.single)[keys.sequence]
    # If the tokenizer keeps the space as a separate token, the word starts after it: the key without the space matches
    # and the space stays in the text, so the spelling with a space needs no key.
    marked = ~single & info.after_space[keys.sequence]
    good = (info.usable & (info.lengths <= settings.max_target_tokens))[keys.candidate_sequence]
    if settings.drop_identical:
        good &= ~lexicon.same(keys.candidate_sequence, keys.sequence[keys.candidate_key])
    filled = np.zeros(len(keys.group), dtype=bool)
    filled[keys.candidate_key[good]] = True
    rules[build_report.MARKED_KEY] += int(marked.sum())
    rules[build_report.SPLIT_KEY] += int((~single & ~marked).sum())
    rules[build_report.EMPTY_KEY] += int((single & ~filled).sum())
    return _take_keys(_take_candidates(keys, np.flatnonzero(good)), np.flatnonzero(filled & single))


def _take_candidates(keys: _Keys, chosen: NDArray[np.int64]) -> _Keys:
    """Returns the keys with the `chosen` candidates, in that order."""
    return replace(
        keys,
        candidate_key=keys.candidate_key[chosen],
        candidate_sequence=keys.candidate_sequence[chosen],
        candidate_language=keys.candidate_language[chosen],
        candidate_weight=keys.candidate_weight[chosen],
    )


def _take_keys(keys: _Keys, chosen: NDArray[np.int64]) -> _Keys:
    """Returns the `chosen` keys in that order, with their candidates."""
    new_index = np.full(len(keys.group), -1, dtype=np.int64)
    new_index[chosen] = np.arange(len(chosen))
    candidate_key = new_index[keys.candidate_key]
    kept = candidate_key >= 0
    return _Keys(
        keys.group[chosen],
        keys.sequence[chosen],
        keys.form[chosen],
        candidate_key[kept],
        keys.candidate_sequence[kept],
        keys.candidate_language[kept],
        keys.candidate_weight[kept],
    )


def _concatenate(variants: Iterable[_Keys]) -> _Keys:
    """Concatenates all variants."""
    parts, count = [], 0
    for part in variants:
        parts.append(replace(part, candidate_key=part.candidate_key + count))
        count += len(part.group)
    columns = ([getattr(part, column.name) for part in parts] for column in fields(_Keys))
    return _Keys(*map(np.concatenate, columns))


def _unique_keys(keys: _Keys, groups: Groups, lexicon: SequenceLexicon, rules: Counter[str]) -> _Keys:
    """Keeps the first key per language and token sequence, sorts keys by group and removes duplicate candidates."""
    language = groups.text_language[groups.source[keys.group]].astype(np.int64)
    first = lexicon.first_of_equal(keys.sequence, language)
    rules[build_report.TAKEN_KEY] += len(keys.group) - len(first)
    keys = _take_keys(keys, first[np.argsort(keys.group[first], kind="stable")])
    # A stable sort by key and language preserves the order of translations in the file.
    languages = len(groups.languages)
    keys = _take_candidates(keys, np.argsort(keys.candidate_key * languages + keys.candidate_language, kind="stable"))
    return _merge_candidates(keys, lexicon)


def _merge_candidates(keys: _Keys, lexicon: SequenceLexicon) -> _Keys:
    """Drops duplicate candidates of a key and language, which are contiguous, and keeps the largest weight."""
    count = len(keys.candidate_key)
    kept = np.arange(count)
    weight = keys.candidate_weight.copy()
    run = np.flatnonzero(np.diff(keys.candidate_key, prepend=-1) | np.diff(keys.candidate_language, prepend=-1))
    longest = int(np.diff(run, append=count).max(initial=1))
    rank = np.arange(count) - np.repeat(run, np.diff(run, append=count))
    later = np.arange(count)
    for distance in range(1, longest):
        later = later[rank[later] >= distance]
        equal = later[lexicon.same(keys.candidate_sequence[later], keys.candidate_sequence[later - distance])]
        kept[equal] = np.minimum(kept[equal], kept[equal - distance])
    merged = np.flatnonzero(kept != np.arange(count))
    np.maximum.at(weight, kept[merged], keys.candidate_weight[merged])
    chosen = np.flatnonzero(kept == np.arange(count))
    return _take_candidates(replace(keys, candidate_weight=weight), chosen)


def _assemble(
    groups: Groups,
    plain: NDArray[np.int32],
    keys: _Keys,
    lexicon: SequenceLexicon,
    tokenizer: Tokenizer,
    word_boundary: NDArray[np.uint8],
) -> DictionaryTable:
    count = len(groups.source)
    key_tokens, key_offsets = lexicon.rows(keys.sequence)
    candidate_tokens, candidate_offsets = lexicon.rows(keys.candidate_sequence)
    sizes = np.bincount(groups.pair_group, minlength=count) + 1
    group_offsets = offsets_of(sizes)
    words = np.empty(group_offsets[-1], dtype=np.int64)
    is_source = np.zeros(len(words), dtype=bool)
    is_source[group_offsets[:-1]] = True
    words[is_source], words[~is_source] = groups.source, groups.pair_target
    word_tokens, word_offsets = lexicon.rows(plain[words])
    text = "".join(groups.texts).encode()
    text_offsets = offsets_of(np.fromiter(map(len, map(str.encode, groups.texts)), np.int64, len(groups.texts)))
    text_index, word_text_offsets = row_indices(text_offsets, words)
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
        key_candidate_offsets=offsets_of(np.bincount(keys.candidate_key, minlength=len(keys.group))),
        candidate_tokens=candidate_tokens,
        candidate_offsets=candidate_offsets,
        candidate_language=keys.candidate_language,
        candidate_weight=keys.candidate_weight,
        word_tokens=word_tokens,
        word_offsets=word_offsets,
        word_language=groups.text_language[words],
        word_text=np.frombuffer(text, dtype=np.uint8)[text_index],
        word_text_offsets=word_text_offsets,
        group_offsets=group_offsets,
        group_count=np.zeros(count, dtype=np.int64),
        word_weight=_word_weights(groups, is_source),
    )


def _word_weights(groups: Groups, is_source: NDArray[np.bool_]) -> NDArray[np.float32] | None:
    """Weight of each word as a translation `[W]`; None if all are 1."""
    if (groups.pair_weight == 1).all():
        return None
    weights = np.ones(len(is_source), dtype=np.float32)
    weights[~is_source] = groups.pair_weight
    return weights
