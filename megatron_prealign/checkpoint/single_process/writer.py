"""Writes the tensors of a model in one process, without a process group.

`dist_checkpointing` loads the directory in any layout. torch's own writer takes the complete state from memory; here
tensors are appended one at a time, and the files are hashed on the way. `convert from-hf`, which writes through this
module, converts 8 billion parameters in bf16 (16.06 GB) in 40.4 s on two CPU cores, with 1,002 MiB of memory on top of
the libraries, the size of the largest tensor. `cp` of the same bytes took 27 to 50 s on that disk
(`docs/conversion.md`, Speed).
"""

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
        directory: Existing directory without a checkpoint.
        tensor_parallel: Number of tensor-parallel shards of the matrices, one file each per stage.
        pipeline_parallel: Number of pipeline stages that the layers are partitioned over.
    """

    def __init__(self, directory: Path, *, tensor_parallel: int = 1, pipeline_parallel: int = 1) -> None:
        self._directory = directory
        self._tensor, self._pipeline = tensor_parallel, pipeline_parallel
        self._files: dict[str, HashedFile] = {}
        self._tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        self._chunks: dict[str, list[Any]] = {}
        self._storage: dict[Any, Any] = {}

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            with suppress(OSError):
                file.close()

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
            key: Name of the tensor in Megatron-Core.
            tensor: CPU tensor.
            layer: Index in dimension 0 of the stack; None if the tensor is not part of one.
            num_layers: Number of layers of the stack.
            split: Dimension to shard over the tensor-parallel ranks; None writes the tensor once.

        Raises:
            ValueError: the dimension is not divisible, or a layer differs in shape or dtype from the others.
            OSError: a file cannot be written.
        """
        shape = tuple(tensor.shape) if layer is None else (num_layers or 0, *tensor.shape)
        if self._tensors.setdefault(key, (shape, tensor.dtype)) != (shape, tensor.dtype):
            raise ValueError(f"{key}: got {shape} {tensor.dtype}, expected {self._tensors[key]} as in its other layers")
        stage = self._stage(key, layer, num_layers)
        count = 1 if split is None else self._tensor
        if split is not None and tensor.shape[split] % count:
            raise ValueError(f"{key}: dimension {split} of {tuple(tensor.shape)} is not divisible by {count}")
        for rank in range(count):
            shard, start = tensor, [0] * tensor.dim()
            if split is not None:
                size = tensor.shape[split] // count
                start[split] = rank * size
                shard = tensor.narrow(split, start[split], size)
            if layer is not None:
                shard, start = shard[None], [layer, *start]
            self._write(stage * self._tensor + rank, key, shard.contiguous(), start)

    def _stage(self, key: str, layer: int | None, num_layers: int | None) -> int:
        if layer is None:
            return self._pipeline - 1 if key.startswith(_LAST_STAGE) else 0
        if not num_layers or num_layers % self._pipeline or not 0 <= layer < num_layers:
            raise ValueError(f"{key}: cannot place layer {layer} of {num_layers} on {self._pipeline} pipeline stages")
        return layer // (num_layers // self._pipeline)

    def _write(self, rank: int, key: str, shard: torch.Tensor, start: list[int]) -> None:
        name = f"__{rank}_0.distcp"
        if name not in self._files:
            self._files[name] = HashedFile(self._directory / name)
        file = self._files[name]
        offset = file.tell()
        # A view would be saved with its complete storage.
        owns_storage = shard.untyped_storage().nbytes() == shard.nbytes
        torch.save(shard if owns_storage else shard.clone(), cast(BinaryIO, file))
        offsets = torch.Size(start)
        self._chunks.setdefault(key, []).append(dcp.ChunkStorageMetadata(offsets, shard.shape))
        self._storage[dcp.MetadataIndex(key, offsets)] = _StorageInfo(name, offset, file.tell() - offset)

    def close(self) -> dict[str, FileRecord]:
        """Writes the metadata, syncs all files, and returns their records for the manifest.

        Raises:
            OSError: a file cannot be written.
        """
        records = {}
        for name, tensor_file in self._files.items():
            records[name] = tensor_file.sync()
            tensor_file.close()
        entries: dict[str, dcp.TensorStorageMetadata | dcp.BytesStorageMetadata] = {
            key: dcp.TensorStorageMetadata(dcp.TensorProperties(dtype=dtype), torch.Size(shape), self._chunks[key])
            for key, (shape, dtype) in self._tensors.items()
        }
        metadata = dcp.Metadata(entries, storage_data=self._storage)
        # Newer versions of torch record the version of the format.
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
