"""Classes of the tokens of held-out text, compared with classes that the test writes next to each piece of text."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.dictionary_files import add_entries
from support.tiny import Tiny, recipe_of

from megatron_prealign.data.samples import ValidationSamples
from megatron_prealign.data.word_bitmap import words_path
from megatron_prealign.dictionary.build import BuildSettings, build_table
from megatron_prealign.dictionary.build_report import BuildReport
from megatron_prealign.dictionary.groups import GroupBuilder
from megatron_prealign.dictionary.table import DictionaryTable
from megatron_prealign.errors import UserError
from megatron_prealign.evaluation.word_classes import NO_LABEL, WordClasses, word_classes
from megatron_prealign.preprocess.run import PreprocessSettings, preprocess
from megatron_prealign.recipe import Recipe
from megatron_prealign.run.dictionary import open_dictionary
from megatron_prealign.run.validate import validate
from megatron_prealign.tokenizer.base import Tokenizer
from megatron_prealign.tokenizer.load import load_tokenizer

T, H, O = 0, 1, 2  # noqa: E741
Pieces = list[tuple[str, int]]
# Of the pairs, `kayak` and its translation are held out; `paddle` is in a held-out and in a trained group.
PAIRS = [["zebra", "zèbre"], ["kayak", "canoë"], ["paddle", "rame"], ["oar", "rame"], ["New York", "Nouvelle-York"]]
HELD_OUT = {"kayak", "oar"}
ENGLISH: list[Pieces] = [
    # In any case, with punctuation and a number, which are no words; New York is no word of one run of letters.
    [("A", O), (" zebra", T), (", 7", O), (" ZEBRAS", O), (" ZEBRA", T), ("! (", O), ("Kayak", H), (")", O)],
    [(" New York", O), (" kayaks'", O), (" paddle", T), (" oars", O), (" oar", H)],
    # The document ends inside a word that the next one seems to continue.
    [("The", O), (" zeb", O)],
    [("ra", O), (" paddle", T)],
]
FRENCH: list[Pieces] = [[("Zèbre", T), (" zebra", O), (" rame", T), (" canoë", H), (".", O)]]


@pytest.fixture(scope="module")
def tokenizer(tiny: Tiny) -> Tokenizer:
    return load_tokenizer(tiny.tokenizer)


@pytest.fixture
def words(tokenizer: Tokenizer) -> tuple[DictionaryTable, Any]:
    return table_of(tokenizer)


def table_of(tokenizer: Tokenizer) -> tuple[DictionaryTable, Any]:
    builder = GroupBuilder()
    add_entries(builder, PAIRS, ("en", "fr"))
    table = build_table(builder.build(), tokenizer, BuildSettings(), BuildReport())
    held_out = [table.group_words(group)[0][1] in HELD_OUT for group in range(table.num_groups)]
    assert sum(held_out) == 2
    return table, np.array(held_out)


def write(documents: list[Pieces], language: str, tiny: Tiny, directory: Path, **settings: Any) -> str:
    """Preprocesses the documents; returns the prefix."""
    directory.mkdir(parents=True, exist_ok=True)
    source, prefix = directory / f"{language}.jsonl", directory / language
    lines = [json.dumps({"text": "".join(text for text, _ in pieces)}) + "\n" for pieces in documents]
    source.write_text("".join(lines), encoding="utf-8")
    preprocess([str(source)], tiny.tokenizer, str(prefix), PreprocessSettings(language=language, **settings), False)
    return str(prefix)


def expected(documents: list[Pieces], tokenizer: Tokenizer) -> list[int]:
    """Classes of the labels, from the characters of each token and the class of each character."""
    classes = []
    for pieces in documents:
        characters = [kind for text, kind in pieces for _ in text]
        document = "".join(text for text, _ in pieces)
        _, spans = tokenizer.encode_with_offsets(document)
        for start, end in spans.tolist():
            (kind,) = set(characters[start:end])
            # A space that is a token of its own is in no word.
            classes.append(kind if document[start:end].strip() else O)
        classes.append(O)  # the end of the document
    return classes[1:]


def recipe_for(tiny: Tiny, directory: Path, sources: list[tuple[str, str]], **fields: Any) -> Recipe:
    """Recipe that holds out half of `sources`, language and prefix, unless it has `validation`."""
    values = copy.deepcopy(tiny.values(directory))
    for section in ("dictionary", "alignment", "code_switch"):
        del values[section]
    entries = [{"path": path, "language": language} for language, path in sources]
    values["data"].update(sources=[each | {"weight": 1.0} for each in entries], validation_fraction=0.5)
    values["data"].update({name: fields.pop(name) for name in ("seq_length", "validation") if name in fields})
    values["training"].update(fields)
    return recipe_of(values, directory)


def validation_for(tiny: Tiny, directory: Path, documents: dict[str, list[Pieces]], **fields: Any) -> Recipe:
    """Recipe whose validation data are `documents`."""
    prefixes = {language: write(each, language, tiny, directory) for language, each in documents.items()}
    training = [(language, f"{directory}/training/{language}") for language in documents]
    for language, pieces in documents.items():
        write(pieces, language, tiny, directory / "training")
    validation = [{"path": path, "language": language} for language, path in prefixes.items()]
    return recipe_for(tiny, directory, training, validation=validation, **fields)


def opened(recipe: Recipe) -> ValidationSamples:
    return ValidationSamples.build(
        recipe.data, languages=recipe.data.languages, max_samples=recipe.training.eval_samples
    )


def test_classes_by_hand(tiny: Tiny, tokenizer: Tokenizer, words: Any, tmp_path: Path) -> None:
    recipe = validation_for(tiny, tmp_path, {"en": ENGLISH, "fr": FRENCH}, seq_length=8, eval_samples=1000)
    classes = word_classes(recipe, words, tokenizer)
    assert len(tokenizer.encode(" zebra")) > 1
    assert classes.labels["en"].tolist() == (english := expected(ENGLISH, tokenizer))
    assert classes.labels["fr"].tolist() == expected(FRENCH, tokenizer)
    assert list(classes.labels) == ["en", "fr"]
    assert classes.tokens("en") == {
        name: english.count(kind) for kind, name in enumerate(("trained", "held_out", "other"))
    }
    assert sum(classes.shares("en").values()) == pytest.approx(1.0)
    assert classes.names == [f"{each}/{name}" for each in ("en", "fr") for name in ("trained", "held_out", "other")]


@pytest.mark.parametrize("seq_length", [1, 2, 3, 7])
def test_samples_cut_words_but_not_their_class(
    tiny: Tiny, tokenizer: Tokenizer, words: Any, tmp_path: Path, seq_length: int
) -> None:
    everything = expected(ENGLISH, tokenizer)
    recipe = validation_for(tiny, tmp_path, {"en": ENGLISH}, seq_length=seq_length, eval_samples=1000)
    samples, classes = opened(recipe), word_classes(recipe, words, tokenizer)
    count = samples.num_samples("en")
    rows = classes.samples("en", range(count))
    assert rows.shape == (count, seq_length)
    padded = everything + [NO_LABEL] * (rows.size - len(everything))
    assert rows.ravel().tolist() == padded
    _, mask = samples.batch("en", range(count))
    assert ((rows != NO_LABEL) == mask.numpy()).all()
    assert (classes.samples("en", [2, 0]) == rows[[2, 0]]).all()


def test_the_last_word_of_a_limited_sample_is_complete(
    tiny: Tiny, tokenizer: Tokenizer, words: Any, tmp_path: Path
) -> None:
    everything = expected(ENGLISH, tokenizer)
    recipe = validation_for(tiny, tmp_path, {"en": ENGLISH}, seq_length=1, eval_samples=1)
    for limit in range(1, len(everything) + 3):
        values = recipe_for(
            tiny,
            tmp_path,
            [("en", str(tmp_path / "training" / "en"))],
            validation=[{"path": str(tmp_path / "en"), "language": "en"}],
            seq_length=1,
            eval_samples=limit,
        )
        assert word_classes(values, words, tokenizer).labels["en"].tolist() == everything[:limit]
    assert recipe.training.eval_samples == 1


def test_documents_held_out_of_the_sources(tiny: Tiny, tokenizer: Tokenizer, words: Any, tmp_path: Path) -> None:
    prefix = write(ENGLISH, "en", tiny, tmp_path)
    recipe = recipe_for(tiny, tmp_path, [("en", prefix)], seq_length=5, eval_samples=1000)
    # The last half.
    assert word_classes(recipe, words, tokenizer).labels["en"].tolist() == expected(ENGLISH[2:], tokenizer)
    assert opened(recipe).num_samples("en") == -(-len(expected(ENGLISH[2:], tokenizer)) // 5)


def test_several_datasets_of_a_language(tiny: Tiny, tokenizer: Tokenizer, words: Any, tmp_path: Path) -> None:
    paths = [write(part, "en", tiny, tmp_path / f"part_{n}") for n, part in enumerate((ENGLISH[:2], ENGLISH[2:]))]
    everything = expected([ENGLISH[1], ENGLISH[3]], tokenizer)
    for limit in (1, len(expected(ENGLISH[1:2], tokenizer)) + 2, 1000):
        recipe = recipe_for(tiny, tmp_path, [("en", path) for path in paths], seq_length=1, eval_samples=limit)
        assert word_classes(recipe, words, tokenizer).labels["en"].tolist() == everything[:limit]


def test_what_has_no_tokens_is_absent(tiny: Tiny, tokenizer: Tokenizer, words: Any, tmp_path: Path) -> None:
    text: list[Pieces] = [[("A", O), (" zebra", T)]]
    recipe = validation_for(tiny, tmp_path, {"en": text, "de": text}, eval_samples=1000)
    classes = word_classes(recipe, words, tokenizer)
    # No held-out word in the text, and no language `de` in the table.
    assert classes.names == ["en/trained", "en/other"]
    assert word_classes(recipe, None, tokenizer).names == WordClasses().names == []
    one = validation_for(tiny, tmp_path / "other", {"en": [[("seven 7", O)]]}, eval_samples=1000)
    assert word_classes(one, words, tokenizer).names == ["en/other"]


def test_words_of_a_segmenter(tiny: Tiny, tokenizer: Tokenizer, tmp_path: Path) -> None:
    builder = GroupBuilder()
    add_entries(builder, [["银行", "bank"], ["房子", "house"]], ("zh", "en"))
    table = build_table(builder.build(), tokenizer, BuildSettings(), BuildReport())
    text: list[Pieces] = [[("我", O), ("银行", T), ("苹果", O), ("房子", T), ("行", O)]]
    prefix = write(text, "zh", tiny, tmp_path, segmenter="support.word_cutters:KnownWords")
    validation = [{"path": prefix, "language": "zh"}]
    training = write(text, "zh", tiny, tmp_path / "training")
    recipe = recipe_for(tiny, tmp_path, [("zh", training)], validation=validation, eval_samples=1000)
    nothing = np.zeros(table.num_groups, dtype=bool)
    assert word_classes(recipe, (table, nothing), tokenizer).labels["zh"].tolist() == expected(text, tokenizer)
    words_path(prefix).unlink()
    with pytest.raises(UserError, match=r"zh\.words: file not found"):
        word_classes(recipe, (table, nothing), tokenizer)


def test_runs_compare_whatever_they_train(tiny: Tiny, tokenizer: Tokenizer, words: Any, tmp_path: Path) -> None:
    """Joint training, alignment with other limits, and a run with another table that measures this one."""
    values = tiny.values(tmp_path / "run")
    other = tmp_path / "other.safetensors"
    words[0].save(other)
    aligned = copy.deepcopy(values)
    aligned["alignment"].update(max_word_tokens=2, words_per_step=8)
    joint = {name: section for name, section in values.items() if name not in ("alignment", "code_switch")}
    control = {**joint, "dictionary": {"table": str(other), "evaluation_table": tiny.table}}
    unlike = {**joint, "dictionary": {"table": str(other)}}
    # `other` has no words in en_clone.
    rows = []
    for each in (values, aligned, joint, control, unlike):
        lines = validate(recipe_of(each, tmp_path)).splitlines()
        rows.append([line for line in lines if line.startswith("validation ")])
    assert rows[0] == rows[1] == rows[2] == rows[3]
    assert [line.split()[1] for line in rows[0]] == ["en,", "en_clone,"]
    assert all("trained words" in line and "other tokens" in line for line in rows[0])
    assert [line.split()[1] for line in rows[4]] == ["en,"]
    recipe = recipe_of(control, tmp_path)
    dictionary = open_dictionary(recipe, tokenizer.fingerprint)
    assert dictionary is not None
    assert dictionary.measured[0] is not dictionary.table
