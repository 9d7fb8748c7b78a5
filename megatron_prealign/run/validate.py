"""Checks a recipe and its files without torch or a GPU: `pretrain --validate`, for example on a laptop before
submitting the job."""

from collections.abc import Sequence
from dataclasses import asdict

from megatron_prealign.checkpoint.resume.changes import describe_changes, is_finished, nothing_to_do
from megatron_prealign.checkpoint.resume.identity import OTHER_WEIGHTS, check_model, check_run, resume_fingerprint
from megatron_prealign.checkpoint.resume.start import StartPoint, preview_start
from megatron_prealign.checkpoint.state import model_identity, read_state
from megatron_prealign.checkpoint.train_state import TrainState
from megatron_prealign.data.dataset import sidecar_mismatches
from megatron_prealign.data.indexed import Index, check_indexed
from megatron_prealign.data.sidecar import Sidecar, load_sidecar
from megatron_prealign.data.sources import count_training_tokens, held_out_documents
from megatron_prealign.data.word_bitmap import check_words
from megatron_prealign.errors import UserError
from megatron_prealign.evaluation.parallel_text import SentencePairs, measured_pairs, open_parallel_text
from megatron_prealign.evaluation.word_classes import WordClasses, word_classes
from megatron_prealign.evaluation.word_pairs import check_keep_best, evaluated_pairs, metric_names
from megatron_prealign.recipe import DataSource, Recipe, ValidationSource
from megatron_prealign.run.dictionary import DictionaryParts, open_dictionary
from megatron_prealign.run.missing_files import check_inputs_exist
from megatron_prealign.run.output_paths import check_output_paths
from megatron_prealign.run.plan import SourceTokens
from megatron_prealign.run.summary import measure_word_coverage, summarise
from megatron_prealign.run.vocabulary import model_vocab_size
from megatron_prealign.tokenizer.base import Tokenizer
from megatron_prealign.tokenizer.load import load_tokenizer
from megatron_prealign.training.wandb import check_wandb


def validate(recipe: Recipe, world_size: int | None = None) -> str:
    """Checks everything that needs no tensor library; returns a human-readable summary.

    Args:
        world_size: Number of processes of the run; None skips this check.

    Raises:
        UserError: A file is missing or incompatible with the recipe.
        RecipeValueError: `world_size` does not fit the recipe.
    """
    if world_size is not None:
        recipe.check_world_size(world_size)
    check_wandb(recipe)
    check_output_paths(recipe)
    check_inputs_exist(recipe)
    tokenizer = load_tokenizer(recipe.data.tokenizer)
    sources: list[DataSource | ValidationSource] = [*recipe.data.sources, *recipe.data.validation]
    opened = {source.path: _check_source(source) for source in sources}
    sidecars = {path: sidecar for path, (_, sidecar) in opened.items()}
    for path, sidecar in sidecars.items():
        if sidecar.tokenizer.fingerprint != tokenizer.fingerprint:
            raise UserError(
                f"{path}: preprocessed with another tokenizer ({sidecar.tokenizer.path}), expected data.tokenizer "
                f"({recipe.data.tokenizer}); preprocess it again or fix data.tokenizer"
            )
    vocab_size = model_vocab_size(recipe, tokenizer)
    dictionary = open_dictionary(recipe, tokenizer.fingerprint)
    sentences = open_parallel_text(recipe, tokenizer_fingerprint=tokenizer.fingerprint)
    classes = word_classes(recipe, None if dictionary is None else dictionary.measured, tokenizer)
    _check_keep_best(recipe, dictionary, sentences, classes, sidecars)
    for source in recipe.data.sources:
        if sidecars[source.path].tokens <= recipe.data.seq_length:
            raise UserError(
                f"{source.path}: got {sidecars[source.path].tokens} tokens, expected at least data.seq_length + 1 = "
                f"{recipe.data.seq_length + 1} for one sample; add text, lower data.seq_length or remove the source"
            )
    start = _check_start(recipe, tokenizer, vocab_size, sidecars)
    held_out = 0.0 if recipe.data.validation else recipe.data.validation_fraction
    summary = summarise(
        recipe,
        vocab_size=vocab_size,
        sources=[
            SourceTokens(each.path, each.language, each.weight, count_training_tokens(opened[each.path][0], held_out))
            for each in recipe.data.sources
        ],
        dictionary=dictionary,
        coverage=measure_word_coverage(recipe, dictionary, tokenizer),
        sentences=sentences,
        classes=classes,
        world_size=world_size,
        # With `auto`, the run may be on another machine, which has a GPU.
        on_cpu=recipe.parallel.device == "cpu",
    )
    warnings = [f"WARNING: {warning}" for warning in summary.warnings]
    lines = [_headline(recipe), *summary.lines(), *warnings, f"the run {start.describe()}"]
    return "\n".join([*lines, *_resumed(recipe, start)])


def _resumed(recipe: Recipe, start: StartPoint) -> list[str]:
    """Lines that a resumed run logs: what changed in the recipe, and that a complete run has nothing to do."""
    if start.summary is None:
        return []
    state, phase = TrainState.from_dict(start.summary["train_state"]), start.summary["phase"]
    lines = describe_changes(recipe, start.checkpoint, state.step, phase)
    if is_finished(recipe, start.checkpoint, start.summary):
        total = state.step - state.phase_step + (recipe.training.train_iters or state.phase_step)
        lines.append(nothing_to_do(recipe, state.step, total, changed=bool(lines)))
    return lines


def _check_keep_best(
    recipe: Recipe,
    dictionary: DictionaryParts | None,
    sentences: Sequence[SentencePairs],
    classes: WordClasses,
    sidecars: dict[str, Sidecar],
) -> None:
    """Checks that checkpoint.keep_best names a metric that evaluations measure.

    Raises:
        UserError: It does not.
    """
    if recipe.checkpoint.keep_best is None:
        return
    data = recipe.data
    held_out = {source.language for source in data.validation} or {
        source.language
        for source in data.sources
        if held_out_documents(sidecars[source.path].documents, data.validation_fraction)
    }
    words = None if dictionary is None else dictionary.measured
    pairs = evaluated_pairs(recipe, words, measured_pairs(sentences))
    check_keep_best(recipe, metric_names([each for each in data.languages if each in held_out], pairs, classes))


def _check_start(recipe: Recipe, tokenizer: Tokenizer, vocab_size: int, sidecars: dict[str, Sidecar]) -> StartPoint:
    """Returns where the run would start, as far as the checkpoint and the sidecars show.

    Raises:
        UserError: The checkpoint is corrupt or belongs to another run or model.
    """
    start = preview_start(recipe)
    if start.choice is None:
        return start
    identity = model_identity(
        asdict(recipe.model),
        vocab_size=vocab_size,
        padded_vocab_size=vocab_size,
        tokenizer_fingerprint=tokenizer.fingerprint,
    )
    if start.summary is None:
        check_model(start.checkpoint, read_state(start.checkpoint), identity, advice=OTHER_WEIGHTS)
        return start
    check_model(start.checkpoint, start.summary, identity)
    # The run matches sources by their content; here the paths must suffice.
    saved_keys = {source["path"]: source["key"] for source in start.summary["run"]["sources"]}
    fingerprint = resume_fingerprint(
        recipe,
        num_samples=start.summary["run"]["num_samples"],
        keys=[saved_keys.get(source.path, -1) for source in recipe.data.sources],
        segmenters=[sidecars[source.path].segmenter for source in recipe.data.sources],
    )
    check_run(start.checkpoint, start.summary, fingerprint)
    return start


def _headline(recipe: Recipe) -> str:
    parts = [name for name in ("alignment", "code_switch") if getattr(recipe, name) is not None]
    return (
        f"the recipe is valid: languages {', '.join(recipe.data.languages)}, "
        f"{' and '.join(parts) or 'neither alignment nor code_switch'}"
    )


def _check_source(source: DataSource | ValidationSource) -> tuple[Index, Sidecar]:
    index = check_indexed(source.path)
    sidecar = load_sidecar(source.path)
    for problem in sidecar_mismatches(source.path, index, sidecar):
        raise UserError(problem)
    if sidecar.language != source.language:
        raise UserError(
            f"{source.path}: language is {sidecar.language}, but the recipe says {source.language}; fix the recipe or "
            "preprocess the dataset again"
        )
    # Validation does not switch words.
    if sidecar.segmenter is not None and isinstance(source, DataSource):
        check_words(source.path, sidecar.tokens, sidecar.segmenter)
    return index, sidecar
