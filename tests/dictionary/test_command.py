"""`megatron-prealign dictionary`, end to end."""

import subprocess
import sys

import pytest
from support.messages import assert_refused

from megatron_prealign.cli import main
from megatron_prealign.dictionary.table import load_table


def test_build_and_coverage(tokenizer, tmp_path, make_dataset, capsys):
    (tmp_path / "de.tsv").write_text("apple\tApfel\nhouse\tHaus\nbroken\n")
    (tmp_path / "zh.jsonl").write_text('{"src_text": "apple", "tgt_text": "苹果"}\n')
    corpus = str(make_dataset(tokenizer, ["The apple, a house, apple"], "en"))
    capsys.readouterr()
    output = str(tmp_path / "table.safetensors")
    arguments = ["dictionary", "build", "--input", f"{tmp_path}/de.tsv", f"{tmp_path}/zh.jsonl:en-zh"]
    arguments += ["--tokenizer", str(tokenizer.path), "--output", output, "--corpus", corpus]
    arguments += ["--languages", "en-de", "--licence", "CC0-1.0"]
    status = main(arguments)
    assert_refused(status, capsys.readouterr().err, f"error: {tmp_path}/de.tsv:3:", "1 column", "--on-error skip")
    assert not (tmp_path / "table.safetensors").exists()

    assert main([*arguments, "--on-error", "skip"]) == 0
    printed = capsys.readouterr().out
    assert f"skipped {tmp_path}/de.tsv:3: got 1 column" in printed and "           1  lines skipped\n" in printed
    assert "           2  groups\n" in printed and "          12  keys\n" in printed
    assert "(en): 60.0% (3 of 5 running words" in printed
    table = load_table(output)
    assert table.group_count.tolist() == [2, 1]
    assert table.group_words(0) == [("en", "apple"), ("de", "Apfel"), ("zh", "苹果")]
    assert table.sources[1] == {
        "path": f"{tmp_path}/zh.jsonl",
        "format": "pairs",
        "languages": "en-zh",
        "pairs": 1,
        "title": "",
        "licence": "CC0-1.0",
    }

    assert main(["dictionary", "coverage", "--table", output, "--corpus", corpus]) == 0
    assert "(en): 60.0% (3 of 5 running words" in capsys.readouterr().out


def test_dropped_pairs_are_listed_by_count(tokenizer, tmp_path, capsys):
    """Two repeated pairs, one without a letter, one that is identical in a spelling, one line that is no pair."""
    (tmp_path / "de.tsv").write_text("1\t2\n" + "apple\tApfel\n" * 3 + "hand\tHand\n" + "broken\n")
    arguments = ["dictionary", "build", "--input", f"{tmp_path}/de.tsv:en-de", "--tokenizer", str(tokenizer.path)]
    assert main([*arguments, "--output", str(tmp_path / "table.safetensors"), "--on-error", "skip"]) == 0
    lines = capsys.readouterr().out.splitlines()
    start = lines.index("dropped:")
    assert [line.split("  ")[-1] for line in lines[:start] if line.startswith(" ")] == ["pairs read", "pairs kept"]
    end = lines.index("spellings of kept words without a key of their own:")
    dropped = lines[start + 1 : end]
    counts = [int(line.split()[0]) for line in dropped]
    assert counts == sorted(counts, reverse=True) and counts[0] == 2 and "duplicate pairs" in dropped[0]
    assert {line.index(line.split()[0]) for line in dropped} == {11}
    assert {"lines skipped", "pairs with a word without a letter"} <= {line.split("  ")[-1] for line in dropped}
    # All pairs that were read are kept or dropped; spellings are no pairs.
    read, kept = (int(line.split()[0]) for line in lines[:start] if line.startswith(" "))
    assert read == kept + sum(counts) - 1
    assert "case variants" in lines[end + 1]


def test_weights_of_a_list(tokenizer, tmp_path, capsys):
    (tmp_path / "de.tsv").write_text("house\tHaus\t2\nhouse\trot\t0.5\n")
    output = str(tmp_path / "table.safetensors")
    arguments = ["dictionary", "build", "--input", f"{tmp_path}/de.tsv:en-de", "--tokenizer", str(tokenizer.path)]
    arguments += ["--output", output]
    # Without the option, a third column is an error.
    status = main(arguments)
    assert_refused(status, capsys.readouterr().err, "de.tsv:1:", "3 columns", "expected 2", "tab")
    assert main([*arguments, "--weights"]) == 0
    assert "tokenised words with " in capsys.readouterr().out
    assert load_table(output).candidate_weight.tolist() == [2.0, 0.5] * 6
    (tmp_path / "de.tsv").write_text("house\tHaus\t2\nhouse\trot\tx\n")
    status = main([*arguments, "--weights"])
    assert_refused(status, capsys.readouterr().err, "de.tsv:2:", "weight 'x'", "above 0")


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (["--help"], 0, "\n  coverage "),
        ([], 2, "usage: megatron-prealign dictionary ACTION"),
        (["bulid"], 2, "unknown action bulid; did you mean build?"),
        (["build", "--input", "a.tsv", "--tokenizer", "t", "--output", "o"], 2, "--input a.tsv: languages are missing"),
        (["build", "--inptu", "a.tsv"], 2, "unknown option --inptu; did you mean --input?"),
    ],
)
def test_help_and_invalid_arguments(arguments, status, text, capsys):
    assert main(["dictionary", *arguments]) == status
    captured = capsys.readouterr()
    assert text in captured.out + captured.err


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from megatron_prealign.cli import main\n"
        "try: main(['dictionary', 'build', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'transformers', 'tokenizers', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_commands_import_no_torch(tokenizer, tmp_path, make_dataset):
    """Importing torch and Megatron-Core takes longer than most measurements."""
    (tmp_path / "de.tsv").write_text("apple\tApfel\n")
    table, corpus = tmp_path / "table.safetensors", make_dataset(tokenizer, ["an apple"], "en")
    options = {
        "build": ["--input", f"{tmp_path}/de.tsv:en-de", "--tokenizer", tokenizer.path, "--output", table],
        "coverage": ["--table", table],
        "report": ["--table", table, "--output", tmp_path / "report"],
    }
    commands = [["dictionary", name, *map(str, values), "--corpus", str(corpus)] for name, values in options.items()]
    code = (
        "import sys; from megatron_prealign.cli import main\n"
        f"for command in {commands!r}: assert main(command) == 0\n"
        "heavy = {'torch', 'megatron', 'transformers', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
