"""`dataset repair`: a lost index is restored byte for byte, and invalid tokens are rejected."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.dataset_parts import EOD, VOCAB_SIZE, Documents, make_dataset, random_documents, word_bits, write_tokens
from support.messages import assert_refused, user_error

from megatron_prealign import cli
from megatron_prealign.data.commands import repair as repair_module
from megatron_prealign.data.commands.repair import repair
from megatron_prealign.data.commands.verify import verify
from megatron_prealign.data.indexed import open_indexed
from megatron_prealign.data.sidecar import TokenizerRecord, load_sidecar

DOCUMENTS = random_documents(40, seed=5)
BIG = TokenizerRecord("x", "sha256:0", 70_000)


def run(prefix: str, **options: object) -> repair_module.RepairResult:
    return repair(prefix, show_progress=False, **options)  # type: ignore[arg-type]


def content(prefix: str) -> dict[str, bytes]:
    directory = Path(prefix).parent
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def is_intact(prefix: str, documents: Documents) -> bool:
    assert verify(prefix, show_progress=False).problems == []
    return [tokens.tolist() for tokens in open_indexed(prefix)] == documents


@pytest.fixture(params=[np.uint16, np.int32])
def prefix(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return make_dataset(tmp_path / "a", DOCUMENTS, segmenter="jieba", dtype=request.param)


@pytest.mark.parametrize("damage", ["missing", "empty", "garbage", "cut", "other"])
def test_a_lost_index_is_restored(prefix, damage, monkeypatch, capsys):
    monkeypatch.setattr(repair_module, "_READ_BYTES", 40)
    before = content(prefix)
    index = Path(f"{prefix}.idx")
    header = index.read_bytes()[:34]
    broken = {"empty": b"", "garbage": b"x" * 90, "cut": index.read_bytes()[:-8], "other": header}.get(damage)
    os.unlink(index) if broken is None else index.write_bytes(broken)
    assert cli.main(["dataset", "repair", "--input", prefix]) == 0
    after = content(prefix)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == (set() if broken is None else {"a.idx.bak"})
    assert broken is None or after["a.idx.bak"] == broken
    assert f"wrote {prefix}.idx and .json: 40 documents" in capsys.readouterr().out
    assert is_intact(prefix, DOCUMENTS)


def test_tokens_stored_wider_than_the_vocabulary_needs(tmp_path, tiny):
    """Neither index nor sidecar reveals the dtype."""
    tokens = np.fromfile(tiny.directory / "en.bin", np.uint16)
    tokens.astype(np.int32).tofile(tmp_path / "a.bin")
    prefix, options = str(tmp_path / "a"), {"tokenizer": tiny.tokenizer, "language": "en"}
    with user_error(f"{prefix}.bin: every second token is 0", "--dtype to int32"):
        run(prefix, **options)
    run(prefix, **options, dtype="int32")
    assert verify(prefix, show_progress=False).problems == []
    assert load_sidecar(prefix).tokens == len(tokens)


def test_an_intact_dataset_is_unchanged(prefix, capsys):
    before = content(prefix)
    assert cli.main(["dataset", "repair", "--input", prefix]) == 0
    assert "nothing to repair" in capsys.readouterr().out
    assert content(prefix) == before
    assert run(prefix, force=True).changed
    assert content(prefix) == before


def test_missing_checksums_are_added(tmp_path):
    prefix = make_dataset(tmp_path / "a", DOCUMENTS, segmenter="jieba", checksums=())
    result = run(prefix)
    assert (result.changed, [path.name for path in result.backups]) == (True, ["a.json.bak"])
    assert set(load_sidecar(prefix).checksums) == {"bin", "idx", "words"}
    assert load_sidecar(prefix).bytes == 200
    assert is_intact(prefix, DOCUMENTS)


@pytest.mark.parametrize("tail", [[7, 8], []])
@pytest.mark.parametrize("odd", [b"", b"\x07"])
def test_a_tail_is_moved_on_request(tmp_path, tail, odd):
    """A truncated copy: the index has more documents than the tokens."""
    prefix = make_dataset(tmp_path / "a", [*DOCUMENTS, [7, 8, 9, EOD]], segmenter="jieba")
    kept = np.array([token for document in DOCUMENTS for token in document] + tail, dtype=np.uint16).tobytes() + odd
    Path(f"{prefix}.bin").write_bytes(kept)
    before = content(prefix)
    if tail or odd:
        with user_error(f"{prefix}.bin: {2 * len(tail) + len(odd)} bytes after", "--cut-tail"):
            run(prefix)
    assert content(prefix) == before
    result = run(prefix, cut_tail=True)
    names = ["a.idx.bak", "a.words.bak", "a.json.bak"] + (["a.bin.tail"] if tail or odd else [])
    assert [path.name for path in result.backups] == names
    after = content(prefix)
    assert after["a.bin"] + after.get("a.bin.tail", b"") == kept
    assert after["a.words.bak"] == before["a.words"] and after["a.json.bak"] == before["a.json"]
    assert after["a.words"] == np.packbits(word_bits(DOCUMENTS), bitorder="little").tobytes()
    assert is_intact(prefix, DOCUMENTS)
    sidecar = load_sidecar(prefix)
    assert (sidecar.documents, sidecar.tokens, sidecar.bytes) == (40, sum(map(len, DOCUMENTS)), 0)


def test_changed_tokens(tmp_path):
    prefix = make_dataset(tmp_path / "a", [[7, 8, EOD], [9, EOD]])
    np.array([7, EOD, 8, 9, EOD], dtype=np.uint16).tofile(f"{prefix}.bin")
    with user_error("a.bin: checksum is xxh3:", load_sidecar(prefix).checksums["bin"], "--force"):
        run(prefix)
    run(prefix, force=True)
    assert is_intact(prefix, [[7, EOD], [8, 9, EOD]])


def test_files_of_other_tools(tmp_path, tiny, capsys):
    """Creates a sidecar for token files without one; their index is unchanged."""
    expected = load_sidecar(tiny.directory / "en")
    for ending in ("bin", "idx"):
        os.symlink(tiny.directory / f"en.{ending}", tmp_path / f"a.{ending}")
    prefix = str(tmp_path / "a")
    for options in ([], ["--language", "en"], ["--tokenizer", tiny.tokenizer]):
        status = cli.main(["dataset", "repair", "--input", prefix, *options])
        assert_refused(status, capsys.readouterr().err, "a.json: file not found", "--tokenizer", "--language")
    result = run(prefix, tokenizer=tiny.tokenizer, language="en")
    assert result.backups == []
    assert load_sidecar(prefix) == result.sidecar
    assert (result.sidecar.documents, result.sidecar.tokens) == (expected.documents, expected.tokens)
    assert (result.sidecar.tokenizer, result.sidecar.eod_id) == (expected.tokenizer, expected.eod_id)
    assert verify(prefix, tokenizer=tiny.tokenizer, show_progress=False).problems == []
    assert (tiny.directory / "en.idx").read_bytes() == (tmp_path / "a.idx").read_bytes()


def test_a_tokenizer_without_an_end_token(tmp_path, tiny, capsys):
    """Document ends cannot be found then."""
    write_tokens(tmp_path / "a", [[1, EOD]])
    shutil.copytree(tiny.tokenizer, tmp_path / "tokenizer")
    for path in (tmp_path / "tokenizer").glob("*.json"):
        path.write_text(path.read_text().replace("<eod>", "<none>").replace('"eos_token"', '"other_token"'))
    options = ["--tokenizer", str(tmp_path / "tokenizer"), "--language", "en"]
    status = cli.main(["dataset", "repair", "--input", str(tmp_path / "a.bin"), *options])
    assert_refused(status, capsys.readouterr().err, tmp_path / "tokenizer", "end-of-document token", "eos_token")


@pytest.mark.parametrize(
    ("tokens", "fields", "options", "facts"),
    [
        ([7, 8, 9], {}, {}, ("a.bin", "no end-of-document id 3", "6 bytes of uint16")),
        ([], {}, {}, ("a.bin", "no end-of-document id 3", "0 bytes of uint16")),
        ([7, VOCAB_SIZE, EOD], {}, {}, ("a.bin", "token 1 is 1000", "1,000 ids", "--dtype")),
        ([7, EOD], {"append_eod": False}, {}, ("a.json", "append_eod")),
        ([7, EOD], {}, {"language": "de"}, ("a.json: language is zh", "--language is de")),
        ([7, EOD], {"tokenizer": BIG}, {}, ("a.bin", "70,000 ids", "uint16", "--dtype")),
        ([7, EOD], {"tokenizer": BIG}, {"dtype": "uint16"}, ("a.bin", "70,000 ids", "uint16", "--dtype")),
        ([7, EOD], {}, {"workers": 0}, ("workers is 0",)),
        ([7, EOD], {}, {"tokenizer": "none"}, ("none: tokenizer not found",)),
    ],
)
def test_what_cannot_be_repaired(tmp_path, tokens, fields, options, facts):
    prefix = make_dataset(tmp_path / "a", [[7, 8, EOD]], checksums=(), **fields)
    np.array(tokens, dtype=np.uint16).tofile(f"{prefix}.bin")
    before = content(prefix)
    with user_error(*facts):
        run(prefix, **options)
    assert content(prefix) == before


def test_a_document_too_long_for_an_index(tmp_path, monkeypatch):
    prefix = make_dataset(tmp_path / "a", [[7, 8, EOD], [7, 8, 9, EOD]], checksums=())
    monkeypatch.setattr(repair_module, "_MAX_DOCUMENT_TOKENS", 3)
    before = content(prefix)
    with user_error("a.bin: got a document of 4 tokens, at most 3"):
        run(prefix)
    assert content(prefix) == before


def test_words_are_dropped_on_request(tmp_path):
    prefix = make_dataset(tmp_path / "a", DOCUMENTS, segmenter="jieba")
    os.unlink(f"{prefix}.words")
    tokens = sum(map(len, DOCUMENTS))
    with user_error("a.words: got 0 bytes", f"expected {-(-tokens // 8)} for {tokens} tokens", "--drop-words"):
        run(prefix)
    run(prefix, drop_words=True)
    assert load_sidecar(prefix).segmenter is None
    assert is_intact(prefix, DOCUMENTS)


def test_a_corrupt_sidecar_is_backed_up(tmp_path, tiny):
    for ending in ("bin", "idx", "json"):
        (tmp_path / f"a.{ending}").write_bytes((tiny.directory / f"en.{ending}").read_bytes())
    (tmp_path / "a.json").write_text("{")
    (tmp_path / "a.json.bak").write_text("of an earlier repair")
    with user_error("a.json: not a readable JSON file", "--tokenizer", "--language"):
        run(str(tmp_path / "a"))
    result = run(str(tmp_path / "a"), tokenizer=tiny.tokenizer, language="en")
    assert [path.name for path in result.backups] == ["a.json.bak2"]
    assert (tmp_path / "a.json.bak2").read_text() == "{"


def test_missing_tokens(tmp_path, capsys):
    write_tokens(tmp_path / "a", [[1, EOD]])
    os.unlink(tmp_path / "a.bin")
    os.symlink(tmp_path / "b.bin", tmp_path / "b.bin")
    for name in ("a", "b"):
        status = cli.main(["dataset", "repair", "--input", str(tmp_path / name)])
        assert_refused(status, capsys.readouterr().err, f"{name}.bin: file not found", "from the tokens")


def test_a_killed_repair_can_be_run_again(tmp_path):
    prefix = make_dataset(tmp_path / "a", [*DOCUMENTS, [7, 8, 9, EOD]])
    os.truncate(f"{prefix}.bin", os.path.getsize(f"{prefix}.bin") - 2)
    original = Path(f"{prefix}.bin").read_bytes()
    script = (
        "import os, signal, sys\n"
        "from megatron_prealign.data.commands.repair import repair\n"
        "truncate = os.truncate\n"
        "def once(path, size):\n"
        "    truncate(path, size)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "os.truncate = once\n"
        "repair(sys.argv[1], cut_tail=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, prefix], timeout=60, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert Path(f"{prefix}.bin").read_bytes() + Path(f"{prefix}.bin.tail").read_bytes() == original
    run(prefix)
    assert is_intact(prefix, DOCUMENTS)


@pytest.mark.parametrize(
    "command", [["repair", "--input", "a", "--force"], ["merge", "--input", "a", "--output", "all"]], ids=lambda c: c[0]
)
def test_a_read_only_directory(tmp_path, monkeypatch, capsys, command):
    directory = tmp_path / "deep"
    directory.mkdir()
    prefix = make_dataset(directory / "a", DOCUMENTS)
    before = content(prefix)
    assert verify(prefix, show_progress=False).problems == []
    monkeypatch.chdir(directory)
    os.chmod(directory, 0o555)
    # root may write anywhere; nobody may not, and can reach the files from the working directory.
    superuser = os.geteuid() == 0
    if superuser:
        os.seteuid(65534)
    try:
        assert cli.main(["dataset", *command]) == 2
    finally:
        if superuser:
            os.seteuid(0)
        os.chmod(directory, 0o755)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and "Permission denied" in error
    assert content(prefix) == before
