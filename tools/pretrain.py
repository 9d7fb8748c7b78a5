"""`megatron-prealign pretrain`: trains as a recipe says; run it again to resume."""

from collections.abc import Sequence

from megatron_prealign.arguments import underscored
from megatron_prealign.errors import UserError
from megatron_prealign.recipe.load import as_user_error, recipe_from_namespace, recipe_name, recipe_parser


def main(argv: Sequence[str]) -> int:
    """Parses the recipe, then validates it or trains."""
    parser = recipe_parser("pretrain")
    parser.add_argument(
        "--validate", action="store_true", help="check the recipe and its files, then stop; needs no torch"
    )
    parser.add_argument(
        "--world_size", type=int | None, default=None, help="with --validate: processes the run will have"
    )
    arguments = underscored(argv)
    with as_user_error(recipe_name(arguments)):
        values = parser.instantiate(parser.parse_args(arguments))
        recipe = recipe_from_namespace(values)
    if values.world_size is not None and not values.validate:
        raise UserError("--world_size is for --validate; a run takes the number of processes from torchrun")
    if values.validate:
        from megatron_prealign.run.validate import validate

        with as_user_error(recipe_name(arguments)):
            print(validate(recipe, values.world_size))
        return 0
    from megatron_prealign.runtime import log

    log.configure()
    from megatron_prealign.run.pretrain import pretrain

    state = pretrain(recipe)
    if state.stop_requested:
        log.logger.info("stopped at step %d, as asked; the same command goes on from there", state.step)
    return 0
