"""Fields of a recipe that differ from the recipe of the checkpoint that a run resumes from. Imports no torch."""

from collections.abc import Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

from megatron_prealign.checkpoint.commit import RECIPE_FILE
from megatron_prealign.checkpoint.train_state import TrainState
from megatron_prealign.files.yaml_text import YamlError, load_yaml, read_utf8
from megatron_prealign.recipe import ALIGNMENT, LANGUAGE_MODEL, Recipe, recipe_to_dict
from megatron_prealign.recipe.document import field_default

_UNSET = object()
_SAVED_OPTIMIZER = "no effect: the optimizer continues with the saved value"
_INITIALISED = "no effect: the weights are initialised already"
_OWN_CHECKPOINT = "no effect: the run has a checkpoint of its own"
# Field -> effect of changing it, where that is not obvious.
_EFFECTS = {
    "optimizer.adam_beta1": _SAVED_OPTIMIZER,
    "optimizer.adam_beta2": _SAVED_OPTIMIZER,
    "optimizer.adam_eps": _SAVED_OPTIMIZER,
    "model.init_method_std": _INITIALISED,
    "model.embedding_std": _INITIALISED,
    "model.equal_clone_embeddings": _INITIALISED,
    "checkpoint.load": _OWN_CHECKPOINT,
    "checkpoint.load_parts": _OWN_CHECKPOINT,
    "dictionary.evaluation_table": "evaluations from now on measure its pairs",
    "dictionary.table": "the same words, or the run would have been refused",
}
_SOURCES = "data.sources"
# Phase -> fields of its learning-rate schedule.
_SCHEDULES = {
    ALIGNMENT: {
        "alignment.lr",
        "alignment.min_lr",
        "alignment.lr_decay_style",
        "alignment.lr_warmup_iters",
        "alignment.train_iters",
    },
    LANGUAGE_MODEL: {
        "optimizer.lr",
        "optimizer.min_lr",
        "optimizer.lr_decay_style",
        "optimizer.lr_warmup_iters",
        "training.train_iters",
        "training.train_tokens",
        "training.global_batch_size",
    },
}


# Start of the names of what the number of steps of training.train_tokens depends on; words are part of the tokens.
_BUDGET = (
    "training.train_",
    "training.global_batch_size",
    "alignment.",
    "alignment_guard",
    "dictionary.table",
    "dictionary.held_out",
)


def changed_fields(recipe: Recipe, checkpoint: Path) -> dict[str, tuple[str, str]]:
    """Returns dotted name -> (saved value, current value) of each field that differs, in the recipe's order.

    Empty for a checkpoint whose recipe cannot be read: its state.json decides whether the run may resume.
    """
    try:
        saved = load_yaml(read_utf8(checkpoint / RECIPE_FILE))
    except (OSError, YamlError):
        return {}
    return differences(saved, recipe_to_dict(recipe))


def differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Returns dotted name -> (saved value, current value), as text, of each field that differs between two recipes.

    Args:
        saved, current: Results of `recipe_to_dict`; `current` determines the order.
    """
    return {name: (_shown(before), _shown(now)) for name, before, now in _differences(saved, current)}


def effect(field: str, phase: str, *, has_guard: bool) -> str:
    """Effect of a changed field on a run that resumes in a phase; empty if it is obvious."""
    if field.startswith(f"{ALIGNMENT}.") and phase != ALIGNMENT and not has_guard:
        return "no effect: the alignment phase is over"
    if field in _SCHEDULES[phase]:
        return "the learning-rate schedule is recomputed and continues at the current step"
    if field in _SCHEDULES[LANGUAGE_MODEL]:
        return f"applies when phase {LANGUAGE_MODEL} begins"
    # An item, or a field of one.
    if field == _SOURCES or field.startswith(f"{_SOURCES}["):
        return "applies to the samples that are not consumed yet"
    return _EFFECTS.get(field, "")


def describe_changes(recipe: Recipe, checkpoint: Path, step: int, phase: str) -> list[str]:
    """Returns a line per field that differs from the checkpoint's recipe."""
    lines = []
    for field, (saved, current) in changed_fields(recipe, checkpoint).items():
        note = effect(field, phase, has_guard=recipe.alignment_guard is not None)
        line = f"{field}: {saved} -> {current} (changed since the checkpoint of step {step:,})"
        lines.append(f"{line}: {note}" if note else line)
    return lines


def is_finished(recipe: Recipe, checkpoint: Path, summary: Mapping[str, Any]) -> bool:
    """Whether a checkpoint of a run is that of its last step, with the recipe's budget.

    Args:
        summary: Content of the checkpoint's state.json.
    """
    state = TrainState.from_dict(summary["train_state"])
    if summary["phase"] != LANGUAGE_MODEL:
        return False
    if recipe.training.train_iters is not None:
        return state.phase_step >= recipe.training.train_iters
    # How many steps a budget of tokens has, the run has recorded.
    changed = any(f"{field}.".startswith(_BUDGET) for field in changed_fields(recipe, checkpoint))
    return summary.get("phase_over", False) is True and not changed


def nothing_to_do(recipe: Recipe, step: int, total: int, *, changed: bool) -> str:
    """Line for a run that is complete.

    Args:
        changed: Whether fields differ from the checkpoint's recipe.
    """
    budget = "train_iters" if recipe.training.train_tokens is None else "train_tokens"
    return (
        f"nothing to do: {step:,} of {total:,} steps are done; raise training.{budget} to train longer"
        f"{'. The changed fields have no effect until then' if changed else ''}"
    )


def _differences(saved: Any, current: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yields dotted name, saved and current value of each field that differs, also in items of lists of mappings."""
    if isinstance(saved, dict) and isinstance(current, dict):
        for name in {**current, **saved}:
            inner = f"{path}.{name}" if path else str(name)
            if name not in saved and current[name] == field_default(inner):
                # The field is newer than the checkpoint.
                continue
            yield from _differences(saved.get(name, _UNSET), current.get(name, _UNSET), inner)
    elif isinstance(saved, list) and isinstance(current, list) and any(isinstance(each, dict) for each in current):
        for number, (before, now) in enumerate(zip_longest(saved, current, fillvalue=_UNSET)):
            yield from _differences(before, now, f"{path}[{number}]")
    elif saved != current:
        yield path, saved, current


def _shown(value: Any) -> str:
    if value is _UNSET:
        return "not set"
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
