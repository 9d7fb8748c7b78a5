"""The reader of Hugging Face directories: valid ones are read bit for bit, everything else is a one-line error."""

import json
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from support.messages import assert_facts, user_error

from megatron_prealign.conversion.hf_directory import HuggingFaceDirectory
from megatron_prealign.conversion.safetensors_header import HeaderError, read_header
from megatron_prealign.errors import UserError

FUZZ = settings(
    max_examples=100,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
TENSORS = {
    "a.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b.weight": torch.arange(4, dtype=torch.bfloat16),
    "c.weight": torch.tensor(2.5, dtype=torch.float16),
    "d.weight": torch.empty(0, 3),
    "e.attn.bias": torch.ones(2, 2, dtype=torch.bool),
}


def is_buffer(name: str) -> bool:
    return name.endswith(".attn.bias")


SHAPES = {name: tuple(tensor.shape) for name, tensor in TENSORS.items() if not is_buffer(name)}
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def single(directory: Path, config: Any = None) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config or {"model_type": "x"}), encoding="utf-8")
    save_file(TENSORS, directory / "model.safetensors")
    return directory


def sharded(directory: Path) -> Path:
    single(directory)
    (directory / "model.safetensors").unlink()
    names = list(TENSORS)
    shards = {FIRST: names[:2], SECOND: names[2:]}
    for file, part in shards.items():
        save_file({name: TENSORS[name] for name in part}, directory / file)
    write_index(directory, {name: file for file, part in shards.items() for name in part})
    return directory


def write_index(directory: Path, weight_map: Any, name: str = INDEX) -> None:
    (directory / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")


def read_index(directory: Path) -> dict[str, str]:
    return json.loads((directory / INDEX).read_bytes())["weight_map"]


def pickled(directory: Path, content: Any = None, **options: Any) -> Path:
    single(directory)
    (directory / "model.safetensors").unlink()
    torch.save(TENSORS if content is None else content, directory / "pytorch_model.bin", **options)
    return directory


def error_of(directory: Path, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        HuggingFaceDirectory(directory, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_same_tensors(directory: HuggingFaceDirectory) -> None:
    assert set(directory.tensors) == set(TENSORS)
    for name in SHAPES:
        read = directory.read(name)
        assert read.dtype == TENSORS[name].dtype and torch.equal(read, TENSORS[name])


@pytest.mark.parametrize("make", [single, sharded])
def test_tensors_are_read_bit_for_bit(tmp_path: Path, make: Any) -> None:
    directory = HuggingFaceDirectory(make(tmp_path))
    assert_same_tensors(directory)
    assert directory.config == {"model_type": "x"}
    directory.check(SHAPES, is_buffer)


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}])
def test_pickles_are_read_on_request(tmp_path: Path, options: dict[str, Any]) -> None:
    directory = pickled(tmp_path, **options)
    assert "--allow-pickle" in error_of(directory)
    opened = HuggingFaceDirectory(directory, allow_pickle=True)
    assert_same_tensors(opened)
    opened.check(SHAPES, is_buffer)


def test_sharded_pickles_are_mapped_again_after_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pickled(tmp_path)
    os.replace(tmp_path / "pytorch_model.bin", tmp_path / "pytorch_model-00001-of-00001.bin")
    write_index(
        tmp_path, {name: "pytorch_model-00001-of-00001.bin" for name in TENSORS}, "pytorch_model.bin.index.json"
    )
    monkeypatch.setattr("megatron_prealign.conversion.hf_directory._MAPPED_BYTES", 0)
    maps = []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **options: maps.append(options["mmap"]) or load(*args, **options))
    assert_same_tensors(HuggingFaceDirectory(tmp_path, allow_pickle=True))
    # Once for the shapes, then again for every read after the first.
    assert maps == [True] * 4


class Runs:
    """An object whose unpickling runs code."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.file),))


def test_a_pickle_runs_nothing(tmp_path: Path) -> None:
    directory = pickled(tmp_path / "model", {"a.weight": Runs(tmp_path / "ran")})
    text = error_of(directory, allow_pickle=True)
    # torch's own message suggests loading without weights_only.
    assert_facts(text, directory / "pytorch_model.bin", "weights_only", "posix.mkdir")
    assert "two options" not in text
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps(Runs(tmp_path / "ran")))
    assert "weights_only" in error_of(directory, allow_pickle=True)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content",
    [
        [1],
        {"state_dict": {"a": torch.ones(1)}},
        {"a": torch.ones(2).to_sparse()},
        {"a": torch.ones(1, device="meta")},
        # One element that declares a size beyond any memory.
        {"a": torch.ones(1).expand(2**24, 2**24)},
    ],
)
def test_a_pickle_of_something_else_is_refused(tmp_path: Path, content: Any) -> None:
    text = error_of(pickled(tmp_path, content), allow_pickle=True)
    # Versions of torch differ in which unusual tensors weights_only loads.
    assert "state_dict" in text or "weights_only" in text


def test_every_difference_is_listed(tmp_path: Path) -> None:
    directory = HuggingFaceDirectory(single(tmp_path))
    expected = {"a.weight": (3, 2), "x.weight": (1,), "b.weight": (4,), "c.weight": ()}
    with user_error(tmp_path, "x.weight is missing", "a.weight", [2, 3], [3, 2], "d.weight is unexpected") as caught:
        directory.check(expected, is_buffer)
    text = str(caught.value)
    assert "b.weight" not in text and "c.weight" not in text and "e.attn.bias" not in text
    with user_error("and 4 more"):
        directory.check({**SHAPES, **{f"layer.{number}": (1,) for number in range(24)}}, is_buffer)


def test_weights_are_floating_point_numbers(tmp_path: Path) -> None:
    single(tmp_path)
    save_file({"a": torch.ones(2, dtype=torch.int8)}, tmp_path / "model.safetensors")
    with user_error(tmp_path, "a has dtype I8", "F64, F32, F16, BF16"):
        HuggingFaceDirectory(tmp_path).check({"a": (2,)})


def test_a_missing_shard(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / SECOND).unlink()
    text = error_of(tmp_path)
    assert_facts(text, INDEX, f"missing: {SECOND}")
    assert FIRST not in text


def test_a_shard_that_is_not_in_the_index(tmp_path: Path) -> None:
    directory = sharded(tmp_path)
    (directory / "model-00003-of-00003.safetensors").write_bytes((directory / FIRST).read_bytes())
    (directory / "consolidated.safetensors").write_bytes(b"of another format, which is ignored")
    text = error_of(directory)
    assert_facts(text, f"not listed in {INDEX}", "model-00003-of-00003.safetensors")
    assert "consolidated" not in text and FIRST not in text


def test_shards_without_an_index(tmp_path: Path) -> None:
    directory = sharded(tmp_path)
    (directory / INDEX).unlink()
    assert "no weights" in error_of(directory)
    save_file(TENSORS, directory / "model.safetensors")
    assert_facts(error_of(directory), "without an index", f"{FIRST}, {SECOND}")


def test_index_and_files_do_not_match(tmp_path: Path) -> None:
    directory = sharded(tmp_path)
    weight_map = read_index(directory)
    del weight_map["a.weight"]
    weight_map["x.weight"] = FIRST
    weight_map["c.weight"] = FIRST
    write_index(directory, weight_map)
    text = error_of(directory)
    assert f"a.weight in {FIRST} is not in the index" in text
    assert f"x.weight is in the index but not in {FIRST}" in text
    assert f"c.weight is in the index but not in {FIRST}" in text
    save_file(TENSORS, directory / FIRST)
    assert_facts(error_of(directory), "c.weight is in both", f"{FIRST} and {SECOND}")


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "x/../../model.safetensors"])
def test_no_name_points_outside_the_directory(tmp_path: Path, name: str) -> None:
    single(tmp_path)
    directory = sharded(tmp_path / "model")
    write_index(directory, {**read_index(directory), "a.weight": name})
    assert_facts(error_of(directory), directory / INDEX, f"outside the directory: {name};")


def test_no_link_points_outside_the_directory(tmp_path: Path) -> None:
    elsewhere = single(tmp_path / "elsewhere")
    directory = sharded(tmp_path / "model")
    (directory / FIRST).unlink()
    (directory / FIRST).symlink_to(elsewhere / "model.safetensors")
    assert_facts(error_of(directory), directory / FIRST, "outside its directory", elsewhere / "model.safetensors")
    (directory / FIRST).unlink()
    (directory / FIRST).symlink_to(directory / FIRST)
    assert_facts(error_of(directory), "cannot read", directory / FIRST)
    (directory / FIRST).unlink()
    (directory / FIRST).mkdir()
    assert_facts(error_of(directory), directory / FIRST, "not a regular file")


def test_a_snapshot_of_the_hub_cache_is_read(tmp_path: Path) -> None:
    single(tmp_path / "blobs")
    snapshot = tmp_path / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (snapshot / name).symlink_to(Path("../../blobs") / name)
    assert_same_tensors(HuggingFaceDirectory(snapshot))


def test_a_directory_itself_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(sharded(tmp_path / "model"))
    assert_same_tensors(HuggingFaceDirectory(tmp_path / "link"))


def test_a_truncated_file(tmp_path: Path) -> None:
    file = single(tmp_path) / "model.safetensors"
    opened = HuggingFaceDirectory(tmp_path)
    content = file.read_bytes()
    for length in (0, 5, 8, 30, len(content) - 1):
        file.write_bytes(content[:length])
        assert_facts(error_of(tmp_path), f"{file} is corrupt")
    last = max(opened.tensors, key=lambda name: opened.tensors[name].offset if name in SHAPES else -1)
    file.write_bytes(content[: opened.tensors[last].offset])
    with user_error(f"{file}: truncated while it was read"):
        opened.read(last)


def test_missing_files(tmp_path: Path) -> None:
    assert "config.json is missing" in error_of(tmp_path)
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    assert "no weights" in error_of(tmp_path)
    assert_facts(error_of(tmp_path / "none"), "cannot read", tmp_path / "none")
    assert_facts(error_of(tmp_path / "config.json"), "cannot read", tmp_path / "config.json")


def with_header(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("content", "facts"),
    [
        (struct.pack("<Q", 2**62) + b"{}", ("header", f"{2**62:,}")),
        (with_header([]), ("header", "list", "object")),
        (with_header(b"[" * 100_000), ("nested too deeply",)),
        (with_header(b'{"a": ' + json.dumps(ENTRY).encode() + b', "a": {}}', bytes(8)), ("a appears twice",)),
        (with_header({"a": ENTRY, "b": ENTRY}, bytes(8)), ("b starts at byte",)),
        (with_header({"a": ENTRY, "b": {**ENTRY, "data_offsets": [9, 17]}}, bytes(17)), ("b starts at byte",)),
        (with_header({"a": ENTRY}, bytes(9)), ("tensors end at byte",)),
        (with_header({"a": {**ENTRY, "shape": [3]}}, bytes(8)), ("a has 8 bytes", "12", "F32")),
        (with_header({"a": {**ENTRY, "shape": [2**62, 2**62]}}, bytes(8)), ("a has 8 bytes",)),
        (with_header({"a": {**ENTRY, "shape": [-2]}}, bytes(8)), ("shape of a", "list")),
        (with_header({"a": {**ENTRY, "shape": [True, 2]}}, bytes(8)), ("shape of a", "list")),
        (with_header({"a": {**ENTRY, "dtype": "F33"}}, bytes(8)), ("a has dtype F33", "BF16")),
        (with_header({"a": {**ENTRY, "dtype": ["F32"]}}, bytes(8)), ("a has dtype",)),
        (with_header({"a": {**ENTRY, "data_offsets": [8, 0]}}, bytes(8)), ("data_offsets of a",)),
        (with_header({"a\nb": {}}), (r"entry of 'a\nb'", "object")),
    ],
)
def test_corrupt_headers(tmp_path: Path, content: bytes, facts: tuple[str, ...]) -> None:
    (tmp_path / "file").write_bytes(content)
    with user_error(*facts, kind=HeaderError):
        read_header(tmp_path / "file")


JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**70), 2**70),
        st.floats(),
        st.text(max_size=5),
        st.sampled_from(["F32", "BF16", "BOOL", FIRST, SECOND, "../x", "\0", "\ud800", "a" * 300, "."]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.sampled_from(["dtype", "shape", "data_offsets", "weight_map", "metadata", "a.weight", "x", "\ud800"]),
            inner,
            max_size=4,
        ),
    ),
    max_leaves=12,
)
BYTES = st.one_of(st.binary(max_size=60), JSON.map(lambda value: json.dumps(value).encode()))


def assert_opened_or_refused(directory: Path, **options: Any) -> None:
    try:
        opened = HuggingFaceDirectory(directory, **options)
        opened.check(SHAPES, is_buffer)
    except UserError as error:
        assert "\n" not in str(error) and str(directory) in str(error) and len(str(error)) < 5000
    else:
        for name in SHAPES:
            assert opened.read(name).shape == SHAPES[name]


@pytest.mark.slow
@FUZZ
@given(data=BYTES, name=st.sampled_from(["config.json", INDEX, FIRST]))
def test_any_bytes_in_a_file(tmp_path: Path, data: bytes, name: str) -> None:
    (sharded(tmp_path) / name).write_bytes(data)
    assert_opened_or_refused(tmp_path)


@pytest.mark.slow
@FUZZ
@given(weight_map=st.dictionaries(st.sampled_from([*TENSORS, "x", "\ud800", "\n"]), JSON, max_size=6))
def test_any_index(tmp_path: Path, weight_map: dict[str, Any]) -> None:
    write_index(sharded(tmp_path), weight_map)
    assert_opened_or_refused(tmp_path)


NUMBER = st.one_of(st.integers(0, 20), st.sampled_from([-1, 2**31, 2**63, 2**64, 1.0, True, None]))
HEADER_ENTRY = st.one_of(
    st.builds(
        lambda dtype, shape, begin, length: {"dtype": dtype, "shape": shape, "data_offsets": [begin, begin + length]},
        st.sampled_from(["F32", "BF16", "U8", "F64", "F4", "X"]),
        st.lists(st.integers(0, 3), max_size=3),
        st.integers(0, 12),
        st.integers(0, 12),
    ),
    st.fixed_dictionaries(
        {"dtype": st.just("U8"), "shape": st.lists(NUMBER, max_size=3), "data_offsets": st.lists(NUMBER, max_size=3)}
    ),
    JSON,
)


@pytest.mark.slow
@settings(FUZZ, max_examples=400)
@given(
    header=st.dictionaries(st.sampled_from(["a", "b", "c", "__metadata__"]), HEADER_ENTRY, max_size=3),
    size=st.integers(0, 24),
    shorter=st.integers(-3, 3),
)
def test_accepted_headers_are_accepted_by_safetensors(
    tmp_path: Path, header: dict[str, Any], size: int, shorter: int
) -> None:
    text = json.dumps(header).encode()
    content = struct.pack("<Q", max(0, len(text) - shorter)) + text + bytes(size)
    file = tmp_path / "file.safetensors"
    file.write_bytes(content)
    try:
        tensors = read_header(file)
    except HeaderError:
        return
    # Metadata is not read here.
    if "__metadata__" not in header:
        with safe_open(file, framework="pt") as hf:
            assert set(hf.keys()) == set(tensors)
            for name, tensor in tensors.items():
                assert tuple(hf.get_slice(name).get_shape()) == tensor.shape
                assert hf.get_slice(name).get_dtype() == tensor.dtype


@FUZZ
@given(data=st.data())
def test_a_file_with_changed_bytes(tmp_path: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([FIRST, SECOND, INDEX]))
    file = sharded(tmp_path) / name
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(content)
    assert_opened_or_refused(tmp_path)


@settings(FUZZ, max_examples=80)
@given(data=st.data())
def test_a_pickle_with_changed_bytes(tmp_path: Path, data: st.DataObject) -> None:
    zipped = data.draw(st.booleans())
    file = pickled(tmp_path, _use_new_zipfile_serialization=zipped) / "pytorch_model.bin"
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(content)
    assert_opened_or_refused(tmp_path, allow_pickle=True)


def test_the_name_of_a_model_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with user_error("owner/model-1B", "hf download owner/model-1B"):
        HuggingFaceDirectory("owner/model-1B")
    with user_error(tmp_path / "no") as caught:
        HuggingFaceDirectory(tmp_path / "no")
    assert "hf download" not in str(caught.value)
