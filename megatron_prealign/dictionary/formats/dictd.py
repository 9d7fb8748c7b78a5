"""dictd: `NAME.index` with one headword, offset and size per line, and articles in `NAME.dict` or `NAME.dict.dz`."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from megatron_prealign.dictionary.formats.articles import is_metadata, strip_markup, translations_of
from megatron_prealign.dictionary.formats.base import (
    NO_TRANSLATION,
    DictionaryInput,
    Entries,
    PairBuffer,
    Reading,
    read_file,
    read_lines,
)
from megatron_prealign.dictionary.formats.licences import find_licence
from megatron_prealign.errors import UserError
from megatron_prealign.text import plural

_DIGITS = {
    digit: value for value, digit in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")
}
# 11 base-64 digits exceed 64 bits; longer strings cannot be byte offsets.
_MAX_DIGITS = 11


class _IndexEntry(NamedTuple):
    line: int
    headword: str
    begin: int
    size: int


def read(reading: Reading) -> Iterator[Entries]:
    """Yields entries in the order of the index.

    Raises:
        UserError: one of the two files is missing, corrupt or empty; with `stop` also a malformed index line, or an
            article that is outside the articles file or is not valid UTF-8.
    """
    reading.check_two_languages()
    index, articles = _files(reading.source.path)
    index_entries = list(_read_index(reading, index))
    end = max((each.begin + each.size for each in index_entries), default=0)
    data = read_file(articles, end)
    metadata = []
    pairs = PairBuffer()
    for each in index_entries:
        if each.begin + each.size > len(data):
            reading.bad_entry(
                each.line,
                f"the article of {each.headword!r} ends at byte {each.begin + each.size}, but {articles} has "
                f"{len(data)} bytes; the two files belong to different dictionaries, or one is truncated",
            )
            continue
        try:
            article = strip_markup(data[each.begin : each.begin + each.size].decode())
        except UnicodeDecodeError as error:
            reading.bad_entry(each.line, f"the article of {each.headword!r} is not valid UTF-8 ({error})", error)
            continue
        if is_metadata(each.headword):
            metadata.append((each.headword, article))
            continue
        headword, translations = translations_of(article, each.headword)
        reading.info.skipped[NO_TRANSLATION] += not translations
        pairs.add(headword, translations)
        yield from pairs.flush_if_full()
    yield from pairs.flush()
    _read_metadata(reading, metadata)


def _files(path: Path) -> tuple[Path, Path]:
    """Paths of the index and the articles file; `path` is either of them."""
    base = path.name.removesuffix(".dz").removesuffix(".dict").removesuffix(".index")
    index = path.with_name(f"{base}.index")
    articles = [path.with_name(base + ending) for ending in (".dict.dz", ".dict")]
    existing = next((each for each in articles if each.is_file()), None)
    if not index.is_file() or existing is None:
        missing = index.name if not index.is_file() else f"{articles[0].name} or {articles[1].name}"
        raise UserError(f"{path}: {missing} is missing, expected both files of a dictd dictionary in one directory")
    return index, existing


def _read_index(reading: Reading, index: Path) -> Iterator[_IndexEntry]:
    source = DictionaryInput(path=index, languages=reading.source.languages)
    for number, line in read_lines(Reading(source, reading.errors, reading.on_error, reading.info)):
        if not line:
            continue
        fields = line.split("\t")
        # The optional fourth column is the original headword, with its punctuation and capitals.
        if len(fields) not in (3, 4):
            count = plural(len(fields), "column")
            reading.bad_entry(number, f"got {count}, expected headword, offset and size separated by tabs")
            continue
        begin, size = _number(fields[1]), _number(fields[2])
        if begin is None or size is None:
            reading.bad_entry(
                number, f"got offset {fields[1]!r} and size {fields[2]!r}, expected two numbers in dictd's base 64"
            )
            continue
        yield _IndexEntry(number, fields[-1] if len(fields) == 4 and fields[3] else fields[0], begin, size)


def _number(text: str) -> int | None:
    if not text or len(text) > _MAX_DIGITS:
        return None
    value = 0
    for digit in text:
        if digit not in _DIGITS:
            return None
        value = value * 64 + _DIGITS[digit]
    return value


def _read_metadata(reading: Reading, articles: list[tuple[str, str]]) -> None:
    for headword, article in articles:
        # Most articles start with their headword.
        text = "\n".join(line for line in article.split("\n") if not is_metadata(line.strip())).strip()
        if headword.endswith("short"):
            reading.info.title = text.partition("\n")[0].strip()
        elif headword.endswith(("info", "licence", "license", "copyright")):
            reading.info.licence = reading.info.licence or find_licence(text)
