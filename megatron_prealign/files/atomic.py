"""Atomic writes of files and directories: written under a temporary name, synced, then renamed."""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megatron_prealign.errors import UserError
from megatron_prealign.files.directories import writing
from megatron_prealign.files.sync import sync_directory, sync_tree


@contextmanager
def write_atomically(target: Path) -> Iterator[Path]:
    """Yields a temporary path next to `target`, which is synced and renamed to `target` when the block succeeds.

    Works for a file and for a new directory. On any error, including Ctrl-C, the temporary path is removed.
    """
    with write_all_atomically([target]) as (temporary,):
        yield temporary


@contextmanager
def write_all_atomically(targets: Sequence[Path]) -> Iterator[list[Path]]:
    """Like `write_atomically` for a group of files: none is renamed before all are written and synced.

    Files are renamed in the order of `targets`, so the last one should mark the group as complete. If there are several
    targets, an existing last one is removed before the first rename: whenever the process is killed, the last file is
    either missing or next to the files it belongs to.

    Raises:
        UserError: a target is a directory but not what replaces it; all targets stay as they were.
    """
    temporaries = [target.with_name(f".{target.name}.{os.getpid()}.tmp") for target in targets]
    try:
        yield temporaries
        for temporary in temporaries:
            sync_tree(temporary)
        for temporary, target in zip(temporaries, targets, strict=True):
            # A rename would fail, and the last target would be gone.
            if target.is_dir() and not target.is_symlink() and not temporary.is_dir():
                raise UserError(f"cannot write {target}: it is a directory; remove it or choose another path")
        if len(targets) > 1:
            targets[-1].unlink(missing_ok=True)
            sync_directory(targets[-1].parent)
        for temporary, target in zip(temporaries, targets, strict=True):
            os.replace(temporary, target)
        for directory in {target.parent for target in targets}:
            sync_directory(directory)
    finally:
        for temporary in temporaries:
            if temporary.is_dir():
                shutil.rmtree(temporary, ignore_errors=True)
            else:
                temporary.unlink(missing_ok=True)


@contextmanager
def new_directory(output: Path, *, overwrite: bool, replaceable: Callable[[Path], bool]) -> Iterator[Path]:
    """Yields an empty hidden directory next to `output`, which is synced and renamed when the block succeeds.

    On any error it is removed. Leftovers of a killed process under the hidden name are removed first. A replaced
    directory is removed last: a process killed in between leaves it under its hidden name `.NAME.replaced`.

    Args:
        output: Path of the new directory.
        overwrite: Replace an existing directory.
        replaceable: Returns whether an existing directory is of the expected kind; others are never removed.

    Raises:
        UserError: `output` exists and must not be replaced, or it cannot be written.
    """
    check_new_directory(output, overwrite=overwrite, replaceable=replaceable)
    working = output.with_name(f".{output.name}.incomplete")
    replaced = output.with_name(f".{output.name}.replaced")
    try:
        with writing(output, note="nothing was written"):
            if working.exists():
                shutil.rmtree(working)
            working.mkdir()
            yield working
            sync_tree(working)
            if output.exists():
                if replaced.exists():
                    shutil.rmtree(replaced)
                os.replace(output, replaced)
            os.replace(working, output)
            sync_directory(output.parent)
    finally:
        shutil.rmtree(working, ignore_errors=True)
        if output.exists():
            shutil.rmtree(replaced, ignore_errors=True)


def check_new_directory(output: Path, *, overwrite: bool, replaceable: Callable[[Path], bool]) -> None:
    """Checks before long work that `new_directory` can create the directory.

    Raises:
        UserError: `output` exists and must not be replaced, or is not a valid path for a directory.
    """
    if output.name in ("", ".."):
        raise UserError(f"{output} is not a valid name for a new directory; choose another path")
    if not os.path.lexists(output):
        above = next(parent for parent in output.absolute().parents if parent.exists())
        if not above.is_dir():
            raise UserError(f"cannot create directory {output}: {above} is a file; choose another path")
        return
    if output.is_symlink() or not output.is_dir():
        raise UserError(f"{output} exists and is not a directory; choose another path")
    if not any(output.iterdir()):
        return
    if not replaceable(output):
        raise UserError(f"{output} exists and contains files that this command does not write; choose another path")
    if not overwrite:
        raise UserError(f"{output} already exists; choose another path, or replace it with --overwrite")
