"""dictd: `NAME.index` with a headword, a place and a size a line, and the articles in `NAME.dict` or `NAME.dict.dz`."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from megatron_prealign.dictionary.formats.articles import is_about, plain, translations_of
from megatron_prealign.dictionary.formats.base import (
    NO_TRANSLATION,
    Collector,
    DictionaryInput,
    Entries,
    Reading,
    read_lines,
    read_whole,
)
from megatron_prealign.dictionary.formats.licences import licence_in
from megatron_prealign.errors import UserError

_DIGITS = {
    digit: value for value, digit in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")
}
# 64 bits would do; more digits are no number of bytes.
_MAX_DIGITS = 11


class _Row(NamedTuple):
    line: int
    headword: str
    begin: int
    size: int


def read(reading: Reading) -> Iterator[Entries]:
    """Entries in the order of the index.

    Raises:
        UserError: one of the two files is missing, damaged or empty; with `stop` also a line of the index that is none,
            or an article that lies outside the articles' file or is no UTF-8.
    """
    reading.two_languages()
    index, articles = _files(reading.source.path)
    rows = list(_rows(reading, index))
    end = max((row.begin + row.size for row in rows), default=0)
    data = read_whole(articles, end)
    about = []
    pairs = Collector()
    for row in rows:
        if row.begin + row.size > len(data):
            reading.bad(
                row.line,
                f"the article of {row.headword!r} ends at byte {row.begin + row.size}, but {articles} has {len(data)}; "
                "the two files are not of one dictionary, or one is cut off",
            )
            continue
        try:
            article = plain(data[row.begin : row.begin + row.size].decode())
        except UnicodeDecodeError as error:
            reading.bad(row.line, f"the article of {row.headword!r} is not valid UTF-8 ({error})", error)
            continue
        if is_about(row.headword):
            about.append((row.headword, article))
            continue
        headword, translations = translations_of(article, row.headword)
        reading.facts.left_out[NO_TRANSLATION] += not translations
        pairs.add(headword, translations)
        yield from pairs.full()
    yield from pairs.rest()
    _read_about(reading, about)


def _files(path: Path) -> tuple[Path, Path]:
    """Index and articles, whichever of them `path` is."""
    base = path.name.removesuffix(".dz").removesuffix(".dict").removesuffix(".index")
    index = path.with_name(f"{base}.index")
    articles = [path.with_name(base + ending) for ending in (".dict.dz", ".dict")]
    found = next((each for each in articles if each.is_file()), None)
    if not index.is_file() or found is None:
        missing = index.name if not index.is_file() else f"{articles[0].name} or {articles[1].name}"
        raise UserError(
            f"{path}: {missing} is missing beside it, expected the two files of a dictd dictionary together"
        )
    return index, found


def _rows(reading: Reading, index: Path) -> Iterator[_Row]:
    source = DictionaryInput(path=index, languages=reading.source.languages)
    for number, line in read_lines(Reading(source, reading.errors, reading.on_error, reading.facts)):
        if not line:
            continue
        fields = line.split("\t")
        # A fourth one has the headword before it was sorted: with its signs and capitals.
        if len(fields) not in (3, 4):
            count = "1 column" if len(fields) == 1 else f"{len(fields)} columns"
            reading.bad(number, f"got {count}, expected headword, place and size separated by tabs")
            continue
        begin, size = _number(fields[1]), _number(fields[2])
        if begin is None or size is None:
            reading.bad(number, f"place {fields[1]!r} and size {fields[2]!r}, expected two numbers in dictd's base 64")
            continue
        yield _Row(number, fields[-1] if len(fields) == 4 and fields[3] else fields[0], begin, size)


def _number(text: str) -> int | None:
    if not text or len(text) > _MAX_DIGITS:
        return None
    value = 0
    for digit in text:
        if digit not in _DIGITS:
            return None
        value = value * 64 + _DIGITS[digit]
    return value


def _read_about(reading: Reading, about: list[tuple[str, str]]) -> None:
    for headword, article in about:
        # Most articles begin with their headword.
        text = "\n".join(line for line in article.split("\n") if not is_about(line.strip())).strip()
        if headword.endswith("short"):
            reading.facts.title = text.partition("\n")[0].strip()
        elif headword.endswith(("info", "licence", "license", "copyright")):
            reading.facts.licence = reading.facts.licence or licence_in(text)
