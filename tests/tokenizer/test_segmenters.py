"""Segmenters: words in real sentences, and `preprocess --segmenter` from text to word bits."""

import gzip
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from support.messages import assert_facts, user_error
from support.word_cutters import WORDS, KnownWords

from megatron_prealign.cli import main
from megatron_prealign.corpus.blocks import Limits
from megatron_prealign.data.indexed import open_indexed
from megatron_prealign.data.sidecar import load_sidecar
from megatron_prealign.data.word_bitmap import WordBitmap, words_path
from megatron_prealign.preprocess import run as module
from megatron_prealign.preprocess.run import PreprocessSettings, preprocess
from megatron_prealign.preprocess.train_tokenizer import train_tokenizer
from megatron_prealign.tokenizer.base import Tokenizer
from megatron_prealign.tokenizer.load import load_tokenizer
from megatron_prealign.tokenizer.segmenters import (
    BUILT_IN,
    checked_word_starts,
    open_segmenter,
    parse_segmenters,
    resolve_segmenter,
    split_text,
)

PACKAGES = {
    "jieba": ("jieba",),
    "sudachi": ("sudachipy", "sudachidict_small"),
    "newmm": ("pythainlp",),
    "icu": ("icu4py",),
}
# 𠮷 and 😀 are two UTF-16 units each, which reveals offsets that are not in characters.
SENTENCES = {
    ("jieba", "zh"): "😀/我们/学习/手动/创建/RAID/，/而/非/安装/单台/计算机/。",
    ("icu", "zh"): "😀/我们/将/学习/大规模/部署/系统/。",
    ("icu", "ja"): "𠮷/この/章/では/説明/した",
    ("icu", "th"): "😀/ฉัน/รัก/ภาษา/ไทย",
    ("sudachi", "ja"): "😀/この/章/で/は/説明/し/た/。",
    ("newmm", "th"): "ฉัน/รัก/ภาษาไทย/😀",
}


def need(name: str) -> None:
    for package in PACKAGES[name]:
        pytest.importorskip(package, reason=f"{package} is not installed (pip install 'megatron-prealign[segmenters]')")


@pytest.mark.parametrize("name, language", SENTENCES)
def test_words_of_a_sentence(name: str, language: str) -> None:
    need(name)
    segmenter = open_segmenter(name, language)
    words = [word for part in SENTENCES[name, language].split(" ") for word in part.split("/")]
    text = "".join(words)
    expected = {0, *np.cumsum([len(word) for word in words[:-1]]).tolist()}
    assert set(segmenter.word_starts(text)) == expected
    # In a longer text, after white space of all kinds and on other lines.
    for before in ("\n\n", " \t", "ab\r\n", "\u3000"):
        found = segmenter.word_starts(before + text + "\n" + text)
        assert {at + len(before) for at in expected} <= set(found)
        assert {at + len(before) + len(text) + 1 for at in expected} <= set(found)
        assert list(found) == sorted(set(found)) and found[-1] < len(before) + 2 * len(text) + 1
    assert list(segmenter.word_starts("")) in ([], [0])


def test_sudachi_supports_lines_longer_than_its_limit() -> None:
    need("sudachi")
    segmenter = open_segmenter("sudachi", "ja")
    sentence, before = "この章では説明した。", "。。。。"
    # The limit of 12,000 characters is between 説 and 明, which form one word.
    text = before + sentence * 2500
    assert text[11_999:12_001] == "説明"
    one = segmenter.word_starts(sentence)
    expected = {len(before) + at + len(sentence) * number for number in range(2500) for at in one}
    assert {at for at in segmenter.word_starts(text) if at >= len(before)} == expected


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", [""]),
        ("abcde", ["abcde"]),
        ("abcdefgh", ["abcde", "fgh"]),
        ("ab cdefgh", ["ab ", "cdefg", "h"]),
        ("a b、cdef", ["a b、", "cdef"]),
        ("abcd。efghi", ["abcd。", "efghi"]),
        # Sound marks are not punctuation: words continue after them.
        ("。aーｂ\u3099ccc", ["。", "aーｂ\u3099c", "cc"]),
    ],
)
def test_long_text_is_split_between_words(text: str, parts: list[str]) -> None:
    assert split_text(text, 5) == parts


@pytest.mark.parametrize("name", BUILT_IN)
def test_missing_package_names_the_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in (*PACKAGES[name], "pythainlp.tokenize", "icu4py.breakers"):
        monkeypatch.setitem(sys.modules, package, None)
    with user_error(f"segmenter {name}: ", "pip install 'megatron-prealign[segmenters]'"):
        open_segmenter(name, "zh")


@pytest.mark.parametrize(
    "name, facts",
    [
        ("jiba", ("unknown segmenter 'jiba'", "auto, jieba, sudachi, newmm, icu, or module:Class")),
        (":KnownWords", ("unknown segmenter ':KnownWords'",)),
        ("support.word_cutters:", ("unknown segmenter 'support.word_cutters:'",)),
        ("no_such_module:X", ("cannot create", "No module named 'no_such_module'")),
        ("support.word_cutters:Missing", ("cannot create", "no attribute 'Missing'")),
        ("support.word_cutters:NoLanguage", ("cannot create", "takes no arguments")),
        ("support.word_cutters:Unreadable", ("cannot create", "FileNotFoundError: ", "'words.txt'")),
        ("support.word_cutters:Mute", ("word_starts(text) is missing",)),
    ],
)
def test_invalid_segmenters(name: str, facts: tuple[str, ...]) -> None:
    with user_error(f"segmenter {name!r}" if "unknown" in facts[0] else f"segmenter {name}: ", *facts):
        open_segmenter(name, "zh")


def test_auto_selects_by_language() -> None:
    expected = {
        "zh": "jieba",
        "zh_TW": "jieba",
        "zh-Hans": "jieba",
        "ZH": "jieba",
        "zh_clone": "jieba",
        "ja": "sudachi",
    }
    expected.update(th="newmm", lo="icu", km="icu", my="icu")
    assert {language: resolve_segmenter("auto", language) for language in expected} == expected
    assert [resolve_segmenter("auto", language) for language in ("de", "en_clone", "zhx", "jav", "")] == [None] * 5
    assert resolve_segmenter("icu", "de") == "icu"
    assert resolve_segmenter(None, "zh") is None


def test_results_of_a_segmenter_are_checked() -> None:
    class Fixed:
        def __init__(self, starts: object) -> None:
            self.starts = starts

        def word_starts(self, text: str) -> object:
            return self.starts

    for starts, expected in (([2, 0, 2], [0, 2]), ([], []), (np.array([1], np.uint8), [1]), ([3], [3])):
        found = checked_word_starts(Fixed(starts), "x", "abc", "f:1")
        assert found.tolist() == expected and found.dtype == np.int64
    for wrong in ([0, 4], [-1, 0], [0.5], ["a"]):
        with user_error("f:1: segmenter x ", f"word starts from {wrong[0]} to {wrong[-1]}, expected", "from 0 to 3"):
            checked_word_starts(Fixed(wrong), "x", "abc", "f:1")


def documents(count: int, seed: int) -> list[str]:
    random = np.random.default_rng(seed)
    pieces = [*WORDS, "我", "吃", "在", "，", "。", " RAID ", "\n", "龘", "😀", "苹"]
    return ["".join(random.choice(pieces, size)) for size in random.integers(1, 50, count)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("segmenters")
    lines = [json.dumps({"text": text}) for text in documents(200, 1)]
    (path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    texts = [" ".join(text.split()) or "x" for text in documents(100, 2)]
    (path / "b.txt.gz").write_bytes(gzip.compress("\n\n".join(texts).encode()))
    # Merges across words, and bytes of unseen characters: both kinds of tokens that are not complete words.
    train_tokenizer([path / "a.jsonl"], path / "tok", 340, show_progress=False)
    return path


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    return load_tokenizer(directory / "tok")


def expected_bits(tokenizer: Tokenizer, text: str) -> tuple[list[bool], int]:
    """Reference: token by token over bytes. Words never merge, and only the first byte of a character starts a word."""
    sizes = [len(tokenizer._tokenizer.id_to_token(index)) for index in tokenizer.encode(text)]
    starts = {len(text[:at].encode()) for at in KnownWords("zh").word_starts(text)}
    bits = [False] * (len(sizes) + 1)
    at = inside = 0
    for number, size in enumerate(sizes):
        first = at + 1 if text.encode()[at : at + 1].isspace() and size > 1 else at
        bits[number] |= bool(starts & {at, first})
        if starts & set(range(first + 1, at + size)):
            bits[number] = bits[number + 1] = True
            inside += 1
        at += size
    bits[0] = bits[-1] = True
    return bits, inside


def test_bits_from_text_to_file(directory: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    inputs = [directory / "a.jsonl", directory / "b.txt.gz"]
    name = "support.word_cutters:KnownWords"
    for segmenter, out in ((name, "with"), (None, "without")):
        settings = PreprocessSettings(language="zh", segmenter=segmenter)
        preprocess(inputs, directory / "tok", tmp_path / out, settings, show_progress=False)
    for ending in ("bin", "idx"):
        assert (tmp_path / f"with.{ending}").read_bytes() == (tmp_path / f"without.{ending}").read_bytes()
    assert load_sidecar(tmp_path / "with").segmenter == name
    assert load_sidecar(tmp_path / "without").segmenter is None
    assert not words_path(tmp_path / "without").exists()
    dataset = open_indexed(tmp_path / "with")
    bitmap = WordBitmap(tmp_path / "with", dataset, name)
    texts = [*documents(200, 1), *(" ".join(text.split()) or "x" for text in documents(100, 2))]
    texts = [text for text in texts if text.strip()]
    assert len(texts) == len(dataset)
    inside = 0
    for number, text in enumerate(texts):
        expected, count = expected_bits(tokenizer, text)
        assert bitmap.read(number, 0, len(dataset[number])).tolist() == expected, text
        inside += count
    # The test is meaningful only if words start inside tokens.
    assert inside > 20


@pytest.mark.slow
def test_workers_do_not_change_the_bits(directory: Path, tmp_path: Path) -> None:
    need("jieba")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "我们学习"}\n{"text": ""}\nx\n', encoding="utf-8")
    for workers in (1, 2):
        # Small blocks, so that there are many more than fit in flight.
        settings = PreprocessSettings(
            language="zh", on_error="skip", workers=workers, segmenter="jieba", limits=Limits(block_bytes=700)
        )
        inputs = [directory / "a.jsonl", bad, directory / "b.txt.gz"]
        preprocess(inputs, directory / "tok", tmp_path / f"w{workers}", settings, show_progress=False)
    for ending in ("bin", "idx", "words", "json"):
        assert (tmp_path / f"w1.{ending}").read_bytes() == (tmp_path / f"w2.{ending}").read_bytes()


def run(directory: Path, out: Path, *arguments: str) -> int:
    options = ["--tokenizer", str(directory / "tok"), "--language", "zh", "--workers", "1"]
    return main(["preprocess", *options, "--input", str(directory / "a.jsonl"), "--output", str(out), *arguments])


def test_command(directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(directory, tmp_path / "x", "--segmenter", "support.word_cutters:KnownWords") == 0
    assert "x.bin, .idx, .words (by support.word_cutters:KnownWords) and .json" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.bin", "x.idx", "x.json", "x.words"]
    # Overwritten without a segmenter: no file of the old tokens remains.
    assert run(directory, tmp_path / "x", "--overwrite") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.bin", "x.idx", "x.json"]


@pytest.mark.parametrize(
    "segmenter, facts",
    [
        ("none", ("unknown segmenter 'none'",)),
        ("support.word_cutters:OutOfRange", ("a.jsonl:1: segmenter support.word_cutters:OutOfRange ", "from 0 to ")),
        ("support.word_cutters:Fractions", ("a.jsonl:1: segmenter support.word_cutters:Fractions ", "from 0.0 to 0.5")),
        ("support.word_cutters:Unreadable", ("segmenter support.word_cutters:Unreadable: ", "FileNotFoundError")),
        (
            "support.word_cutters:Failing",
            ("a.jsonl:1: segmenter support.word_cutters:Failing failed", "RuntimeError: model lost"),
        ),
    ],
)
def test_errors_leave_nothing(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], segmenter: str, facts: tuple[str, ...]
) -> None:
    assert run(directory, tmp_path / "x", "--segmenter", segmenter) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert_facts(errors[0], *facts)
    assert not list(tmp_path.iterdir())


def test_interrupt_leaves_nothing(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_sidecar", interrupt)
    assert run(directory, tmp_path / "x", "--segmenter", "support.word_cutters:KnownWords") == 130
    assert not list(tmp_path.iterdir())


def test_a_clone_has_the_same_bits(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "tok").mkdir()
    for path in (directory / "tok").iterdir():
        (tmp_path / "tok" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "tok/clone.json").write_text('{"language": "zh_clone"}')
    for language in ("zh", "zh_clone"):
        settings = PreprocessSettings(language=language, segmenter="support.word_cutters:KnownWords")
        preprocess([directory / "a.jsonl"], tmp_path / "tok", tmp_path / language, settings, show_progress=False)
    assert (tmp_path / "zh.words").read_bytes() == (tmp_path / "zh_clone.words").read_bytes()
    assert (tmp_path / "zh.bin").read_bytes() != (tmp_path / "zh_clone.bin").read_bytes()


def test_segmenters_of_languages() -> None:
    languages = ["de", "zh", "ja_JP"]
    assert parse_segmenters([], languages) == {}
    assert parse_segmenters(["auto"], languages) == {"zh": "jieba", "ja_JP": "sudachi"}
    assert parse_segmenters(["zh=icu", "auto"], languages) == {"zh": "icu", "ja_JP": "sudachi"}
    assert parse_segmenters(["de=auto", "zh=auto", "ja_JP=a.b:C=D"], languages) == {"zh": "jieba", "ja_JP": "a.b:C=D"}
