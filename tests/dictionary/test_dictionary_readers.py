"""Word lists of every format, and broken ones."""

import gzip
import re
from pathlib import Path

import pytest

from megatron_prealign.dictionary.readers import DictionaryInput, ReadErrors, parse_input, read_entries
from megatron_prealign.errors import UserError


def read(path: Path, languages: str = "en-de", *, format: str = "auto", on_error: str = "stop"):
    errors = ReadErrors()
    source = DictionaryInput(path=path, languages=tuple(languages.split("-")), format=format)
    blocks = list(read_entries(source, errors, on_error))
    return [list(entry) for block in blocks for entry in zip(*block.columns, strict=True)], errors


@pytest.mark.parametrize(
    ("name", "text", "languages", "expected"),
    [
        ("a.tsv", "apple\tApfel\nriver bank\tdas Ufer\n", "en-de", [["apple", "Apfel"], ["river bank", "das Ufer"]]),
        ("a.txt", "apple Apfel\nhouse  Haus\n", "en-de", [["apple", "Apfel"], ["house", "Haus"]]),
        ("muse.txt", "apple\tApfel\n", "en-de", [["apple", "Apfel"]]),
        ("a.jsonl", '{"src_text": "apple", "tgt_text": "苹果"}\n', "en-zh", [["apple", "苹果"]]),
        ("a.json", '{"words": "bank $ 银行 $ banque"}\n', "en-zh-fr", [["bank ", " 银行 ", " banque"]]),
        ("crlf.tsv", "\n\r\napple\tApfel\r\n\n", "en-de", [["apple", "Apfel"]]),
        ("bom.tsv", "\ufeffapple\tApfel", "en-de", [["apple", "Apfel"]]),
    ],
)
@pytest.mark.parametrize("compressed", [False, True])
def test_formats_are_told_by_content(tmp_path, name, text, languages, expected, compressed):
    data = text.encode()
    # The name says nothing about compression: the content does.
    (tmp_path / name).write_bytes(gzip.compress(data) if compressed else data)
    entries, errors = read(tmp_path / name, languages)
    assert entries == expected
    assert errors.count == 0


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (b"apple\n", "got 1 column, expected 2"),
        (b"apple\tApfel\tnoun\n", "got 3 columns, expected 2"),
        (b"caf\xe9\tKaffee\n", "not valid UTF-8"),
    ],
)
def test_bad_lines_name_file_and_line(tmp_path, bad, message):
    path = tmp_path / "a.tsv"
    path.write_bytes(b"house\tHaus\n\n" + bad + b"red\trot\n")
    with pytest.raises(UserError, match=re.escape(f"{path}:3: {message}")):
        read(path)
    entries, errors = read(path, on_error="skip")
    assert entries == [["house", "Haus"], ["red", "rot"]]
    assert errors.count == 1 and errors.first[0].startswith(f"{path}:3: {message}")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", ":2: not JSON (Expecting value at column 1)"),
        ('{"source": "apple"}', ":2: no \"src_text\" among the keys ['source']"),
        ('{"src_text": "apple", "tgt_text": 3}', ':2: "tgt_text" is 3, expected a string'),
        (
            r'{"src_text": "a\ud83d", "tgt_text": "b"}',
            r""":2: "src_text" is 'a\ud83d', which holds half of a \u pair""",
        ),
        ('["apple"]', ":2: got a JSON list, expected an object"),
    ],
)
def test_bad_json(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text('{"src_text": "house", "tgt_text": "Haus"}\n' + line + "\n")
    with pytest.raises(UserError, match=re.escape(f"{path}{message}")):
        read(path)


def test_words_must_match_the_languages(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"words": "bank $ Bank $ banque"}\n')
    with pytest.raises(UserError, match=re.escape(f"{path}:1: got 3 words, expected 2 (en-de)")):
        read(path)


def test_whole_files(tmp_path):
    with pytest.raises(UserError, match="cannot read this dictionary file: No such file"):
        read(tmp_path / "none.tsv")
    (tmp_path / "empty.tsv").write_text("\n \n")
    with pytest.raises(UserError, match="the file is empty"):
        read(tmp_path / "empty.tsv")
    (tmp_path / "cut.tsv.gz").write_bytes(gzip.compress(b"apple\tApfel\n" * 50_000)[:-20])
    with pytest.raises(UserError, match=r"cut\.tsv\.gz:\d+: the gzip archive is damaged or cut off"):
        read(tmp_path / "cut.tsv.gz", on_error="skip")


def test_a_forced_format_wins(tmp_path):
    (tmp_path / "a.txt").write_text("the apple\tder Apfel\n")
    with pytest.raises(UserError, match="got 4 columns, expected 2 words separated by a space"):
        read(tmp_path / "a.txt", format="space")


def test_only_the_first_hundred_errors_are_listed(tmp_path):
    (tmp_path / "a.tsv").write_text("apple\tApfel\n" + "bad\n" * 130)
    entries, errors = read(tmp_path / "a.tsv", on_error="skip")
    assert (len(entries), errors.count, len(errors.first)) == (1, 130, 100)


def test_input_with_languages(tmp_path):
    assert parse_input("lists/a.tsv:en-de").languages == ("en", "de")
    assert parse_input("a.jsonl:en-zh-fr").path == Path("a.jsonl")
    assert parse_input("a.tsv:en-en_clone").languages == ("en", "en_clone")
    assert parse_input("a.tsv", "en-de").languages == ("en", "de")
    # A colon that belongs to an existing file's name is no suffix.
    odd = tmp_path / "a:b-c"
    odd.write_text("x\ty\n")
    assert parse_input(str(odd), "en-de").path == odd
    with pytest.raises(UserError, match="no languages given"):
        parse_input("a.tsv")
    with pytest.raises(UserError, match="two or more different codes"):
        parse_input("a.tsv:en-en")
