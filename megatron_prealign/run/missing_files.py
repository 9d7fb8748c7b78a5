"""Names all inputs of a recipe that do not exist in one error, so that a user need not find them one by one. Imports no
torch."""

import os
from collections.abc import Iterator

from megatron_prealign.data.indexed import bin_path, idx_path
from megatron_prealign.errors import UserError, shortened
from megatron_prealign.recipe import Recipe


def check_inputs_exist(recipe: Recipe) -> None:
    """Checks that every path exists that the recipe reads, if more than one is missing.

    The error for a single one comes from the code that opens it, which knows more.

    Raises:
        UserError: Several inputs do not exist.
    """
    missing = [f"{field} {path}" for field, path, exists in _inputs(recipe) if not exists]
    if len(missing) > 1:
        raise UserError(
            f"{len(missing)} inputs of the recipe do not exist: {shortened(missing)}; prepare them "
            "(docs/getting_started.md lists the commands) or fix the paths, which are relative to the current directory"
        )


def _inputs(recipe: Recipe) -> Iterator[tuple[str, str, bool]]:
    """Field, path and whether it exists."""
    yield "data.tokenizer", recipe.data.tokenizer, os.path.exists(recipe.data.tokenizer)
    for name in ("sources", "validation"):
        for number, source in enumerate(getattr(recipe.data, name)):
            yield f"data.{name}[{number}].path", source.path, _dataset_exists(source.path)
    for number, text in enumerate(recipe.data.parallel_text):
        yield f"data.parallel_text[{number}].source", text.source, _dataset_exists(text.source)
        yield f"data.parallel_text[{number}].target", text.target, _dataset_exists(text.target)
    if recipe.dictionary is not None:
        for name in ("table", "evaluation_table"):
            path = getattr(recipe.dictionary, name)
            if path is not None:
                yield f"dictionary.{name}", path, os.path.exists(path)
    if recipe.checkpoint.load is not None:
        yield "checkpoint.load", recipe.checkpoint.load, os.path.exists(recipe.checkpoint.load)


def _dataset_exists(prefix: str) -> bool:
    return bin_path(prefix).exists() or idx_path(prefix).exists()
