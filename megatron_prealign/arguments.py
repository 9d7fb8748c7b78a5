"""Argument spellings that jsonargparse does not take by itself: `--input a b c`, `--text-key` and a bare `--json`."""

import json
from collections.abc import Sequence


def underscored(argv: Sequence[str]) -> list[str]:
    """Turns `--text-key x` into `--text_key x`, as the fields are called. Values stay as they are."""
    changed = []
    for argument in argv:
        name, equals, value = argument.partition("=")
        changed.append(
            (name.replace("-", "_").replace("__", "--", 1) if name.startswith("--") else name) + equals + value
        )
    return changed


def with_value(argv: Sequence[str], option: str) -> list[str]:
    """Writes a bare `option` as `option=true`, since jsonargparse wants a value after a boolean option."""
    followers = [*argv, ""][1:]
    return [
        f"{option}=true" if argument == option and follower.lower() not in ("true", "false") else argument
        for argument, follower in zip(argv, followers, strict=True)
    ]


def join_values(argv: Sequence[str], option: str) -> list[str]:
    """Turns `option a b c` (or the option several times, or `option=a`) into the one JSON list that jsonargparse takes.

    Args:
        argv: the arguments.
        option: the option with its dashes, like `--input`. Its values end at the next argument that starts with `--`.
    """
    rest: list[str] = []
    values: list[str] = []
    found = taking = False
    for argument in argv:
        if argument == option or argument.startswith(f"{option}="):
            found = taking = True
            values += [argument[len(option) + 1 :]] if "=" in argument else []
        elif argument.startswith("--") or argument == "-h":
            taking = False
            rest.append(argument)
        else:
            (values if taking else rest).append(argument)
    return [*rest, f"{option}={json.dumps(values)}"] if found else rest
