"""Segmenters: what each finds in real sentences, and `preprocess --segmenter` from text to bits."""

import gzip
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from support.word_cutters import WORDS, KnownWords

from megatron_prealign.cli import main
from megatron_prealign.corpus.blocks import Limits
from megatron_prealign.data.indexed import open_indexed
from megatron_prealign.data.sidecar import load_sidecar
from megatron_prealign.data.word_bitmap import WordBitmap, words_path
from megatron_prealign.errors import UserError
from megatron_prealign.preprocess import run as module
from megatron_prealign.preprocess.run import PreprocessSettings, preprocess
from megatron_prealign.preprocess.train_tokenizer import train_tokenizer
from megatron_prealign.tokenizer.base import Tokenizer
from megatron_prealign.tokenizer.load import load_tokenizer
from megatron_prealign.tokenizer.segmenters import BUILT_IN, checked_word_starts, cut, open_segmenter, resolve_segmenter

PACKAGES = {
    "jieba": ("jieba",),
    "sudachi": ("sudachipy", "sudachidict_small"),
    "newmm": ("pythainlp",),
    "icu": ("icu4py",),
}
# 𠮷 and 😀 are two UTF-16 units each, so that offsets in another unit than characters show.
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
    # In a longer text, behind white space of all kinds and on other lines.
    for before in ("\n\n", " \t", "ab\r\n", "\u3000"):
        found = segmenter.word_starts(before + text + "\n" + text)
        assert {at + len(before) for at in expected} <= set(found)
        assert {at + len(before) + len(text) + 1 for at in expected} <= set(found)
        assert list(found) == sorted(set(found)) and found[-1] < len(before) + 2 * len(text) + 1
    assert list(segmenter.word_starts("")) in ([], [0])


def test_sudachi_takes_lines_longer_than_its_limit() -> None:
    need("sudachi")
    segmenter = open_segmenter("sudachi", "ja")
    sentence, before = "この章では説明した。", "。。。。"
    # The limit of 12,000 characters falls between 説 and 明, which are one word.
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
        # Sound marks are no punctuation: a word goes on behind them.
        ("。aーｂ\u3099ccc", ["。", "aーｂ\u3099c", "cc"]),
    ],
)
def test_long_text_is_cut_between_words(text: str, parts: list[str]) -> None:
    assert cut(text, 5) == parts


@pytest.mark.parametrize("name", BUILT_IN)
def test_missing_package_names_the_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in (*PACKAGES[name], "pythainlp.tokenize", "icu4py.breakers"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"segmenter {name}: .* pip install 'megatron-prealign\[segmenters\]'"):
        open_segmenter(name, "zh")


@pytest.mark.parametrize(
    "name, message",
    [
        ("jiba", "segmenter 'jiba': unknown; expected auto, jieba, sudachi, newmm, icu, or module:Class"),
        (":KnownWords", "unknown; expected"),
        ("support.word_cutters:", "unknown; expected"),
        ("no_such_module:X", "cannot be made .*No module named 'no_such_module'"),
        ("support.word_cutters:Missing", "cannot be made .*no attribute 'Missing'"),
        ("support.word_cutters:NoLanguage", "cannot be made .*takes no arguments"),
        (
            "support.word_cutters:Unreadable",
            r"segmenter support.word_cutters:Unreadable: cannot be made \(FileNotFoundError: .*'words.txt'\); expected",
        ),
        ("support.word_cutters:Mute", r"has no method word_starts\(text\)"),
    ],
)
def test_names_that_are_no_segmenter(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_segmenter(name, "zh")


def test_auto_goes_by_the_language() -> None:
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


def test_answers_of_a_segmenter_are_checked() -> None:
    class Given:
        def __init__(self, starts: object) -> None:
            self.starts = starts

        def word_starts(self, text: str) -> object:
            return self.starts

    for starts, expected in (([2, 0, 2], [0, 2]), ([], []), (np.array([1], np.uint8), [1]), ([3], [3])):
        found = checked_word_starts(Given(starts), "x", "abc", "f:1")
        assert found.tolist() == expected and found.dtype == np.int64
    for wrong in ([0, 4], [-1, 0], [0.5], ["a"]):
        with pytest.raises(UserError, match=r"f:1: segmenter x gave word starts from .* expected character offsets"):
            checked_word_starts(Given(wrong), "x", "abc", "f:1")


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
    # Merges across words and bytes of characters that it never saw: both kinds of tokens that are no whole words.
    train_tokenizer([path / "a.jsonl"], path / "tok", 340, show_progress=False)
    return path


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    return load_tokenizer(directory / "tok")


def expected_bits(tokenizer: Tokenizer, text: str) -> tuple[list[bool], int]:
    """By the rules, token by token over bytes: no two words glue, and only a character's first byte starts a word."""
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
    # Words do start inside of tokens here, or this would show little.
    assert inside > 20


def test_workers_do_not_change_the_bits(directory: Path, tmp_path: Path) -> None:
    need("jieba")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "我们学习"}\n{"text": ""}\nx\n', encoding="utf-8")
    for workers in (1, 2):
        # Small blocks, so that there are many more than can be in flight.
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
    # Made again without: nothing stays behind that belongs to other tokens.
    assert run(directory, tmp_path / "x", "--overwrite") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.bin", "x.idx", "x.json"]


@pytest.mark.parametrize(
    "segmenter, message",
    [
        ("none", "segmenter 'none': unknown"),
        (
            "support.word_cutters:OutOfRange",
            r"a\.jsonl:1: segmenter support.word_cutters:OutOfRange gave word starts from 0 to",
        ),
        (
            "support.word_cutters:Fractions",
            r"a\.jsonl:1: segmenter support.word_cutters:Fractions gave word starts from 0.0 to 0.5",
        ),
        (
            "support.word_cutters:Unreadable",
            "segmenter support.word_cutters:Unreadable: cannot be made .FileNotFoundError",
        ),
        (
            "support.word_cutters:Failing",
            r"a\.jsonl:1: segmenter support.word_cutters:Failing failed \(RuntimeError: model lost\), "
            "expected character",
        ),
    ],
)
def test_mistakes_leave_nothing(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], segmenter: str, message: str
) -> None:
    assert run(directory, tmp_path / "x", "--segmenter", segmenter) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and re.search(message, errors[0])
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
