"""The `megatron-prealign` command: finds the sub-command, turns user errors into one line and exit status 2."""

import importlib
import os
import sys
from collections.abc import Sequence

from megatron_prealign import __version__
from megatron_prealign.cli.suggest import suggestion
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


def usage() -> str:
    lines = [f"megatron-prealign {__version__}", "", "usage: megatron-prealign COMMAND [options]", "", "commands:"]
    lines += [f"  {name:<16} {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join([*lines, "", "megatron-prealign COMMAND --help lists the options of one."])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one sub-command and returns the exit status: 0 done, 2 a user's error, 130 interrupted."""
    try:
        status = _run(list(sys.argv[1:] if argv is None else argv))
        # Here, and not when the interpreter exits: the reader may have gone away.
        sys.stdout.flush()
        return status
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
        refused = user_error_of(error)
        if refused is None:
            raise
        return _report(refused)


def _run(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(__version__)
        return 0
    command = arguments[0]
    if command not in COMMANDS:
        near, expected = suggestion(command, COMMANDS), f"; expected one of {', '.join(COMMANDS)}"
        raise UserError(f"unknown command {command}{near or expected}")
    return importlib.import_module(COMMANDS[command][0]).main(arguments[1:]) or 0


def _report(error: UserError) -> int:
    """Prints the line and returns the exit status."""
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        print(f"error: {error}", file=sys.stderr)
    elif not error.agreed:
        # Nobody else knows of it.
        print(f"error: rank {rank}: {error}", file=sys.stderr)
    return error.exit_status
