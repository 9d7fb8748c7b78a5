"""Measures the fertility of a tokenizer (tokens per word, bytes per token) per language."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy

from megatron_prealign.preprocess.sampling import HELD_OUT_BYTES, SampledDocument
from megatron_prealign.tokenizer.base import Tokenizer
from megatron_prealign.tokenizer.segmenters import AUTO, Segmenter, checked_word_starts, resolve_segmenter

BY_SPACES = "white space"
_TEXTS_A_CALL = 64


@dataclass(frozen=True)
class Fertility:
    """Fertility on some documents of a language."""

    held_out: bool
    """Whether these documents were excluded from training."""
    documents: int
    bytes: int
    """UTF-8 bytes of the texts."""
    words: int | None
    """Number of words; None for a script without spaces and no segmenter."""
    words_by: str | None
    """How words were counted: `BY_SPACES` or the name of a segmenter."""
    tokens: int
    fallback_tokens: int
    """Tokens that are unknown or contain only part of a character."""

    @property
    def tokens_per_word(self) -> float | None:
        return None if self.words is None else self.tokens / max(self.words, 1)

    @property
    def bytes_per_token(self) -> float:
        return self.bytes / max(self.tokens, 1)

    @property
    def fallback_share(self) -> float:
        return self.fallback_tokens / max(self.tokens, 1)


@dataclass
class MeasuredText:
    """Documents of a language to measure fertility on, at most about `HELD_OUT_BYTES`."""

    held_out: bool
    texts: list[str] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    bytes: int = 0

    def add(self, document: SampledDocument) -> None:
        """Adds a document, truncated to the remaining space."""
        # One document may be as large as all others together.
        text = document.text[: max(0, 2 * HELD_OUT_BYTES - self.bytes)]
        if text:
            self.texts.append(text)
            self.places.append(document.where)
            self.bytes += len(text.encode("utf-8"))


def measure_fertility(
    tokenizer: Tokenizer, language: str, measured: MeasuredText, segmenter: Segmenter | None, segmenter_name: str | None
) -> Fertility:
    """Encodes the texts and counts words, bytes and tokens.

    Args:
        tokenizer: the tokenizer.
        language: language code, for clone tokenizers.
        measured: the texts.
        segmenter: finds the words; with None words are split at white space, or not counted in a script without spaces.
        segmenter_name: name of the segmenter.
    """
    words_by = segmenter_name or (BY_SPACES if resolve_segmenter(AUTO, language) is None else None)
    fallback = fallback_ids(tokenizer)
    tokens = fallback_tokens = words = 0
    for begin in range(0, len(measured.texts), _TEXTS_A_CALL):
        texts = measured.texts[begin : begin + _TEXTS_A_CALL]
        places = measured.places[begin : begin + _TEXTS_A_CALL]
        for row in tokenizer.encode_batch(texts, language):
            tokens += len(row)
            fallback_tokens += int(fallback[numpy.array(row, dtype=numpy.int64)].sum())
        for text, where in zip(texts, places, strict=True):
            words += _count_words(text, where, segmenter, segmenter_name)
    return Fertility(
        held_out=measured.held_out,
        documents=len(measured.texts),
        bytes=measured.bytes,
        words=None if words_by is None else words,
        words_by=words_by,
        tokens=tokens,
        fallback_tokens=fallback_tokens,
    )


def fallback_ids(tokenizer: Tokenizer) -> numpy.ndarray:
    """bool [vocab_size]: whether a token is unknown (any special token except end-of-document) or does not decode to
    complete characters."""
    special = tokenizer.special_ids - {tokenizer.eod_id}
    return numpy.array(
        [index in special or "\ufffd" in tokenizer.decode([index]) for index in range(tokenizer.vocab_size)]
    )


def _count_words(text: str, where: str, segmenter: Segmenter | None, name: str | None) -> int:
    if segmenter is None or name is None:
        return len(text.split())
    starts: Sequence[int] = [0, *checked_word_starts(segmenter, name, text, where).tolist(), len(text)]
    # Segmenters also return spaces and punctuation as words; do not count those.
    return sum(
        any(character.isalnum() for character in text[begin:end])
        for begin, end in zip(starts[:-1], starts[1:], strict=True)
    )
