"""All other formats, through pyglossary, which is optional: its entries are taken as articles."""

import logging
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from megatron_prealign.dictionary.formats.articles import is_about, plain, translations_of
from megatron_prealign.dictionary.formats.base import NO_TRANSLATION, Collector, Entries, Reading, compression_of
from megatron_prealign.dictionary.formats.licences import licence_in, shorten
from megatron_prealign.errors import UserError

_INSTALL = "install it with pip install 'megatron-prealign[dictionaries]'"


def read(reading: Reading) -> Iterator[Entries]:
    """Entries in the order of the file; every further spelling of a headword is an entry of its own.

    Raises:
        UserError: pyglossary is missing, does not know the file or fails on it.
    """
    reading.two_languages()
    path = reading.source.path
    # A missing file is not a matter of formats.
    compression_of(path)
    glossary = _open(reading, _pyglossary())
    pairs = Collector()
    entries = iter(glossary)
    number = 0
    while True:
        try:
            entry = next(entries, None)
        except Exception as error:
            raise _failed(reading, error) from error
        if entry is None:
            break
        number += 1
        try:
            if entry.isData() or is_about(str(entry.s_word)):
                continue
            kind, article, headwords = str(entry.defiFormat), str(entry.defi), [str(word) for word in entry.l_word]
        except Exception as error:
            reading.bad(
                f"entry {number}", f"{type(error).__name__} in pyglossary: {' '.join(str(error).split())}", error
            )
            continue
        text = plain(article, "m" if kind == "m" else "h")
        found = [translations_of(text, headword) for headword in headwords]
        reading.facts.left_out[NO_TRANSLATION] += not any(translations for _, translations in found)
        for headword, translations in found:
            pairs.add(headword, translations)
        yield from pairs.full()
    yield from pairs.rest()


def _pyglossary() -> ModuleType:
    try:
        from pyglossary import glossary_v2
    except ImportError as error:
        raise UserError(f"the package pyglossary is needed for this format; {_INSTALL}") from error
    except SyntaxError as error:
        raise UserError(
            "the installed pyglossary is for a newer Python than this one; install an older one with "
            "pip install 'pyglossary<5.3'"
        ) from error
    return glossary_v2


def _open(reading: Reading, module: ModuleType) -> Any:
    logger = logging.getLogger("pyglossary")
    level = logger.level
    # What it finds is told in our own line.
    logger.setLevel(logging.CRITICAL + 1)
    try:
        module.Glossary.init()
        glossary = module.Glossary()
        if not glossary.directRead(str(reading.source.path)):
            raise ValueError("it does not know the format")
        reading.facts.title = shorten(str(glossary.getInfo("name")))
        about = (str(glossary.getInfo(key)) for key in ("license", "copyright", "description"))
        reading.facts.licence = next((found for text in about if (found := licence_in(text) or "")), "")
    except (KeyboardInterrupt, UserError):
        raise
    except BaseException as error:
        # It also ends the interpreter on some mistakes.
        raise _failed(reading, error) from error
    finally:
        logger.setLevel(level)
    return glossary


def _failed(reading: Reading, error: BaseException) -> UserError:
    return UserError(
        f"{reading.source.path}: pyglossary cannot read this file ({type(error).__name__}: "
        f"{' '.join(str(error).split())}); check that it is whole, and name another --format if it is none of "
        "pyglossary's"
    )
