"""Which folders of checkpoints stay and which are removed."""

import logging
import shutil
from pathlib import Path

from megatron_prealign.checkpoint.folder import step_of

logger = logging.getLogger(__name__)


def remove_unfinished(directory: Path) -> None:
    """Removes what interrupted saves left. A folder that cannot be removed is a warning."""
    for path in directory.glob(".step_*.incomplete"):
        _remove(path)


def prune(directory: Path, newest: Path, keep: int) -> None:
    """Removes complete checkpoints until `keep` are left, `newest` (just written) among them.

    Steps after `newest` belong to a branch that was abandoned when the run was rolled back to an older checkpoint: they
    go first. Then the oldest go. A folder that cannot be removed is a warning.
    """
    written = step_of(newest)
    assert written is not None
    steps = {path: step_of(path) for path in directory.glob("step_*") if (path / "state.json").exists()}
    others = {path: step for path, step in steps.items() if step is not None and step != written}
    in_order = sorted(others, key=lambda path: (others[path] < written, others[path]))
    for path in in_order[: max(0, len(others) + 1 - keep)]:
        _remove(path)


def _remove(path: Path) -> None:
    try:
        # First, so that a removal that is cut short does not leave what looks like a complete checkpoint.
        (path / "state.json").unlink(missing_ok=True)
        shutil.rmtree(path)
    except OSError as error:
        logger.warning("%s cannot be removed (%s); the run goes on, remove it by hand", path, error)
