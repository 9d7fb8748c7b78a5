"""Case rules by language."""

import pytest

from megatron_prealign.dictionary.variants import Case, apply_case, spell


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
    # Other words in the batch must not change the result.
    for words in ([word], ["x", word, "Ä"]):
        index = words.index(word)
        assert apply_case(words, language, "as_is") == words
        assert apply_case(words, language, "capitalised")[index] == capitalised
        assert apply_case(words, language, "upper")[index] == upper


@pytest.mark.parametrize(
    ("word", "capitalised", "upper"),
    [
        ("apple", "Apple", "APPLE"),
        ("Berlin", None, "BERLIN"),
        ("NATO", None, None),
        ("iPhone", None, "IPHONE"),
        # "A" counts as capitalised, not as upper case.
        ("a", "A", None),
        ("りんご", None, None),
    ],
)
def test_source_variants_add_only_new_spellings(word, capitalised, upper):
    spellings = spell(["x", word, "x"], "en")
    expected: dict[Case, str | None] = {"as_is": word, "capitalised": capitalised, "upper": upper}
    for case, spelling in expected.items():
        # "X" counts as capitalised.
        x = case != "upper"
        assert spellings.is_variant[case].tolist() == [x, spelling is not None, x]
        assert spellings.words[case][1] == (spelling or apply_case([word], "en", case)[0])
        assert spellings.changed[case].tolist() == [case != "as_is", spellings.words[case][1] != word, case != "as_is"]
