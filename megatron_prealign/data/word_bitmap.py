"""PREFIX.words: one bit per token, set where a segmenter found a word start; for scripts without spaces."""

from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from megatron_prealign.errors import UserError

if TYPE_CHECKING:
    from megatron.core.datasets.indexed_dataset import IndexedDataset


def words_path(prefix: str | Path) -> Path:
    """`PREFIX.words`, the bitmap: bit i % 8 (lowest first) of byte i // 8 belongs to token i of `PREFIX.bin`."""
    return Path(f"{prefix}.words")


def token_word_starts(text: str, spans: np.ndarray, word_starts: np.ndarray) -> np.ndarray:
    """Maps word starts from characters to tokens.

    A word that starts inside a token, after its leading white space, marks that token and the next one, so that parts
    of two words never look like a third word. If several tokens share a character, only the first can start a word
    with it. The first token always starts a word.

    Args:
        text: The document.
        spans: `[tokens, 2]`, as returned by `Tokenizer.encode_with_offsets`.
        word_starts: Character offsets in `text`, sorted, int64.

    Returns:
        bool [tokens].
    """
    if len(spans) == 0:
        return np.zeros(0, dtype=np.bool_)
    start, end = spans[:, 0], np.maximum.accumulate(spans[:, 1])
    previous_end = np.concatenate([[0], end[:-1]])
    # First non-space character of each token: a leading space belongs to the word.
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
    """Writes a bitmap file from bits that arrive in chunks."""

    def __init__(self, path: Path, pending_bits: str | None = None) -> None:
        """Creates the file, or appends to it after its last full byte, continuing with saved `pending_bits`."""
        self.stream: IO[bytes] = path.open("wb" if pending_bits is None else "ab")
        self._pending = np.array([bit == "1" for bit in pending_bits or ""], dtype=np.bool_)

    @property
    def pending_bits(self) -> str:
        """Bits that do not fill a byte yet, as `0` and `1`."""
        return "".join("1" if bit else "0" for bit in self._pending)

    def append(self, bits: np.ndarray) -> None:
        """Appends bool [n]; bits that do not fill a byte stay pending."""
        bits = np.concatenate([self._pending, bits])
        full = len(bits) // 8 * 8
        self.stream.write(np.packbits(bits[:full], bitorder="little").tobytes())
        self._pending = bits[full:]

    def append_packed(self, packed: np.ndarray, count: int) -> None:
        """Appends `count` bits packed as in a bitmap file, uint8 [ceil(count / 8)]; padding bits are ignored."""
        if count == 0:
            return
        used = len(self._pending)
        bits = packed
        if used:
            # Each byte is spread over two: its low bits complete the previous one.
            shifted = np.zeros(len(bits) + 1, dtype=np.uint8)
            shifted[:-1] = bits << used
            shifted[1:] |= bits >> (8 - used)
            shifted[0] |= np.packbits(self._pending, bitorder="little")[0]
            bits = shifted
        full, remainder = divmod(used + count, 8)
        self.stream.write(bits[:full].tobytes())
        self._pending = np.unpackbits(bits[full : full + 1], count=remainder, bitorder="little").view(np.bool_)

    def close(self) -> None:
        """Writes the last byte, padded with zeros."""
        with self.stream:
            self.stream.write(np.packbits(self._pending, bitorder="little").tobytes())


def check_words(prefix: str | Path, tokens: int, segmenter: str) -> None:
    """Checks that `PREFIX.words` exists and has one bit per token.

    Args:
        prefix: Path of the dataset without extension.
        tokens: Number of tokens of the dataset.
        segmenter: Segmenter named in the sidecar, for the messages.

    Raises:
        UserError: The file is missing or has another size.
    """
    path = words_path(prefix)
    expected = -(-tokens // 8)
    again = f"recreate the dataset with megatron-prealign preprocess --segmenter {segmenter}"
    if not path.is_file():
        raise UserError(
            f"{path}: file not found, but {Path(f'{prefix}.json').name} lists word starts by segmenter {segmenter}; "
            f"copy it next to the .bin, or {again}"
        )
    size = path.stat().st_size
    if size != expected:
        raise UserError(f"{path}: got {size:,} bytes, expected {expected:,} (one bit for {tokens:,} tokens); {again}")


class WordBitmap:
    """Memory-mapped `PREFIX.words` file of an open dataset."""

    def __init__(self, prefix: str | Path, dataset: "IndexedDataset", segmenter: str) -> None:
        """Memory-maps the file.

        Args:
            prefix: Path of the dataset without extension.
            dataset: Reader of its tokens.
            segmenter: Segmenter named in the sidecar, for the messages.

        Raises:
            UserError: As in `check_words`.
        """
        tokens = int(dataset.sequence_lengths.sum(dtype=np.int64))
        check_words(prefix, tokens, segmenter)
        self._dataset = dataset
        # An empty file could not be mapped, but an open dataset has at least one token.
        self._bytes = np.memmap(words_path(prefix), np.uint8, "r")

    def read(self, sequence: int, offset: int, count: int) -> np.ndarray:
        """Whether a word starts at each of the tokens `offset` to `offset + count` of a sequence, bool [count]."""
        index = self._dataset.index
        # Pointers are byte offsets in the .bin.
        start = int(index.sequence_pointers[sequence]) // index.dtype_size + offset
        first = start // 8
        part = np.asarray(self._bytes[first : -(-(start + count) // 8)])
        shift = start - 8 * first
        return np.unpackbits(part, count=shift + count, bitorder="little")[shift:].view(np.bool_)
