"""`dictionary induce`: word lists from parallel text."""

import bz2
import gzip
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import zstandard
from support.messages import assert_facts, assert_refused, user_error
from support.next_commands import next_commands

from megatron_prealign.cli import main
from megatron_prealign.dictionary.bitext import Bitext, choose_segmenters, read_bitext
from megatron_prealign.dictionary.induce import Induced, InduceSettings, induce, make_vocabulary
from megatron_prealign.dictionary.readers import ReadErrors, parse_bitext
from megatron_prealign.dictionary.running_words import letter_runs, letter_runs_as_written
from megatron_prealign.dictionary.table import load_table

NOUNS = {"house": "Haus", "dog": "Hund", "tree": "Baum", "book": "Buch", "apple": "Apfel"}
ARTICLES = {"the": "das", "a": "ein", "no": "kein", "every": "jedes"}
VERBS = {"sees": "sieht", "finds": "findet", "likes": "mag"}


def sentences(number: int = 120, seed: int = 0) -> list[tuple[str, ...]]:
    """English and German sentences, word by word: `Every dog sees a tree.`"""
    generator = np.random.default_rng(seed)
    pairs = []
    for _ in range(number):
        words = [str(generator.choice(list(each))) for each in (ARTICLES, NOUNS, VERBS, ARTICLES, NOUNS)]
        translated = [{**ARTICLES, **NOUNS, **VERBS}[word] for word in words]
        pairs.append(tuple(f"{text[:1].upper()}{text[1:]}." for text in (" ".join(words), " ".join(translated))))
    return pairs


def write_tsv(path: Path, pairs: Sequence[tuple[str, ...]]) -> Path:
    path.write_text("".join("\t".join(pair) + "\n" for pair in pairs), encoding="utf-8")
    return path


def read(*files: str, max_words: int = 100) -> Bitext:
    return read_bitext([parse_bitext(file) for file in files], {}, ReadErrors(), max_words=max_words)


def pairs_of(induced: Induced) -> list[tuple[str, str]]:
    return [(pair.source, pair.target) for pair in induced.pairs]


def test_the_words_of_a_small_language(tmp_path: Path) -> None:
    bitext = read(f"{write_tsv(tmp_path / 'a.tsv', sentences())}:en-de")
    induced = induce(bitext, InduceSettings(min_count=5, min_probability=0.3), tmp_path)
    expected = {**NOUNS, **VERBS, **ARTICLES}
    capitalised = {(source.title(), target.title()) for source, target in ARTICLES.items()}
    assert set(pairs_of(induced)) == set(expected.items()) | capitalised
    assert induced.covered == (1.0, 1.0) and induced.num_translations == len(expected)
    assert all(0.3 <= pair.weight <= 1 for pair in induced.pairs)


def test_thresholds_are_those_of_the_settings(tmp_path: Path) -> None:
    bitext = read(f"{write_tsv(tmp_path / 'a.tsv', sentences())}:en-de")
    # More iterations leave the true pairs alone.
    loose = induce(bitext, InduceSettings(min_count=1, min_probability=0.001, iterations=2), tmp_path)
    strict = induce(bitext, InduceSettings(min_count=1, min_probability=0.1, iterations=2), tmp_path)
    assert len(strict.pairs) < len(loose.pairs) and min(pair.weight for pair in strict.pairs) >= 0.1
    # Of a word's occurrences, the null word takes a few per cent.
    frequent = induce(bitext, InduceSettings(min_count=50), tmp_path)
    words = frequent.words[0]
    counts = {words.forms[form].lower(): int(words.count[word]) for form, word in enumerate(words.word_of.tolist())}
    found = {counts[source.lower()] for source, _ in pairs_of(frequent)}
    assert min(counts.values()) < 50 <= min(found) and max(found) == max(counts.values())
    with user_error("--min-count 500", "--min-probability 0.05", "120 sentence pairs"):
        induce(bitext, InduceSettings(min_count=500), tmp_path)


def test_forms_are_written_as_they_occur(tmp_path: Path) -> None:
    """Usual forms are paired; others by their capitals; a form that occurs once is left out."""
    pairs = [("house", "Haus")] * 9 + [("House", "Haus")] * 3 + [("HOUSE", "HAUS")] * 2
    pairs += [("go", "gehen")] * 7 + [("Go", "Gehen")] * 2 + [("GO", "gehen"), ("GO", "GEHEN")]
    pairs += [("one", "ein")] * 5 + [("ONE", "EIN"), ("one", "EIN")]
    bitext = read(f"{write_tsv(tmp_path / 'a.tsv', pairs)}:en-de")
    induced = induce(bitext, InduceSettings(), tmp_path)
    assert pairs_of(induced) == [
        *[("house", "Haus"), ("House", "Haus"), ("HOUSE", "HAUS")],
        # GEHEN occurs once: the table has capitals of its own.
        *[("go", "gehen"), ("Go", "Gehen")],
        # ONE occurs once.
        ("one", "ein"),
    ]
    weights = [pair.weight for pair in induced.pairs]
    assert len(set(weights[:3])) == len(set(weights[3:5])) == 1


def test_rare_words_are_in_no_pair(tmp_path: Path) -> None:
    """Together they occur often enough, and translate each other."""
    pairs = [("dog", "Hund")] * 5 + [(f"rare{letter}", f"selten{letter}") for letter in "abcdefgh"]
    bitext = read(f"{write_tsv(tmp_path / 'a.tsv', pairs)}:en-de")
    assert pairs_of(induce(bitext, InduceSettings(), tmp_path)) == [("dog", "Hund")]


def test_pairs_are_in_descending_count(tmp_path: Path) -> None:
    pairs = [("rare", "selten")] * 4 + [("often", "oft")] * 9 + [("mid", "mittel")] * 6
    bitext = read(f"{write_tsv(tmp_path / 'a.tsv', pairs)}:en-de")
    assert [pair.source for pair in induce(bitext, InduceSettings(), tmp_path).pairs] == ["often", "mid", "rare"]


def test_words_are_those_of_the_package(tmp_path: Path) -> None:
    """Runs of letters: apostrophes, hyphens and digits separate; decomposed letters are composed as in lists."""
    text = "Don't re-enter E\u0301cole no. 42"
    bitext = read(f"{write_tsv(tmp_path / 'a.tsv', [(text, 'x')])}:en-de")
    assert bitext.sides[0].forms == ["Don", "t", "re", "enter", "École", "no"]
    for character in (each for each in map(chr, range(0x20000)) if each != each.casefold()):
        folded = [run.casefold() for run in letter_runs_as_written(f"a{character}B")]
        assert folded == letter_runs(f"a{character}B"), hex(ord(character))


def test_counting_ignores_case(tmp_path: Path) -> None:
    bitext = read(f"{write_tsv(tmp_path / 'a.tsv', [('The Straße', 'a'), ('the STRASSE the', 'a')])}:de-en")
    words = make_vocabulary(bitext.sides[0])
    assert words.forms == ["The", "Straße", "the", "STRASSE"] and words.form_count.tolist() == [1, 1, 2, 1]
    assert words.word_of.tolist() == [0, 1, 0, 1] and words.count.tolist() == [3, 2]
    assert words.forms_of(np.array([0], np.int32)) == {0: [2, 0]}


def test_skipped_sentence_pairs_are_counted(tmp_path: Path) -> None:
    lines = [("a b", "c"), ("", "c"), ("a", "12 %"), ("a b c", "d"), ("a", "d e f"), ("a b", "c d")]
    bitext = read(f"{write_tsv(tmp_path / 'a.tsv', lines)}:en-de", max_words=2)
    assert (bitext.pairs, bitext.empty, bitext.too_long) == (2, 2, 2)
    with user_error("a.tsv", "2 with a side without words", "4 with a sentence of more than 0 words", "--max-words"):
        read(f"{tmp_path / 'a.tsv'}:en-de", max_words=0)


def test_reversed_columns_and_several_files(tmp_path: Path) -> None:
    pairs = sentences()
    both = read(f"{write_tsv(tmp_path / 'both.tsv', pairs)}:en-de")
    first = write_tsv(tmp_path / "first.tsv", pairs[:50])
    second = write_tsv(tmp_path / "second.tsv", [pair[::-1] for pair in pairs[50:]])
    parts = read(f"{first}:en-de", f"{second}:de-en")
    assert parts.languages == ("en", "de")
    for side, other in zip(both.sides, parts.sides, strict=True):
        assert side.forms == other.forms and np.array_equal(side.running, other.running)
    with user_error("second.tsv", "en-fr", "expected en-de as in", "first.tsv"):
        read(f"{first}:en-de", f"{second}:en-fr")


def test_block_size_and_repetition_change_nothing(tmp_path: Path) -> None:
    bitext = read(f"{write_tsv(tmp_path / 'a.tsv', sentences())}:en-de")
    settings = InduceSettings(min_count=1, min_probability=1e-6, iterations=2)
    first = induce(bitext, settings, tmp_path)
    assert len(first.pairs) > 50
    for block_links in (1, 33, 1 << 20):
        assert induce(bitext, settings, tmp_path, block_links=block_links).pairs == first.pairs


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "zst": lambda data: zstandard.ZstdCompressor().compress(data),
}


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_compressed_text(compression: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = write_tsv(tmp_path / "a.tsv", sentences())
    packed = tmp_path / f"a.tsv.{compression}"
    packed.write_bytes(COMPRESSIONS[compression](plain.read_bytes()))
    for path in (plain, packed):
        assert main(["dictionary", "induce", "--bitext", f"{path}:en-de", "--output", f"{path}.list"]) == 0
    assert Path(f"{plain}.list").read_bytes() == Path(f"{packed}.list").read_bytes()


def test_command_and_the_build_that_it_names(tokenizer, tmp_path, capsys) -> None:
    text = write_tsv(tmp_path / "a.tsv", [*sentences(), ("one", "two", "three"), ("1", "2"), ("a " * 101, "b")])
    output = tmp_path / "new" / "list.tsv"
    arguments = ["dictionary", "induce", "--bitext", f"{text}:en-de", "--output", str(output)]
    status = main(arguments)
    assert_refused(status, capsys.readouterr().err, f"{text}:121:", "3 columns", "expected 2", "--on-error skip")
    assert not output.parent.exists()

    assert main([*arguments, "--on-error", "skip"]) == 0
    printed = capsys.readouterr().out
    assert_facts(
        printed, f"skipped {text}:121:", "120  sentence pairs used", "1  lines", "1  sentence pairs with a side"
    )
    assert_facts(
        printed, "more than 100 words on a side", "en: 600 running words, 12 distinct words, 12 with 3 or more"
    )
    assert_facts(printed, "kept 12 pairs of words", "100.0%  of the running words of de", f"wrote {output}: 16 pairs")
    lines = output.read_text(encoding="utf-8").splitlines()
    assert (
        lines[0] == "en\tde\tweight"
        and len(lines) == 17
        and [path.name for path in output.parent.iterdir()] == [output.name]
    )

    (build,) = next_commands(printed)
    table = str(tmp_path / "table.safetensors")
    replaced = {"TOKENIZER": str(tokenizer.path), "table.safetensors": table}
    assert main([replaced.get(word, word) for word in build]) == 0
    built = load_table(table)
    assert built.num_groups == 16 and ("de", "Haus") in {word for row in range(16) for word in built.group_words(row)}
    # A list is replaced, other files are not.
    first = output.read_bytes()
    assert main([*arguments, "--on-error", "skip"]) == 0
    assert output.read_bytes() == first


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (["--bitext", "a.tsv"], ("--bitext a.tsv: got 0 languages", "a.tsv:en-de")),
        (["--bitext", "a.tsv:en-de-fr"], ("got 3 languages", "expected the two")),
        (["--bitext", "missing.tsv:en-de"], ("missing.tsv", "cannot open")),
        (["--bitext", "a.tsv:en-de", "--min-count", "0"], ("--min-count is 0", "1 or more")),
        (["--bitext", "a.tsv:en-de", "--iterations", "0"], ("--iterations is 0", "1 or more")),
        (["--bitext", "a.tsv:en-de", "--max-words", "0"], ("--max-words is 0", "1 or more")),
        (["--bitext", "a.tsv:en-de", "--min-probability", "0"], ("--min-probability is 0.0", "above 0")),
        (["--bitext", "a.tsv:en-de", "--min-probability", "1.5"], ("--min-probability is 1.5", "at most 1")),
        (["--bitext", "a.tsv:en-de", "--output", "a.tsv"], ("--output a.tsv would overwrite an input",)),
        (["--bitext", "a.tsv:en-de", "--output", "other.txt"], ("--output other.txt", "is no list")),
        (
            ["--bitext", "a.tsv:en-de", "--output", "french.tsv"],
            ("--output french.tsv", "is no list of these languages"),
        ),
        (["--bitext", "a.tsv:en-de", "--output", "."], ("--output .", "is no list")),
        (["--bitext", "a.tsv:en-zh"], ("zh is written without spaces", "--segmenter zh=jieba")),
        (["--bitext", "a.tsv:en-ja_JP"], ("ja_JP is written without spaces", "--segmenter ja_JP=sudachi")),
        (["--bitext", "a.tsv:en-de", "--segmenter", "zh=icu"], ("--segmenter zh=icu", "expected one of en, de")),
        (["--bitext", "empty.tsv:en-de"], ("empty.tsv", "empty")),
        (["--bitext", "cut.gz:en-de"], ("cut.gz:", "truncated")),
    ],
)
def test_errors(
    arguments: list[str],
    facts: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_tsv(Path("a.tsv"), sentences(20))
    Path("other.txt").write_text("a\tb\n")
    Path("french.tsv").write_text("en\tfr\tweight\n")
    Path("empty.tsv").write_text("")
    Path("cut.gz").write_bytes(gzip.compress(Path("a.tsv").read_bytes())[:-9])
    before = sorted(tmp_path.iterdir())
    status = main(["dictionary", "induce", "--output", "list.tsv", *arguments])
    assert_refused(status, capsys.readouterr().err, *facts)
    assert sorted(tmp_path.iterdir()) == before


def test_a_segmenter_finds_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = [("apple bank", "苹果银行"), ("house bank", "房子银行"), ("apple house", "苹果，房子")] * 5
    text = write_tsv(tmp_path / "a.tsv", pairs)
    output = tmp_path / "list.tsv"
    arguments = ["dictionary", "induce", "--bitext", f"{text}:en-zh", "--output", str(output)]
    assert main([*arguments, "--segmenter", "zh=support.word_cutters:KnownWords"]) == 0
    found = [tuple(line.split("\t")[:2]) for line in output.read_text(encoding="utf-8").splitlines()[1:]]
    assert set(found) == {("apple", "苹果"), ("bank", "银行"), ("house", "房子")}
    capsys.readouterr()
    status = main([*arguments, "--segmenter", "zh=support.word_cutters:Failing"])
    assert_refused(status, capsys.readouterr().err, f"{text}:1", "support.word_cutters:Failing")


def test_segmenters_are_required_where_words_are_not_separated() -> None:
    assert choose_segmenters([], ["en", "de"]) == {}
    assert choose_segmenters(["auto"], ["en", "th"]) == {"th": "newmm"}
    assert choose_segmenters(["zh=a:B"], ["en", "zh"]) == {"zh": "a:B"}
    with user_error("zh", "--segmenter zh=jieba"):
        choose_segmenters(["ja=sudachi"], ["zh", "ja"])


def test_no_torch_is_imported(tmp_path: Path) -> None:
    import subprocess
    import sys

    text = write_tsv(tmp_path / "a.tsv", sentences(30))
    command = ["dictionary", "induce", "--bitext", f"{text}:en-de", "--output", str(tmp_path / "list.tsv")]
    code = (
        f"import sys; from megatron_prealign.cli import main\nassert main({command!r}) == 0\n"
        "heavy = {'torch', 'megatron', 'transformers', 'matplotlib'} & set(sys.modules)\nassert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
