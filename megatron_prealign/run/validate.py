"""Checks a recipe and the files it names without torch or a GPU: `pretrain --validate`, on a laptop before the job is
queued."""

from dataclasses import asdict

from megatron_prealign.checkpoint.resume.identity import OTHER_WEIGHTS, check_model, check_run, resume_fingerprint
from megatron_prealign.checkpoint.resume.start import StartPoint, preview_start
from megatron_prealign.checkpoint.state import model_identity, read_state
from megatron_prealign.data.dataset import contradictions
from megatron_prealign.data.indexed import check_indexed
from megatron_prealign.data.sidecar import Sidecar, load_sidecar
from megatron_prealign.data.word_bitmap import check_words
from megatron_prealign.errors import UserError
from megatron_prealign.recipe import DataSource, Recipe, ValidationSource
from megatron_prealign.run.dictionary import open_dictionary
from megatron_prealign.tokenizer.base import Tokenizer
from megatron_prealign.tokenizer.load import load_tokenizer


def validate(recipe: Recipe, world_size: int | None = None) -> str:
    """Checks everything that needs no tensor library; returns a summary for the user.

    Args:
        world_size: processes the run will have, or None to leave that check out.

    Raises:
        UserError: a file is missing or does not fit.
        RecipeValueError: `world_size` does not fit the recipe.
    """
    if world_size is not None:
        recipe.check_world_size(world_size)
    tokenizer = load_tokenizer(recipe.data.tokenizer)
    sources: list[DataSource | ValidationSource] = [*recipe.data.sources, *recipe.data.validation]
    sidecars = {source.path: _check_source(source) for source in sources}
    for path, sidecar in sidecars.items():
        if sidecar.tokenizer.fingerprint != tokenizer.fingerprint:
            raise UserError(
                f"{path} was made with another tokenizer ({sidecar.tokenizer.path}) than data.tokenizer "
                f"({recipe.data.tokenizer}); preprocess it with that one, or correct the recipe"
            )
    vocab_size = recipe.model.vocab_size
    if vocab_size is not None and vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"model.vocab_size is {vocab_size}, but the tokenizer {recipe.data.tokenizer} has {tokenizer.vocab_size} "
            "ids; raise it or leave it out"
        )
    open_dictionary(recipe, tokenizer.fingerprint)
    for source in recipe.data.sources:
        if sidecars[source.path].tokens <= recipe.data.seq_length:
            raise UserError(
                f"{source.path} has {sidecars[source.path].tokens} tokens, one sample needs data.seq_length + 1 = "
                f"{recipe.data.seq_length + 1}; add text, lower data.seq_length or drop the source"
            )
    start = _check_start(recipe, tokenizer, sidecars)
    tokens = sum(sidecars[source.path].tokens for source in recipe.data.sources)
    return f"{_summary(recipe, tokens)}\nthe run {start.describe()}"


def _check_start(recipe: Recipe, tokenizer: Tokenizer, sidecars: dict[str, Sidecar]) -> StartPoint:
    """Where the run would start, as far as the checkpoint and the sidecars tell.

    Raises:
        UserError: the checkpoint is damaged or of another run or model.
    """
    start = preview_start(recipe)
    if start.choice is None:
        return start
    size = recipe.model.vocab_size or tokenizer.vocab_size
    identity = model_identity(
        asdict(recipe.model), vocab_size=size, padded_vocab_size=size, tokenizer_fingerprint=tokenizer.fingerprint
    )
    if start.summary is None:
        check_model(start.checkpoint, read_state(start.checkpoint), identity, advice=OTHER_WEIGHTS)
        return start
    check_model(start.checkpoint, start.summary, identity)
    # Which source is which, the run finds out by what they hold; here their paths must do.
    known = {source["path"]: source["key"] for source in start.summary["run"]["sources"]}
    facts = resume_fingerprint(
        recipe,
        num_samples=start.summary["run"]["num_samples"],
        keys=[known.get(source.path, -1) for source in recipe.data.sources],
        segmenters=[sidecars[source.path].segmenter for source in recipe.data.sources],
    )
    check_run(start.checkpoint, start.summary, facts)
    return start


def _summary(recipe: Recipe, tokens: int) -> str:
    training = recipe.training
    budget = f"{training.train_tokens:,} tokens" if training.train_tokens else f"{training.train_iters:,} steps"
    parts = [name for name in ("alignment", "code_switch") if getattr(recipe, name) is not None]
    return (
        f"the recipe is sound: {budget} of training on sources of {tokens:,} tokens, languages "
        f"{', '.join(recipe.data.languages)}, {' and '.join(parts) or 'neither alignment nor code_switch'}"
    )


def _check_source(source: DataSource | ValidationSource) -> Sidecar:
    index = check_indexed(source.path)
    sidecar = load_sidecar(source.path)
    for problem in contradictions(source.path, index, sidecar):
        raise UserError(problem)
    if sidecar.language != source.language:
        raise UserError(
            f"{source.path} is in language {sidecar.language}, but the recipe says {source.language}; "
            "change one of the two"
        )
    # Validation does not switch words.
    if sidecar.segmenter is not None and isinstance(source, DataSource):
        check_words(source.path, sidecar.tokens, sidecar.segmenter)
    return sidecar
