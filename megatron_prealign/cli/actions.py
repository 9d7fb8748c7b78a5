"""Commands with actions, such as `megatron-prealign dataset merge`."""

from collections.abc import Callable, Mapping, Sequence

from megatron_prealign.cli import help
from megatron_prealign.cli.suggest import suggestion
from megatron_prealign.errors import UserError

Actions = Mapping[str, tuple[Callable[[Sequence[str]], int], str]]
"""Name -> (function, one-line help)."""


def run_action(command: str, actions: Actions, argv: Sequence[str]) -> int:
    """Runs `COMMAND ACTION` and returns the exit status; lists the actions with `--help` or without an action.

    Raises:
        UserError: the action is unknown.
    """
    if not argv or argv[0] in ("-h", "--help"):
        parts = [
            help.usage(command, ["ACTION", "[options]"]),
            help.rows("actions", ((name, text) for name, (_, text) in actions.items())),
            f"Run megatron-prealign {command} ACTION --help for the options of an action.",
        ]
        print("\n\n".join(parts))
        return 0 if argv else 2
    if argv[0] not in actions:
        hint = suggestion(argv[0], actions) or f"; expected one of {', '.join(actions)}"
        raise UserError(f"{command}: unknown action {argv[0]}{hint}")
    return actions[argv[0]][0](argv[1:])
