"""StarDict: `NAME.ifo` has the metadata, `NAME.idx` headwords and offsets, `NAME.dict` the articles, and the optional
`NAME.syn` additional headwords for the same articles. `.idx` and `.syn` may be gzipped, `.dict` is often a
`.dict.dz`."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_prealign.dictionary.formats.articles import is_metadata, strip_markup, translations_of
from megatron_prealign.dictionary.formats.base import NO_TRANSLATION, Entries, PairBuffer, Reading, read_file
from megatron_prealign.dictionary.formats.licences import find_licence, shorten
from megatron_prealign.errors import UserError

_MAGIC = "StarDict's dict ifo file"
_VERSIONS = ("2.4.2", "3.0.0")
_MAX_IFO_BYTES = 1 << 20
_MAX_INDEX_BYTES = 1 << 32
# Field type -> markup of its text; other fields are pronunciation, images, sounds and the like.
_TEXT_FIELDS = {"m": "m", "l": "m", "g": "h", "x": "h", "k": "h", "h": "h", "w": "w"}


@dataclass(frozen=True)
class _Files:
    ifo: Path
    idx: Path
    articles: Path
    syn: Path | None


@dataclass(frozen=True)
class _Header:
    words: int
    synonyms: int
    idx_bytes: int
    location: struct.Struct
    """Format of an article's offset and size in the index."""
    types: str
    """Field types of every article; "" if each article declares its own."""
    title: str
    description: str


def read(reading: Reading) -> Iterator[Entries]:
    """Yields entries in the order of the index, followed by those of `.syn`.

    Raises:
        UserError: a file is missing or corrupt, or its size or number of words does not match the .ifo; with `stop`
            also an article that is outside the articles file or cannot be read.
    """
    reading.check_two_languages()
    files = _files(reading.source.path)
    header = _header(files.ifo)
    reading.info.title, reading.info.licence = header.title, find_licence(header.description)
    index = _read_index(files.idx, header)
    data = read_file(files.articles, max((begin + size for _, begin, size in index), default=0))
    pairs = PairBuffer()
    translations: list[list[str]] = []
    for headword, begin, size in index:
        words: list[str] = []
        try:
            if not is_metadata(headword):
                headword, words = _read_article(headword, data, begin, size, header.types)
                reading.info.skipped[NO_TRANSLATION] += not words
        except ValueError as error:
            reading.bad_entry(f"{headword!r}", f"{error} ({files.articles.name})", error)
        if files.syn is not None:
            translations.append(words)
        pairs.add(headword, words)
        yield from pairs.flush_if_full()
    if files.syn is not None:
        for headword, number in _read_synonyms(files.syn, header):
            pairs.add(headword, translations[number])
            yield from pairs.flush_if_full()
    yield from pairs.flush()


def _files(path: Path) -> _Files:
    """Paths of a dictionary's files; `path` is any of them."""
    name = path.name
    for ending in (".gz", ".dz", ".ifo", ".idx", ".syn", ".dict"):
        name = name.removesuffix(ending)

    def first(*endings: str) -> Path | None:
        return next((each for ending in endings if (each := path.with_name(name + ending)).is_file()), None)

    ifo, idx, articles = first(".ifo"), first(".idx", ".idx.gz"), first(".dict.dz", ".dict")
    if ifo is None or idx is None or articles is None:
        missing = ".ifo" if ifo is None else ".idx" if idx is None else ".dict or .dict.dz"
        raise UserError(
            f"{path}: {name}{missing} is missing, expected .ifo, .idx and .dict of a StarDict dictionary in one "
            "directory"
        )
    return _Files(ifo, idx, articles, first(".syn", ".syn.gz"))


def _header(path: Path) -> _Header:
    data = read_file(path, _MAX_IFO_BYTES)
    if len(data) > _MAX_IFO_BYTES:
        raise UserError(f"{path}: got {len(data):,} bytes or more, expected the short text of a StarDict .ifo")
    lines = data.decode("utf-8-sig", "replace").splitlines()
    if not lines or lines[0].strip() != _MAGIC:
        raise UserError(f"{path}:1: got {lines[0][:60] if lines else ''!r}, expected {_MAGIC!r}; not a StarDict file")
    values = {key.strip(): value.strip() for key, _, value in (line.partition("=") for line in lines[1:])}
    if values.get("version") not in _VERSIONS:
        raise UserError(f"{path}: unsupported version {values.get('version')!r}, expected {' or '.join(_VERSIONS)}")

    def number(key: str, default: int | None = None) -> int:
        text = values.get(key)
        if text is None and default is not None:
            return default
        if text is None or not (text.isascii() and text.isdigit()):
            raise UserError(f"{path}: {key} is {text!r}, expected a number; the file is corrupt")
        return int(text)

    bits = number("idxoffsetbits", 32)
    if bits not in (32, 64):
        raise UserError(f"{path}: idxoffsetbits is {bits}, expected 32 or 64")
    description = [values[key] for key in ("copyright", "license", "licence", "description") if values.get(key)]
    return _Header(
        words=number("wordcount"),
        synonyms=number("synwordcount", 0),
        idx_bytes=number("idxfilesize"),
        location=struct.Struct(">II" if bits == 32 else ">QI"),
        types=values.get("sametypesequence", ""),
        title=shorten(values.get("bookname", "")),
        description="\n\n".join(description).replace("<br>", "\n"),
    )


def _read_index(path: Path, header: _Header) -> list[tuple[str, int, int]]:
    """Headword, offset and size of every article."""
    data = read_file(path, min(header.idx_bytes, _MAX_INDEX_BYTES))
    if len(data) != header.idx_bytes:
        more = " or more" if len(data) > header.idx_bytes else ""
        raise UserError(
            f"{path}: got {len(data):,} bytes{more}, expected {header.idx_bytes:,} (.ifo); the files belong to "
            "different dictionaries, or one is truncated"
        )
    index: list[tuple[str, int, int]] = []
    for headword, end in _read_strings(path, data, header.location.size):
        index.append((headword, *header.location.unpack_from(data, end)))
    if len(index) != header.words:
        raise UserError(
            f"{path}: got {len(index):,} headwords, expected {header.words:,} (.ifo); the files do not match"
        )
    return index


def _read_synonyms(path: Path, header: _Header) -> Iterator[tuple[str, int]]:
    """Yields additional headwords, each with the index of its article."""
    data = read_file(path, _MAX_INDEX_BYTES)
    number = struct.Struct(">I")
    count = 0
    for headword, end in _read_strings(path, data, number.size):
        (article,) = number.unpack_from(data, end)
        if article >= header.words:
            raise UserError(
                f"{path}: {headword!r} refers to headword {article}, expected a number below {header.words:,}; the "
                "files do not match"
            )
        count += 1
        yield headword, article
    if count != header.synonyms:
        raise UserError(f"{path}: got {count:,} headwords, expected {header.synonyms:,} (.ifo); the files do not match")


def _read_strings(path: Path, data: bytes, size: int) -> Iterator[tuple[str, int]]:
    """Yields zero-terminated strings, each with the offset of the `size` bytes after it."""
    begin = 0
    while begin < len(data):
        end = data.find(b"\0", begin)
        if end < 0 or end + 1 + size > len(data):
            raise UserError(f"{path}: the last headword, at byte {begin}, is truncated; download the file again")
        try:
            text = data[begin:end].decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: the headword at byte {begin} is not valid UTF-8 ({error})") from error
        yield text, end + 1
        begin = end + 1 + size


def _read_article(headword: str, data: bytes, begin: int, size: int, types: str) -> tuple[str, list[str]]:
    """Returns the headword as spelled in its article, and its translations.

    Raises:
        ValueError: the article is outside the data or cannot be read.
    """
    if begin + size > len(data):
        raise ValueError(f"the article ends at byte {begin + size}, but the file has {len(data)} bytes")
    all_translations: dict[str, None] = {}
    for kind, text in _read_fields(data[begin : begin + size], types):
        if kind in _TEXT_FIELDS:
            headword, translations = translations_of(strip_markup(text.decode(), _TEXT_FIELDS[kind]), headword)
            all_translations.update(dict.fromkeys(translations))
    return headword, list(all_translations)


def _read_fields(article: bytes, types: str) -> Iterator[tuple[str, bytes]]:
    """Yields type and content of the text fields of an article.

    A lower-case type is zero-terminated text, an upper-case type is binary data after a 4-byte size. If all articles
    have the same types, the last field has neither terminator nor size.
    """
    offset, number = 0, 0
    while number < len(types) if types else offset < len(article):
        kind = types[number] if types else chr(article[offset])
        offset += not types
        number += 1
        last = number == len(types)
        if kind.islower():
            end = article.find(b"\0", offset)
            end = len(article) if last or end < 0 else end
            yield kind, article[offset:end].rstrip(b"\0")
            offset = end + 1
        elif kind.isupper():
            if last:
                return
            if offset + 4 > len(article):
                raise ValueError(f"a field of type {kind!r} is truncated")
            offset += 4 + int.from_bytes(article[offset : offset + 4], "big")
        else:
            raise ValueError(f"got field type {kind!r}, expected a letter")
