"""`dataset verify`: good files pass, and every kind of damage is named, all of it at once."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.dataset_parts import EOD, VOCAB_SIZE, make_dataset, random_documents, write_tokens
from support.sidecars import save_sidecar

from megatron_prealign import cli
from megatron_prealign.data.commands import verify as verify_module
from megatron_prealign.data.commands.verify import verify
from megatron_prealign.data.indexed import import_indexed_dataset
from megatron_prealign.data.sidecar import TokenizerRecord, load_sidecar
from megatron_prealign.data.sources import open_training_sources
from megatron_prealign.errors import UserError
from megatron_prealign.files import checksum
from megatron_prealign.recipe.data import DataSection, DataSource
from megatron_prealign.run.validate import _check_source


def problems(prefix: str, **options: object) -> list[str]:
    return verify(prefix, show_progress=False, **options).problems  # type: ignore[arg-type]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (checksum, verify_module):
        monkeypatch.setattr(module, "CHECKSUM_BLOCK", 64)
    monkeypatch.setattr(verify_module, "_READ_BYTES", 16)
    monkeypatch.setattr(verify_module, "_CHUNK", 3)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_good_datasets(tmp_path, capsys, workers, dtype):
    documents = random_documents(40, seed=1)
    for name, segmenter in (("plain", None), ("marked", "jieba")):
        prefix = make_dataset(tmp_path / name, documents, segmenter=segmenter, dtype=dtype)
        assert cli.main(["dataset", "verify", "--input", prefix, "--workers", str(workers)]) == 0
        printed = capsys.readouterr().out
        assert printed.startswith(f"{prefix}: nothing wrong; checked the index of 40 documents, ")
        for part in ("ids and the end of every document", "the checksum of .bin", "the checksum of .idx"):
            assert part in printed
        assert ("the marks of words" in printed) == ("the checksum of .words" in printed) == (segmenter is not None)


def test_older_files_without_checksums_and_empty_shards(tmp_path):
    result = verify(make_dataset(tmp_path / "a", random_documents(4, seed=1), checksums=()), show_progress=False)
    assert result.problems == []
    assert "no checksums" in result.checked[-1]
    assert problems(make_dataset(tmp_path / "b", [], shard="2/2")) == []
    assert problems(make_dataset(tmp_path / "c", [])) == [
        f"{tmp_path}/c.idx: holds no tokens; make the dataset again with megatron-prealign preprocess"
    ]


def patch_tokens(place: int, value: int) -> Callable[[Path], None]:
    def change(prefix: Path) -> None:
        tokens = np.fromfile(f"{prefix}.bin", np.uint16)
        tokens[place] = value
        tokens.tofile(f"{prefix}.bin")

    return change


def change_facts(**facts: object) -> Callable[[Path], None]:
    return lambda prefix: save_sidecar(replace(load_sidecar(prefix), **facts), prefix)  # type: ignore[arg-type]


def write(ending: str, content: bytes | None = None, cut: int = 0) -> Callable[[Path], None]:
    def change(prefix: Path) -> None:
        path = Path(f"{prefix}.{ending}")
        data = path.read_bytes() if content is None else content
        path.write_bytes(data[: len(data) - cut])

    return change


def set_bits(place: int, value: int) -> Callable[[Path], None]:
    def change(prefix: Path) -> None:
        data = bytearray(Path(f"{prefix}.words").read_bytes())
        data[place] = value
        Path(f"{prefix}.words").write_bytes(data)

    return change


OTHER = TokenizerRecord("x", "sha256:bb", 70_000)
# Documents of [9, 8, EOD], [EOD], [7, EOD]: tokens 2, 3 and 5 end them.
DAMAGE = {
    "an id too large": (patch_tokens(1, VOCAB_SIZE), ["holds ids from 3 to 1000, expected 0 to 999", "its checksum"]),
    "a document without an end": (
        patch_tokens(3, 20),
        ["1 documents do not end with the end-of-document id 3, the first is number 1", "its checksum"],
    ),
    "an end inside": (patch_tokens(1, EOD), ["stands 1 times inside documents, first as token 1", "its checksum"]),
    "a flipped bit": (patch_tokens(0, 10), ["a.bin: its checksum is xxh3:"]),
    "tokens cut": (write("bin", cut=1), ["a.bin: 11 bytes, expected 12", "a.bin: its checksum"]),
    "no tokens": (write("bin", b""), ["a.bin: 0 bytes, expected 12", "a.bin: its checksum"]),
    "index cut": (write("idx", cut=1), ["a.idx: 101 bytes, expected 102", "a.idx: its checksum"]),
    "no index": (lambda prefix: os.unlink(f"{prefix}.idx"), ["a.idx: no such file"]),
    "only a sidecar": (
        lambda prefix: [os.unlink(f"{prefix}.{ending}") for ending in ("bin", "idx", "words")],
        ["a.idx: no such file", "a.bin: no such file"],
    ),
    "no sidecar": (lambda prefix: os.unlink(f"{prefix}.json"), ["a.json: no such file"]),
    "counts": (change_facts(documents=4, tokens=9), ["holds 3 documents and 6 tokens, its sidecar says 4 and 9"]),
    "a vocabulary too large for 16 bits": (change_facts(tokenizer=OTHER), ["stores them as uint16, up to 65,535"]),
    "eod outside": (
        change_facts(eod_id=-1),
        ["eod_id is -1, expected an id from 0 to 999", "3 documents do not end with the end-of-document id -1"],
    ),
    "bits behind the end": (set_bits(0, 0xFF), ["has bits behind its 6 tokens", "a.words: its checksum"]),
    "a document without a word": (set_bits(0, 0b110111), ["no word starts at token 3", "a.words: its checksum"]),
    "bitmap too long": (write("words", b"ab"), ["a.words: 2 bytes, expected 1", "a.words: its checksum"]),
    "no bitmap": (lambda prefix: os.unlink(f"{prefix}.words"), ["a.words: no such file, but a.json says"]),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage(tmp_path, capsys, name):
    change, expected = DAMAGE[name]
    prefix = make_dataset(tmp_path / "a", [[9, 8, EOD], [EOD], [7, EOD]], segmenter="jieba")
    assert problems(prefix) == []
    change(Path(prefix))
    found = problems(prefix)
    for part in expected:
        assert any(part in problem for problem in found), (part, found)
    assert len(found) == len(expected), found
    good = make_dataset(tmp_path / "good", [[EOD]])
    assert cli.main(["dataset", "verify", "--input", prefix, good]) == 2
    output = capsys.readouterr()
    assert output.out.splitlines()[: len(found)] == [f"wrong: {problem}" for problem in found]
    assert output.err.splitlines()[-1] == "error: 1 of 2 datasets is wrong, as listed above"


def test_everything_wrong_at_once(tmp_path):
    prefix = make_dataset(tmp_path / "a", [[9, 8, EOD], [EOD], [7, EOD]], segmenter="jieba")
    patch_tokens(0, 2000)(Path(prefix))
    patch_tokens(1, EOD)(Path(prefix))
    patch_tokens(5, 1)(Path(prefix))
    set_bits(0, 0)(Path(prefix))
    change_facts(documents=7)(Path(prefix))
    assert len(problems(prefix)) == 7


def test_tokens_without_ends(tmp_path):
    prefix = make_dataset(tmp_path / "a", [[9, EOD, 8], [7]], append_eod=False)
    assert problems(prefix) == []


@pytest.mark.usefixtures("small_blocks")
@settings(max_examples=80, deadline=None)
@given(
    rows=st.lists(st.lists(st.sampled_from([EOD, 5, 6]), max_size=30), max_size=9),
    cut=st.randoms(use_true_random=False),
)
def test_ends_against_the_definition(tmp_path_factory, rows, cut):
    """Documents of any number of sequences, also empty ones, with and without ends, over the edges of blocks."""
    prefix = tmp_path_factory.mktemp("a") / "a"
    make_dataset(prefix, [[EOD]], checksums=(), documents=len(rows), tokens=sum(map(len, rows)), shard="1/1")
    builder = import_indexed_dataset().IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for row in rows:
        points = sorted(cut.choices(range(len(row) + 1), k=cut.randrange(3)))
        lengths = [stop - start for start, stop in zip([0, *points], [*points, len(row)], strict=True)]
        builder.add_document(np.array(row, dtype=np.uint16), lengths)
    builder.finalize(f"{prefix}.idx")
    found = problems(str(prefix), workers=2)
    expected = []
    without = [number for number, row in enumerate(rows) if not row or row[-1] != EOD]
    if any(rows) and without:
        expected.append(
            f"{len(without):,} documents do not end with the end-of-document id 3, the first is number {without[0]:,}"
        )
    starts = np.cumsum([0, *map(len, rows)])
    inside = [
        int(start) + place
        for start, row in zip(starts, rows, strict=False)
        for place in range(len(row) - 1)
        if row[place] == EOD
    ]
    if inside:
        expected.append(f"stands {len(inside):,} times inside documents, first as token {inside[0]:,} ")
    assert len(found) == len(expected), found
    for problem, part in zip(found, expected, strict=True):
        assert part in problem


def test_tokenizer_and_options(tmp_path, tiny, capsys):
    prefix = make_dataset(tmp_path / "a", random_documents(4, seed=1))
    assert [problem.split(": ")[1][:22] for problem in problems(prefix, tokenizer=tiny.tokenizer)] == [
        "tokenizer.fingerprint ",
        "tokenizer.vocab_size i",
        "eod_id is 3, that of t",
    ]
    assert problems(str(tiny.directory / "en"), tokenizer=tiny.tokenizer) == []
    with pytest.raises(UserError, match="no such tokenizer"):
        problems(prefix, tokenizer="none")
    for arguments in (["--input"], ["--input", prefix, "--workers", "0"]):
        assert cli.main(["dataset", "verify", *arguments]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    write_tokens(tmp_path / "plain", [[1]])
    assert problems(str(tmp_path / "plain")) == [
        f"{tmp_path}/plain.json: no such file; make the dataset with megatron-prealign preprocess, or, if its .bin is "
        "there, the missing files with megatron-prealign dataset repair"
    ]


def test_training_refuses_ids_that_were_cut(tmp_path):
    prefix = make_dataset(tmp_path / "a", random_documents(4, seed=1), tokenizer=OTHER)
    source = DataSource(path=prefix, language="zh")
    data = DataSection(tokenizer="x", sources=[source], seq_length=8)
    for check in (lambda: open_training_sources(data, ["zh"]), lambda: _check_source(source)):
        with pytest.raises(UserError, match=r"70,000 ids, but a\.idx stores them as uint16, up to 65,535"):
            check()
    make_dataset(tmp_path / "a", random_documents(4, seed=1), documents=5)
    with pytest.raises(UserError, match="holds 4 documents .* its sidecar says 5"):
        _check_source(source)
