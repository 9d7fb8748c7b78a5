"""Reads a Hugging Face model directory as untrusted input: no code in it runs, no name points outside it, and sizes it
declares are checked against the files before anything is allocated."""

import os
import re
import warnings
import zipfile
from collections.abc import Callable, Collection, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from megatron_prealign.conversion.safetensors_header import (
    HeaderError,
    StoredTensor,
    parse_json,
    quoted,
    read_header,
)
from megatron_prealign.errors import UserError, shortened

_SAFETENSORS, _PICKLE = "model.safetensors", "pytorch_model.bin"
_INDEX = ".index.json"
# How transformers names the files of a sharded model. One that the index does not list points to a
# faulty copy.
_SHARDS = {_SAFETENSORS: "model*.safetensors", _PICKLE: "pytorch_model*.bin"}
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_MAX_JSON_BYTES = 100_000_000
_PICKLE_GLOBAL = re.compile(r"GLOBAL (\S+)")
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# The pages of a mapped file stay in memory once read; after this many bytes a pickle is mapped again.
_MAPPED_BYTES = 1 << 30


class HuggingFaceDirectory:
    """config.json and the tensors of a directory written by `save_pretrained`."""

    config: dict[str, Any]
    """Content of config.json."""
    tensors: Mapping[str, StoredTensor]
    """Name -> metadata of each tensor, from the files' headers."""

    def __init__(self, path: str | Path, *, allow_pickle: bool = False) -> None:
        """Reads config.json, the index and the headers of all files.

        Args:
            path: The directory.
            allow_pickle: Read pytorch_model*.bin, with torch's `weights_only`, if there are no safetensors.

        Raises:
            UserError: not a directory, no or two models in it, corrupt files, an index that does not match the files,
                or files outside the directory.
        """
        self.path = Path(path)
        self._pickles: dict[Path, dict[str, torch.Tensor]] = {}
        self._mapped_bytes = 0
        self._names = self._list()
        self.config = self._read_object("config.json")
        main_file = self._main_file(allow_pickle)
        self._is_pickle = main_file == _PICKLE
        index = self._read_index(main_file) if f"{main_file}{_INDEX}" in self._names else None
        files = [main_file] if index is None else sorted(set(index.values()))
        self._check_files(main_file, files, index is not None)
        headers = {file: self._header(file) for file in files}
        self.tensors = self._merge(headers, index)

    def check(self, expected: Mapping[str, tuple[int, ...]], optional: Callable[[str], bool] = lambda _: False) -> None:
        """Checks that the directory has these tensors and no others.

        Args:
            expected: Name -> shape.
            optional: Whether a tensor of this name may also exist; it is not read.

        Raises:
            UserError: tensors are missing, unexpected, of another shape or not of a floating-point dtype; up to 20 are
                listed.
        """
        problems = [f"{quoted(name)} is missing" for name in expected if name not in self.tensors]
        for name, tensor in self.tensors.items():
            if name not in expected:
                if not optional(name):
                    problems.append(f"{quoted(name)} is unexpected")
            elif tensor.shape != tuple(expected[name]):
                problems.append(f"{quoted(name)} has shape {list(tensor.shape)}, expected {list(expected[name])}")
            elif tensor.dtype not in _DTYPES:
                problems.append(f"{quoted(name)} has dtype {tensor.dtype}, expected one of {', '.join(_DTYPES)}")
        if problems:
            raise UserError(
                f"{self.path}: tensors do not match config.json: {shortened(problems, separator='; ')}; "
                "download or save the model again"
            )

    def read(self, name: str) -> torch.Tensor:
        """Reads a tensor into new memory, with the dtype it has in the file. One allocation.

        Raises:
            UserError: the file cannot be read, or was truncated.
        """
        stored = self.tensors[name]
        if self._is_pickle:
            return self._read_pickled(name, stored)
        tensor = torch.empty(stored.shape, dtype=_DTYPES[stored.dtype])
        if stored.bytes == 0:
            return tensor
        # Read instead of mapped: pages do not stay in memory, and a failing disk raises an error instead of killing the
        # process.
        buffer: Any = memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)
        try:
            with stored.file.open("rb", buffering=0) as stream:
                stream.seek(stored.offset)
                while len(buffer):
                    count = stream.readinto(buffer)
                    if not count:
                        raise UserError(
                            f"{stored.file}: truncated while it was read; check that no other process writes to it"
                        )
                    buffer = buffer[count:]
        except OSError as error:
            raise UserError(f"cannot read {stored.file}: {error.strerror}; copy it again") from error
        return tensor

    def _list(self) -> set[str]:
        try:
            return set(os.listdir(self.path))
        except OSError as error:
            hint = ""
            if isinstance(error, FileNotFoundError) and _HUB_NAME.fullmatch(str(self.path)):
                hint = f" (a model of the Hub is downloaded with `hf download {self.path} --local-dir DIRECTORY`)"
            raise UserError(
                f"cannot read {self.path}: {error.strerror}; expected a directory with config.json and {_SAFETENSORS}, "
                f"as written by save_pretrained{hint}"
            ) from error

    def _main_file(self, allow_pickle: bool) -> str:
        """Name of the model's file if it is not sharded; the names of the index and of the shards derive from it."""
        exists = {name: bool(self._names & {name, f"{name}{_INDEX}"}) for name in (_SAFETENSORS, _PICKLE)}
        if exists[_SAFETENSORS]:
            return _SAFETENSORS
        if not exists[_PICKLE]:
            raise UserError(
                f"{self.path}: no weights found; expected {_SAFETENSORS} or {_SAFETENSORS}{_INDEX} (or {_PICKLE} with "
                "--allow-pickle)"
            )
        if not allow_pickle:
            raise UserError(
                f"{self.path}: weights are a pickle ({_PICKLE}), expected {_SAFETENSORS}; save the model again with "
                "transformers, or use --allow-pickle (reads it with torch's weights_only, which runs no code)"
            )
        return _PICKLE

    def _read_object(self, name: str) -> dict[str, Any]:
        """Content of a file with a JSON object."""
        if name not in self._names:
            raise UserError(f"{self.path}: {name} is missing; expected a directory written by save_pretrained")
        file = self.path_of(name)
        try:
            size = file.stat().st_size
            if size > _MAX_JSON_BYTES:
                raise HeaderError(f"got {size:,} bytes, expected at most {_MAX_JSON_BYTES:,}")
            content = parse_json(file.read_bytes(), unique=True)
        except OSError as error:
            raise UserError(f"cannot read {file}: {error.strerror}; copy it again") from error
        except HeaderError as error:
            raise UserError(f"{file} is corrupt: {error}; copy it again") from error
        if not isinstance(content, dict):
            raise UserError(f"{file}: got a {type(content).__name__}, expected a JSON object; copy it again")
        return content

    def _read_index(self, main_file: str) -> dict[str, str]:
        """Name of a tensor -> name of its file."""
        name = f"{main_file}{_INDEX}"
        index = self._read_object(name).get("weight_map")
        if not isinstance(index, dict) or not index or not all(isinstance(file, str) for file in index.values()):
            raise UserError(
                f"{self.path / name}: weight_map is missing, empty or does not map tensor names to file names; copy it "
                "again"
            )
        # A name in the directory listing cannot point outside the directory.
        missing = sorted(set(index.values()) - self._names)
        outside = [file for file in missing if os.path.isabs(file) or ".." in file.split("/")]
        if outside:
            raise UserError(
                f"{self.path / name}: lists files outside the directory: {shortened(map(quoted, outside))}; get the "
                "model from another source"
            )
        if missing:
            raise UserError(
                f"{self.path}: files listed in {name} are missing: {shortened(map(quoted, missing))}; copy them too"
            )
        return index

    def _check_files(self, main_file: str, files: Collection[str], has_index: bool) -> None:
        extra = sorted(name for name in self._names if fnmatch(name, _SHARDS[main_file]) and name not in files)
        if extra:
            what = f"not listed in {main_file}{_INDEX}" if has_index else f"next to {main_file} without an index"
            raise UserError(
                f"{self.path}: files {what}: {shortened(map(quoted, extra))}; copy the directory again, or move away "
                "files that are not part of the model"
            )

    def path_of(self, name: str) -> Path:
        """Path of a file in the directory.

        Raises:
            UserError: it is a symbolic link that points outside the directory, or not a regular file.
        """
        file = self.path / name
        try:
            real, directory = file.resolve(strict=True), self.path.resolve()
        except (OSError, RuntimeError) as error:
            raise UserError(f"cannot read {file}: {error}; copy it again") from error
        roots = [directory]
        if directory.parent.name == "snapshots":
            # A snapshot in the hub's cache: its files are links into the cache's blobs.
            roots.append(directory.parent.parent / "blobs")
        if not any(root in real.parents for root in roots):
            raise UserError(
                f"{file}: link points outside its directory, to {real}; replace it with a copy if it is part of the "
                "model"
            )
        if not real.is_file():
            raise UserError(f"{file} is not a regular file; copy the directory again")
        return file

    def _header(self, name: str) -> dict[str, StoredTensor]:
        file = self.path_of(name)
        if self._is_pickle:
            return self._pickled_header(file)
        try:
            return read_header(file)
        except HeaderError as error:
            raise UserError(f"{file} is corrupt: {error}; copy it again") from error
        except OSError as error:
            raise UserError(f"cannot read {file}: {error.strerror}; copy it again") from error

    def _merge(
        self, headers: Mapping[str, Mapping[str, StoredTensor]], index: Mapping[str, str] | None
    ) -> dict[str, StoredTensor]:
        """Merges the headers of all files and checks them against the index."""
        tensors: dict[str, StoredTensor] = {}
        problems = []
        for file, header in headers.items():
            for name, tensor in header.items():
                if name in tensors:
                    problems.append(f"{quoted(name)} is in both {quoted(tensors[name].file.name)} and {quoted(file)}")
                elif index is not None and name not in index:
                    problems.append(f"{quoted(name)} in {quoted(file)} is not in the index")
                tensors.setdefault(name, tensor)
        for name, file in (index or {}).items():
            if name not in headers[file]:
                problems.append(f"{quoted(name)} is in the index but not in {quoted(file)}")
        if problems:
            raise UserError(
                f"{self.path}: index and files do not match: {shortened(problems, separator='; ')}; copy the directory "
                "again"
            )
        return tensors

    def _pickled_header(self, file: Path) -> dict[str, StoredTensor]:
        names = {dtype: name for name, dtype in _DTYPES.items()}
        return {
            name: StoredTensor(file, names.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape), -1, tensor.nbytes)
            for name, tensor in self._load_pickle(file).items()
        }

    def _read_pickled(self, name: str, stored: StoredTensor) -> torch.Tensor:
        if self._mapped_bytes > _MAPPED_BYTES:
            self._pickles.clear()
            self._mapped_bytes = 0
        self._mapped_bytes += stored.bytes
        return self._load_pickle(stored.file)[name].clone(memory_format=torch.contiguous_format)

    def _load_pickle(self, file: Path) -> dict[str, torch.Tensor]:
        if file in self._pickles:
            return self._pickles[file]
        try:
            with warnings.catch_warnings():
                # Warnings about old pickle formats, which the reader cannot fix.
                warnings.simplefilter("ignore")
                content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        except Exception as error:  # torch raises many types for files it cannot load.
            # torch's own message for what weights_only refuses suggests loading without it.
            refused = _PICKLE_GLOBAL.search(str(error))
            reason = f"it calls {quoted(refused[1])}" if refused else type(error).__name__
            raise UserError(
                f"cannot load {file} with weights_only: {reason}; it is corrupt or contains more than tensors, save "
                "the model again as safetensors"
            ) from error
        if not isinstance(content, dict) or not all(
            isinstance(name, str) and _is_dense(value) for name, value in content.items()
        ):
            raise UserError(f"{file}: not a mapping of names to dense tensors; expected a model's state_dict")
        self._pickles[file] = content
        return content


def _is_dense(value: Any) -> bool:
    """Whether it is a dense CPU tensor whose storage has all its elements. A view of a few elements could otherwise
    declare any size."""
    return (
        isinstance(value, torch.Tensor)
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
        and value.untyped_storage().nbytes() >= value.nbytes
    )
