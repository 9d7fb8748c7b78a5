"""Text dictionaries with one entry per line (CC-CEDICT, Wiktextract, PanLex, CSV), and pyglossary."""

import csv
import gzip
import io
import json
import sys
from pathlib import Path

import pytest
from support.dictionary_files import COMPRESSIONS, read
from support.messages import user_error

# CC-CEDICT

CEDICT = """# CC-CEDICT
# Community maintained free Chinese-English dictionary.
#! version=1
#! license=https://creativecommons.org/licenses/by-sa/4.0/
學習 学习 [xue2 xi2] /to learn; to study/
銀行 银行 [yin2 hang2] /bank/CL:家[jia1],個|个[ge4]/
台 台 [tai2] /(classical) you (in letters)/Tai, cf. 臺/variant of 臺|台[tai2]/
"""


def test_cedict(tmp_path):
    path = tmp_path / "cedict_ts.u8"
    path.write_text(CEDICT, encoding="utf-8")
    pairs, info, _ = read(path, "zh-en")
    assert pairs == [("学习", "learn"), ("学习", "study"), ("银行", "bank"), ("台", "you")]
    assert info.format == "cedict" and info.licence == "https://creativecommons.org/licenses/by-sa/4.0/"
    assert info.skipped["glosses that point to other entries"] == 2
    assert read(path, "zh_hant-en")[0][2] == ("銀行", "bank")
    # Reference markers that are also ordinary words.
    glosses = "to see/see 看見|看见[kan4 jian4]/equivalent to/equivalent to 見|见[jian4]/used in 看護|看护[kan1 hu4]"
    path.write_text(f"看 看 [kan4] /{glosses}/\n", encoding="utf-8")
    pairs, info, _ = read(path, "zh-en")
    assert pairs == [("看", "see"), ("看", "equivalent to")]
    assert info.skipped["glosses that point to other entries"] == 3
    path.write_text("看 看 [kan4] /voir/voir aussi 見|见[jian4]/\n", encoding="utf-8")
    assert read(path, "zh-fr")[0] == [("看", "voir")]
    # Sister projects in other languages, and a file without a header.
    path.write_text("銀行 银行 [yin2 hang2] /Bank (S)/to go/\n", encoding="utf-8")
    assert read(path, "zh-de")[0] == [("银行", "Bank"), ("银行", "to go")]
    path.write_text(CEDICT + "銀行 银行 /bank/\n", encoding="utf-8")
    with user_error("cedict_ts.u8:8: ", "'銀行 银行 /bank/'", "TRADITIONAL SIMPLIFIED"):
        read(path, "zh-en")


# Wiktextract

WIKTEXTRACT = [
    {
        "word": "bank",
        "lang_code": "en",
        "pos": "noun",
        "translations": [
            {"code": "de", "word": "Bank"},
            {"code": "cmn", "word": "銀行"},
            {"code": "fr", "word": "banque"},
        ],
        "senses": [
            {"glosses": ["edge of river"], "translations": [{"lang_code": "de", "word": "Ufer"}, {"code": "de"}]}
        ],
    },
    {"word": "Bank", "lang_code": "de", "pos": "noun", "senses": [{"glosses": ["seat", "bench, long seat"]}]},
    {
        "word": "gehen",
        "lang_code": "de",
        "pos": "verb",
        "senses": [
            {"glosses": ["to go, to walk (on foot)"]},
            {"glosses": ["past of something"], "tags": ["form-of"]},
            {"glosses": ["a rather long explanation of what the word may mean somewhere"]},
        ],
    },
]


def test_wiktextract(tmp_path):
    path = tmp_path / "extract.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(json.dumps(record) for record in WIKTEXTRACT).encode()))
    pairs, info, _ = read(path, "en-de-zh")
    assert pairs == [("bank", "Bank", "de"), ("bank", "Ufer", "de"), ("bank", "銀行", "zh")]
    assert info.format == "wiktextract" and "CC BY-SA" in info.licence
    assert info.skipped["entries on words of another language"] == 2
    pairs, info, _ = read(path, "de-en", format="wiktextract-glosses")
    assert pairs == [
        (*pair, "en") for pair in (("Bank", "bench"), ("Bank", "long seat"), ("gehen", "go"), ("gehen", "walk"))
    ]
    assert info.skipped["glosses that are explanations or point to other entries"] == 2


@pytest.mark.parametrize(
    ("line", "facts"),
    [
        ('{"word": "a", "lang_code": "en", "senses": [', ("not valid JSON",)),
        ('["bank"]', ("JSON list", "expected an object")),
        ('{"word": 3, "lang_code": "en"}', ('"word" is 3', "expected a string")),
        ('{"word": "bank"}', ('"lang_code" is None',)),
    ],
)
def test_broken_wiktextract(tmp_path, line, facts):
    path = tmp_path / "extract.jsonl"
    path.write_text(json.dumps(WIKTEXTRACT[0]) + "\n" + line + "\n")
    with user_error(f"{path}:2: ", *facts):
        read(path)
    pairs, _, errors = read(path, on_error="skip")
    assert len(pairs) == 2 and errors.count == 1


def test_wiktextract_in_two_chinese_scripts(tmp_path):
    path = tmp_path / "extract.jsonl"
    translations = [
        {"code": "cmn", "word": "銀行 /银行"},
        {"code": "zh", "word": "堤", "tags": ["Traditional-Chinese", "Simplified-Chinese"]},
        {"code": "zh", "word": "岸邊", "tags": ["Traditional-Chinese"]},
        {"code": "zh", "word": "水"},
    ]
    path.write_text(json.dumps({"word": "bank", "lang_code": "en", "pos": "noun", "translations": translations}) + "\n")
    assert [pair[1] for pair in read(path, "en-zh")[0]] == ["银行", "堤", "水"]
    assert [pair[1] for pair in read(path, "en-zh_hant")[0]] == ["銀行", "堤", "岸邊", "水"]


def test_wiktextract_with_unexpected_types(tmp_path):
    path = tmp_path / "extract.jsonl"
    odd = {"word": "a", "lang_code": "en", "senses": "x", "translations": [3, {"code": 4, "word": "b"}, {"code": "de"}]}
    path.write_text(json.dumps(WIKTEXTRACT[0]) + "\n" + json.dumps(odd) + "\n" + '{"redirect": "b", "title": "a"}\n')
    assert len(read(path)[0]) == 2


# PanLex


def write_panlex(directory: Path, ending: str = "") -> Path:
    tables = {
        "langvar": [["id", "lang_code", "var_code"], [187, "eng", 0], [157, "deu", 0], [1627, "cmn", 0], [9, "cmn", 1]],
        "expr": [
            ["id", "langvar", "txt", "txt_degr"],
            *([1, 187, "bank", "bank"], [2, 157, "Bank", "bank"], [3, 157, "Ufer", "ufer"]),
            *([4, 1627, "银行", ""], [5, 9, "銀行", ""], [6, 187, "shore, coast", ""], [7, 157, "ungesagt", ""]),
        ],
        "denotation": [
            ["id", "meaning", "expr"],
            *([1, 100, 1], [2, 100, 3], [3, 101, 1], [4, 101, 2], [5, 102, 1], [6, 102, 2]),
            *([7, 102, 4], [8, 102, 5], [9, 103, 6], [10, 103, 3], [11, 104, 7], [12, 105, 99]),
        ],
    }
    for name, rows in tables.items():
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        (directory / f"{name}.csv{ending}").write_bytes(COMPRESSIONS[ending](text.getvalue().encode()))
    return directory


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_panlex(tmp_path, ending):
    write_panlex(tmp_path, ending)
    for path in (tmp_path, tmp_path / f"expr.csv{ending}"):
        assert read(path, "en-de-zh")[0] == [
            ("bank", "Bank", 2.0, "de"),
            ("bank", "Ufer", 1.0, "de"),
            ("shore, coast", "Ufer", 1.0, "de"),
            ("bank", "银行", 1.0, "zh"),
        ]
    assert read(tmp_path, "de-zh_hant")[0] == [("Bank", "銀行", 1.0, "zh_hant")]
    assert read(tmp_path, "de-cmn_001")[0] == [("Bank", "銀行", 1.0, "cmn_001")]
    with user_error(tmp_path, "langvar.csv", "no variety of fr;"):
        read(tmp_path, "en-fr")


def test_broken_panlex(tmp_path):
    write_panlex(tmp_path)
    good = (tmp_path / "denotation.csv").read_text()
    for bad in ("13,x,1", "13,1", ",,"):
        (tmp_path / "denotation.csv").write_text(good + bad + "\n")
        with user_error("denotation.csv:14: ", f"b'{bad}'", "expected 3 numbers"):
            read(tmp_path)
        pairs, _, errors = read(tmp_path, on_error="skip")
        assert len(pairs) == 3 and errors.count == 1
    (tmp_path / "denotation.csv").write_text("id,meaning,expr\n")
    with user_error(tmp_path, "no meaning", "en and de"):
        read(tmp_path)
    (tmp_path / "denotation.csv").write_text("id,mn,ex\n1,2,3\n")
    with user_error("denotation.csv:1: ", "meaning, expr is missing", "'id, mn, ex'"):
        read(tmp_path)
    (tmp_path / "langvar.csv").unlink()
    with user_error(tmp_path, "langvar.csv is missing"):
        read(tmp_path)
    with user_error(tmp_path.parent, "directory without expr.csv"):
        read(tmp_path.parent)


# CSV


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("apple,Apfel\n", [("apple", "Apfel")]),
        ('"apple","a ""red"" one, big"\n', [("apple", 'a "red" one, big')]),
        ('apple;"Apfel; rot"\r\n', [("apple", "Apfel; rot")]),
        ('\ufeffapple,"two\nlines"\n\nhouse,Haus\n', [("apple", "two\nlines"), ("house", "Haus")]),
        ("de,note,en\nApfel,noun,apple\n", [("apple", "Apfel")]),
    ],
)
def test_csv(tmp_path, text, expected):
    (tmp_path / "list.csv").write_text(text, encoding="utf-8")
    assert read(tmp_path / "list.csv")[0] == expected


def test_csv_with_weights_and_languages(tmp_path):
    (tmp_path / "list.csv").write_text("en,weight,de\napple,0.5,Apfel\n")
    assert read(tmp_path / "list.csv", weights=True)[0] == [("apple", "Apfel", 0.5)]
    (tmp_path / "list.csv").write_text("apple,Apfel,pomme\n")
    assert read(tmp_path / "list.csv", "en-de-fr")[0] == [("apple", "Apfel", "pomme")]


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("apple,Apfel\nhouse\n", ("list.csv:2: ", "1 column", "expected 2 (en, de)")),
        ("apple,Apfel\na,b,c,d,e,f,g\n", ("list.csv:2: ", "7 columns", "expected 2")),
        ('apple,Apfel\nhouse,"Ha"us\n', ("list.csv:2: ", "not valid CSV")),
        ('apple,Apfel\nhouse,"Haus\n', ("list.csv:", "unclosed quotation mark")),
        ("", ("list.csv: the file is empty",)),
    ],
)
def test_broken_csv(tmp_path, text, facts):
    (tmp_path / "list.csv").write_text(text)
    with user_error(*facts):
        read(tmp_path / "list.csv")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("English,German\napple,Apfel\n", [("apple", "Apfel")]),
        ("german;english\nApfel;apple\n", [("apple", "Apfel")]),
        ("eng,deu\napple,Apfel\n", [("apple", "Apfel")]),
        ("fr,German,en\npomme,Apfel,apple\n", [("apple", "Apfel")]),
        # Words that are also codes or names of languages.
        ("to,zu\napple,Apfel\n", [("to", "zu"), ("apple", "Apfel")]),
        ("polish,polieren\napple,Apfel\n", [("polish", "polieren"), ("apple", "Apfel")]),
    ],
)
def test_csv_headers(tmp_path, text, expected):
    (tmp_path / "list.csv").write_text(text)
    assert read(tmp_path / "list.csv")[0] == expected


@pytest.mark.parametrize("header", ["en,fr", "FR,DE", "English,French", "french,spanish", "en,fr,es", "eng,fra"])
def test_csv_of_other_languages(tmp_path, header):
    path = tmp_path / "list.csv"
    path.write_text(f"{header}\napple,pomme\n")
    for on_error in ("stop", "skip"):
        with user_error(f"{path}:1: ", header.replace(",", ", "), "languages en-de"):
            read(path, on_error=on_error)
    path.write_text(f"en,de\n{header}\n")
    if header.count(",") == 1:
        assert read(path)[0] == [tuple(header.split(","))]


# pyglossary


def pyglossary_works() -> bool:
    try:
        import pyglossary.glossary_v2  # noqa: F401
    except (ImportError, SyntaxError):
        return False
    return True


XDXF = """<?xml version="1.0" encoding="UTF-8" ?><!DOCTYPE xdxf SYSTEM "">
<xdxf lang_from="ENG" lang_to="GER" format="visual"><full_name>Test</full_name><description>GPL</description>
<ar><k>apple</k><tr>aepl</tr><dtrn>Apfel</dtrn></ar></xdxf>"""
DSL = (
    '#NAME "Test"\n#INDEX_LANGUAGE "English"\n#CONTENTS_LANGUAGE "German"\n'
    "apple\n\t[m1]Apfel[/m]\n\t[m1]Apfelbaum[/m]\n"
)


@pytest.mark.skipif(not pyglossary_works(), reason="pyglossary is not installed, or not for this Python")
def test_pyglossary(tmp_path):
    path = tmp_path / "a.dsl"
    path.write_text(DSL, encoding="utf-8")
    pairs, info, _ = read(path)
    assert pairs == [("apple", "Apfel"), ("apple", "Apfelbaum")]
    assert (info.format, info.title) == ("pyglossary", "Test")
    (tmp_path / "a.slob").write_bytes(b"hello" * 100)
    with user_error(tmp_path / "a.slob", "pyglossary cannot read this file ("):
        read(tmp_path / "a.slob")
    (tmp_path / "a.nothing").write_text("hello\n")
    with user_error(tmp_path / "a.nothing", "pyglossary cannot read this file ("):
        read(tmp_path / "a.nothing", format="pyglossary")


def test_missing_pyglossary(tmp_path, monkeypatch):
    (tmp_path / "a.dsl").write_text(DSL, encoding="utf-8")
    monkeypatch.setitem(sys.modules, "pyglossary", None)
    with user_error("package pyglossary", "[dictionaries]"):
        read(tmp_path / "a.dsl")
    with user_error(tmp_path / "none.dsl", "No such file"):
        read(tmp_path / "none.dsl")
