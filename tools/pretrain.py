"""`megatron-prealign pretrain`: trains a model from a recipe; rerun it to resume."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_prealign.cli.options import with_dashes
from megatron_prealign.cli.recipe_options import open_recipe, parse_recipe_arguments
from megatron_prealign.errors import UserError
from megatron_prealign.recipe.load import as_user_error, recipe_name
from megatron_prealign.text import command, next_line


@dataclass(frozen=True, kw_only=True)
class PretrainOptions:
    """Trains a model from a recipe, in one process or under torchrun. Rerun the same command to resume."""

    validate: bool = False
    """Check the recipe and its files, print a summary and exit. Needs no torch and no GPU."""
    world_size: int | None = None
    """World size to check the recipe for, with --validate."""
    schema: bool = False
    """Print the JSON schema of a recipe, for completion and validation in editors, and exit."""


def main(argv: Sequence[str]) -> int:
    """Parses the recipe and validates it or trains."""
    options, arguments = parse_recipe_arguments("pretrain", PretrainOptions, argv)
    if options.schema:
        from megatron_prealign.recipe.schema import recipe_schema

        print(recipe_schema())
        return 0
    recipe = open_recipe(arguments, "pretrain")
    if options.world_size is not None and not options.validate:
        raise UserError("--world-size requires --validate; training takes the number of processes from torchrun")
    if options.validate:
        from megatron_prealign.run.validate import validate

        with as_user_error(recipe_name(arguments)):
            print(validate(recipe, options.world_size))
        print(next_line(_command(arguments, options.world_size or recipe.parallel.model_parallel_size)))
        return 0
    from megatron_prealign.runtime import log

    log.configure()
    from megatron_prealign.run.pretrain import pretrain

    state = pretrain(recipe)
    if os.environ.get("RANK", "0") == "0":
        from megatron_prealign.run.outcome import outcome

        is_launched = "WORLD_SIZE" in os.environ
        for line in outcome(recipe, state, rerun=None if is_launched else _command(arguments)).splitlines():
            log.logger.info("%s", line)
    return 0


def _command(arguments: Sequence[str], processes: int = 1) -> str:
    """Command that trains with the same recipe."""
    return command("pretrain", *with_dashes(arguments), processes=processes)
