"""A folder that is there whole or not at all: written beside under a hidden name, renamed when complete."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_prealign.errors import UserError, system_reason
from megatron_prealign.files.sync import sync_file, sync_folder


@contextmanager
def new_folder(output: Path, *, overwrite: bool, replaceable: Callable[[Path], bool]) -> Iterator[Path]:
    """Gives an empty hidden folder beside `output`; syncs and renames it if the block ends well, else removes it.

    What an earlier process that was killed left under the hidden name is removed first. The folder that is replaced
    goes last: a process that is killed in between leaves it under its hidden name `.NAME.replaced`.

    Args:
        output: Path of the folder to make.
        overwrite: Replace a folder that is there.
        replaceable: Whether a folder that is there is of the kind to be made: others are not removed.

    Raises:
        UserError: something is there that may not be replaced, or the disk does not take the files.
    """
    check_free(output, overwrite=overwrite, replaceable=replaceable)
    working = output.with_name(f".{output.name}.incomplete")
    replaced = output.with_name(f".{output.name}.replaced")
    try:
        if working.exists():
            shutil.rmtree(working)
        working.mkdir(parents=True)
        yield working
        _sync_tree(working)
        if output.exists():
            if replaced.exists():
                shutil.rmtree(replaced)
            os.replace(output, replaced)
        os.replace(working, output)
        sync_folder(output.parent)
    except (OSError, RuntimeError) as error:
        reason = system_reason(error)
        if reason is None:
            raise
        raise UserError(
            f"{output} cannot be written ({reason}); nothing is left of it, make room on its disk or choose another "
            "path"
        ) from error
    finally:
        shutil.rmtree(working, ignore_errors=True)
        if output.exists():
            shutil.rmtree(replaced, ignore_errors=True)


def check_free(output: Path, *, overwrite: bool, replaceable: Callable[[Path], bool]) -> None:
    """Looks whether `new_folder` may make the folder, before long work.

    Raises:
        UserError: something is there that may not be replaced, or no folder can be there.
    """
    if output.name in ("", ".."):
        raise UserError(f"{output} is no name for a new folder; choose another path")
    if not os.path.lexists(output):
        above = next(parent for parent in output.absolute().parents if parent.exists())
        if not above.is_dir():
            raise UserError(f"{output} cannot be a folder, for {above} is a file; choose another path")
        return
    if output.is_symlink() or not output.is_dir():
        raise UserError(f"{output} is there and no folder; choose another path")
    if not any(output.iterdir()):
        return
    if not replaceable(output):
        raise UserError(
            f"{output} is there and holds something else than what would be written, which is left alone; choose "
            "another path"
        )
    if not overwrite:
        raise UserError(f"{output} is there already; choose another path, or replace it with --overwrite")


def _sync_tree(folder: Path) -> None:
    for parent, _, names in os.walk(folder):
        for name in names:
            sync_file(Path(parent, name))
        sync_folder(Path(parent))
