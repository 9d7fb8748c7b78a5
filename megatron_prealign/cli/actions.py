"""Commands that have actions of their own: `megatron-prealign dataset merge`."""

from collections.abc import Callable, Mapping, Sequence

from megatron_prealign.cli import help
from megatron_prealign.cli.suggest import suggestion
from megatron_prealign.errors import UserError

Actions = Mapping[str, tuple[Callable[[Sequence[str]], int], str]]
"""Name -> (function, one line of help)."""


def run_action(command: str, actions: Actions, argv: Sequence[str]) -> int:
    """Runs `COMMAND ACTION` and returns the exit status; without an action or with `--help` it lists them.

    Raises:
        UserError: the action is unknown.
    """
    if not argv or argv[0] in ("-h", "--help"):
        parts = [
            help.usage(command, ["ACTION", "[options]"]),
            help.rows("actions", ((name, text) for name, (_, text) in actions.items())),
            f"megatron-prealign {command} ACTION --help lists the options of an action.",
        ]
        print("\n\n".join(parts))
        return 0 if argv else 2
    if argv[0] not in actions:
        near, expected = suggestion(argv[0], actions), f"; expected one of {', '.join(actions)}"
        raise UserError(f"{command}: unknown action {argv[0]}{near or expected}")
    return actions[argv[0]][0](argv[1:])
