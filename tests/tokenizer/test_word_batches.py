"""Batches of words: the same ids as words encoded one by one, with every encoder."""

import json
import sys
import types
from pathlib import Path
from typing import Any

import awkward
import numpy
import psutil
import pytest
from tokenizers import Regex, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as RawTokenizer

from megatron_prealign.tokenizer import word_batches
from megatron_prealign.tokenizer.base import Tokenizer
from megatron_prealign.tokenizer.clone import CloneTokenizer
from megatron_prealign.tokenizer.gigatoken_engine import _arrays
from megatron_prealign.tokenizer.load import load_tokenizer

TEXT = [
    "The quick brown fox jumps over the lazy dog, (an apple) etc. and so on! It's 14 apples' worth.",
    "Die Äpfel sind grün.\n\nПривет, мир!\nПривет! 素早い茶色の狐",
    "etc.\netc.\n!\n!\nand\n\n",
]
WORDS = [
    *(
        "fox",
        "dog",
        "an apple",
        "(sich) freuen",
        "etc.",
        "it's",
        "'s",
        "14",
        "Äpfel",
        "ÄPFEL",
        "мир!",
        "狐",
        "素早い 狐",
    ),
    *("a\u0301b", "<eod>", "x" * 40, "!", "the", "fox"),
]
LLAMA = r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def make(directory: Path, kind: str) -> Tokenizer:
    raw = RawTokenizer(models.BPE(unk_token="<unk>" if kind == "metaspace" else None))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=kind == "prefix", use_regex=kind != "llama")
    if kind == "llama":
        split = pre_tokenizers.Split(Regex(LLAMA), "isolated")
        raw.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
        raw.normalizer = normalizers.NFC()
    else:
        raw.pre_tokenizer = pre_tokenizers.Metaspace() if kind == "metaspace" else byte_level
    alphabet = [] if kind == "metaspace" else sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<eod>", "<unk>"], initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(TEXT * 20, trainer)
    directory.mkdir()
    raw.save(str(directory / "tokenizer.json"))
    return load_tokenizer(directory)


def rows(tokenizer: Tokenizer, words: list[str], initial: bool, language: str | None = None) -> list[list[int]]:
    ids, offsets = tokenizer.encode_word_rows(words, language, initial)
    assert (ids.dtype, offsets.dtype, len(offsets), offsets[0]) == (numpy.int32, numpy.int64, len(words) + 1, 0)
    return [ids[begin:end].tolist() for begin, end in zip(offsets, offsets[1:], strict=False)]


def without_gigatoken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gigatoken", None)


def fake_gigatoken(monkeypatch: pytest.MonkeyPatch, shift: int = 0) -> list[str]:
    """Installs a fake with the interface in use; `shift` is added to the first id of the last text of each call."""
    encoded: list[str] = []

    class Engine:
        def __init__(self, data: bytes) -> None:
            self.tokenizer = RawTokenizer.from_str(data.decode())

        @classmethod
        def from_json(cls, data: bytes) -> "Engine":
            return cls(data)

        def encode_batch(self, texts: list[str]) -> Any:
            encoded.extend(texts)
            found = [self.tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
            found[-1][0] += shift
            return awkward.Array([numpy.array(row, dtype=numpy.uint32) for row in found])

    module: Any = types.ModuleType("gigatoken")
    module.Tokenizer = Engine
    monkeypatch.setitem(sys.modules, "gigatoken", module)
    return encoded


@pytest.mark.parametrize("kind", ["byte", "prefix", "llama", "metaspace"])
def test_rows_are_those_of_single_words(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    without_gigatoken(monkeypatch)
    # Several texts, and several calls.
    monkeypatch.setattr(word_batches, "_TEXT_CHARACTERS", 50)
    monkeypatch.setattr(word_batches, "_TEXTS_A_CALL", 2)
    tokenizer = make(tmp_path / kind, kind)
    for initial in (True, False):
        for words in (WORDS, WORDS[:1], [], ["fox", "", "dog"], ["a\nb", "fox"]):
            assert rows(tokenizer, words, initial) == tokenizer.encode_words(words, word_initial=initial), words
    # Words that cannot be encoded as lines do not change the encoder of later calls.
    assert rows(tokenizer, WORDS[:3], True) == tokenizer.encode_words(WORDS[:3])
    expected = {"byte": "tokenizers", "prefix": "tokenizers"}.get(kind, "tokenizers, word by word")
    if kind == "llama":
        # Its pre-tokenisation joins punctuation and line breaks, so the tokenizer has tokens across them.
        assert any(index in tokenizer.encode(".\n") for index in tokenizer.encode("etc.\n")[-1:])
    assert tokenizer.word_encoder == expected


def test_llama_is_encoded_as_lines_where_no_word_ends_in_punctuation(tmp_path, monkeypatch):
    without_gigatoken(monkeypatch)
    tokenizer = make(tmp_path / "llama", "llama")
    words = [word for word in WORDS if word[-1].isalnum()]
    assert rows(tokenizer, words, True) == tokenizer.encode_words(words)
    assert tokenizer.word_encoder == "tokenizers"


def test_a_token_across_line_breaks_is_noticed_without_the_sample(tmp_path, monkeypatch):
    without_gigatoken(monkeypatch)
    monkeypatch.setattr(word_batches, "_RANDOM_WORDS", 0)
    tokenizer = make(tmp_path / "llama", "llama")
    assert rows(tokenizer, ["fox", "etc."], True) == tokenizer.encode_words(["fox", "etc."])
    assert tokenizer.word_encoder == "tokenizers, word by word"


def test_gigatoken_is_used_if_it_is_correct(tmp_path, monkeypatch):
    encoded = fake_gigatoken(monkeypatch)
    tokenizer = make(tmp_path / "byte", "byte")
    for initial in (True, False):
        assert rows(tokenizer, WORDS, initial) == tokenizer.encode_words(WORDS, word_initial=initial)
    assert tokenizer.word_encoder == "gigatoken" and len(encoded) == 2


def test_wrong_ids_of_gigatoken_are_noticed(tmp_path, monkeypatch):
    encoded = fake_gigatoken(monkeypatch, shift=1)
    tokenizer = make(tmp_path / "byte", "byte")
    for _ in range(2):
        assert rows(tokenizer, WORDS, True) == tokenizer.encode_words(WORDS)
    # It is called once and then no longer used.
    assert tokenizer.word_encoder == "tokenizers" and len(encoded) == 1


def test_a_character_outside_ascii_is_always_in_the_sample(tmp_path, monkeypatch):
    """A library with another Unicode version is wrong for single characters: one word among thousands."""
    monkeypatch.setattr(word_batches, "_RANDOM_WORDS", 0)
    encoded = fake_gigatoken(monkeypatch, shift=1)
    tokenizer = make(tmp_path / "byte", "byte")
    assert rows(tokenizer, ["fox"] * 999, True)[0] != tokenizer.encode_word("fox")
    # The wrong id is in the first word.
    words = ["狐", *["fox"] * 999]
    assert rows(tokenizer, words, True) == tokenizer.encode_words(words)
    assert tokenizer.word_encoder == "tokenizers" and len(encoded) == 2


def test_added_tokens_are_left_to_the_library(tmp_path, monkeypatch):
    monkeypatch.setattr(word_batches, "_RANDOM_WORDS", 0)
    encoded = fake_gigatoken(monkeypatch)
    directory = make(tmp_path / "byte", "byte").path
    data = json.loads((directory / "tokenizer.json").read_text())
    entry = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    data["added_tokens"].append({"id": 500, "content": "<tool>", **entry})
    (directory / "tokenizer.json").write_text(json.dumps(data))
    tokenizer = load_tokenizer(directory)
    words = ["fox", "<tool>", "<eod>"]
    assert rows(tokenizer, ["fox"], True) == tokenizer.encode_words(["fox"])
    assert tokenizer.word_encoder == "gigatoken" and encoded
    assert rows(tokenizer, words, True) == tokenizer.encode_words(words)
    assert tokenizer.decode(tokenizer.encode_word("<tool>")) == "Ġ <tool>" and tokenizer.word_encoder == "tokenizers"


def test_clone(tmp_path, monkeypatch):
    without_gigatoken(monkeypatch)
    clone = CloneTokenizer(make(tmp_path / "byte", "byte"), "en_clone")
    for language in ("en", "en_clone"):
        assert rows(clone, WORDS, True, language) == clone.encode_words(WORDS, language)
    assert clone.word_encoder == "tokenizers"


def test_real_gigatoken(tmp_path):
    pytest.importorskip("gigatoken")
    tokenizer = make(tmp_path / "byte", "byte")
    for initial in (True, False):
        assert rows(tokenizer, WORDS, initial) == tokenizer.encode_words(WORDS, word_initial=initial)
    assert tokenizer.word_encoder == "gigatoken"


@pytest.mark.slow
def test_the_word_cache_of_gigatoken_is_bounded(tmp_path):
    pytest.importorskip("gigatoken")
    engine = make(tmp_path / "byte", "byte").fast_engine()
    assert engine is not None
    process, generator = psutil.Process(), numpy.random.default_rng(0)

    def encode_new_words(times: int) -> int:
        for _ in range(times):
            words = generator.integers(ord("a"), ord("z") + 1, (200_000, 9), dtype=numpy.uint8)
            words[:, 8] = ord(" ")
            engine([words.tobytes().decode()])
        return process.memory_info().rss

    before = encode_new_words(1)
    # Without the limit, it grew by more than 600 MB here.
    assert encode_new_words(40) - before < 400 << 20


@pytest.mark.parametrize("form", [awkward.Array, list])
def test_both_result_types_of_gigatoken(form):
    ids, offsets = _arrays(form([[5, 6], [], [7]]))
    assert (ids.tolist(), offsets.tolist()) == ([5, 6, 7], [0, 2, 2, 3])
    # A slice shares the memory of the complete array.
    ids, offsets = _arrays(form([[4], [5, 6], [7]])[1:])
    assert (ids.tolist(), offsets.tolist()) == ([5, 6, 7], [0, 2, 3])
