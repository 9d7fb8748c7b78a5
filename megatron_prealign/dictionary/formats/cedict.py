"""CC-CEDICT and its sisters (HanDeDict, CFDICT): `繁體 简体 [pin1 yin1] /gloss/gloss; gloss/` a line.

The headword is the simplified one, or the traditional one where the first language's code says so (zh_hant, zh_tw,
zh_hk).
"""

import re
from collections.abc import Iterator

from megatron_prealign.dictionary.formats.articles import without_brackets
from megatron_prealign.dictionary.formats.base import NO_TRANSLATION, Collector, Entries, Reading, read_lines
from megatron_prealign.dictionary.formats.language_codes import TRADITIONAL
from megatron_prealign.dictionary.formats.licences import shorten

REFERENCE = "glosses that point to other entries"

_LINE = re.compile(r"(\S+) (\S+) \[+[^\]]*\]+ /(.*)/")
_HAN = re.compile("[\u3400-\u9fff\U00020000-\U0003ffff]")
# What is a word of its own, too (`to see`), points to an entry only in front of Chinese.
_REFERENCE = re.compile(
    r"\b(?:variant of|abbr\. (?:for|of|to)|also (?:written|pr\.)|CL:|Variante von|[Aa]bk\. für|variante de)|"
    r"^\s*used in\b|\b(?:see(?: also)?|same as|equivalent (?:of|to)|siehe(?: auch)?|voir(?: aussi)?)\W*" + _HAN.pattern
)
_INFINITIVE = re.compile(r"to (?=\S+$)")
_FACT = re.compile(r"#!\s*(\w+)\s*=\s*(.*)")


def read(reading: Reading) -> Iterator[Entries]:
    """Entries in the order of the file, each gloss a translation; English verbs come without their `to`.

    Raises:
        UserError: see `read_lines`; with `stop` also a line of another form.
    """
    reading.two_languages()
    source, target = (language.lower() for language in reading.source.languages)
    traditional = source in TRADITIONAL
    facts: dict[str, str] = {}
    pairs = Collector()
    for number, line in read_lines(reading):
        if line.startswith("#"):
            fact = _FACT.match(line)
            facts |= {fact[1]: fact[2].strip()} if fact else {}
            if "CEDICT" in line.upper() and "title" not in facts:
                facts["title"] = line.lstrip("# ").strip()
            continue
        if not line.strip():
            continue
        match = _LINE.fullmatch(line.strip())
        if match is None:
            reading.bad(number, f"got {line[:60]!r}, expected TRADITIONAL SIMPLIFIED [pinyin] /gloss/gloss/")
            continue
        glosses = _glosses(reading, match[3], english=target == "en")
        reading.facts.left_out[NO_TRANSLATION] += not glosses
        pairs.add(match[1] if traditional else match[2], glosses)
        yield from pairs.full()
    yield from pairs.rest()
    reading.facts.title = shorten(
        " ".join(filter(None, (facts.get("title"), facts.get("publisher"), facts.get("date"))))
    )
    reading.facts.licence = shorten(facts.get("license", facts.get("licence", "")))


def _glosses(reading: Reading, text: str, english: bool) -> list[str]:
    found: dict[str, None] = {}
    for gloss in re.split(r"[/;]", text):
        if _REFERENCE.search(gloss):
            reading.facts.left_out[REFERENCE] += 1
            continue
        word = " ".join(without_brackets(gloss).split())
        if english:
            word = _INFINITIVE.sub("", word)
        # Chinese in a gloss names another entry.
        if word and not _HAN.search(word):
            found.setdefault(word)
    return list(found)
