"""Compatibility of a run with its checkpoint: resuming must neither repeat nor skip data."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from megatron_prealign.checkpoint.directory import LATEST
from megatron_prealign.checkpoint.state import STATE, is_run, read_state
from megatron_prealign.checkpoint.train_state import TrainState
from megatron_prealign.data.blend import NEW_RUN, SavedBlend
from megatron_prealign.errors import UserError
from megatron_prealign.recipe import ALIGNMENT, LANGUAGE_MODEL, CodeSwitchSection, Recipe
from megatron_prealign.recipe.model import resolved_model
from megatron_prealign.runtime.log import warn_on_rank_zero

logger = logging.getLogger(__name__)

# Fields that only affect computation or layout may differ.
_FREE_MODEL_FIELDS = {
    "hidden_dropout",
    "attention_dropout",
    "transformer_impl",
    "make_vocab_size_divisible_by",
    "init_method_std",
    "embedding_std",
    "equal_clone_embeddings",
    "recompute_granularity",
    "recompute_num_layers",
}
# Fields of code_switch that select the words that can be switched, and so the coverage of the data.
_WORD_FIELDS = ("source_languages", "min_word_length", "max_word_length", "case")
_SWITCHING_FIELDS = {"table": str, "digest": str, "settings": dict, "coverage": dict | None}
_RUN_FIELDS = (
    "phases",
    "code_switch",
    "switching",
    "seq_length",
    "reset_position_ids",
    "reset_attention_mask",
    "precision",
    "use_distributed_optimizer",
    "freeze",
    "projection",
    "seed",
    "num_samples",
    "budget",
    "sources",
)
_BUDGET_FIELDS = {
    "training.train_iters",
    "training.train_tokens",
    "training.global_batch_size",
    "alignment.train_iters",
}
_SOURCE_FIELDS = {"key", "path", "language", "weight", "segmenter"}
OTHER_WEIGHTS = "set checkpoint.load to another checkpoint"
"""Advice if only weights were to be loaded."""


def resume_fingerprint(
    recipe: Recipe,
    *,
    num_samples: int,
    keys: Sequence[int],
    segmenters: Sequence[str | None],
    switching: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Settings that determine a run besides its model and its blend, as plain values for `state.json`.

    Args:
        num_samples: Number of samples of the complete run.
        keys: Key of each source in the run's blend.
        segmenters: Segmenter that marked the words of each source, from its sidecar.
        switching: `code_switch_fingerprint`; None without code-switching.
    """
    return {
        "phases": [phase.name for phase in recipe.phases],
        "code_switch": recipe.code_switch is not None,
        "switching": switching,
        "seq_length": recipe.data.seq_length,
        "reset_position_ids": recipe.data.reset_position_ids,
        "reset_attention_mask": recipe.data.reset_attention_mask,
        "precision": recipe.training.precision,
        "use_distributed_optimizer": recipe.parallel.use_distributed_optimizer,
        "freeze": "none" if recipe.alignment is None else recipe.alignment.freeze,
        "projection": _projection(recipe),
        "seed": recipe.training.seed,
        "num_samples": num_samples,
        "budget": {
            "training.train_iters": recipe.training.train_iters,
            "training.train_tokens": recipe.training.train_tokens,
            "training.global_batch_size": recipe.training.global_batch_size,
            "alignment.train_iters": None if recipe.alignment is None else recipe.alignment.train_iters,
        },
        "sources": [
            {
                "key": key,
                "path": source.path,
                "language": source.language,
                "weight": source.weight,
                "segmenter": segmenter,
            }
            for source, key, segmenter in zip(recipe.data.sources, keys, segmenters, strict=True)
        ],
    }


def _projection(recipe: Recipe) -> dict[str, Any] | None:
    """Size and layers of the projection heads; None without heads."""
    section = recipe.alignment
    if section is None or section.projection_size is None:
        return None
    weights = section.layer_weights(recipe.model.num_layers)
    return {"size": section.projection_size, "layers": [layer for layer, weight in enumerate(weights) if weight]}


def code_switch_fingerprint(
    table: str, section: CodeSwitchSection, *, fingerprint: str, coverage: Mapping[str, float] | None
) -> dict[str, Any]:
    """Settings that determine which words are switched, as plain values.

    Args:
        table: Path of the dictionary table.
        fingerprint: Hash of the table without the held-out groups (`DictionaryTable.switching_fingerprint`).
        coverage: Fraction of running words that the table covers, per language; None if the ratio does not need it.
    """
    return {
        "table": table,
        "digest": fingerprint,
        "settings": asdict(section),
        "coverage": None if coverage is None else dict(coverage),
    }


def find_switching_problem(run: dict[str, Any]) -> str | None:
    """Problem of the code-switching fingerprint in a checkpoint; None if it is valid or absent."""
    switching = run["switching"]
    if switching is None:
        return None
    if not isinstance(switching, dict):
        return f"run.switching is {switching!r}, expected an object"
    for name, kind in _SWITCHING_FIELDS.items():
        if name not in switching or not isinstance(switching[name], kind):
            return f"run.switching.{name} is {switching.get(name, 'missing')!r}"
    missing = sorted({field.name for field in fields(CodeSwitchSection)} - switching["settings"].keys())
    if missing:
        return f"run.switching.settings is missing {', '.join(missing)}"
    for language, fraction in (switching["coverage"] or {}).items():
        if not isinstance(fraction, int | float) or not 0 <= fraction <= 1:
            return f"run.switching.coverage.{language} is {fraction!r}, expected a number from 0 to 1"
    return None


def read_run(checkpoint: Path) -> dict[str, Any]:
    """Reads `state.json` of a checkpoint that a run can resume from.

    Raises:
        UserError: the file is corrupt, or the checkpoint contains only weights.
    """
    summary = read_state(checkpoint)
    if not is_run(summary):
        raise UserError(
            f"cannot resume from {checkpoint}: it contains only weights; set checkpoint.load to it and "
            "checkpoint.load_parts to weights"
        )
    try:
        _check_run_fields(summary["run"])
        TrainState.from_dict(summary["train_state"])
        SavedBlend.from_state(checkpoint, summary)
    except ValueError as error:
        raise UserError(f"{checkpoint / STATE} is corrupt ({error}); use another checkpoint") from error
    return summary


def _check_run_fields(run: dict[str, Any]) -> None:
    missing = [name for name in _RUN_FIELDS if name not in run]
    if missing:
        raise ValueError(f"run is missing {', '.join(missing)}")
    if not isinstance(run["budget"], dict) or not run["budget"].keys() >= _BUDGET_FIELDS:
        raise ValueError(f"run.budget is {run['budget']!r}, expected {', '.join(sorted(_BUDGET_FIELDS))}")
    for source in run["sources"]:
        if not isinstance(source, dict) or not source.keys() >= _SOURCE_FIELDS:
            raise ValueError(f"run.sources contains {source!r}, expected {', '.join(sorted(_SOURCE_FIELDS))}")
    problem = find_switching_problem(run)
    if problem:
        raise ValueError(problem)


def saved_coverage(summary: dict[str, Any], section: CodeSwitchSection, fingerprint: str) -> dict[str, float] | None:
    """Coverage that a checkpoint was trained with; None if it has none, or if other words can be switched now.

    Args:
        summary: The checkpoint's `state.json`.
        section: The recipe's current section.
        fingerprint: Hash of the current table.
    """
    saved = summary["run"]["switching"]
    if saved is None or saved["digest"] != fingerprint:
        return None
    before, now = saved["settings"], asdict(section)
    same = all(before[name] == now[name] for name in _WORD_FIELDS)
    # Words that only have translations into a language without weight cannot be switched.
    same &= set(before["language_weights"]) == set(section.language_weights)
    return saved["coverage"] if same else None


def check_model(checkpoint: Path, summary: dict[str, Any], current: dict[str, Any], *, advice: str = NEW_RUN) -> None:
    """Checks that a checkpoint has the model and tokenizer of the run.

    Args:
        summary: The checkpoint's `state.json`.
        current: The run's `vocab_size`, `tokenizer_fingerprint` and `model`.
        advice: Alternative to changing the recipe.

    Raises:
        UserError: the checkpoint is of another model or tokenizer.
    """
    saved = {
        **resolved_model(summary["model"]),
        "vocab_size": summary["vocab_size"],
        "tokenizer": summary["tokenizer_fingerprint"],
    }
    wanted = {
        **resolved_model(current["model"]),
        "vocab_size": current["vocab_size"],
        "tokenizer": current["tokenizer_fingerprint"],
    }
    different = [
        _difference(name, saved.get(name), value)
        for name, value in wanted.items()
        if name not in _FREE_MODEL_FIELDS and saved.get(name) != value
    ]
    if different:
        raise UserError(
            f"{checkpoint} is of a different model or tokenizer: {', '.join(different)}; change the recipe, or {advice}"
        )


def check_run(checkpoint: Path, summary: dict[str, Any], current: dict[str, Any]) -> int:
    """Checks that the run can resume from a checkpoint; returns the index of the saved phase in the run's list.

    Args:
        summary: The checkpoint's `state.json`.
        current: `resume_fingerprint` of the run.

    Raises:
        UserError: the run does not have the phase, or differs in sequence length, attention across documents,
            precision, distributed optimizer, data order, segmenter or dictionary.
    """
    saved = summary["run"]
    if summary["phase"] not in current["phases"]:
        raise UserError(
            f"cannot resume from {checkpoint}: it was saved in phase {summary['phase']}, expected one of the recipe's "
            f"phases {', '.join(current['phases'])}; add the section {summary['phase']} to the recipe, or {NEW_RUN}"
        )
    # The attention span is as much a part of the trained model as its weights.
    different = [
        _difference(field, saved[name], current[name])
        for name, field in (
            ("seq_length", "data.seq_length"),
            ("reset_position_ids", "data.reset_position_ids"),
            ("reset_attention_mask", "data.reset_attention_mask"),
            ("precision", "training.precision"),
            ("use_distributed_optimizer", "parallel.use_distributed_optimizer"),
            # The layout of the optimizer's state depends on what is frozen; the heads have state of their own.
            ("freeze", "alignment.freeze"),
            ("projection", "alignment.projection_size and layers"),
        )
        if saved[name] != current[name]
    ]
    if different:
        raise UserError(
            f"cannot resume from {checkpoint} with this recipe: {', '.join(different)}; change the recipe, or "
            f"{NEW_RUN} and checkpoint.load to this checkpoint"
        )
    _check_order(checkpoint, summary, current)
    _check_budget(checkpoint, summary, current)
    if current["code_switch"]:
        _check_words(checkpoint, saved, current)
    return int(current["phases"].index(summary["phase"]))


def _check_order(checkpoint: Path, summary: dict[str, Any], current: dict[str, Any]) -> None:
    """Checks that the order of the data is unchanged."""
    saved = summary["run"]
    if saved["seed"] != current["seed"]:
        samples = summary["train_state"]["consumed_samples"]
        raise UserError(
            f"cannot resume from {checkpoint} with this recipe: "
            f"{_difference('training.seed', saved['seed'], current['seed'])}; the data order would change, repeating "
            f"or skipping samples after the first {samples:,}; change the recipe, or {NEW_RUN}"
        )


def _check_budget(checkpoint: Path, summary: dict[str, Any], current: dict[str, Any]) -> None:
    """Checks that the run is not shorter than what is done; logs a warning if its length changed."""
    saved, state = summary["run"], TrainState.from_dict(summary["train_state"])
    budget = current["budget"]
    done = {"alignment.train_iters": state.phase_step} if summary["phase"] == ALIGNMENT else {}
    if summary["phase"] == LANGUAGE_MODEL:
        samples = state.consumed_samples - state.phase_start_samples
        done = {
            "training.train_iters": state.phase_step,
            "training.train_tokens": state.phase_start_tokens + samples * current["seq_length"],
        }
    short = [
        f"{name} is {budget[name]:,}, but {used:,} are already done"
        for name, used in done.items()
        if budget[name] is not None and budget[name] < used
    ]
    if short:
        raise UserError(
            f"cannot resume from {checkpoint} with this recipe: {short[0]}; increase it, or write the name of an older "
            f"checkpoint to {checkpoint.parent / LATEST}"
        )
    changed = [
        f"{name} {saved['budget'].get(name)} -> {value}"
        for name, value in budget.items()
        if saved["budget"][name] != value and (name in done or not name.startswith(ALIGNMENT))
    ]
    if changed:
        warn_on_rank_zero(
            logger,
            "changed since %s was saved: %s; the number of steps and the learning-rate schedule are recomputed, the "
            "data continues at its saved position",
            checkpoint,
            ", ".join(changed),
        )


def _check_words(checkpoint: Path, saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Checks that the same words are switched: they depend on the segmenters and the dictionary."""
    segmenters = {source["key"]: source["segmenter"] for source in saved["sources"]}
    for source in current["sources"]:
        segmenter = segmenters.get(source["key"], source["segmenter"])
        if segmenter != source["segmenter"]:
            raise UserError(
                f"cannot resume from {checkpoint} with {source['path']}: its segmenter is "
                f"{source['segmenter'] or 'none'}, expected {segmenter or 'none'}; code-switching would replace "
                "different words; preprocess the text with the "
                f"original segmenter, or {NEW_RUN}"
            )
    before, now = saved["switching"], current["switching"]
    if before is None or now is None:
        # Trained without code-switching so far, or checked before the table was read (`pretrain --validate`).
        return
    if before["digest"] != now["digest"]:
        raise UserError(
            f"cannot resume from {checkpoint} with the dictionary table {now['table']}: the fingerprint of its words "
            "and "
            f"translations without the held-out ones is {now['digest']}, expected {before['digest']}; code-switching "
            f"would replace different words; restore the original dictionary.table and dictionary.held_out_fraction, "
            f"or {NEW_RUN}"
        )
    changed = [f"code_switch.{name}" for name, value in now["settings"].items() if before["settings"][name] != value]
    if changed:
        warn_on_rank_zero(
            logger,
            "%s changed since %s was saved: code-switching uses the new settings from here on",
            ", ".join(changed),
            checkpoint,
        )


def _difference(field: str, saved: Any, current: Any) -> str:
    shown = ("null" if value is None else value for value in (saved, current))
    return "{} {} (recipe: {})".format(field, *shown)
