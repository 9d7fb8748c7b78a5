"""Common interface of all tokenizers."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy

from megatron_prealign.errors import UserError
from megatron_prealign.tokenizer.gigatoken_engine import RowEngine

# Tried in this order if the files define no end-of-sequence token.
EOD_NAMES = ("<eod>", "<|endoftext|>", "</s>")
# Large enough for the tokenizers library to use all cores, small enough to limit the memory of its objects.
_WORDS_A_CALL = 32768


class Tokenizer(ABC):
    """Converts text to ids and back. Ids run from 0 to `vocab_size - 1`.

    Encoding never adds BOS or EOS tokens, and the name of a special token inside a text (`<eod>`, `</s>`) is encoded as
    plain text, so that a document cannot contain an end-of-document token.
    """

    path: Path
    """Path it was loaded from."""
    vocab_size: int
    """Number of ids, without padding."""
    eod_id: int
    """End-of-document id."""
    special_ids: frozenset[int]
    """Control tokens: never replaced, never cloned, never part of a word."""
    fingerprint: str
    """`sha256:<hex>` of everything that affects ids; independent of file names and dates."""
    library: str
    """Name of the encoding library, for reports."""
    word_encoder: str = "word by word"
    """Encoder used by the last `encode_word_rows` call, for reports."""

    @abstractmethod
    def encode(self, text: str, language: str | None = None) -> list[int]:
        """Encodes `text` without BOS and EOS. `language` is used by clone tokenizers only."""

    def encode_batch(self, texts: Sequence[str], language: str | None = None) -> list[list[int]]:
        """Encodes every text; same ids as `encode`, but faster."""
        return [self.encode(text, language) for text in texts]

    def encode_rows(self, texts: Sequence[str], language: str | None = None) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Like `encode_batch`, but returns arrays.

        Returns:
            ids int64 `[tokens]` and offsets int64 `[len(texts)+1]`: text i is `ids[offsets[i]:offsets[i+1]]`.
        """
        rows = self.encode_batch(texts, language)
        offsets = numpy.zeros(len(rows) + 1, dtype=numpy.int64)
        numpy.cumsum([len(row) for row in rows], out=offsets[1:])
        return numpy.fromiter(chain.from_iterable(rows), numpy.int64, int(offsets[-1])), offsets

    def fast_engine(self, language: str | None = None) -> RowEngine | None:
        """Returns a faster alternative to `encode_rows` that should produce the same ids, or None. Callers must compare
        a sample of its results with `encode_rows`."""
        return None

    @abstractmethod
    def encode_with_offsets(self, text: str, language: str | None = None) -> tuple[list[int], numpy.ndarray]:
        """Encodes `text` and returns the character range of each token.

        Returns:
            The ids, and int64 [tokens, 2]: start and end offset of each token in characters. Tokens that contain parts
            of one character all cover it. A token without characters has an empty range.
        """

    @abstractmethod
    def encode_words(
        self, words: Sequence[str], language: str | None = None, word_initial: bool = True
    ) -> list[list[int]]:
        """Encodes every word as it appears inside a sentence.

        Args:
            words: words without surrounding spaces.
            language: used by clone tokenizers only.
            word_initial: True for a word after a space (with the tokenizer's space marker), False for one that directly
                follows another character, such as `apple` in `(apple`.
        """

    def encode_word_rows(
        self, words: Sequence[str], language: str | None = None, word_initial: bool = True
    ) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Like `encode_words`, but returns arrays; efficient for millions of words.

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
        """Encodes one word; see `encode_words`."""
        return self.encode_words([word], language, word_initial)[0]

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Decodes `ids`; special tokens appear by name."""

    def decode_word(self, ids: Sequence[int]) -> str:
        """Decodes the ids of one word, to be compared with words of a list; clone tokenizers add no brackets."""
        return self.decode(ids)

    @abstractmethod
    def word_boundaries(self) -> numpy.ndarray:
        """uint8 [vocab_size]: bit 0, a word boundary before the token; bit 1, a word boundary after it.

        Bit 0: the token carries the space marker, or its text starts with a non-letter. Bit 1: its text ends with a
        non-letter. Letters are Unicode's L* and M*; bytes of an incomplete character count as letters; special and
        unused ids have both bits.
        """


def check_word_forms(tokenizer: Tokenizer) -> None:
    """Rejects tokenizers that drop spaces: dictionary words could not be found or replaced.

    Raises:
        UserError: a word has the same ids after a space and inside another word, or no leading space marker.
    """
    # A letter that every vocabulary contains: unknown tokens would be equal for a different reason.
    initial, inner = tokenizer.encode_word("a"), tokenizer.encode_word("a", word_initial=False)
    if not initial or initial == inner or not tokenizer.word_boundaries()[initial[0]] & 1:
        raise no_word_marker_error(tokenizer.path)


def no_word_marker_error(path: Path) -> UserError:
    """Returns the error for a tokenizer that does not mark word starts."""
    return UserError(
        f"{path}: tokenizer does not mark the start of words (WordPiece, or spaces are dropped or put after words); "
        "expected byte-level BPE or sentencepiece"
    )
