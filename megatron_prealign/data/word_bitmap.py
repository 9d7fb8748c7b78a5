"""PREFIX.words: one bit a token, set where a segmenter says that a word starts; for scripts without spaces."""

from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from megatron_prealign.errors import UserError

if TYPE_CHECKING:
    from megatron.core.datasets.indexed_dataset import IndexedDataset


def words_path(prefix: str | Path) -> Path:
    """`PREFIX.words`, the bitmap: bit i % 8, the lowest first, of byte i // 8 belongs to token i of `PREFIX.bin`."""
    return Path(f"{prefix}.words")


def token_word_starts(text: str, spans: np.ndarray, word_starts: np.ndarray) -> np.ndarray:
    """Carries word starts over from characters to tokens.

    A word that starts inside a token, behind its leading white space, counts for that token and for the next one: so
    pieces of two words never look like a third. Of the tokens that share a character only the first can start a word
    with it. The first token always starts one.

    Args:
        text: the document.
        spans: `[tokens, 2]` as `Tokenizer.encode_with_offsets` gives them.
        word_starts: character offsets in `text`, sorted, int64.

    Returns:
        bool [tokens].
    """
    if len(spans) == 0:
        return np.zeros(0, dtype=np.bool_)
    start, end = spans[:, 0], np.maximum.accumulate(spans[:, 1])
    previous_end = np.concatenate([[0], end[:-1]])
    # The first character of each token that is not white space: a space in front belongs to the word.
    characters = np.arange(len(text) + 1)
    blank = np.fromiter((character.isspace() for character in text), np.bool_, len(text))
    characters[:-1][blank] = len(text)
    visible = np.minimum.accumulate(characters[::-1])[::-1][start]
    visible = np.maximum(np.minimum(visible, end - 1), start)
    up_to_visible = np.searchsorted(word_starts, visible, side="right")
    inside = np.searchsorted(word_starts, end, side="left") > up_to_visible
    starts = inside | (up_to_visible > np.searchsorted(word_starts, previous_end, side="left"))
    starts[1:] |= inside[:-1]
    starts[0] = True
    return starts


class BitmapWriter:
    """Packs bits that come in pieces into one file."""

    def __init__(self, path: Path, rest: str | None = None) -> None:
        """Begins the file; or goes on behind its last whole byte, with the bits that `rest` once gave."""
        self.stream: IO[bytes] = path.open("wb" if rest is None else "ab")
        self._rest = np.array([bit == "1" for bit in rest or ""], dtype=np.bool_)

    @property
    def rest(self) -> str:
        """The bits that do not fill a byte yet, as `0` and `1`."""
        return "".join("1" if bit else "0" for bit in self._rest)

    def append(self, bits: np.ndarray) -> None:
        """Adds bool [n]; what does not fill a byte waits for more."""
        bits = np.concatenate([self._rest, bits])
        whole = len(bits) // 8 * 8
        self.stream.write(np.packbits(bits[:whole], bitorder="little").tobytes())
        self._rest = bits[whole:]

    def append_packed(self, packed: np.ndarray, count: int) -> None:
        """Adds `count` bits as they lie in a file of this kind, uint8 [ceil(count / 8)]; what follows them in the last
        byte is left out."""
        if count == 0:
            return
        used = len(self._rest)
        bits = packed
        if used:
            # Each byte is spread over two: its low bits fill up the one before.
            shifted = np.zeros(len(bits) + 1, dtype=np.uint8)
            shifted[:-1] = bits << used
            shifted[1:] |= bits >> (8 - used)
            shifted[0] |= np.packbits(self._rest, bitorder="little")[0]
            bits = shifted
        whole, rest = divmod(used + count, 8)
        self.stream.write(bits[:whole].tobytes())
        self._rest = np.unpackbits(bits[whole : whole + 1], count=rest, bitorder="little").view(np.bool_)

    def close(self) -> None:
        """Writes the last byte, filled up with zeros."""
        with self.stream:
            self.stream.write(np.packbits(self._rest, bitorder="little").tobytes())


def check_words(prefix: str | Path, tokens: int, segmenter: str) -> None:
    """Checks that `PREFIX.words` is there with one bit a token.

    Args:
        prefix: path of the dataset without ending.
        tokens: tokens of the dataset.
        segmenter: the segmenter that the sidecar names, for the messages.

    Raises:
        UserError: the file is missing or has another size.
    """
    path = words_path(prefix)
    expected = -(-tokens // 8)
    again = f"make the dataset again with megatron-prealign preprocess --segmenter {segmenter}"
    if not path.is_file():
        raise UserError(
            f"{path}: no such file, but {Path(f'{prefix}.json').name} says that segmenter {segmenter} marked the "
            f"words; copy it beside the .bin, or {again}"
        )
    found = path.stat().st_size
    if found != expected:
        raise UserError(
            f"{path}: {found:,} bytes, expected {expected:,}, one bit for each of {tokens:,} tokens; {again}"
        )


class WordBitmap:
    """The `PREFIX.words` file of an open dataset, mapped."""

    def __init__(self, prefix: str | Path, dataset: "IndexedDataset", segmenter: str) -> None:
        """Maps the file.

        Args:
            prefix: path of the dataset without ending.
            dataset: the reader of its tokens.
            segmenter: the segmenter that the sidecar names, for the messages.

        Raises:
            UserError: as in `check_words`.
        """
        tokens = int(dataset.sequence_lengths.sum(dtype=np.int64))
        check_words(prefix, tokens, segmenter)
        self._dataset = dataset
        # A dataset has a document, and a document its end token: the file is not empty, which could not be mapped.
        self._bytes = np.memmap(words_path(prefix), np.uint8, "r")

    def read(self, sequence: int, offset: int, count: int) -> np.ndarray:
        """Whether a word starts at the tokens `offset` to `offset + count` of a sequence, bool [count]."""
        index = self._dataset.index
        # Pointers count the bytes of the .bin.
        start = int(index.sequence_pointers[sequence]) // index.dtype_size + offset
        first = start // 8
        part = np.asarray(self._bytes[first : -(-(start + count) // 8)])
        shift = start - 8 * first
        return np.unpackbits(part, count=shift + count, bitorder="little")[shift:].view(np.bool_)
