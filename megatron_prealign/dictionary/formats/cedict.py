"""CC-CEDICT and its sister projects (HanDeDict, CFDICT), one `繁體 简体 [pin1 yin1] /gloss/gloss; gloss/` per line.

The headword is the simplified form, or the traditional form if the code of the first language requests it (zh_hant,
zh_tw, zh_hk).
"""

import re
from collections.abc import Iterator

from megatron_prealign.dictionary.formats.articles import without_brackets
from megatron_prealign.dictionary.formats.base import NO_TRANSLATION, Entries, PairBuffer, Reading, read_lines
from megatron_prealign.dictionary.formats.language_codes import TRADITIONAL
from megatron_prealign.dictionary.formats.licences import shorten

REFERENCE = "glosses that point to other entries"

_LINE = re.compile(r"(\S+) (\S+) \[+[^\]]*\]+ /(.*)/")
_HAN = re.compile("[\u3400-\u9fff\U00020000-\U0003ffff]")
# Markers that are also ordinary words (`to see`) are references only before Chinese characters.
_REFERENCE = re.compile(
    r"\b(?:variant of|abbr\. (?:for|of|to)|also (?:written|pr\.)|CL:|Variante von|[Aa]bk\. für|variante de)|"
    r"^\s*used in\b|\b(?:see(?: also)?|same as|equivalent (?:of|to)|siehe(?: auch)?|voir(?: aussi)?)\W*" + _HAN.pattern
)
_INFINITIVE = re.compile(r"to (?=\S+$)")
_HEADER_FIELD = re.compile(r"#!\s*(\w+)\s*=\s*(.*)")


def read(reading: Reading) -> Iterator[Entries]:
    """Yields entries in file order, one translation per gloss; English verbs lose their `to`.

    Raises:
        UserError: see `read_lines`; with `stop` also a malformed line.
    """
    reading.check_two_languages()
    source, target = (language.lower() for language in reading.source.languages)
    traditional = source in TRADITIONAL
    header: dict[str, str] = {}
    pairs = PairBuffer()
    for number, line in read_lines(reading):
        if line.startswith("#"):
            field = _HEADER_FIELD.match(line)
            header |= {field[1]: field[2].strip()} if field else {}
            if "CEDICT" in line.upper() and "title" not in header:
                header["title"] = line.lstrip("# ").strip()
            continue
        if not line.strip():
            continue
        match = _LINE.fullmatch(line.strip())
        if match is None:
            reading.bad_entry(number, f"got {line[:60]!r}, expected TRADITIONAL SIMPLIFIED [pinyin] /gloss/gloss/")
            continue
        glosses = _glosses(reading, match[3], english=target == "en")
        reading.info.skipped[NO_TRANSLATION] += not glosses
        pairs.add(match[1] if traditional else match[2], glosses)
        yield from pairs.flush_if_full()
    yield from pairs.flush()
    reading.info.title = shorten(
        " ".join(filter(None, (header.get("title"), header.get("publisher"), header.get("date"))))
    )
    reading.info.licence = shorten(header.get("license", header.get("licence", "")))


def _glosses(reading: Reading, text: str, english: bool) -> list[str]:
    glosses: dict[str, None] = {}
    for gloss in re.split(r"[/;]", text):
        if _REFERENCE.search(gloss):
            reading.info.skipped[REFERENCE] += 1
            continue
        word = " ".join(without_brackets(gloss).split())
        if english:
            word = _INFINITIVE.sub("", word)
        # A gloss with Chinese characters refers to another entry.
        if word and not _HAN.search(word):
            glosses.setdefault(word)
    return list(glosses)
