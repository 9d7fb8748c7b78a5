"""Tensors of a checkpoint read and written in one process: torch's own code agrees, and corruption is one line."""

import dataclasses
import os
import pickle
import tracemalloc
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.messages import user_error
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, load, save
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from megatron_prealign.checkpoint.manifest import record_file
from megatron_prealign.checkpoint.single_process.reader import ShardReader
from megatron_prealign.checkpoint.single_process.writer import ShardWriter
from megatron_prealign.checkpoint.torch_dist import BACKEND, BACKEND_FILE, COMMON_FILE, METADATA
from megatron_prealign.errors import UserError

LAYERS = 4
STACKED = "decoder.layers.mlp.linear_fc2.weight"


def make_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "embedding.word_embeddings.weight": torch.randn(12, 6, generator=generator),
        STACKED: torch.randn(LAYERS, 6, 8, generator=generator).bfloat16(),
        "decoder.layers.input_layernorm.weight": torch.randn(LAYERS, 6, generator=generator),
        "decoder.final_layernorm.weight": torch.randn(6, generator=generator),
        "output_layer.weight": torch.randn(12, 6, generator=generator),
    }


SPLITS = {"embedding.word_embeddings.weight": 0, STACKED: 1, "output_layer.weight": 0}


def write(directory: Path, tensors: dict[str, torch.Tensor], tensor: int = 1, pipeline: int = 1) -> None:
    with ShardWriter(directory, tensor_parallel=tensor, pipeline_parallel=pipeline) as writer:
        for key, value in tensors.items():
            if key.startswith("decoder.layers."):
                for layer in range(LAYERS):
                    writer.add(key, value[layer], layer=layer, num_layers=LAYERS, split=SPLITS.get(key))
            else:
                writer.add(key, value, split=SPLITS.get(key))
        records = writer.close()
    assert {name: record_file(directory / name) for name in os.listdir(directory)} == records


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 1), (2, 2), (1, 4)])
def test_written_tensors_are_read(tmp_path: Path, tensor: int, pipeline: int) -> None:
    tensors = make_tensors()
    write(tmp_path, tensors, tensor, pipeline)
    assert len(list(tmp_path.glob("*.distcp"))) == tensor * pipeline
    with ShardReader(tmp_path) as reader:
        assert {key: (info.shape, info.dtype) for key, info in reader.tensors.items()} == {
            key: (tuple(value.shape), value.dtype) for key, value in tensors.items()
        }
        for key, value in tensors.items():
            assert torch.equal(reader.read(key), value), key
        for layer in range(LAYERS):
            assert torch.equal(reader.read(STACKED, layer), tensors[STACKED][layer])
        with user_error(STACKED, "layer 4", kind=IndexError):
            reader.read(STACKED, LAYERS)


def test_torch_reads_the_output(tmp_path: Path) -> None:
    """In chunks of another size than the written ones."""
    tensors = make_tensors()
    write(tmp_path, tensors, 2, 2)
    state = {key: torch.zeros_like(value) for key, value in tensors.items()}
    load(state, storage_reader=FileSystemReader(tmp_path), no_dist=True)
    for key, value in tensors.items():
        assert torch.equal(state[key], value), key


def test_views_and_odd_tensors_of_torch_are_read(tmp_path: Path) -> None:
    base = torch.arange(24.0)
    state = {
        "scalar": torch.tensor(3, dtype=torch.int64),
        "empty": torch.zeros(0, 4),
        "part": base[6:18].view(3, 4),
        "transposed": base.view(4, 6).t(),
        "flags": torch.tensor([True, False]),
    }
    save(state, storage_writer=FileSystemWriter(tmp_path), no_dist=True)
    with ShardReader(tmp_path) as reader:
        for key, value in state.items():
            assert torch.equal(reader.read(key), value), key


def test_an_invalid_split_or_layer_is_a_value_error(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, tensor_parallel=4)
    with user_error("output_layer.weight", "dimension 0", "(6, 2)", "divisible by 4", kind=ValueError):
        writer.add("output_layer.weight", torch.zeros(6, 2), split=0)
    writer.add("decoder.layers.x", torch.zeros(2), layer=0, num_layers=2)
    with user_error("decoder.layers.x", "(2, 3)", "(2, 2)", kind=ValueError):
        writer.add("decoder.layers.x", torch.zeros(3), layer=1, num_layers=2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    write(directory, make_tensors())
    return directory


def copy_of(checkpoint: Path, directory: Path) -> Path:
    for file in checkpoint.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    return directory


def read_all(directory: Path) -> None:
    with ShardReader(directory) as reader:
        for key in reader.tensors:
            reader.read(key)


def test_a_missing_or_truncated_file_is_reported(checkpoint: Path, tmp_path: Path) -> None:
    directory = copy_of(checkpoint, tmp_path)
    shard = directory / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-3000])
    with user_error(f"{directory} is corrupt", f"__0_0.distcp has {shard.stat().st_size:,} bytes, expected"):
        read_all(directory)
    shard.unlink()
    with user_error(f"{directory} is corrupt", "__0_0.distcp", "No such file"):
        read_all(directory)
    (directory / METADATA).unlink()
    with user_error(directory, METADATA, "expected a checkpoint directory"):
        read_all(directory)


def changed_metadata(directory: Path, change: Callable[[Any], None]) -> None:
    metadata = FileSystemReader(directory).read_metadata()
    change(metadata)
    (directory / METADATA).write_bytes(pickle.dumps(metadata))


def test_missing_or_invalid_chunks_are_reported(checkpoint: Path, tmp_path: Path) -> None:
    directory = copy_of(checkpoint, tmp_path)
    changed_metadata(directory, lambda metadata: metadata.state_dict_metadata[STACKED].chunks.pop())
    with ShardReader(directory) as reader:
        assert reader.read(STACKED, 0).shape == (6, 8)
        with user_error(directory, STACKED, METADATA, "144 of 192 elements"):
            reader.read(STACKED)
    # No memory may be allocated for more elements than the file has bytes.
    key, huge = "output_layer.weight", torch.Size([2**40, 6])

    def grow(metadata: Any) -> None:
        entry = metadata.state_dict_metadata[key]
        entry.size = huge
        entry.chunks = [ChunkStorageMetadata(torch.Size([0, 0]), huge)]

    changed_metadata(directory, grow)
    with user_error(directory, METADATA, key, "more elements than bytes"):
        ShardReader(directory)

    def inflate(metadata: Any) -> None:
        for chunk in metadata.storage_data.values():
            chunk.length = 2**50

    changed_metadata(directory, inflate)
    size = f"{(directory / '__0_0.distcp').stat().st_size:,}"
    with ShardReader(directory) as reader, user_error(directory, key, "__0_0.distcp", size, "expected", "1,125,"):
        reader.read(key)


def test_a_duplicate_chunk_hides_no_missing_one(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, tensor_parallel=2) as writer:
        writer.add("halves", torch.arange(16.0).reshape(4, 4), split=0)
        writer.close()

    def repeat(metadata: Any) -> None:
        chunks = metadata.state_dict_metadata["halves"].chunks
        chunks[1] = chunks[0]

    changed_metadata(tmp_path, repeat)
    with ShardReader(tmp_path) as reader, user_error(tmp_path, "halves", METADATA, "twice"):
        reader.read("halves")


class ByName(pickle.Pickler):
    """Pickles members of enumerations like Python 3.11.2."""

    def reducer_override(self, value: Any) -> Any:
        return (getattr, (type(value), value.name)) if isinstance(value, Enum) else NotImplemented


class ByValue(pickle.Pickler):
    """Pickles members of enumerations like Python 3.11.7."""

    def reducer_override(self, value: Any) -> Any:
        return (type(value), (value.value,)) if isinstance(value, Enum) else NotImplemented


@pytest.mark.parametrize("pickler", [ByName, ByValue])
def test_enumerations_of_every_python_are_read(checkpoint: Path, tmp_path: Path, pickler: type[pickle.Pickler]) -> None:
    directory = copy_of(checkpoint, tmp_path)
    metadata = FileSystemReader(directory).read_metadata()
    with (directory / METADATA).open("wb") as file:
        pickler(file).dump(metadata)
    with ShardReader(directory) as reader:
        for key, value in make_tensors().items():
            assert torch.equal(reader.read(key), value), key


def test_getattr_returns_only_members_of_enumerations(tmp_path: Path) -> None:
    harmful = b"cbuiltins\ngetattr\n(ctorch\nSize\nVmro\ntR."
    (tmp_path / METADATA).write_bytes(harmful)
    with user_error(tmp_path, METADATA, "mro of <class 'torch.Size'>"):
        ShardReader(tmp_path)


class Harmful:
    def __init__(self, target: str) -> None:
        self._target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (self._target,)


def test_a_pickle_calls_no_function(tmp_path: Path) -> None:
    """A harmful `.metadata` is refused before it calls its function."""
    (tmp_path / METADATA).write_bytes(pickle.dumps(Harmful(str(tmp_path / "made"))))
    with user_error(tmp_path, METADATA, "posix.mkdir"):
        ShardReader(tmp_path)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("name", ["os\nsystem", "builtins\neval", "torch.distributed.checkpoint.planner\noperator"])
def test_other_names_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / METADATA).write_bytes(b"c" + name.encode() + b"\n.")
    with user_error(tmp_path, METADATA, f"unsupported global {name.replace(chr(10), '.')}"):
        ShardReader(tmp_path)


def test_a_wrong_index_takes_no_memory(tmp_path: Path) -> None:
    # A pickle of None with an index of 4 million, for which an array of all indexes would take 128 MiB.
    (tmp_path / METADATA).write_bytes(b"\x80\x04Nr" + (1 << 22).to_bytes(4, "little") + b".")
    tracemalloc.start()
    try:
        with user_error(tmp_path, METADATA, "NoneType"):
            ShardReader(tmp_path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 10 << 20


@pytest.mark.parametrize("name", ["\0_0_0.distcp", "../_0.distcp", "/_0_0.distcp"])
def test_file_names_out_of_the_directory_are_corrupt(checkpoint: Path, tmp_path: Path, name: str) -> None:
    directory = copy_of(checkpoint, tmp_path)
    content = (directory / METADATA).read_bytes()
    (directory / METADATA).write_bytes(content.replace(b"__0_0.distcp", name.encode()))
    with user_error(directory, METADATA, "out of bounds"):
        ShardReader(directory)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_corruption_is_a_user_error(checkpoint: Path, tmp_path: Path, data: st.DataObject) -> None:
    directory = copy_of(checkpoint, tmp_path)
    file = directory / data.draw(st.sampled_from([METADATA, "__0_0.distcp"]))
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    try:
        read_all(directory)
    except UserError as error:
        assert "\n" not in str(error)


def test_the_backend_file_is_that_of_megatron_core() -> None:
    from megatron.core.dist_checkpointing.core import CONFIG_FNAME, CheckpointingConfig
    from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME

    assert dataclasses.asdict(CheckpointingConfig("torch_dist", 1)) == BACKEND
    assert (CONFIG_FNAME, COMMON_STATE_FNAME) == (BACKEND_FILE, COMMON_FILE)
