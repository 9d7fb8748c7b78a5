"""The tensors of a model, written by one process into a directory that `dist_checkpointing` loads in any layout."""

import io
import json
import pickle
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo

from megatron_prealign.checkpoint.manifest import FileRecord, HashedFile
from megatron_prealign.checkpoint.torch_dist import BACKEND, BACKEND_FILE, COMMON_FILE, METADATA
from megatron_prealign.files.sync import sync_directory

_FORMAT_VERSION = "1.0.0"
_LAST_STAGE = ("decoder.final_layernorm.", "output_layer.")


class ShardWriter:
    """Writes the tensors of a model into a directory that `dist_checkpointing` loads in any layout.

    Args:
        directory: An existing directory without a checkpoint.
        tensor_parallel: Files for each stage, over which the matrices are shared out.
        pipeline_parallel: Stages over which the layers are shared out.
    """

    def __init__(self, directory: Path, *, tensor_parallel: int = 1, pipeline_parallel: int = 1) -> None:
        self._directory = directory
        self._tensor, self._pipeline = tensor_parallel, pipeline_parallel
        self._shards: dict[str, HashedFile] = {}
        self._facts: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        self._chunks: dict[str, list[Any]] = {}
        self._places: dict[Any, Any] = {}

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_: object) -> None:
        for shard in self._shards.values():
            with suppress(OSError):
                shard.close()

    def add(
        self,
        key: str,
        tensor: torch.Tensor,
        *,
        layer: int | None = None,
        num_layers: int | None = None,
        split: int | None = None,
    ) -> None:
        """Writes a tensor, or one layer of a stacked one.

        Args:
            key: Its name in Megatron-Core.
            tensor: On the CPU.
            layer: Its index in dimension 0 of the stack; None if it is no part of one.
            num_layers: Layers of the stack.
            split: The tensor's dimension that tensor-parallel ranks share; None writes it once.

        Raises:
            ValueError: the dimension does not divide, or a layer differs in shape or type from the others.
            OSError: the disk does not take it.
        """
        shape = tuple(tensor.shape) if layer is None else (num_layers or 0, *tensor.shape)
        if self._facts.setdefault(key, (shape, tensor.dtype)) != (shape, tensor.dtype):
            raise ValueError(f"{key} is {shape} {tensor.dtype}, its other layers are {self._facts[key]}")
        stage = self._stage(key, layer, num_layers)
        count = 1 if split is None else self._tensor
        if split is not None and tensor.shape[split] % count:
            raise ValueError(f"{key} is {tuple(tensor.shape)}, dimension {split} cannot be shared by {count}")
        for rank in range(count):
            part, start = tensor, [0] * tensor.dim()
            if split is not None:
                size = tensor.shape[split] // count
                start[split] = rank * size
                part = tensor.narrow(split, start[split], size)
            if layer is not None:
                part, place = part[None], [layer, *start]
            else:
                place = start
            self._write(stage * self._tensor + rank, key, part.contiguous(), place)

    def _stage(self, key: str, layer: int | None, num_layers: int | None) -> int:
        if layer is None:
            return self._pipeline - 1 if key.startswith(_LAST_STAGE) else 0
        if not num_layers or num_layers % self._pipeline or not 0 <= layer < num_layers:
            raise ValueError(f"{key}: layer {layer} of {num_layers} cannot lie on one of {self._pipeline} stages")
        return layer // (num_layers // self._pipeline)

    def _write(self, rank: int, key: str, part: torch.Tensor, start: list[int]) -> None:
        name = f"__{rank}_0.distcp"
        if name not in self._shards:
            self._shards[name] = HashedFile(self._directory / name)
        shard = self._shards[name]
        offset = shard.tell()
        # A view would take its whole storage along.
        whole = part.untyped_storage().nbytes() == part.nbytes
        torch.save(part if whole else part.clone(), cast(BinaryIO, shard))
        place = torch.Size(start)
        self._chunks.setdefault(key, []).append(dcp.ChunkStorageMetadata(place, part.shape))
        self._places[dcp.MetadataIndex(key, place)] = _StorageInfo(name, offset, shard.tell() - offset)

    def close(self) -> dict[str, FileRecord]:
        """Writes what describes the tensors, syncs all, and returns the records of the files for the manifest.

        Raises:
            OSError: the disk does not take it.
        """
        records = {}
        for name, shard in self._shards.items():
            records[name] = shard.sync()
            shard.close()
        entries: dict[str, dcp.TensorStorageMetadata | dcp.BytesStorageMetadata] = {
            key: dcp.TensorStorageMetadata(dcp.TensorProperties(dtype=dtype), torch.Size(shape), self._chunks[key])
            for key, (shape, dtype) in self._facts.items()
        }
        metadata = dcp.Metadata(entries, storage_data=self._places)
        # Newer versions of torch write the version of the format down.
        if hasattr(metadata, "version"):
            metadata.version = _FORMAT_VERSION
        common = io.BytesIO()
        torch.save({}, common)
        contents = {
            METADATA: pickle.dumps(metadata),
            COMMON_FILE: common.getvalue(),
            BACKEND_FILE: json.dumps(BACKEND).encode(),
        }
        for name, content in contents.items():
            with HashedFile(self._directory / name) as file:
                file.write(content)
                records[name] = file.sync()
        sync_directory(self._directory)
        return records
