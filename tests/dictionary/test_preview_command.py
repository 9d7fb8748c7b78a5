"""`megatron-prealign dictionary preview`, end to end."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.messages import assert_facts, assert_refused
from support.tiny import Tiny

from megatron_prealign.cli import main
from megatron_prealign.data.sidecar import load_sidecar, sidecar_path
from megatron_prealign.dictionary.table import load_table


def run(*arguments: object) -> int:
    return main(["dictionary", "preview", *map(str, arguments)])


@pytest.fixture
def inputs(tiny: Tiny) -> list[str]:
    return ["--table", tiny.table, "--data", str(tiny.directory / "en")]


def test_rows_and_totals_without_a_terminal(inputs: list[str], tiny: Tiny, capsys: pytest.CaptureFixture) -> None:
    assert run(*inputs, "--rows", 5, "--seq-length", 64, "--ratio", 0.3) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert re.findall(r"^sample (\d) \(en\)", printed, re.M) == ["1", "2", "3", "4", "5"]
    table = load_table(tiny.table)
    listed = {table.group_words(group)[0][1] for group in range(table.num_groups)}
    originals = re.findall(r"^  original  (.*)$", printed, re.M)
    marked = [word for line in originals for word in re.findall(r"\[([A-Za-z]+)\]", line)]
    results = re.findall(r"\{⟦([A-Za-z]+)⟧\}", printed)
    assert len(marked) > 10 and {word.casefold() for word in marked} <= listed
    # Clone words have the same spelling; the last word of a sample may be truncated.
    assert len(marked) - len(results) in range(6) and set(results) <= set(marked)
    assert re.search(rf"^switched +{len(marked)}  ", printed, re.M)
    assert "0.3 of the known words, input_only" in printed and "of 64 tokens, seed 1" in printed
    # Repeated runs print exactly the same.
    assert run(*inputs, "--rows", 5, "--seq-length", 64, "--ratio", 0.3) == 0
    assert capsys.readouterr().out == printed


def test_recipe(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    values = tiny.values(tmp_path / "run")
    values["code_switch"] |= {"schedule": "linear", "final_ratio": 1.0, "schedule_tokens": 1000}
    values["dictionary"]["held_out_fraction"] = 0.5
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(values), encoding="utf-8")
    assert run("--config", recipe, "--rows", 30, "--consumed-tokens", 1000) == 0
    printed = capsys.readouterr().out
    assert "of 32 tokens, seed 3" in printed and "1 of the known words" in printed
    # No word of the clone is a key.
    assert printed.count("(en): ") == 30 and "(en_clone)" not in printed
    documents = load_sidecar(tiny.directory / "en_clone").documents
    assert re.search(rf"^skipped documents +{documents}  in en_clone,", printed, re.M)
    table = load_table(tiny.table)
    held_out = table.held_out_groups(0.5)
    marked = {word.casefold() for word in re.findall(r"\[([A-Za-z]+)\]", printed)}
    kept = {table.group_words(group)[0][1] for group in range(table.num_groups) if not held_out[group]}
    assert marked and marked <= kept
    assert not (tmp_path / "run").exists()
    # --ratio disables the schedule, and --data replaces the blend.
    arguments = ["--rows", 3, "--ratio", 0.25, "--data", tiny.directory / "en", "--seed", 9, "--seq-length", 16]
    assert run("--config", recipe, *arguments, "--label-mode", "mix") == 0
    printed = capsys.readouterr().out
    assert "0.25 of the known words, mix" in printed and "of 16 tokens, seed 9" in printed


def test_labels_are_printed_below_the_samples(inputs: list[str], capsys: pytest.CaptureFixture) -> None:
    short = [*inputs, "--rows", "1", "--seq-length", "8", "--ratio", "0.5"]
    assert run(*short) == 0
    without = capsys.readouterr().out
    assert run(*short, "--labels") == 0
    printed = capsys.readouterr().out
    assert "\n  position  0 " in printed and "\n  label     " in printed
    # All other lines are unchanged.
    lines = [line for line in printed.splitlines() if not re.match(r"  (position|input|label) ", line)]
    assert lines == without.splitlines()


def test_colours(inputs: list[str], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [*inputs, "--rows", "2", "--seq-length", "32", "--ratio", "1"]
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "90")

    def coloured(*more: str) -> bool:
        assert run(*arguments, *more) == 0
        printed = capsys.readouterr().out
        assert ("[" in printed.replace("\x1b[", "")) != ("\x1b[1;32m" in printed)
        return "\x1b[1;32m" in printed

    assert not coloured() and coloured("--color", "always")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert coloured() and not coloured("--color", "never")
    monkeypatch.setenv("NO_COLOR", "1")
    assert not coloured() and coloured("--color", "always")
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert not coloured()


def test_page(inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    page = tmp_path / "new" / "page.html"
    assert run(*inputs, "--rows", 3, "--seq-length", 64, "--ratio", 0.5, "--html", page) == 0
    printed = capsys.readouterr().out
    assert_facts(printed.splitlines()[-1], "wrote", page, "3 samples of 64 tokens")
    text = page.read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>") and text.count("<figure>") == 3
    assert text.count("<mark") == 2 * len(re.findall(r"\[([A-Za-z]+)\]", printed)) > 20
    assert [path.name for path in page.parent.iterdir()] == ["page.html"]


def test_fewer_samples_than_requested(inputs: list[str], capsys: pytest.CaptureFixture) -> None:
    assert run(*inputs, "--rows", 1000, "--seq-length", 20_000) == 0
    printed = capsys.readouterr().out
    samples = len(re.findall(r"^sample ", printed, re.M))
    assert 0 < samples < 1000
    assert re.search(rf"\b{samples} samples of 20,000 tokens.*\b1,000$", printed, re.M)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"--table": None}, "missing --table;"),
        ({"--table": None, "--data": None}, "missing --table and --data;"),
        ({"--table": "none.safetensors"}, "table none.safetensors does not exist"),
        ({"--data": "nowhere/en"}, "nowhere/en.json: file not found"),
        ({"--tokenizer": "nowhere"}, "nowhere: tokenizer not found"),
        ({"--config": "none.yaml"}, "none.yaml"),
        ({"--ratio": "1.5"}, "--ratio is 1.5, expected a number from 0 to 1"),
        ({"--ratio": "-0.1"}, "--ratio is -0.1, expected a number from 0 to 1"),
        ({"--rows": "0"}, "--rows is 0, expected a number from 1"),
        ({"--lookahead": "100000"}, "--lookahead is 100000, expected null or at most --seq-length ("),
        ({"--seed": "-1"}, "--seed is -1, expected a number from 0"),
        ({"--seq-length": "0"}, "--seq-length is 0, expected a number from 1"),
        ({"--seq-length": "1000000"}, "--seq-length + 1 = 1000001; lower --seq-length"),
        ({"--language-weights": "fr=1"}, "code_switch.language_weights has fr, expected languages of"),
        ({"--label-mode": "none"}, "--label-mode is none, expected one of input_only, codeswitch, "),
        ({"--max-word-length": "0"}, "--max-word-length is 0, expected null or at least"),
        ({"--html": "."}, "--html . is a directory"),
    ],
    ids=str,
)
def test_user_errors(change: dict[str, str | None], text: str, tiny: Tiny, capsys: pytest.CaptureFixture) -> None:
    options = {"--table": tiny.table, "--data": str(tiny.directory / "en"), "--rows": "1", **change}
    status = run(*[each for pair in options.items() if pair[1] is not None for each in pair])
    captured = capsys.readouterr()
    assert_refused(status, captured.err, "error: ", text)
    assert captured.out == ""


def test_errors_name_the_fields_of_the_recipe(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """What the recipe sets has its field's name, what the command line sets its option's."""
    values = tiny.values(tmp_path / "run")
    values["code_switch"] |= {"lookahead": 20, "min_word_length": 5}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(values), encoding="utf-8")
    for arguments, fact in (
        (["--lookahead", 33], "--lookahead is 33, expected null or at most data.seq_length (32)"),
        (["--seq-length", 16], "code_switch.lookahead is 20, expected null or at most --seq-length (16)"),
        (["--lookahead", 17, "--seq-length", 16], "--lookahead is 17, expected null or at most --seq-length (16)"),
        (["--max-word-length", 3], "--max-word-length is 3, expected null or at least code_switch.min_word_length (5)"),
    ):
        status = run("--config", recipe, *arguments)
        assert_refused(status, capsys.readouterr().err, fact)


def test_data_that_does_not_match(tiny: Tiny, tmp_path: Path, tokenizer, make_dataset, capsys) -> None:
    status = run("--table", tiny.table, "--data", tiny.directory / "en_clone")
    assert_refused(status, capsys.readouterr().err, "no word would be switched", "words of en,", "data is in en_clone")
    other = make_dataset(tokenizer, ["The apple and the house " * 30], "en")
    capsys.readouterr()
    status = run("--table", tiny.table, "--data", other)
    assert_refused(status, capsys.readouterr().err, f"{tokenizer.fingerprint} of dataset {other}")
    status = run("--table", tiny.table, "--data", tiny.directory / "en", "--tokenizer", tokenizer.path)
    assert_refused(status, capsys.readouterr().err, f"{tokenizer.fingerprint} of tokenizer {tokenizer.path}")


def test_tokenizer_that_moved(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for ending in ("bin", "idx"):
        shutil.copy(tiny.directory / f"en.{ending}", tmp_path / f"en.{ending}")
    sidecar = json.loads(sidecar_path(tiny.directory / "en").read_text(encoding="utf-8"))
    sidecar["tokenizer"]["path"] = "missing/tokenizer"
    sidecar_path(tmp_path / "en").write_text(json.dumps(sidecar), encoding="utf-8")
    arguments = ["--table", tiny.table, "--data", tmp_path / "en", "--rows", 1]
    status = run(*arguments)
    assert_refused(status, capsys.readouterr().err, "en.json: tokenizer missing/tokenizer", "--tokenizer")
    assert run(*arguments, "--tokenizer", tiny.tokenizer) == 0


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from megatron_prealign.cli import main\n"
        "try: main(['dictionary', 'preview', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'transformers', 'tokenizers', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
