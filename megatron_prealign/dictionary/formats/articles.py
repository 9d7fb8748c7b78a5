"""Extracts translations from dictionary articles, which are written for human readers.

Articles are parsed line by line. Numbering, grammar labels, pronunciation and notes in brackets are removed; the rest
of a line is split at commas and semicolons. Lines that start with a label (`Synonym:`) or a quotation mark (examples)
are skipped, and so are parts that are too long to be a word or a short phrase.
"""

import html
import re

MAX_WORDS = 6
MAX_CHARACTERS = 60

# Elements without translations: pronunciation, headword, examples, comments, references.
_NO_TRANSLATION = re.compile(
    r"<(k|tr|ex|co|kref|iref|rref|script|style|head|nu|opt|sup|abr|abbr|gr)\b[^>]*>.*?</\1\s*>",
    re.DOTALL | re.IGNORECASE,
)
_BREAK = re.compile(
    r"<\s*/?\s*(br|p|div|li|ol|ul|dd|dt|dl|tr|td|table|h\d|def|dtrn|ar|blockquote)\b[^>]*>", re.IGNORECASE
)
_TAG = re.compile(r"<[^<>]*>")
# Articles declared as plain text often contain HTML.
_IS_HTML = re.compile(r"<\s*br\b|</\w+\s*>|<\w+\s*/>|&(?:#\d+|lt|gt|amp|quot|nbsp);", re.IGNORECASE)
_WIKI_LINK = re.compile(r"\[\[(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]")
_WIKI_QUOTES = re.compile(r"'{2,}")

_LABEL = re.compile(r"[^\W\d_]+(?: [^\W\d_]+)? ?[:：](?:\s|$)")
_NUMBER = re.compile(r"^(?:[(\[]?(?:\d+|[ivxIVX]+|[a-z])[)\].]+|[-•*–—▸►·◆①-⑳])\s*")
_GRAMMAR = re.compile(
    r"^(?:n|v|vt|vi|vr|adj|adv|a|prep|conj|pron|interj|int|num|art|pl|sg|abbr|aux|det|m|f|nt|s|subst|verb|noun)\.\s*(?=\S)",
    re.IGNORECASE,
)
_PRONUNCIATION = re.compile(r"(?:^|(?<=\s))(?:/[^/\n]*/|\\[^\\\n]*\\)(?=\s|$)")
_BRACKETS = re.compile(r"\([^()]*\)|\[[^\[\]]*\]|\{[^{}]*\}|<[^<>]*>|（[^（）]*）|【[^【】]*】|〔[^〔〕]*〕")
_SPLIT = re.compile(r"[,;،؛、，；|]| / ")
_QUOTES = '"“„«»”‘`'
_EDGES = " \t\u00a0.:=*~-‐–—→?!¿¡"


def is_metadata(headword: str) -> bool:
    """Whether the article describes the dictionary itself: dictd's reserved headwords, which conversions preserve."""
    return headword.startswith(("00database", "00-database"))


def strip_markup(text: str, kind: str = "m") -> str:
    """Returns the text of an article without its markup.

    Args:
        kind: `m` plain text, `h` HTML or similar (Pango, XDXF, XML), `w` wiki text.
    """
    if kind == "m" and _IS_HTML.search(text):
        kind = "h"
    if kind == "w":
        text = _WIKI_QUOTES.sub("", _WIKI_LINK.sub(r"\1", text))
    if kind != "m":
        text = _NO_TRANSLATION.sub(" ", text)
        text = html.unescape(_TAG.sub("", _BREAK.sub("\n", text)))
    return text


def without_brackets(text: str) -> str:
    """Removes everything in brackets from `text`, nested brackets included."""
    while True:
        shorter = _BRACKETS.sub(" ", text)
        if shorter == text:
            return text
        text = shorter


def translations_of(article: str, headword: str) -> tuple[str, list[str]]:
    """Returns the headword as spelled in the article and its unique translations, in the article's order.

    Indexes are often lower-cased; if the first line is the headword in another spelling, that spelling is used.
    """
    translations: dict[str, None] = {}
    lines = [line for line in map(str.strip, article.split("\n")) if line]
    if lines:
        headword, lines[0] = _headword(lines[0], headword)
    for number, line in enumerate(lines):
        if number and _PRONUNCIATION.search(line) and _letters(_without_notes(line)) == _letters(headword):
            # The headword repeated with its pronunciation: some indexes merge several articles into one.
            continue
        for text in _line_translations(line):
            translations.setdefault(text)
    return headword, list(translations)


def _headword(line: str, headword: str) -> tuple[str, str]:
    """Splits the first line into the headword as spelled there and the rest; the rest is the full line if it does not
    start with the headword."""
    spelling = _without_notes(line)
    if _letters(spelling) == _letters(headword):
        return spelling, ""
    size = len(headword)
    prefix = line[:size]
    if prefix.casefold() != headword.casefold() or line[size : size + 1].isalnum():
        return headword, line
    return prefix, line[size:].lstrip(_EDGES)


def _without_notes(line: str) -> str:
    return without_brackets(_PRONUNCIATION.sub(" ", line)).strip(_EDGES)


def _letters(text: str) -> str:
    """Case-folded letters and digits of `text`, which is what indexes keep of a headword."""
    return "".join(filter(str.isalnum, text.casefold()))


def _line_translations(line: str) -> list[str]:
    line = without_brackets(_PRONUNCIATION.sub(" ", line)).strip()
    while True:
        shorter = _GRAMMAR.sub("", _NUMBER.sub("", line))
        if shorter == line:
            break
        line = shorter
    if not line or line[0] in _QUOTES or _LABEL.match(line):
        return []
    parts = (" ".join(part.split()).strip(_EDGES) for part in _SPLIT.split(line))
    return [part for part in parts if _is_short(part)]


def _is_short(part: str) -> bool:
    return 0 < len(part) <= MAX_CHARACTERS and part.count(" ") < MAX_WORDS and any(map(str.isalpha, part))
