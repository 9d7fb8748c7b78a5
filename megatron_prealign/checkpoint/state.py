"""`state.json`: metadata of a checkpoint, for readers that load no tensors. Imports no torch.

A checkpoint belongs to a run, which can resume from it, or contains only weights. Both kinds describe the model; the
checkpoint of a run also has the run's setup (`run`, built by `resume.identity.resume_fingerprint`), its progress
(`train_state`, `blend`) and its metrics.
"""

import json
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from megatron_prealign.errors import UserError

STATE = "state.json"
SHUFFLED_DICTIONARY = "shuffled_dictionary"
"""Key in `run` that only a run with a shuffled dictionary table has (`DictionaryTable.shuffled`)."""


def is_control(run: Mapping[str, Any]) -> bool:
    """Whether a run is a control, trained with a dictionary in which all translations are shuffled.

    Args:
        run: `resume.identity.resume_fingerprint`.
    """
    record = run.get(SHUFFLED_DICTIONARY)
    return record is not None and "share" not in record


_MODEL_FIELDS = {"vocab_size": int, "padded_vocab_size": int, "tokenizer_fingerprint": str, "model": dict}
_FIELDS = {**_MODEL_FIELDS, "layout": dict}
_WEIGHTS_FIELDS = {**_FIELDS, "source": dict}
_RUN_FIELDS = {
    **_FIELDS,
    "run": dict,
    "train_state": dict,
    "phase": str,
    "consumed_samples_per_source": dict,
    "blend": dict,
    "metrics": dict,
    "saved_at": str,
    "versions": dict,
}


def model_identity(
    model: Mapping[str, Any], *, vocab_size: int, padded_vocab_size: int, tokenizer_fingerprint: str
) -> dict[str, Any]:
    """Identity of the model that weights belong to.

    Args:
        model: The recipe's section `model`, as plain values.
        vocab_size: Number of token ids, without padding.
        padded_vocab_size: Rows of the embedding.
        tokenizer_fingerprint: Fingerprint of the tokenizer that produced the ids.
    """
    return {
        "vocab_size": vocab_size,
        "padded_vocab_size": padded_vocab_size,
        "tokenizer_fingerprint": tokenizer_fingerprint,
        "model": dict(model),
    }


def identity_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """`model_identity` from a checkpoint's state."""
    return {name: state[name] for name in _MODEL_FIELDS}


def layout(tensor: int, pipeline: int, *, virtual: int = 1, data: int = 1, device: str = "cpu") -> dict[str, Any]:
    """Parallel layout that a checkpoint was written in: the size of each kind of parallelism, and the device."""
    return {
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": pipeline,
        "virtual_pipeline_model_parallel_size": virtual,
        "data_parallel_size": data,
        "device": device,
    }


def run_state(
    identity: Mapping[str, Any],
    *,
    layout: Mapping[str, Any],
    run: Mapping[str, Any],
    train_state: Mapping[str, Any],
    phase: str,
    consumed: Mapping[str, int],
    blend: Mapping[str, Any],
    metrics: Mapping[str, float],
    versions: Mapping[str, str],
    phase_over: bool = False,
) -> dict[str, Any]:
    """State of a run, saved now.

    Args:
        identity: `model_identity`.
        layout: `layout`.
        run: `resume.identity.resume_fingerprint`.
        train_state: `TrainState.to_dict`.
        phase: Name of the current phase.
        consumed: Samples consumed from each source so far.
        blend: `TrainSamples.blend_state`.
        metrics: Metrics measured after this step.
        versions: Versions of the packages the run uses.
        phase_over: Whether this was the last step of the phase. The number of steps of a token budget is known only to
            the run, which knows how many tokens its words have.
    """
    return {
        "kind": "run",
        **identity,
        "run": dict(run),
        "train_state": dict(train_state),
        "phase": phase,
        "phase_over": phase_over,
        "layout": dict(layout),
        "consumed_samples_per_source": dict(consumed),
        "blend": dict(blend),
        "metrics": dict(metrics),
        "saved_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": dict(versions),
    }


def weights_state(
    identity: Mapping[str, Any], *, layout: Mapping[str, Any], source: Mapping[str, Any]
) -> dict[str, Any]:
    """State of a checkpoint that contains only weights.

    Args:
        identity: `model_identity`.
        layout: `layout`.
        source: Where the weights come from, as plain values.
    """
    return {"kind": "weights", **identity, "layout": dict(layout), "source": dict(source)}


def is_run(state: Mapping[str, Any]) -> bool:
    """Whether a checkpoint belongs to a run, which can resume from it; otherwise it contains only weights.

    Args:
        state: Result of `read_state`.
    """
    return bool(state["kind"] == "run")


def is_weights_checkpoint(directory: Path) -> bool:
    """Whether a directory is a checkpoint of only weights, which may be overwritten; False for a run's checkpoint."""
    try:
        state = json.loads((directory / STATE).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(state, dict) and state.get("kind") == "weights"


def write_state(directory: Path, state: Mapping[str, Any]) -> Path:
    """Writes `state.json`, not synced; returns its path.

    Raises:
        OSError: the file cannot be written.
    """
    path = directory / STATE
    path.write_text(json.dumps(state, indent=2, ensure_ascii=False), encoding="utf-8")
    return path


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Reads `state.json` of a checkpoint; the values of its run are checked by `resume.identity.read_run`.

    Raises:
        UserError: the file is corrupt.
    """
    file = checkpoint / STATE
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        _check(state)
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is corrupt ({error}); use another checkpoint") from error
    return dict(state)


def _check(state: Any) -> None:
    if not isinstance(state, dict):
        raise ValueError(f"it contains a {type(state).__name__}, expected an object")
    if state.get("kind") not in ("run", "weights"):
        raise ValueError(f"kind is {state.get('kind', 'missing')!r}, expected run or weights")
    for name, kind in (_RUN_FIELDS if is_run(state) else _WEIGHTS_FIELDS).items():
        if not isinstance(state.get(name), kind):
            raise ValueError(f"{name} is {state.get(name, 'missing')!r}, expected {kind.__name__}")
