"""Valid and broken dictionaries of every format."""

import gzip
import struct
from pathlib import Path

import pytest
from support.dictionary_files import COMPRESSIONS, read
from support.messages import user_error

from megatron_prealign.corpus.read_errors import ReadError
from megatron_prealign.corpus.streams import read_chunks
from megatron_prealign.dictionary.formats.articles import strip_markup, translations_of
from megatron_prealign.dictionary.formats.language_codes import same_language
from megatron_prealign.dictionary.readers import detect_file

LANGUAGES = Path(__file__).parents[1] / "data" / "languages"


@pytest.mark.parametrize("ending", COMPRESSIONS)
def test_compressed_lists(tmp_path, ending):
    path = tmp_path / f"list.tsv{ending}"
    path.write_bytes(COMPRESSIONS[ending](b"apple\tApfel\n" * 3))
    assert read(path)[0] == [("apple", "Apfel")] * 3
    if ending:
        complete = COMPRESSIONS[ending](b"".join(b"word%d\tWort%d\n" % (n, n) for n in range(50_000)))
        path.write_bytes(complete[: len(complete) // 2])
        readable = b""
        with pytest.raises(ReadError):
            for data, _ in read_chunks(str(path), ending[1:]):
                readable += data
        # The truncated line.
        line = readable.count(b"\n") + 1
        with user_error(f"{path}:{line}: truncated"):
            read(path, on_error="skip")


# dictd


def base64(number: int) -> str:
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    text = ""
    while True:
        number, digit = divmod(number, 64)
        text = digits[digit] + text
        if not number:
            return text


def write_dictd(directory: Path, articles: dict[str, str], *, compress: bool = True) -> Path:
    index, data = [], b""
    for headword, article in articles.items():
        index.append(f"{headword}\t{base64(len(data))}\t{base64(len(article.encode()))}\n")
        data += article.encode()
    (directory / "d.index").write_text("".join(index), encoding="utf-8")
    (directory / ("d.dict.dz" if compress else "d.dict")).write_bytes(gzip.compress(data) if compress else data)
    return directory / "d.index"


ARTICLES = {
    "00databaseinfo": "00-database-info\nSome words.\n\nAvailability:\n\n  Available under the GPL. Thanks to all.\n",
    "00databaseshort": "00-database-short\n     English-German test\n",
    "adams apple": "Adam's apple /ˈadəmz/ <n>\nAdamsapfel\n",
    "bank": 'bank /bæŋk/ <n>\n1. Bank [fin.], Kreditinstitut\n2. (river) Ufer; Böschung\n  "at the bank" - "am Ufer"\n'
    "Synonym: shore\n",
    "berlin": "Berlin\nBerlin\n",
    "empty": "empty\n<adj>\n",
}


@pytest.mark.parametrize("name", ["d.index", "d.dict.dz", "d.dict"])
def test_dictd(tmp_path, name):
    write_dictd(tmp_path, ARTICLES, compress=name.endswith("dz"))
    if not (tmp_path / name).exists():
        write_dictd(tmp_path, ARTICLES, compress=False)
    pairs, info, _ = read(tmp_path / name)
    assert pairs == [
        ("Adam's apple", "Adamsapfel"),
        *(("bank", word) for word in ("Bank", "Kreditinstitut", "Ufer", "Böschung")),
        ("Berlin", "Berlin"),
    ]
    assert (info.format, info.title) == ("dictd", "English-German test")
    assert info.licence == "Available under the GPL."
    assert sum(info.skipped.values()) == 1


FREEDICT = """00-database-dictfmt-1.13.0
English-Russian FreeDict Dictionary

Maintainer: [up for grabs]

Edition: 0.3.1
Size: 110 headwords

Availability:

    Copyright (C) 1999-2017 by various authors listed below.
    Available under the terms of the GNU General Public License ver. 2.0 and
  any later version.

Source(s):

  Home: http://freedict.org/ [http://freedict.org/] This Database was
  generated from ergane.

Changelog:

 * 2017-12-03 ver. 0.3.1:
   * update licencing stanza
"""


def test_dictd_of_freedict_has_the_pairs_of_its_list(tmp_path):
    """A list written in the form of FreeDict's files, with pronunciations, is read as the list itself."""
    expected, _, _ = read(LANGUAGES / "en-ru.tsv", "en-ru")
    translations: dict[str, list[str]] = {}
    for source, target in expected:
        translations.setdefault(source, []).append(target)
    articles = {
        source.casefold(): f"{source} /{source[:2]}/\n{', '.join(dict.fromkeys(targets))}\n"
        for source, targets in translations.items()
    }
    head = {"00databaseinfo": FREEDICT, "00databaseshort": "English-Russian FreeDict Dictionary\n"}
    pairs, info, errors = read(write_dictd(tmp_path, head | articles), "en-ru")
    assert pairs == list(dict.fromkeys(expected)) and len(pairs) > 100
    assert errors.count == 0 and "English-Russian FreeDict" in info.title and "GNU General Public" in info.licence


@pytest.mark.parametrize(
    ("index", "facts"),
    [
        ("bank\tA\n", ("d.index:1: ", "2 columns", "headword")),
        ("bank\tA\t!\n", ("d.index:1: ", "'A'", "'!'", "base 64")),
        ("bank\tA\tAAAAAAAAAAAAB\n", ("d.index:1: ", "'AAAAAAAAAAAAB'", "base 64")),
        ("bank\tA\tB//\n", ("d.index:1: ", "'bank'", "byte 8191", "d.dict.dz has ")),
        ("", ("d.index: the file is empty",)),
    ],
)
def test_broken_dictd(tmp_path, index, facts):
    write_dictd(tmp_path, ARTICLES)
    (tmp_path / "d.index").write_text(index)
    with user_error(*facts):
        read(tmp_path / "d.index")


def test_missing_or_corrupt_dictd_files(tmp_path):
    path = write_dictd(tmp_path, ARTICLES)
    data = (tmp_path / "d.dict.dz").read_bytes()
    (tmp_path / "d.dict.dz").write_bytes(data[: len(data) // 2])
    with user_error("d.dict.dz: truncated gzip data"):
        read(path)
    (tmp_path / "d.dict.dz").write_bytes(gzip.compress(b"\xff" * 1000))
    with user_error("d.index:1: ", "'00databaseinfo'", "UTF-8"):
        read(path)
    _, _, errors = read(path, on_error="skip")
    assert errors.count == len(ARTICLES)
    with user_error(path, "languages en-de-fr", "expected two", "dictd"):
        read(path, "en-de-fr")
    (tmp_path / "d.dict.dz").unlink()
    with user_error(path, "d.dict.dz or d.dict is missing"):
        read(path)
    path.unlink()
    write_dictd(tmp_path, ARTICLES)
    path.unlink()
    with user_error(tmp_path / "d.dict.dz", "d.index is missing"):
        read(tmp_path / "d.dict.dz")


# StarDict


def write_stardict(
    directory: Path,
    articles: dict[str, bytes],
    *,
    types: str = "m",
    synonyms: dict[str, int] | None = None,
    wide: bool = False,
    **changes: object,
) -> Path:
    index, data = b"", b""
    for headword, article in articles.items():
        index += headword.encode() + b"\0" + struct.pack(">QI" if wide else ">II", len(data), len(article))
        data += article
    values: dict[str, object] = {
        "version": "3.0.0",
        "bookname": "English-German",
        "wordcount": len(articles),
        "idxfilesize": len(index),
        "description": "Free for all. Licence: CC0.",
    }
    values |= {"sametypesequence": types} if types else {}
    values |= {"idxoffsetbits": 64} if wide else {}
    if synonyms is not None:
        values["synwordcount"] = len(synonyms)
        rows = [word.encode() + b"\0" + struct.pack(">I", place) for word, place in synonyms.items()]
        (directory / "s.syn").write_bytes(b"".join(rows))
    lines = [f"{key}={value}" for key, value in (values | changes).items() if value is not None]
    (directory / "s.ifo").write_text("StarDict's dict ifo file\n" + "\n".join(lines) + "\n")
    (directory / "s.idx").write_bytes(index)
    (directory / "s.dict").write_bytes(data)
    return directory / "s.ifo"


def test_stardict(tmp_path):
    articles = {"apple": b"n. Apfel\n", "go": b"1. gehen\n2. fahren, laufen"}
    write_stardict(tmp_path, articles, synonyms={"apples": 0, "went": 1})
    expected = [
        ("apple", "Apfel"),
        *(("go", word) for word in ("gehen", "fahren", "laufen")),
        ("apples", "Apfel"),
        *(("went", word) for word in ("gehen", "fahren", "laufen")),
    ]
    for name in ("s.ifo", "s.idx", "s.syn", "s.dict"):
        pairs, info, _ = read(tmp_path / name)
        assert pairs == expected
    assert (info.format, info.title, info.licence) == ("stardict", "English-German", "Licence: CC0.")
    # As distributed: the index and the articles are compressed.
    for name, compressed in (("s.idx", "s.idx.gz"), ("s.dict", "s.dict.dz")):
        (tmp_path / compressed).write_bytes(gzip.compress((tmp_path / name).read_bytes()))
        (tmp_path / name).unlink()
    assert read(tmp_path / "s.ifo")[0] == expected


def test_stardict_fields(tmp_path):
    """Articles with several fields: pronunciation, HTML, an image."""
    html = b"<k>apple</k><b>apple</b> <i>n.</i><ol><li>Apfel &amp; <ex>an apple</ex></li><li>Apfelbaum</li></ol>"
    write_stardict(tmp_path, {"apple": b"aepl\0" + html + b"\0" + b"\xff\xd8"}, types="thP", wide=True)
    assert read(tmp_path / "s.ifo")[0] == [("apple", "Apfel &"), ("apple", "Apfelbaum")]
    with_types = b"taepl\0" + b"W" + struct.pack(">I", 3) + b"\0\0\0" + b"mApfel\nApfelbaum\0"
    write_stardict(tmp_path, {"apple": with_types}, types="")
    assert read(tmp_path / "s.ifo")[0] == [("apple", "Apfel"), ("apple", "Apfelbaum")]


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"idxfilesize": 999}, ("s.idx: ", "14 bytes", "expected 999")),
        ({"idxfilesize": 5}, ("s.idx: ", "14 bytes or more", "expected 5")),
        ({"wordcount": 2}, ("s.idx: ", "1 headwords", "expected 2")),
        ({"wordcount": None}, ("s.ifo: ", "wordcount is None", "expected a number")),
        ({"version": "9"}, ("s.ifo: ", "version '9'", "2.4.2 or 3.0.0")),
        ({"idxoffsetbits": 48}, ("s.ifo: ", "idxoffsetbits is 48")),
        ({"sametypesequence": "?"}, ("'apple': ", "field type '?'", "expected a letter")),
        ({"synwordcount": 3}, ("s.syn: ", "1 headwords", "expected 3")),
    ],
)
def test_broken_stardict(tmp_path, changes, facts):
    path = write_stardict(tmp_path, {"apple": b"Apfel"}, synonyms={"apples": 0}, **changes)
    with user_error(*facts):
        read(path)


def test_stardict_files_that_do_not_match(tmp_path):
    path = write_stardict(tmp_path, {"apple": b"Apfel", "pear": b"Birne"}, synonyms={"apples": 7})
    with user_error("s.syn: ", "'apples'", "headword 7", "below 2"):
        read(path)
    (tmp_path / "s.syn").unlink()
    (tmp_path / "s.dict").write_bytes(b"Apfel")
    with user_error("s.ifo:'pear': ", "byte 10", "5 bytes", "s.dict"):
        read(path)
    pairs, _, errors = read(path, on_error="skip")
    assert pairs == [("apple", "Apfel")] and errors.count == 1
    (tmp_path / "s.dict").write_bytes(b"\xff" * 10)
    with user_error("s.ifo:'apple': ", "invalid start byte"):
        read(path)
    (tmp_path / "s.ifo").write_text("hello\n")
    with user_error("s.ifo:1: ", "'hello'", "not a StarDict file"):
        read(path)
    (tmp_path / "s.idx").write_bytes(b"apple\0\0")
    write_stardict(tmp_path, {"apple": b"Apfel"}, idxfilesize=7)
    (tmp_path / "s.idx").write_bytes(b"apple\0\0")
    with user_error("s.idx: ", "last headword, at byte 0,"):
        read(path)
    (tmp_path / "s.idx").unlink()
    with user_error(path, "s.idx is missing"):
        read(path)


# Format detection


@pytest.mark.parametrize(
    ("name", "content", "format"),
    [
        ("a.CSV.gz", b"", "csv"),
        ("a.u8", b"# CC-CEDICT\n", "cedict"),
        ("a.txt", "一 一 [yi1] /one/\n".encode(), "cedict"),
        ("a.jsonl", b'{"src_text": "a", "tgt_text": "b"}\n', "auto"),
        ("a.jsonl", b'{"word": "a", "senses": []}\n', "wiktextract"),
        ("a.jsonl", b'{"senses": [], "lang_code": "en", ' + b" " * 70_000 + b'"word": "a"}\n', "wiktextract"),
        ("a.ifo", b"", "stardict"),
        ("expr.csv.zst", b"", "panlex"),
        ("a.mdx", b"", "pyglossary"),
        ("a", b"apple\tApfel\n", "auto"),
    ],
)
def test_detection(tmp_path, name, content, format):
    (tmp_path / name).write_bytes(content)
    assert detect_file(tmp_path / name) == format


def test_binary_and_utf16_files(tmp_path):
    (tmp_path / "a").write_bytes(b"\x7fELF\0\0")
    with user_error(tmp_path / "a", "unknown format", "--format"):
        read(tmp_path / "a")
    (tmp_path / "a").write_bytes("apple\tApfel\n".encode("utf-16"))
    with user_error(f"{tmp_path}/a:1: ", "UTF-16", "UTF-8"):
        read(tmp_path / "a")


def test_too_long_line(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_prealign.dictionary.formats.base.MAX_LINE_BYTES", 1000)
    monkeypatch.setattr("megatron_prealign.dictionary.formats.base.BLOCK_BYTES", 1000)
    (tmp_path / "a").write_bytes(b"a\tb\n" + b"x" * 5000)
    with user_error(f"{tmp_path}/a:2: ", "more than 0 MiB"):
        read(tmp_path / "a")


# Articles


@pytest.mark.parametrize(
    ("article", "expected"),
    [
        ("house\nHaus (n); Gebäude [arch. [old]]", ["Haus", "Gebäude"]),
        ("house /haʊs/ n. Haus", ["Haus"]),
        ("House: Haus, Heim / Wohnung", ["Haus", "Heim", "Wohnung"]),
        ("1) Haus\n2) b) Bau.\n• Heim", ["Haus", "Bau", "Heim"]),
        ("see also: home\n“a house” ein Haus", []),
        ("a long explanation that is no word at all but a text", []),
        ("household\nHaushalt", ["household", "Haushalt"]),
        ("房子；家，住宅、楼", ["房子", "家", "住宅", "楼"]),
        ("", []),
        ("123", []),
    ],
)
def test_articles(article, expected):
    assert translations_of(article, "house")[1] == expected


def test_plain_text_with_html_and_merged_articles(tmp_path):
    write_dictd(tmp_path, {"bank": "bank /bæŋk/<br />Bank (&lt;Geld&gt;)<br/>bank /bæŋk/<br>Ufer\n"})
    assert read(tmp_path / "d.index")[0] == [("bank", "Bank"), ("bank", "Ufer")]
    write_stardict(tmp_path, {"00databaseurl": b"http://x", "computer": b"computer [x]<br/>Computer"})
    assert read(tmp_path / "s.ifo")[0] == [("computer", "Computer")]


def test_headwords_as_spelled_in_the_article():
    assert translations_of("Berlin /bə:lin/\nBerlin", "berlin")[0] == "Berlin"
    assert translations_of("up‐to‐date /x/\naktuell", "uptodate")[0] == "up‐to‐date"
    assert translations_of("Stadt", "berlin")[0] == "berlin"
    # Six words count as a phrase, seven as an explanation.
    assert translations_of("a b c d e f\na b c d e f g", "x")[1] == ["a b c d e f"]


def test_markup():
    assert translations_of(strip_markup("<b>a</b><br/>x &lt;y&gt;<p>z", "h"), "a")[1] == ["x", "z"]
    assert strip_markup("''x'' [[Haus|ein Haus]] [[Heim]]", "w") == "x ein Haus Heim"


def test_codes_of_one_language():
    assert same_language("zh_hant") == {"zh", "zho", "cmn"}
    assert "de" in same_language("deu") and same_language("XX") == {"xx"}
