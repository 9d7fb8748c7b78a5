"""PREFIX.words: one bit a token, set where a segmenter says that a word starts; for scripts without spaces."""

from pathlib import Path

import numpy as np

from megatron_prealign.errors import UserError


def words_path(prefix: str | Path) -> Path:
    """`PREFIX.words`, the bitmap."""
    return Path(f"{prefix}.words")


class WordBitmap:
    """A `PREFIX.words` file, mapped: bit i % 8 (the lowest first) of byte i // 8 belongs to token i of `PREFIX.bin`."""

    def __init__(self, prefix: str | Path, tokens: int, segmenter: str) -> None:
        """Maps the file and checks its size.

        Args:
            prefix: path of the dataset without ending.
            tokens: tokens of the dataset.
            segmenter: the segmenter that the sidecar names, for the messages.

        Raises:
            UserError: the file is missing or its size is not one bit a token.
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
        self._bytes = np.memmap(path, np.uint8, "r", shape=(expected,)) if expected else np.empty(0, np.uint8)

    def read(self, start: int, count: int) -> np.ndarray:
        """Whether a word starts at the tokens `start` to `start + count`, bool [count]."""
        first = start // 8
        part = np.asarray(self._bytes[first : -(-(start + count) // 8)])
        shift = start - 8 * first
        return np.unpackbits(part, count=shift + count, bitorder="little")[shift:].view(np.bool_)
