"""StarDict: `NAME.ifo` tells about the dictionary, `NAME.idx` has headwords and places, `NAME.dict` the articles, and
`NAME.syn`, which may be missing, further headwords of the same articles. `.idx` and `.syn` may be gzipped, `.dict` is
often a `.dict.dz`."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_prealign.dictionary.formats.articles import is_about, plain, translations_of
from megatron_prealign.dictionary.formats.base import NO_TRANSLATION, Collector, Entries, Reading, read_whole
from megatron_prealign.dictionary.formats.licences import licence_in, shorten
from megatron_prealign.errors import UserError

_MAGIC = "StarDict's dict ifo file"
_VERSIONS = ("2.4.2", "3.0.0")
_MAX_IFO_BYTES = 1 << 20
_MAX_INDEX_BYTES = 1 << 32
# Type of a field -> markup of its text; other fields are pronunciation, pictures, sounds and the like.
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
    place: struct.Struct
    """Place and size of an article in the index."""
    types: str
    """Types of the fields of every article; "" where each article tells its own."""
    title: str
    about: str


def read(reading: Reading) -> Iterator[Entries]:
    """Entries in the order of the index, those of `.syn` behind them.

    Raises:
        UserError: a file is missing or damaged, or its size or number of words is not what the .ifo says; with `stop`
            also an article that lies outside the articles' file or cannot be read.
    """
    reading.two_languages()
    files = _files(reading.source.path)
    header = _header(files.ifo)
    reading.facts.title, reading.facts.licence = header.title, licence_in(header.about)
    rows = _index(files.idx, header)
    data = read_whole(files.articles, max((begin + size for _, begin, size in rows), default=0))
    pairs = Collector()
    translations: list[list[str]] = []
    for headword, begin, size in rows:
        found: list[str] = []
        try:
            if not is_about(headword):
                headword, found = _entry(headword, data, begin, size, header.types)
                reading.facts.left_out[NO_TRANSLATION] += not found
        except ValueError as error:
            reading.bad(f"{headword!r}", f"{error} ({files.articles.name})", error)
        if files.syn is not None:
            translations.append(found)
        pairs.add(headword, found)
        yield from pairs.full()
    if files.syn is not None:
        for headword, number in _synonyms(files.syn, header):
            pairs.add(headword, translations[number])
            yield from pairs.full()
    yield from pairs.rest()


def _files(path: Path) -> _Files:
    """The files of a dictionary, whichever of them `path` is."""
    name = path.name
    for ending in (".gz", ".dz", ".ifo", ".idx", ".syn", ".dict"):
        name = name.removesuffix(ending)

    def first(*endings: str) -> Path | None:
        return next((each for ending in endings if (each := path.with_name(name + ending)).is_file()), None)

    ifo, idx, articles = first(".ifo"), first(".idx", ".idx.gz"), first(".dict.dz", ".dict")
    if ifo is None or idx is None or articles is None:
        missing = ".ifo" if ifo is None else ".idx" if idx is None else ".dict or .dict.dz"
        raise UserError(
            f"{path}: {name}{missing} is missing beside it, expected .ifo, .idx and .dict of a StarDict dictionary "
            "together"
        )
    return _Files(ifo, idx, articles, first(".syn", ".syn.gz"))


def _header(path: Path) -> _Header:
    data = read_whole(path, _MAX_IFO_BYTES)
    if len(data) > _MAX_IFO_BYTES:
        raise UserError(f"{path}: {len(data):,} bytes and more, expected the short text of a StarDict .ifo")
    lines = data.decode("utf-8-sig", "replace").splitlines()
    if not lines or lines[0].strip() != _MAGIC:
        raise UserError(f"{path}:1: got {lines[0][:60] if lines else ''!r}, expected {_MAGIC!r}; not a StarDict file")
    values = {key.strip(): value.strip() for key, _, value in (line.partition("=") for line in lines[1:])}
    if values.get("version") not in _VERSIONS:
        raise UserError(f"{path}: version is {values.get('version')!r}, expected {' or '.join(_VERSIONS)}")

    def number(key: str, default: int | None = None) -> int:
        text = values.get(key)
        if text is None and default is not None:
            return default
        if text is None or not (text.isascii() and text.isdigit()):
            raise UserError(f"{path}: {key} is {text!r}, expected a number; the file is damaged")
        return int(text)

    bits = number("idxoffsetbits", 32)
    if bits not in (32, 64):
        raise UserError(f"{path}: idxoffsetbits is {bits}, expected 32 or 64")
    about = [values[key] for key in ("copyright", "license", "licence", "description") if values.get(key)]
    return _Header(
        words=number("wordcount"),
        synonyms=number("synwordcount", 0),
        idx_bytes=number("idxfilesize"),
        place=struct.Struct(">II" if bits == 32 else ">QI"),
        types=values.get("sametypesequence", ""),
        title=shorten(values.get("bookname", "")),
        about="\n\n".join(about).replace("<br>", "\n"),
    )


def _index(path: Path, header: _Header) -> list[tuple[str, int, int]]:
    """Headword, place and size of every article."""
    data = read_whole(path, min(header.idx_bytes, _MAX_INDEX_BYTES))
    if len(data) != header.idx_bytes:
        more = " and more" if len(data) > header.idx_bytes else ""
        raise UserError(
            f"{path}: {len(data):,} bytes{more}, but the .ifo says {header.idx_bytes:,}; the files are not of one "
            "dictionary, or one is cut off"
        )
    rows: list[tuple[str, int, int]] = []
    for headword, end in _strings(path, data, header.place.size):
        rows.append((headword, *header.place.unpack_from(data, end)))
    if len(rows) != header.words:
        raise UserError(f"{path}: {len(rows):,} headwords, but the .ifo says {header.words:,}; the files do not fit")
    return rows


def _synonyms(path: Path, header: _Header) -> Iterator[tuple[str, int]]:
    """Further headwords, each with the number of its article in the index."""
    data = read_whole(path, _MAX_INDEX_BYTES)
    number = struct.Struct(">I")
    count = 0
    for headword, end in _strings(path, data, number.size):
        (article,) = number.unpack_from(data, end)
        if article >= header.words:
            raise UserError(
                f"{path}: {headword!r} stands for headword {article} of {header.words:,}; the files do not fit"
            )
        count += 1
        yield headword, article
    if count != header.synonyms:
        raise UserError(f"{path}: {count:,} headwords, but the .ifo says {header.synonyms:,}; the files do not fit")


def _strings(path: Path, data: bytes, size: int) -> Iterator[tuple[str, int]]:
    """Texts that end in a zero byte, each with the place of the `size` bytes behind it."""
    begin = 0
    while begin < len(data):
        end = data.find(b"\0", begin)
        if end < 0 or end + 1 + size > len(data):
            raise UserError(f"{path}: the last headword, at byte {begin}, is cut off; fetch the file again")
        try:
            text = data[begin:end].decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: the headword at byte {begin} is not valid UTF-8 ({error})") from error
        yield text, end + 1
        begin = end + 1 + size


def _entry(headword: str, data: bytes, begin: int, size: int, types: str) -> tuple[str, list[str]]:
    """The headword as its article writes it, with its translations.

    Raises:
        ValueError: the article lies outside the data or cannot be read.
    """
    if begin + size > len(data):
        raise ValueError(f"the article ends at byte {begin + size}, but there are {len(data)}")
    found: dict[str, None] = {}
    for kind, text in _fields(data[begin : begin + size], types):
        if kind in _TEXT_FIELDS:
            headword, translations = translations_of(plain(text.decode(), _TEXT_FIELDS[kind]), headword)
            found.update(dict.fromkeys(translations))
    return headword, list(found)


def _fields(article: bytes, types: str) -> Iterator[tuple[str, bytes]]:
    """Type and content of the fields of an article: a small letter's is text that a zero ends, a capital's has its size
    in front. Where all articles are of the same types, the last field needs neither."""
    place, number = 0, 0
    while number < len(types) if types else place < len(article):
        kind = types[number] if types else chr(article[place])
        place += not types
        number += 1
        last = number == len(types)
        if kind.islower():
            end = article.find(b"\0", place)
            end = len(article) if last or end < 0 else end
            yield kind, article[place:end].rstrip(b"\0")
            place = end + 1
        elif kind.isupper():
            if last:
                return
            if place + 4 > len(article):
                raise ValueError(f"a field of type {kind!r} is cut off")
            place += 4 + int.from_bytes(article[place : place + 4], "big")
        else:
            raise ValueError(f"a field of type {kind!r}, expected a letter")
