"""Classes of the tokens of held-out text: trained words of the dictionary, held-out words, other tokens. Imports no
torch.

The classes depend on the text, the table that evaluations measure and the groups held out, and on no setting of the
alignment, so that runs with and without alignment, and controls, are measured on the same tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from megatron_prealign.data.indexed import idx_path, load_index
from megatron_prealign.data.sidecar import load_sidecar
from megatron_prealign.data.sources import held_out_documents
from megatron_prealign.dictionary.coverage import read_documents, split_words
from megatron_prealign.dictionary.ragged import row_numbers
from megatron_prealign.dictionary.running_words import comparable, distinct_words, token_positions, word_texts
from megatron_prealign.dictionary.table import DictionaryTable
from megatron_prealign.recipe import DataSection, DataSource, Recipe, ValidationSource
from megatron_prealign.tokenizer.base import Tokenizer

CLASSES = ("trained", "held_out", "other")
"""Names in metrics; the index is the class id."""
CLASS_TEXTS = {"trained": "trained words", "held_out": "held-out words", "other": "other tokens"}
_TRAINED, _HELD_OUT, _OTHER = range(3)
NO_LABEL = -1
"""Class id of positions after the end of the text."""
# Completes the word that the last label is in. A word of more tokens is in no dictionary.
_LOOKAHEAD = 64


def share_text(shares: Mapping[str, float]) -> str:
    """Shares of the classes as percentages, in their order, such as `72.8% / 1.1% / 26.1%`; a dash without any."""
    return " / ".join(f"{shares.get(name, 0.0):.1%}" for name in CLASSES) if shares else "-"


@dataclass(frozen=True, eq=False)
class WordClasses:
    """Class of every label of the validation samples of each language that has words in the table."""

    seq_length: int = 0
    labels: Mapping[str, NDArray[np.int8]] = field(default_factory=dict)
    """Language -> class ids `[labels]`, label i of sample s at `s * seq_length + i`."""

    @property
    def names(self) -> list[str]:
        """Language and class, such as `en/trained`, of the classes that have tokens."""
        return [f"{language}/{name}" for language in self.labels for name in self.tokens(language)]

    def tokens(self, language: str) -> dict[str, int]:
        """Class -> number of labels; classes without any are absent."""
        counts = np.bincount(self.labels[language], minlength=len(CLASSES))
        return {name: int(count) for name, count in zip(CLASSES, counts, strict=True) if count}

    def shares(self, language: str) -> dict[str, float]:
        """Class -> fraction of the labels, 0 to 1; classes without any are absent."""
        return {name: count / len(self.labels[language]) for name, count in self.tokens(language).items()}

    def samples(self, language: str, indices: Sequence[int]) -> NDArray[np.int8]:
        """Class ids of the labels of samples `[samples, seq_length]`, `NO_LABEL` after the end of the text."""
        labels = self.labels[language]
        result = np.full((len(indices), self.seq_length), NO_LABEL, dtype=np.int8)
        for row, index in zip(result, indices, strict=True):
            part = labels[index * self.seq_length : (index + 1) * self.seq_length]
            row[: len(part)] = part
        return result


def word_classes(
    recipe: Recipe, words: tuple[DictionaryTable, NDArray[np.bool_]] | None, tokenizer: Tokenizer
) -> WordClasses:
    """Finds the class of every label that an evaluation scores.

    A running word, in any case and of any number of tokens, is a word of the dictionary as in `word_coverage`; all its
    tokens have its class. It is a held-out word if all groups with it are held out.

    Args:
        words: The word table and the groups held out from training, bool `[groups]`; None without a dictionary.

    Raises:
        UserError: A dataset is missing or corrupt.
    """
    if words is None:
        return WordClasses()
    known = _class_of_words(*words)
    length, limit = recipe.data.seq_length, recipe.training.eval_samples * recipe.data.seq_length + 1
    labels = {}
    for language in recipe.data.languages:
        if language not in known:
            continue
        # The first token of the text is no label.
        classes = _classes(recipe.data, language, known[language], words[0], tokenizer, limit)[1:]
        if len(classes):
            labels[language] = classes
    return WordClasses(length, labels)


def _class_of_words(table: DictionaryTable, held_out: NDArray[np.bool_]) -> dict[str, dict[str, int]]:
    """Language -> word -> class id."""
    known: dict[str, dict[str, int]] = {}
    held_out_word = held_out[row_numbers(table.group_offsets)]
    for word, is_held_out in enumerate(held_out_word.tolist()):
        text = comparable(table.text(word))
        if not text:
            continue
        of_language = known.setdefault(table.languages[table.word_language[word]], {})
        if is_held_out:
            of_language.setdefault(text, _HELD_OUT)
        else:
            of_language[text] = _TRAINED
    return known


def _classes(
    data: DataSection,
    language: str,
    known: Mapping[str, int],
    table: DictionaryTable,
    tokenizer: Tokenizer,
    limit: int,
) -> NDArray[np.int8]:
    """Class ids of the first `limit` tokens of the held-out text of a language, in the order of `ValidationSamples`."""
    sources: Sequence[DataSource | ValidationSource] = data.validation or data.sources
    parts = [np.zeros(0, dtype=np.int8)]
    missing = limit
    for source in sources:
        if source.language != language or missing <= 0:
            continue
        index = load_index(idx_path(source.path), source.path)
        held_out = index.documents
        if not data.validation:
            held_out = held_out_documents(index.documents, data.validation_fraction)
        first = int(index.boundaries[index.documents - held_out])
        ends = np.cumsum(index.lengths[first:], dtype=np.int64)
        if not len(ends):
            continue
        last = first + int(np.searchsorted(ends, missing + _LOOKAHEAD)) + 1
        tokens, starts, marks = read_documents(
            source.path,
            index,
            np.arange(first, min(last, index.sequences)),
            missing + _LOOKAHEAD,
            load_sidecar(source.path).segmenter,
            tokenizer.vocab_size,
        )
        words = split_words(tokens, starts, table.word_boundary, marks)
        words = words.take(words.has_letter)
        distinct = distinct_words(tokens, words)
        texts = word_texts(tokenizer, tokens, words, distinct.first)
        class_of = np.array([known.get(comparable(text), _OTHER) for text in texts], dtype=np.int8)
        classes = np.full(len(tokens), _OTHER, dtype=np.int8)
        classes[token_positions(words)] = np.repeat(class_of[distinct.number], words.length)
        parts.append(classes[:missing])
        missing -= len(parts[-1])
    return np.concatenate(parts)
