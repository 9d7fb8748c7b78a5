"""Which files a command reads: directories, patterns, links, and every error in one line."""

import bz2
import gzip
import os
from pathlib import Path

import pytest
import zstandard
from support.messages import user_error

from megatron_prealign.corpus.inputs import Input, resolve_each, resolve_inputs, split_language

PACK = {
    "": bytes,
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "zst": zstandard.compress,
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Files of all kinds, hidden ones and others among them, and links that go in circles."""
    for name in ("b.jsonl", "a/z.txt", "a/deep/x.TXT", "a.jsonl/part", "c.csv", "._b.jsonl", ".git/x.txt", "a/.x.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")
    for ending, pack in PACK.items():
        if ending:
            (tmp_path / f"a/y.jsonl.{ending}").write_bytes(pack(b"text"))
    (tmp_path / "a/d.parquet").write_bytes(b"PAR1 no parquet inside PAR1")
    (tmp_path / "a/deep/up").symlink_to("..")
    (tmp_path / "a/deep/self").symlink_to(".")
    (tmp_path / "a/again").symlink_to("deep")
    return tmp_path


BELOW_A = ["a/d.parquet", "a/deep/x.TXT", "a/y.jsonl.bz2", "a/y.jsonl.gz", "a/y.jsonl.zst", "a/z.txt"]


def names(inputs: list[Input]) -> list[str]:
    return [one.name for one in inputs]


@pytest.mark.parametrize(
    ("texts", "found"),
    [
        (["."], ["./" + name for name in [*BELOW_A, "b.jsonl"]]),
        (["b.jsonl", "a"], ["b.jsonl", *BELOW_A]),
        (["a/"], BELOW_A),
        (["*"], [*BELOW_A, "b.jsonl"]),
        (["**"], [*BELOW_A, "b.jsonl"]),
        (["**/*.txt"], ["a/z.txt"]),
        (["**/x.*"], ["a/deep/x.TXT"]),
        (["**/**/x.*"], ["a/deep/x.TXT"]),
        (["*/*.txt"], ["a/z.txt"]),
        (["a/*"], BELOW_A),
        (["a/y.jsonl.*", "*.jsonl"], ["a/y.jsonl.bz2", "a/y.jsonl.gz", "a/y.jsonl.zst", "b.jsonl"]),
        (["a/**/deep/x*"], ["a/deep/x.TXT"]),
        (["a/.x*", "[bc].*"], ["a/.x.txt", "b.jsonl"]),
    ],
)
def test_directories_and_patterns(
    tree: Path, monkeypatch: pytest.MonkeyPatch, texts: list[str], found: list[str]
) -> None:
    monkeypatch.chdir(tree)
    assert names(resolve_inputs(texts)) == found
    assert names(resolve_inputs([f"{tree}/{text}" for text in texts])) == [f"{tree}/{name}" for name in found]


def test_kinds_and_sizes(tree: Path) -> None:
    found = {Path(one.name).name: one for one in resolve_inputs([tree])}
    assert {name: (one.kind, one.compression) for name, one in found.items()} == {
        "b.jsonl": ("jsonl", ""),
        "z.txt": ("txt", ""),
        "x.TXT": ("txt", ""),
        "d.parquet": ("parquet", ""),
        **{f"y.jsonl.{ending}": ("jsonl", ending) for ending in PACK if ending},
    }
    assert all(one.bytes == os.path.getsize(one.name) for one in found.values())


def test_a_name_with_pattern_signs_is_that_file(tmp_path: Path) -> None:
    for name in ("a[1].txt", "a1.txt"):
        (tmp_path / name).write_text("text")
    assert names(resolve_inputs([tmp_path / "a[1].txt"])) == [str(tmp_path / "a[1].txt")]
    assert names(resolve_inputs([tmp_path / "?[1].txt"])) == [str(tmp_path / "a1.txt")]


def test_empty_files_are_found(tmp_path: Path) -> None:
    # The reader decides what to do: stop, or skip and report.
    for name in ("a.jsonl", "b.txt.gz", "c.parquet"):
        (tmp_path / name).touch()
    assert [one.bytes for one in resolve_inputs([tmp_path])] == [0, 0, 0]


def test_hub_names_are_kept_unchanged() -> None:
    found = resolve_inputs(["hf:owner/name,config:validation", "hf:./directory"])
    assert found == [Input("hf:owner/name,config:validation", "hub", "", 0), Input("hf:./directory", "hub", "", 0)]


def test_files_with_languages(tmp_path: Path) -> None:
    (tmp_path / "a:de").touch()
    assert split_language(f"{tmp_path}/a:de") == (f"{tmp_path}/a:de", None)
    assert split_language(f"{tmp_path}/a:de:en") == (f"{tmp_path}/a:de", "en")
    for text, parts in {
        "a.txt": ("a.txt", None),
        "data/**/*.jsonl.gz:zh-Hans": ("data/**/*.jsonl.gz", "zh-Hans"),
        "data:en_clone": ("data", "en_clone"),
        "data:2/a.txt": ("data:2/a.txt", None),
        "hf:owner/name": ("hf:owner/name", None),
        "hf:owner/name:de": ("hf:owner/name:de", None),
        "hf:owner/name,de:train:de": ("hf:owner/name,de:train", "de"),
    }.items():
        assert split_language(text) == parts


def test_inputs_of_each_text(tree: Path) -> None:
    found = resolve_each([tree / "b.jsonl", tree / "a"])
    assert [len(inputs) for inputs in found] == [1, len(BELOW_A)]


@pytest.mark.parametrize(
    ("texts", "facts"),
    [
        ([], ("no input", ".jsonl, .txt", "hf:NAME")),
        (["b.jsonl", "nothing.txt"], ("nothing.txt: ", "not found")),
        (["c.csv"], ("c.csv: unsupported", ".jsonl, .txt")),
        (["a.jsonl"], ("a.jsonl: directory", ".jsonl, .txt", "found part;")),
        (["q*"], ("q*: pattern", ".jsonl, .txt", "found nothing;")),
        (["*.csv"], ("*.csv: pattern", "found c.csv;")),
        (["b.jsonl", "./b.jsonl"], ("./b.jsonl: given twice", "also as b.jsonl")),
        (["b.jsonl", "a", "*.jsonl"], ("b.jsonl: given twice",)),
        (["hf:a/b", "hf:a/b"], ("hf:a/b: given twice",)),
        (["hf:"], ("hf:: invalid", "expected hf:NAME[,CONFIG][:SPLIT]")),
        (["hf:a:b:c"], ("hf:a:b:c: invalid", "expected hf:NAME")),
        (["pipe.txt"], ("pipe.txt: not a regular file",)),
        (["links/gone.txt"], ("links/gone.txt: broken link", "nowhere")),
        (["links"], ("links/circle.txt: link", "itself")),
    ],
)
def test_errors(tree: Path, monkeypatch: pytest.MonkeyPatch, texts: list[str], facts: tuple[str, ...]) -> None:
    monkeypatch.chdir(tree)
    Path("links").mkdir()
    Path("links/gone.txt").symlink_to("nowhere")
    Path("links/circle.txt").symlink_to("circle.txt")
    os.mkfifo("pipe.txt")
    with user_error(*facts):
        resolve_inputs(texts)


@pytest.mark.parametrize("extension", ["jsonl", "jsonl.gz", "jsonl.zst", "txt.bz2", "parquet"])
@pytest.mark.parametrize("content", ["gz", "zst", "bz2", "parquet"])
def test_content_that_does_not_match_the_extension(tmp_path: Path, extension: str, content: str) -> None:
    path = tmp_path / f"a.{extension}"
    path.write_bytes(b"PAR1 or so PAR1" if content == "parquet" else PACK[content](b"text" * 100))
    if extension.endswith(content):
        assert len(resolve_inputs([path])) == 1
    else:
        with user_error(path, f"{content} data", f"extension is .{extension};"):
            resolve_inputs([path])


def test_zstd_that_starts_with_a_skippable_frame(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\x5a\x2a\x4d\x18\1\0\0\0x" + zstandard.compress(b"text"))
    with user_error(tmp_path / "a.txt", "zst data", "extension is .txt;"):
        resolve_inputs([tmp_path / "a.txt"])


def test_unreadable_files_and_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "directory").mkdir()
    (tmp_path / "directory").chmod(0)
    (tmp_path / "a.txt").chmod(0)
    if os.access(tmp_path / "a.txt", os.R_OK):
        # Root may read everything: simulate the refusal.
        def deny(path: object, *_: object) -> None:
            raise PermissionError(13, "Permission denied", path)

        monkeypatch.setattr("builtins.open", deny)
        monkeypatch.setattr(os, "scandir", deny)
    for name in ("a.txt", "directory"):
        with user_error(f"{tmp_path / name}: ", "Permission denied"):
            resolve_inputs([tmp_path / name])
    (tmp_path / "directory").chmod(0o755)
