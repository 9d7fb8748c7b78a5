"""The report: metrics compared with counts by hand, the HTML page, and the commands `report` and `merge`."""

import json
import re
from pathlib import Path

import pytest
from support.dictionary_files import add_entries
from support.messages import assert_facts, assert_refused, user_error

from megatron_prealign.cli import main
from megatron_prealign.dictionary.build import BuildSettings, build_table
from megatron_prealign.dictionary.build_report import BuildReport
from megatron_prealign.dictionary.groups import GroupBuilder
from megatron_prealign.dictionary.report import ReportSettings, make_report
from megatron_prealign.dictionary.report_page import render_page
from megatron_prealign.dictionary.table import DictionaryTable, load_table
from megatron_prealign.preprocess.tokenizer_trainers import train_sentencepiece
from megatron_prealign.tokenizer.load import load_tokenizer
from megatron_prealign.tools.dictionary_report import no_keys_message

DOCUMENTS = ['The apple, (apple) and "Apple" - red! house', "red\nhouse. 42 Houses <b>houses</b>"]


def make_table(tokenizer) -> DictionaryTable:
    builder = GroupBuilder()
    add_entries(builder, [["apple", "Apfel"], ["red", "rot"], ["red", "roter"]], ("en", "de"), [1.0, 3.0, 1.0])
    add_entries(builder, [["red", "rouge"], ["house", "maison"]], ("en", "fr"))
    return build_table(builder.build(), tokenizer, BuildSettings(), BuildReport())


def test_counted_by_hand(tokenizer, make_dataset):
    table = make_table(tokenizer)
    prefix = make_dataset(tokenizer, DOCUMENTS, "en")
    report = make_report(table, [prefix], [tokenizer], ReportSettings(ratio=0.5))
    (corpus,) = report["corpora"]
    # the apple apple and Apple red house | red house Houses b houses b
    assert (corpus["running_words"], corpus["known_words"]) == (13, 7)
    # the apple and red house houses b
    assert (corpus["vocabulary"], corpus["known_vocabulary"]) == (7, 3)
    assert corpus["switch_rate"] == 0.5 * 7 / 13
    german, french = corpus["pairs"]
    assert (german["target"], german["known_words"], german["known_vocabulary"]) == ("de", 5, 2)
    assert (french["target"], french["known_words"], french["known_vocabulary"]) == ("fr", 4, 2)
    # "red" has two target languages, the other words have one.
    assert german["switch_rate"] == pytest.approx(0.5 * (3 + 2 * 0.5) / 13)
    assert french["switch_rate"] == pytest.approx(0.5 * (2 + 2 * 0.5) / 13)
    assert german["translations_per_word"] == pytest.approx((3 * 1 + 2 * 2) / 5)
    assert german["ambiguous_share"] == pytest.approx(2 / 5)
    assert german["words_by_translations"] == [3, 2, 0, 0, 0, 0, 0, 0]
    assert {each["word"]: each["count"] for each in corpus["unknown_words"]} == {
        "The": 1,
        "and": 1,
        "Houses": 2,
        "b": 2,
    }
    assert corpus["by_rank"] == [{"from": 1, "to": 7, "known": 3 / 7}]
    assert report["table"]["groups"] == 3


def test_most_frequent_switched_words(tokenizer, make_dataset):
    prefix = make_dataset(tokenizer, DOCUMENTS, "en")
    report = make_report(make_table(tokenizer), [prefix], [tokenizer], ReportSettings(frequent_words=2))
    apple, other = report["corpora"][0]["frequent_words"]
    # Three of thirteen words, "apple" in two spellings; "red" and "house" occur twice each.
    assert (apple["word"], apple["count"], apple["share"], apple["share_of_known"]) == ("apple", 3, 3 / 13, 3 / 7)
    assert apple["translations"] == [{"target": "de", "text": "Apfel", "probability": 1.0}]
    assert other["count"] == 2 and other["word"] in ("red", "house")
    report = make_report(make_table(tokenizer), [prefix], [tokenizer], ReportSettings())
    red = next(each for each in report["corpora"][0]["frequent_words"] if each["word"] == "red")
    assert {each["text"]: each["probability"] for each in red["translations"]} == {
        "rouge": 0.5,
        "rot": 0.375,
        "roter": 0.125,
    }
    assert "Apfel" in render_page(report) and "Most frequent switched words" in render_page(report)


def test_lengths(tokenizer, make_dataset):
    table = make_table(tokenizer)
    prefix = make_dataset(tokenizer, [" red house"], "en")
    (corpus,) = make_report(table, [prefix], [tokenizer], ReportSettings(ratio=1.0))["corpora"]

    def tokens(word: str) -> int:
        return len(tokenizer.encode_word(word))

    red_de = 0.75 * tokens("rot") + 0.25 * tokens("roter")
    after = [0.5 * red_de + 0.5 * tokens("rouge"), tokens("maison")]
    before = [tokens("red"), tokens("house")]
    assert corpus["tokens_before"] == pytest.approx(sum(before) / 2)
    assert corpus["tokens_after"] == pytest.approx(sum(after) / 2)
    assert corpus["growth"] == pytest.approx((sum(after) - sum(before)) / corpus["tokens"])
    german, french = corpus["pairs"]
    assert german["tokens_after"] == pytest.approx(red_de)
    assert german["growth"] + french["growth"] == pytest.approx(corpus["growth"])


def test_samples_are_known_words_in_their_documents(tokenizer, make_dataset):
    table = make_table(tokenizer)
    prefix = make_dataset(tokenizer, DOCUMENTS * 3, "en")
    settings = ReportSettings(samples=50)
    (corpus,) = make_report(table, [prefix], [tokenizer], settings)["corpora"]
    samples = corpus["samples"]
    assert len(samples) == 21
    translations = {"apple": {"Apfel", "APFEL"}, "red": {"rot", "roter", "rouge"}, "house": {"maison"}}
    for sample in samples:
        assert sample["switched"] in translations[sample["original"].lower()] or sample["original"] == "Apple"
        text = sample["before"] + sample["space"] + sample["original"] + sample["after"]
        assert any(text in document for document in DOCUMENTS)
    assert make_report(table, [prefix], [tokenizer], settings)["corpora"][0]["samples"] == samples
    few = make_report(table, [prefix], [tokenizer], ReportSettings(samples=2, unknown_words=1))["corpora"][0]
    assert len(few["samples"]) == 2 and len(few["unknown_words"]) == 1


def test_samples_of_a_tokenizer_that_drops_the_first_space(tmp_path, make_dataset):
    path = tmp_path / "sentencepiece.model"
    path.write_bytes(train_sentencepiece(iter(["the red apple and the red house"] * 50), 290, "bpe", 1.0))
    tokenizer = load_tokenizer(path)
    prefix = make_dataset(tokenizer, ["the red apple, red house and (red) apple"], "en")
    (corpus,) = make_report(make_table(tokenizer), [prefix], [tokenizer], ReportSettings())["corpora"]
    shown = [f"{each['before']}{each['space']}[{each['original']}]{each['after']}" for each in corpus["samples"]]
    assert shown[:2] == [
        "the [red] apple, red house and (red) apple",
        "the red [apple], red house and (red) apple",
    ]
    assert len(shown) == 6


def test_a_corpus_of_another_language(tokenizer, make_dataset):
    table = make_table(tokenizer)
    prefix = make_dataset(tokenizer, ["Apfel und Haus"], "es")
    report = make_report(table, [prefix], [tokenizer], ReportSettings())
    corpus = report["corpora"][0]
    assert (corpus["known_words"], corpus["coverage"], corpus["samples"]) == (0, 0.0, [])
    assert [pair["tokens_after"] for pair in corpus["pairs"]] == [None, None]
    assert "0.0%" in render_page(report)


def test_page(tokenizer, make_dataset):
    table = make_table(tokenizer)
    prefix = make_dataset(tokenizer, DOCUMENTS, "en")
    page = render_page(make_report(table, [prefix], [tokenizer], ReportSettings()))
    assert page.count("<svg ") == page.count("</svg>") == 4
    # No external resources, no scripts, and corpus text is escaped.
    assert "://" not in page and "<script" not in page and "<b>houses" not in page
    for tag in ("table", "figure", "ul", "ol", "dl"):
        assert page.count(f"<{tag}>") + page.count(f"<{tag} ") == page.count(f"</{tag}>")
    assert "pairs kept" in page and "max translations 4" in page
    assert re.search(r"<p>13 running words, 7 distinct words, in \d+ tokens\.</p>", page)


@pytest.mark.parametrize(
    ("fields", "fact"),
    [
        ({"ratio": 1.5}, "--ratio is 1.5"),
        ({"max_tokens": 0}, "--max-tokens is 0"),
        ({"samples": -1}, "--samples is -1"),
    ],
)
def test_invalid_settings(fields, fact):
    with user_error(fact):
        ReportSettings(**fields)


@pytest.fixture
def built(tokenizer, tmp_path: Path, capsys):
    """Runs `dictionary build` on lists, a mapping from `name:languages` to text; returns the path of the table."""

    def run(lists: dict[str, str], name: str = "table.safetensors", *options: str) -> Path:
        inputs = []
        for key, text in lists.items():
            file, _, _ = key.partition(":")
            (tmp_path / file).write_text(text, encoding="utf-8")
            inputs.append(f"{tmp_path}/{key}")
        output = tmp_path / name
        arguments = ["--input", *inputs, "--tokenizer", str(tokenizer.path), "--output", str(output), *options]
        status = main(["dictionary", "build", *arguments])
        captured = capsys.readouterr()
        assert status == 0, captured.err
        return output

    return run


def test_report_command(built, tokenizer, tmp_path, make_dataset, capsys):
    table = built({"a.tsv:en-de": "apple\tApfel\nred\trot\n"})
    corpus = make_dataset(tokenizer, DOCUMENTS, "en")
    arguments = ["dictionary", "report", "--table", str(table), "--corpus", str(corpus)]
    assert main([*arguments, "--output", str(tmp_path / "new" / "report"), "--ratio", "0.1"]) == 0
    printed = capsys.readouterr().out
    assert_facts(printed, "(en): 38.5% of 13 running words", "28.6% of 7 distinct words", "3.85%", "ratio of 0.1")
    report = json.loads((tmp_path / "new" / "report" / "report.json").read_text())
    assert report["table"]["sources"][0]["languages"] == "en-de"
    assert report["table"]["build"]["rules"]["pairs kept"] == 2
    assert (tmp_path / "new" / "report" / "report.html").read_text().startswith("<!DOCTYPE html>")
    (tmp_path / "file").write_text("")
    status = main([*arguments, "--output", str(tmp_path / "file")])
    assert_refused(status, capsys.readouterr().err, f"{tmp_path}/file is a file")
    status = main([*arguments, "--output", str(tmp_path / "r"), "--tokenizer", str(tmp_path / "none")])
    assert_refused(status, capsys.readouterr().err, f"{tmp_path / 'none'}: tokenizer not found")


def test_corpora_of_languages_without_keys(tokenizer, tmp_path, make_dataset, capsys):
    corpora = [str(make_dataset(tokenizer, ["Apfel und Haus"], language)) for language in ("de", "es")]
    lines = [
        no_keys_message(corpus, language, ["en", "ru"]) + "\n"
        for corpus, language in zip(corpora, ("de", "es"), strict=True)
    ]
    assert_facts(lines[0], f"{corpora[0]} (de)", "en, ru")
    lists = {"a.tsv:en-de": "apple\tApfel\n", "b.tsv:ru-de": "дом\tHaus\n"}
    capsys.readouterr()
    inputs = []
    for key, text in lists.items():
        (tmp_path / key.partition(":")[0]).write_text(text, encoding="utf-8")
        inputs.append(f"{tmp_path}/{key}")
    table = str(tmp_path / "table")
    common = ["--tokenizer", str(tokenizer.path), "--output", table, "--corpus", *corpora]
    commands = {
        "build": ["--input", *inputs, *common],
        "coverage": ["--table", table, "--corpus", *corpora],
        "report": ["--table", table, "--corpus", *corpora, "--output", f"{tmp_path}/report"],
    }
    for action, arguments in commands.items():
        assert main(["dictionary", action, *arguments]) == 0
        printed = capsys.readouterr().out
        assert "".join(lines) in printed and "%" not in printed and "lines skipped" not in printed
    assert_facts(no_keys_message("data/x", "en", []), "data/x (en)", "only for none")
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert [corpus["coverage"] for corpus in report["corpora"]] == [0.0, 0.0]


def test_merge_command(built, tokenizer, clone_tokenizer, tmp_path, make_dataset, capsys):
    lists = {"a.tsv:en-de": "apple\tApfel\nbank\tUfer\n", "b.tsv:en-fr": "bank\tbanque\nhouse\tmaison\n"}
    corpus = ["--corpus", str(make_dataset(tokenizer, ["a bank, the bank, house"], "en"))]
    joint = built(lists, "joint", *corpus)
    parts = [built({key: text}, f"part{number}", *corpus) for number, (key, text) in enumerate(lists.items())]
    output = tmp_path / "merged"
    arguments = ["dictionary", "merge", "--table", *map(str, parts), "--output", str(output)]
    assert main([*arguments, "--tokenizer", str(tokenizer.path)]) == 0
    assert "           3  groups\n" in capsys.readouterr().out
    merged, expected = load_table(output), load_table(joint)
    assert merged.switching_fingerprint() == expected.switching_fingerprint()
    assert [merged.group_words(group) for group in range(3)] == [expected.group_words(group) for group in range(3)]
    assert merged.sources == expected.sources
    assert merged.group_count.tolist() == expected.group_count.tolist() == [0, 2, 1]
    status = main([*arguments, "--tokenizer", str(clone_tokenizer.path)])
    assert_refused(status, capsys.readouterr().err, clone_tokenizer.fingerprint)
    status = main(["dictionary", "merge", "--table", str(joint), "--output", "o", "--tokenizer", "t"])
    assert_refused(status, capsys.readouterr().err, "--table", "1 table", "two or more")


def test_build_with_a_pivot_reversed_lists_and_counts(built, tokenizer, make_dataset):
    lists = {"a.tsv:en-de": "apple\tApfel\nhouse\tHaus\n", "b.tsv:en-fr": "apple\tpomme\nhouse\tmaison\n"}
    table = load_table(built(lists, "t", "--source", "de", "--pivot", "en"))
    assert [table.group_words(group) for group in range(table.num_groups)] == [
        [("de", "Apfel"), ("fr", "pomme")],
        [("de", "Haus"), ("fr", "maison")],
    ]
    kept = load_table(built(lists, "t", "--source", "de", "--pivot", "en", "--pivot-bridge"))
    assert {kept.group_words(group)[0] for group in range(kept.num_groups)} == {
        *(("de", word) for word in ("Apfel", "Haus")),
        *(("en", word) for word in ("apple", "house")),
    }
    corpus = make_dataset(tokenizer, ["apple apple"], "en")
    table = load_table(built(lists, "t", "--corpus", str(corpus), "--min-count", "2"))
    assert table.group_words(0)[0] == ("en", "apple") and table.num_groups == 1
    assert table.build["settings"]["min_count"] == 2


def test_a_list_that_is_a_symlink_loop(tokenizer, tmp_path, capsys):
    (tmp_path / "a.tsv").symlink_to(tmp_path / "a.tsv")
    arguments = ["--input", f"{tmp_path}/a.tsv:en-de", "--tokenizer", str(tokenizer.path), "--output", f"{tmp_path}/t"]
    status = main(["dictionary", "build", *arguments])
    assert_refused(status, capsys.readouterr().err, "error: cannot open", f"{tmp_path}/a.tsv")


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        (["--min-count", "2"], ("--min-count, --min-target-count and --order frequency", "--corpus")),
        (["--pivot", "fr"], ("--pivot is fr", "de, en")),
        (["--source", "fr"], ("--source is fr", "de, en")),
        (["--max-words", "0"], ("--max-words is 0", "1 or more")),
        (["--min-count", "-1"], ("--min-count is -1", "0 or more")),
        (["--format", "excel"], ("--format is excel", "stardict")),
        (["--output", "{}/none.tsv"], ("--output", "none.tsv", "overwrite")),
    ],
)
def test_invalid_options(options, facts, tmp_path, capsys):
    arguments = ["--input", f"{tmp_path}/none.tsv:en-de", "--tokenizer", "t", "--output", "o"]
    arguments += [option.format(tmp_path) for option in options]
    status = main(["dictionary", "build", *arguments])
    assert_refused(status, capsys.readouterr().err, "error: ", *facts)
