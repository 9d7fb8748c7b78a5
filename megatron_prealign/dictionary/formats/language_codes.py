"""ISO 639: which two- and three-letter codes name the same language."""

from collections.abc import Collection, Iterable

# Two- and three-letter codes of each language.
_CODES = """
aa aar ab abk af afr ak aka am amh ar ara an arg as asm av ava ae ave ay aym az aze ba bak bm bam be bel bn ben bi bis
bo bod bs bos br bre bg bul ca cat cs ces ch cha ce che cu chu cv chv kw cor co cos cr cre cy cym da dan de deu dv div
dz dzo el ell en eng eo epo et est eu eus ee ewe fo fao fa fas fj fij fi fin fr fra fy fry ff ful gd gla ga gle gl glg
gv glv gn grn gu guj ht hat ha hau he heb hz her hi hin ho hmo hr hrv hu hun hy hye ig ibo io ido ii iii iu iku ie ile
ia ina id ind ik ipk is isl it ita jv jav ja jpn kl kal kn kan ks kas ka kat kr kau kk kaz km khm ki kik rw kin ky kir
kv kom kg kon ko kor kj kua ku kur lo lao la lat lv lav li lim ln lin lt lit lb ltz lu lub lg lug mh mah ml mal mr mar
mk mkd mg mlg mt mlt mn mon mi mri ms msa my mya na nau nv nav nr nbl nd nde ng ndo ne nep nn nno nb nob no nor ny nya
oc oci oj oji or ori om orm os oss pa pan pi pli pl pol pt por ps pus qu que rm roh ro ron rn run ru rus sg sag sa san
si sin sk slk sl slv se sme sm smo sn sna sd snd so som st sot es spa sq sqi sc srd sr srp ss ssw su sun sw swa sv swe
ty tah ta tam tt tat te tel tg tgk tl tgl th tha ti tir to ton tn tsn ts tso tk tuk tr tur tw twi ug uig uk ukr ur urd
uz uzb ve ven vi vie vo vol wa wln wo wol xh xho yi yid yo yor za zha zh zho zu zul
"""
_PAIRS = _CODES.split()
# Codes of individual languages that lists use instead of the macrolanguage code.
_MEMBERS = {"zh": "cmn", "ar": "arb", "fa": "pes", "ms": "zsm", "et": "ekk", "lv": "lvs", "sq": "als", "sw": "swh"}
_MEMBERS |= {"ne": "npi", "or": "ory", "mn": "khk", "uz": "uzn", "az": "azj", "no": "nob", "ku": "kmr", "yi": "ydd"}

TRADITIONAL = frozenset({"zh_hant", "zh_tw", "zh_hk", "zh_mo"})
"""Codes of Chinese written in traditional characters."""

_SAME: dict[str, frozenset[str]] = {}
for _two, _three in zip(_PAIRS[::2], _PAIRS[1::2], strict=True):
    _codes = frozenset({_two, _three, _MEMBERS.get(_two, _three)})
    for _code in _codes:
        _SAME[_code] = _SAME.get(_code, frozenset()) | _codes


# English names and codes of languages that are likely to occur in a header.
_NAMES = """
arabic ar armenian hy azerbaijani az basque eu belarusian be bengali bn bulgarian bg burmese my catalan ca
chinese zh croatian hr czech cs danish da dutch nl english en esperanto eo estonian et finnish fi french fr
galician gl georgian ka german de greek el gujarati gu hebrew he hindi hi hungarian hu icelandic is indonesian
id irish ga italian it japanese ja kazakh kk khmer km korean ko lao lo latin la latvian lv lithuanian lt
macedonian mk malay ms maltese mt marathi mr mongolian mn nepali ne norwegian no persian fa polish pl
portuguese pt romanian ro russian ru serbian sr slovak sk slovenian sl spanish es swahili sw swedish sv
tagalog tl tamil ta telugu te thai th tibetan bo turkish tr ukrainian uk urdu ur uzbek uz vietnamese vi welsh
cy yiddish yi
"""
_NAMED = _NAMES.split()
_CODE_OF_NAME = dict(zip(_NAMED[::2], _NAMED[1::2], strict=True))


def parse_language(text: str) -> tuple[frozenset[str], bool]:
    """Returns all codes of the language given by a code or an English name (empty for other text), and whether `text`
    is a name."""
    text = text.strip().lower()
    code = _CODE_OF_NAME.get(text, text)
    return (same_language(code) if code.partition("_")[0] in _SAME else frozenset()), text in _CODE_OF_NAME


def other_codes(languages: Iterable[str], known: Collection[str]) -> dict[str, str]:
    """Returns language -> code in `known` of each language that `known` has only under another code or name."""
    renamed = {}
    for language in languages:
        same = [each for each in known if parse_language(each)[0] & parse_language(language)[0]]
        if same and language not in known:
            renamed[language] = same[0]
    return renamed


def language_name_warnings(languages: Iterable[str]) -> list[str]:
    """Warnings about languages given by their English names: datasets have codes."""
    return [
        f"language {language} is a name, its code is {_CODE_OF_NAME[language.lower()]}; a run uses the words of a "
        "language only if table and datasets have the same code"
        for language in languages
        if parse_language(language)[1]
    ]


def same_language(code: str) -> frozenset[str]:
    """Returns all codes of the language of `code`, in lower case; an underscore suffix (script or country) is
    ignored."""
    base = code.lower().partition("_")[0]
    return _SAME.get(base, frozenset({base}))
