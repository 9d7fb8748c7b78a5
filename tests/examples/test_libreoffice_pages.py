"""The pages of LibreOffice's help: which paragraphs are text."""

from pathlib import Path
from types import ModuleType

import pytest
from support.example_scripts import load_example

PAGE = (
    '<nav><p id="menu">Menu</p></nav><div id="DisplayArea"><h1 id="title">{0} <span hidden="true">Mac</span>'
    '<span>one</span></h1><br><p id="same">Calc</p><p>no id</p><p id="last">{0} <em>two</em>&amp;</p></div>'
    '<div id="DEBUG"><p id="debug">Debug</p></div>'
)


@pytest.fixture(scope="module")
def pages() -> ModuleType:
    return load_example("libreoffice_help/pages.py")


def write(root: Path, language: str, name: str, text: str) -> None:
    path = root / language / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def test_paragraphs_of_both_languages(pages: ModuleType, tmp_path: Path) -> None:
    write(tmp_path, "en-US", "a.html", PAGE.format("Word"))
    # The second page repeats a paragraph of the first, in other capitals.
    write(tmp_path, "en-US", "text/b.html", '<div id="DisplayArea"><p id="x">CALC</p><p id="y">Only here</p></div>')
    write(tmp_path, "de", "a.html", PAGE.format("Wort"))
    write(tmp_path, "de", "text/b.html", '<div id="DisplayArea"><p id="x">Rechner</p><p id="z">Zusatz</p></div>')
    found = pages.read_help(tmp_path, ["de"])
    assert found["en"] == {
        "a.html": {"title": "Word one", "same": "Calc", "last": "Word two&"},
        "text/b.html": {"y": "Only here"},
    }
    # Not translated, repeated in English, and without an English paragraph: left out.
    assert found["de"] == {"a.html": {"title": "Wort one", "last": "Wort two&"}, "text/b.html": {}}


def test_missing_packages(pages: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="en-US: not found"):
        pages.read_help(tmp_path, ["de"])
    write(tmp_path, "en-US", "a.html", PAGE)
    with pytest.raises(SystemExit, match="fr: no pages; expected the package of fr"):
        pages.read_help(tmp_path, ["fr"])
