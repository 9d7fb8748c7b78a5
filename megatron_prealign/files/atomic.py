"""Files and directories that appear complete or not at all: temporary names, synced, then renamed."""

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
    """Gives a temporary path next to `target`; syncs it and renames it to `target` if the block succeeds, else removes
    it.

    Works for a file and for a new directory. On any error, also Ctrl-C, nothing is left behind.
    """
    with write_all_atomically([target]) as (temporary,):
        yield temporary


@contextmanager
def write_all_atomically(targets: Sequence[Path]) -> Iterator[list[Path]]:
    """Like `write_atomically` for files that belong together: none is renamed before all are written and synced.

    The renames happen in the order of `targets`: name the file that says that the others are complete last. Of several,
    an older last one is removed before the first rename: whenever the process is killed, the last file is either
    missing or next to the files it belongs to.
    """
    temporaries = [target.with_name(f".{target.name}.{os.getpid()}.tmp") for target in targets]
    try:
        yield temporaries
        for temporary in temporaries:
            sync_tree(temporary)
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
    """Gives an empty hidden directory next to `output`; syncs and renames it if the block succeeds, else removes it.

    What an earlier process that was killed left under the hidden name is removed first. The directory that is replaced
    is removed last: a process that is killed in between leaves it under its hidden name `.NAME.replaced`.

    Args:
        output: Path of the directory to make.
        overwrite: Replace an existing directory.
        replaceable: Whether an existing directory is of the kind to be made: others are not removed.

    Raises:
        UserError: something is there that may not be replaced, or the disk does not take the files.
    """
    check_new_directory(output, overwrite=overwrite, replaceable=replaceable)
    working = output.with_name(f".{output.name}.incomplete")
    replaced = output.with_name(f".{output.name}.replaced")
    try:
        with writing(output, kept="nothing was written"):
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
    """Checks before long work whether `new_directory` may make the directory.

    Raises:
        UserError: something is there that may not be replaced, or no directory can be there.
    """
    if output.name in ("", ".."):
        raise UserError(f"{output} cannot name a new directory; choose another path")
    if not os.path.lexists(output):
        above = next(parent for parent in output.absolute().parents if parent.exists())
        if not above.is_dir():
            raise UserError(f"{output} cannot be a directory: {above} is a file; choose another path")
        return
    if output.is_symlink() or not output.is_dir():
        raise UserError(f"{output} exists and is not a directory; choose another path")
    if not any(output.iterdir()):
        return
    if not replaceable(output):
        raise UserError(
            f"{output} exists and contains something other than what would be written; it is left alone, choose "
            "another path"
        )
    if not overwrite:
        raise UserError(f"{output} exists; choose another path, or replace it with --overwrite")
