"""What a run reads from disk: the tokenizer, the dictionary and the data, opened and checked."""

import logging
import os
from dataclasses import dataclass

from megatron_prealign.checkpoint.resume.identity import saved_coverage
from megatron_prealign.checkpoint.resume.start import FRESH, StartPoint
from megatron_prealign.data.samples import TrainPlan, TrainSamples, ValidationSamples
from megatron_prealign.dictionary.coverage import blend_coverage
from megatron_prealign.errors import UserError
from megatron_prealign.model.config import padded_vocab_size
from megatron_prealign.recipe import CodeSwitchSection, Recipe
from megatron_prealign.run.dictionary import DictionaryParts, SwitchingTable, open_dictionary
from megatron_prealign.runtime.agreement import from_rank_zero, on_every_rank
from megatron_prealign.tokenizer.base import Tokenizer
from megatron_prealign.tokenizer.load import load_tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The tokenizer and the number of ids the model has for it."""

    tokenizer: Tokenizer
    size: int
    """True number of ids."""
    padded_size: int
    """Rows of the embedding, a multiple that tensor parallelism needs."""


@dataclass(frozen=True, eq=False)
class RunInputs:
    """What a run reads from disk, opened and checked."""

    vocabulary: Vocabulary
    dictionary: DictionaryParts | None
    coverage: dict[str, float] | None
    """Share of running words of each language that code-switching knows; None where the ratio does not ask for it."""
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


def open_inputs(recipe: Recipe, start: StartPoint = FRESH) -> RunInputs:
    """Opens everything a run reads. Takes part: all ranks; one rank per node builds the sample index, rank 0 measures
    the coverage of the dictionary.

    Args:
        start: Where the run starts, which decides what has been read.

    Raises:
        UserError: anything is missing, damaged or does not fit together; raised on all ranks.
    """
    vocabulary, dictionary, validation, plan = on_every_rank("opening the data", lambda: _open_files(recipe, start))
    is_builder = int(os.environ.get("LOCAL_RANK", "0")) == 0
    on_every_rank("building the sample index", lambda: is_builder and plan.write_index())
    train = on_every_rank("opening the sample index", plan.open)
    section, coverage = recipe.code_switch, None
    if section is not None and section.ratio_of == "words":
        assert dictionary is not None and dictionary.switching is not None
        switching = dictionary.switching
        coverage = from_rank_zero("measuring the known words", lambda: _words_known(recipe, section, switching, start))
    return RunInputs(vocabulary, dictionary, coverage, train, validation)


def _open_files(
    recipe: Recipe, start: StartPoint
) -> tuple[Vocabulary, DictionaryParts | None, ValidationSamples, TrainPlan]:
    """What each rank opens by itself."""
    vocabulary = open_vocabulary(recipe)
    dictionary = open_dictionary(recipe, vocabulary.tokenizer.fingerprint)
    validation = open_validation(recipe, vocabulary)
    plan = open_plan(recipe, vocabulary, start)
    return vocabulary, dictionary, validation, plan


def _words_known(
    recipe: Recipe, section: CodeSwitchSection, switching: SwitchingTable, start: StartPoint
) -> dict[str, float]:
    """Share of running words of each language that code-switching knows: that of the checkpoint that the run resumes
    from, so that no threshold moves, or else measured on the data."""
    coverage = None if start.summary is None else saved_coverage(start.summary, section, switching.digest)
    source = "from the checkpoint"
    if coverage is None:
        coverage = blend_coverage(switching.table, recipe.data.sources)
        source = "measured"
    shares = ", ".join(f"{name} {share:.1%}" for name, share in coverage.items())
    logger.info("known running words, %s: %s", source, shares)
    return coverage


def open_plan(recipe: Recipe, vocabulary: Vocabulary, start: StartPoint = FRESH) -> TrainPlan:
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


def num_samples(recipe: Recipe, start: StartPoint = FRESH) -> int:
    """Samples of the blend that all phases together can consume."""
    state, phases = start.state, recipe.phases
    budget, seq_length = recipe.training.train_tokens, recipe.data.seq_length
    left = 0
    if budget is not None:
        # Samples of the alignment phase count towards the same total.
        planned = -(-budget // seq_length)
        if state is not None:
            left = -(-(budget - state.tokens) // seq_length)
    else:
        planned = sum((phase.train_iters or 0) * phase.samples for phase in phases)
        names = [phase.name for phase in phases]
        if state is not None and start.phase in names:
            to_come = phases[names.index(start.phase) :]
            left = sum((phase.train_iters or 0) * phase.samples for phase in to_come)
            left -= state.phase_step * to_come[0].samples
    # Samples that were consumed in batches of another size stay consumed.
    return planned if state is None else max(planned, state.consumed_samples + left)
