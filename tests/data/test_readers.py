"""Reading documents: formats, places, blocks, and every kind of broken input."""

import gzip
import json
import pickle
import random
from pathlib import Path

import pytest

from megatron_prealign.data import problems
from megatron_prealign.data.readers import Problems, ReadError, check_inputs, parse_block, read_blocks, read_documents
from megatron_prealign.errors import UserError


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz"])
def test_jsonl(tmp_path: Path, ending: str) -> None:
    data = '\ufeff{"text": "one"}\r\n\n{"text": "zwei\\nü", "id": 3}\n{"text": "\u2028 \\r"}'.encode()
    path = write(tmp_path / f"a.{ending}", data)
    assert list(read_documents([path])) == [
        ("one", f"{path}:1"),
        ("zwei\nü", f"{path}:3"),
        ("\u2028 \r", f"{path}:4"),
    ]


@pytest.mark.parametrize("ending", ["txt", "txt.gz"])
def test_txt_documents_are_separated_by_blank_lines(tmp_path: Path, ending: str) -> None:
    path = write(tmp_path / f"a.{ending}", b"\n\none\r\n two \r\n \t\r\n\nthree\n")
    assert list(read_documents([path])) == [("one\n two ", f"{path}:3"), ("three", f"{path}:7")]


@pytest.mark.parametrize("ending", ["jsonl", "txt.gz"])
@pytest.mark.parametrize("block_bytes", [1, 40, 10**9])
def test_blocks_hold_whole_documents_and_account_for_every_byte_on_disk(
    tmp_path: Path, ending: str, block_bytes: int
) -> None:
    texts = [f"first line {n}\nsecond line" for n in range(50)]
    lines = [json.dumps({"text": text}) + "\n" if "json" in ending else text + "\n\n" for text in texts]
    path = write(tmp_path / f"a.{ending}", "".join(lines).encode())
    blocks = list(read_blocks(path, block_bytes))
    assert len(blocks) > 1 or block_bytes > 1000
    assert [text for block in blocks for text, _ in parse_block(block)] == texts
    whole = [where for _, where in read_documents([path])]
    assert [where for block in blocks for _, where in parse_block(block)] == whole
    assert sum(block.disk_bytes for block in blocks) == path.stat().st_size


BAD_LINES = [
    (b'{"text": "x"', "not JSON"),
    (b"plain words", "not JSON"),
    (b'["text"]', "a JSON array; expected an object"),
    (b"null", "a JSON null; expected an object"),
    (b'{"body": "x", "id": 1}', "no key 'text'; the keys are: body, id; name the right one with --text-key"),
    (b"{}", "the keys are: none"),
    (b'{"text": 5}', "the value of 'text' is a JSON number; expected a string"),
    (b'{"text": null}', "the value of 'text' is a JSON null; expected a string"),
    (b'{"text": true}', "is a JSON boolean"),
    (b'{"text": "caf\xe9"}', "not UTF-8: byte 0xe9 at byte 14; convert the file to UTF-8"),
]


@pytest.mark.parametrize(("line", "why"), BAD_LINES)
def test_bad_lines_stop_or_are_skipped(tmp_path: Path, line: bytes, why: str) -> None:
    path = write(tmp_path / "a.jsonl", b'{"text": "one"}\n' + line + b'\n{"text": "three"}\n')
    with pytest.raises(UserError) as caught:
        list(read_documents([path]))
    assert str(caught.value).startswith(f"{path}:2: ")
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)
    problems = Problems()
    assert [text for text, _ in read_documents([path], on_error="skip", problems=problems)] == ["one", "three"]
    assert problems.count == 1
    assert problems.listed[0].where == f"{path}:2"
    assert why in problems.listed[0].why


def test_another_text_key(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'{"body": "x"}\n')
    assert [text for text, _ in read_documents([path], text_key="body")] == ["x"]


def test_broken_utf8_in_a_text_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"one\n\ntwo\n\xff\xfe\n\nthree\n")
    with pytest.raises(UserError, match=r"a\.txt:3: not UTF-8: byte 0xff at byte 5"):
        list(read_documents([path]))
    problems = Problems()
    assert [text for text, _ in read_documents([path], on_error="skip", problems=problems)] == ["one", "three"]
    assert problems.count == 1


def test_an_empty_file_is_a_problem(tmp_path: Path) -> None:
    empty, good = write(tmp_path / "a.jsonl", b""), write(tmp_path / "b.txt.gz", b"text")
    with pytest.raises(UserError, match=r"a\.jsonl: empty file"):
        list(read_documents([empty, good]))
    problems = Problems()
    assert len(list(read_documents([empty, good], on_error="skip", problems=problems))) == 1
    assert (problems.count, problems.listed[0].where) == (1, str(empty))


@pytest.mark.parametrize("damage", ["cut", "flipped", "not gzip"])
def test_damaged_gzip(tmp_path: Path, damage: str) -> None:
    # Hardly compressible, so that the damage in the middle of the file lies in the middle of the text.
    generator = random.Random(0)
    lines = [json.dumps({"text": str(generator.getrandbits(300))}) for _ in range(5000)]
    data = bytearray(gzip.compress("\n".join(lines).encode()))
    if damage == "cut":
        data = data[: len(data) // 2]
    elif damage == "flipped":
        data[len(data) // 2 : len(data) // 2 + 50] = bytes(50)
    else:
        data = bytearray(b"plain text, wrongly named")
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"a\.jsonl\.gz:\d+: .*(gzip|not JSON)") as caught:
        list(read_documents([path]))
    assert "\n" not in str(caught.value)
    problems = Problems()
    documents = list(read_documents([path], on_error="skip", problems=problems))
    assert problems.count >= 1
    # What lies before the damage is kept.
    kept = [] if damage == "not gzip" else [json.loads(line)["text"] for line in lines[:100]]
    assert [text for text, _ in documents][:100] == kept


def test_inputs_are_checked_before_any_work(tmp_path: Path) -> None:
    good = write(tmp_path / "a.txt", b"text")
    (tmp_path / "folder.txt").mkdir()
    write(tmp_path / "a.csv", b"text")
    (tmp_path / "link.txt").symlink_to(good)
    assert check_inputs([good]) == 4
    for paths, message in [
        ([], "no input file given"),
        ([good, tmp_path / "missing.txt"], "missing.txt: no such file"),
        ([tmp_path / "folder.txt"], "is a folder"),
        ([tmp_path / "a.csv"], "unknown kind of file; expected one of .jsonl"),
        ([good, tmp_path / "link.txt"], "given twice"),
    ]:
        with pytest.raises(UserError, match=message):
            check_inputs(paths)
    with pytest.raises(UserError, match="cannot be opened"):
        list(read_documents([tmp_path / "missing.txt"], on_error="skip"))


def test_problems_list_the_first_and_count_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problems, "MAX_LISTED", 3)
    first, second = Problems(), Problems()
    for n in range(2):
        first.add(f"a:{n}", "x")
        second.add(f"b:{n}", "x")
    first.extend(second)
    first.extend(second)
    assert first.count == 6
    assert [problem.where for problem in first.listed] == ["a:0", "a:1", "b:0"]


def test_read_errors_survive_the_way_out_of_a_worker() -> None:
    error = pickle.loads(pickle.dumps(ReadError("a.txt:3", "broken")))
    assert (str(error), error.where, error.why) == ("a.txt:3: broken", "a.txt:3", "broken")
