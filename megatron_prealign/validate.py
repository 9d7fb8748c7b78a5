"""Checks a recipe and the files it names without torch or a GPU: `pretrain --validate`, on a laptop before the job is
queued."""

from pathlib import Path

from megatron_prealign.data.sidecar import Sidecar, load_sidecar
from megatron_prealign.dictionary.table import load_table
from megatron_prealign.errors import UserError
from megatron_prealign.recipe import DataSource, Recipe, ValidationSource


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
    if not Path(recipe.data.tokenizer).exists():
        raise UserError(
            f"data.tokenizer is {recipe.data.tokenizer}, which does not exist; expected a tokenizer folder or file"
        )
    sources: list[DataSource | ValidationSource] = [*recipe.data.sources, *recipe.data.validation]
    sidecars = {source.path: _check_source(source) for source in sources}
    first_path, first = next(iter(sidecars.items()))
    for path, sidecar in sidecars.items():
        if sidecar.tokenizer.fingerprint != first.tokenizer.fingerprint:
            raise UserError(
                f"{path} was made with another tokenizer ({sidecar.tokenizer.path}) than {first_path} "
                f"({first.tokenizer.path}); preprocess both with data.tokenizer ({recipe.data.tokenizer})"
            )
    vocab_size = recipe.model.vocab_size
    if vocab_size is not None and vocab_size < first.tokenizer.vocab_size:
        raise UserError(
            f"model.vocab_size is {vocab_size}, but the data's tokenizer has {first.tokenizer.vocab_size} ids; "
            "raise it or leave it out"
        )
    if recipe.dictionary is not None:
        load_table(recipe.dictionary.table).check_tokenizer(first.tokenizer.fingerprint)
    tokens = sum(sidecars[source.path].tokens for source in recipe.data.sources)
    languages = ", ".join(recipe.data.languages)
    return f"the recipe is sound: {len(sidecars)} datasets, {tokens:,} training tokens, languages {languages}"


def _check_source(source: DataSource | ValidationSource) -> Sidecar:
    for ending in (".bin", ".idx"):
        if not Path(source.path + ending).exists():
            raise UserError(f"{source.path}{ending} does not exist; make it with `megatron-prealign preprocess`")
    sidecar = load_sidecar(source.path)
    if sidecar.language != source.language:
        raise UserError(
            f"{source.path} is in language {sidecar.language}, but the recipe says {source.language}; "
            "change one of the two"
        )
    return sidecar
