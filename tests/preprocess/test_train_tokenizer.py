"""Training a tokenizer: it loads, is reproducible, keeps words intact, and errors leave nothing behind."""

import gzip
import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers
from support.messages import assert_facts, user_error
from support.word_cutters import WORDS

from megatron_prealign.cli import main
from megatron_prealign.corpus.read_errors import ReadError
from megatron_prealign.preprocess.tokenizer_trainers import WORD_BREAK, insert_word_breaks, train_sentencepiece
from megatron_prealign.preprocess.train_tokenizer import TrainerSettings, train_tokenizer
from megatron_prealign.tokenizer.clone import CLONE_FILE, CloneTokenizer, load_clone
from megatron_prealign.tokenizer.load import load_tokenizer

TEXT = "The dog's owner counts apples.\n\nDer Hund und die Äpfel.\n\nСобака и яблоко.\n\n犬と林檎。\n\n" * 30
KINDS = ("byte-bpe", "sentencepiece-unigram", "sentencepiece-bpe")
STRANGE = (" two  spaces\n\ttab", "unseen: ελληνικά 🎉", "", "▁ \r\n \u3000x", "<eod>", "123 4.5")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "a.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def test_directory_loads_in_transformers_with_the_same_ids(corpus: Path, tmp_path: Path) -> None:
    train_tokenizer([corpus], tmp_path / "new/tok", 300, show_progress=False)
    names = sorted(path.name for path in (tmp_path / "new/tok").iterdir())
    assert names == ["fertility.json", "tokenizer.json", "tokenizer_config.json"]
    tokenizer = load_tokenizer(tmp_path / "new/tok")
    hf = transformers.AutoTokenizer.from_pretrained(tmp_path / "new/tok")
    assert (tokenizer.vocab_size, tokenizer.eod_id, hf.eos_token, hf.eos_token_id) == (300, 0, "<eod>", 0)
    assert len(hf) == 300
    for text in (*TEXT.split("\n\n")[:4], " two  spaces\n\ttab", "unseen: ελληνικά 🎉", ""):
        ids = tokenizer.encode(text)
        assert ids == hf.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == hf.decode(ids) == text


@pytest.mark.parametrize("kind", KINDS[1:])
def test_sentencepiece_keeps_every_text(corpus: Path, tmp_path: Path, kind: str) -> None:
    train_tokenizer([corpus], tmp_path / "tok", 296, show_progress=False, settings=TrainerSettings(kind=kind))
    assert sorted(path.name for path in (tmp_path / "tok").iterdir()) == ["fertility.json", "tokenizer.model"]
    tokenizer = load_tokenizer(tmp_path / "tok")
    assert (tokenizer.vocab_size, tokenizer.eod_id, tokenizer.special_ids) == (296, 0, {0, 1})
    for text in (*TEXT.split("\n\n")[:4], *STRANGE):
        # U+2581 is how sentencepiece writes a space.
        assert tokenizer.decode(tokenizer.encode(text)) == text.replace("▁", " ")
        assert not tokenizer.special_ids & set(tokenizer.encode(text))


@pytest.mark.parametrize("kind", KINDS)
def test_training_twice_gives_the_same_bytes(corpus: Path, tmp_path: Path, kind: str) -> None:
    settings = TrainerSettings(kind=kind, temperature=2, sample_bytes=3000)
    (tmp_path / "b.txt").write_text(TEXT[:1000].replace("e", "i"), encoding="utf-8")
    for name in ("one", "two"):
        inputs = [f"{corpus}:en", f"{tmp_path / 'b.txt'}:xx"]
        train_tokenizer(inputs, tmp_path / name, 300, show_progress=False, settings=settings)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_command_with_clone(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    out = str(tmp_path / "tok")
    command = ["train-tokenizer", "--input", str(corpus), "--output", out, "--vocab-size", "296", "--kind", kind]
    assert main([*command, "--clone-language", "en_clone", "--clone-shared-ids", "270"]) == 0
    assert_facts(capsys.readouterr().out, f"wrote {out}: 592 ids, end of document 0")
    tokenizer = load_tokenizer(out)
    assert isinstance(tokenizer, CloneTokenizer)
    assert tokenizer.language == "en_clone"
    assert load_clone(tmp_path / "tok" / CLONE_FILE).shared_ids == 270
    assert main(command) == 2
    assert_facts(capsys.readouterr().err, f"output {out}: ", "not empty")


def write_chinese(directory: Path, count: int) -> Path:
    """Documents of 8 words out of 4 without spaces, a punctuation mark and a name."""
    draw = random.Random(0)
    texts = ["".join(draw.choices(WORDS[:4], k=8)) + "，RAID5" for _ in range(count)]
    path = directory / "zh.jsonl"
    path.write_text("".join(json.dumps({"data": {"text": text}}) + "\n" for text in texts))
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_do_not_cross_word_boundaries(tmp_path: Path, kind: str) -> None:
    path = write_chinese(tmp_path, 300)
    crossing = {}
    for cut in (True, False):
        settings = TrainerSettings(kind=kind, segmenters=["zh=support.word_cutters:KnownWords"] if cut else [])
        # Without tokens across words, the vocabulary is limited to complete words.
        size = 300 if not cut else 279 if kind == "byte-bpe" else 275
        directory = tmp_path / f"{cut}"
        train_tokenizer([f"{path}:zh"], directory, size, None, ["data.text"], show_progress=False, settings=settings)
        tokenizer = load_tokenizer(directory)
        tokens = [tokenizer.decode([index]) for index in range(size)]
        chinese = [token for token in tokens if "\ufffd" not in token and any(sign in "".join(WORDS) for sign in token)]
        crossing[cut] = [token for token in chinese if not any(token.strip() in word for word in WORDS)]
        assert any(len(token) > 1 for token in chinese) and not any(WORD_BREAK in token for token in tokens)
        # Punctuation and digits are separated as without a segmenter.
        assert tokenizer.decode(tokenizer.encode("苹果，RAID5")) == "苹果，RAID5"
        if kind == "byte-bpe":
            # The tokenizer itself contains no word breaks.
            assert json.loads((directory / "tokenizer.json").read_text())["pre_tokenizer"]["type"] == "ByteLevel"
    assert not crossing[True] and crossing[False]


def test_word_breaks_are_only_inserted_between_letters() -> None:
    class EveryCharacter:
        def word_starts(self, text: str) -> list[int]:
            return list(range(len(text) + 1))

    assert insert_word_breaks(f"ab, 1c{WORD_BREAK} d", EveryCharacter(), "x", "f:1") == f"a{WORD_BREAK}b, 1c d"
    assert insert_word_breaks("", EveryCharacter(), "x", "f:1") == ""


@pytest.mark.parametrize("kind", KINDS)
def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    """The printed and written report agrees with a manual count."""
    known = [f"apple {n % 7} and pear, again" for n in range(400)]
    lines = {"en": known, "el": ["ελληνικά ν΄ άλφα"] * 50}
    for language, texts in lines.items():
        content = "".join(json.dumps({"data": {"text": text}}) + "\n" for text in texts)
        (tmp_path / f"{language}.jsonl.gz").write_bytes(gzip.compress(content.encode()))
    zh = write_chinese(tmp_path, 1)
    inputs = [f"{tmp_path}/{language}.jsonl.gz:{language}" for language in lines]
    arguments = ["--vocab-size", "294", "--kind", kind, "--text-key", "data.text"]
    arguments += ["--segmenter", "zh=support.word_cutters:KnownWords", "--output", str(tmp_path / "tok")]
    assert main(["train-tokenizer", "--input", *inputs, f"{zh}:zh", *arguments]) == 0
    found = json.loads((tmp_path / "tok/fertility.json").read_text())
    assert [one["language"] for one in found["inputs"]] == ["en", "el", "zh"]
    tokenizer = load_tokenizer(tmp_path / "tok")
    printed = capsys.readouterr().out
    for language, one in found["languages"].items():
        cut = one["fertility"]
        # All documents of a language are equal except for a digit.
        text = {"en": known[0], "el": lines["el"][0]}.get(language) or json.loads(zh.read_text().split("\n")[0])[
            "data"
        ]["text"]
        ids = tokenizer.encode(text)
        per_document = {"en": 5, "el": 3, "zh": 8 + 5}[language]
        assert cut["documents"] == {"en": 20, "el": 3, "zh": 1}[language]
        assert cut["held_out"] == (language != "zh")
        assert cut["words"] == per_document * cut["documents"]
        assert cut["words_by"] == ("support.word_cutters:KnownWords" if language == "zh" else "white space")
        assert cut["bytes"] == len(text.encode()) * cut["documents"]
        if language != "en":
            assert cut["tokens"] == len(ids) * cut["documents"]
        parts = sum("\ufffd" in tokenizer.decode([index]) for index in ids)
        assert cut["fallback_tokens"] == parts * cut["documents"]
        assert cut["tokens_per_word"] == cut["tokens"] / cut["words"]
        assert cut["bytes_per_token"] == cut["bytes"] / cut["tokens"]
        held_out = cut["documents"] if cut["held_out"] else 0
        assert one["sample_documents"] == one["documents"] - held_out
        row = next(line for line in printed.splitlines() if line.startswith(language))
        assert f"{cut['tokens_per_word']:.2f}" in row and f"{cut['bytes_per_token']:.2f}" in row
        assert ("measured on training text" in row) == (language == "zh")
    assert found["languages"]["en"]["fertility"]["fallback_tokens"] == 0


def test_words_of_a_script_without_spaces_are_not_guessed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_chinese(tmp_path, 50)
    train = ["train-tokenizer", "--input", f"{path}:zh", "--output", str(tmp_path / "tok"), "--vocab-size", "270"]
    assert main([*train, "--text-key", "data.text"]) == 0
    assert "none (see --segmenter)" in capsys.readouterr().out
    cut = json.loads((tmp_path / "tok/fertility.json").read_text())["languages"]["zh"]["fertility"]
    assert (cut["words"], cut["words_by"], cut["tokens_per_word"]) == (None, None, None)


def test_long_lines_are_used_for_training(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("long line " * 2000 + "\0 zero" + "\n\nshort\n")
    settings = TrainerSettings(kind="sentencepiece-bpe", held_out=0)
    train_tokenizer([tmp_path / "a.txt"], tmp_path / "tok", 280, show_progress=False, settings=settings)
    tokenizer = load_tokenizer(tmp_path / "tok")
    assert len(tokenizer.encode(" long line")) == 2 + 1


def test_read_errors_propagate_through_sentencepiece() -> None:
    def texts() -> Iterator[str]:
        yield TEXT
        raise ReadError("a.jsonl:7", "broken")

    with user_error("a.jsonl:7: broken", kind=ReadError):
        train_sentencepiece(texts(), 320, "bpe", 1.0)


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (["--vocab-size", "256"], ("--vocab-size is 256, expected at least 257",)),
        (["--vocab-size", "258", "--kind", "sentencepiece-bpe"], ("--vocab-size is 258, expected at least 259",)),
        (["--vocab-size", "5000"], ("the text yields only ", "expected 5000", "--vocab-size ")),
        (["--vocab-size", "5000", "--kind", "sentencepiece-unigram"], ("the text yields only ", "expected 5000")),
        (["--vocab-size", "5000", "--kind", "sentencepiece-bpe"], ("the text yields only ", "expected 5000")),
        (
            ["--vocab-size", "270", "--kind", "sentencepiece-bpe"],
            ("--vocab-size is 270", "characters", "--character-coverage"),
        ),
        (["--vocab-size", "300", "--clone-language", ""], ("--clone-language is ''",)),
        (["--vocab-size", "300", "--clone-shared-ids", "9"], ("--clone-shared-ids is 9", "and --clone-language")),
        (["--vocab-size", "300", "--text-size", "3"], ("unknown option --text-size",)),
        (["--vocab-size", "300", "--kind", "wordpiece"], ("--kind is wordpiece",)),
        (["--vocab-size", "300", "--temperature", "0"], ("temperature is 0.0, expected",)),
        (["--vocab-size", "300", "--temperature", "nan"], ("--temperature is nan",)),
        (["--vocab-size", "300", "--temperature", "2"], ("temperature is 2.0", "a.txt has no language", "a.txt:de")),
        (["--vocab-size", "300", "--sample-bytes", "0"], ("--sample-bytes is 0, expected at least 1",)),
        (["--vocab-size", "300", "--held-out", "0.6"], ("--held-out is 0.6, expected", "0 to 0.5")),
        (["--vocab-size", "300", "--character-coverage", "1.5"], ("--character-coverage is 1.5, expected",)),
        (["--vocab-size", "300", "--segmenter", "jieba"], ("--segmenter jieba: expected LANGUAGE=NAME",)),
        (
            ["--vocab-size", "300", "--segmenter", "zh=icu"],
            ("segmenter zh=icu: ", "language zh", "expected one of und;"),
        ),
        (["--vocab-size", "300", "--segmenter", "und=x", "und=y"], ("segmenter und=y: ", "already has segmenter x")),
        (["--vocab-size", "300", "--segmenter", "und=none"], ("unknown segmenter 'none', expected auto",)),
        (
            ["--vocab-size", "300", "--segmenter", "und=support.word_cutters:Failing"],
            ("a.txt:1: segmenter support.word_cutters:Failing",),
        ),
    ],
)
def test_errors(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], facts: tuple[str, ...]
) -> None:
    assert main(["train-tokenizer", "--input", str(corpus), "--output", str(tmp_path / "tok"), *arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert_facts(lines[0], *facts)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize(
    ("name", "data", "fact"),
    [
        ("b.jsonl", b"", "b.jsonl: empty file"),
        ("b.txt.gz", gzip.compress(b"x", mtime=0)[:-4], "b.txt.gz:1: truncated gzip data"),
        ("b.parquet", b"PAR1", "b.parquet: corrupt or truncated parquet data"),
        ("b.txt.zst", b"\x28\xb5\x2f\xfd no more zstd", "b.txt.zst:1: truncated zstd data"),
        ("b.jsonl", b'{"body": "x"}\n', "b.jsonl:1: no key 'text'; keys: body"),
    ],
)
def test_bad_files(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, data: bytes, fact: str
) -> None:
    (tmp_path / name).write_bytes(data)
    train = ["train-tokenizer", "--input", f"{corpus}:en", f"{tmp_path / name}:de", "--output", str(tmp_path / "tok")]
    train += ["--vocab-size", "300"]
    assert main(train) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert_facts(errors[0], fact)
    # Its language has no other text.
    assert main([*train, "--on-error", "skip"]) == 2
    assert_facts(capsys.readouterr().err, f"no text in {tmp_path / name} (1 documents or files skipped")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", name]


def test_a_bad_document_stops_the_training(corpus: Path, tmp_path: Path) -> None:
    bad = tmp_path / "b.jsonl"
    bad.write_text('{"text": "x"}\n{"text": 1}\n')
    with user_error(f"{bad}:2: value of 'text' is a JSON number"):
        train_tokenizer([corpus, bad], tmp_path / "tok", 300, show_progress=False)
    assert not (tmp_path / "tok").exists()
    report = train_tokenizer([corpus, bad], tmp_path / "tok", 300, on_error="skip", show_progress=False)
    assert (report.problems.count, report.problems.listed[0].where) == (1, f"{bad}:2")
