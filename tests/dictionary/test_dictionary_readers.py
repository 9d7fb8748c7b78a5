"""Valid and malformed word lists."""

import gzip
from pathlib import Path

import pytest
from support.messages import assert_facts, user_error

from megatron_prealign.dictionary.readers import DictionaryInput, ReadErrors, parse_input, read_entries


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
def test_formats_are_detected_by_content(tmp_path, name, text, languages, expected, compressed):
    data = text.encode()
    # Compression is detected from the content, not from the name.
    (tmp_path / name).write_bytes(gzip.compress(data) if compressed else data)
    entries, errors = read(tmp_path / name, languages)
    assert entries == expected
    assert errors.count == 0


@pytest.mark.parametrize(
    ("bad", "facts"),
    [
        (b"apple\n", ("1 column", "expected 2")),
        (b"apple\tApfel\tnoun\n", ("3 columns", "expected 2")),
        (b"a\tb\tc\td\te\tf\tg\n", ("7 columns", "expected 2")),
        (b"caf\xe9\tKaffee\n", ("UTF-8",)),
    ],
)
def test_bad_lines_name_file_and_line(tmp_path, bad, facts):
    path = tmp_path / "a.tsv"
    path.write_bytes(b"house\tHaus\n\n" + bad + b"red\trot\n")
    with user_error(f"{path}:3: ", *facts, "--on-error skip"):
        read(path)
    entries, errors = read(path, on_error="skip")
    assert entries == [["house", "Haus"], ["red", "rot"]]
    assert errors.count == 1
    assert_facts(errors.first[0], f"{path}:3: ", *facts)


@pytest.mark.parametrize(
    ("line", "facts"),
    [
        ("not json", ("not valid JSON", "Expecting value at column 1")),
        ('{"source": "apple"}', ('"src_text" is missing', "['source']")),
        ('{"src_text": "apple", "tgt_text": 3}', ('"tgt_text" is 3', "expected a string")),
        (r'{"src_text": "a\ud83d", "tgt_text": "b"}', (r""""src_text" is 'a\ud83d'""", "surrogate")),
        ('["apple"]', ("JSON list", "expected an object")),
    ],
)
def test_bad_json(tmp_path, line, facts):
    path = tmp_path / "a.jsonl"
    path.write_text('{"src_text": "house", "tgt_text": "Haus"}\n' + line + "\n")
    with user_error(f"{path}:2: ", *facts):
        read(path)


def test_words_must_match_the_languages(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"words": "bank $ Bank $ banque"}\n')
    with user_error(f"{path}:1: ", "3 words", "expected 2 (en-de)"):
        read(path)


def test_missing_empty_and_truncated_files(tmp_path):
    with user_error(tmp_path / "none.tsv", "No such file"):
        read(tmp_path / "none.tsv")
    (tmp_path / "empty.tsv").write_text("\n \n")
    with user_error(f"{tmp_path / 'empty.tsv'}: the file is empty"):
        read(tmp_path / "empty.tsv")
    truncated = tmp_path / "cut.tsv.gz"
    truncated.write_bytes(gzip.compress(b"apple\tApfel\n" * 50_000)[:-20])
    with user_error(f"{truncated}:", "truncated gzip data") as caught:
        read(truncated, on_error="skip")
    assert str(caught.value).removeprefix(f"{truncated}:").partition(":")[0].isdigit()


def test_format_option_overrides_detection(tmp_path):
    (tmp_path / "a.txt").write_text("the apple\tder Apfel\n")
    with user_error(f"{tmp_path}/a.txt:1: ", "4 columns", "expected 2", "space"):
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
    # A colon in the name of an existing file is not a suffix.
    odd = tmp_path / "a:b-c"
    odd.write_text("x\ty\n")
    assert parse_input(str(odd), "en-de").path == odd
    with user_error("--input a.tsv: ", "languages", "a.tsv:en-de"):
        parse_input("a.tsv")
    with user_error("--input a.tsv:en: ", "languages", "a.tsv:en-de", "--languages"):
        parse_input("a.tsv:en")
    with user_error("--input a.tsv:en-en: ", "'en-en'", "two or more different codes"):
        parse_input("a.tsv:en-en")


ODD_LINES = [
    *(b"apple\tApfel", b"house\tHaus", b"", b" \t \v", b"red\trot\r", b"caf\xe9\tKaffee", b"one"),
    b"blue\tblau\r\r",
    *(b"a\tb\tc", "été\tSommer".encode(), b"\tApfel", b"apple\t", b"x\r y\tz", b"\xef\xbb\xbfbank\tBank"),
]


@pytest.mark.parametrize("block", [1, 40, 1 << 20])
def test_blocks_of_lines_read_like_lines(tmp_path, monkeypatch, block):
    """Regular and irregular blocks take different code paths with the same entries, line numbers and messages."""
    monkeypatch.setattr("megatron_prealign.dictionary.formats.base.BLOCK_BYTES", block)
    regular = [b"word%d\twort%d" % (number, number) for number in range(20)]
    lines = [regular[0], *(line for odd in ODD_LINES for line in (odd, *regular))]
    (tmp_path / "a.tsv").write_bytes(b"\n".join(lines))
    entries, errors = read(tmp_path / "a.tsv", on_error="skip")
    good = [line for line in lines if line.count(b"\t") == 1 and b"\xe9" not in line and line.strip()]
    assert entries == [line.decode().rstrip("\r").split("\t") for line in good]
    bad = [number for number, line in enumerate(lines, start=1) if line in (b"caf\xe9\tKaffee", b"one", b"a\tb\tc")]
    assert [message.split(": ")[0] for message in errors.first] == [f"{tmp_path}/a.tsv:{number}" for number in bad]
    # A regular file, compressed and uncompressed.
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
    # JSON needs no option; the default weight is 1.
    path.write_text('{"src_text": "apple", "tgt_text": "Apfel", "weight": 0.5}\n{"src_text": "a", "tgt_text": "b"}\n')
    assert read_weights(path) == [("apple", "Apfel", 0.5), ("a", "b", 1.0)]
    blocks = list(read_entries(DictionaryInput(path=path, languages=("en", "de")), ReadErrors()))
    assert [block.weights for block in blocks] == [[0.5, 1.0]]
    path.write_text('{"words": "apple$Apfel", "weight": 2}\n')
    assert read_weights(path) == [("apple", "Apfel", 2.0)]


@pytest.mark.parametrize(
    ("line", "facts"),
    [
        ("red\trot", ("2 columns", "expected 3", "tab", "weight")),
        ("red\trot\t", ("weight ''", "above 0", "1e-30 to 1e+30")),
        ("red\trot\tmuch", ("weight 'much'",)),
        ("red\trot\t0", ("weight '0'",)),
        ("red\trot\t-1", ("weight '-1'",)),
        ("red\trot\tnan", ("weight 'nan'",)),
        ("red\trot\tinf", ("weight 'inf'",)),
        ("red\trot\t1e-46", ("weight '1e-46'",)),
    ],
)
def test_bad_weights_name_file_and_line(tmp_path, line, facts):
    path = tmp_path / "a.tsv"
    path.write_text(f"apple\tApfel\t1\n{line}\nhouse\tHaus\t2\n")
    with user_error(f"{path}:2: ", *facts):
        read_weights(path)
    assert read_weights(path, on_error="skip") == [("apple", "Apfel", 1.0), ("house", "Haus", 2.0)]


@pytest.mark.parametrize("value", ["0", '"0.5"', "true", "null", "[]", "1" + "0" * 400])
def test_bad_weights_in_json(tmp_path, value):
    path = tmp_path / "a.jsonl"
    path.write_text('{"src_text": "apple", "tgt_text": "Apfel", "weight": ' + value + "}\n")
    with user_error(f"{path}:1: got weight "):
        read(path)


@pytest.mark.parametrize("text", ["en\tde\nen\tde\n", "\nEnglish\tGerman\nen\tde\n", "eng deu\r\nen de\r\n"])
def test_a_header_with_the_languages_is_skipped(tmp_path, text):
    (tmp_path / "list.txt").write_text(text)
    # Only the first line is a header.
    assert read(tmp_path / "list.txt")[0] == [["en", "de"]]


@pytest.mark.parametrize("header", ["english\tfrench", "German\tEnglish", "de\ten", "english\tgerman\tfrench"])
def test_a_header_with_other_languages(tmp_path, header):
    path = tmp_path / "list.tsv"
    path.write_text(f"{header}\napple\tpomme\n")
    for on_error in ("stop", "skip"):
        with user_error(f"{path}:1: ", "header", ", ".join(header.split("\t")), "languages en-de"):
            read(path, on_error=on_error)


@pytest.mark.parametrize("line", ["to\tzu", "polish\tpolieren", "german\tgerman", "de\tda"])
def test_words_that_are_also_codes_or_names_of_languages(tmp_path, line):
    (tmp_path / "list.tsv").write_text(f"{line}\napple\tApfel\n")
    assert read(tmp_path / "list.tsv")[0] == [line.split("\t"), ["apple", "Apfel"]]
