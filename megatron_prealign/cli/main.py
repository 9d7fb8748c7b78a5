"""The `megatron-prealign` command: dispatches to sub-commands and prints user errors as one line, exit status 2."""

import contextlib
import importlib
import json
import os
import sys
import time
from collections.abc import Sequence

from megatron_prealign import __version__, interrupts
from megatron_prealign.cli.suggest import suggestion
from megatron_prealign.errors import UserError, memory_error, to_user_error

# Sub-command -> (module, one-line help). Only the selected module is imported, so that every `--help` takes less than
# half a second.
COMMANDS = {
    "train-tokenizer": (
        "megatron_prealign.tools.train_tokenizer",
        "train a tokenizer on text: byte-level BPE, sentencepiece",
    ),
    "preprocess": ("megatron_prealign.tools.preprocess", "tokenise text files into .bin/.idx datasets"),
    "dataset": (
        "megatron_prealign.tools.dataset",
        "merge, inspect, verify and repair datasets, build the sample index of a run",
    ),
    "dictionary": ("megatron_prealign.tools.dictionary", "build, merge, measure and preview word-translation tables"),
    "pretrain": ("megatron_prealign.tools.pretrain", "train a model from a recipe (single process or torchrun)"),
    "checkpoint": (
        "megatron_prealign.tools.checkpoint",
        "list, inspect and verify checkpoints, export their weights",
    ),
    "convert": (
        "megatron_prealign.tools.convert",
        "convert checkpoints to and from Hugging Face, verify the result",
    ),
    "generate": ("megatron_prealign.tools.generate", "generate text with a trained model"),
    "evaluate": ("megatron_prealign.tools.evaluate", "evaluate trained runs and write report.json and report.html"),
    "study": ("megatron_prealign.tools.study", "train, resume and tabulate a matrix of runs and seeds"),
    "benchmark": (
        "megatron_prealign.tools.benchmark",
        "benchmark kernels, phases, preprocessing and conversion on this machine",
    ),
    "doctor": ("megatron_prealign.tools.doctor", "check the installation and suggest fixes"),
}

EXIT_STATUSES = {
    0: "success",
    1: "problems found (verify, doctor)",
    2: "error in files or options",
    130: "interrupted",
}
"""Of every command."""
INTERRUPTED = "interrupted; unfinished output was removed; rerun the same command to start over or to resume"
"""Printed unless the command knows more."""


def usage() -> str:
    lines = [
        f"megatron-prealign {__version__}",
        "",
        "usage: megatron-prealign COMMAND [options] | --version",
        "",
        "commands:",
    ]
    lines += [f"  {name:<16} {text}" for name, (_, text) in COMMANDS.items()]
    lines += ["", "Run megatron-prealign COMMAND --help for the options of a command, --version for the version."]
    lines += ["", f"exit status: {', '.join(f'{status} {text}' for status, text in EXIT_STATUSES.items())}"]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one sub-command and returns the exit status, one of `EXIT_STATUSES`.

    Args:
        argv: Arguments; None for those of the process, which ends afterwards: its signals are then handled until its
            end.
    """
    if argv is not None:
        return _run_to_status(argv)
    interrupts.handle()
    try:
        status = _run_to_status(sys.argv[1:])
    finally:
        # A late signal must not change the status, nor write a traceback while the interpreter shuts down.
        interrupts.ignore()
    interrupts.leave(status)
    return status


def _run_to_status(argv: Sequence[str]) -> int:
    try:
        status = _run(argv)
        # Flush here rather than at interpreter exit, so that a closed pipe is handled below.
        sys.stdout.flush()
        return status
    except UserError as error:
        interrupts.ignore()
        return _report(error)
    except KeyboardInterrupt as interrupt:
        interrupts.ignore()
        if os.environ.get("RANK", "0") == "0":
            # A terminal shows ^C at the start of the line.
            newline = "\n" if sys.stderr.isatty() else ""
            print(f"{newline}{interrupt.args[0] if interrupt.args else INTERRUPTED}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of stdout has exited (`| head`); redirect stdout so that the flush at interpreter exit cannot fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (OSError, MemoryError, RuntimeError) as error:
        user_error = to_user_error(error) if isinstance(error, OSError) else memory_error(error)
        if user_error is None:
            raise
        interrupts.ignore()
        return _report(user_error)


def _run(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(__version__)
        return 0
    command = arguments[0]
    if command.startswith("-"):
        hint = suggestion(command, ("--help", "--version")) or "; expected a command, --help or --version"
        raise UserError(f"unknown option {command}{hint}")
    if command not in COMMANDS:
        hint = suggestion(command, COMMANDS) or f"; expected one of {', '.join(COMMANDS)}"
        raise UserError(f"unknown command {command}{hint}")
    return importlib.import_module(COMMANDS[command][0]).main(arguments[1:]) or 0


def _report(error: UserError) -> int:
    """Prints the error and returns the exit status."""
    rank = os.environ.get("RANK", "0")
    # A name or value in the message may contain line breaks.
    message = " ".join(str(error).splitlines())
    if rank == "0":
        print(f"error: {message}", file=sys.stderr)
    elif not error.agreed:
        # Rank 0 does not print this error.
        print(f"error: rank {rank}: {message}", file=sys.stderr)
    _report_to_torchrun(error)
    return error.exit_status


def _report_to_torchrun(error: UserError) -> None:
    """Writes the error file of torch.distributed.elastic, so that torchrun's own report, which comes last, contains the
    error."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is None:
        return
    extra = {"py_callstack": f"error: {error}", "timestamp": str(int(time.time()))}
    with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:
        json.dump({"message": {"message": str(error), "extraInfo": extra}}, file)
