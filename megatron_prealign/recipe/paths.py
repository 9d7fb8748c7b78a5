"""Paths in a recipe are relative to the current directory, not to the recipe; says so where that is the error."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_prealign.errors import UserError
from megatron_prealign.recipe.recipe import Recipe


def check_relative_paths(recipe: Recipe, files: Sequence[str]) -> None:
    """Checks that no input is missing in the current directory but exists relative to one of the recipe's files.

    Raises:
        UserError: one does.
    """
    for field, path in _inputs(recipe):
        if os.path.isabs(path) or _exists(Path(path)):
            continue
        for file in files:
            directory = Path(file).parent
            if directory != Path() and _exists(directory / path):
                raise UserError(
                    f"{field} is {path}, which does not exist in the current directory {os.getcwd()} but next to the "
                    f"recipe: paths are relative to the current directory; run the command in {directory}"
                )


def _inputs(recipe: Recipe) -> Iterator[tuple[str, str]]:
    yield "data.tokenizer", recipe.data.tokenizer
    for number, source in enumerate(recipe.data.sources):
        yield f"data.sources[{number}].path", source.path
    for number, validation in enumerate(recipe.data.validation):
        yield f"data.validation[{number}].path", validation.path
    for number, text in enumerate(recipe.data.parallel_text):
        yield f"data.parallel_text[{number}].source", text.source
        yield f"data.parallel_text[{number}].target", text.target
    if recipe.dictionary is not None:
        yield "dictionary.table", recipe.dictionary.table
        if recipe.dictionary.evaluation_table is not None:
            yield "dictionary.evaluation_table", recipe.dictionary.evaluation_table
    if recipe.checkpoint.load is not None:
        yield "checkpoint.load", recipe.checkpoint.load


def _exists(path: Path) -> bool:
    """Whether a file, a directory or a dataset with this prefix exists."""
    return os.path.exists(path) or os.path.exists(f"{path}.idx")
