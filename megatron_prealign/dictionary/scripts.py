"""Scripts of characters and of languages."""

from collections.abc import Mapping

# First and last character of each block; each script has one bit, in this order.
_RANGES: Mapping[str, str] = {
    "latin": "0041-005A 0061-007A 00AA 00BA 00C0-00D6 00D8-00F6 00F8-02AF 1D00-1D25 1E00-1EFF 2C60-2C7F A720-A7FF "
    "AB30-AB64 FB00-FB06 FF21-FF3A FF41-FF5A",
    "greek": "0370-03FF 1F00-1FFF",
    "cyrillic": "0400-052F 1C80-1C8F 2DE0-2DFF A640-A69F",
    "armenian": "0530-058F FB13-FB17",
    "hebrew": "0590-05FF FB1D-FB4F",
    "arabic": "0600-06FF 0750-077F 0870-08FF FB50-FDFF FE70-FEFE",
    "syriac": "0700-074F 0860-086F",
    "thaana": "0780-07BF",
    "nko": "07C0-07FF",
    "devanagari": "0900-097F A8E0-A8FF",
    "bengali": "0980-09FF",
    "gurmukhi": "0A00-0A7F",
    "gujarati": "0A80-0AFF",
    "oriya": "0B00-0B7F",
    "tamil": "0B80-0BFF",
    "telugu": "0C00-0C7F",
    "kannada": "0C80-0CFF",
    "malayalam": "0D00-0D7F",
    "sinhala": "0D80-0DFF",
    "thai": "0E00-0E7F",
    "lao": "0E80-0EFF",
    "tibetan": "0F00-0FFF",
    "myanmar": "1000-109F A9E0-A9FF AA60-AA7F",
    "georgian": "10A0-10FF 1C90-1CBF 2D00-2D2F",
    "hangul": "1100-11FF 3130-318F A960-A97F AC00-D7FF",
    "ethiopic": "1200-139F 2D80-2DDF AB00-AB2F",
    "cherokee": "13A0-13FF AB70-ABBF",
    "canadian": "1400-167F 18B0-18FF",
    "khmer": "1780-17FF",
    "mongolian": "1800-18AF",
    "tifinagh": "2D30-2D7F",
    "kana": "3040-30FF 31F0-31FF FF66-FF9F",
    "bopomofo": "3100-312F 31A0-31BF",
    "han": "3005-3007 2E80-2FDF 3400-4DBF 4E00-9FFF F900-FAFF 20000-3FFFF",
}
_BITS = {name: 1 << number for number, name in enumerate(_RANGES)}

_LATIN_LANGUAGES = (
    "af sq eu br ca co hr cs da nl en eo et fo fi fr fy gl de ht ha haw hmn hu is ig id ia ie io ga it jv kl rw ku "
    "la lv ln lt lb mg ms mt mi nb nn no nah nv oc om pl pt qu rm ro rn sm sg gd st sn sk sl so es su sw sv ss tl "
    "tn ts tk to tr tw uz vi vo wa cy wo xh yo za zu ceb ast nds scn lmo vec pms bar gsw als li nap war ilo hsb dsb "
    "csb szl frp"
)
_OTHER_LANGUAGES = {
    "cyrillic": "ru uk be bg mk ab av ba ce cv kv kk ky mn os tg tt udm sah mhr myv mdf tyv",
    "latin cyrillic": "sr sh bs az",
    "arabic": "ar fa ps ur ug sd ckb arz pnb azb",
    "greek": "el grc",
    "hebrew": "he yi",
    "armenian": "hy",
    "georgian": "ka",
    "devanagari": "hi mr ne sa bho mai awa new gom",
    "devanagari arabic": "ks",
    "bengali": "bn as",
    "gurmukhi arabic": "pa",
    "gujarati": "gu",
    "oriya": "or",
    "tamil": "ta",
    "telugu": "te",
    "kannada": "kn",
    "malayalam": "ml",
    "sinhala": "si",
    "thai": "th",
    "lao": "lo",
    "tibetan": "bo dz",
    "myanmar": "my shn",
    "khmer": "km",
    "ethiopic": "am ti",
    "thaana": "dv",
    "han": "zh yue lzh wuu cmn",
    "han kana": "ja",
    "hangul han": "ko",
}
# Script suffixes of language codes, after the underscore.
_SUFFIXES = {
    "latn": "latin",
    "cyrl": "cyrillic",
    "arab": "arabic",
    "deva": "devanagari",
    "grek": "greek",
    "hebr": "hebrew",
    "mong": "mongolian",
    "hang": "hangul",
    "thai": "thai",
    **dict.fromkeys(("hans", "hant", "hani"), "han"),
    "jpan": "han kana",
    "kore": "hangul han",
}


def _mask(names: str) -> int:
    return sum(_BITS[name] for name in names.split())


_MASKS = {code: _mask("latin") for code in _LATIN_LANGUAGES.split()}
_MASKS |= {code: _mask(names) for names, codes in _OTHER_LANGUAGES.items() for code in codes.split()}


def script_bits(first: int = 0) -> list[tuple[int, int, int]]:
    """Returns first character, last character and bit of every block; the bits start at `1 << first`."""
    blocks = []
    for name, ranges in _RANGES.items():
        for block in ranges.split():
            begin, _, end = block.partition("-")
            blocks.append((int(begin, 16), int(end or begin, 16), _BITS[name] << first))
    return blocks


def scripts_of(language: str) -> int:
    """Returns the scripts of a language as bits, 0 for an unknown language.

    A script suffix (`uz_cyrl`) overrides the scripts of the language; other suffixes (`zh_tw`) are ignored. A clone
    (`en_clone`) has the scripts of its language.
    """
    base, _, suffix = language.lower().partition("_")
    if suffix in _SUFFIXES:
        return _mask(_SUFFIXES[suffix])
    return _MASKS.get(base, 0)
