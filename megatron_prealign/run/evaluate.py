"""Evaluates trained runs from their checkpoints and writes the report. The command `evaluate` calls
`evaluate_runs()`."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_prealign.checkpoint.commit import RECIPE_FILE
from megatron_prealign.checkpoint.directory import resolve_checkpoint
from megatron_prealign.checkpoint.resume.agree import require_intact
from megatron_prealign.checkpoint.resume.identity import read_run
from megatron_prealign.checkpoint.resume.load import load_weights
from megatron_prealign.checkpoint.state import is_control
from megatron_prealign.dictionary.table import DictionaryTable
from megatron_prealign.evaluation.evaluator import Evaluator
from megatron_prealign.evaluation.parallel_text import measured_pairs
from megatron_prealign.evaluation.report import write_report
from megatron_prealign.evaluation.run_record import Measurement, load_run
from megatron_prealign.evaluation.word_classes import word_classes
from megatron_prealign.model.build import build_model
from megatron_prealign.recipe import ParallelSection, Recipe, load_recipe
from megatron_prealign.recipe.load import as_user_error
from megatron_prealign.run.dictionary import load_measured
from megatron_prealign.run.inputs import Vocabulary, open_sentences, open_validation, open_vocabulary
from megatron_prealign.run.pretrain import build_sequence_format, identity_of_model
from megatron_prealign.runtime.agreement import on_every_rank
from megatron_prealign.runtime.distributed import running

logger = logging.getLogger(__name__)


def evaluate_runs(
    runs: Mapping[str, Path], output: Path, parallel: ParallelSection, *, leave_process_group: bool = False
) -> dict[str, Any] | None:
    """Evaluates each run's newest checkpoint and writes report.json, report.html and report.png into `output`.

    Collective: call on all ranks. Rank 0 returns the report, the others None.

    Args:
        runs: Name in the report -> run directory.
        parallel: Layout to evaluate in; it may differ from the training layout.
        leave_process_group: Keep torch's process group, which the caller started.

    Raises:
        UserError: A run, its checkpoint or its data is missing or corrupt.
    """
    # Evaluation takes minutes per run, so missing files of any run are reported before it starts.
    records = {name: load_run(directory) for name, directory in runs.items()}
    checkpoints = {name: _find_checkpoint(directory, parallel) for name, directory in runs.items()}
    measurements, rank = {}, 0
    for number, (name, (checkpoint, recipe)) in enumerate(checkpoints.items()):
        last = number + 1 == len(runs)
        measurements[name], rank = _measure(checkpoint, recipe, leave_process_group=leave_process_group or not last)
    if rank:
        return None
    return write_report({name: (records[name], measurements[name]) for name in runs}, output)


def _find_checkpoint(directory: Path, parallel: ParallelSection) -> tuple[Path, Recipe]:
    """Returns the run's newest checkpoint and its recipe in the layout `parallel`."""
    checkpoint = resolve_checkpoint(directory)
    saved = load_recipe(["--config", str(checkpoint / RECIPE_FILE)])
    with as_user_error(f"{directory}: cannot evaluate in this layout"):
        return checkpoint, replace(saved, parallel=parallel)


def _load_dictionary(recipe: Recipe, vocabulary: Vocabulary) -> tuple[DictionaryTable, NDArray[np.bool_]] | None:
    """Dictionary table and mask of its held-out groups; None without a dictionary."""
    if recipe.dictionary is None:
        return None
    return load_measured(recipe.dictionary, vocabulary.tokenizer.fingerprint)


def _measure(checkpoint: Path, recipe: Recipe, *, leave_process_group: bool) -> tuple[Measurement, int]:
    """Evaluates one run; returns the measurement and this process's rank. Collective: call on all ranks.

    The number of processes need not divide the training batch sizes, since no training batch is built here.
    """
    with running(recipe.parallel, seed=recipe.training.seed, leave_process_group=leave_process_group) as runtime:
        vocabulary = on_every_rank("opening the tokenizer", lambda: open_vocabulary(recipe))
        dictionary = on_every_rank("opening the dictionary", lambda: _load_dictionary(recipe, vocabulary))
        validation = on_every_rank("opening the data", lambda: open_validation(recipe, vocabulary))
        classes = on_every_rank(
            "classifying the validation data", lambda: word_classes(recipe, dictionary, vocabulary.tokenizer)
        )
        sentences = on_every_rank("opening the parallel text", lambda: open_sentences(recipe, vocabulary))
        build = partial(build_model, recipe, runtime, vocab_size=vocabulary.size)
        models = on_every_rank("building the model", build)
        require_intact(checkpoint, recipe.checkpoint)
        identity = identity_of_model(recipe, vocabulary)
        on_every_rank("loading weights", lambda: load_weights(models, None, checkpoint, identity=identity))
        logger.info("evaluating %s", checkpoint)
        evaluator = Evaluator(
            recipe,
            runtime,
            validation,
            build_sequence_format(recipe, vocabulary),
            dictionary,
            measured_pairs(sentences),
            classes,
        )
        result = evaluator.measure(models)
        run = read_run(checkpoint)
        state = run["train_state"]
        measured = Measurement(
            **result,
            tokens=state["tokens"],
            seconds=state["seconds"],
            shuffled_dictionary=is_control(run["run"]),
            word_shares={language: classes.shares(language) for language in classes.labels},
        )
        return measured, runtime.rank
