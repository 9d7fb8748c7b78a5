"""What a run and its checkpoint must agree on, so that going on repeats nothing and skips nothing."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from megatron_prealign.checkpoint.directory import LATEST
from megatron_prealign.checkpoint.state import STATE, is_run, read_state
from megatron_prealign.checkpoint.train_state import TrainState
from megatron_prealign.data.blend import SavedBlend
from megatron_prealign.errors import UserError
from megatron_prealign.recipe import ALIGNMENT, LANGUAGE_MODEL, CodeSwitchSection, Recipe
from megatron_prealign.runtime.log import warn_once

logger = logging.getLogger(__name__)

# What only says how to compute or how to lay out does not have to agree.
_FREE_MODEL_FIELDS = {
    "hidden_dropout",
    "attention_dropout",
    "transformer_impl",
    "make_vocab_size_divisible_by",
    "init_method_std",
    "recompute_granularity",
    "recompute_num_layers",
}
# Fields of code_switch that choose the words which code-switching knows, and so the share of them in the data.
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
_NEW_RUN = "set checkpoint.directory (or logging.run_dir) to a new directory"
OTHER_WEIGHTS = "name another checkpoint in checkpoint.load"
"""What to do about weights that were only to be loaded."""


def resume_fingerprint(
    recipe: Recipe,
    *,
    num_samples: int,
    keys: Sequence[int],
    segmenters: Sequence[str | None],
    switching: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """What decides a run's course besides its model and its blend, as plain values for `state.json`.

    Args:
        num_samples: Rows of the whole run.
        keys: The number of each source in the run's blend.
        segmenters: Who marked the words of each source, as its sidecar says.
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
    """Which projection heads there are."""
    section = recipe.alignment
    if section is None or section.projection_size is None:
        return None
    weights = section.layer_weights(recipe.model.num_layers)
    return {"size": section.projection_size, "layers": [layer for layer, weight in enumerate(weights) if weight]}


def code_switch_fingerprint(
    table: str, section: CodeSwitchSection, *, digest: str, coverage: Mapping[str, float] | None
) -> dict[str, Any]:
    """What decides which words are switched, as plain values.

    Args:
        table: The dictionary's file.
        digest: Of the table without the held-out groups (`DictionaryTable.switching_digest`).
        coverage: Share of running words that the table knows, per language; None where the ratio does not ask for it.
    """
    return {
        "table": table,
        "digest": digest,
        "settings": asdict(section),
        "coverage": None if coverage is None else dict(coverage),
    }


def find_switching_problem(run: dict[str, Any]) -> str | None:
    """What is wrong with the facts of a damaged checkpoint, in words; None when all is well or there are none."""
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
        return f"run.switching.settings lacks {', '.join(missing)}"
    for language, share in (switching["coverage"] or {}).items():
        if not isinstance(share, int | float) or not 0 <= share <= 1:
            return f"run.switching.coverage.{language} is {share!r}, expected a number from 0 to 1"
    return None


def read_run(checkpoint: Path) -> dict[str, Any]:
    """The `state.json` of a checkpoint that a run can go on from.

    Raises:
        UserError: the file is damaged, or the checkpoint holds weights alone.
    """
    summary = read_state(checkpoint)
    if not is_run(summary):
        raise UserError(
            f"{checkpoint} holds weights alone, a run cannot go on from it; name it in checkpoint.load, with "
            "checkpoint.load_parts weights"
        )
    try:
        _check_facts(summary["run"])
        TrainState.from_dict(summary["train_state"])
        SavedBlend.from_state(checkpoint, summary)
    except ValueError as error:
        raise UserError(f"{checkpoint / STATE} is damaged ({error}); use another checkpoint") from error
    return summary


def _check_facts(run: dict[str, Any]) -> None:
    missing = [name for name in _RUN_FIELDS if name not in run]
    if missing:
        raise ValueError(f"run lacks {', '.join(missing)}")
    if not isinstance(run["budget"], dict) or not run["budget"].keys() >= _BUDGET_FIELDS:
        raise ValueError(f"run.budget is {run['budget']!r}, expected {', '.join(sorted(_BUDGET_FIELDS))}")
    for source in run["sources"]:
        if not isinstance(source, dict) or not source.keys() >= _SOURCE_FIELDS:
            raise ValueError(f"run.sources holds {source!r}, expected {', '.join(sorted(_SOURCE_FIELDS))}")
    problem = find_switching_problem(run)
    if problem:
        raise ValueError(problem)


def saved_coverage(summary: dict[str, Any], section: CodeSwitchSection, digest: str) -> dict[str, float] | None:
    """The coverage that a checkpoint was trained with; None where it has none, or one of other words.

    Args:
        summary: The checkpoint's `state.json`.
        section: The recipe's section now.
        digest: Of the table now.
    """
    saved = summary["run"]["switching"]
    if saved is None or saved["digest"] != digest:
        return None
    before, now = saved["settings"], asdict(section)
    same = all(before[name] == now[name] for name in _WORD_FIELDS)
    # A language that is never drawn takes the words along that have translations in it alone.
    same &= set(before["language_weights"]) == set(section.language_weights)
    return saved["coverage"] if same else None


def check_model(checkpoint: Path, summary: dict[str, Any], mine: dict[str, Any], *, advice: str = _NEW_RUN) -> None:
    """Checks that the weights fit.

    Args:
        summary: The checkpoint's `state.json`.
        mine: The run's `vocab_size`, `tokenizer_fingerprint` and `model`.
        advice: What else to do than to change the recipe.

    Raises:
        UserError: they are of another model or tokenizer.
    """
    saved = {**summary["model"], "vocab_size": summary["vocab_size"], "tokenizer": summary["tokenizer_fingerprint"]}
    wanted = {**mine["model"], "vocab_size": mine["vocab_size"], "tokenizer": mine["tokenizer_fingerprint"]}
    different = [
        f"{name} {saved.get(name)} (recipe: {value})"
        for name, value in wanted.items()
        if name not in _FREE_MODEL_FIELDS and saved.get(name) != value
    ]
    if different:
        raise UserError(f"{checkpoint} is of another model: {', '.join(different)}; make the recipe agree, or {advice}")


def check_run(checkpoint: Path, summary: dict[str, Any], mine: dict[str, Any]) -> int:
    """Checks that the run can go on from the checkpoint; returns the number of the saved phase in the run's list.

    Args:
        summary: The checkpoint's `state.json`.
        mine: `resume_fingerprint` of the run that wants to go on.

    Raises:
        UserError: the phase is not in the run, or another sequence length, way to keep documents apart, precision,
            kind of optimizer, order of the data, segmenter or dictionary.
    """
    saved = summary["run"]
    if summary["phase"] not in mine["phases"]:
        raise UserError(
            f"{checkpoint} was saved in phase {summary['phase']}, which the recipe does not have (it has "
            f"{', '.join(mine['phases'])}); give the recipe its section {summary['phase']} again, or {_NEW_RUN}"
        )
    # What a position sees is as much a part of the trained model as its weights.
    state = [
        _difference(field, saved[name], mine[name])
        for name, field in (
            ("seq_length", "data.seq_length"),
            ("reset_position_ids", "data.reset_position_ids"),
            ("reset_attention_mask", "data.reset_attention_mask"),
            ("precision", "training.precision"),
            ("use_distributed_optimizer", "parallel.use_distributed_optimizer"),
            # The optimizer's state is laid out by what is frozen, and the heads' is saved beside it.
            ("freeze", "alignment.freeze"),
            ("projection", "alignment.projection_size and layers"),
        )
        if saved[name] != mine[name]
    ]
    if state:
        raise UserError(
            f"{checkpoint} cannot go on with this recipe: {', '.join(state)}; make the recipe agree, or {_NEW_RUN} and "
            "checkpoint.load to this one"
        )
    _check_order(checkpoint, summary, mine)
    _check_budget(checkpoint, summary, mine)
    if mine["code_switch"]:
        _check_words(checkpoint, saved, mine)
    return int(mine["phases"].index(summary["phase"]))


def _check_order(checkpoint: Path, summary: dict[str, Any], mine: dict[str, Any]) -> None:
    saved = summary["run"]
    if saved["seed"] != mine["seed"]:
        rows = summary["train_state"]["consumed_samples"]
        raise UserError(
            f"{checkpoint} cannot go on with this recipe, the order of the data would change and rows be repeated or "
            f"skipped after the first {rows:,}: {_difference('training.seed', saved['seed'], mine['seed'])}; make the "
            f"recipe agree, or {_NEW_RUN}"
        )


def _check_budget(checkpoint: Path, summary: dict[str, Any], mine: dict[str, Any]) -> None:
    """A run may become longer or shorter, but not shorter than it is."""
    saved, state = summary["run"], TrainState.from_dict(summary["train_state"])
    budget = mine["budget"]
    done = {"alignment.train_iters": state.phase_step} if summary["phase"] == ALIGNMENT else {}
    if summary["phase"] == LANGUAGE_MODEL:
        rows = state.consumed_samples - state.phase_start_samples
        done = {
            "training.train_iters": state.phase_step,
            "training.train_tokens": state.phase_start_tokens + rows * mine["seq_length"],
        }
    short = [
        f"{name} is {budget[name]:,}, of which {used:,} are done"
        for name, used in done.items()
        if budget[name] is not None and budget[name] < used
    ]
    if short:
        raise UserError(
            f"{checkpoint} cannot go on with this recipe: {short[0]}; raise it, or name an older checkpoint in "
            f"{checkpoint.parent / LATEST}"
        )
    changed = [
        f"{name} {saved['budget'].get(name)} -> {value}"
        for name, value in budget.items()
        if saved["budget"][name] != value and (name in done or not name.startswith(ALIGNMENT))
    ]
    if changed:
        warn_once(
            logger,
            "%s since %s was saved: steps and the learning-rate schedule are counted anew, data goes on where it stood",
            ", ".join(changed),
            checkpoint,
        )


def _check_words(checkpoint: Path, saved: dict[str, Any], mine: dict[str, Any]) -> None:
    """Another segmenter finds other words in the same tokens, and another dictionary knows others."""
    segmenters = {source["key"]: source["segmenter"] for source in saved["sources"]}
    for now in mine["sources"]:
        segmenter = segmenters.get(now["key"], now["segmenter"])
        if segmenter != now["segmenter"]:
            raise UserError(
                f"{checkpoint} cannot go on with {now['path']}, in which other words would be switched: its segmenter "
                f"was {segmenter or 'none'}, now it is {now['segmenter'] or 'none'}; preprocess the text as it was, or "
                f"{_NEW_RUN}"
            )
    before, now = saved["switching"], mine["switching"]
    if before is None or now is None:
        # Trained without code-switching so far, or checked before the table was read (`pretrain --validate`).
        return
    if before["digest"] != now["digest"]:
        raise UserError(
            f"{checkpoint} cannot go on with the dictionary table {now['table']}, with which other words would be "
            f"switched: the digest of its words and translations without the held-out ones was {before['digest']}, now "
            f"it is {now['digest']}; give dictionary.table and dictionary.held_out_fraction as they were, or {_NEW_RUN}"
        )
    changed = [f"code_switch.{name}" for name, value in now["settings"].items() if before["settings"][name] != value]
    if changed:
        warn_once(
            logger,
            "%s changed since %s was saved: words are switched otherwise from here on",
            ", ".join(changed),
            checkpoint,
        )


def _difference(field: str, saved: Any, mine: Any) -> str:
    return f"{field} {saved} (recipe: {mine})"
