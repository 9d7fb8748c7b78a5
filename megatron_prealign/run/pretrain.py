"""Trains a model from a recipe, combining all packages. The command `pretrain` calls only `pretrain()`."""

import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from megatron_prealign.alignment.freezing import frozen_parameters
from megatron_prealign.alignment.words import WordSampler
from megatron_prealign.checkpoint.resume.agree import choose_start, rename_damaged_checkpoints
from megatron_prealign.checkpoint.resume.identity import code_switch_fingerprint, resume_fingerprint
from megatron_prealign.checkpoint.resume.load import load_weights, resume
from megatron_prealign.checkpoint.state import SHUFFLED_DICTIONARY, model_identity
from megatron_prealign.checkpoint.store import CheckpointStore
from megatron_prealign.checkpoint.train_state import TrainState
from megatron_prealign.code_switch.switcher import CodeSwitcher, SequenceFormat, SwitchedBatch, plain_batch
from megatron_prealign.conversion.config import huggingface_config
from megatron_prealign.data.samples import SampleBatch
from megatron_prealign.errors import UserError
from megatron_prealign.evaluation.evaluator import Evaluate, Evaluator
from megatron_prealign.evaluation.parallel_text import measured_pairs
from megatron_prealign.evaluation.watch import AlignmentWatch
from megatron_prealign.evaluation.word_pairs import check_keep_best
from megatron_prealign.model.build import build_model
from megatron_prealign.recipe import ALIGNMENT, Recipe, RecipeValueError
from megatron_prealign.run.dictionary import DictionaryParts
from megatron_prealign.run.directory import lock_run_directory, record_run, versions
from megatron_prealign.run.inputs import RunInputs, Vocabulary, open_inputs
from megatron_prealign.run.missing_files import check_inputs_exist
from megatron_prealign.run.output_paths import PROFILE_DIRECTORY
from megatron_prealign.run.plan import SourceTokens
from megatron_prealign.run.resume_report import report_resume
from megatron_prealign.run.summary import measure_word_coverage, summarise
from megatron_prealign.runtime.agreement import on_every_rank, on_rank_zero
from megatron_prealign.runtime.distributed import Runtime, running
from megatron_prealign.runtime.engine import wrap_data_parallel
from megatron_prealign.runtime.optimizer import build_optimizer, freeze
from megatron_prealign.training.alignment_phase import AlignmentPhase
from megatron_prealign.training.callbacks import Callback, GarbageCollection, StopOnRequest
from megatron_prealign.training.embedding_scale import EmbeddingScale
from megatron_prealign.training.guarded_phase import GuardedLanguageModelPhase
from megatron_prealign.training.language_model_phase import LanguageModelPhase
from megatron_prealign.training.metrics_log import MetricsLog, open_metrics
from megatron_prealign.training.microbatches import MakeBatch, SampleReader
from megatron_prealign.training.phase import Phase
from megatron_prealign.training.profile import Profile
from megatron_prealign.training.progress_log import ProgressLog
from megatron_prealign.training.save_checkpoints import SaveCheckpoints
from megatron_prealign.training.trainer import Trainer
from megatron_prealign.training.wandb import check_wandb
from megatron_prealign.training.word_steps import WordSteps

logger = logging.getLogger(__name__)


def build_sequence_format(recipe: Recipe, vocabulary: Vocabulary) -> SequenceFormat:
    """Format of the model's input sequences, in training and in validation."""
    return SequenceFormat(
        seq_length=recipe.data.seq_length,
        eod_id=vocabulary.tokenizer.eod_id,
        mask_eod=recipe.data.eod_mask_loss,
        reset_position_ids=recipe.data.reset_position_ids,
        reset_attention_mask=recipe.data.reset_attention_mask,
    )


def build_phases(recipe: Recipe, runtime: Runtime, inputs: RunInputs, words: WordSteps | None) -> list[Phase]:
    """Builds the phases of `recipe.phases`.

    Args:
        words: Word part of alignment steps; None without the section `alignment`.
    """
    reader = partial(SampleReader, inputs.train, runtime, every_stage=recipe.data.reset_attention_mask)
    phases: list[Phase] = []
    for plan in recipe.phases:
        if plan.name == ALIGNMENT:
            assert words is not None
            plain = _plain_batches(build_sequence_format(recipe, inputs.vocabulary))
            samples = reader(micro_batch_size=recipe.alignment_micro_batch_size, make_batch=plain)
            phases.append(AlignmentPhase(recipe, runtime, samples, words))
            continue
        make_batch, target_languages = _batches(recipe, runtime, inputs)
        samples = reader(micro_batch_size=recipe.training.micro_batch_size, make_batch=make_batch)
        if recipe.alignment_guard is None:
            phases.append(LanguageModelPhase(recipe, runtime, samples, target_languages=target_languages))
        else:
            assert words is not None
            phases.append(GuardedLanguageModelPhase(recipe, runtime, samples, words, target_languages=target_languages))
    return phases


def _plain_batches(sequence_format: SequenceFormat) -> MakeBatch:
    return lambda samples, consumed_tokens: plain_batch(samples.tokens, sequence_format)


def _batches(recipe: Recipe, runtime: Runtime, inputs: RunInputs) -> tuple[MakeBatch, Sequence[str] | None]:
    """Returns the function that builds language-model batches and the target languages of code-switching; None for the
    languages without code-switching."""
    sequence_format = build_sequence_format(recipe, inputs.vocabulary)
    if recipe.code_switch is None:
        return _plain_batches(sequence_format), None
    assert inputs.dictionary is not None and inputs.dictionary.switching is not None
    table = inputs.dictionary.switching.table
    switcher = CodeSwitcher(
        table,
        recipe.code_switch,
        sequence_format,
        seed=recipe.training.seed,
        languages=recipe.data.languages,
        device=runtime.device,
        coverage=inputs.coverage,
    )

    def switched(samples: SampleBatch, consumed_tokens: int) -> SwitchedBatch:
        return switcher(samples.tokens, samples.language, samples.sample_id, consumed_tokens, samples.word_starts)

    return switched, table.languages


def build_word_steps(recipe: Recipe, runtime: Runtime, dictionary: DictionaryParts | None) -> WordSteps | None:
    """Word part of alignment steps; None without the section `alignment`."""
    if recipe.alignment is None:
        return None
    assert dictionary is not None and dictionary.words is not None
    sampler = WordSampler(dictionary.table, dictionary.words, recipe.alignment, recipe.training.seed)
    return WordSteps(recipe, runtime, sampler)


def identity_of_model(recipe: Recipe, vocabulary: Vocabulary) -> dict[str, Any]:
    """Model properties that loaded weights must match."""
    return model_identity(
        asdict(recipe.model),
        vocab_size=vocabulary.size,
        padded_vocab_size=vocabulary.padded_size,
        tokenizer_fingerprint=vocabulary.tokenizer.fingerprint,
    )


def exported_config(recipe: Recipe, vocabulary: Vocabulary) -> dict[str, Any]:
    """The model's config.json as an export to Hugging Face writes it."""
    return huggingface_config(
        recipe.model,
        vocab_size=vocabulary.size,
        seq_length=recipe.data.seq_length,
        dtype="bfloat16" if recipe.training.precision == "bf16" else "float32",
        eod_id=vocabulary.tokenizer.eod_id,
    )


def identity_of_run(recipe: Recipe, inputs: RunInputs) -> dict[str, Any]:
    """Properties besides the model that a resumed run must match."""
    switching = None
    if recipe.code_switch is not None:
        assert recipe.dictionary is not None and inputs.dictionary is not None
        assert inputs.dictionary.switching is not None
        switching = code_switch_fingerprint(
            recipe.dictionary.table,
            recipe.code_switch,
            fingerprint=inputs.dictionary.switching.fingerprint,
            coverage=inputs.coverage,
        )
    properties = resume_fingerprint(
        recipe,
        num_samples=len(inputs.train),
        keys=[source.key for source in inputs.train.blend.sources],
        segmenters=inputs.train.segmenters,
        switching=switching,
    )
    if trains_with_dictionary(recipe) and inputs.dictionary is not None and inputs.dictionary.table.shuffled:
        properties[SHUFFLED_DICTIONARY] = inputs.dictionary.table.shuffled
    return properties


def trains_with_dictionary(recipe: Recipe) -> bool:
    """Whether a phase of the run uses the dictionary; evaluations alone do not count."""
    return recipe.alignment is not None or recipe.code_switch is not None


def pretrain(recipe: Recipe, *, leave_process_group: bool = False, callbacks: Sequence[Callback] = ()) -> TrainState:
    """Trains a model from a recipe, resuming from the run's newest checkpoint if there is one.

    Collective: call on all ranks.

    Args:
        leave_process_group: Keep torch's process group, which the caller started.
        callbacks: Callbacks to call after the built-in ones.

    Raises:
        UserError: The recipe or a file is invalid; raised on all ranks.
    """
    started_s = time.monotonic()
    with (
        running(
            recipe.parallel,
            seed=recipe.training.seed,
            control_timeout_minutes=recipe.checkpoint.timeout_minutes,
            leave_process_group=leave_process_group,
        ) as runtime,
        ExitStack() as locks,
    ):
        on_every_rank("checking the recipe", lambda: check_world_size(recipe, runtime))
        on_rank_zero("checking logging.wandb", lambda: check_wandb(recipe))
        on_rank_zero("checking the inputs", lambda: check_inputs_exist(recipe))
        on_rank_zero("checking logging.run_dir", lambda: lock_run_directory(recipe, locks))
        return _pretrain(recipe, runtime, callbacks, started_s)


def _pretrain(recipe: Recipe, runtime: Runtime, callbacks: Sequence[Callback], started_s: float) -> TrainState:
    start = choose_start(recipe)
    inputs = open_inputs(recipe, start)
    dictionary = inputs.dictionary
    words = on_every_rank("preparing the words", lambda: build_word_steps(recipe, runtime, dictionary))
    phases = on_every_rank("building the phases", lambda: build_phases(recipe, runtime, inputs, words))
    evaluator = Evaluator(
        recipe,
        runtime,
        inputs.validation,
        build_sequence_format(recipe, inputs.vocabulary),
        None if dictionary is None else dictionary.measured,
        measured_pairs(inputs.sentences),
        inputs.classes,
    )
    on_every_rank("checking checkpoint.keep_best", lambda: check_keep_best(recipe, evaluator.names))
    models = on_every_rank(
        "building the model", lambda: build_model(recipe, runtime, vocab_size=inputs.vocabulary.size)
    )
    freeze(frozen_parameters(recipe, models))
    chunks = wrap_data_parallel(models, recipe.parallel)
    optimizer = build_optimizer(recipe, chunks)
    heads = None if words is None else words.attach(chunks)
    identity = identity_of_model(recipe, inputs.vocabulary)
    run = identity_of_run(recipe, inputs)
    state = TrainState()
    if start.summary is not None:
        state = on_every_rank(
            "resuming",
            lambda: resume(start, chunks, optimizer, runtime, identity=identity, run=run, auxiliary=heads),
        )
    elif start.choice is not None:
        on_every_rank("loading weights", lambda: load_weights(chunks, optimizer, start.checkpoint, identity=identity))
    rename_damaged_checkpoints(start)
    store = CheckpointStore(
        recipe,
        runtime,
        identity=identity,
        run=run,
        huggingface=exported_config(recipe, inputs.vocabulary),
        versions=versions(),
        auxiliary=heads,
    )
    # Only now, since a rejected run must not overwrite the records of an existing run.
    on_rank_zero("writing into logging.run_dir", lambda: record_run(recipe, words))
    on_rank_zero("summarising the run", lambda: log_summary(recipe, runtime, inputs))
    report_resume(recipe, start, state, phases)
    metrics = on_rank_zero("opening the metrics", lambda: open_metrics(recipe)) or MetricsLog()
    own = build_callbacks(recipe, inputs, evaluator, store, metrics, started_s)
    trainer = Trainer(recipe, runtime, chunks, optimizer, phases, [*own, *callbacks], state)
    trainer.train()
    return state


def build_callbacks(
    recipe: Recipe,
    inputs: RunInputs,
    evaluator: Evaluator,
    store: CheckpointStore,
    metrics: MetricsLog,
    started_s: float,
) -> list[Callback]:
    """Returns what happens between the steps of a run, in its order.

    Args:
        started_s: Start of the process by `time.monotonic`, for `training.exit_after_minutes`.
    """
    watched = None if inputs.dictionary is None else inputs.dictionary.watched
    callbacks: list[Callback] = [
        StopOnRequest(store, exit_after_minutes=recipe.training.exit_after_minutes, started_s=started_s),
        ProgressLog(recipe, metrics, padded_vocab_size=inputs.vocabulary.padded_size),
        EmbeddingScale(metrics, inputs.vocabulary.size),
    ]
    if recipe.alignment_watch is not None and watched is not None:
        callbacks.append(AlignmentWatch(recipe.alignment_watch, watched, metrics))
    callbacks += [
        Evaluate(evaluator, metrics, recipe.training.eval_interval),
        SaveCheckpoints(store, inputs.train, metrics, recipe.checkpoint.save_interval),
        GarbageCollection(recipe.training.garbage_collection_interval),
    ]
    if recipe.logging.profile_steps is not None:
        callbacks.append(Profile(recipe.logging.profile_steps, Path(recipe.logging.run_dir) / PROFILE_DIRECTORY))
    return callbacks


def log_summary(recipe: Recipe, runtime: Runtime, inputs: RunInputs) -> None:
    """Logs what the run will do and need, and warnings about it."""
    summary = summarise(
        recipe,
        vocab_size=inputs.vocabulary.size,
        sources=[
            SourceTokens(source.path, source.language, source.weight, source.training_tokens)
            for source in inputs.train.blend.sources
        ],
        dictionary=inputs.dictionary,
        coverage=measure_word_coverage(recipe, inputs.dictionary, inputs.vocabulary.tokenizer),
        sentences=inputs.sentences,
        classes=inputs.classes,
        world_size=runtime.world_size,
        on_cpu=runtime.device.type == "cpu",
    )
    logger.info("training on %s", runtime.device)
    for line in summary.lines():
        logger.info("%s", line)
    for warning in summary.warnings:
        logger.warning("WARNING: %s", warning)


def check_world_size(recipe: Recipe, runtime: Runtime) -> None:
    """Checks that the number of processes fits the recipe.

    Raises:
        UserError: It does not.
    """
    try:
        recipe.check_world_size(runtime.world_size)
    except RecipeValueError as error:
        raise UserError(str(error)) from error
