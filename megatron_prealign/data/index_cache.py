"""On-disk cache of named arrays: an atomically written directory, built once per file system."""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from megatron_prealign.errors import UserError
from megatron_prealign.files.lock import file_lock
from megatron_prealign.files.sync import sync_directory

_FORMAT_VERSION = 1
_MANIFEST = "index.json"
_POLL_SECONDS = 0.2


class IncompleteCacheError(Exception):
    """A cache directory is missing or does not match its manifest; the message is the reason."""


def build_if_needed(directory: Path, build: Callable[[], Iterable[tuple[str, np.ndarray]]]) -> bool:
    """Writes the cache directory `directory` if it is missing or corrupt.

    Call on one process per node. On a shared disk a file lock serialises the builders of several nodes: the first one
    builds, the others reuse its result. On node-local disks each node builds its own.

    Args:
        directory: The cache directory. Its name must identify the content, since a complete directory is never
            rewritten.
        build: Yields (name, non-empty array); called only when needed.

    Returns:
        Whether this call built the cache.

    Raises:
        UserError: The directory cannot be written.
    """
    try:
        return _build_if_needed(directory, build)
    except OSError as error:
        raise UserError(
            f"cannot write sample index cache {directory}: {error}; set data.cache to a writable directory with enough "
            "space"
        ) from error


def wait_for_arrays(directory: Path, timeout_seconds: float = 60.0) -> dict[str, np.ndarray]:
    """Memory-maps the arrays of the cache directory `directory` read-only, by name. Call it after the builder is done.

    Args:
        directory: The cache directory.
        timeout_seconds: How long to wait for the directory to appear; network file systems may serve a stale directory
            listing for tens of seconds.

    Raises:
        UserError: The directory does not appear in time.
    """
    deadline = time.monotonic() + timeout_seconds
    while True:
        try:
            return load_arrays(directory)
        except IncompleteCacheError as error:
            if time.monotonic() >= deadline:
                raise UserError(
                    f"{directory}: no complete sample index cache after {timeout_seconds:g} s ({error}); the builder "
                    "process of this node failed, or data.cache is not on a disk shared with it"
                ) from error
        time.sleep(_POLL_SECONDS)
        # Listing the parent refreshes the stale directory cache of a network file system.
        if directory.parent.is_dir():
            os.listdir(directory.parent)


def load_arrays(directory: Path) -> dict[str, np.ndarray]:
    """Memory-maps a complete cache directory.

    Raises:
        IncompleteCacheError: The directory or a file is missing, or a file differs from the manifest in size or header.
    """
    try:
        manifest = json.loads((directory / _MANIFEST).read_bytes())
        if manifest["format_version"] != _FORMAT_VERSION:
            raise IncompleteCacheError(f"format version {manifest['format_version']}, expected {_FORMAT_VERSION}")
        return {name: _load_array(directory / f"{name}.npy", spec) for name, spec in manifest["arrays"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise IncompleteCacheError(f"{type(error).__name__}: {error}") from error


def _load_array(path: Path, spec: dict[str, Any]) -> np.ndarray:
    size = path.stat().st_size
    if size != spec["bytes"]:
        raise IncompleteCacheError(f"{path.name} has {size} bytes, expected {spec['bytes']}")
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    if array.dtype.str != spec["dtype"] or list(array.shape) != spec["shape"]:
        raise IncompleteCacheError(
            f"{path.name} is {array.dtype.str} {list(array.shape)}, expected {spec['dtype']} {spec['shape']}"
        )
    # A plain ndarray view: indexing single elements of np.memmap is several times slower.
    return np.asarray(array)


def _build_if_needed(directory: Path, build: Callable[[], Iterable[tuple[str, np.ndarray]]]) -> bool:
    directory.parent.mkdir(parents=True, exist_ok=True)
    # Without locks, two builders on a shared disk do the same work twice, which is slow but correct.
    with file_lock(directory.parent / f".{directory.name}.lock", wait=True) as unsupported:
        try:
            load_arrays(directory)
            return False
        except IncompleteCacheError:
            pass
        if unsupported is None:
            # No other process is writing, so these are leftovers of a killed builder.
            for leftover in directory.parent.glob(f".{directory.name}.tmp-*"):
                shutil.rmtree(leftover, ignore_errors=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.tmp-", dir=directory.parent))
        try:
            os.chmod(temporary, 0o777 & ~_umask())
            _write_arrays(temporary, build())
            _publish(temporary, directory)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return True


def _write_arrays(directory: Path, arrays: Iterable[tuple[str, np.ndarray]]) -> None:
    specs: dict[str, dict[str, Any]] = {}
    for name, array in arrays:
        if array.size == 0:
            raise ValueError(f"array {name} of cache directory {directory.name} is empty and cannot be memory-mapped")
        with open(directory / f"{name}.npy", "wb") as file:
            np.save(file, array, allow_pickle=False)
            _flush_to_disk(file.fileno(), file.flush)
            specs[name] = {"bytes": file.tell(), "dtype": array.dtype.str, "shape": list(array.shape)}
    with open(directory / _MANIFEST, "w", encoding="utf-8") as text_file:
        json.dump({"format_version": _FORMAT_VERSION, "arrays": specs}, text_file, indent=1)
        _flush_to_disk(text_file.fileno(), text_file.flush)
    sync_directory(directory)


def _flush_to_disk(descriptor: int, flush: Callable[[], None]) -> None:
    # Otherwise a power failure after the rename could keep the name and lose the content.
    flush()
    os.fsync(descriptor)


def _publish(temporary: Path, directory: Path) -> None:
    """Renames `temporary` to `directory`; an existing corrupt directory is removed, a complete one is kept."""
    if directory.exists():
        try:
            # Possible only without locks: another builder finished first, with the same content.
            load_arrays(directory)
            return
        except IncompleteCacheError:
            # Renamed first, so that `directory` is never visible while it is being emptied.
            trash = Path(tempfile.mkdtemp(prefix=f".{directory.name}.tmp-", dir=directory.parent))
            os.rename(directory, trash / "corrupt")
            shutil.rmtree(trash, ignore_errors=True)
    try:
        os.rename(temporary, directory)
        sync_directory(directory.parent)
    except OSError:
        try:
            load_arrays(directory)
        except IncompleteCacheError:
            pass
        else:
            return
        raise


def _umask() -> int:
    # The umask can only be read by setting it.
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
