"""Summary of a run before its first step: model, layout, tokens, passes over the sources, checkpoints, memory. Imports
no torch, so that `pretrain --validate` prints what a run logs when it starts."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_prealign.checkpoint.directory import directory_bytes, step_directories
from megatron_prealign.dictionary.word_coverage import word_coverage
from megatron_prealign.evaluation.parallel_text import SentencePairs
from megatron_prealign.evaluation.word_classes import CLASS_TEXTS, WordClasses
from megatron_prealign.model.sizes import count_model_parameters, count_stage_parameters, padded_vocab_size
from megatron_prealign.recipe import Recipe
from megatron_prealign.resources import machine_memory
from megatron_prealign.run.dictionary import DictionaryParts
from megatron_prealign.run.plan import (
    MANY_PASSES,
    PhaseLength,
    SourcePasses,
    SourceTokens,
    dictionary_passes,
    passes,
    phase_lengths,
    tokens_per_word,
)
from megatron_prealign.run.requirements import (
    Memory,
    SavedSteps,
    checkpoint_bytes,
    free_disk_bytes,
    most_checkpoints,
    process_memory,
)
from megatron_prealign.text import align_left, plural, readable_bytes
from megatron_prealign.tokenizer.base import Tokenizer

LITTLE_COVERAGE = 0.1
"""Share of running words below which a summary warns; far below the 0.8 to 0.96 that the examples' lists reach in
English."""


@dataclass(frozen=True)
class Summary:
    """Text of a summary."""

    rows: list[tuple[str, str]]
    """Label and text."""
    warnings: list[str]

    def lines(self) -> list[str]:
        return align_left(self.rows)


def summarise(
    recipe: Recipe,
    *,
    vocab_size: int,
    sources: Sequence[SourceTokens],
    dictionary: DictionaryParts | None,
    coverage: Mapping[str, float] | None = None,
    sentences: Sequence[SentencePairs] = (),
    classes: WordClasses | None = None,
    world_size: int | None = None,
    on_cpu: bool = False,
) -> Summary:
    """Summarises a run.

    Args:
        vocab_size: Number of ids of the model, without padding.
        sources: Sources of the training blend, in the recipe's order.
        coverage: Result of `measure_word_coverage`; None if it was not measured.
        sentences: Parallel text of the recipe.
        classes: Classes of the tokens of the validation data; None leaves them out.
        world_size: Number of processes; None assumes the smallest number that the layout needs.
        on_cpu: Whether the processes keep their state in the memory of this machine.
    """
    tensor = recipe.parallel.tensor_model_parallel_size
    padded = padded_vocab_size(vocab_size, recipe.model.make_vocab_size_divisible_by, tensor)
    seq_length = recipe.data.seq_length
    parameters = count_model_parameters(recipe.model, padded_vocab_size=padded, seq_length=seq_length)
    stages = count_stage_parameters(recipe.model, recipe.parallel, padded_vocab_size=padded, seq_length=seq_length)
    lengths = phase_lengths(recipe, tokens_per_word(dictionary))
    read = passes(lengths, sources, seq_length)
    checkpoints, disk_warnings = _checkpoints(recipe, parameters, lengths)
    model, model_parallel = recipe.model, recipe.parallel.model_parallel_size
    size = world_size or model_parallel
    memory = process_memory(recipe, max(stages), size // model_parallel)
    rows = [
        (
            "model",
            f"{parameters:,} parameters: {model.family}, {plural(model.num_layers, 'block')} of width "
            f"{model.hidden_size:,}, vocabulary {vocab_size:,} (padded to {padded:,})",
        ),
        ("processes", _layout(recipe, parameters, stages, world_size)),
        ("training", _training(recipe, lengths)),
        *_dictionary(recipe, dictionary, coverage),
        *(("source", _source(each)) for each in read),
        *_held_out_text(classes),
        *(("sentences", _sentences(each)) for each in sentences),
        ("checkpoints", checkpoints),
        ("memory", _memory(memory)),
    ]
    warnings = [
        *_shuffled(recipe, dictionary),
        *_few_passes(recipe, dictionary),
        *_little_coverage(recipe, dictionary, coverage),
        *_repeated(read),
        *_no_sentences(sentences),
        *disk_warnings,
    ]
    return Summary(rows, [*warnings, *(_too_little_memory(memory, size) if on_cpu else [])])


def _layout(recipe: Recipe, parameters: int, stages: Sequence[int], world_size: int | None) -> str:
    parallel = recipe.parallel
    size = world_size or parallel.model_parallel_size
    text = (
        f"{plural(size, 'process')}{'' if world_size else ' at least'}: tensor {parallel.tensor_model_parallel_size} x "
        f"pipeline {parallel.pipeline_model_parallel_size} x data {size // parallel.model_parallel_size}"
    )
    if max(stages) != parameters:
        text += f"; up to {max(stages):,} parameters in a process"
    return text


def _training(recipe: Recipe, lengths: Sequence[PhaseLength]) -> str:
    steps = ", ".join(f"{length.name} {length.steps:,}" for length in lengths)
    text = sum(length.samples for length in lengths) * recipe.data.seq_length
    words = sum(length.word_tokens for length in lengths)
    result = f"{plural(sum(length.steps for length in lengths), 'step')} ({steps}), {plural(text, 'token')} of text"
    if words:
        result += f" and about {words:,} of dictionary words ({words / (text + words):.1%})"
    section = recipe.alignment
    if section is not None and section.train_iters:
        ratio = section.lr / recipe.optimizer.lr
        result += (
            f"; learning rate {section.lr:g} in the alignment phase, then {recipe.optimizer.lr:g} (ratio {ratio:.2g})"
        )
    return result


def measure_word_coverage(
    recipe: Recipe, dictionary: DictionaryParts | None, tokenizer: Tokenizer
) -> dict[str, float] | None:
    """Share of the running words of each language that the alignment phase reaches; None without such a phase.

    Raises:
        UserError: A dataset is missing, corrupt, or preprocessed with another tokenizer.
    """
    if recipe.alignment is None or dictionary is None or dictionary.words is None:
        return None
    return word_coverage(dictionary.table, dictionary.words.words, recipe.data.sources, tokenizer)


def _dictionary(
    recipe: Recipe, dictionary: DictionaryParts | None, coverage: Mapping[str, float] | None
) -> list[tuple[str, str]]:
    if recipe.alignment is None or dictionary is None or dictionary.words is None:
        return []
    words = dictionary.words
    occurring = np.count_nonzero(words.frequency) / len(words.frequency)
    text = f"{plural(len(words.frequency), 'group')} of {len(words.first):,} words"
    if recipe.alignment.train_iters:
        text += f", drawn {dictionary_passes(recipe, dictionary):,.2f} times each in the alignment phase"
    counted = dictionary.table.group_count.any()
    text += f"; {occurring:.0%} have a source word of the counting corpus" if counted else "; built without --corpus"
    rows = [("dictionary", text)]
    if coverage:
        shares = ", ".join(f"{language} {share:.1%}" for language, share in coverage.items())
        rows.append(("coverage", f"running words that are words of the dictionary: {shares}"))
    return rows


def _few_passes(recipe: Recipe, dictionary: DictionaryParts | None) -> list[str]:
    section = recipe.alignment
    if section is None or not section.train_iters or dictionary is None or dictionary.words is None:
        return []
    drawn = dictionary_passes(recipe, dictionary)
    if drawn >= 1:
        return []
    return [
        f"the alignment phase draws a dictionary word {drawn:.2f} times on average; raise "
        "alignment.train_iters or alignment.words_per_step, or build the table with fewer words (dictionary build "
        "--min-count)"
    ]


def _little_coverage(
    recipe: Recipe, dictionary: DictionaryParts | None, coverage: Mapping[str, float] | None
) -> list[str]:
    if recipe.dictionary is None or dictionary is None:
        return []
    return [
        f"{share:.1%} of the running words of {language} are words of dictionary.table {recipe.dictionary.table}; "
        "check that both spell words alike (accents, apostrophes, script), use a larger list, or preprocess text "
        "without spaces between words with --segmenter"
        for language, share in (coverage or {}).items()
        if share < LITTLE_COVERAGE and language in dictionary.table.languages
    ]


def _source(each: SourcePasses) -> str:
    return (
        f"{each.source.path}: {each.source.language}, {each.source.tokens:,} training tokens, {each.share:.1%} of the "
        f"samples, {each.passes:,.2f} passes"
    )


def _sentences(each: SentencePairs) -> str:
    return (
        f"{each.name}, {each.measured:,} of {plural(each.documents, 'pair')} of {each.field} measured, of at most "
        f"{each.max_tokens} tokens a side"
    )


def _held_out_text(classes: WordClasses | None) -> list[tuple[str, str]]:
    """Tokens of the held-out text by class of word, one row per language."""
    if classes is None:
        return []
    rows = []
    for language, labels in classes.labels.items():
        shares = ", ".join(f"{CLASS_TEXTS[name]} {share:.1%}" for name, share in classes.shares(language).items())
        rows.append(("validation", f"{language}, {plural(len(labels), 'token')}: {shares}"))
    return rows


def _no_sentences(sentences: Sequence[SentencePairs]) -> list[str]:
    return [
        f"{each.field} ({each.name}): none of {plural(each.documents, 'pair')} of documents has 1 to {each.max_tokens} "
        "tokens on both sides, so sentence retrieval is not measured; split the documents into sentences or short "
        "paragraphs"
        for each in sentences
        if each.pairs is None
    ]


def _shuffled(recipe: Recipe, dictionary: DictionaryParts | None) -> list[str]:
    if recipe.dictionary is None or dictionary is None or dictionary.table.shuffled is None:
        return []
    table, seed = dictionary.table, dictionary.table.shuffled["seed"]
    what = "is a control with shuffled translations"
    if not table.is_control:
        what = f"has noise: the translations of {dictionary.table.shuffled['share']:.0%} of its words are shuffled"
    text = f"dictionary.table {recipe.dictionary.table} {what} (seed {seed})"
    if recipe.dictionary.evaluation_table is None:
        text += ", which evaluations measure too; set dictionary.evaluation_table to the table of true pairs"
    warnings = [text]
    made_for, fraction = dictionary.table.shuffled.get("held_out_fraction"), recipe.dictionary.held_out_fraction
    if fraction and fraction != made_for:
        warnings.append(
            f"dictionary.held_out_fraction is {fraction:g}, expected {made_for or 0:g}, for which "
            f"{recipe.dictionary.table} was shuffled: this run trains translations of held-out words as those of "
            f"others; make the table with dictionary shuffle --held-out-fraction {fraction:g}"
        )
    return warnings


def _repeated(read: Sequence[SourcePasses]) -> list[str]:
    return [
        f"{each.source.path} is read {each.passes:,.1f} times; up to 4 passes are worth almost as much as new text, "
        f"another after {MANY_PASSES} less than 0.4 of it (arXiv 2305.16264): add text, lower its weight or train for "
        "fewer steps"
        for each in read
        if each.passes > MANY_PASSES
    ]


def _checkpoints(recipe: Recipe, parameters: int, lengths: Sequence[PhaseLength]) -> tuple[str, list[str]]:
    """Text about the checkpoints, and warnings."""
    steps = SavedSteps.of_phases([length.steps for length in lengths], recipe.checkpoint.save_interval)
    most, size = most_checkpoints(steps, recipe.checkpoint), checkpoint_bytes(recipe, parameters)
    text = f"{steps.count():,} of {readable_bytes(size)}, at most {most:,} at once ({readable_bytes(most * size)})"
    free = free_disk_bytes(recipe.checkpoint_dir)
    if free is None:
        return text, []
    text += f"; {readable_bytes(free)} free"
    # Checkpoints of the run that already exist are replaced.
    existing = sum(directory_bytes(path) for path in step_directories(recipe.checkpoint_dir))
    if most * size <= free + existing:
        return text, []
    warning = (
        f"checkpoints need up to {readable_bytes(most * size)}, but the disk of {recipe.checkpoint_dir} has "
        f"{readable_bytes(free + existing)}: free disk space, lower checkpoint.keep or set checkpoint.directory"
    )
    return text, [warning]


def _memory(memory: Memory) -> str:
    text = (
        f"{readable_bytes(memory.total)} per process without activations: weights {readable_bytes(memory.weights)}, "
        f"gradients {readable_bytes(memory.gradients)}, optimizer {readable_bytes(memory.optimizer)}"
    )
    if memory.checkpoint_copy:
        text += f"; {readable_bytes(memory.checkpoint_copy)} of host memory to save in the background"
    return text


def _too_little_memory(memory: Memory, world_size: int) -> list[str]:
    """Warning if the processes on this machine need more than it has. Outside torchrun, all processes count."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    needed, available = processes * (memory.total + memory.checkpoint_copy), machine_memory()
    if available is None or needed <= available:
        return []
    copy = ", checkpoint.async_save: false" if memory.checkpoint_copy else ""
    return [
        f"memory of {plural(processes, 'process')} on this machine: {readable_bytes(needed)} without activations, but "
        f"it has {readable_bytes(available)}; use a smaller model, more machines{copy} or a GPU"
    ]
