"""The `megatron-prealign` command: finds the sub-command, turns user errors into one line and exit status 2."""

import dataclasses
import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from megatron_prealign import __version__
from megatron_prealign.errors import UserError, user_error_of

# Sub-command -> (module, one line of help). Only the chosen module is imported: each `--help` must answer in under
# half a second.
COMMANDS = {
    "train-tokenizer": (
        "megatron_prealign.tools.train_tokenizer",
        "train a tokenizer on text: byte-level BPE, sentencepiece",
    ),
    "preprocess": ("megatron_prealign.tools.preprocess", "turn text files into .bin/.idx token files"),
    "dataset": (
        "megatron_prealign.tools.dataset",
        "merge, inspect, verify and repair datasets, prepare training's caches",
    ),
    "dictionary": ("megatron_prealign.tools.dictionary", "build, merge, measure and preview word-translation tables"),
    "pretrain": ("megatron_prealign.tools.pretrain", "train a model as a recipe says (alone or under torchrun)"),
    "checkpoint": (
        "megatron_prealign.tools.checkpoint",
        "list, inspect and verify checkpoints, take their weights out",
    ),
    "convert": (
        "megatron_prealign.tools.convert",
        "checkpoints to and from Hugging Face, and the proof that they agree",
    ),
    "evaluate": ("megatron_prealign.tools.evaluate", "measure checkpoints and write report.json and report.html"),
    "benchmark": (
        "megatron_prealign.tools.benchmark",
        "measure kernels, phases, preprocessing and conversion on this machine",
    ),
    "doctor": ("megatron_prealign.tools.doctor", "check the installation, one line a part with the fix"),
}

Options = TypeVar("Options")


def parse_options(options: type[Options], command: str, argv: Sequence[str]) -> Options:
    """Parses `argv` into the dataclass `options`; its docstring and field docstrings are the help text.

    Options may be written with dashes or underscores; an option that takes several values takes them one after another.

    Raises:
        UserError: an unknown option, a missing one or a value of the wrong type.
    """
    from megatron_prealign.arguments import join_values, underscored, with_value
    from megatron_prealign.recipe.load import as_user_error, new_parser

    arguments = underscored(argv)
    for field in dataclasses.fields(options):  # type: ignore[arg-type]
        if str(field.type).startswith("list["):
            arguments = join_values(arguments, f"--{field.name}")
        elif field.type is bool:
            arguments = with_value(arguments, f"--{field.name}")
    parser = new_parser(command, options.__doc__ or "")
    # Its docstring is the description already.
    parser.add_class_arguments(options, as_group=False)
    for action in parser._actions:
        # As the documentation writes them; they are looked up under the names that they were made with.
        action.option_strings = [name.replace("_", "-") for name in action.option_strings]
    with as_user_error(f"megatron-prealign {command}"):
        values = parser.parse_args(arguments)
        return options(**{field.name: values[field.name] for field in dataclasses.fields(options)})  # type: ignore[arg-type]


Actions = Mapping[str, tuple[Callable[[Sequence[str]], int], str]]
"""Of a sub-command with actions of its own: name -> (function, one line of help)."""


def run_action(command: str, actions: Actions, argv: Sequence[str]) -> int:
    """Runs `COMMAND ACTION` and returns the exit status; without an action or with `--help` it lists them.

    Raises:
        UserError: the action is unknown.
    """
    if not argv or argv[0] in ("-h", "--help"):
        # the next even column behind the longest name
        width = (max(map(len, actions)) + 2) // 2 * 2
        lines = [f"usage: megatron-prealign {command} ACTION [options]", "", "actions:"]
        lines += [f"  {name:<{width}} {text}" for name, (_, text) in actions.items()]
        print("\n".join([*lines, "", f"megatron-prealign {command} ACTION --help lists the options of one."]))
        return 0 if argv else 2
    if argv[0] not in actions:
        raise UserError(f"{command}: unknown action {argv[0]!r}, expected one of {', '.join(actions)}")
    return actions[argv[0]][0](argv[1:])


def usage() -> str:
    lines = [f"megatron-prealign {__version__}", "", "usage: megatron-prealign COMMAND [options]", "", "commands:"]
    lines += [f"  {name:<16} {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join([*lines, "", "megatron-prealign COMMAND --help lists the options of one."])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one sub-command and returns the exit status: 0 done, 2 a user's mistake, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(__version__)
        return 0
    command = arguments[0]
    if command not in COMMANDS:
        print(f"error: unknown command {command!r}; expected one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    try:
        return importlib.import_module(COMMANDS[command][0]).main(arguments[1:]) or 0
    except UserError as error:
        return _report(error)
    except KeyboardInterrupt as interrupt:
        if interrupt.args:
            print(f"\n{interrupt}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output went away (`| head`); point stdout elsewhere so that the interpreter's exit flush is
        # quiet.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        mistake = user_error_of(error)
        if mistake is None:
            raise
        return _report(mistake)


def _report(error: UserError) -> int:
    """Prints the line and returns the exit status."""
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        print(f"error: {error}", file=sys.stderr)
    elif not error.agreed:
        # Nobody else knows of it.
        print(f"error: rank {rank}: {error}", file=sys.stderr)
    return error.exit_status
