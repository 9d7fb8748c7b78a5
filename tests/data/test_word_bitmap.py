"""Mapping word starts from characters to tokens, and the packed file."""

import numpy as np
import pytest

from megatron_prealign.data.word_bitmap import BitmapWriter, token_word_starts

# Text, character ranges of its tokens, word starts, and the tokens that start a word.
CASES = {
    "one token per word": ("苹果好", [(0, 2), (2, 3)], [0, 2], "11"),
    "word of two tokens": ("苹果好", [(0, 1), (1, 2), (2, 3)], [0, 2], "101"),
    "boundary inside a token marks it and the next": (
        "我吃苹果树",
        [(0, 1), (1, 3), (3, 4), (4, 5)],
        [0, 1, 2, 4],
        "1111",
    ),
    "two words in one token": ("我吃苹果", [(0, 1), (1, 4)], [0, 1, 2], "11"),
    "only inside": ("我吃苹果", [(0, 1), (1, 3), (3, 4)], [0, 2], "111"),
    "first token of a document": ("苹果好", [(0, 1), (1, 3)], [], "10"),
    "only the first byte of a character": ("苹果", [(0, 1), (0, 1), (0, 1), (1, 2), (1, 2)], [0, 1], "10010"),
    "end of one character and start of the next": ("苹果好", [(0, 1), (0, 2), (1, 2), (2, 3)], [0, 1], "1110"),
    "the same without a word boundary": ("苹果好", [(0, 1), (0, 2), (1, 2), (2, 3)], [0, 2], "1001"),
    "leading space belongs to the word": ("a 苹果b", [(0, 1), (1, 3), (3, 4), (4, 5)], [0, 1, 2, 4], "1101"),
    "ideographic space too": ("a\u3000苹果b", [(0, 1), (1, 3), (3, 4), (4, 5)], [0, 2, 4], "1101"),
    "space tokens": ("a  b", [(0, 1), (1, 3), (3, 4)], [0, 1, 3], "111"),
    "dropped spaces": ("a  b", [(0, 1), (3, 4)], [0, 1], "11"),
    "offset at the end of the text": ("ab", [(0, 1), (1, 2)], [0, 2], "10"),
    "normalised to more characters": ("㍿a", [(0, 1), (0, 1), (0, 1), (1, 2)], [0, 1], "1001"),
    "no token": (" ", [], [0], ""),
}


@pytest.mark.parametrize("case", CASES)
def test_by_hand(case):
    text, spans, words, expected = CASES[case]
    starts = token_word_starts(text, np.array(spans, dtype=np.int64).reshape(-1, 2), np.array(words, dtype=np.int64))
    assert starts.dtype == np.bool_
    assert "".join(str(int(bit)) for bit in starts) == expected


def test_equals_a_plain_loop_over_bytes():
    """Random text cut into tokens at random bytes, with token ranges and word starts in bytes."""
    random = np.random.default_rng(3)
    seen_inside = seen_shared = 0
    for _ in range(400):
        text = "".join(random.choice(list("a é家犬𠮷\u3000"), size=int(random.integers(1, 25))))
        character_of_byte = [at for at, character in enumerate(text) for _ in character.encode()]
        byte_of_character = [len(text[:at].encode()) for at in range(len(text) + 1)]
        cuts = sorted(set(random.integers(1, len(character_of_byte) + 1, size=8).tolist()) - {len(character_of_byte)})
        tokens = list(zip([0, *cuts], [*cuts, len(character_of_byte)], strict=True))
        words = sorted(set(random.integers(0, len(text), size=6).tolist()))
        expected = [False] * len(tokens)
        expected[0] = True
        for number, (start, end) in enumerate(tokens):
            visible = start
            while visible < end - 1 and character_of_byte[visible] != character_of_byte[end - 1]:
                # Includes the rest of a white space character that started in the previous token.
                if not text[character_of_byte[visible]].isspace():
                    break
                visible = byte_of_character[character_of_byte[visible] + 1]
            for word in words:
                at = byte_of_character[word]
                if start <= at <= visible:
                    expected[number] = True
                elif visible < at < end:
                    expected[number] = True
                    seen_inside += 1
                    if number + 1 < len(tokens):
                        expected[number + 1] = True
                seen_shared += start < at < end and character_of_byte[start] == character_of_byte[start - 1]
        spans = [(character_of_byte[start], character_of_byte[end - 1] + 1) for start, end in tokens]
        starts = token_word_starts(text, np.array(spans), np.array(words))
        assert starts.tolist() == expected, (text, tokens, words)
    assert seen_inside > 100 and seen_shared > 100


@pytest.mark.parametrize("sizes", [[], [0], [3], [8], [5, 3, 8], [1] * 19, [13, 0, 30, 2]])
def test_packing_does_not_depend_on_the_chunks(tmp_path, sizes):
    bits = np.random.default_rng(1).random(sum(sizes)) < 0.4
    writer = BitmapWriter(tmp_path / "x")
    for start, size in zip(np.cumsum([0, *sizes]), sizes, strict=False):
        writer.append(bits[start : start + size])
    writer.close()
    content = (tmp_path / "x").read_bytes()
    assert len(content) == -(-len(bits) // 8)
    unpacked = [bool(byte >> bit & 1) for byte in content for bit in range(8)]
    assert unpacked == bits.tolist() + [False] * (8 * len(content) - len(bits))
