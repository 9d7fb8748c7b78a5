"""`dataset repair`: the index that was lost comes back byte for byte, and what cannot be right is refused."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.dataset_parts import EOD, VOCAB_SIZE, Documents, make_dataset, random_documents, word_bits, write_tokens

from megatron_prealign import cli
from megatron_prealign.data.commands import repair as repair_module
from megatron_prealign.data.commands.repair import repair
from megatron_prealign.data.commands.verify import verify
from megatron_prealign.data.indexed import open_indexed
from megatron_prealign.data.sidecar import TokenizerRecord, load_sidecar
from megatron_prealign.errors import UserError

DOCUMENTS = random_documents(40, seed=5)


def run(prefix: str, **options: object) -> repair_module.Repair:
    return repair(prefix, show_progress=False, **options)  # type: ignore[arg-type]


def content(prefix: str) -> dict[str, bytes]:
    directory = Path(prefix).parent
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def is_sound(prefix: str, documents: Documents) -> bool:
    assert verify(prefix, show_progress=False).problems == []
    return [row.tolist() for row in open_indexed(prefix)] == documents


@pytest.fixture(params=[np.uint16, np.int32])
def prefix(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return make_dataset(tmp_path / "a", DOCUMENTS, segmenter="jieba", dtype=request.param)


@pytest.mark.parametrize("damage", ["missing", "empty", "garbage", "cut", "other"])
def test_a_lost_index_comes_back(prefix, damage, monkeypatch, capsys):
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
    assert is_sound(prefix, DOCUMENTS)


def test_tokens_stored_wider_than_the_vocabulary_needs(tmp_path, tiny):
    """Neither index nor sidecar tells how they are stored."""
    tokens = np.fromfile(tiny.directory / "en.bin", np.uint16)
    tokens.astype(np.int32).tofile(tmp_path / "a.bin")
    prefix, facts = str(tmp_path / "a"), {"tokenizer": tiny.tokenizer, "language": "en"}
    with pytest.raises(UserError, match="every second token is 0, as if they were stored as int32; say --dtype"):
        run(prefix, **facts)
    run(prefix, **facts, dtype="int32")
    assert verify(prefix, show_progress=False).problems == []
    assert load_sidecar(prefix).tokens == len(tokens)


def test_a_good_dataset_is_left_alone(prefix, capsys):
    before = content(prefix)
    assert cli.main(["dataset", "repair", "--input", prefix]) == 0
    assert "nothing to repair" in capsys.readouterr().out
    assert content(prefix) == before
    assert run(prefix, force=True).changed
    assert content(prefix) == before


def test_checksums_for_an_older_file(tmp_path):
    prefix = make_dataset(tmp_path / "a", DOCUMENTS, segmenter="jieba", checksums=())
    done = run(prefix)
    assert (done.changed, [path.name for path in done.kept]) == (True, ["a.json.bak"])
    assert set(load_sidecar(prefix).checksums) == {"bin", "idx", "words"}
    assert load_sidecar(prefix).bytes == 200
    assert is_sound(prefix, DOCUMENTS)


@pytest.mark.parametrize("tail", [[7, 8], []])
@pytest.mark.parametrize("odd", [b"", b"\x07"])
def test_a_tail_is_moved_if_told(tmp_path, tail, odd):
    """A copy that was cut off: the index knows more documents than the tokens hold."""
    prefix = make_dataset(tmp_path / "a", [*DOCUMENTS, [7, 8, 9, EOD]], segmenter="jieba")
    kept = np.array([token for row in DOCUMENTS for token in row] + tail, dtype=np.uint16).tobytes() + odd
    Path(f"{prefix}.bin").write_bytes(kept)
    before = content(prefix)
    if tail or odd:
        with pytest.raises(UserError, match=r"bytes lie behind the last whole document .* give --cut-tail"):
            run(prefix)
    assert content(prefix) == before
    done = run(prefix, cut_tail=True)
    names = ["a.idx.bak", "a.words.bak", "a.json.bak"] + (["a.bin.tail"] if tail or odd else [])
    assert [path.name for path in done.kept] == names
    after = content(prefix)
    assert after["a.bin"] + after.get("a.bin.tail", b"") == kept
    assert after["a.words.bak"] == before["a.words"] and after["a.json.bak"] == before["a.json"]
    assert after["a.words"] == np.packbits(word_bits(DOCUMENTS), bitorder="little").tobytes()
    assert is_sound(prefix, DOCUMENTS)
    facts = load_sidecar(prefix)
    assert (facts.documents, facts.tokens, facts.bytes) == (40, sum(map(len, DOCUMENTS)), 0)


def test_tokens_that_have_changed(tmp_path):
    prefix = make_dataset(tmp_path / "a", [[7, 8, EOD], [9, EOD]])
    np.array([7, EOD, 8, 9, EOD], dtype=np.uint16).tofile(f"{prefix}.bin")
    with pytest.raises(UserError, match=r"a\.bin: its checksum is xxh3:.*tokens have changed"):
        run(prefix)
    run(prefix, force=True)
    assert is_sound(prefix, [[7, EOD], [8, 9, EOD]])


def test_files_of_other_tools(tmp_path, tiny, capsys):
    """Adopts token files without a sidecar; their index is not touched."""
    facts = load_sidecar(tiny.directory / "en")
    for ending in ("bin", "idx"):
        os.symlink(tiny.directory / f"en.{ending}", tmp_path / f"a.{ending}")
    prefix = str(tmp_path / "a")
    for options in ([], ["--language", "en"], ["--tokenizer", tiny.tokenizer]):
        assert cli.main(["dataset", "repair", "--input", prefix, *options]) == 2
        assert "a.json: no such file: give --tokenizer and --language" in capsys.readouterr().err
    done = run(prefix, tokenizer=tiny.tokenizer, language="en")
    assert done.kept == []
    assert load_sidecar(prefix) == done.sidecar
    assert (done.sidecar.documents, done.sidecar.tokens) == (facts.documents, facts.tokens)
    assert (done.sidecar.tokenizer, done.sidecar.eod_id) == (facts.tokenizer, facts.eod_id)
    assert verify(prefix, tokenizer=tiny.tokenizer, show_progress=False).problems == []
    assert (tiny.directory / "en.idx").read_bytes() == (tmp_path / "a.idx").read_bytes()


def test_a_tokenizer_without_an_end(tmp_path, tiny, capsys):
    """Nobody can say then where documents end."""
    write_tokens(tmp_path / "a", [[1, EOD]])
    shutil.copytree(tiny.tokenizer, tmp_path / "tokenizer")
    for path in (tmp_path / "tokenizer").glob("*.json"):
        path.write_text(path.read_text().replace("<eod>", "<none>").replace('"eos_token"', '"other_token"'))
    options = ["--tokenizer", str(tmp_path / "tokenizer"), "--language", "en"]
    assert cli.main(["dataset", "repair", "--input", str(tmp_path / "a.bin"), *options]) == 2
    error = capsys.readouterr().err
    assert "no end-of-document token; expected eos_token" in error and len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("tokens", "facts", "options", "message"),
    [
        ([7, 8, 9], {}, {}, "has no end-of-document id 3 in 6 bytes of uint16"),
        ([], {}, {}, "has no end-of-document id 3 in 0 bytes"),
        ([7, VOCAB_SIZE, EOD], {}, {}, "token 1 is 1000, the tokenizer has 1,000 ids; .*--dtype"),
        ([7, EOD], {"append_eod": False}, {}, "its documents do not end with an id"),
        ([7, EOD], {}, {"language": "de"}, "language is zh, --language de; correct one"),
        ([7, EOD], {"tokenizer": TokenizerRecord("x", "sha256:0", 70_000)}, {}, "70,000 ids, uint16 cannot hold them"),
        ([7, EOD], {"tokenizer": TokenizerRecord("x", "sha256:0", 70_000)}, {"dtype": "uint16"}, "uint16 cannot hold"),
        ([7, EOD], {}, {"workers": 0}, "workers is 0"),
        ([7, EOD], {}, {"tokenizer": "none"}, "none: no such tokenizer"),
    ],
)
def test_what_cannot_be_repaired(tmp_path, tokens, facts, options, message):
    prefix = make_dataset(tmp_path / "a", [[7, 8, EOD]], checksums=(), **facts)
    np.array(tokens, dtype=np.uint16).tofile(f"{prefix}.bin")
    before = content(prefix)
    with pytest.raises(UserError, match=message):
        run(prefix, **options)
    assert content(prefix) == before


def test_a_document_too_long_for_an_index(tmp_path, monkeypatch):
    prefix = make_dataset(tmp_path / "a", [[7, 8, EOD], [7, 8, 9, EOD]], checksums=())
    monkeypatch.setattr(repair_module, "_MAX_DOCUMENT_TOKENS", 3)
    before = content(prefix)
    with pytest.raises(UserError, match=r"a\.bin: a document of 4 tokens, at most 3 fit"):
        run(prefix)
    assert content(prefix) == before


def test_without_the_words_if_told(tmp_path):
    prefix = make_dataset(tmp_path / "a", DOCUMENTS, segmenter="jieba")
    os.unlink(f"{prefix}.words")
    with pytest.raises(UserError, match=r"a\.words: 0 bytes, \d+ tokens need \d+; .*--drop-words"):
        run(prefix)
    run(prefix, drop_words=True)
    assert load_sidecar(prefix).segmenter is None
    assert is_sound(prefix, DOCUMENTS)


def test_a_damaged_sidecar_is_kept(tmp_path, tiny):
    for ending in ("bin", "idx", "json"):
        (tmp_path / f"a.{ending}").write_bytes((tiny.directory / f"en.{ending}").read_bytes())
    (tmp_path / "a.json").write_text("{")
    (tmp_path / "a.json.bak").write_text("of an earlier repair")
    with pytest.raises(UserError, match="not a readable JSON file .*: give --tokenizer and --language"):
        run(str(tmp_path / "a"))
    done = run(str(tmp_path / "a"), tokenizer=tiny.tokenizer, language="en")
    assert [path.name for path in done.kept] == ["a.json.bak2"]
    assert (tmp_path / "a.json.bak2").read_text() == "{"


def test_no_tokens_at_all(tmp_path, capsys):
    write_tokens(tmp_path / "a", [[1, EOD]])
    os.unlink(tmp_path / "a.bin")
    os.symlink(tmp_path / "b.bin", tmp_path / "b.bin")
    for name in ("a", "b"):
        assert cli.main(["dataset", "repair", "--input", str(tmp_path / name)]) == 2
        assert f"{name}.bin: no such file; without tokens" in capsys.readouterr().err


def test_killed_between_the_steps_it_can_be_run_again(tmp_path):
    prefix = make_dataset(tmp_path / "a", [*DOCUMENTS, [7, 8, 9, EOD]])
    os.truncate(f"{prefix}.bin", os.path.getsize(f"{prefix}.bin") - 2)
    whole = Path(f"{prefix}.bin").read_bytes()
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
    assert Path(f"{prefix}.bin").read_bytes() + Path(f"{prefix}.bin.tail").read_bytes() == whole
    run(prefix)
    assert is_sound(prefix, DOCUMENTS)


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
    # The superuser may write anywhere; nobody may not, and reaches the files from the directory it stands in.
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
