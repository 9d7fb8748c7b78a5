"""Paragraphs of LibreOffice's help: the same pages in every language, with the same ids of paragraphs."""

import re
from html.parser import HTMLParser
from pathlib import Path

_BLOCKS = {"p", "h1", "h2", "h3", "h4", "h5", "h6", "td", "th", "li", "pre"}
_WITHOUT_END = {"br", "img", "meta", "link", "input", "hr"}
# Language code -> directory, where they differ.
_DIRECTORIES = {"en": "en-US", "zh": "zh-CN"}


class _Paragraphs(HTMLParser):
    """Collects the text of every element with an id; variants for other systems, which are hidden, are left out."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.texts: dict[str, list[str]] = {}
        self._current: str | None = None
        # Open elements, and whether each hides its content.
        self._open: list[tuple[str, bool]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _WITHOUT_END:
            return
        values = dict(attrs)
        self._open.append((tag, tag in ("script", "style") or (tag == "span" and values.get("hidden") == "true")))
        if tag in _BLOCKS and values.get("id"):
            self._current = values["id"]

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop()[0] != tag:
            pass
        if tag in _BLOCKS:
            self._current = None

    def handle_data(self, data: str) -> None:
        if self._current is not None and not any(hides for _, hides in self._open):
            self.texts.setdefault(self._current, []).append(data)


def read_help(directory: Path, languages: list[str]) -> dict[str, dict[str, dict[str, str]]]:
    """Reads the pages that exist in English.

    Args:
        directory: The `help` directory of the unpacked packages.

    Returns:
        Language -> page -> id of the paragraph -> text. English paragraphs that another page has already are left out,
        and so are those that are not translated.
    """
    root = directory / _DIRECTORIES["en"]
    if not root.is_dir():
        raise SystemExit(f"{root}: not found; expected the help directory of the unpacked packages")
    names = sorted(str(path.relative_to(root)) for path in root.rglob("*.html"))
    english = {name: _read(root / name) for name in names}
    seen: set[str] = set()
    for page in english.values():
        for key, text in list(page.items()):
            if text.lower() in seen:
                del page[key]
            seen.add(text.lower())
    result = {"en": english}
    for language in languages:
        root = directory / _DIRECTORIES.get(language, language)
        pages = {name: _read(root / name) for name in names if (root / name).exists()}
        if not pages:
            raise SystemExit(f"{root}: no pages; expected the package of {language}")
        result[language] = {
            name: {key: text for key, text in page.items() if english[name].get(key, text) != text}
            for name, page in pages.items()
        }
    return result


def _read(path: Path) -> dict[str, str]:
    # The text of the page lies between the navigation and information for the authors.
    text = path.read_text(encoding="utf-8").partition('<div id="DEBUG"')[0]
    parser = _Paragraphs()
    parser.feed(text[max(0, text.find('id="DisplayArea"')) :])
    joined = {key: re.sub(r"\s+", " ", "".join(parts)).strip() for key, parts in parser.texts.items()}
    return {key: text for key, text in joined.items() if text}
