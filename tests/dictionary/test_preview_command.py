"""`megatron-prealign dictionary preview` from end to end."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.tiny import Tiny

from megatron_prealign.cli import main
from megatron_prealign.data.sidecar import sidecar_path
from megatron_prealign.dictionary.table import load_table


def run(*arguments: object) -> int:
    return main(["dictionary", "preview", *map(str, arguments)])


@pytest.fixture
def given(tiny: Tiny) -> list[str]:
    return ["--table", tiny.table, "--data", str(tiny.directory / "en")]


def test_rows_and_totals_without_a_terminal(given: list[str], tiny: Tiny, capsys: pytest.CaptureFixture) -> None:
    assert run(*given, "--rows", 5, "--seq-length", 64, "--ratio", 0.3) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert re.findall(r"^row (\d) \(en\)", printed, re.M) == ["1", "2", "3", "4", "5"]
    table = load_table(tiny.table)
    listed = {table.group_words(group)[0][1] for group in range(table.num_groups)}
    originals = re.findall(r"^  original  (.*)$", printed, re.M)
    marked = [word for line in originals for word in re.findall(r"\[([A-Za-z]+)\]", line)]
    results = re.findall(r"\{⟦([A-Za-z]+)⟧\}", printed)
    assert len(marked) > 10 and {word.casefold() for word in marked} <= listed
    # words of the clone are spelled alike; the end of a row may cut the last
    assert len(marked) - len(results) in range(6) and set(results) <= set(marked)
    assert f"\nswitched{len(marked):>21}  " in printed
    assert "0.3 of the known words, input_only" in printed and "of 64 tokens, seed 1" in printed
    # the same again, to the letter
    assert run(*given, "--rows", 5, "--seq-length", 64, "--ratio", 0.3) == 0
    assert capsys.readouterr().out == printed


def test_recipe(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    values = tiny.values(tmp_path / "run")
    values["code_switch"] |= {"schedule": "linear", "final_ratio": 1.0, "schedule_tokens": 1000}
    values["dictionary"]["held_out_fraction"] = 0.5
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(values), encoding="utf-8")
    assert run("--config", recipe, "--rows", 30, "--consumed-tokens", 1000) == 0
    printed = capsys.readouterr().out
    assert "(en_clone): 0 of" in printed and "of 32 tokens, seed 3" in printed and "1 of the known words" in printed
    table = load_table(tiny.table)
    held_out = table.held_out_groups(0.5)
    marked = {word.casefold() for word in re.findall(r"\[([A-Za-z]+)\]", printed)}
    kept = {table.group_words(group)[0][1] for group in range(table.num_groups) if not held_out[group]}
    assert marked and marked <= kept
    assert not (tmp_path / "run").exists()
    # a ratio on the command line has no schedule, and data of its own replaces the blend
    arguments = ["--rows", 3, "--ratio", 0.25, "--data", tiny.directory / "en", "--seed", 9, "--seq-length", 16]
    assert run("--config", recipe, *arguments, "--label-mode", "mix") == 0
    printed = capsys.readouterr().out
    assert "0.25 of the known words, mix" in printed and "of 16 tokens, seed 9" in printed


def test_labels_come_below_the_rows(given: list[str], capsys: pytest.CaptureFixture) -> None:
    short = [*given, "--rows", "1", "--seq-length", "8", "--ratio", "0.5"]
    assert run(*short) == 0
    without = capsys.readouterr().out
    assert run(*short, "--labels") == 0
    printed = capsys.readouterr().out
    assert "\n  position  0 " in printed and "\n  label     " in printed
    # the rest is the same
    lines = [line for line in printed.splitlines() if not re.match(r"  (position|input|label) ", line)]
    assert lines == without.splitlines()


def test_colours(given: list[str], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [*given, "--rows", "2", "--seq-length", "32", "--ratio", "1"]
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


def test_page(given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    page = tmp_path / "new" / "page.html"
    assert run(*given, "--rows", 3, "--seq-length", 64, "--ratio", 0.5, "--html", page) == 0
    printed = capsys.readouterr().out
    assert printed.endswith(f"wrote {page}\n")
    text = page.read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>") and text.count("<figure>") == 3
    assert text.count("<mark") == 2 * len(re.findall(r"\[([A-Za-z]+)\]", printed)) > 20
    assert [path.name for path in page.parent.iterdir()] == ["page.html"]


def test_fewer_rows_than_asked_for(given: list[str], capsys: pytest.CaptureFixture) -> None:
    assert run(*given, "--rows", 1000, "--seq-length", 20_000) == 0
    printed = capsys.readouterr().out
    rows = len(re.findall(r"^row ", printed, re.M))
    assert 0 < rows < 1000
    assert f"the data has {rows} rows of 20000 tokens, fewer than the 1000 asked for" in printed


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"--table": None}, "--table not given; name the table and the dataset, or give --config"),
        ({"--table": None, "--data": None}, "--table and --data not given"),
        ({"--table": "none.safetensors"}, "none.safetensors: no such dictionary table"),
        ({"--data": "nowhere/en"}, "nowhere/en.json: no such file"),
        ({"--tokenizer": "nowhere"}, "nowhere: no such tokenizer"),
        ({"--config": "none.yaml"}, "none.yaml"),
        ({"--ratio": "1.5"}, "--ratio is 1.5, expected a number from 0 to 1"),
        ({"--ratio": "-0.1"}, "--ratio is -0.1, expected a number from 0 to 1"),
        ({"--rows": "0"}, "--rows is 0, expected a number from 1"),
        ({"--lookahead": "100000"}, "code_switch.lookahead is 100000, expected null or at most data.seq_length ("),
        ({"--seed": "-1"}, "--seed is -1, expected a number from 0"),
        ({"--seq-length": "0"}, "--seq-length is 0, expected a number from 1"),
        ({"--seq-length": "1000000"}, "tokens, one row needs --seq-length + 1 = 1000001; lower --seq-length"),
        ({"--language-weights": "fr=1"}, "code_switch.language_weights names fr, expected languages of"),
        ({"--label-mode": "none"}, "--label-mode is none, expected one of input_only, codeswitch, "),
        ({"--max-word-length": "0"}, "code_switch.max_word_length is 0, expected null or at least"),
        ({"--html": "."}, "--html is ., a directory; expected a file to write"),
    ],
    ids=str,
)
def test_mistakes(change: dict[str, str | None], text: str, tiny: Tiny, capsys: pytest.CaptureFixture) -> None:
    options = {"--table": tiny.table, "--data": str(tiny.directory / "en"), "--rows": "1", **change}
    assert run(*[each for pair in options.items() if pair[1] is not None for each in pair]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and text in captured.err
    assert captured.out == ""


def test_data_that_does_not_fit(tiny: Tiny, tmp_path: Path, tokenizer, make_dataset, capsys) -> None:
    assert run("--table", tiny.table, "--data", tiny.directory / "en_clone") == 2
    assert "replaces words of en, the data is in en_clone: nothing would ever be switched" in capsys.readouterr().err
    other = make_dataset(tokenizer, ["The apple and the house " * 30], "en")
    capsys.readouterr()
    assert run("--table", tiny.table, "--data", other) == 2
    assert f"but dataset {other} has {tokenizer.fingerprint}" in capsys.readouterr().err
    assert run("--table", tiny.table, "--data", tiny.directory / "en", "--tokenizer", tokenizer.path) == 2
    assert f"but tokenizer {tokenizer.path} has {tokenizer.fingerprint}" in capsys.readouterr().err


def test_tokenizer_that_moved(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for ending in ("bin", "idx"):
        shutil.copy(tiny.directory / f"en.{ending}", tmp_path / f"en.{ending}")
    sidecar = json.loads(sidecar_path(tiny.directory / "en").read_text(encoding="utf-8"))
    sidecar["tokenizer"]["path"] = "gone/tokenizer"
    sidecar_path(tmp_path / "en").write_text(json.dumps(sidecar), encoding="utf-8")
    arguments = ["--table", tiny.table, "--data", tmp_path / "en", "--rows", 1]
    assert run(*arguments) == 2
    assert "en.json: names tokenizer gone/tokenizer, which is not there; give --tokenizer" in capsys.readouterr().err
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
