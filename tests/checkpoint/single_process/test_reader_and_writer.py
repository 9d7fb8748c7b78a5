"""Tensors of a checkpoint read and written by one process: torch's own reader and writer agree, damage is one line."""

import dataclasses
import os
import pickle
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
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
def test_what_was_written_is_read(tmp_path: Path, tensor: int, pipeline: int) -> None:
    tensors = make_tensors()
    write(tmp_path, tensors, tensor, pipeline)
    assert len(list(tmp_path.glob("*.distcp"))) == tensor * pipeline
    with ShardReader(tmp_path) as reader:
        assert {key: (facts.shape, facts.dtype) for key, facts in reader.tensors.items()} == {
            key: (tuple(value.shape), value.dtype) for key, value in tensors.items()
        }
        for key, value in tensors.items():
            assert torch.equal(reader.read(key), value), key
        for layer in range(LAYERS):
            assert torch.equal(reader.read(STACKED, layer), tensors[STACKED][layer])
        with pytest.raises(IndexError, match="no layer 4"):
            reader.read(STACKED, LAYERS)


def test_torch_reads_it_too(tmp_path: Path) -> None:
    """In parts of another size than those written."""
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
        "turned": base.view(4, 6).t(),
        "flags": torch.tensor([True, False]),
    }
    save(state, storage_writer=FileSystemWriter(tmp_path), no_dist=True)
    with ShardReader(tmp_path) as reader:
        for key, value in state.items():
            assert torch.equal(reader.read(key), value), key


def test_an_unfit_split_or_layer_is_an_error_of_the_caller(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, tensor_parallel=4)
    with pytest.raises(ValueError, match="cannot be shared by 4"):
        writer.add("output_layer.weight", torch.zeros(6, 2), split=0)
    writer.add("decoder.layers.x", torch.zeros(2), layer=0, num_layers=2)
    with pytest.raises(ValueError, match="its other layers"):
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


def test_a_missing_or_short_file_is_named(checkpoint: Path, tmp_path: Path) -> None:
    directory = copy_of(checkpoint, tmp_path)
    shard = directory / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-3000])
    with pytest.raises(UserError, match=r"__0_0\.distcp.*copy this one again"):
        read_all(directory)
    shard.unlink()
    with pytest.raises(UserError, match=r"__0_0\.distcp cannot be opened \(No such file"):
        read_all(directory)
    (directory / METADATA).unlink()
    with pytest.raises(UserError, match="expected the directory of a checkpoint"):
        read_all(directory)


def changed_metadata(directory: Path, change: Callable[[Any], None]) -> None:
    metadata = FileSystemReader(directory).read_metadata()
    change(metadata)
    (directory / METADATA).write_bytes(pickle.dumps(metadata))


def test_parts_that_are_missing_or_made_up_are_named(checkpoint: Path, tmp_path: Path) -> None:
    directory = copy_of(checkpoint, tmp_path)
    changed_metadata(directory, lambda metadata: metadata.state_dict_metadata[STACKED].chunks.pop())
    with ShardReader(directory) as reader:
        assert reader.read(STACKED, 0).shape == (6, 8)
        with pytest.raises(UserError, match=r"places 144 of its 192 elements"):
            reader.read(STACKED)
    # More elements than the file has bytes must not be asked for as memory.
    key, huge = "output_layer.weight", torch.Size([2**40, 6])

    def grow(metadata: Any) -> None:
        entry = metadata.state_dict_metadata[key]
        entry.size = huge
        entry.chunks = [ChunkStorageMetadata(torch.Size([0, 0]), huge)]

    changed_metadata(directory, grow)
    with pytest.raises(UserError, match="more elements than bytes"):
        ShardReader(directory)

    def lie(metadata: Any) -> None:
        for place in metadata.storage_data.values():
            place.length = 2**50

    changed_metadata(directory, lie)
    with ShardReader(directory) as reader, pytest.raises(UserError, match=r"the file ends at byte .*, expected 1,125,"):
        reader.read(key)


def test_a_part_that_is_there_twice_hides_no_other(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, tensor_parallel=2) as writer:
        writer.add("halves", torch.arange(16.0).reshape(4, 4), split=0)
        writer.close()

    def repeat(metadata: Any) -> None:
        chunks = metadata.state_dict_metadata["halves"].chunks
        chunks[1] = chunks[0]

    changed_metadata(tmp_path, repeat)
    with ShardReader(tmp_path) as reader, pytest.raises(UserError, match="places some of its elements twice"):
        reader.read("halves")


class ByName(pickle.Pickler):
    """Members of enumerations as Python 3.11.2 pickles them."""

    def reducer_override(self, value: Any) -> Any:
        return (getattr, (type(value), value.name)) if isinstance(value, Enum) else NotImplemented


class ByValue(pickle.Pickler):
    """And as 3.11.7 does."""

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


def test_getattr_gives_members_of_enumerations_alone(tmp_path: Path) -> None:
    harmful = b"cbuiltins\ngetattr\n(ctorch\nSize\nVmro\ntR."
    (tmp_path / METADATA).write_bytes(harmful)
    with pytest.raises(UserError, match="it asks for mro of <class 'torch.Size'>, which no checkpoint does"):
        ShardReader(tmp_path)


class Harmful:
    def __init__(self, target: str) -> None:
        self._target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (self._target,)


def test_a_pickle_calls_nothing(tmp_path: Path) -> None:
    """A harmful `.metadata` names a function; it is refused before the call."""
    (tmp_path / METADATA).write_bytes(pickle.dumps(Harmful(str(tmp_path / "made"))))
    with pytest.raises(UserError, match="which no checkpoint holds"):
        ShardReader(tmp_path)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("name", ["os\nsystem", "builtins\neval", "torch.distributed.checkpoint.planner\noperator"])
def test_other_names_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / METADATA).write_bytes(b"c" + name.encode() + b"\n.")
    with pytest.raises(UserError, match="which no checkpoint holds"):
        ShardReader(tmp_path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_is_one_kind_of_error(checkpoint: Path, tmp_path: Path, data: st.DataObject) -> None:
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
