"""All other formats, through the optional package pyglossary; its entries are parsed as articles."""

import logging
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from megatron_prealign.dictionary.formats.articles import is_metadata, strip_markup, translations_of
from megatron_prealign.dictionary.formats.base import NO_TRANSLATION, Entries, PairBuffer, Reading, compression_of
from megatron_prealign.dictionary.formats.licences import find_licence, shorten
from megatron_prealign.errors import UserError

_INSTALL = "install it with pip install 'megatron-prealign[dictionaries]'"


def read(reading: Reading) -> Iterator[Entries]:
    """Yields entries in file order; alternative spellings of a headword become separate entries.

    Raises:
        UserError: pyglossary is missing, does not support the file or fails on it.
    """
    reading.check_two_languages()
    path = reading.source.path
    # Report a missing file before a missing package.
    compression_of(path)
    glossary = _open(reading, _pyglossary())
    pairs = PairBuffer()
    entries = iter(glossary)
    number = 0
    while True:
        try:
            entry = next(entries, None)
        except Exception as error:
            raise _read_error(reading, error) from error
        if entry is None:
            break
        number += 1
        try:
            if entry.isData() or is_metadata(str(entry.s_word)):
                continue
            kind, article, headwords = str(entry.defiFormat), str(entry.defi), [str(word) for word in entry.l_word]
        except Exception as error:
            reading.bad_entry(
                f"entry {number}", f"{type(error).__name__} in pyglossary: {' '.join(str(error).split())}", error
            )
            continue
        text = strip_markup(article, "m" if kind == "m" else "h")
        results = [translations_of(text, headword) for headword in headwords]
        reading.info.skipped[NO_TRANSLATION] += not any(translations for _, translations in results)
        for headword, translations in results:
            pairs.add(headword, translations)
        yield from pairs.flush_if_full()
    yield from pairs.flush()


def _pyglossary() -> ModuleType:
    try:
        from pyglossary import glossary_v2
    except ImportError as error:
        raise UserError(f"this format requires the package pyglossary; {_INSTALL}") from error
    except SyntaxError as error:
        raise UserError(
            "the installed pyglossary requires a newer Python; install an older version with pip install "
            "'pyglossary<5.3'"
        ) from error
    return glossary_v2


def _open(reading: Reading, module: ModuleType) -> Any:
    logger = logging.getLogger("pyglossary")
    level = logger.level
    # Errors are reported in our own one-line message.
    logger.setLevel(logging.CRITICAL + 1)
    try:
        module.Glossary.init()
        glossary = module.Glossary()
        if not glossary.directRead(str(reading.source.path)):
            raise ValueError("unsupported format")
        reading.info.title = shorten(str(glossary.getInfo("name")))
        texts = (str(glossary.getInfo(key)) for key in ("license", "copyright", "description"))
        reading.info.licence = next((licence for text in texts if (licence := find_licence(text) or "")), "")
    except (KeyboardInterrupt, UserError):
        raise
    except BaseException as error:
        # BaseException: pyglossary also exits the interpreter on some errors.
        raise _read_error(reading, error) from error
    finally:
        logger.setLevel(level)
    return glossary


def _read_error(reading: Reading, error: BaseException) -> UserError:
    return UserError(
        f"{reading.source.path}: pyglossary cannot read this file ({type(error).__name__}: "
        f"{' '.join(str(error).split())}); check that the file is complete, or set another --format if pyglossary "
        "does not support it"
    )
