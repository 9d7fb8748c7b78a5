"""Opens and checks what a run reads from disk: tokenizer, dictionary and data."""

import logging
import os
from dataclasses import dataclass

from megatron_prealign.checkpoint.resume.identity import saved_coverage
from megatron_prealign.checkpoint.resume.start import FRESH, StartPoint
from megatron_prealign.data.samples import TrainPlan, TrainSamples, ValidationSamples
from megatron_prealign.dictionary.coverage import blend_coverage
from megatron_prealign.evaluation.parallel_text import SentencePairs, open_parallel_text
from megatron_prealign.evaluation.word_classes import WordClasses, word_classes
from megatron_prealign.model.sizes import padded_vocab_size
from megatron_prealign.recipe import CodeSwitchSection, Recipe
from megatron_prealign.run.dictionary import DictionaryParts, SwitchingTable, open_dictionary
from megatron_prealign.run.vocabulary import model_vocab_size
from megatron_prealign.runtime.agreement import from_rank_zero, on_every_rank
from megatron_prealign.tokenizer.base import Tokenizer
from megatron_prealign.tokenizer.load import load_tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Tokenizer and the vocabulary sizes of the model."""

    tokenizer: Tokenizer
    size: int
    """Number of ids without padding."""
    padded_size: int
    """Number of embedding rows, padded to the multiple that tensor parallelism needs."""


@dataclass(frozen=True, eq=False)
class RunInputs:
    """Inputs of a run, opened and checked."""

    vocabulary: Vocabulary
    dictionary: DictionaryParts | None
    coverage: dict[str, float] | None
    """Language -> fraction of running words that the table covers; None unless the ratio is relative to words."""
    train: TrainSamples
    validation: ValidationSamples
    sentences: list[SentencePairs]
    """Of data.parallel_text."""
    classes: WordClasses
    """Of the tokens of the validation data."""


def open_vocabulary(recipe: Recipe) -> Vocabulary:
    """Opens the tokenizer.

    Raises:
        UserError: The tokenizer is missing or corrupt, or has more ids than the model.
    """
    tokenizer = load_tokenizer(recipe.data.tokenizer)
    size = model_vocab_size(recipe, tokenizer)
    padded = padded_vocab_size(
        size, recipe.model.make_vocab_size_divisible_by, recipe.parallel.tensor_model_parallel_size
    )
    return Vocabulary(tokenizer, size, padded)


def open_validation(recipe: Recipe, vocabulary: Vocabulary) -> ValidationSamples:
    """Opens the validation data of every language.

    Raises:
        UserError: A dataset is missing, corrupt or incompatible with the recipe.
    """
    return ValidationSamples.build(
        recipe.data,
        languages=recipe.data.languages,
        max_samples=recipe.training.eval_samples,
        vocab_size=vocabulary.size,
        tokenizer_fingerprint=vocabulary.tokenizer.fingerprint,
    )


def open_sentences(recipe: Recipe, vocabulary: Vocabulary) -> list[SentencePairs]:
    """Opens the parallel text.

    Raises:
        UserError: A dataset is missing, corrupt or incompatible with the recipe, or two are not parallel.
    """
    return open_parallel_text(recipe, tokenizer_fingerprint=vocabulary.tokenizer.fingerprint)


def open_inputs(recipe: Recipe, start: StartPoint = FRESH) -> RunInputs:
    """Opens all inputs of a run. Collective: call on all ranks.

    One rank per node builds the sample index; rank 0 measures the coverage of the dictionary.

    Args:
        start: Where the run starts, which determines the samples already consumed.

    Raises:
        UserError: An input is missing, corrupt or incompatible with the others; raised on all ranks.
    """
    vocabulary, dictionary, validation, sentences, classes, plan = on_every_rank(
        "opening the data", lambda: _open_files(recipe, start)
    )
    is_builder = int(os.environ.get("LOCAL_RANK", "0")) == 0
    on_every_rank("building the sample index", lambda: is_builder and plan.write_index())
    train = on_every_rank("opening the sample index", plan.open)
    section, coverage = recipe.code_switch, None
    if section is not None and section.ratio_of == "words":
        assert dictionary is not None and dictionary.switching is not None
        switching = dictionary.switching
        coverage = from_rank_zero(
            "measuring dictionary coverage", lambda: _dictionary_coverage(recipe, section, switching, start)
        )
    return RunInputs(vocabulary, dictionary, coverage, train, validation, sentences, classes)


def _open_files(
    recipe: Recipe, start: StartPoint
) -> tuple[Vocabulary, DictionaryParts | None, ValidationSamples, list[SentencePairs], WordClasses, TrainPlan]:
    """Opens what every rank opens on its own."""
    vocabulary = open_vocabulary(recipe)
    dictionary = open_dictionary(recipe, vocabulary.tokenizer.fingerprint)
    validation = open_validation(recipe, vocabulary)
    sentences = open_sentences(recipe, vocabulary)
    classes = word_classes(recipe, None if dictionary is None else dictionary.measured, vocabulary.tokenizer)
    plan = open_plan(recipe, vocabulary, start)
    return vocabulary, dictionary, validation, sentences, classes, plan


def _dictionary_coverage(
    recipe: Recipe, section: CodeSwitchSection, switching: SwitchingTable, start: StartPoint
) -> dict[str, float]:
    """Returns the fraction of running words that the table covers, per language.

    The value saved in the checkpoint that the run resumes from takes precedence, so that no threshold changes;
    otherwise it is measured on the data.
    """
    coverage = None if start.summary is None else saved_coverage(start.summary, section, switching.fingerprint)
    source = "from the checkpoint"
    if coverage is None:
        coverage = blend_coverage(switching.table, recipe.data.sources)
        source = "measured"
    fractions = ", ".join(f"{name} {fraction:.1%}" for name, fraction in coverage.items())
    logger.info("dictionary coverage of running words (%s): %s", source, fractions)
    return coverage


def open_plan(recipe: Recipe, vocabulary: Vocabulary, start: StartPoint = FRESH) -> TrainPlan:
    """Opens the training data and determines the path of its sample index, which need not exist yet.

    Raises:
        UserError: A dataset is missing, corrupt, too small, incompatible with the recipe or changed since the
            checkpoint was saved.
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
    """Number of tokens read beyond the end of each sample."""
    return recipe.code_switch.lookahead_tokens(recipe.data.seq_length) if recipe.code_switch is not None else 0


def num_samples(recipe: Recipe, start: StartPoint = FRESH) -> int:
    """Number of samples of the blend that all phases together can consume."""
    state, phases = start.state, recipe.phases
    budget, seq_length = recipe.training.train_tokens, recipe.data.seq_length
    remaining = 0
    if budget is not None:
        # Samples of the alignment phase count towards the same budget.
        planned = -(-budget // seq_length)
        if state is not None:
            remaining = -(-(budget - state.tokens) // seq_length)
    else:
        planned = sum((phase.train_iters or 0) * phase.samples for phase in phases)
        names = [phase.name for phase in phases]
        if state is not None and start.phase in names:
            later = phases[names.index(start.phase) :]
            remaining = sum((phase.train_iters or 0) * phase.samples for phase in later)
            remaining -= state.phase_step * later[0].samples
    # Samples consumed with another batch size stay consumed.
    return planned if state is None else max(planned, state.consumed_samples + remaining)
