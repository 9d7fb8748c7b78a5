"""The commands that a command suggests, parsed by the command line's own parser."""

import shlex
from typing import Any, NoReturn

import pytest

from megatron_prealign import cli
from megatron_prealign.cli import options, recipe_options


class Parsed(BaseException):
    """Ends a command after its options were parsed."""


def next_commands(output: str) -> list[list[str]]:
    """Words after `megatron-prealign`, or its start by torchrun, of each command that `output` suggests."""
    commands = [shlex.split(line.split("next: ", 1)[1]) for line in output.splitlines() if "next: " in line]
    # torchrun starts the module.
    starts = [words.index("megatron_prealign" if words[0] == "torchrun" else "megatron-prealign") for words in commands]
    return [words[start + 1 :] for words, start in zip(commands, starts, strict=True)]


def assert_next_commands_parse(output: str, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Fails unless the last line of `output` suggests a command and each suggested command parses; returns them."""
    commands = next_commands(output)
    assert "next: " in output.splitlines()[-1], output
    build = options.build_options

    def parse(*arguments: Any, **named: Any) -> NoReturn:
        build(*arguments, **named)
        raise Parsed

    with monkeypatch.context() as patch:
        patch.setattr(options, "build_options", parse)
        patch.setattr(recipe_options, "build_options", parse)
        for words in commands:
            # `--help` exits after it is printed.
            with pytest.raises((Parsed, SystemExit)) as caught:
                cli.main(words)
            assert isinstance(caught.value, Parsed) or caught.value.code == 0, words
    return commands
