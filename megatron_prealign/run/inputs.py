"""What a run reads from disk: the tokenizer, the dictionary and the data, opened and checked."""

import os
from dataclasses import dataclass

import numpy as np

from megatron_prealign.checkpoint.resume.start import FRESH, Start
from megatron_prealign.data.samples import TrainPlan, TrainSamples, ValidationSamples
from megatron_prealign.dictionary.table import DictionaryTable, load_table
from megatron_prealign.errors import UserError
from megatron_prealign.model.config import padded_vocab_size
from megatron_prealign.recipe import Recipe
from megatron_prealign.runtime.agreement import on_every_rank
from megatron_prealign.tokenizer.base import Tokenizer
from megatron_prealign.tokenizer.load import load_tokenizer


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The tokenizer and the number of ids the model has for it."""

    tokenizer: Tokenizer
    size: int
    """True number of ids."""
    padded_size: int
    """Rows of the embedding, a multiple that tensor parallelism needs."""


@dataclass(frozen=True, eq=False)
class Dictionary:
    """The word table and the groups kept out of training."""

    table: DictionaryTable
    held_out: np.ndarray
    """bool `[groups]`."""


@dataclass(frozen=True, eq=False)
class Materials:
    """What a run reads from disk, opened and checked."""

    vocabulary: Vocabulary
    dictionary: Dictionary | None
    train: TrainSamples
    validation: ValidationSamples


def open_vocabulary(recipe: Recipe) -> Vocabulary:
    """Opens the tokenizer.

    Raises:
        UserError: it is missing or damaged, or has more ids than the model.
    """
    tokenizer = load_tokenizer(recipe.data.tokenizer)
    size = recipe.model.vocab_size or tokenizer.vocab_size
    if size < tokenizer.vocab_size:
        raise UserError(
            f"model.vocab_size is {size}, but the tokenizer {recipe.data.tokenizer} has "
            f"{tokenizer.vocab_size} ids; raise it or leave it out"
        )
    padded = padded_vocab_size(
        size, recipe.model.make_vocab_size_divisible_by, recipe.parallel.tensor_model_parallel_size
    )
    return Vocabulary(tokenizer, size, padded)


def open_dictionary(recipe: Recipe, vocabulary: Vocabulary) -> Dictionary | None:
    """Opens the recipe's table, if it names one.

    Raises:
        UserError: it is missing, damaged or of another tokenizer.
    """
    if recipe.dictionary is None:
        return None
    table = load_table(recipe.dictionary.table)
    table.check_tokenizer(vocabulary.tokenizer.fingerprint)
    return Dictionary(table, table.held_out_groups(recipe.dictionary.held_out_fraction))


def open_validation(recipe: Recipe, vocabulary: Vocabulary) -> ValidationSamples:
    """Opens the held-out text of every language.

    Raises:
        UserError: a dataset is missing, damaged or does not fit.
    """
    return ValidationSamples.build(
        recipe.data,
        languages=recipe.data.languages,
        max_samples=recipe.training.eval_samples,
        vocab_size=vocabulary.size,
        tokenizer_fingerprint=vocabulary.tokenizer.fingerprint,
    )


def open_materials(recipe: Recipe, start: Start = FRESH) -> Materials:
    """Opens everything a run reads. Takes part: all ranks; one rank per node builds the sample index.

    Args:
        start: Where the run starts, which decides what has been read.

    Raises:
        UserError: anything is missing, damaged or does not fit together; raised on all ranks.
    """
    vocabulary, dictionary, validation, plan = on_every_rank("opening the data", lambda: _open_files(recipe, start))
    is_builder = int(os.environ.get("LOCAL_RANK", "0")) == 0
    on_every_rank("building the sample index", lambda: is_builder and plan.write_index())
    train = on_every_rank("opening the sample index", plan.open)
    return Materials(vocabulary, dictionary, train, validation)


def _open_files(recipe: Recipe, start: Start) -> tuple[Vocabulary, Dictionary | None, ValidationSamples, TrainPlan]:
    """What each rank opens by itself."""
    vocabulary = open_vocabulary(recipe)
    dictionary = open_dictionary(recipe, vocabulary)
    validation = open_validation(recipe, vocabulary)
    plan = open_plan(recipe, vocabulary, start)
    return vocabulary, dictionary, validation, plan


def open_plan(recipe: Recipe, vocabulary: Vocabulary, start: Start = FRESH) -> TrainPlan:
    """Opens the training data and says where its sample index belongs, which need not be there yet.

    Raises:
        UserError: a dataset is missing, damaged, too small, does not fit or is not what it was when it was saved.
    """
    return TrainPlan.read(
        recipe.data,
        num_samples=num_samples(recipe, start),
        seed=recipe.training.seed,
        languages=recipe.data.languages,
        cache_dir=recipe.cache_dir,
        vocab_size=vocabulary.size,
        tokenizer_fingerprint=vocabulary.tokenizer.fingerprint,
        lookahead=lookahead_tokens(recipe),
        saved=start.blend,
    )


def lookahead_tokens(recipe: Recipe) -> int:
    """Tokens that are read beyond each sample."""
    return recipe.code_switch.lookahead_tokens(recipe.data.seq_length) if recipe.code_switch is not None else 0


def num_samples(recipe: Recipe, start: Start = FRESH) -> int:
    """Rows of the blend that all phases together can consume."""
    training, alignment = recipe.training, recipe.alignment
    seq_length = recipe.data.seq_length
    state = start.state
    if training.train_tokens is not None:
        # Rows of the alignment phase count towards the same total.
        planned = -(-training.train_tokens // seq_length)
        left = 0 if state is None else -(-(training.train_tokens - state.tokens) // seq_length)
    else:
        assert training.train_iters is not None
        steps = {"alignment": 0 if alignment is None else alignment.train_iters, "language_model": training.train_iters}
        rows = {
            "alignment": 0 if alignment is None else alignment.lm_global_batch_size,
            "language_model": training.global_batch_size,
        }
        planned = sum(steps[phase] * rows[phase] for phase in steps)
        left = 0
        if state is not None:
            to_come = list(steps)[list(steps).index(start.phase) :] if start.phase in steps else []
            left = sum(steps[phase] * rows[phase] for phase in to_come)
            left -= state.phase_step * rows[to_come[0]] if to_come else 0
    # Rows that were consumed in batches of another size stay consumed.
    return planned if state is None else max(planned, state.consumed_samples + left)
