"""`state.json`: what a checkpoint says about itself, for readers that load no tensors. Imports no torch.

A checkpoint is of a run, which can resume from it, or contains weights alone. Both say what model the weights are of;
the checkpoint of a run also says how the run was set up (`run`, built by `resume.identity.resume_fingerprint`), where
it stood (`train_state`, `blend`) and what was measured.
"""

import json
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from megatron_prealign.errors import UserError

STATE = "state.json"

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
    """What weights are of.

    Args:
        model: The recipe's section `model`, as plain values.
        vocab_size: True number of token ids.
        padded_vocab_size: Rows of the embedding.
        tokenizer_fingerprint: Of the tokenizer that made the ids.
    """
    return {
        "vocab_size": vocab_size,
        "padded_vocab_size": padded_vocab_size,
        "tokenizer_fingerprint": tokenizer_fingerprint,
        "model": dict(model),
    }


def identity_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """`model_identity` out of a checkpoint's state."""
    return {name: state[name] for name in _MODEL_FIELDS}


def layout(tensor: int, pipeline: int, *, virtual: int = 1, data: int = 1, device: str = "cpu") -> dict[str, Any]:
    """The parallel layout that a checkpoint was written in: sizes of each kind of parallelism, and the device."""
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
) -> dict[str, Any]:
    """The state of a run that is saved now.

    Args:
        identity: `model_identity`.
        layout: `layout`.
        run: `resume.identity.resume_fingerprint`.
        train_state: `TrainState.to_dict`.
        phase: Name of the current phase.
        consumed: Samples taken from each source so far.
        blend: `TrainSamples.blend_state`.
        metrics: What was measured after this very step.
        versions: Of the packages the run uses.
    """
    return {
        "kind": "run",
        **identity,
        "run": dict(run),
        "train_state": dict(train_state),
        "phase": phase,
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
    """The state of a checkpoint that contains weights alone.

    Args:
        identity: `model_identity`.
        layout: `layout`.
        source: Where the weights come from, any facts.
    """
    return {"kind": "weights", **identity, "layout": dict(layout), "source": dict(source)}


def is_run(state: Mapping[str, Any]) -> bool:
    """Whether a checkpoint is of a run, which can resume from it; otherwise it contains weights alone.

    Args:
        state: What `read_state` returned.
    """
    return bool(state["kind"] == "run")


def is_weights_checkpoint(directory: Path) -> bool:
    """Whether there is a checkpoint of weights alone, which can be made again. A run's is never taken for one."""
    try:
        state = json.loads((directory / STATE).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(state, dict) and state.get("kind") == "weights"


def write_state(directory: Path, state: Mapping[str, Any]) -> Path:
    """Writes `state.json`, not synced; returns its path.

    Raises:
        OSError: the disk refuses.
    """
    path = directory / STATE
    path.write_text(json.dumps(state, indent=2, ensure_ascii=False), encoding="utf-8")
    return path


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The checkpoint's `state.json`. What it says of a run is checked by `resume.identity.check_run`.

    Raises:
        UserError: the file is damaged.
    """
    file = checkpoint / STATE
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        _check(state)
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is damaged ({error}); use another checkpoint") from error
    return dict(state)


def _check(state: Any) -> None:
    if not isinstance(state, dict):
        raise ValueError(f"it holds a {type(state).__name__}, expected an object")
    if state.get("kind") not in ("run", "weights"):
        raise ValueError(f"kind is {state.get('kind', 'missing')!r}, expected run or weights")
    for name, kind in (_RUN_FIELDS if is_run(state) else _WEIGHTS_FIELDS).items():
        if not isinstance(state.get(name), kind):
            raise ValueError(f"{name} is {state.get(name, 'missing')!r}, expected {kind.__name__}")
