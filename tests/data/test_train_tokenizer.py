"""Training a tokenizer: the folder opens in transformers, twice the same, and mistakes leave nothing behind."""

from pathlib import Path

import pytest
import transformers

from megatron_prealign.cli import main
from megatron_prealign.data.clone import CloneTokenizer
from megatron_prealign.data.tokenizer import load_tokenizer
from megatron_prealign.data.train_tokenizer import train_tokenizer
from megatron_prealign.errors import UserError

TEXT = "The dog's owner counts apples.\n\nDer Hund und die Äpfel.\n\nСобака и яблоко.\n\n犬と林檎。\n\n" * 30


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "a.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def test_folder_opens_in_transformers_with_the_same_ids(corpus: Path, tmp_path: Path) -> None:
    train_tokenizer([corpus], tmp_path / "new/tok", 300, show_progress=False)
    assert sorted(path.name for path in (tmp_path / "new/tok").iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    ours = load_tokenizer(tmp_path / "new/tok")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "new/tok")
    assert (ours.vocab_size, ours.eod_id, theirs.eos_token, theirs.eos_token_id) == (300, 0, "<eod>", 0)
    assert len(theirs) == 300
    for text in (*TEXT.split("\n\n")[:4], " two  spaces\n\ttab", "unseen: ελληνικά 🎉", ""):
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ours.encode(text)) == theirs.decode(ours.encode(text)) == text


def test_training_twice_gives_the_same_bytes(corpus: Path, tmp_path: Path) -> None:
    for name in "ab":
        train_tokenizer([corpus], tmp_path / name, 310, show_progress=False)
    assert (tmp_path / "a/tokenizer.json").read_bytes() == (tmp_path / "b/tokenizer.json").read_bytes()


def test_command_with_clone(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "tok")
    command = ["train-tokenizer", "--input", str(corpus), "--output", out, "--vocab-size", "300"]
    assert main([*command, "--clone-language", "en_clone"]) == 0
    assert "600 ids, end of document 0" in capsys.readouterr().out
    tokenizer = load_tokenizer(out)
    assert isinstance(tokenizer, CloneTokenizer)
    assert tokenizer.language == "en_clone"
    assert main(command) == 2
    assert "not empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vocab-size", "256"], "vocab_size is 256; expected at least 257"),
        (["--vocab-size", "5000"], "the text yields only "),
        (["--vocab-size", "300", "--clone-language", ""], "clone_language is empty"),
        (["--vocab-size", "300", "--text-size", "3"], "text_size"),
    ],
)
def test_mistakes(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["train-tokenizer", "--input", str(corpus), "--output", str(tmp_path / "tok"), *arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_bad_document_stops_the_training(corpus: Path, tmp_path: Path) -> None:
    bad = tmp_path / "b.jsonl"
    bad.write_text('{"text": "x"}\n{"text": 1}\n')
    with pytest.raises(UserError, match=r"b\.jsonl:2: the value of 'text' is a JSON number"):
        train_tokenizer([corpus, bad], tmp_path / "tok", 300, show_progress=False)
    assert not (tmp_path / "tok").exists()
    problems = train_tokenizer([corpus, bad], tmp_path / "tok", 300, on_error="skip", show_progress=False)
    assert (problems.count, problems.listed[0].where) == (1, f"{bad}:2")
