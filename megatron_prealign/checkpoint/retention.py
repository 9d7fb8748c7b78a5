"""Which directories of checkpoints stay and which are removed."""

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

# Damaged checkpoints that the log has named: they are met again after every save.
_told: set[Path] = set()


def remove_unfinished(directory: Path) -> None:
    """Removes what interrupted saves and removals left. A directory that cannot be removed is a warning."""
    for path in directory.glob(".step_*.incomplete"):
        _delete(path)


def prune(directory: Path, newest: Path, section: CheckpointSection) -> None:
    """Removes complete checkpoints until `section.keep` are left, `newest` (just written) among them, and those that
    `keep_every` and `keep_best` hold.

    Steps after `newest` belong to a branch that was abandoned when the run was rolled back to an older checkpoint: they
    go first. Then the oldest go. A directory that is damaged, has another name or is none of ours does not count and is
    left alone. A directory that cannot be removed is a warning.
    """
    written = step_of(newest)
    assert written is not None
    good = {path: step for path in directory.glob("step_*") if (step := step_of(path)) is not None and _is_good(path)}
    held = {path for path, step in good.items() if section.keep_every and step % section.keep_every == 0}
    held |= {newest, *_best(list(good), section)}
    named = named_latest(directory)
    if named is not None:
        held.add(named)
    others = [path for path in good if path != newest]
    in_order = sorted(others, key=lambda path: (good[path] < written, good[path]))
    for path in in_order[: max(0, len(others) + 1 - section.keep)]:
        if path not in held:
            _remove(path)


def _is_good(checkpoint: Path) -> bool:
    """Whether all its files are there in their size. Without a manifest it was never complete."""
    problems = find_problems(checkpoint)
    if problems and checkpoint not in _told:
        _told.add(checkpoint)
        logger.warning(
            "%s is damaged (%s); it does not count as a checkpoint kept and is left alone", checkpoint, problems[0]
        )
    return not problems


def _best(checkpoints: list[Path], section: CheckpointSection) -> list[Path]:
    """The checkpoint with the best measure, in a list; of equal ones the newest; none where there are no measures."""
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


def _remove(checkpoint: Path) -> None:
    """Renames first: a removal that is cut short leaves nothing with the name of a checkpoint."""
    doomed = checkpoint.with_name(f".{checkpoint.name}.removed.incomplete")
    try:
        os.replace(checkpoint, doomed)
    except OSError as error:
        logger.warning("%s cannot be removed (%s); the run goes on, remove it by hand", checkpoint, error)
    else:
        _delete(doomed)


def _delete(directory: Path) -> None:
    try:
        shutil.rmtree(directory)
    except OSError as error:
        logger.warning("%s cannot be removed (%s); the run goes on, remove it by hand", directory, error)
