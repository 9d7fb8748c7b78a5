"""Selects the dictionary words for word retrieval. Does not import torch."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_prealign.dictionary.table import DictionaryTable
from megatron_prealign.errors import UserError
from megatron_prealign.evaluation.word_classes import WordClasses
from megatron_prealign.recipe import AlignmentWatchSection, Recipe

# Longer words say little about the word space of a layer and would widen every batch of words.
MAX_WORD_TOKENS = 8
SENTENCE_RETRIEVAL = "sentence_retrieval_p_at_1"


@dataclass(frozen=True, eq=False)
class WordPairs:
    """Words of two languages and the translation pairs among them; or sentences, which are measured like long words.

    Words with the same tokens are one word, because their states are identical.

    Attributes:
        languages: Codes of the source and the target language.
        source, target: Token ids of each word; every word has a translation in the other list.
        links: int64 `[pairs, 2]`, indices of a source word and of a target word that are translations; sorted, without
            duplicates.
    """

    languages: tuple[str, str]
    source: list[NDArray[np.int32]]
    target: list[NDArray[np.int32]]
    links: NDArray[np.int64]

    @classmethod
    def from_pairs(
        cls, languages: tuple[str, str], pairs: Iterable[tuple[tuple[int, ...], tuple[int, ...]]]
    ) -> "WordPairs":
        """Builds the object from pairs of words, each word as its token ids."""
        source: dict[tuple[int, ...], int] = {}
        target: dict[tuple[int, ...], int] = {}
        links = {(source.setdefault(one, len(source)), target.setdefault(other, len(target))) for one, other in pairs}
        return cls(
            languages=languages,
            source=[np.array(word, dtype=np.int32) for word in source],
            target=[np.array(word, dtype=np.int32) for word in target],
            links=np.array(sorted(links), dtype=np.int64),
        )

    @property
    def name(self) -> str:
        """Name of the direction from source to target, such as `en-de`."""
        return "-".join(self.languages)

    @property
    def directions(self) -> tuple[str, str]:
        """Names of both directions, such as `en-de` and `de-en`."""
        return self.name, "-".join(reversed(self.languages))


def evaluated_pairs(
    recipe: Recipe, words: tuple[DictionaryTable, NDArray[np.bool_]] | None, sentences: Sequence[WordPairs] = ()
) -> dict[str, list[WordPairs]]:
    """Metric of retrieval -> word or sentence pairs that an evaluation measures it on.

    Args:
        words: The word table and the groups held out from training, bool `[groups]`, which are measured separately;
            None without a dictionary.
        sentences: Sentence pairs of data.parallel_text (`parallel_text.measured_pairs`).
    """
    pairs: dict[str, list[WordPairs]] = {"word_retrieval_p_at_1": [], "word_retrieval_p_at_1_held_out": []}
    if words is not None:
        table, held_out = words
        limit, max_tokens = recipe.training.retrieval_words, min(MAX_WORD_TOKENS, recipe.max_word_tokens)
        for name, groups in zip(pairs, (~held_out, held_out), strict=True):
            pairs[name] = word_pairs(table, groups, limit=limit, max_word_tokens=max_tokens)
    pairs[SENTENCE_RETRIEVAL] = list(sentences)
    return pairs


def metric_names(languages: Sequence[str], pairs: Mapping[str, list[WordPairs]], classes: WordClasses) -> list[str]:
    """Names of the metrics of an evaluation, such as `validation_loss/en`.

    Args:
        languages: Languages with held-out text.
        pairs: Result of `evaluated_pairs`.
        classes: Classes of the tokens of the held-out text.
    """
    losses = [
        *(f"validation_loss/{each}" for each in languages),
        *(f"validation_loss_words/{each}" for each in classes.names),
    ]
    by_pair = [f"{metric}/{pair.name}" for metric, of_metric in pairs.items() for pair in of_metric]
    return [*losses, *by_pair]


def check_keep_best(recipe: Recipe, names: Sequence[str]) -> None:
    """Checks that the metric named in checkpoint.keep_best is one of the evaluated ones, `names`.

    Raises:
        UserError: It is not.
    """
    name = recipe.checkpoint.keep_best
    if name is not None and name not in names:
        valid = ", ".join(names) or "null: the run has neither held-out text, nor a dictionary, nor parallel text"
        raise UserError(f"checkpoint.keep_best is {name}, expected one of {valid}")


def word_pairs(
    table: DictionaryTable, groups: NDArray[np.bool_], *, limit: int, max_word_tokens: float = MAX_WORD_TOKENS
) -> list[WordPairs]:
    """Selects pairs of a group's source word and its first translation in each language.

    There is one list per pair of languages, regardless of the direction of its groups; the first group determines the
    source language of the list.

    Args:
        groups: bool `[groups]`, the groups to select from.
        limit: Maximum number of pairs per language pair; the most frequent in the counting corpus come first, then the
            order of the table.
        max_word_tokens: Maximum number of tokens per word; longer words are skipped.
    """
    order = np.argsort(-table.group_count, kind="stable")
    # Languages -> distinct pairs of words, in order (the dict serves as an ordered set).
    selected: dict[tuple[int, int], dict[tuple[tuple[int, ...], tuple[int, ...]], None]] = {}
    for group in order[groups[order]]:
        members = range(table.group_offsets[group], table.group_offsets[group + 1])
        words = [
            (int(table.word_language[w]), table.word_tokens[table.word_offsets[w] : table.word_offsets[w + 1]])
            for w in members
        ]
        words = [(language, tokens) for language, tokens in words if 0 < len(tokens) <= max_word_tokens]
        if not words or words[0][0] != table.word_language[members[0]]:
            continue
        source_language, source = words[0]
        seen: set[int] = {source_language}
        for language, tokens in words[1:]:
            if language in seen:
                continue
            seen.add(language)
            languages, pair = (source_language, language), (tuple(source.tolist()), tuple(tokens.tolist()))
            if languages[::-1] in selected:
                languages, pair = languages[::-1], pair[::-1]
            pairs = selected.setdefault(languages, {})
            if len(pairs) < limit:
                pairs[pair] = None
    return [
        WordPairs.from_pairs((table.languages[first], table.languages[second]), pairs)
        for (first, second), pairs in sorted(selected.items())
    ]


def watched_pairs(
    table: DictionaryTable, held_out: NDArray[np.bool_], section: AlignmentWatchSection, *, max_word_tokens: float
) -> list[WordPairs]:
    """Selects the pairs that the alignment watch measures.

    Args:
        held_out: bool `[groups]`, the groups held out from training.
        max_word_tokens: Maximum number of tokens per word that the model supports (`Recipe.max_word_tokens`).

    Raises:
        UserError: the table has no such pair.
    """
    groups = held_out if section.groups == "held_out" else ~held_out
    limit = min(MAX_WORD_TOKENS, max_word_tokens)
    pairs = word_pairs(table, groups, limit=section.words, max_word_tokens=limit)
    if not pairs:
        if section.groups == "held_out":
            advice = "raise dictionary.held_out_fraction or set alignment_watch.groups to trained"
        else:
            advice = "lower dictionary.held_out_fraction or add words to the table"
        raise UserError(
            f"alignment_watch.groups is {section.groups}: none of these {int(groups.sum())} groups of "
            f"{table.path or 'the dictionary table'} has a pair of words of at most {limit} tokens; {advice}"
        )
    return pairs
