"""A Hugging Face model directory, read as what it is: somebody else's files. Nothing in it runs, no name in it leads
out of it, and nothing is allocated by what it says about itself before that fits the files."""

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
    read_header,
    shown,
)
from megatron_prealign.errors import UserError, shortened

_SAFETENSORS, _PICKLE = "model.safetensors", "pytorch_model.bin"
_INDEX = ".index.json"
# What transformers calls the files of a sharded model: one of them that no index names was forgotten by somebody.
_SHARDS = {_SAFETENSORS: "model*.safetensors", _PICKLE: "pytorch_model*.bin"}
_MOST_JSON_BYTES = 100_000_000
_CALLED = re.compile(r"GLOBAL (\S+)")
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# A mapped file stays in memory as far as it was read; so much of a pickle is read before it is mapped anew.
_MAPPED_BYTES = 1 << 30


class HuggingFaceDirectory:
    """config.json and the tensors of a directory as `save_pretrained` writes it."""

    config: dict[str, Any]
    """config.json."""
    tensors: Mapping[str, StoredTensor]
    """Name -> what the files say about each tensor."""

    def __init__(self, path: str | Path, *, allow_pickle: bool = False) -> None:
        """Reads config.json, the index and the headers of all files.

        Args:
            path: the directory.
            allow_pickle: read pytorch_model*.bin where there are no safetensors, with torch's `weights_only`.

        Raises:
            UserError: no directory, no or two models in it, damaged files, an index that does not fit the files, files
                outside the directory.
        """
        self.path = Path(path)
        self._pickles: dict[Path, dict[str, torch.Tensor]] = {}
        self._mapped_bytes = 0
        self._names = self._list()
        self.config = self._read_object("config.json")
        first = self._first_file(allow_pickle)
        self._is_pickle = first == _PICKLE
        index = self._read_index(first) if f"{first}{_INDEX}" in self._names else None
        files = [first] if index is None else sorted(set(index.values()))
        self._check_files(first, files, index is not None)
        places = {file: self._header(file) for file in files}
        self.tensors = self._joined(places, index)

    def check(self, expected: Mapping[str, tuple[int, ...]], may_have: Callable[[str], bool] = lambda _: False) -> None:
        """Checks that the directory has these tensors and no others.

        Args:
            expected: name -> shape.
            may_have: whether a tensor of this name may be there too, and is not read.

        Raises:
            UserError: tensors are missing, unknown, of another shape or no floating-point numbers; up to 20 are named.
        """
        problems = [f"{shown(name)} is missing" for name in expected if name not in self.tensors]
        for name, tensor in self.tensors.items():
            if name not in expected:
                if not may_have(name):
                    problems.append(f"{shown(name)} is not known")
            elif tensor.shape != tuple(expected[name]):
                problems.append(f"{shown(name)} has shape {list(tensor.shape)}, expected {list(expected[name])}")
            elif tensor.dtype not in _DTYPES:
                problems.append(f"{shown(name)} has dtype {tensor.dtype}, expected one of {', '.join(_DTYPES)}")
        if problems:
            raise UserError(
                f"{self.path}: the tensors are not those of its config.json: {shortened(problems, separator='; ')}; "
                "download or save the model again"
            )

    def read(self, name: str) -> torch.Tensor:
        """A tensor in memory of its own, with the dtype it has in the file. One allocation.

        Raises:
            UserError: the file cannot be read, or became shorter.
        """
        stored = self.tensors[name]
        if self._is_pickle:
            return self._read_pickled(name, stored)
        tensor = torch.empty(stored.shape, dtype=_DTYPES[stored.dtype])
        if stored.bytes == 0:
            return tensor
        # Reading instead of mapping: what was read does not stay in memory, and a disk that fails is an error instead
        # of the end of the process.
        room: Any = memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)
        try:
            with stored.file.open("rb", buffering=0) as stream:
                stream.seek(stored.offset)
                while len(room):
                    count = stream.readinto(room)
                    if not count:
                        raise UserError(f"{stored.file}: became shorter while it was read; who else writes to it?")
                    room = room[count:]
        except OSError as error:
            raise UserError(f"{stored.file}: cannot be read ({error.strerror}); copy it again") from error
        return tensor

    def _list(self) -> set[str]:
        try:
            return set(os.listdir(self.path))
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be read ({error.strerror}); expected a directory with config.json and "
                f"{_SAFETENSORS}, as save_pretrained writes it"
            ) from error

    def _first_file(self, allow_pickle: bool) -> str:
        """The file that there is of an unsharded model, or would be."""
        found = {name: bool(self._names & {name, f"{name}{_INDEX}"}) for name in (_SAFETENSORS, _PICKLE)}
        if found[_SAFETENSORS]:
            return _SAFETENSORS
        if not found[_PICKLE]:
            raise UserError(
                f"{self.path}: no weights; expected {_SAFETENSORS} or {_SAFETENSORS}{_INDEX} (or, with --allow-pickle, "
                f"{_PICKLE})"
            )
        if not allow_pickle:
            raise UserError(
                f"{self.path}: its weights are a pickle ({_PICKLE}), expected {_SAFETENSORS}; save the model again "
                "with transformers (convert from-hf also reads it with --allow-pickle, by torch's weights_only, which "
                "runs no code)"
            )
        return _PICKLE

    def _read_object(self, name: str) -> dict[str, Any]:
        """A file with a JSON object."""
        if name not in self._names:
            raise UserError(f"{self.path}: {name} is missing; expected a directory as save_pretrained writes it")
        file = self.path_of(name)
        try:
            size = file.stat().st_size
            if size > _MOST_JSON_BYTES:
                raise HeaderError(f"it has {size:,} bytes")
            content = parse_json(file.read_bytes(), unique=True)
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror}); copy it again") from error
        except HeaderError as error:
            raise UserError(f"{file}: damaged ({error}); copy it again") from error
        if not isinstance(content, dict):
            raise UserError(f"{file}: holds a {type(content).__name__}, expected a JSON object; copy it again")
        return content

    def _read_index(self, first: str) -> dict[str, str]:
        """Name of a tensor -> name of its file."""
        name = f"{first}{_INDEX}"
        places = self._read_object(name).get("weight_map")
        if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
            raise UserError(f"{self.path / name}: has no weight_map of tensors and files; copy it again")
        # A name that is in the list of the directory's names leads nowhere else.
        missing = sorted(set(places.values()) - self._names)
        leaving = [file for file in missing if os.path.isabs(file) or ".." in file.split("/")]
        if leaving:
            raise UserError(
                f"{self.path / name}: names files outside its directory ({shortened(map(shown, leaving))}); get the "
                "model "
                "from somebody else"
            )
        if missing:
            raise UserError(
                f"{self.path}: files that {name} names are not there: {shortened(map(shown, missing))}; copy them too"
            )
        return places

    def _check_files(self, first: str, files: Collection[str], has_index: bool) -> None:
        unnamed = sorted(name for name in self._names if fnmatch(name, _SHARDS[first]) and name not in files)
        if unnamed:
            what = f"{first}{_INDEX} does not name" if has_index else f"stand beside {first} without an index"
            raise UserError(
                f"{self.path}: files that {what}: {shortened(map(shown, unnamed))}; copy the directory again, or move "
                "away what is no part of the model"
            )

    def path_of(self, name: str) -> Path:
        """The path of a file of the directory, which does not lead out of it.

        Raises:
            UserError: it does, by a symbolic link, or is no file.
        """
        file = self.path / name
        try:
            real, directory = file.resolve(strict=True), self.path.resolve()
        except (OSError, RuntimeError) as error:
            raise UserError(f"{file}: cannot be read ({error}); copy it again") from error
        roots = [directory]
        if directory.parent.name == "snapshots":
            # A directory of the hub's cache: its files are links to its neighbour.
            roots.append(directory.parent.parent / "blobs")
        if not any(root in real.parents for root in roots):
            raise UserError(
                f"{file}: leads out of its directory, to {real}; copy what it leads to here, if it is part of the model"
            )
        if not real.is_file():
            raise UserError(f"{file}: is no file; copy the directory again")
        return file

    def _header(self, name: str) -> dict[str, StoredTensor]:
        file = self.path_of(name)
        if self._is_pickle:
            return self._pickled_header(file)
        try:
            return read_header(file)
        except HeaderError as error:
            raise UserError(f"{file}: damaged ({error}); copy it again") from error
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror}); copy it again") from error

    def _joined(
        self, places: Mapping[str, Mapping[str, StoredTensor]], index: Mapping[str, str] | None
    ) -> dict[str, StoredTensor]:
        """The tensors of all files, each where the index has it."""
        tensors: dict[str, StoredTensor] = {}
        problems = []
        for file, header in places.items():
            for name, tensor in header.items():
                if name in tensors:
                    problems.append(f"{shown(name)} is in {shown(tensors[name].file.name)} and in {shown(file)}")
                elif index is not None and name not in index:
                    problems.append(f"{shown(name)} of {shown(file)} is not in the index")
                tensors.setdefault(name, tensor)
        for name, file in (index or {}).items():
            if name not in places[file]:
                problems.append(f"{shown(name)} is not in {shown(file)}, where the index has it")
        if problems:
            raise UserError(
                f"{self.path}: index and files differ: {shortened(problems, separator='; ')}; copy the directory again"
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
                # About the pickle's age, which its reader cannot mend.
                warnings.simplefilter("ignore")
                content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        except Exception as error:  # torch raises many kinds for what it does not read.
            # What weights_only refuses torch tells with advice to read it without.
            found = _CALLED.search(str(error))
            reason = f"it calls {shown(found[1])}" if found else type(error).__name__
            raise UserError(
                f"{file}: torch does not read it with weights_only ({reason}); it is damaged or holds more than "
                "tensors, save the model again as safetensors"
            ) from error
        if not isinstance(content, dict) or not all(
            isinstance(name, str) and _is_plain(value) for name, value in content.items()
        ):
            raise UserError(f"{file}: holds no table of tensors; expected a model's state_dict")
        self._pickles[file] = content
        return content


def _is_plain(value: Any) -> bool:
    """Whether it is a tensor that lies in memory number by number, as weights do: one of a few numbers could otherwise
    say that it has any size."""
    return (
        isinstance(value, torch.Tensor)
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
        and value.untyped_storage().nbytes() >= value.nbytes
    )
