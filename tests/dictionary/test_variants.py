"""Case by language."""

import pytest

from megatron_prealign.dictionary.variants import apply_case, source_variant


@pytest.mark.parametrize(
    ("word", "language", "capitalised", "upper"),
    [
        ("apfel", "de", "Apfel", "APFEL"),
        ("Straße", "de", "Straße", "STRASSE"),
        ("(sich) freuen", "de", "(Sich) freuen", "(SICH) FREUEN"),
        ("яблоко", "ru", "Яблоко", "ЯБЛОКО"),
        ("istanbul", "tr", "İstanbul", "İSTANBUL"),
        ("ısı", "tr", "Isı", "ISI"),
        ("ijs", "nl", "IJs", "IJS"),
        ("苹果", "zh", "苹果", "苹果"),
        ("تفاح", "ar", "تفاح", "تفاح"),
        ("ვაშლი", "ka", "ვაშლი", "ვაშლი"),
        ("123", "de", "123", "123"),
    ],
)
def test_case_of_translations(word, language, capitalised, upper):
    assert apply_case(word, language, "as_is") == word
    assert apply_case(word, language, "capitalised") == capitalised
    assert apply_case(word, language, "upper") == upper


@pytest.mark.parametrize(
    ("word", "capitalised", "upper"),
    [
        ("apple", "Apple", "APPLE"),
        ("Berlin", None, "BERLIN"),
        ("NATO", None, None),
        ("iPhone", None, "IPHONE"),
        # At the start of a sentence, not in capitals.
        ("a", "A", None),
        ("りんご", None, None),
    ],
)
def test_source_variants_add_only_new_spellings(word, capitalised, upper):
    assert source_variant(word, "en", "as_is") == word
    assert source_variant(word, "en", "capitalised") == capitalised
    assert source_variant(word, "en", "upper") == upper
