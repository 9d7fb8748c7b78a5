"""Decoding while tokens are generated: the text of all tokens, without decoding them again for each one."""

import random
from collections.abc import Callable, Sequence

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from megatron_prealign.generation.stream import StreamDecoder

BYTES = [f"<0x{number:02X}>" for number in range(256)]
WORDS = ["▁", "▁▁", "▁the", "▁cat", "s", ".", "▁größer", "猫"]
END = "</s>"


@pytest.fixture(scope="module")
def sentencepiece() -> PreTrainedTokenizerFast:
    """Decodes as Llama's tokenizers do: one token per byte of an unknown character, no space at the start."""
    vocabulary = {token: index for index, token in enumerate([*BYTES, *WORDS])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


def bytes_as_text(ids: Sequence[int]) -> str:
    """Decodes as byte-level tokenizers do; a token is a byte."""
    return bytes(ids).decode(errors="replace")


class Counting:
    """Decodes and counts the tokens."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self.tokens = 0

    def __call__(self, ids: Sequence[int]) -> str:
        self.tokens += len(ids)
        return self._decode(ids)


def streamed(decode: Callable[[Sequence[int]], str], ids: Sequence[int], prompt: int) -> str:
    stream = StreamDecoder(decode)
    return "".join(stream.new_text(ids[:end]) for end in range(prompt + 1, len(ids) + 1))


def words_and_characters(length: int, generator: random.Random) -> list[int]:
    """Tokens of `sentencepiece`: words, and characters of one to four bytes."""
    ids: list[int] = []
    while len(ids) < length:
        if generator.random() < 0.6:
            ids.append(len(BYTES) + generator.randrange(len(WORDS)))
        else:
            ids += generator.choice("xéह😀").encode()
    return ids


@pytest.mark.parametrize("prompt", [1, 2, 7])
@pytest.mark.parametrize("seed", range(20))
def test_leading_spaces_and_split_characters(sentencepiece: PreTrainedTokenizerFast, prompt: int, seed: int) -> None:
    ids = words_and_characters(60, random.Random(seed))
    assert streamed(sentencepiece.decode, ids, prompt) == sentencepiece.decode(ids)


@pytest.mark.parametrize("seed", range(20))
def test_bytes_that_are_no_characters(seed: int) -> None:
    generator = random.Random(seed)
    ids = [generator.randrange(256) for _ in range(200)]
    shown = streamed(bytes_as_text, ids, 3)
    assert bytes_as_text(ids).startswith(shown) and len(shown) > 100


def test_a_character_is_shown_with_its_last_byte_and_special_tokens_are_not(
    sentencepiece: PreTrainedTokenizerFast,
) -> None:
    stream = StreamDecoder(lambda ids: str(sentencepiece.decode(list(ids), skip_special_tokens=True)))
    ids: list[int] = []
    shown = []
    for token in [len(BYTES) + 2, *"é".encode(), sentencepiece.eos_token_id, len(BYTES) + 3]:
        ids.append(token)
        shown.append(stream.new_text(ids))
    assert shown == ["the", "", "é", "", " cat"]


@pytest.mark.parametrize("valid", [True, False])
def test_the_work_grows_linearly(valid: bool) -> None:
    decode = Counting(bytes_as_text)
    # The second text has bytes that continue a character, without one to continue.
    ids = list("größer ".encode() * 250) if valid else [0x80] * 2000
    streamed(decode, ids, 100)
    assert decode.tokens < 8 * len(ids)
