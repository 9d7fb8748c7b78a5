"""One interface over tokenizers of all kinds."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy

from megatron_prealign.errors import UserError
from megatron_prealign.tokenizer.gigatoken_engine import RowEngine

# Tried in this order where the files name no end-of-sequence token.
EOD_NAMES = ("<eod>", "<|endoftext|>", "</s>")
# Large enough for the tokenizers library to use all cores, small enough that its objects do not pile up.
_WORDS_A_CALL = 32768


class Tokenizer(ABC):
    """Text to ids and back. Ids run from 0 to `vocab_size - 1`.

    Encoding never adds a BOS or EOS token, and the name of a special token inside a text (`<eod>`, `</s>`) is plain
    text: a document cannot forge the end of a document.
    """

    path: Path
    """Where it was loaded from."""
    vocab_size: int
    """True number of ids, without padding."""
    eod_id: int
    """The end-of-document id."""
    special_ids: frozenset[int]
    """Control tokens: never replaced, never cloned, never part of a word."""
    fingerprint: str
    """`sha256:<hex>` of everything that decides ids; independent of file names and dates."""
    library: str
    """What encodes, for reports."""
    word_encoder: str = "word by word"
    """What `encode_word_rows` encoded with the last time, for reports."""

    @abstractmethod
    def encode(self, text: str, language: str | None = None) -> list[int]:
        """The ids of `text`, without BOS and EOS. `language` matters to clone tokenizers only."""

    def encode_batch(self, texts: Sequence[str], language: str | None = None) -> list[list[int]]:
        """The ids of every text; equal to `encode` one by one, but faster."""
        return [self.encode(text, language) for text in texts]

    def encode_rows(self, texts: Sequence[str], language: str | None = None) -> tuple[numpy.ndarray, numpy.ndarray]:
        """`encode_batch` as arrays.

        Returns:
            ids int64 `[tokens]` and offsets int64 `[len(texts)+1]`: text i is `ids[offsets[i]:offsets[i+1]]`.
        """
        rows = self.encode_batch(texts, language)
        offsets = numpy.zeros(len(rows) + 1, dtype=numpy.int64)
        numpy.cumsum([len(row) for row in rows], out=offsets[1:])
        return numpy.fromiter(chain.from_iterable(rows), numpy.int64, int(offsets[-1])), offsets

    def fast_engine(self, language: str | None = None) -> RowEngine | None:
        """Something that is much faster than `encode_rows` and gives, as far as anyone knows, the same ids; None where
        there is none. Its answers are to be compared with those of `encode_rows`."""
        return None

    @abstractmethod
    def encode_with_offsets(self, text: str, language: str | None = None) -> tuple[list[int], numpy.ndarray]:
        """The ids of `encode`, and which characters of `text` each token has something of.

        Returns:
            The ids, and int64 [tokens, 2]: the offset of the token's first character and one past that of its last.
            Tokens that hold parts of one character all name it. A token without a character has an empty range.
        """

    @abstractmethod
    def encode_words(
        self, words: Sequence[str], language: str | None = None, word_initial: bool = True
    ) -> list[list[int]]:
        """The ids of every word as it stands inside a sentence.

        Args:
            words: bare words, without spaces around them.
            language: matters to clone tokenizers only.
            word_initial: True for a word after a space (with the tokenizer's space marker), False for one that directly
                follows another character, like `apple` in `(apple`.
        """

    def encode_word_rows(
        self, words: Sequence[str], language: str | None = None, word_initial: bool = True
    ) -> tuple[numpy.ndarray, numpy.ndarray]:
        """`encode_words` for very many words, as arrays.

        Returns:
            ids int32 `[tokens]` and offsets int64 `[len(words)+1]`: word i is `ids[offsets[i]:offsets[i+1]]`.
        """
        parts, lengths = [numpy.zeros(0, dtype=numpy.int32)], [0]
        for begin in range(0, len(words), _WORDS_A_CALL):
            rows = self.encode_words(words[begin : begin + _WORDS_A_CALL], language, word_initial)
            lengths += map(len, rows)
            parts.append(numpy.fromiter(chain.from_iterable(rows), numpy.int32))
        return numpy.concatenate(parts), numpy.cumsum(lengths, dtype=numpy.int64)

    def encode_word(self, word: str, language: str | None = None, word_initial: bool = True) -> list[int]:
        """`encode_words` for one word."""
        return self.encode_words([word], language, word_initial)[0]

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens by their names."""

    @abstractmethod
    def word_boundaries(self) -> numpy.ndarray:
        """uint8 [vocab_size]: bit 0, a word boundary lies before the token; bit 1, one lies after it.

        Bit 0: the token carries the space marker, or its text starts with a non-letter. Bit 1: its text ends with a
        non-letter. Letters are Unicode's L* and M*; bytes of an incomplete character count as letters; special and
        unused ids have both bits.
        """


def check_word_forms(tokenizer: Tokenizer) -> None:
    """Refuses tokenizers that lose the spaces: dictionary words could not be found or replaced.

    Raises:
        UserError: a word after a space and the same word inside another get the same ids, or no marker in front.
    """
    # One letter that every vocabulary has: unknown tokens would look alike for another reason.
    initial, inner = tokenizer.encode_word("a"), tokenizer.encode_word("a", word_initial=False)
    if not initial or initial == inner or not tokenizer.word_boundaries()[initial[0]] & 1:
        raise no_word_marker(tokenizer.path)


def no_word_marker(path: Path) -> UserError:
    """The error about a tokenizer with which words of a dictionary cannot be found."""
    return UserError(
        f"{path}: this tokenizer does not mark the start of a word in front of it (WordPiece, or spaces are thrown "
        "away or put behind words); expected byte-level BPE or sentencepiece"
    )
