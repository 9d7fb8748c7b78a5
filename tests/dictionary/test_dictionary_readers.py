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


def read_weights(path: Path, *, format: str = "auto", on_error: str = "stop") -> list[tuple[str, str, float]]:
    source = DictionaryInput(path=path, languages=("en", "de"), format=format, weights=True)
    entries: list[tuple[str, str, float]] = []
    for block in read_entries(source, ReadErrors(), on_error):
        entries += zip(*block.columns, block.weights or [1.0] * len(block.columns[0]), strict=True)
    return entries


@pytest.mark.parametrize(
    ("name", "text", "languages", "expected"),
    [
        ("a.tsv", "apple\tApfel\nriver bank\tdas Ufer\n", "en-de", [["apple", "Apfel"], ["river bank", "das Ufer"]]),
        ("a.txt", "apple Apfel\nhouse  Haus\n", "en-de", [["apple", "Apfel"], ["house", "Haus"]]),
        ("muse.txt", "apple\tApfel\n", "en-de", [["apple", "Apfel"]]),
        ("three.tsv", "apple\tder Apfel\tpomme\n", "en-de-fr", [["apple", "der Apfel", "pomme"]]),
        ("three.txt", "apple Apfel pomme\n", "en-de-fr", [["apple", "Apfel", "pomme"]]),
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
        (b"a\tb\tc\td\te\tf\tg\n", "got 7 columns, expected 2"),
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
    with pytest.raises(UserError, match="cannot be opened .No such file"):
        read(tmp_path / "none.tsv")
    (tmp_path / "empty.tsv").write_text("\n \n")
    with pytest.raises(UserError, match="the file is empty"):
        read(tmp_path / "empty.tsv")
    (tmp_path / "cut.tsv.gz").write_bytes(gzip.compress(b"apple\tApfel\n" * 50_000)[:-20])
    with pytest.raises(UserError, match=r"cut\.tsv\.gz:\d+: the gzip data ends too early"):
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
    with pytest.raises(UserError, match="--input a.tsv:en: no languages given, expected .* such as a.tsv:en-de,"):
        parse_input("a.tsv:en")
    with pytest.raises(UserError, match="two or more different codes"):
        parse_input("a.tsv:en-en")


ODD_LINES = [
    *(b"apple\tApfel", b"house\tHaus", b"", b" \t \v", b"red\trot\r", b"caf\xe9\tKaffee", b"one"),
    b"blue\tblau\r\r",
    *(b"a\tb\tc", "été\tSommer".encode(), b"\tApfel", b"apple\t", b"x\r y\tz", b"\xef\xbb\xbfbank\tBank"),
]


@pytest.mark.parametrize("block", [1, 40, 1 << 20])
def test_blocks_of_lines_read_like_lines(tmp_path, monkeypatch, block):
    """Regular blocks take another way than odd ones; entries, numbers and messages must not show it."""
    monkeypatch.setattr("megatron_prealign.dictionary.formats.base.BLOCK_BYTES", block)
    regular = [b"word%d\twort%d" % (number, number) for number in range(20)]
    lines = [regular[0], *(line for odd in ODD_LINES for line in (odd, *regular))]
    (tmp_path / "a.tsv").write_bytes(b"\n".join(lines))
    entries, errors = read(tmp_path / "a.tsv", on_error="skip")
    good = [line for line in lines if line.count(b"\t") == 1 and b"\xe9" not in line and line.strip()]
    assert entries == [line.decode().rstrip("\r").split("\t") for line in good]
    bad = [number for number, line in enumerate(lines, start=1) if line in (b"caf\xe9\tKaffee", b"one", b"a\tb\tc")]
    assert [message.split(": ")[0] for message in errors.first] == [f"{tmp_path}/a.tsv:{number}" for number in bad]
    # A file that is regular from end to end, compressed and not.
    for data in (b"\n".join(regular), gzip.compress(b"\r\n".join(regular) + b"\r\n")):
        (tmp_path / "b.tsv").write_bytes(data)
        assert read(tmp_path / "b.tsv")[0] == [line.decode().split("\t") for line in regular]


def test_weights(tmp_path):
    path = tmp_path / "list"
    expected = [("apple", "Apfel", 0.5), ("house", "Haus", 3.0)]
    path.write_text("apple\tApfel\t0.5\nhouse\tHaus\t3\n")
    assert read_weights(path) == expected
    path.write_text("apple Apfel 0.5\nhouse Haus 3e0\n")
    assert read_weights(path) == expected
    # JSON needs no option; what has no weight has 1.
    path.write_text('{"src_text": "apple", "tgt_text": "Apfel", "weight": 0.5}\n{"src_text": "a", "tgt_text": "b"}\n')
    assert read_weights(path) == [("apple", "Apfel", 0.5), ("a", "b", 1.0)]
    blocks = list(read_entries(DictionaryInput(path=path, languages=("en", "de")), ReadErrors()))
    assert [block.weights for block in blocks] == [[0.5, 1.0]]
    path.write_text('{"words": "apple$Apfel", "weight": 2}\n')
    assert read_weights(path) == [("apple", "Apfel", 2.0)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("red\trot", "got 2 columns, expected 3 separated by one tab each, the last a weight"),
        ("red\trot\t", "the weight is '', expected a number above 0 (1e-30 to 1e+30)"),
        ("red\trot\tmuch", "the weight is 'much', expected"),
        ("red\trot\t0", "the weight is '0', expected"),
        ("red\trot\t-1", "the weight is '-1', expected"),
        ("red\trot\tnan", "the weight is 'nan', expected"),
        ("red\trot\tinf", "the weight is 'inf', expected"),
        ("red\trot\t1e-46", "the weight is '1e-46', expected"),
    ],
)
def test_bad_weights_name_file_and_line(tmp_path, line, message):
    path = tmp_path / "a.tsv"
    path.write_text(f"apple\tApfel\t1\n{line}\nhouse\tHaus\t2\n")
    with pytest.raises(UserError, match=re.escape(f"{path}:2: {message}")):
        read_weights(path)
    assert read_weights(path, on_error="skip") == [("apple", "Apfel", 1.0), ("house", "Haus", 2.0)]


@pytest.mark.parametrize("value", ["0", '"0.5"', "true", "null", "[]", "1" + "0" * 400])
def test_bad_weights_in_json(tmp_path, value):
    path = tmp_path / "a.jsonl"
    path.write_text('{"src_text": "apple", "tgt_text": "Apfel", "weight": ' + value + "}\n")
    with pytest.raises(UserError, match=re.escape(f"{path}:1: the weight is ")):
        read(path)
