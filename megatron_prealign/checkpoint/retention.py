"""Retention: which checkpoints are kept and which are removed."""

import logging
import math
import os
import shutil
from pathlib import Path

from megatron_prealign.checkpoint.directory import named_latest, step_of
from megatron_prealign.checkpoint.manifest import find_problems
from megatron_prealign.checkpoint.state import read_state
from megatron_prealign.errors import UserError
from megatron_prealign.recipe import CheckpointSection

logger = logging.getLogger(__name__)

# Corrupt checkpoints already logged: every save checks them again.
_warned: set[Path] = set()


def remove_unfinished(directory: Path) -> None:
    """Removes what interrupted saves and removals left. Logs a warning for a directory that cannot be removed."""
    for path in directory.glob(".step_*.incomplete"):
        _delete(path)


def prune(directory: Path, newest: Path, section: CheckpointSection) -> None:
    """Removes old checkpoints, keeping `section.keep` including `newest` (just written), and those that `keep_every`
    and `keep_best` protect.

    Steps after `newest` belong to a branch that was abandoned when the run was rolled back to an older checkpoint: they
    are removed first, then the oldest. A directory that is corrupt or not named `step_NUMBER` is neither counted nor
    removed. Logs a warning for a directory that cannot be removed.
    """
    newest_step = step_of(newest)
    assert newest_step is not None
    good = {path: step for path in directory.glob("step_*") if (step := step_of(path)) is not None and _is_good(path)}
    protected = {path for path, step in good.items() if section.keep_every and step % section.keep_every == 0}
    protected |= {newest, *_best(list(good), section)}
    named = named_latest(directory)
    if named is not None:
        protected.add(named)
    others = [path for path in good if path != newest]
    in_order = sorted(others, key=lambda path: (good[path] < newest_step, good[path]))
    for path in in_order[: max(0, len(others) + 1 - section.keep)]:
        if path not in protected:
            _remove(path, section.keep)


def _is_good(checkpoint: Path) -> bool:
    """Whether the checkpoint has a manifest and all its files have the recorded sizes."""
    problems = find_problems(checkpoint)
    if problems and checkpoint not in _warned:
        _warned.add(checkpoint)
        logger.warning(
            "%s is corrupt (%s); it does not count towards checkpoint.keep and is not removed", checkpoint, problems[0]
        )
    return not problems


def _best(checkpoints: list[Path], section: CheckpointSection) -> list[Path]:
    """The checkpoint with the best value of `keep_best`, the newest of equal ones; empty if none has the metric."""
    if section.keep_best is None:
        return []
    sign = 1 if section.keep_best_mode == "max" else -1
    ranked = []
    for path in checkpoints:
        try:
            value = read_state(path).get("metrics", {}).get(section.keep_best)
        except UserError:
            continue
        if isinstance(value, int | float) and math.isfinite(value):
            ranked.append((sign * value, step_of(path) or 0, path))
    return [max(ranked)[2]] if ranked else []


def _remove(checkpoint: Path, keep: int) -> None:
    """Removes a checkpoint; it is renamed first, so an interrupted removal leaves nothing named like a checkpoint."""
    renamed = checkpoint.with_name(f".{checkpoint.name}.removed.incomplete")
    try:
        os.replace(checkpoint, renamed)
    except OSError as error:
        logger.warning("cannot remove %s: %s; training continues, remove it manually", checkpoint, error)
        return
    if _delete(renamed):
        logger.info("removed %s: checkpoint.keep is %d", checkpoint, keep)


def _delete(directory: Path) -> bool:
    """Returns whether it is gone."""
    try:
        shutil.rmtree(directory)
    except OSError as error:
        logger.warning("cannot remove %s: %s; training continues, remove it manually", directory, error)
        return False
    return True
