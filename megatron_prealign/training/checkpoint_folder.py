"""Where the checkpoints of a run lie and what they say about themselves. Imports no torch, so that a recipe is checked
without it."""

import json
from pathlib import Path
from typing import Any

from megatron_prealign.errors import UserError
from megatron_prealign.training.run_identity import find_switching_problem
from megatron_prealign.training.state import TrainState

LATEST = "latest"

_SUMMARY_FIELDS = {
    "vocab_size": int,
    "padded_vocab_size": int,
    "tokenizer_fingerprint": str,
    "model": dict,
    "run": dict,
    "train_state": dict,
    "phase": str,
    "layout": dict,
}
_RUN_FIELDS = ("phases", "seq_length", "precision", "use_distributed_optimizer", "seed", "num_samples", "sources")


def latest_checkpoint(directory: Path) -> Path | None:
    """The newest complete checkpoint in `directory`, or None when there is none.

    Raises:
        UserError: `latest` names a checkpoint that is not there.
    """
    pointer = directory / LATEST
    if not pointer.exists():
        return None
    checkpoint = directory / pointer.read_text(encoding="utf-8").strip()
    if not (checkpoint / "state.json").exists():
        raise UserError(
            f"{pointer} names {checkpoint.name}, which is not a complete checkpoint there; "
            f"restore it, or write the name of another step_* folder of {directory} into {pointer}"
        )
    return checkpoint


def resolve_checkpoint(path: str | Path) -> Path:
    """A checkpoint folder given as itself, as the folder of checkpoints, or as the run's folder.

    Raises:
        UserError: there is no complete checkpoint at any of these.
    """
    path = Path(path)
    if (path / "state.json").exists():
        return path
    for directory in (path, path / "checkpoints"):
        found = latest_checkpoint(directory)
        if found is not None:
            return found
    raise UserError(
        f"{path} holds no complete checkpoint; expected a step_* folder, a folder with `{LATEST}`, or a run's folder"
    )


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The checkpoint's `state.json`.

    Raises:
        UserError: the file is damaged.
    """
    file = checkpoint / "state.json"
    try:
        summary = json.loads(file.read_text(encoding="utf-8"))
        _check_summary(summary)
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is damaged ({error}); use another checkpoint") from error
    return summary


def _check_summary(summary: Any) -> None:
    if not isinstance(summary, dict):
        raise ValueError(f"it holds a {type(summary).__name__}, expected an object")
    for name, kind in _SUMMARY_FIELDS.items():
        if not isinstance(summary.get(name), kind):
            raise ValueError(f"{name} is {summary.get(name, 'missing')!r}, expected {kind.__name__}")
    missing = [name for name in _RUN_FIELDS if name not in summary["run"]]
    if missing:
        raise ValueError(f"run lacks {', '.join(missing)}")
    for source in summary["run"]["sources"]:
        if not isinstance(source, dict) or not {"path", "language", "weight"} <= source.keys():
            raise ValueError(f"run.sources holds {source!r}, expected path, language and weight")
    problem = find_switching_problem(summary["run"])
    if problem:
        raise ValueError(problem)
    TrainState.from_dict(summary["train_state"])
