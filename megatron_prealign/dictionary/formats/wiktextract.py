"""Wiktextract (kaikki.org): one JSON object per line for each word of a Wiktionary.

`wiktextract` reads the translations listed in articles on words of the first language, into all other languages of the
input. `wiktextract-glosses` reads the definitions of words of the first language, which are mostly translations in
articles on foreign words; they are in the language of the Wiktionary, the second language of the input.
"""

import re
from collections.abc import Iterator
from typing import Any

import orjson

from megatron_prealign.dictionary.formats.articles import MAX_CHARACTERS, MAX_WORDS, without_brackets
from megatron_prealign.dictionary.formats.base import BLOCK_ENTRIES, NO_TRANSLATION, Entries, Reading, read_lines
from megatron_prealign.dictionary.formats.language_codes import TRADITIONAL, same_language

OTHER_LANGUAGE = "entries on words of another language"
NO_TRANSLATION_GLOSS = "glosses that are explanations or point to other entries"

_SPLIT = re.compile(r"[,;]")
_HAN = re.compile("[\u3400-\u9fff\U00020000-\U0003ffff]")
_SCRIPT_TAGS = {True: "Traditional-Chinese", False: "Simplified-Chinese"}
_INFINITIVE = re.compile(r"to (?=\S+$)")
# Tags of senses that explain a word form instead of translating it.
_FORMS = frozenset({"form-of", "alt-of", "abbreviation", "misspelling"})


def read(reading: Reading) -> Iterator[Entries]:
    """Yields entries in file order, in one block per language pair.

    Raises:
        UserError: see `read_lines`; with `stop` also a line that is not a JSON object or has no word.
    """
    source, *targets = reading.source.languages
    wanted = same_language(source)
    by_code = {code: target for target in reversed(targets) for code in same_language(target)}
    # A code of the input always maps to itself, even if it is also part of another language: hr and sr next to sh.
    by_code |= {target.lower(): target for target in targets}
    glosses = reading.info.format == "wiktextract-glosses"
    if glosses:
        reading.check_two_languages()
    pending: dict[str, tuple[list[str], list[str]]] = {target: ([], []) for target in targets}
    count = 0
    for number, line in read_lines(reading):
        if not line.strip():
            continue
        try:
            record = orjson.loads(line)
            if not isinstance(record, dict):
                raise ValueError(f"got a JSON {type(record).__name__}, expected an object")
            if "redirect" in record and "word" not in record:
                continue
            word, code = _text(record, "word"), _text(record, "lang_code").lower()
        except ValueError as error:
            reading.bad_entry(
                number, f"not valid JSON ({error})" if isinstance(error, orjson.JSONDecodeError) else str(error), error
            )
            continue
        if code not in wanted:
            reading.info.skipped[OTHER_LANGUAGE] += 1
            continue
        translations = (
            [(targets[0], gloss) for gloss in _glosses(reading, record, targets[0])]
            if glosses
            else list(_translations(record, by_code))
        )
        reading.info.skipped[NO_TRANSLATION] += not translations
        for target, translation in dict.fromkeys(translations):
            pending[target][0].append(word)
            pending[target][1].append(translation)
            count += 1
        if count >= BLOCK_ENTRIES:
            yield from _blocks(source, pending)
            pending, count = {target: ([], []) for target in targets}, 0
    yield from _blocks(source, pending)
    reading.info.title = "Wiktionary by Wiktextract"
    reading.info.licence = reading.source.licence or "CC BY-SA (Wiktionary)"


def _blocks(source: str, pairs: dict[str, tuple[list[str], list[str]]]) -> Iterator[Entries]:
    for target, columns in pairs.items():
        if columns[0]:
            yield Entries(list(columns), None, (source, target))


def _text(record: dict[str, Any], key: str) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        raise ValueError(f'"{key}" is {value!r:.60}, expected a string; not a Wiktextract entry')
    return value


def _dicts(values: object) -> Iterator[dict[str, Any]]:
    """Yields the dicts of a value that should be a list of dicts."""
    if isinstance(values, list):
        yield from (value for value in values if isinstance(value, dict))


def _strings(values: object) -> list[str]:
    return [value for value in values if isinstance(value, str)] if isinstance(values, list) else []


def _translations(record: dict[str, Any], by_code: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Yields target language and word of the translations of an article and of its senses."""
    lists = [record.get("translations"), *(sense.get("translations") for sense in _dicts(record.get("senses")))]
    for translations in lists:
        for translation in _dicts(translations):
            word = translation.get("word")
            # Newer files use lang_code.
            code = translation.get("lang_code", translation.get("code"))
            target = by_code.get(code.lower()) if isinstance(code, str) else None
            if target is None or not isinstance(word, str):
                continue
            if _HAN.search(word) and "zh" in same_language(target):
                word = _in_one_script(word, _strings(translation.get("tags")), target)
            if word:
                yield target, word


def _in_one_script(word: str, tags: list[str], language: str) -> str:
    """Returns the traditional or simplified spelling of a Chinese word, as `language` is written; "" if only the other
    one is given."""
    traditional = language.lower() in TRADITIONAL
    if _SCRIPT_TAGS[not traditional] in tags and _SCRIPT_TAGS[traditional] not in tags:
        return ""
    spellings = [each.strip() for each in word.split("/")]
    # Both spellings are separated by a slash, traditional first.
    return spellings[not traditional] if len(spellings) == 2 else word


def _glosses(reading: Reading, record: dict[str, Any], language: str) -> list[str]:
    """Returns the short parts of an entry's glosses; the last gloss of a sense is the most specific one."""
    words: dict[str, None] = {}
    for sense in _dicts(record.get("senses")):
        glosses = _strings(sense.get("glosses"))
        if not glosses or _FORMS & set(_strings(sense.get("tags"))):
            reading.info.skipped[NO_TRANSLATION_GLOSS] += bool(glosses)
            continue
        parts = [" ".join(part.split()).rstrip(".") for part in _SPLIT.split(without_brackets(glosses[-1]))]
        if any(len(part) > MAX_CHARACTERS or part.count(" ") >= MAX_WORDS for part in parts):
            reading.info.skipped[NO_TRANSLATION_GLOSS] += 1
            continue
        for part in parts:
            word = _INFINITIVE.sub("", part) if language.lower() == "en" else part
            if word:
                words.setdefault(word)
    return list(words)
